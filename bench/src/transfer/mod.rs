//! `warmswap-bench transfer`: what it costs to bring state, or a word, to another process.
//!
//! ```text
//!  sender ──── descriptors of segments ──────▶ receiver: map, check, read every key   (ours)
//!         ──── bytes through a socket ───────▶ receiver: decode, own, read every key
//!         ──── file on tmpfs, its path ──────▶ receiver: read, decode, own, read every key
//!         ◀─── signals there and back ───────▶
//! ```
//!
//! The ways take turns, in another order each time, so that what happens to the host happens to all of them.
//! `docs/benchmarks.md` says how each row is measured.

mod line;
mod pair;
pub(crate) mod receiver;
mod records;
mod signals;
mod ways;

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::json;

use crate::host;
use crate::interrupt;
use crate::progress::Progress;
use crate::rows::{Conditions, Row};
use crate::stats::{median, paired_ratio, quartiles};
use crate::suite::Outcome;
use line::{Signal, Way};
use pair::{Pair, State, Took};
use ways::{socket_copy, tmpfs_file};

/// Size of the state, MiB, and how often each way is measured.
const QUICK: &[(u64, usize)] = &[(1, 20), (64, 5)];
const WHOLE: &[(u64, usize)] = &[(1, 100), (64, 20), (1024, 5)];

/// Memory that must be available, in multiples of a state: the log, the records they are made from, the receiver's copy, a
/// file, and room to breathe.
const MEMORY_PER_STATE: u64 = 5;

const PEERS: [(Way, &str); 2] = [(Way::SocketCopy, socket_copy::NAME), (Way::TmpfsFile, tmpfs_file::NAME)];
const ALL_KEYS: &str = "transfer.all_keys_us";
const FIRST_VALUE: &str = "transfer.first_value_us";

const SLEEPER: &str = "transfer.signal_us";
const LOOKER: &str = "transfer.control_word_us";
const SIGNALS_PER_TURN: u32 = 500;
const TURNS_QUICK: usize = 4;
const TURNS_WHOLE: usize = 20;

pub(crate) fn run(_programs: &Path, quick: bool) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let mut pair = Pair::start()?;
    for (mib, repetitions) in if quick { QUICK } else { WHOLE } {
        outcome.rows.extend(transfer(&mut pair, *mib, *repetitions)?);
    }
    outcome.rows.extend(signals(&mut pair, if quick { TURNS_QUICK } else { TURNS_WHOLE })?);
    Ok(outcome)
}

fn transfer(pair: &mut Pair, mib: u64, repetitions: usize) -> Result<Vec<Row>> {
    let mut conditions = Conditions::new();
    conditions.insert("state_mib".into(), json!(mib));
    conditions.insert("records".into(), json!(records::count(mib)));
    let available = host::memory_available_mib()?;
    if available < MEMORY_PER_STATE * mib {
        let reason = format!("{available} MiB of memory are available, {} are needed", MEMORY_PER_STATE * mib);
        return Ok([ALL_KEYS, FIRST_VALUE].map(|id| Row::unmeasured(id, "µs", &reason, &conditions)).into());
    }
    let mut progress = Progress::begin(format_args!("{mib} MiB of state to another process"));
    let state = State::new(records::make(mib))?;
    let ways = [Way::Segments, PEERS[0].0, PEERS[1].0];
    let mut took: [Vec<Took>; 3] = Default::default();
    for repetition in 0..repetitions {
        for which in order(ways.len(), repetition) {
            interrupt::check()?;
            took[which].push(pair.transfer(ways[which], &state)?);
        }
        progress.at(format_args!("{} of {repetitions} times each", repetition + 1));
    }
    let [ours, peers @ ..] = took;
    let mut rows = Vec::new();
    for (id, of) in [(ALL_KEYS, all_us as fn(&Took) -> f64), (FIRST_VALUE, first_us)] {
        let values = |took: &[Took]| took.iter().map(of).collect::<Vec<f64>>();
        let mine = values(&ours);
        for ((_, name), theirs) in PEERS.iter().zip(&peers) {
            let row = compared(id, &mine, name, &values(theirs), &conditions);
            let effort = (id == ALL_KEYS).then(|| format!("receiver: {}; peer: {}", effort(&ours), effort(theirs)));
            rows.push(row.note(effort));
        }
    }
    Ok(rows)
}

fn effort(took: &[Took]) -> String {
    let median = |of: fn(&Took) -> i64| median(&took.iter().map(|took| of(took) as f64).collect::<Vec<_>>());
    let user = median(|took| took.effort.user_us);
    let kernel = median(|took| took.effort.kernel_us);
    let faults = median(|took| took.effort.page_faults);
    let ms = |us: Option<f64>| us.unwrap_or(0.0) / 1e3;
    format!("{:.1} ms user, {:.1} ms kernel, {:.0} page faults", ms(user), ms(kernel), faults.unwrap_or(0.0))
}

const fn all_us(took: &Took) -> f64 {
    took.all_us
}

const fn first_us(took: &Took) -> f64 {
    took.first_us
}

fn compared(id: &str, mine: &[f64], peer: &str, theirs: &[f64], conditions: &Conditions) -> Row {
    Row::new(id, median(mine), "µs", mine.len(), conditions).spread(quartiles(mine)).beside(
        peer,
        median(theirs),
        paired_ratio(mine, theirs),
    )
}

/// Every way is first, second and last equally often.
fn order(ways: usize, repetition: usize) -> impl Iterator<Item = usize> {
    (0..ways).map(move |place| (place + repetition) % ways)
}

/// Signals of one kind beside each other. Values are medians of a turn of many: single ones of different kinds are no pairs.
fn signals(pair: &mut Pair, turns: usize) -> Result<Vec<Row>> {
    let mut progress = Progress::begin("signals to another process and back");
    let folder = Folder::new();
    let kinds = [
        (
            SLEEPER,
            "woken",
            Signal::Channel,
            vec![
                (Signal::IceoryxEvent { folder: folder.0.clone() }, signals::ICEORYX_EVENT),
                (Signal::Futex, signals::FUTEX),
            ],
        ),
        (
            LOOKER,
            "looking",
            Signal::Word,
            vec![(Signal::IceoryxSample { folder: folder.0.clone() }, signals::ICEORYX_SAMPLE)],
        ),
    ];
    let mut rows = Vec::new();
    for (id, receiver, ours, peers) in kinds {
        let mut conditions = Conditions::new();
        conditions.insert("receiver".into(), json!(receiver));
        conditions.insert("round_trips_per_value".into(), json!(SIGNALS_PER_TURN));
        let mut alone = true;
        for (peer, name) in peers {
            if cfg!(not(feature = "iceoryx2")) && !matches!(peer, Signal::Futex) {
                rows.push(Row::left_out(id, "µs", name, signals::WITHOUT_ICEORYX, &conditions));
                continue;
            }
            alone = false;
            let both = [&ours, &peer];
            let mut values: [Vec<f64>; 2] = Default::default();
            for turn in 0..turns {
                for which in order(both.len(), turn) {
                    interrupt::check()?;
                    values[which].extend(median(&pair.signal(both[which], SIGNALS_PER_TURN)?));
                }
                progress.at(format_args!("{name}: {} of {turns} turns", turn + 1));
            }
            rows.push(compared(id, &values[0], name, &values[1], &conditions));
        }
        if alone {
            let mut mine = Vec::with_capacity(turns);
            for _ in 0..turns {
                interrupt::check()?;
                mine.extend(median(&pair.signal(&ours, SIGNALS_PER_TURN)?));
            }
            rows.push(Row::new(id, median(&mine), "µs", mine.len(), &conditions).spread(quartiles(&mine)));
        }
    }
    Ok(rows)
}

/// Where iceoryx2 keeps its files; what it leaves there and in shared memory is removed when this is dropped.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        Self(std::env::temp_dir().join(format!("warmswap-iox-{}", std::process::id())))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Not there without iceoryx2.
        let _ = std::fs::remove_dir_all(&self.0);
        let prefix = self.0.file_name().unwrap_or_default().as_encoded_bytes();
        for entry in std::fs::read_dir("/dev/shm").into_iter().flatten().map_while(Result::ok) {
            if entry.file_name().as_encoded_bytes().starts_with(prefix) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_comes_first_and_last_equally_often() {
        let orders: Vec<Vec<usize>> = (0..3).map(|repetition| order(3, repetition).collect()).collect();
        assert_eq!(orders, [[0, 1, 2], [1, 2, 0], [2, 0, 1]]);
    }
}
