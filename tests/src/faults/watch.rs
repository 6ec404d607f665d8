//! Clients that never stop asking and believe nothing.
//!
//! One connects anew each time and increments a counter: its answers must rise, whoever answers. One keeps its connection and
//! writes two keys after each other: the second is never ahead of the first, never more than one behind, and neither falls
//! behind what was acknowledged.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use warmswap_load::resp::{Client, Reply};

/// How long one question may take before its client asks anew.
const PATIENCE: Duration = Duration::from_millis(250);
const PAUSE: Duration = Duration::from_millis(5);
/// Answers further back are not looked at again.
const REMEMBERED: Duration = Duration::from_secs(600);

#[derive(Debug)]
pub(super) struct Watch {
    address: SocketAddr,
    seen: Arc<Mutex<Seen>>,
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Seen {
    answers: Vec<Instant>,
    wrong: Vec<(Instant, String)>,
}

/// What clients saw in a stretch of time.
#[derive(Debug, Default)]
pub(super) struct Sight {
    /// Longest time without an answer to a new connection.
    pub(super) outage: Duration,
    pub(super) wrong: Vec<String>,
}

impl Watch {
    pub(super) fn start(address: SocketAddr) -> Result<Self> {
        let (seen, over) = (Arc::new(Mutex::new(Seen::default())), Arc::new(AtomicBool::new(false)));
        let mut threads = Vec::new();
        for watcher in [newcomer as fn(SocketAddr, &Mutex<Seen>, &AtomicBool), regular] {
            let (seen, over) = (Arc::clone(&seen), Arc::clone(&over));
            threads.push(std::thread::Builder::new().spawn(move || watcher(address, &seen, &over))?);
        }
        Ok(Self { address, seen, over, threads })
    }

    /// Everything from `began` to now.
    pub(super) fn since(&self, began: Instant) -> Sight {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.answers.retain(|at| at.elapsed() < REMEMBERED);
        let first = seen.answers.partition_point(|at| *at < began).saturating_sub(1);
        let times = seen.answers[first..].iter().copied().chain([Instant::now()]);
        let outage = times.clone().zip(times.skip(1)).map(|(a, b)| b.duration_since(a)).max().unwrap_or_default();
        let wrong = seen.wrong.iter().filter(|(at, _)| *at >= began).map(|(_, what)| what.clone()).collect();
        Sight { outage, wrong }
    }

    /// The generations that answer new connections.
    pub(super) fn who_answers(&self) -> Result<BTreeSet<u64>> {
        let ask = || -> Result<u64> {
            let reply = Client::connect(self.address, PATIENCE)?.command(&["INFO"])?;
            let Reply::Bulk(Some(text)) = &reply else { anyhow::bail!("INFO: {reply}") };
            let text = String::from_utf8_lossy(text);
            let line = text.lines().find_map(|line| line.strip_prefix("generation:"));
            Ok(line.context("INFO without a generation")?.trim().parse()?)
        };
        (0..8).map(|_| ask()).collect()
    }

    pub(super) fn stop(self) {
        self.over.store(true, Ordering::Release);
        for thread in self.threads {
            let _ = thread.join(); // a panic of it was printed
        }
    }
}

fn wrong(seen: &Mutex<Seen>, what: String) {
    seen.lock().unwrap_or_else(PoisonError::into_inner).wrong.push((Instant::now(), what));
}

fn integer(client: &mut Client, words: &[&str]) -> Option<i64> {
    match client.command(words).ok()? {
        Reply::Integer(value) => Some(value),
        Reply::Bulk(Some(text)) => std::str::from_utf8(&text).ok()?.parse().ok(),
        Reply::Bulk(None) => Some(0),
        _ => None,
    }
}

fn newcomer(address: SocketAddr, seen: &Mutex<Seen>, over: &AtomicBool) {
    let mut acknowledged = 0;
    while !over.load(Ordering::Acquire) {
        let answer =
            Client::connect(address, PATIENCE).ok().and_then(|mut client| integer(&mut client, &["INCR", "newcomers"]));
        if let Some(value) = answer {
            if value <= acknowledged {
                wrong(seen, format!("INCR said {value} after {acknowledged}: an acknowledged write was lost"));
            }
            acknowledged = value;
            seen.lock().unwrap_or_else(PoisonError::into_inner).answers.push(Instant::now());
        }
        std::thread::sleep(PAUSE);
    }
}

/// Exactly once where nobody died: every answer on one connection is one more than the answer before.
fn regular(address: SocketAddr, seen: &Mutex<Seen>, over: &AtomicBool) {
    const KEYS: [&str; 2] = ["first", "second"];
    let mut acknowledged = [0_i64; 2];
    while !over.load(Ordering::Acquire) {
        let Ok(mut client) = Client::connect(address, 8 * PATIENCE) else {
            std::thread::sleep(PAUSE);
            continue;
        };
        let found = KEYS.map(|key| integer(&mut client, &["GET", key]));
        let [Some(first), Some(second)] = found else { continue };
        if first < acknowledged[0] || second < acknowledged[1] {
            wrong(seen, format!("found {first} and {second} after {acknowledged:?} were acknowledged"));
        }
        if !(0..=1).contains(&(first - second)) {
            wrong(seen, format!("found {first} and {second}: states are mixed"));
        }
        acknowledged = [first, second];
        if second < first && integer(&mut client, &["INCR", KEYS[1]]) == Some(first) {
            acknowledged[1] = first;
        } else if second < first {
            continue;
        }
        'connected: while !over.load(Ordering::Acquire) {
            for (at, key) in KEYS.into_iter().enumerate() {
                let Some(value) = integer(&mut client, &["INCR", key]) else { break 'connected };
                if value != acknowledged[at] + 1 {
                    wrong(seen, format!("INCR {key} said {value} after {}", acknowledged[at]));
                }
                acknowledged[at] = value;
            }
            std::thread::sleep(PAUSE);
        }
    }
}
