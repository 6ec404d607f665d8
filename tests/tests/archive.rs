//! Images as they are built and shipped: archives that say themselves what is to be run.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

#[path = "../../runtime/backend/tests/support/archive.rs"]
mod archive;

use std::fs;
use std::path::{Path, PathBuf};

use archive::{Image, Tar, gzip};
use serde_json::{Value, json};
use warmswap_load::resp::Reply;
use warmswap_tests::{Requirement, Settings, Store, Update, needs};

const KEYS: usize = 100;
/// Of the user `nobody` that packed images have.
const NOBODY: u32 = 65534;

/// One layer with session-store of a version, to be run as `run` says.
fn image_of(store: &Store, version: &str, run: Value) -> Image {
    let root = store.image(version).unwrap();
    fs::create_dir_all(root.join("srv/work")).unwrap();
    Image { run, ..Image::new(vec![Tar::new().tree(&root).bytes()]) }
}

fn write(store: &Store, name: &str, bytes: &[u8]) -> PathBuf {
    let path = store.ground().path(name);
    fs::write(&path, bytes).unwrap();
    path
}

/// What an image that is complete says.
fn run_as(colour: &str) -> Value {
    json!({
        "Entrypoint": ["/bin/service", "--from"], "Cmd": [colour], "Env": [format!("COLOUR={colour}")],
        "User": "nobody", "WorkingDir": "/srv/work"
    })
}

fn update(store: &Store, image: &Path) -> Update {
    store.hand_over(&["update", "scenario-archive", "--image", &image.to_string_lossy()]).unwrap()
}

fn assert_committed(update: &Update, store: &Store) {
    assert_eq!(update.verdict(), "committed", "{}\n{}", update.reason(), store.log());
    assert_eq!((update.said.status, &update.report.as_ref().unwrap()["rung"]), (Some(0), &json!("full")));
}

/// The process of the owner is what its image says, as the kernel knows it.
fn assert_runs_as(store: &Store, colour: &str) {
    let [pid] = store.pids(store.owner().unwrap()).unwrap()[..] else { panic!("session-store is one process") };
    let folder = Path::new("/proc").join(pid.to_string());
    let words = |file: &str| {
        fs::read_to_string(folder.join(file)).unwrap().split_terminator('\0').map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(words("cmdline"), ["/bin/service", "--from", colour]);
    let environment = words("environ");
    assert!(environment.contains(&format!("COLOUR={colour}")), "{environment:?}");
    assert!(environment.contains(&"SHADE=dark".to_owned()), "what the service file adds: {environment:?}");
    assert!(fs::read_link(folder.join("cwd")).unwrap().ends_with("srv/work"));
    let status = fs::read_to_string(folder.join("status")).unwrap();
    let uid = status.lines().find_map(|line| line.strip_prefix("Uid:\t")).unwrap();
    assert_eq!(uid.split('\t').next().unwrap(), NOBODY.to_string());
}

#[test]
fn archives_of_both_kinds_are_updated_to_and_run_as_they_say() {
    needs!("archives_of_both_kinds_are_updated_to_and_run_as_they_say", Requirement::Containers);
    let store = Store::start_with("scenario-archive", |store| {
        let archive = write(store, "v1.tar", &image_of(store, "v1", run_as("red")).docker_save());
        store.file("first", &Settings { command: &[], env: "SHADE = \"dark\"", ..Settings::new(&archive) })
    })
    .unwrap();
    store.write_keys(KEYS).unwrap();
    assert_runs_as(&store, "red");
    let mut client = store.client().unwrap();
    assert!(matches!(client.command(&["GETDEL", "none"]).unwrap(), Reply::Error(_)), "v1 has no GETDEL");
    let load = store.load().unwrap();

    let oci = write(&store, "v2-oci.tar", &image_of(&store, "v2", run_as("green")).oci(gzip));
    assert_committed(&update(&store, &oci), &store);
    assert_runs_as(&store, "green");
    assert_eq!(client.command(&["GETDEL", "none"]).unwrap(), Reply::Bulk(None), "v2 serves the same connection");
    store.check_keys(KEYS).unwrap();

    let saved = write(&store, "v2-saved.tar", &image_of(&store, "v2", run_as("blue")).docker_save());
    assert_committed(&update(&store, &saved), &store);
    assert_runs_as(&store, "blue");
    assert_eq!(client.command(&["GETDEL", "none"]).unwrap(), Reply::Bulk(None));
    store.check_keys(KEYS).unwrap();

    // What cannot be is said, and changes nothing.
    let whole = fs::read(&oci).unwrap();
    let cut = update(&store, &write(&store, "cut.tar", &whole[..whole.len() / 2]));
    assert!(!cut.said.success() && cut.report.is_none(), "{cut:?}");
    assert!(cut.reason().contains("cut.tar is damaged"), "{}", cut.reason());
    let says_nothing = update(&store, &write(&store, "mute.tar", &image_of(&store, "v2", json!({})).docker_save()));
    assert_eq!((says_nothing.verdict(), says_nothing.said.status), ("aborted", Some(3)), "{says_nothing:?}");
    assert!(says_nothing.reason().contains("command"), "{}", says_nothing.reason());
    assert_runs_as(&store, "blue");
    store.check_keys(KEYS).unwrap();

    let result = load.stop().unwrap();
    assert!(result.totals.is_clean(), "{:?}\n{:?}", result.totals, result.faults);
    assert_eq!(result.connections_kept, result.connections);
    store.finish().unwrap();
}
