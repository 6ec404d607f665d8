//! What counting adds to a system call.
//!
//! ```text
//!  round:  alone │ warmswap │ alone │ count() │ alone │ … │ alone        (in another order each round)
//! ```
//!
//! What somebody adds is his block minus the mean of the blocks around it; what he costs beside another, the ratio of what
//! both added in the same round.

use anyhow::{Result, ensure};
use serde_json::json;

use super::Ground;
use super::floor::{self, Floor};
use super::jobs::CALLS_PER_BATCH;
use super::ours;
use super::tools::{COUNT, COUNT_BY_CGROUP, Tool};
use super::worker::{Task, Worker};
use crate::interrupt;
use crate::progress::Progress;
use crate::rows::{Conditions, Row};
use crate::stats::{median, median_interval, paired_ratio, quartiles, ratios};

const ADDED: &str = "probes.count_ns";
/// What a program adds that does nothing.
const LEAST: &str = "probes.count_floor_ns";
const BESIDE: &str = "probes.count_ns_vs_bpftrace";
const TARGET: f64 = 0.25;
const COUNTING: &str = "system-calls";

const BATCHES: u32 = 200;
const WARM_UP_BATCHES: u32 = 20;
const ROUNDS_QUICK: usize = 6;
const ROUNDS_WHOLE: usize = 40;

/// Who looks on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Who {
    Ours { watched: bool },
    Theirs(&'static Tool),
    Nothing,
}

const ALL: [Who; 5] = [
    Who::Ours { watched: true },
    Who::Theirs(&COUNT),
    Who::Theirs(&COUNT_BY_CGROUP),
    Who::Nothing,
    Who::Ours { watched: false },
];

pub(super) fn run(ground: &Ground, quick: bool) -> Result<Vec<Row>> {
    let _placed = ground.keep_off()?;
    let rounds = if quick { ROUNDS_QUICK } else { ROUNDS_WHOLE };
    let mut progress = Progress::begin("what counting adds to a system call");
    let mut worker = ground.worker()?;
    let mut added: [Vec<f64>; ALL.len()] = Default::default();
    let mut alone = Vec::new();
    // Who cannot be had is left out.
    let mut absent: [Option<String>; ALL.len()] = Default::default();
    let mut before = block(&mut worker)?;
    for round in 0..rounds {
        for place in 0..ALL.len() {
            let which = (place + round) % ALL.len();
            if absent[which].is_some() {
                continue;
            }
            interrupt::check()?;
            let during = match observed(ALL[which], ground, &mut worker) {
                Err(error) if ALL[which] != ALL[0] && !error.is::<interrupt::Interrupted>() => {
                    absent[which] = Some(super::reason(&error));
                    continue;
                }
                during => during?,
            };
            let after = block(&mut worker)?;
            added[which].push(during - f64::midpoint(before, after));
            alone.push(after);
            before = after;
        }
        progress.at(format_args!("{} of {rounds} rounds", round + 1));
    }
    Ok(rows(&added, &absent, &alone))
}

fn block(worker: &mut Worker) -> Result<f64> {
    worker.work(&Task::SystemCalls { batches: WARM_UP_BATCHES })?;
    Ok(worker.work(&Task::SystemCalls { batches: BATCHES })?.each_ns)
}

fn observed(who: Who, ground: &Ground, worker: &mut Worker) -> Result<f64> {
    let calls = u64::from((BATCHES + WARM_UP_BATCHES) * CALLS_PER_BATCH);
    match who {
        Who::Ours { watched } => {
            let mut sensor = ours::attach(ground, watched)?;
            let during = block(worker)?;
            let counted = sensor.windows().first().map_or(0, |window| window.counts.syscalls);
            let whole = watched && !ground.without.iter().any(|probe| probe == COUNTING);
            ensure!(!whole || counted >= calls, "warmswap counted {counted} of {calls} system calls");
            Ok(during)
        }
        Who::Theirs(tool) => {
            let attached = tool.attach()?;
            let during = block(worker)?;
            let counted = attached.end()?.counted();
            ensure!(counted >= calls, "{} counted {counted} of {calls} system calls", tool.name);
            Ok(during)
        }
        Who::Nothing => {
            let _floor = Floor::attach()?;
            block(worker)
        }
    }
}

fn rows(added: &[Vec<f64>; ALL.len()], absent: &[Option<String>; ALL.len()], alone: &[f64]) -> Vec<Row> {
    let middle = |values: &[f64]| median(values).unwrap_or(0.0);
    let bare = format!("the call alone takes {:.0} ns", middle(alone));
    let mine = &added[0];
    let least = ALL.iter().position(|who| *who == Who::Nothing).map_or(&[] as &[f64], |which| added[which].as_slice());
    let value = |id: &str, values: &[f64], unit, conditions: &Conditions| {
        Row::new(id, median(values), unit, values.len(), conditions)
            .spread(quartiles(values))
            .interval(median_interval(values))
    };
    let row = |(which, who): (usize, Who)| {
        let mut conditions = Conditions::new();
        let values = &added[which];
        match (who, &absent[which]) {
            (Who::Ours { watched }, _) => {
                conditions.insert("watched".into(), json!(watched));
                value(ADDED, values, "ns", &conditions).note(Some(bare.clone()))
            }
            (Who::Nothing, Some(reason)) => Row::unmeasured(LEAST, "ns", reason, &conditions),
            (Who::Nothing, None) => value(LEAST, values, "ns", &conditions).note(Some(floor::NAME.to_owned())),
            (Who::Theirs(tool), Some(reason)) => Row::left_out(BESIDE, "×", tool.name, reason, &conditions),
            (Who::Theirs(tool), None) => {
                let ratios = ratios(mine, values);
                let mut note = format!("peer value: ns added; ours {:.1}", middle(mine));
                if let Some(above) = above(mine, values, least) {
                    note += &format!("; of what each adds to the kernel's own price {above:.3}");
                }
                let row = value(BESIDE, &ratios, "×", &conditions);
                let row = row.beside(tool.name, median(values), median(&ratios)).note(Some(note));
                // The claim is about the simplest thing to say.
                if tool == &COUNT { row.at_most(TARGET) } else { row }
            }
        }
    };
    ALL.into_iter().enumerate().map(row).collect()
}

/// The median of ours by theirs, each without what a program costs that does nothing.
fn above(ours: &[f64], theirs: &[f64], least: &[f64]) -> Option<f64> {
    let without = |values: &[f64]| values.iter().zip(least).map(|(value, least)| value - least).collect::<Vec<_>>();
    paired_ratio(&without(ours), &without(theirs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_everybody_pays_is_left_out() {
        assert_eq!(above(&[140.0, 145.0], &[180.0, 185.0], &[100.0, 105.0]), Some(0.5));
        assert_eq!(above(&[140.0], &[180.0], &[]), None, "nothing is known of it");
    }
}
