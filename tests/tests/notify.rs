//! A program that knows the conventions of systemd and nothing of us: what it says is heard, what it stores moves.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::fs;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::TcpStream;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use warmswap_tests::{LENIENT, PLAIN_SERVER_VERSION, Requirement, Settings, Store, eventually, needs};

const NAME: &str = "scenario-notify";
/// Emulated machines take their time.
const PATIENCE: Duration = Duration::from_secs(120);
const USUAL: &str = "ready = \"notify\"\nstop_signal = \"SIGUSR1\"\n";

fn image(store: &Store, version: &str) -> PathBuf {
    let image = store.ground().path("images").join(version);
    if !image.exists() {
        store.ground().image(version, "notifier").unwrap();
        fs::write(image.join(PLAIN_SERVER_VERSION.trim_start_matches('/')), format!("{version}\n")).unwrap();
    }
    image
}

/// A service file with these top-level lines and this argument of the program.
fn file(store: &Store, version: &str, top: &str, argument: &str, handover: &str) -> PathBuf {
    let image = image(store, version);
    let settings = Settings { command: &["/bin/service", argument], top, handover, ..Settings::new(&image) };
    store.file(&format!("{version}{argument}"), &settings).unwrap()
}

fn start(top: &str) -> Store {
    Store::start_with(NAME, |store| Ok(file(store, "v1", top, "", LENIENT))).unwrap()
}

struct Client(BufReader<TcpStream>);

impl Client {
    fn connect(store: &Store) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&store.address(), PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(BufReader::new(stream)))
    }

    fn ask(&mut self, line: &str) -> io::Result<String> {
        self.0.get_mut().write_all(format!("{line}\n").as_bytes())?;
        let mut answer = String::new();
        self.0.read_line(&mut answer)?;
        Ok(answer.trim().to_owned())
    }
}

/// What the program answers to a line, over a connection of its own.
fn ask(store: &Store, line: &str) -> io::Result<String> {
    Client::connect(store)?.ask(line)
}

/// The status of the one generation that is left.
fn only_generation(store: &Store) -> Value {
    let mut found = Value::Null;
    eventually("one generation is left", PATIENCE, || {
        let Ok(status) = store.status() else { return false };
        let generations = status["generations"].as_array().cloned().unwrap_or_default();
        found = generations.first().cloned().unwrap_or_default();
        generations.len() == 1 && found["role"] == "owner"
    });
    found
}

#[test]
fn what_a_program_says_is_heard_and_what_it_stores_moves() {
    let name = "what_a_program_says_is_heard_and_what_it_stores_moves";
    needs!(name, Requirement::Containers);
    let mut store = start(USUAL);
    assert_eq!(ask(&store, "count").unwrap(), "v1 1 resp");
    assert_eq!(only_generation(&store)["says"], "this is v1");
    assert_eq!(ask(&store, "status two words").unwrap(), "done");
    eventually("the status is shown", PATIENCE, || only_generation(&store)["says"] == "two words");
    let said = store.ground().warmswap(&["status", NAME]).unwrap();
    assert!(said.stdout.contains("says \"two words\""), "{said:?}");
    for line in ["store spare", "store gone", "forget gone"] {
        assert_eq!(ask(&store, line).unwrap(), "done");
    }

    let update = store.hand_over(&["update", NAME, "--image", &image(&store, "v2").to_string_lossy()]).unwrap();
    assert_eq!(update.verdict(), "committed", "{}\n{}", update.reason(), store.log());
    let report = update.report.unwrap();
    assert_eq!(report["rung"], "listeners");
    let lost = [
        "state in memory does not move, except for 2 stored descriptors",
        "connections established with g1 end when it has drained",
    ];
    assert_eq!(report["lost"], json!(lost));
    assert!(report["state_bytes"].as_u64().unwrap() >= 2 * 4096, "{report}");
    only_generation(&store);
    assert_eq!(ask(&store, "count").unwrap(), "v2 2 resp:counter:spare");

    // The next agent knows what was stored, and goes on listening.
    store.kill_agent().unwrap();
    assert_eq!(ask(&store, "count").unwrap(), "v2 3 resp:counter:spare");
    store.start_agent().unwrap();
    assert_eq!(ask(&store, "status still here").unwrap(), "done");
    eventually("the status is shown again", PATIENCE, || only_generation(&store)["says"] == "still here");
    let update = store.hand_over(&["rollback", NAME]).unwrap();
    assert_eq!(update.verdict(), "committed", "{}\n{}", update.reason(), store.log());
    only_generation(&store);
    assert_eq!(ask(&store, "count").unwrap(), "v1 4 resp:counter:spare");

    // It survives the program as well.
    let _ = ask(&store, "die");
    eventually("it was started again", PATIENCE, || only_generation(&store)["generation"] == 4);
    assert_eq!(ask(&store, "count").unwrap(), "v1 5 resp:counter:spare");
    store.finish().unwrap();
}

#[test]
fn what_is_stored_while_a_shadow_starts_is_not_mixed_in_and_the_report_says_so() {
    let name = "what_is_stored_while_a_shadow_starts_is_not_mixed_in_and_the_report_says_so";
    needs!(name, Requirement::Containers);
    let store = start(USUAL);
    let long = format!("{LENIENT}verify_s_min = 3").replace("verify_s_min = 1\n", "");
    let v2 = file(&store, "v2", USUAL, "", &long);
    let mut old = Client::connect(&store).unwrap();
    assert_eq!(old.ask("count").unwrap(), "v1 1 resp");
    let update = store.begin_update(&["--file", &v2.to_string_lossy()], "verifying").unwrap();
    assert_eq!(old.ask("store late").unwrap(), "done");
    let output = update.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    let lost = "what g1 stored after g2 had begun does not move (descriptors: 1)";
    assert!(text.contains(lost), "{lost:?} is not in {text}");
    drop(old);
    only_generation(&store);
    let answer = ask(&store, "count").unwrap();
    assert!(answer.starts_with("v2") && answer.ends_with(" resp:counter"), "{answer}");
    store.finish().unwrap();
}

#[test]
fn a_program_that_misses_its_watchdog_is_dead() {
    needs!("a_program_that_misses_its_watchdog_is_dead", Requirement::Containers);
    let top = format!("{USUAL}watchdog_s = 3\n");
    let store = start(&top);
    assert_eq!(ask(&store, "count").unwrap(), "v1 1 resp");
    assert_eq!(ask(&store, "hang").unwrap(), "done");
    eventually("it was started again", PATIENCE, || only_generation(&store)["generation"] == 2);
    assert!(store.log().contains("did not say WATCHDOG=1 within 3 s"), "{}", store.log());
    assert_eq!(ask(&store, "count").unwrap(), "v1 2 resp:counter");

    let long = format!("{LENIENT}verify_s_min = 30").replace("verify_s_min = 1\n", "");
    let mute = file(&store, "v2", &top, "watchdog", &long);
    let update = store.update_to_file(&mute).unwrap();
    assert_eq!(update.verdict(), "rolled_back", "{update:?}");
    assert!(update.reason().contains("g3 did not say WATCHDOG=1 within 3 s"), "{}", update.reason());
    assert_eq!(only_generation(&store)["generation"], 2);
    assert!(ask(&store, "count").unwrap().starts_with("v1 "));
    // It is watched still, and lives.
    thread::sleep(Duration::from_secs(4));
    assert_eq!(only_generation(&store)["generation"], 2);
    store.finish().unwrap();
}

#[test]
fn a_program_that_never_says_ready_is_given_up() {
    needs!("a_program_that_never_says_ready_is_given_up", Requirement::Containers);
    let store = start(USUAL);
    let silent = file(&store, "v2", USUAL, "ready", &format!("{LENIENT}warm_s_max = 4\n"));
    let update = store.update_to_file(&silent).unwrap();
    assert_eq!(update.verdict(), "aborted", "{update:?}");
    assert!(update.reason().contains("was not ready within 4 s"), "{}", update.reason());
    assert_eq!(only_generation(&store)["generation"], 1);
    store.finish().unwrap();
}

#[test]
fn neither_a_flood_nor_a_stranger_is_heard() {
    needs!("neither_a_flood_nor_a_stranger_is_heard", Requirement::Containers);
    let store = start(USUAL);
    let init = store.pids(1).unwrap()[0];
    let stranger = UnixDatagram::unbound().unwrap();
    stranger.send_to(b"STATUS=forged", format!("/proc/{init}/root/run/warmswap/socket")).unwrap();
    // After it in the same queue.
    assert_eq!(ask(&store, "status genuine").unwrap(), "done");
    eventually("the status is shown", PATIENCE, || only_generation(&store)["says"] == "genuine");
    assert!(store.log().contains("is not, or no longer, of that container"), "{}", store.log());

    assert_eq!(ask(&store, "flood").unwrap(), "done");
    eventually("the flood arrives", PATIENCE, || only_generation(&store)["says"] == "flood");
    let warnings = |log: &str| log.lines().filter(|line| line.contains("is not heard")).count();
    let before = warnings(&store.log());
    thread::sleep(Duration::from_secs(3));
    assert!(warnings(&store.log()) <= before + 5, "{}", store.log());
    let update = store.hand_over(&["update", NAME, "--image", &image(&store, "v2").to_string_lossy()]).unwrap();
    assert_eq!(update.verdict(), "committed", "{}\n{}", update.reason(), store.log());
    assert!(ask(&store, "count").is_ok());
    store.finish().unwrap();
}
