//! What counting adds to a system call, and to a switch from one task to another.
//!
//! ```text
//!  round:  alone │ warmswap │ alone │ count() │ alone │ … │ alone        (in another order each round)
//! ```
//!
//! What somebody adds is his block minus the mean of the blocks around it; what he costs beside another, the ratio of what
//! both added in the same round. The calls are reads, because those are what is counted; ours are counted by the kernel and
//! taken over when a window is read.

use anyhow::{Result, ensure};
use serde_json::json;

use super::Ground;
use super::floor::{self, Floor};
use super::jobs::{CALLS_PER_BATCH, SWITCHES_PER_BATCH};
use super::ours;
use super::tools::{COUNT, COUNT_BY_CGROUP, COUNT_SWITCHES, Tool};
use super::worker::{Task, Worker};
use crate::interrupt;
use crate::progress::Progress;
use crate::rows::{Conditions, Row};
use crate::stats::{median, median_interval, quartiles, ratios};

/// What a program adds that does nothing.
const LEAST: &str = "probes.count_floor_ns";

/// The probe that counts what is done.
const COUNTED: &str = "file-bytes";
/// So many reads are not the work.
const OTHERS_MAX: u64 = 200;

const BATCHES: u32 = 200;
const WARM_UP_BATCHES: u32 = 20;
const ROUNDS_QUICK: usize = 6;
const ROUNDS_WHOLE: usize = 40;

/// Who looks on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Who {
    Ours {
        watched: bool,
    },
    Theirs(&'static Tool),
    /// At the end of system calls.
    Nothing,
}

/// What is done that costs more when somebody looks on.
struct Work {
    what: &'static str,
    added: &'static str,
    beside: &'static str,
    /// Of the ratio to the first peer, who does the simplest thing that can be done.
    target: f64,
    task: fn(u32) -> Task,
    /// Each with a read, which is what has to be counted.
    per_batch: u32,
    /// Ours first.
    everybody: &'static [Who],
}

const WORKS: [Work; 2] = [
    Work {
        what: "a system call",
        added: "probes.count_ns",
        beside: "probes.count_ns_vs_bpftrace",
        target: 0.25,
        task: |batches| Task::SystemCalls { batches },
        per_batch: CALLS_PER_BATCH,
        everybody: &[
            Who::Ours { watched: true },
            Who::Theirs(&COUNT),
            Who::Theirs(&COUNT_BY_CGROUP),
            Who::Nothing,
            Who::Ours { watched: false },
        ],
    },
    Work {
        what: "a switch",
        added: "probes.switch_ns",
        beside: "probes.switch_ns_vs_bpftrace",
        target: 1.0,
        task: |batches| Task::Switches { batches },
        per_batch: SWITCHES_PER_BATCH,
        everybody: &[Who::Ours { watched: true }, Who::Theirs(&COUNT_SWITCHES), Who::Ours { watched: false }],
    },
];

pub(super) fn run(ground: &Ground, quick: bool) -> Result<Vec<Row>> {
    let _placed = ground.keep_off()?;
    let rounds = if quick { ROUNDS_QUICK } else { ROUNDS_WHOLE };
    let mut rows = Vec::new();
    for work in &WORKS {
        rows.extend(work.measure(ground, rounds)?);
    }
    Ok(rows)
}

/// ns added by one of those who look on, or why he could not be had.
type Added = std::result::Result<Vec<f64>, String>;

impl Work {
    fn measure(&self, ground: &Ground, rounds: usize) -> Result<Vec<Row>> {
        let mut progress = Progress::begin(format_args!("what counting adds to {}", self.what));
        let mut worker = ground.worker()?;
        let mut added: Vec<Added> = self.everybody.iter().map(|_| Ok(Vec::with_capacity(rounds))).collect();
        let mut alone = Vec::new();
        let mut before = self.block(&mut worker)?;
        for round in 0..rounds {
            for place in 0..added.len() {
                let which = (place + round) % added.len();
                let Ok(values) = &mut added[which] else { continue };
                interrupt::check()?;
                let during = match self.observed(self.everybody[which], ground, &mut worker) {
                    Err(error) if which != 0 && !error.is::<interrupt::Interrupted>() => {
                        added[which] = Err(super::reason(&error));
                        continue;
                    }
                    during => during?,
                };
                let after = self.block(&mut worker)?;
                values.push(during - f64::midpoint(before, after));
                alone.push(after);
                before = after;
            }
            progress.at(format_args!("{} of {rounds} rounds", round + 1));
        }
        Ok(self.rows(&added, &alone))
    }

    fn block(&self, worker: &mut Worker) -> Result<f64> {
        worker.work(&(self.task)(WARM_UP_BATCHES))?;
        Ok(worker.work(&(self.task)(BATCHES))?.each_ns)
    }

    fn observed(&self, who: Who, ground: &Ground, worker: &mut Worker) -> Result<f64> {
        let done = u64::from((BATCHES + WARM_UP_BATCHES) * self.per_batch);
        match who {
            Who::Ours { watched } => {
                let mut sensor = ours::attach(ground, watched)?;
                let during = self.block(worker)?;
                let counted = sensor.windows().first().map_or(0, |window| window.counts.reads);
                let whole = watched && sensor.probes().iter().any(|probe| probe.name == COUNTED && probe.attached);
                // The worker reads what it is told to do, too.
                ensure!(!whole || (done..done + OTHERS_MAX).contains(&counted), "warmswap counted {counted} of {done}");
                Ok(during)
            }
            Who::Theirs(tool) => {
                let attached = tool.attach()?;
                let during = self.block(worker)?;
                let counted = attached.end()?.counted();
                ensure!(counted >= done, "{} counted {counted} of {done}", tool.name);
                Ok(during)
            }
            Who::Nothing => {
                let _floor = Floor::at_exit()?;
                self.block(worker)
            }
        }
    }

    fn rows(&self, added: &[Added], alone: &[f64]) -> Vec<Row> {
        let middle = |values: &[f64]| median(values).unwrap_or(0.0);
        let bare = format!("{} alone takes {:.0} ns", self.what, middle(alone));
        let mine = added.first().and_then(|added| added.as_deref().ok()).unwrap_or_default();
        let value = |id: &str, values: &[f64], unit, conditions: &Conditions| {
            Row::new(id, median(values), unit, values.len(), conditions)
                .spread(quartiles(values))
                .interval(median_interval(values))
        };
        let row = |(which, who): (usize, &Who)| {
            let mut conditions = Conditions::new();
            match (who, &added[which]) {
                (Who::Ours { watched }, values) => {
                    conditions.insert("watched".into(), json!(watched));
                    let values = values.as_deref().unwrap_or_default();
                    value(self.added, values, "ns", &conditions).note(Some(bare.clone()))
                }
                (Who::Nothing, Err(reason)) => Row::unmeasured(LEAST, "ns", reason, &conditions),
                (Who::Nothing, Ok(values)) => {
                    value(LEAST, values, "ns", &conditions).note(Some(floor::NAME.to_owned()))
                }
                (Who::Theirs(tool), Err(reason)) => Row::left_out(self.beside, "×", tool.name, reason, &conditions),
                (Who::Theirs(tool), Ok(values)) => {
                    let ratios = ratios(mine, values);
                    let note = format!("peer value: ns added; ours {:.1}", middle(mine));
                    let row = value(self.beside, &ratios, "×", &conditions);
                    let row = row.beside(tool.name, median(values), median(&ratios)).note(Some(note));
                    // The claim is about the simplest thing to say.
                    if which == 1 { row.at_most(self.target) } else { row }
                }
            }
        };
        self.everybody.iter().enumerate().map(row).collect()
    }
}
