//! Updates to a version that keeps its records in another layout, as clients and operators see them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::process::{Child, Output};
use std::time::Duration;

use serde_json::Value;
use warmswap_load::resp::Reply;
use warmswap_load::{LoadResult, RunningLoad};
use warmswap_tests::{LENIENT, Requirement, Store, Update, eventually, needs};

const KEYS: usize = 300;
/// Emulated machines take their time.
const PATIENCE: Duration = Duration::from_secs(120);

fn start(name: &'static str, handover: &str) -> (Store, RunningLoad) {
    let store = Store::start(name, handover).unwrap();
    store.write_keys(KEYS).unwrap();
    let load = store.load().unwrap();
    (store, load)
}

fn assert_clean(load: RunningLoad) {
    let LoadResult { totals, faults, connections, connections_kept, .. } = load.stop().unwrap();
    assert!(totals.is_clean() && totals.writes_acknowledged > 0, "{totals:?}\n{faults:?}");
    assert_eq!(connections_kept, connections);
}

fn version(store: &Store) -> String {
    let info = store.client().unwrap().command(&["INFO"]).unwrap();
    let Reply::Bulk(Some(info)) = info else { panic!("{info}") };
    let info = String::from_utf8(info).unwrap();
    info.lines().find_map(|line| line.strip_prefix("session_store_version:")).unwrap().to_owned()
}

/// An update whose new generation serves and is being verified, for as long as the test wants.
fn verified(store: &Store, version: &str) -> Child {
    let image = store.image(version).unwrap();
    store.begin_update(&["--image", &image.to_string_lossy()], "verifying").unwrap()
}

fn long_verify() -> String {
    LENIENT.replace("verify_s_min = 1", "verify_s_min = 60")
}

/// How the update ended, once it has.
fn end_of(update: Child) -> Update {
    let Output { status, stdout, stderr } = update.wait_with_output().unwrap();
    let stdout = String::from_utf8(stdout).unwrap();
    let lines = serde_json::Deserializer::from_str(&stdout).into_iter::<Value>().map(Result::unwrap);
    let report = lines.filter_map(|line| line.get("report").cloned()).last();
    let stderr = String::from_utf8(stderr).unwrap();
    Update { said: warmswap_tests::Said { status: status.code(), stdout, stderr }, report }
}

fn visit(store: &Store, expected: i64) {
    assert_eq!(store.client().unwrap().command(&["INCR", "visits"]).unwrap(), Reply::Integer(expected));
}

#[test]
fn a_change_of_schema_commits_under_load_and_the_old_version_is_refused_then() {
    needs!("a_change_of_schema_commits_under_load_and_the_old_version_is_refused_then", Requirement::Containers);
    let (store, load) = start("scenario-schema", LENIENT);
    let update = store.update("v4").unwrap();
    assert_eq!(update.verdict(), "committed", "{}\n{}", update.reason(), store.log());
    assert_eq!(update.report.as_ref().unwrap()["lost"], serde_json::json!([]));
    let said = &update.said.stdout;
    assert!(said.contains("schema 1 to 2") && !said.contains("no state rollback"), "{said}");
    assert_eq!(version(&store), "4.0.0");
    store.check_keys(KEYS).unwrap();
    visit(&store, 1);

    let back = store.update("v1").unwrap();
    assert_eq!(back.verdict(), "aborted", "{back:?}");
    let words = "cannot read the state of g2: it is written in schema 2, g3 reads [1] during WARM";
    assert!(back.reason().contains(words), "{}", back.reason());

    // The older log is gone, and the next version reads the new one as any other.
    let update = store.update("v5").unwrap();
    assert_eq!(update.verdict(), "committed", "{}\n{}", update.reason(), store.log());
    assert!(!update.said.stdout.contains("schema 2 to"), "{}", update.said.stdout);
    visit(&store, 2);
    store.check_keys(KEYS).unwrap();
    assert_clean(load);
    store.finish().unwrap();
}

#[test]
fn a_rollback_over_a_change_of_schema_carries_what_was_written_since() {
    needs!("a_rollback_over_a_change_of_schema_carries_what_was_written_since", Requirement::Containers);
    let (store, load) = start("scenario-back", &long_verify());
    visit(&store, 1);
    let update = verified(&store, "v4");
    assert_eq!(version(&store), "4.0.0");
    visit(&store, 2);
    store.write_keys(KEYS * 2).unwrap();
    let rollback = store.hand_over(&["rollback", "scenario-back"]).unwrap();
    assert_eq!(rollback.verdict(), "rolled_back", "{rollback:?}\n{}", store.log());
    assert_eq!(end_of(update).verdict(), "rolled_back");
    assert_eq!((store.owner().unwrap(), version(&store).as_str()), (1, "1.0.0"));
    visit(&store, 3);
    store.check_keys(KEYS * 2).unwrap();
    assert_clean(load);
    store.finish().unwrap();
}

#[test]
fn a_version_without_a_way_back_is_labelled_and_kept() {
    needs!("a_version_without_a_way_back_is_labelled_and_kept", Requirement::Containers);
    let (store, load) = start("scenario-oneway", &long_verify());
    visit(&store, 1);
    let update = verified(&store, "v5");
    visit(&store, 2);
    let rollback = store.hand_over(&["rollback", "scenario-oneway"]).unwrap();
    for update in [rollback, end_of(update)] {
        assert_eq!(update.verdict(), "committed", "{update:?}\n{}", store.log());
        let words = "kept all the same, because there is no state rollback: g1 cannot read what is written in schema 2";
        assert!(update.reason().contains(words), "{}", update.reason());
        let lost = update.report.unwrap()["lost"].to_string();
        assert!(lost.contains("no state rollback"), "{lost}");
    }
    assert_eq!((store.owner().unwrap(), version(&store).as_str()), (2, "5.0.0"));
    visit(&store, 3);
    store.check_keys(KEYS).unwrap();
    assert_clean(load);
    store.finish().unwrap();
}

#[test]
fn an_owner_that_dies_as_it_is_verified_loses_no_write_in_either_schema() {
    needs!("an_owner_that_dies_as_it_is_verified_loses_no_write_in_either_schema", Requirement::Containers);
    // Back to the parked generation, or on with a new one of the new version.
    for (name, new, verdict, owner, version_after) in
        [("scenario-dead-back", "v4", "rolled_back", 1, "1.0.0"), ("scenario-dead-on", "v5", "committed", 3, "5.0.0")]
    {
        let store = Store::start(name, &long_verify()).unwrap();
        store.write_keys(KEYS).unwrap();
        visit(&store, 1);
        let update = verified(&store, new);
        visit(&store, 2);
        store.write_keys(KEYS * 2).unwrap();
        for pid in store.pids(2).unwrap() {
            // SAFETY: a system call without memory, on a process of a container of ours.
            assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
        }
        let update = end_of(update);
        assert_eq!(update.verdict(), verdict, "{update:?}\n{}", store.log());
        assert!(update.reason().contains("SIGKILL"), "{}", update.reason());
        eventually("a generation owns the service", PATIENCE, || store.owner().is_ok_and(|found| found == owner));
        assert_eq!(version(&store), version_after);
        visit(&store, 3);
        store.check_keys(KEYS * 2).unwrap();
        store.finish().unwrap();
    }
}
