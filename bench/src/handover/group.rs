//! One condition: services with states of every size side by side, each with its clients, handed over in turn.

use std::time::Instant;

use anyhow::Result;
use warmswap_load::{LoadResult, RunningLoad, monotonic_ns};

use super::plan::{Group, Plan, turns};
use super::subject::{Subject, load, show_faults};
use crate::gaps::{self, Span};
use crate::hogs::Hogs;
use crate::host::{Host, Timed};
use crate::interrupt;
use crate::progress::Progress;
use crate::stats::Round;

/// One service in one group.
pub(super) struct Cell {
    pub(super) state_mib: u64,
    pub(super) handovers: Vec<Timed>,
    /// `None` without clients.
    pub(super) load: Option<LoadResult>,
}

pub(super) struct Measured {
    pub(super) group: Group,
    /// In the order of the sizes.
    pub(super) cells: Vec<Cell>,
    /// Blackouts of the smallest and the largest state, µs.
    pub(super) rounds: Vec<Round>,
    /// When no service was handed over.
    pub(super) calm: Vec<Span>,
}

pub(super) fn measure(host: &Host, subjects: &mut [Subject], group: Group, plan: &Plan) -> Result<Measured> {
    let what = if group.hogs == 0 { "idle host".to_owned() } else { format!("{} CPU hogs", group.hogs) };
    let mut progress = Progress::begin(format_args!("{} connections to each service, {what}", group.connections));
    let _hogs = Hogs::start(group.hogs)?;
    let loads: Vec<RunningLoad> = match group.connections {
        0 => Vec::new(),
        connections => subjects.iter().map(|subject| load(subject.address, connections)).collect::<Result<_>>()?,
    };
    let start_ns = monotonic_ns();
    interrupt::sleep(plan.calm)?;

    let mut handovers: Vec<Vec<Timed>> = subjects.iter().map(|_| Vec::new()).collect();
    let mut rounds = Vec::new();
    let began = Instant::now();
    while rounds.len() < group.rounds && (rounds.is_empty() || began.elapsed() < group.time_max) {
        let mut round = Round::default();
        for turn in turns(subjects.len(), plan.small_per_round) {
            interrupt::check()?;
            let timed = subjects[turn].update(host)?;
            if let Some(blackout) = timed.report.blackouts.first() {
                match turn {
                    0 if subjects.len() > 1 => round.small.push(blackout.us),
                    turn if turn + 1 == subjects.len() => round.large = Some(blackout.us),
                    _ => {}
                }
            }
            handovers[turn].push(timed);
        }
        rounds.push(round);
        progress.at(format_args!("round {} of at most {}", rounds.len(), group.rounds));
        if rounds.len().is_multiple_of(plan.calm_every_rounds) {
            interrupt::sleep(plan.calm)?;
        }
    }
    interrupt::sleep(plan.calm)?;

    let end_ns = monotonic_ns();
    let mut busy: Vec<Span> = handovers.iter().flatten().map(|timed| timed.busy).collect();
    busy.sort_unstable_by_key(|span| span.start_ns);
    let mut results: Vec<Option<LoadResult>> = Vec::new();
    for load in loads {
        results.push(Some(load.stop()?));
    }
    results.resize_with(subjects.len(), || None);
    let cells: Vec<Cell> = subjects
        .iter()
        .zip(handovers)
        .zip(results)
        .map(|((subject, handovers), load)| Cell { state_mib: subject.state_mib, handovers, load })
        .collect();
    for (subject, cell) in subjects.iter().zip(&cells) {
        if let Some(load) = &cell.load {
            show_faults(&subject.name, load, &cell.handovers);
        }
    }
    Ok(Measured { group, cells, rounds, calm: gaps::calm(Span { start_ns, end_ns }, &busy) })
}
