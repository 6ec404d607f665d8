//! Containers that mean harm, beside one that does not: the agent lives, the other service neither fails a request nor waits
//! with its update, and nobody gets what is not theirs.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use warmswap_load::RunningLoad;
use warmswap_load::resp::{Client, Reply};
use warmswap_sdk::transfer::message::{Message as _, ToSupervisor};
use warmswap_tests::channel::{End, send_as};
use warmswap_tests::hostile::{BEGUN, Misdeed, Stage};
use warmswap_tests::{LENIENT, Requirement, Said, SetOnDrop, Store, needs, within};

const KEYS: usize = 50;
const HOSTILE: &str = "hostile";
/// Of the honest service: an update takes as long as its phases do.
const HONEST_HANDOVER: &str = "quiesce_ms_max = 2000\nverify_s_min = 0.2\nverify_requests_min = 5\np99_ratio_max = 1e6\n\
    cpu_ratio_max = 1e6\nmemory_latency_ratio_max = 1e6\nthroughput_ratio_min = 0\n";
/// Of the hostile one: nobody waits for it for long.
const HOSTILE_HANDOVER: &str = "warm_s_max = 5\nsync_s_max = 2\nquiesce_ms_max = 300\nverify_s_min = 0.3\n\
    verify_requests_min = 1\np99_ratio_max = 1e6\ncpu_ratio_max = 1e6\nmemory_latency_ratio_max = 1e6\n\
    throughput_ratio_min = 0\n";
const STATUS_TIME_MAX: Duration = Duration::from_secs(1);
const STOP_TIME_MAX: Duration = Duration::from_secs(20);
/// Of a shadow that never answers, all phases together, with room for a loaded machine.
const HOSTILE_UPDATE_MAX: Duration = Duration::from_secs(40);
const LOG_LEN_MAX: usize = 1 << 20;
/// What the agent may hold more of than before: the history's files, an answer that is being read.
const DESCRIPTORS_MORE_MAX: usize = 8;

/// An agent with a service that behaves, under load.
struct Stand {
    // Before the store: it asks for the keys of its clients when it ends.
    load: Option<RunningLoad>,
    store: Store,
    agent: u64,
    /// How long an update of the honest service takes when it is alone.
    usual: Duration,
    updates: u32,
    /// Of the agent, before anything hostile ran.
    descriptors: usize,
    image: PathBuf,
    /// Of the hostile service.
    address: SocketAddr,
}

impl Stand {
    fn new(name: &'static str) -> Self {
        let store = Store::start(name, HONEST_HANDOVER).unwrap();
        store.write_keys(KEYS).unwrap();
        let agent = store.ground().json(&["status"]).unwrap()["pid"].as_u64().unwrap();
        let image = store.ground().image(HOSTILE, HOSTILE).unwrap();
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        let load = Some(store.load().unwrap());
        let mut stand = Self { store, load, agent, usual: Duration::ZERO, updates: 0, descriptors: 0, image, address };
        // The first one packs the image.
        for _ in 0..2 {
            let began = Instant::now();
            stand.update_honest().unwrap();
            stand.usual = began.elapsed();
        }
        stand.descriptors = stand.descriptors_of_agent();
        stand
    }

    fn file(&self, name: &str, image: &str, command: &str) -> PathBuf {
        let text = format!(
            "name = \"{HOSTILE}\"\nimage = {image:?}\ncommand = [{command}]\n[listen.resp]\naddress = \"{}\"\n\
             [resources]\nmemory_mb_max = 256\ncpu_pct_max = 50\n[handover]\n{HOSTILE_HANDOVER}",
            self.address
        );
        self.store.ground().service_file(name, &text).unwrap()
    }

    fn hostile_file(&self, stage: Stage, misdeed: Misdeed) -> PathBuf {
        let command = format!("\"/bin/service\", {:?}, {:?}", stage.name(), misdeed.name());
        self.file(misdeed.name(), &self.image.to_string_lossy(), &command)
    }

    /// Runs `warmswap`, which must not take longer than that.
    fn warmswap(&self, arguments: &[&str], limit: Duration) -> Result<Said> {
        let began = Instant::now();
        let said = self.store.ground().warmswap(arguments)?;
        let took = began.elapsed();
        ensure!(took <= limit, "`warmswap {}` took {took:?}, more than {limit:?}: {said:?}", arguments.join(" "));
        let wild = |c: char| c.is_control() && c != '\n';
        for text in [&said.stdout, &said.stderr] {
            ensure!(!text.contains(wild), "`warmswap {}` printed {text:?}", arguments.join(" "));
        }
        Ok(said)
    }

    fn update_honest(&mut self) -> Result<()> {
        self.updates += 1;
        let version = if self.updates % 2 == 1 { "v2" } else { "v1" };
        let update = self.store.update(version)?;
        ensure!(update.verdict() == "committed", "the honest service: {}", update.reason());
        Ok(())
    }

    /// What must hold however the hostile one behaves.
    fn assert_unharmed(&mut self) -> Result<()> {
        let status = self.warmswap(&["status", "--json"], STATUS_TIME_MAX)?;
        ensure!(status.success(), "the agent does not answer: {status:?}");
        let status: serde_json::Value = serde_json::from_str(&status.stdout)?;
        ensure!(status["pid"] == self.agent, "it is another agent");
        self.warmswap(&["status"], STATUS_TIME_MAX)?;
        let began = Instant::now();
        self.update_honest()?;
        let (took, limit) = (began.elapsed(), self.usual * 3 + Duration::from_secs(2));
        ensure!(took <= limit, "the honest service waited {took:?} for its update, more than {limit:?}");
        self.store.check_keys(KEYS)?;
        let totals = self.load.as_ref().unwrap().snapshot().totals;
        ensure!(totals.is_clean(), "clients of the honest service: {totals:?}");
        Ok(())
    }

    /// Everything the hostile processes hold is either theirs or was given to them.
    fn assert_holds_nothing(&self, pids: &[i32]) -> Result<()> {
        let mut of_others: BTreeSet<String> = held(i32::try_from(self.agent)?)?.into_iter().collect();
        let given = given(&of_others);
        of_others.retain(|thing| !given.contains(thing));
        for pid in self.store.pids(self.store.owner()?)? {
            of_others.extend(held(pid)?.into_iter().filter(|thing| !thing.starts_with("/dev/")));
        }
        for pid in pids {
            for thing in held(*pid)? {
                let own = ["/dev/", "/memfd:hostile", "/tmp/", "/ ", "/proc/"].iter().any(|own| thing.starts_with(own));
                let log = thing.contains("/logs/hostile/");
                let given =
                    ["socket:", "pipe:", "/memfd:warmswap-", "anon_inode:"].iter().any(|kind| thing.starts_with(kind));
                ensure!(own || log || given, "{pid} holds {thing}");
                ensure!(own || !of_others.contains(&thing), "{pid} holds {thing}, which is another's");
            }
        }
        Ok(())
    }

    /// Without the state of services that behave, which comes in as many segments as it likes.
    fn descriptors_of_agent(&self) -> usize {
        let held = i32::try_from(self.agent).ok().and_then(|pid| held(pid).ok());
        held.map_or(usize::MAX, |things| {
            things.iter().filter(|thing| !thing.starts_with("/memfd:warmswap-segment")).count()
        })
    }

    /// Ends the hostile service; everything the agent held for it is closed.
    fn end(&self) -> Result<()> {
        let said = self.warmswap(&["stop", HOSTILE], STOP_TIME_MAX)?;
        ensure!(said.success(), "it cannot be stopped: {}", said.stderr);
        // Over all misdeeds: one that leaks but one descriptor is found out in the end.
        let most = self.descriptors + DESCRIPTORS_MORE_MAX;
        let closed = within(Duration::from_secs(10), || (self.descriptors_of_agent() <= most).then_some(()));
        ensure!(closed.is_some(), "the agent holds {} descriptors, more than {most}", self.descriptors_of_agent());
        let log = self.store.log();
        ensure!(!log.contains("panicked"), "something panicked");
        Ok(())
    }

    /// As the first generation of a service.
    fn try_first(&mut self, misdeed: Misdeed) -> Result<()> {
        let file = self.hostile_file(Stage::First, misdeed);
        let said = self.warmswap(&["run", &file.to_string_lossy()], HOSTILE_UPDATE_MAX)?;
        ensure!(said.success(), "it behaved until it served: {}", said.stderr);
        let pids = begun(Stage::First, misdeed, &AtomicBool::new(false))?;
        self.assert_unharmed()?;
        self.assert_holds_nothing(&pids)?;
        self.end()
    }

    /// As the update of a service that behaves.
    fn try_update(&mut self, stage: Stage, misdeed: Misdeed) -> Result<()> {
        let file = self.file("victim", &self.store.image("v1")?.to_string_lossy(), "\"/bin/service\"");
        let said = self.warmswap(&["run", &file.to_string_lossy()], HOSTILE_UPDATE_MAX)?;
        ensure!(said.success(), "{}", said.stderr);
        let mut client = Client::connect(self.address, Duration::from_secs(10))?;
        ensure!(client.command(&["SET", "key", "kept"])? == Reply::Simple("OK".into()), "the victim serves");

        let file = self.hostile_file(stage, misdeed);
        let over = AtomicBool::new(false);
        let (verdict, reason) = std::thread::scope(|scope| -> Result<(String, String)> {
            let ground = self.store.ground();
            let ended = &over;
            let update = scope.spawn(|| {
                let _ended = SetOnDrop(ended);
                let began = Instant::now();
                let said = ground.warmswap(&["update", HOSTILE, "--file", &file.to_string_lossy(), "--json"]);
                (said, began.elapsed())
            });
            // Some are over before they are seen.
            if let Ok(pids) = begun(stage, misdeed, ended)
                && let Err(error) = self.assert_holds_nothing(&pids)
            {
                ensure!(pids.iter().any(|pid| held(*pid).is_err()), error);
            }
            let (said, took) = update.join().unwrap();
            let said = said?;
            ensure!(took <= HOSTILE_UPDATE_MAX, "the update took {took:?}: {said:?}");
            let lines: Vec<serde_json::Value> =
                serde_json::Deserializer::from_str(&said.stdout).into_iter().collect::<Result<_, _>>()?;
            let report = lines.iter().find_map(|line| line.get("report")).context(said.stderr)?;
            let text = |field: &str| report[field].as_str().unwrap_or_default().to_owned();
            Ok((text("verdict"), text("reason")))
        })?;
        ensure!(!reason.contains(|c: char| c.is_control() && c != '\n'), "the reason is {reason:?}");
        ensure!(reason.len() < 2000, "the reason has {} bytes", reason.len());
        ensure!(!reason.contains("wrote to the control page"), "{reason}");
        self.assert_unharmed()?;
        self.warmswap(&["history", HOSTILE], STATUS_TIME_MAX * 2)?;
        let expected = if stage == Stage::Shadow { "aborted" } else { "rolled_back" };
        if verdict == "committed" {
            // What it does after VERIFY, or where nobody can see it, is its own service's affair.
            ensure!(stage == Stage::Verify, "it was taken for a good version");
        } else {
            ensure!(verdict == expected, "{verdict}: {reason}");
            // An owner that does not hand back is ended, and its connections with it; never the state.
            let reply = match client.command(&["GET", "key"]) {
                Err(_) if stage == Stage::Verify => {
                    Client::connect(self.address, Duration::from_secs(10))?.command(&["GET", "key"])?
                }
                reply => reply.context("the victim's client")?,
            };
            ensure!(reply == Reply::Bulk(Some(b"kept".to_vec())), "the victim answers {reply}");
        }
        self.end()
    }

    fn trial(&mut self, stage: Stage) {
        let mut failures = Vec::new();
        for misdeed in Misdeed::ALL {
            let began = Instant::now();
            let logged = self.store.log().len();
            let result = match stage {
                Stage::First => self.try_first(*misdeed),
                Stage::Shadow | Stage::Verify => self.try_update(stage, *misdeed),
            };
            let result = result.and_then(|()| {
                let written = self.store.log().len() - logged;
                ensure!(written < LOG_LEN_MAX, "the agent logged {written} bytes");
                Ok(())
            });
            println!("{:>11} {:5.1} s  {result:?}", misdeed.name(), began.elapsed().as_secs_f64());
            if let Err(error) = result {
                let log = self.store.log();
                let last = log.lines().rev().take(8).map(|line| format!("\n      {line}")).collect::<String>();
                failures.push(format!("{} ({}): {error:#}{last}", misdeed.name(), stage.name()));
                if !PathBuf::from(format!("/proc/{}", self.agent)).exists() {
                    failures.push("the agent is gone".to_owned());
                    break;
                }
                let _ = self.store.ground().warmswap(&["stop", HOSTILE]);
            }
        }
        assert!(failures.is_empty(), "{} misdeeds do harm:\n{}", failures.len(), failures.join("\n"));
    }

    fn finish(mut self) {
        let result = self.load.take().unwrap().stop().unwrap();
        assert!(result.totals.is_clean(), "{:?}\n{:?}", result.totals, result.faults);
        self.store.finish().unwrap();
    }
}

/// The processes of the hostile service, once they misbehave.
fn begun(stage: Stage, misdeed: Misdeed, over: &AtomicBool) -> Result<Vec<i32>> {
    let line = ["/bin/service", stage.name(), misdeed.name()].join("\0");
    let find = || {
        let entries = fs::read_dir("/proc").ok()?.flatten();
        let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let ours = numbers.filter(|pid| {
            let told = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            told.strip_suffix(b"\0") == Some(line.as_bytes())
                && PathBuf::from(format!("/proc/{pid}/root{BEGUN}")).exists()
        });
        let found: Vec<i32> = ours.collect();
        (!found.is_empty() || over.load(Ordering::Acquire)).then_some(found)
    };
    let found = within(Duration::from_secs(20), find).context("it does not begin")?;
    ensure!(!found.is_empty(), "it is over");
    Ok(found)
}

/// What a process has open: where it leads, and its number in its file system.
fn held(pid: i32) -> Result<Vec<String>> {
    let mut things = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let Ok(link) = fs::read_link(entry.path()) else { continue };
        let inode = fs::metadata(entry.path()).map_or(0, |metadata| metadata.ino());
        things.push(format!("{} {inode}", link.display()));
    }
    Ok(things)
}

/// What the agent shares with containers: ends of channels, pages, segments, listeners.
fn given(things: &BTreeSet<String>) -> BTreeSet<String> {
    let shared = ["socket:", "pipe:", "/memfd:"];
    things.iter().filter(|thing| shared.iter().any(|kind| thing.starts_with(kind))).cloned().collect()
}

#[test]
fn a_hostile_first_generation_harms_nobody_else() {
    needs!("a_hostile_first_generation_harms_nobody_else", Requirement::Containers);
    let mut stand = Stand::new("beside-first");
    stand.trial(Stage::First);
    stand.finish();
}

#[test]
fn a_hostile_shadow_is_given_up() {
    needs!("a_hostile_shadow_is_given_up", Requirement::Containers);
    let mut stand = Stand::new("beside-shadow");
    stand.trial(Stage::Shadow);
    stand.finish();
}

#[test]
fn a_hostile_owner_is_found_out_or_harms_itself_alone() {
    needs!("a_hostile_owner_is_found_out_or_harms_itself_alone", Requirement::Containers);
    let mut stand = Stand::new("beside-owner");
    stand.trial(Stage::Verify);
    stand.finish();
}

#[test]
fn everything_can_be_stopped_while_a_service_floods_its_agent() {
    needs!("everything_can_be_stopped_while_a_service_floods_its_agent", Requirement::Containers);
    let stand = Stand::new("beside-flood");
    let file = stand.hostile_file(Stage::First, Misdeed::Flood);
    assert!(stand.warmswap(&["run", &file.to_string_lossy()], HOSTILE_UPDATE_MAX).unwrap().success());
    begun(Stage::First, Misdeed::Flood, &AtomicBool::new(false)).unwrap();
    let Stand { store, load, .. } = stand;
    let result = load.unwrap().stop().unwrap();
    assert!(result.totals.is_clean(), "{:?}\n{:?}", result.totals, result.faults);
    let began = Instant::now();
    store.finish().unwrap();
    assert!(began.elapsed() < Duration::from_secs(45), "{:?}", began.elapsed());
}

#[test]
fn what_a_stranger_says_on_the_channel_of_a_service_is_not_heard() {
    needs!("what_a_stranger_says_on_the_channel_of_a_service_is_not_heard", Requirement::Containers);
    let store = Store::start("beside-stranger", LENIENT).unwrap();
    store.write_keys(KEYS).unwrap();
    let owner = store.pids(1).unwrap()[0];
    let end = End::Service.of(owner).unwrap();
    let own = i32::try_from(std::process::id()).unwrap();
    // Each would do harm if the owner said it: its state would be forgotten, its channel closed.
    for index in 0..64 {
        send_as(own, &end, &ToSupervisor::SegmentRetired { index }.encode().unwrap());
    }
    for _ in 0..32 {
        send_as(own, &end, b"no message");
    }
    send_as(own, &end, &ToSupervisor::Failed { what: "by a stranger".to_owned() }.encode().unwrap());
    assert_eq!(store.update("v2").unwrap().verdict(), "committed", "{}", store.log());
    store.check_keys(KEYS).unwrap();
    let said = format!("is not heard by the mouth of process {own}, which is none of its own");
    assert_eq!(store.log().matches(&said).count(), 1, "{}", store.log());
    store.finish().unwrap();
}

#[test]
fn the_agent_answers_requests_that_make_no_sense() {
    needs!("the_agent_answers_requests_that_make_no_sense", Requirement::Containers);
    let mut stand = Stand::new("beside-requests");
    let socket = stand.store.ground().run_dir().join("agent.sock");
    let post = |path: &str, body: &[u8]| {
        let head = format!("POST {path} HTTP/1.1\r\nhost: agent\r\ncontent-length: {}\r\n\r\n", body.len());
        [head.as_bytes(), body].concat()
    };
    let update = format!("/v1/services/{}/update", stand.store.status().unwrap()["name"].as_str().unwrap());
    let nested = "[".repeat(100_000);
    let requests: [(&str, Vec<u8>); 14] = [
        ("no HTTP", b"\0\xff\x1b[2J\r\n\r\n".to_vec()),
        ("half a request", b"GET /v1/sta".to_vec()),
        ("endless header", [b"GET / HTTP/1.1\r\nx: ".to_vec(), vec![b'x'; 1 << 20]].concat()),
        ("a length it does not keep", b"POST /v1/services HTTP/1.1\r\nhost: a\r\ncontent-length: 99\r\n\r\n{".to_vec()),
        (
            "a length without end",
            b"POST /v1/services HTTP/1.1\r\nhost: a\r\ncontent-length: 18446744073709551615\r\n\r\n".to_vec(),
        ),
        ("no JSON", post("/v1/services", b"\xff\xfe")),
        ("nested JSON", post("/v1/services", nested.as_bytes())),
        ("another type", post("/v1/services", b"[1, 2, 3]")),
        (
            "a service file of zeros",
            post(
                "/v1/services",
                &serde_json::to_vec(&serde_json::json!({"path": "/x/s.toml", "text": "\0".repeat(9999)})).unwrap(),
            ),
        ),
        ("a long body", post("/v1/services", &vec![b' '; 8 << 20])),
        ("an image that is a device", post(&update, br#"{"image": "/dev/zero"}"#)),
        ("an image that is the root", post(&update, br#"{"image": "/"}"#)),
        ("a fault nobody knows", post(&update, br#"{"fault": "burn_the_host"}"#)),
        ("a name that leaves the folder", post("/v1/services/..%2f..%2fetc/update", b"{}")),
    ];
    for (what, request) in requests {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
        let _ = stream.write_all(&request); // it may hang up in the middle
        let mut answer = [0; 12];
        let got = stream.read(&mut answer).unwrap_or(0);
        let answer = String::from_utf8_lossy(&answer[..got]).into_owned();
        assert!(got == 0 || answer.starts_with("HTTP/1.1 4") || answer.starts_with("HTTP/1.1 5"), "{what}: {answer}");
        drop(stream);
        let status = stand.warmswap(&["status"], STATUS_TIME_MAX).unwrap_or_else(|error| panic!("{what}: {error:#}"));
        assert!(status.success(), "{what}: {status:?}");
    }
    stand.assert_unharmed().unwrap();
    stand.finish();
}
