//! Updates that cannot be: each ends with the active serving as before, and with a message that says what to do.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use warmswap_load::resp::Reply;
use warmswap_tests::{LENIENT, Requirement, Settings, Store, Update, eventually, needs, program};

const KEYS: usize = 100;

/// The store of `start`, with keys to lose.
fn start(name: &'static str, handover: &str) -> Store {
    let store = Store::start(name, handover).unwrap();
    store.write_keys(KEYS).unwrap();
    store
}

/// As if nothing had happened.
fn assert_untouched(store: &Store) {
    assert_eq!(store.owner().unwrap(), 1);
    eventually("the shadow is gone", Duration::from_secs(30), || {
        store.status().is_ok_and(|s| s["generations"].as_array().is_some_and(|g| g.len() == 1))
    });
    let status = store.status().unwrap();
    assert!(status["image"].as_str().unwrap().ends_with("/v1"), "{status}");
    assert!(status["activity"].is_null() && status["trouble"].is_null(), "{status}");
    store.check_keys(KEYS).unwrap();
}

/// What was refused does not stand in the way of what can be done.
fn assert_updates(store: &Store) {
    let update = store.update("v2").unwrap();
    assert_eq!(update.verdict(), "committed", "{}\n{}", update.reason(), store.log());
    store.check_keys(KEYS).unwrap();
}

fn assert_refused(update: &Update, words: &[&str]) {
    assert!(!update.said.success(), "{update:?}");
    let reason = update.reason();
    for word in words {
        assert!(reason.contains(word), "{word:?} is not in {reason:?}");
    }
}

/// An image of a program that has never heard of us.
fn image_of_sleep(store: &Store) -> PathBuf {
    let image = store.ground().path("images").join("sleep");
    let sleep = ["/bin/sleep", "/usr/bin/sleep"].map(PathBuf::from).into_iter().find(|path| path.exists()).unwrap();
    warmswap_rootfs::pack_rootfs_as(&fs::canonicalize(sleep).unwrap(), &image, Some("sleep")).unwrap();
    image
}

#[test]
fn an_image_that_does_not_exist_is_named() {
    needs!("an_image_that_does_not_exist_is_named", Requirement::Containers);
    let store = start("scenario-no-image", LENIENT);
    let update = store.hand_over(&["update", "scenario-no-image", "--image", "/no/such/image"]).unwrap();
    assert_refused(&update, &["/no/such/image"]);
    assert_untouched(&store);
    assert_updates(&store);
    store.finish().unwrap();
}

#[test]
fn mistakes_in_a_service_file_are_reported_with_their_line() {
    needs!("mistakes_in_a_service_file_are_reported_with_their_line", Requirement::Containers);
    let store = start("scenario-bad-file", LENIENT);
    let ground = store.ground();
    let bad = ground.service_file("bad", "name = \"scenario-bad-file\"\nimage = \"x\"\ncolour = \"red\"\n").unwrap();
    let said = store.update_to_file(&bad).unwrap();
    assert_refused(&said, &["bad.toml:3:", "colour"]);
    let said = ground.warmswap(&["run", &bad.to_string_lossy()]).unwrap();
    assert!(!said.success() && said.stderr.contains("bad.toml:3:"), "{said:?}");
    let image = store.image("v2").unwrap();
    let text = fs::read_to_string(store.file("other", &Settings::new(&image)).unwrap()).unwrap();

    let address = store.address().to_string();
    let elsewhere = ground.service_file("elsewhere", &text.replace(&address, "127.0.0.1:1")).unwrap();
    assert_refused(&store.update_to_file(&elsewhere).unwrap(), &["listeners cannot change"]);
    let renamed = ground.service_file("renamed", &text.replace("scenario-bad-file", "somebody-else")).unwrap();
    assert_refused(&store.update_to_file(&renamed).unwrap(), &["somebody-else"]);
    let said = ground.warmswap(&["update", "somebody-else"]).unwrap();
    assert!(!said.success() && said.stderr.contains("somebody-else"), "{said:?}");
    assert_untouched(&store);
    assert_updates(&store);
    store.finish().unwrap();
}

#[test]
fn a_shadow_that_never_becomes_ready_is_given_up() {
    needs!("a_shadow_that_never_becomes_ready_is_given_up", Requirement::Containers);
    let store = start("scenario-mute", LENIENT);
    let image = image_of_sleep(&store);

    let settings = Settings { command: &["/bin/sleep", "1000"], ..Settings::new(&image) };
    let update = store.update_to_file(&store.file("mute", &settings).unwrap()).unwrap();
    assert_eq!(update.verdict(), "aborted", "{update:?}");
    assert_refused(&update, &["does not link the warmswap SDK", "WARM"]);
    assert_eq!(update.said.status, Some(3));
    assert_untouched(&store);

    let settings = Settings { command: &["/bin/sleep", "nonsense"], ..Settings::new(&image) };
    let update = store.update_to_file(&store.file("short", &settings).unwrap()).unwrap();
    assert_eq!(update.verdict(), "aborted", "{update:?}");
    assert_refused(&update, &["nonsense", "WARM"]);
    assert_untouched(&store);

    let settings = Settings { command: &["/bin/no-such-program"], ..Settings::new(&image) };
    let update = store.update_to_file(&store.file("missing", &settings).unwrap()).unwrap();
    assert_eq!(update.verdict(), "aborted", "{update:?}");
    assert_refused(&update, &["/bin/no-such-program"]);
    assert_untouched(&store);

    let history = store.ground().json(&["history", "scenario-mute"]).unwrap();
    assert_eq!(history.as_array().unwrap().len(), 3, "{history}");
    assert_updates(&store);
    store.finish().unwrap();
}

#[test]
fn a_shadow_that_joins_and_never_becomes_ready_is_given_up() {
    needs!("a_shadow_that_joins_and_never_becomes_ready_is_given_up", Requirement::Containers);
    let store = start("scenario-hesitant", LENIENT);
    let file = store.hesitant_file("ready", &format!("warm_s_max = 5\n{LENIENT}")).unwrap();

    let update = store.update_to_file(&file).unwrap();
    assert_eq!(update.verdict(), "aborted", "{update:?}");
    assert_refused(&update, &["g2", "was not ready within 5 s", "WARM"]);
    assert_eq!(update.said.status, Some(3));
    let phases = update.report.as_ref().unwrap()["phases"].as_array().unwrap().clone();
    let warm = phases.iter().find(|timing| timing["phase"] == "warm").unwrap();
    assert_eq!(warm["outcome"], "failed", "{phases:?}");
    assert!(warm["duration_us"].as_f64().unwrap() >= 5e6, "it was given the time the service file says: {phases:?}");
    assert_untouched(&store);

    // Nobody has to wait for it.
    let file = store.hesitant_file("ready", &format!("warm_s_max = 600\n{LENIENT}")).unwrap();
    let update = store.begin_update(&["--file", &file.to_string_lossy()], "preparing").unwrap();
    store.hesitant(3).unwrap();
    let rollback = store.hand_over(&["rollback", "scenario-hesitant"]).unwrap();
    assert_eq!(rollback.verdict(), "aborted", "{rollback:?}");
    assert!(rollback.reason().contains("a rollback was asked for during WARM"), "{}", rollback.reason());
    let output = update.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert_untouched(&store);
    assert_updates(&store);
    store.finish().unwrap();
}

#[test]
fn a_new_owner_that_hangs_before_it_serves_costs_no_connection() {
    needs!("a_new_owner_that_hangs_before_it_serves_costs_no_connection", Requirement::Containers);
    let store = start("scenario-hanging", LENIENT);
    let mut client = store.client().unwrap();
    assert_eq!(client.command(&["INCR", "mine"]).unwrap(), Reply::Integer(1));
    let load = store.load().unwrap();
    let handover = LENIENT.replace("quiesce_ms_max = 2000", "quiesce_ms_max = 200");
    let file = store.hesitant_file("own", &handover).unwrap();
    let update = store.update_to_file(&file).unwrap();
    assert_eq!(update.verdict(), "rolled_back", "{update:?}");
    assert!(update.reason().contains("g2 did not serve within"), "{}", update.reason());
    let report = update.report.unwrap();
    assert_eq!(report["lost"], serde_json::json!([]), "{report}");
    let blackout_ms = report["blackouts"][0]["us"].as_f64().unwrap() / 1e3;
    assert!((1000.0..2000.0).contains(&blackout_ms), "{report}");
    // On the connection that was there before, though the other one held a duplicate of it.
    assert_eq!(client.command(&["INCR", "mine"]).unwrap(), Reply::Integer(2));
    let result = load.stop().unwrap();
    assert!(result.totals.is_clean(), "{:?}\n{:?}", result.totals, result.faults);
    assert_eq!(result.connections_kept, result.connections);
    assert_untouched(&store);
    assert_updates(&store);
    store.finish().unwrap();
}

#[test]
fn too_little_memory_for_the_reservation_is_said_before_anything_starts() {
    needs!("too_little_memory_for_the_reservation_is_said_before_anything_starts", Requirement::Containers);
    let store = start("scenario-memory", LENIENT);
    let image = store.image("v2").unwrap();
    // Without a forecast the ceiling of 10 TB is reserved; with one, ten million times what it says.
    let settings = Settings {
        memory_mb_max: 1e7,
        more: "[reserve]\npercent_min = 1e9\npercent_max = 1e9\n",
        ..Settings::new(&image)
    };
    let update = store.update_to_file(&store.file("large", &settings).unwrap()).unwrap();
    assert_eq!(update.verdict(), "aborted", "{update:?}");
    assert_refused(&update, &["too little memory for the reservation", "MB are needed", "RESERVE"]);
    assert_untouched(&store);
    assert_updates(&store);
    store.finish().unwrap();
}

#[test]
fn a_second_update_is_denied_while_one_runs() {
    needs!("a_second_update_is_denied_while_one_runs", Requirement::Containers);
    let verify_long = LENIENT.replace("verify_s_min = 1", "verify_s_min = 6");
    let store = start("scenario-second", &verify_long);
    let v2 = store.image("v2").unwrap();
    let first = store.begin_update(&["--image", &v2.to_string_lossy()], "verifying").unwrap();

    let began = Instant::now();
    let second = store.update("v1").unwrap();
    assert_refused(&second, &["in progress", "warmswap status"]);
    assert!(second.report.is_none() && began.elapsed() < Duration::from_secs(5), "it was made to wait");
    assert_refused(&store.update("v2").unwrap(), &["already"]);

    let output = first.wait_with_output().unwrap();
    assert!(output.status.success(), "{}\n{}", String::from_utf8_lossy(&output.stderr), store.log());
    assert_eq!(store.owner().unwrap(), 2);
    store.check_keys(KEYS).unwrap();
    store.finish().unwrap();
}

#[test]
fn a_service_that_cannot_start_leaves_nothing() {
    needs!("a_service_that_cannot_start_leaves_nothing", Requirement::Containers);
    assert!(program("warmswap").is_ok());
    let store = start("scenario-first", LENIENT);
    let file = store.ground().service_file("none", "name = \"never\"\nimage = \"/no/such/image\"\n").unwrap();
    let said = store.ground().warmswap(&["run", &file.to_string_lossy()]).unwrap();
    assert!(!said.success() && said.stderr.contains("/no/such/image"), "{said:?}");
    let image = image_of_sleep(&store);
    let text = format!("name = \"never\"\nimage = {image:?}\ncommand = [\"/bin/sleep\", \"nonsense\"]\n");
    let file = store.ground().service_file("ends", &text).unwrap();
    let said = store.ground().warmswap(&["run", &file.to_string_lossy()]).unwrap();
    assert!(!said.success() && said.stderr.contains("nonsense"), "{said:?}");
    let said = store.ground().warmswap(&["status", "never"]).unwrap();
    assert!(!said.success() && said.stderr.contains("never"), "{said:?}");
    assert_untouched(&store);
    store.finish().unwrap();
}
