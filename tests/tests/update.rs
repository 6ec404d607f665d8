//! Updates under load, as clients see them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use warmswap_load::resp::Reply;
use warmswap_load::{LoadResult, unix_ms};
use warmswap_tests::{LENIENT, Requirement, SetOnDrop, Settings, Store, Update, needs};

const KEYS: usize = 300;

fn assert_clean(result: &LoadResult) {
    assert!(result.totals.is_clean(), "{:?}\n{:?}", result.totals, result.faults);
    assert!(result.totals.writes_acknowledged > 0 && result.totals.keys_verified > 0, "{:?}", result.totals);
    assert_eq!(result.connections_kept, result.connections);
}

fn assert_committed(update: &Update, store: &Store) {
    assert_eq!(update.verdict(), "committed", "{}\n{}", update.reason(), store.log());
    assert!(update.said.success(), "{:?}", update.said);
}

#[test]
fn clients_do_not_notice_an_update_or_the_way_back() {
    needs!("clients_do_not_notice_an_update_or_the_way_back", Requirement::Containers);
    let store = Store::start("scenario-update", LENIENT).unwrap();
    store.write_keys(KEYS).unwrap();
    let mut client = store.client().unwrap();
    assert!(matches!(client.command(&["GETDEL", "none"]).unwrap(), Reply::Error(_)), "v1 has no GETDEL");
    let load = store.load().unwrap();

    let update = store.update("v2").unwrap();
    assert_committed(&update, &store);
    let report = update.report.unwrap();
    assert_eq!(report["rung"], "full");
    assert_eq!(report["lost"], serde_json::json!([]));
    assert_eq!(report["connections"]["sent"], report["connections"]["received"]);
    assert!(report["connections"]["received"].as_u64().unwrap() >= 21, "{report}");
    assert!(report["blackouts"][0]["us"].as_f64().unwrap() > 0.0);
    assert_eq!(store.owner().unwrap(), 2);
    // Over the connection that v1 accepted.
    assert_eq!(client.command(&["GETDEL", "none"]).unwrap(), Reply::Bulk(None));
    store.check_keys(KEYS).unwrap();

    let back = store.hand_over(&["rollback", "scenario-update"]).unwrap();
    assert_committed(&back, &store);
    assert!(store.status().unwrap()["image"].as_str().unwrap().ends_with("/v1"));
    assert!(matches!(client.command(&["GETDEL", "none"]).unwrap(), Reply::Error(_)), "v1 serves again");
    store.check_keys(KEYS).unwrap();
    assert_clean(&load.stop().unwrap());

    let history = store.ground().json(&["history", "scenario-update"]).unwrap();
    let history = history.as_array().unwrap();
    assert_eq!(history.len(), 2);
    for (report, (from, to)) in history.iter().zip([(1, 2), (2, 3)]) {
        assert_eq!((report["from"].as_u64(), report["to"].as_u64()), (Some(from), Some(to)), "{report}");
        assert!(report["blackouts"][0]["us"].as_f64().unwrap() > 0.0, "{report}");
        assert_eq!(report["phases"].as_array().unwrap().len(), 8, "{report}");
    }
    store.finish().unwrap();
}

#[test]
fn a_rollback_restores_command_and_environment_too() {
    needs!("a_rollback_restores_command_and_environment_too", Requirement::Containers);
    let store = Store::start("scenario-settings", LENIENT).unwrap();
    let image = store.image("v2").unwrap();
    let colour = |generation: u32| {
        let pid = store.pids(generation).unwrap()[0];
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
        environment.split(|byte| *byte == 0).any(|line| line == b"COLOUR=red")
    };
    let other = store.file("second", &Settings { env: "COLOUR = \"red\"\n", ..Settings::new(&image) }).unwrap();
    assert_committed(&store.update_to_file(&other).unwrap(), &store);
    assert!(colour(2));
    assert_committed(&store.hand_over(&["rollback", "scenario-settings"]).unwrap(), &store);
    assert!(!colour(3), "the first service file has no such variable");
    // And back once more: what was rolled back from is what came before.
    assert_committed(&store.hand_over(&["rollback", "scenario-settings"]).unwrap(), &store);
    assert!(colour(4));
    store.finish().unwrap();
}

#[test]
fn redis_benchmark_runs_through_an_update_and_redis_cli_reads_what_it_wrote() {
    needs!(
        "redis_benchmark_runs_through_an_update_and_redis_cli_reads_what_it_wrote",
        Requirement::Containers,
        Requirement::Program("redis-benchmark"),
        Requirement::Program("redis-cli"),
    );
    let store = Store::start("scenario-redis", LENIENT).unwrap();
    let port = store.address().port().to_string();
    let cli = |arguments: &[&str]| {
        let output = Command::new("redis-cli").args(["-p", &port]).args(arguments).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(cli(&["SET", "greeting", "hello"]), "OK");
    let benchmark = |requests: u64| {
        let mut command = Command::new("redis-benchmark");
        command.args(["-p", &port, "-t", "incr", "-c", "20", "-q", "-n", &requests.to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    // How many are enough to outlast an update on this machine.
    const FIRST: u64 = 2000;
    let began = Instant::now();
    assert!(benchmark(FIRST).wait().unwrap().success());
    let second = ((FIRST as f64 / began.elapsed().as_secs_f64()) * 8.0) as u64;

    let began_ms = unix_ms();
    let through = benchmark(second);
    std::thread::sleep(Duration::from_millis(200));
    let update = store.update("v2").unwrap();
    let output = through.wait_with_output().unwrap();
    let ended_ms = unix_ms();
    assert_committed(&update, &store);
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success() && !text.contains("rror"), "{}: {text}", output.status);
    let report = update.report.unwrap();
    let promoted = report["phases"].as_array().unwrap().iter().find(|timing| timing["phase"] == "promote").unwrap();
    let switched_ms = report["started_unix_ms"].as_u64().unwrap() as f64 + promoted["start_us"].as_f64().unwrap() / 1e3;
    assert!(began_ms as f64 <= switched_ms && switched_ms <= ended_ms as f64, "the benchmark ended before the switch");

    // Without -r its key is literally this; every INCR that was acknowledged is there, and none twice.
    assert_eq!(cli(&["GET", "counter:__rand_int__"]), (FIRST + second).to_string());
    assert_eq!(cli(&["GET", "greeting"]), "hello");
    assert_eq!(cli(&["DBSIZE"]), "2");
    store.finish().unwrap();
}

/// Enough writing that the log goes on in a new segment, and gives up an old one, in every phase of the updates.
#[test]
fn nothing_is_missing_when_the_log_grows_during_updates() {
    needs!("nothing_is_missing_when_the_log_grows_during_updates", Requirement::Containers);
    const OVERWRITTEN: usize = 64;
    let store = Store::start("scenario-growing", LENIENT).unwrap();
    store.write_keys(KEYS).unwrap();
    let load = store.load().unwrap();
    let done = AtomicBool::new(false);
    let last_round = std::thread::scope(|scope| {
        // Also when the updates end in a panic, or the scope would wait for the writer for ever.
        let stop_writer = SetOnDrop(&done);
        let writer = scope.spawn(|| {
            let mut client = store.client().unwrap();
            let keys: Vec<String> = (0..OVERWRITTEN).map(|key| format!("large:{key}")).collect();
            let mut round = 0;
            while !done.load(Ordering::Acquire) {
                round += 1;
                let value = format!("{round:0>65000}");
                let sets: Vec<[&str; 3]> = keys.iter().map(|key| ["SET", key, &value]).collect();
                for reply in client.pipeline(&sets).unwrap() {
                    assert_eq!(reply, Reply::Simple("OK".into()));
                }
            }
            round
        });
        for (version, owner) in ["v2", "v1", "v2", "v1"].into_iter().zip(2..) {
            let update = store.update(version).unwrap();
            assert_committed(&update, &store);
            assert_eq!(store.owner().unwrap(), owner);
            store.check_keys(KEYS).unwrap();
        }
        drop(stop_writer);
        writer.join().unwrap()
    });
    assert_clean(&load.stop().unwrap());
    store.check_keys(KEYS).unwrap();
    let mut client = store.client().unwrap();
    for key in 0..OVERWRITTEN {
        let value = client.command(&["GET", &format!("large:{key}")]).unwrap();
        assert_eq!(value, Reply::Bulk(Some(format!("{last_round:0>65000}").into_bytes())), "large:{key}");
    }
    store.finish().unwrap();
}
