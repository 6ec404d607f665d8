//! Services whose state lives in their own structures, updated, rolled back and killed while clients write.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::io::Write as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::Value;
use warmswap_tests::board::{BoardClient, Written, write_and_check};
use warmswap_tests::{LENIENT, Requirement, SetOnDrop, Settings, Store, Update, eventually, needs};

const WRITERS: usize = 4;
const NOTE_LEN: usize = 60_000;
/// 64 MiB and a little.
const LARGE: usize = (64 << 20) / NOTE_LEN + 10;
const SMALL: usize = (1 << 20) / NOTE_LEN + 1;

/// A service file for scoreboard with its state moving `way`.
fn file(store: &Store, version: &str, way: &str, handover: &str) -> PathBuf {
    let image = store.ground().path("images").join(version);
    let image = if image.exists() { image } else { store.ground().image(version, "scoreboard").unwrap() };
    let command = ["/bin/service", "--state", way];
    let settings = Settings { command: &command, memory_mb_max: 1024.0, handover, ..Settings::new(&image) };
    store.file(&format!("{version}-{way}"), &settings).unwrap()
}

fn start(name: &'static str, way: &str, handover: &str) -> Store {
    Store::start_with(name, |store| Ok(file(store, "v1", way, handover))).unwrap()
}

fn client(store: &Store) -> BoardClient {
    BoardClient::connect(store.address()).unwrap()
}

fn assert_committed(update: &Update, store: &Store) {
    assert_eq!(update.verdict(), "committed", "{}\n{}", update.reason(), store.log());
}

/// Writers on connections of their own, which must see nothing of what `during` does.
fn while_writing<R>(store: &Store, during: impl FnOnce() -> R) -> (R, Vec<Written>) {
    // Each begins at nothing, so nobody's names are used twice.
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    let call = CALLS.fetch_add(1, Ordering::Relaxed);
    let stop = AtomicBool::new(false);
    let (address, stop_ref) = (store.address(), &stop);
    std::thread::scope(|scope| {
        // Also when a step fails, or the scope would wait for the writers for ever.
        let stop_writers = SetOnDrop(&stop);
        let writers: Vec<_> = (0..WRITERS)
            .map(|n| scope.spawn(move || write_and_check(address, &format!("writer-{call}-{n}"), stop_ref)))
            .collect();
        std::thread::sleep(Duration::from_millis(500));
        let result = during();
        std::thread::sleep(Duration::from_millis(300));
        drop(stop_writers);
        let written = writers.into_iter().map(|writer| {
            writer.join().unwrap().unwrap_or_else(|error| panic!("a writer failed: {error:#}\n{}", store.log()))
        });
        (result, written.collect())
    })
}

/// Past the test harness, which keeps to itself what a test that passed has printed.
fn say(line: &str) {
    std::io::stderr().write_all(format!("{line}\n").as_bytes()).unwrap();
}

fn say_blackouts(way: &str, fill: usize, report: &Value, written: &[Written]) {
    let us: Vec<String> = report["blackouts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|b| format!("{:.0} µs", b["us"].as_f64().unwrap()))
        .collect();
    let gap = written.iter().map(|written| written.longest_gap).max().unwrap();
    let acknowledged: u64 = written.iter().map(|written| written.acknowledged).sum();
    say(&format!(
        "{way}: {} MiB in {} keys, blackout {}, longest wait of a client {:.1} ms, {acknowledged} writes acknowledged, 0 lost",
        report["state_bytes"].as_u64().unwrap() >> 20,
        fill,
        us.join(" + "),
        gap.as_secs_f64() * 1e3,
    ));
}

fn moves(name: &'static str, way: &str, reported: &str, words: &[&str]) {
    let store = start(name, way, LENIENT);
    let mut before = client(&store);
    for (fill, version) in [(SMALL, "v2"), (LARGE, "v1")] {
        before.fill(fill, NOTE_LEN).unwrap();
        let (update, written) =
            while_writing(&store, || store.update_to_file(&file(&store, version, way, LENIENT)).unwrap());
        assert_committed(&update, &store);
        let report = update.report.clone().unwrap();
        assert_eq!((report["rung"].as_str(), report["state"].as_str()), (Some("full"), Some(reported)), "{report}");
        assert_eq!(report["lost"], serde_json::json!([]));
        let bytes = report["state_bytes"].as_u64().unwrap();
        assert!(bytes as usize >= fill * NOTE_LEN, "{report}");
        for word in words {
            assert!(update.said.stdout.contains(word), "{word:?} is not in {}", update.said.stdout);
        }
        say_blackouts(way, fill, &report, &written);
        // Over the connection that the first generation accepted.
        before.check_fill(fill, NOTE_LEN).unwrap();
    }
    assert_eq!(before.ask("COUNT").unwrap(), (LARGE + 2 * WRITERS * 50).to_string());
    store.finish().unwrap();
}

#[test]
fn state_is_pre_copied_while_clients_write() {
    needs!("state_is_pre_copied_while_clients_write", Requirement::Containers);
    moves("heap-precopied", "precopied", "pre_copied", &["of state pre-copied", "of changes since SYNC"]);
}

#[test]
fn state_moves_as_a_snapshot_while_clients_write() {
    needs!("state_moves_as_a_snapshot_while_clients_write", Requirement::Containers);
    moves("heap-snapshot", "snapshot", "snapshot", &["room for a snapshot", "snapshot of "]);
}

/// Rolls an update back while it is verified.
fn rolls_back(name: &'static str, way: &str) {
    let verify_long = LENIENT.replace("verify_s_min = 1", "verify_s_min = 20");
    let store = start(name, way, &verify_long);
    let mut before = client(&store);
    before.fill(SMALL, NOTE_LEN).unwrap();
    let (report, written) = while_writing(&store, || {
        let next = file(&store, "v2", way, &verify_long);
        let update = store.begin_update(&["--file", &next.to_string_lossy()], "verifying").unwrap();
        let mut meanwhile = client(&store);
        for n in 0..200 {
            assert_eq!(meanwhile.ask(&format!("SET meanwhile:{n} {n}")).unwrap(), "OK");
        }
        assert_eq!(meanwhile.ask("DEL filler:0").unwrap(), "OK");
        let rollback = store.hand_over(&["rollback", name]).unwrap();
        assert_eq!(rollback.verdict(), "rolled_back", "{}\n{}", rollback.reason(), store.log());
        let output = update.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(3), "{output:?}");
        rollback.report.unwrap()
    });
    assert_eq!(store.owner().unwrap(), 1);
    assert_eq!(report["blackouts"].as_array().unwrap().len(), 2, "there and back: {report}");
    assert_eq!(report["lost"], serde_json::json!([]), "{report}");
    say_blackouts(&format!("{way}, there and back"), SMALL, &report, &written);
    for n in 0..200 {
        assert_eq!(before.ask(&format!("GET meanwhile:{n}")).unwrap(), n.to_string(), "meanwhile:{n}");
    }
    assert_eq!(before.ask("GET filler:0").unwrap(), "-", "what was removed is gone here too");
    assert_eq!(before.ask("COUNT").unwrap(), (SMALL - 1 + 200 + WRITERS * 50).to_string());
    // And forward again.
    let update = store.update_to_file(&file(&store, "v2", way, LENIENT)).unwrap();
    assert_committed(&update, &store);
    assert_eq!(before.ask("GET meanwhile:7").unwrap(), "7");
    store.finish().unwrap();
}

#[test]
fn a_rollback_carries_the_changes_of_pre_copied_state() {
    needs!("a_rollback_carries_the_changes_of_pre_copied_state", Requirement::Containers);
    rolls_back("heap-precopied-back", "precopied");
}

#[test]
fn a_rollback_takes_a_new_snapshot() {
    needs!("a_rollback_takes_a_new_snapshot", Requirement::Containers);
    rolls_back("heap-snapshot-back", "snapshot");
}

/// Ends the new owner while it is verified; returns the report and the service.
fn new_owner_dies(name: &'static str, way: &str) -> (Store, Value) {
    let verify_long = LENIENT.replace("verify_s_min = 1", "verify_s_min = 20");
    let store = start(name, way, &verify_long);
    assert_eq!(client(&store).ask("SET old 1").unwrap(), "OK");
    let next = file(&store, "v2", way, &verify_long);
    let update = store.begin_update(&["--file", &next.to_string_lossy()], "verifying").unwrap();
    let mut meanwhile = client(&store);
    for n in 0..200 {
        assert_eq!(meanwhile.ask(&format!("SET meanwhile:{n} {n}")).unwrap(), "OK");
    }
    for pid in store.pids(2).unwrap() {
        // SAFETY: plain system call.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
    }
    let output = update.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert_eq!(store.owner().unwrap(), 1);
    assert_eq!(client(&store).ask("GET old").unwrap(), "1");
    let report = store.ground().json(&["history", name]).unwrap();
    let report = report.as_array().map_or_else(|| report.clone(), |reports| reports[0].clone());
    (store, report)
}

#[test]
fn what_a_new_owner_acknowledged_before_it_died_is_with_its_predecessor() {
    needs!("what_a_new_owner_acknowledged_before_it_died_is_with_its_predecessor", Requirement::Containers);
    let (store, report) = new_owner_dies("heap-precopied-dies", "precopied");
    let mut client = client(&store);
    for n in 0..200 {
        assert_eq!(client.ask(&format!("GET meanwhile:{n}")).unwrap(), n.to_string(), "meanwhile:{n}");
    }
    let lost = report["lost"].to_string();
    assert!(!lost.contains("wrote"), "{lost}");
    store.finish().unwrap();
}

#[test]
fn a_snapshot_cannot_come_from_the_dead_and_the_report_says_so() {
    needs!("a_snapshot_cannot_come_from_the_dead_and_the_report_says_so", Requirement::Containers);
    let (store, report) = new_owner_dies("heap-snapshot-dies", "snapshot");
    let lost = report["lost"].to_string();
    assert!(lost.contains("what g2 wrote and did not hand back"), "{report}");
    store.finish().unwrap();
}

#[test]
fn an_owner_that_dies_takes_its_state_with_it_and_status_says_so() {
    needs!("an_owner_that_dies_takes_its_state_with_it_and_status_says_so", Requirement::Containers);
    let store = start("heap-dies", "precopied", LENIENT);
    assert_eq!(client(&store).ask("SET a 1").unwrap(), "OK");
    for pid in store.pids(1).unwrap() {
        // SAFETY: plain system call.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
    }
    eventually("it is started again", Duration::from_secs(60), || store.owner().is_ok_and(|owner| owner == 2));
    assert_eq!(client(&store).ask("COUNT").unwrap(), "0");
    eventually("status says so", Duration::from_secs(10), || {
        let status = store.status().unwrap();
        let trouble = status["trouble"].as_str().unwrap_or_default();
        trouble.contains("g1 died, and its state with it") && trouble.contains("pre-copied")
    });
    // Known, and over, with the next version.
    assert_committed(&store.update_to_file(&file(&store, "v2", "precopied", LENIENT)).unwrap(), &store);
    assert!(store.status().unwrap()["trouble"].is_null());
    store.finish().unwrap();
}

#[test]
fn a_program_that_moves_its_state_another_way_is_refused_in_words() {
    needs!("a_program_that_moves_its_state_another_way_is_refused_in_words", Requirement::Containers);
    let store = start("heap-other-way", "precopied", LENIENT);
    assert_eq!(client(&store).ask("SET a 1").unwrap(), "OK");
    let update = store.update_to_file(&file(&store, "v2", "snapshot", LENIENT)).unwrap();
    assert_eq!(update.verdict(), "aborted", "{update:?}");
    for word in ["the state of g1 moves pre-copied", "that of g2 as a snapshot", "WARM"] {
        assert!(update.reason().contains(word), "{word:?} is not in {:?}", update.reason());
    }
    assert_eq!(client(&store).ask("GET a").unwrap(), "1");
    store.finish().unwrap();
}

#[test]
fn a_snapshot_that_takes_longer_than_it_may_is_called_off_and_says_what_to_do() {
    needs!("a_snapshot_that_takes_longer_than_it_may_is_called_off_and_says_what_to_do", Requirement::Containers);
    let hasty = LENIENT.replace("quiesce_ms_max = 2000", "quiesce_ms_max = 1");
    let store = start("heap-hasty", "snapshot", &hasty);
    let mut before = client(&store);
    before.fill(LARGE, NOTE_LEN).unwrap();
    let (update, _) = while_writing(&store, || store.update_to_file(&file(&store, "v2", "snapshot", &hasty)).unwrap());
    assert_eq!(update.verdict(), "aborted", "{update:?}");
    for word in ["did not stop serving within 1 ms", "raise handover.quiesce_ms_max"] {
        assert!(update.reason().contains(word), "{word:?} is not in {:?}", update.reason());
    }
    before.check_fill(LARGE, NOTE_LEN).unwrap();
    store.finish().unwrap();
}
