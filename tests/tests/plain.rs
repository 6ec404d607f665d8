//! A server that has never heard of us: it takes its listener from `LISTEN_FDS` and drains on SIGTERM, no more.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use warmswap_tests::{LENIENT, PLAIN_SERVER_VERSION, Requirement, SetOnDrop, Settings, Store, eventually, needs};

const NAME: &str = "scenario-plain";
/// Emulated machines take their time.
const PATIENCE: Duration = Duration::from_secs(120);
const CLIENTS: usize = 4;

fn image(store: &Store, version: &str) -> PathBuf {
    let image = store.ground().image(version, "plain-server").unwrap();
    fs::write(image.join(PLAIN_SERVER_VERSION.trim_start_matches('/')), format!("{version}\n")).unwrap();
    image
}

struct Client(BufReader<TcpStream>);

impl Client {
    fn connect(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// The version that answers.
    fn ask(&mut self) -> io::Result<String> {
        self.0.get_mut().write_all(b"which are you?\n")?;
        let mut answer = String::new();
        match self.0.read_line(&mut answer)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(answer.trim().to_owned()),
        }
    }
}

/// A connection for every request, until `done`; how often each version answered.
fn ask_anew(address: SocketAddr, done: &AtomicBool) -> io::Result<BTreeMap<String, u32>> {
    let mut answers = BTreeMap::new();
    while !done.load(Ordering::Acquire) {
        *answers.entry(Client::connect(address)?.ask()?).or_default() += 1;
        thread::sleep(Duration::from_millis(2));
    }
    Ok(answers)
}

fn generations(store: &Store) -> usize {
    store.status().unwrap()["generations"].as_array().unwrap().len()
}

#[test]
fn a_program_that_does_not_know_us_loses_no_request_and_the_report_says_what_does_not_move() {
    let name = "a_program_that_does_not_know_us_loses_no_request_and_the_report_says_what_does_not_move";
    needs!(name, Requirement::Containers);
    let store = Store::start_with(NAME, |store| {
        let v1 = image(store, "v1");
        store.file("first", &Settings { handover: LENIENT, ..Settings::new(&v1) })
    })
    .unwrap();
    let v2 = image(&store, "v2");
    let mut early = Client::connect(store.address()).unwrap();
    assert_eq!(early.ask().unwrap(), "v1");

    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let stop_clients = SetOnDrop(&done);
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(|| ask_anew(store.address(), &done))).collect();
        thread::sleep(Duration::from_secs(1));

        let update = store.hand_over(&["update", NAME, "--image", &v2.to_string_lossy()]).unwrap();
        assert_eq!(update.verdict(), "committed", "{}\n{}", update.reason(), store.log());
        assert_eq!(update.said.status, Some(0));
        let report = update.report.unwrap();
        assert_eq!(report["rung"], "listeners");
        let lost = ["state in memory does not move", "connections established with g1 end when it has drained"];
        assert_eq!(report["lost"], serde_json::json!(lost));
        assert_eq!(store.owner().unwrap(), 2);
        assert_eq!(Client::connect(store.address()).unwrap().ask().unwrap(), "v2");
        assert_eq!(early.ask().unwrap(), "v1", "it has not gone, so the one it talks to has not either");
        assert_eq!(generations(&store), 2, "g1 drains");
        drop(early);
        eventually("g1 has drained", PATIENCE, || generations(&store) == 1);

        // The way back, in words.
        let said = store.ground().warmswap(&["rollback", NAME]).unwrap();
        assert!(said.success(), "{said:?}\n{}", store.log());
        for words in ["committed", "rung listeners", lost[0], "connections established with g2 end"] {
            assert!(said.stdout.contains(words), "{words:?} is not in {}", said.stdout);
        }
        assert_eq!(Client::connect(store.address()).unwrap().ask().unwrap(), "v1");

        drop(stop_clients);
        for client in clients {
            let answers = client.join().unwrap().unwrap_or_else(|error| panic!("a request failed: {error}"));
            assert!(answers.keys().eq(["v1", "v2"]) && answers.values().all(|count| *count > 10), "{answers:?}");
        }
    });
    store.finish().unwrap();
}

#[test]
fn a_handover_does_not_wait_for_older_generations_that_still_drain() {
    needs!("a_handover_does_not_wait_for_older_generations_that_still_drain", Requirement::Containers);
    let store = Store::start_with(NAME, |store| {
        let v1 = image(store, "v1");
        store.file("first", &Settings { handover: LENIENT, ..Settings::new(&v1) })
    })
    .unwrap();
    let (v1, v2) = (store.ground().path("images").join("v1"), image(&store, "v2"));
    let mut held = vec![(Client::connect(store.address()).unwrap(), "v1")];
    assert_eq!(held[0].0.ask().unwrap(), "v1");
    for (version, image) in [("v2", &v2), ("v1", &v1), ("v2", &v2)] {
        let update = store.hand_over(&["update", NAME, "--image", &image.to_string_lossy()]).unwrap();
        assert_eq!(update.verdict(), "committed", "{}\n{}", update.reason(), store.log());
        held.push((Client::connect(store.address()).unwrap(), version));
        for (client, version) in &mut held {
            assert_eq!(client.ask().unwrap(), *version, "whoever is connected is answered by its generation");
        }
    }
    let status = store.status().unwrap();
    let roles = status["generations"].as_array().unwrap().iter().map(|member| &member["role"]).collect::<Vec<_>>();
    assert_eq!(roles, ["draining", "draining", "draining", "owner"], "{status}");
    drop(held);
    eventually("the older ones have drained", PATIENCE, || generations(&store) == 1);
    store.finish().unwrap();
}
