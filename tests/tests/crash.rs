//! Somebody dies, at a bad moment.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::io::{BufRead as _, BufReader};
use std::process::Child;
use std::time::Duration;

use warmswap_load::resp::Reply;
use warmswap_load::{LoadResult, RunningLoad};
use warmswap_tests::hesitant::Hesitant;
use warmswap_tests::{LENIENT, Requirement, Store, eventually, needs};

const KEYS: usize = 200;
/// Emulated machines take their time.
const PATIENCE: Duration = Duration::from_secs(120);

fn start(name: &'static str, handover: &str) -> Store {
    let store = Store::start(name, handover).unwrap();
    store.write_keys(KEYS).unwrap();
    store
}

fn assert_clean(load: RunningLoad) {
    let LoadResult { totals, faults, connections, connections_kept, .. } = load.stop().unwrap();
    assert!(totals.is_clean() && totals.writes_acknowledged > 0, "{totals:?}\n{faults:?}");
    assert_eq!(connections_kept, connections);
}

fn assert_updates(store: &Store, version: &str) {
    let update = store.update(version).unwrap();
    assert_eq!(update.verdict(), "committed", "{}\n{}", update.reason(), store.log());
    assert_eq!(update.report.unwrap()["rung"], "full");
    store.check_keys(KEYS).unwrap();
}

/// So much that the log goes on in segments that nobody but the service knows of when no agent runs.
const LARGE_KEYS: usize = 600;

fn large_value(key: usize) -> String {
    format!("{key:0>60000}")
}

fn write_segments(store: &Store) {
    let mut client = store.client().unwrap();
    for key in 0..LARGE_KEYS {
        let reply = client.command(&["SET", &format!("large:{key}"), &large_value(key)]).unwrap();
        assert_eq!(reply, Reply::Simple("OK".into()));
    }
}

fn check_segments(store: &Store) {
    let mut client = store.client().unwrap();
    for key in 0..LARGE_KEYS {
        let reply = client.command(&["GET", &format!("large:{key}")]).unwrap();
        assert!(reply == Reply::Bulk(Some(large_value(key).into_bytes())), "large:{key} is gone or differs");
    }
}

/// To a process of a container of ours.
fn signal(pid: i32, signal: i32) {
    // SAFETY: a system call without memory.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0, "process {pid} is not there");
}

fn kill(pid: i32) {
    signal(pid, libc::SIGKILL);
}

/// A store under load, and an update of it that waits at `place` of its handover.
fn held_at(name: &'static str, place: &str) -> (Store, RunningLoad, Child, Hesitant) {
    let handover = format!("warm_s_max = 600\nsync_s_max = 600\n{}", LENIENT.replace("= 2000", "= 600000"));
    let store = start(name, &handover);
    let load = store.load().unwrap();
    let file = store.hesitant_file(place, &handover).unwrap();
    let update = store.begin_update(&["--file", &file.to_string_lossy()], "preparing").unwrap();
    let shadow = store.hesitant(2).unwrap();
    let status = store.status().unwrap();
    let roles = status["generations"].as_array().unwrap().iter().map(|member| &member["role"]).collect::<Vec<_>>();
    assert_eq!(roles, ["owner", "shadow"], "{status}");
    (store, load, update, shadow)
}

/// Whoever waited for the update learns that nobody can tell them its end.
fn assert_bereft(update: Child) {
    let output = update.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && stderr.contains("the agent went away"), "{}: {stderr}", output.status);
}

/// The next agent makes as if the update had never begun, and says so.
fn assert_undone(store: &Store, owner: &[i32]) {
    assert_eq!((store.owner().unwrap(), store.pids(1).unwrap().as_slice()), (1, owner), "{}", store.log());
    let status = store.status().unwrap();
    assert_eq!(status["generations"].as_array().unwrap().len(), 1, "the shadow is gone: {status}");
    assert!(status["activity"].is_null() && status["trouble"].is_null(), "{status}");
    assert!(status["image"].as_str().unwrap().ends_with("/v1"), "{status}");
    let history = store.ground().json(&["history", status["name"].as_str().unwrap()]).unwrap();
    let last = history.as_array().and_then(|reports| reports.last()).cloned().unwrap_or_default();
    assert_eq!(last["verdict"], "aborted", "{history}");
    assert_eq!(last["reason"], "the agent died before PROMOTE", "{history}");
    store.check_keys(KEYS).unwrap();
}

#[test]
fn a_killed_agent_is_not_missed_and_its_successor_finds_the_service() {
    needs!("a_killed_agent_is_not_missed_and_its_successor_finds_the_service", Requirement::Containers);
    let mut store = start("scenario-agent", LENIENT);
    let pids = store.pids(1).unwrap();
    assert!(!pids.is_empty());
    let mut client = store.client().unwrap();
    assert_eq!(client.command(&["INCR", "visits"]).unwrap(), Reply::Integer(1));
    let load = store.load().unwrap();

    store.kill_agent().unwrap();
    assert_eq!(client.command(&["INCR", "visits"]).unwrap(), Reply::Integer(2));
    store.check_keys(KEYS).unwrap();
    let said = store.ground().warmswap(&["status"]).unwrap();
    assert!(!said.success() && said.stderr.contains("no agent answers"), "{said:?}");

    store.start_agent().unwrap();
    assert_eq!((store.owner().unwrap(), store.pids(1).unwrap()), (1, pids), "the service was not touched");
    assert_eq!(client.command(&["INCR", "visits"]).unwrap(), Reply::Integer(3));
    assert_updates(&store, "v2");
    assert_eq!(client.command(&["INCR", "visits"]).unwrap(), Reply::Integer(4));
    assert_clean(load);
    store.finish().unwrap();
}

/// As `pkill -9 warmswap` does.
#[test]
fn a_service_outlives_everything_of_warmswap_and_is_taken_over_with_its_connections() {
    needs!("a_service_outlives_everything_of_warmswap_and_is_taken_over_with_its_connections", Requirement::Containers);
    let mut store = start("scenario-alone", LENIENT);
    let (pids, shims) = (store.pids(1).unwrap(), store.shims().unwrap());
    assert_eq!(shims.len(), 1);
    let load = store.load().unwrap();
    store.kill_agent().unwrap();
    shims.into_iter().for_each(kill);
    write_segments(&store);

    store.start_agent().unwrap();
    assert_eq!((store.owner().unwrap(), store.pids(1).unwrap()), (1, pids), "the service was not touched");
    let status = store.status().unwrap();
    assert!(status["trouble"].as_str().is_some_and(|trouble| trouble.contains("shim")), "{status}");
    assert_updates(&store, "v2");
    assert!(store.status().unwrap()["trouble"].is_null(), "the new generation has a shim of its own");
    assert_eq!(store.shims().unwrap().len(), 1);
    check_segments(&store);
    assert_clean(load);
    store.finish().unwrap();
}

#[test]
fn an_agent_killed_in_the_middle_of_a_handover_leaves_one_owner() {
    needs!("an_agent_killed_in_the_middle_of_a_handover_leaves_one_owner", Requirement::Containers);
    let mut store = start("scenario-middle", &LENIENT.replace("verify_s_min = 1", "verify_s_min = 20"));
    let load = store.load().unwrap();
    let v2 = store.image("v2").unwrap();
    let update = store.begin_update(&["--image", &v2.to_string_lossy()], "verifying").unwrap();
    store.kill_agent().unwrap();
    let output = update.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && stderr.contains("agent"), "{}: {stderr}", output.status);
    store.check_keys(KEYS).unwrap();

    store.start_agent().unwrap();
    eventually("one generation owns the service", PATIENCE, || store.owner().is_ok());
    eventually("the service is at rest", PATIENCE, || store.status().is_ok_and(|s| s["activity"].is_null()));
    store.check_keys(KEYS).unwrap();
    store.write_keys(KEYS).unwrap();
    assert_clean(load);
    let status = store.status().unwrap();
    assert_eq!(status["image"], v2.to_string_lossy().as_ref(), "what runs is what is recorded: {status}");
    let history = store.ground().json(&["history", "scenario-middle"]).unwrap();
    let last = history.as_array().and_then(|reports| reports.last()).cloned().unwrap_or_default();
    assert!(last["reason"].as_str().is_some_and(|reason| reason.contains("the agent died")), "{history}");
    store.finish().unwrap();
}

#[test]
fn an_agent_killed_while_the_shadow_warms_up_or_catches_up_is_not_missed() {
    let name = "an_agent_killed_while_the_shadow_warms_up_or_catches_up_is_not_missed";
    needs!(name, Requirement::Containers);
    for (service, place) in [("scenario-warm", "ready"), ("scenario-sync", "round-1")] {
        let (mut store, load, update, _) = held_at(service, place);
        let owner = store.pids(1).unwrap();
        let mut client = store.client().unwrap();
        assert_eq!(client.command(&["INCR", "visits"]).unwrap(), Reply::Integer(1));

        store.kill_agent().unwrap();
        assert_bereft(update);
        assert_eq!(client.command(&["INCR", "visits"]).unwrap(), Reply::Integer(2), "{place}");
        store.check_keys(KEYS).unwrap();

        store.start_agent().unwrap();
        assert_undone(&store, &owner);
        assert_eq!(client.command(&["INCR", "visits"]).unwrap(), Reply::Integer(3), "{place}");
        assert_updates(&store, "v2");
        assert_eq!(client.command(&["INCR", "visits"]).unwrap(), Reply::Integer(4), "{place}");
        assert_clean(load);
        store.finish().unwrap();
    }
}

/// Wherever between QUIESCE and VERIFY that is: one owner, every acknowledged write, every connection.
#[test]
fn an_agent_killed_as_the_owner_is_told_to_yield_leaves_one_owner() {
    needs!("an_agent_killed_as_the_owner_is_told_to_yield_leaves_one_owner", Requirement::Containers);
    let mut store = start("scenario-yield", LENIENT);
    let load = store.load().unwrap();
    let mut client = store.client().unwrap();
    for (visit, version) in (1..).zip(["v2", "v1", "v2", "v1"]) {
        let image = store.image(version).unwrap();
        let before = store.status().unwrap();
        let mut update = store.begin_update(&["--image", &image.to_string_lossy()], "preparing").unwrap();
        let mut lines = BufReader::new(update.stdout.take().unwrap()).lines().map(Result::unwrap);
        assert!(lines.any(|line| line.contains("phase_begun") && line.contains("quiesce")), "{}", store.log());
        store.kill_agent().unwrap();
        assert_bereft(update);
        assert_eq!(client.command(&["INCR", "alone"]).unwrap(), Reply::Integer(visit), "no agent runs");

        store.start_agent().unwrap();
        let status = store.status().unwrap();
        assert!(status["activity"].is_null() && status["trouble"].is_null(), "{status}\n{}", store.log());
        assert_eq!(status["generations"].as_array().unwrap().len(), 1, "{status}");
        let history = store.ground().json(&["history", "scenario-yield"]).unwrap();
        let last = history.as_array().and_then(|reports| reports.last()).cloned().unwrap_or(history);
        let now_serves = match last["reason"].as_str().unwrap() {
            "the agent died before PROMOTE" => before,
            "the agent died after PROMOTE; kept without being verified" => status.clone(),
            other => panic!("{other}"),
        };
        assert_eq!((&status["owner"], &status["image"]), (&now_serves["owner"], &now_serves["image"]), "{last}");
        assert_eq!(client.command(&["INCR", "visits"]).unwrap(), Reply::Integer(visit));
        store.check_keys(KEYS).unwrap();
    }
    assert_clean(load);
    store.finish().unwrap();
}

#[test]
fn stop_all_after_an_agent_killed_in_the_middle_leaves_nothing() {
    needs!("stop_all_after_an_agent_killed_in_the_middle_leaves_nothing", Requirement::Containers);
    let mut store = start("scenario-strike", &LENIENT.replace("verify_s_min = 1", "verify_s_min = 20"));
    let v2 = store.image("v2").unwrap();
    let update = store.begin_update(&["--image", &v2.to_string_lossy()], "verifying").unwrap();
    store.kill_agent().unwrap();
    assert!(!update.wait_with_output().unwrap().status.success());
    store.finish().unwrap();
}

#[test]
fn an_owner_that_dies_is_started_again_with_every_acknowledged_write() {
    needs!("an_owner_that_dies_is_started_again_with_every_acknowledged_write", Requirement::Containers);
    let store = start("scenario-owner", LENIENT);
    let pids = store.pids(1).unwrap();
    assert_eq!(pids.len(), 1, "session-store is one process");
    kill(pids[0]);
    eventually("somebody else serves", PATIENCE, || store.owner().is_ok_and(|owner| owner > 1));
    store.check_keys(KEYS).unwrap();
    assert_updates(&store, "v2");
    store.finish().unwrap();
}

#[test]
fn an_owner_that_dies_while_no_agent_runs_is_started_again_by_the_next_one() {
    needs!("an_owner_that_dies_while_no_agent_runs_is_started_again_by_the_next_one", Requirement::Containers);
    let mut store = start("scenario-both", LENIENT);
    let pids = store.pids(1).unwrap();
    store.kill_agent().unwrap();
    write_segments(&store);
    pids.into_iter().for_each(kill);
    store.start_agent().unwrap();
    eventually("somebody else serves", PATIENCE, || store.owner().is_ok_and(|owner| owner > 1));
    store.check_keys(KEYS).unwrap();
    check_segments(&store);
    store.finish().unwrap();
}

/// An update that is being verified, then `how` to the generation that would take back, then a rollback.
fn assert_no_way_back(name: &'static str, how: i32, because: &str) {
    let store = start(name, &LENIENT.replace("verify_s_min = 1", "verify_s_min = 20"));
    let mut client = store.client().unwrap();
    assert_eq!(client.command(&["INCR", "visits"]).unwrap(), Reply::Integer(1));
    let parked = store.pids(1).unwrap();
    let v2 = store.image("v2").unwrap();
    let update = store.begin_update(&["--image", &v2.to_string_lossy()], "verifying").unwrap();
    parked.into_iter().for_each(|pid| signal(pid, how));
    let rollback = store.hand_over(&["rollback", name]).unwrap();
    assert_eq!(rollback.verdict(), "committed", "{}", rollback.reason());
    assert!(rollback.reason().contains(because), "{}", rollback.reason());
    assert!(update.wait_with_output().unwrap().status.success());
    assert_eq!(client.command(&["INCR", "visits"]).unwrap(), Reply::Integer(2), "the same connection, the same state");
    assert_eq!(store.owner().unwrap(), 2);
    store.check_keys(KEYS).unwrap();
    store.finish().unwrap();
}

#[test]
fn a_parked_generation_that_died_is_no_way_back() {
    needs!("a_parked_generation_that_died_is_no_way_back", Requirement::Containers);
    assert_no_way_back("scenario-parked", libc::SIGKILL, "died and cannot take back");
}

#[test]
fn a_parked_generation_that_hangs_is_no_way_back() {
    needs!("a_parked_generation_that_hangs_is_no_way_back", Requirement::Containers);
    assert_no_way_back("scenario-hung", libc::SIGSTOP, "has not kept up and cannot take back");
}

/// Its state is nowhere but in its shim, for as long as nobody can take its place.
#[test]
fn an_owner_that_died_is_succeeded_with_its_state_however_many_agents_that_takes() {
    let name = "an_owner_that_died_is_succeeded_with_its_state_however_many_agents_that_takes";
    needs!(name, Requirement::Containers);
    let mut store = start("scenario-chain", LENIENT);
    let (image, away) = (store.image("v1").unwrap(), store.ground().path("away"));
    std::fs::rename(&image, &away).unwrap();
    store.pids(1).unwrap().into_iter().for_each(kill);
    for _ in 0..2 {
        eventually("nobody can take its place", PATIENCE, || {
            store.status().is_ok_and(|status| status["trouble"].as_str().is_some_and(|why| why.contains("image")))
        });
        store.kill_agent().unwrap();
        store.start_agent().unwrap();
    }
    std::fs::rename(&away, &image).unwrap();
    eventually("somebody else serves", PATIENCE, || store.owner().is_ok_and(|owner| owner > 1));
    store.check_keys(KEYS).unwrap();
    assert_updates(&store, "v2");
    store.finish().unwrap();
}
