//! From handovers and what clients saw to rows.

use std::collections::BTreeMap;

use serde_json::json;
use warmswap_load::{LoadResult, Totals};
use warmswap_model::{HandoverReport, Phase, PhaseTiming, Verdict};

use super::group::{Cell, Measured};
use super::subject::QUIESCE_MS_DEFAULT;
use crate::gaps::{self, Span};
use crate::host::Timed;
use crate::rows::{Conditions, Row};
use crate::stats::{median, median_interval, quantile, quartiles, round_ratios};

/// A flatness is of the largest to the smallest state; with one size only there is none.
const FLATNESS: &str = "handover.size_flatness";

pub(super) fn conditions(state_mib: u64, connections: usize, hogs: usize) -> Conditions {
    let pairs = [("state_mib", json!(state_mib)), ("connections", json!(connections)), ("hogs", json!(hogs))];
    pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

pub(super) fn rows(measured: &Measured) -> Vec<Row> {
    let mut rows = Vec::new();
    for cell in &measured.cells {
        let conditions = conditions(cell.state_mib, measured.group.connections, measured.group.hogs);
        rows.extend(switch_rows(&cell.handovers, &conditions));
        if let Some(load) = &cell.load {
            rows.extend(gap_rows(&cell.handovers, load, &measured.calm, &conditions));
            rows.extend(client_rows(load, &conditions));
        }
    }
    rows.extend(flatness_row(measured));
    rows
}

/// What the kernel and the supervisor saw.
fn switch_rows(handovers: &[Timed], conditions: &Conditions) -> Vec<Row> {
    let reports = || handovers.iter().map(|timed| &timed.report);
    let n = handovers.len();
    let blackouts: Vec<f64> = reports().filter_map(|report| report.blackouts.first()).map(|b| b.us).collect();
    let in_kernel = reports().filter_map(|report| report.blackouts.first()).filter(|b| b.measured_in_kernel).count();
    let committed = reports().filter(|report| report.verdict == Verdict::Committed).count();
    let slow = reports().filter(|report| phase_us(report, Phase::Quiesce) > QUIESCE_MS_DEFAULT * 1e3).count();
    let durations: Vec<f64> = reports().map(|report| report.duration_ms).collect();
    let slowest = reports().max_by(|a, b| first_blackout(a).total_cmp(&first_blackout(b)));
    let row = |id: &str, value, unit, n| Row::new(id, value, unit, n, conditions);
    let count = |id: &str, value: usize| row(id, Some(value as f64), "", n);
    vec![
        row("handover.blackout_p50_us", median(&blackouts), "µs", blackouts.len()).spread(quartiles(&blackouts)),
        row("handover.blackout_p99_us", quantile(&blackouts, 0.99), "µs", blackouts.len()),
        row("handover.blackout_max_us", quantile(&blackouts, 1.0), "µs", blackouts.len())
            .note(slowest.map(|report| format!("of it, ms: {}", switch_phases(report)))),
        count("handover.measured_in_kernel", in_kernel),
        count("handover.over_default_budget", slow),
        count("handover.committed", committed),
        row("handover.duration_ms", median(&durations), "ms", n)
            .spread(quartiles(&durations))
            .note(Some(format!("medians, ms: {}", phase_medians(handovers)))),
    ]
}

fn first_blackout(report: &HandoverReport) -> f64 {
    report.blackouts.first().map_or(0.0, |blackout| blackout.us)
}

fn phase_us(report: &HandoverReport, phase: Phase) -> f64 {
    report.phases.iter().filter(|timing| timing.phase == phase).map(|timing| timing.duration_us).sum()
}

fn switch_phases(report: &HandoverReport) -> String {
    let phases = [Phase::Quiesce, Phase::Delta, Phase::Promote];
    phases.map(|phase| format!("{phase} {:.2}", phase_us(report, phase) / 1e3)).join(", ")
}

/// A number for each phase, in order.
fn by_phase(of: impl Fn(Phase) -> Option<f64>) -> String {
    let shown = Phase::ALL.into_iter().filter_map(|phase| Some(format!("{phase} {:.2}", of(phase)?)));
    shown.collect::<Vec<_>>().join(", ")
}

fn phase_medians(handovers: &[Timed]) -> String {
    by_phase(|phase| median(&handovers.iter().map(|timed| phase_us(&timed.report, phase) / 1e3).collect::<Vec<_>>()))
}

/// What a client at a constant rate saw.
fn gap_rows(handovers: &[Timed], load: &LoadResult, calm: &[Span], conditions: &Conditions) -> Vec<Row> {
    let longest = |window: Span| load.longest_gap(window.start_ns, window.end_ns).longest_ns;
    let mut excess = Vec::with_capacity(handovers.len());
    let mut usual = Vec::with_capacity(handovers.len());
    let mut places = BTreeMap::<Phase, usize>::new();
    let mut in_phase = BTreeMap::<Phase, Vec<f64>>::new();
    for Timed { report, span, .. } in handovers {
        let gap = load.longest_gap(span.start_ns, span.end_ns);
        let usual_ns = gaps::usual_ns(calm, span.length_ns(), longest).unwrap_or(0);
        excess.push(gap.longest_ns.saturating_sub(usual_ns) as f64 / 1e3);
        usual.push(usual_ns as f64 / 1e3);
        let gap = Span { start_ns: gap.start_ns, end_ns: gap.start_ns + gap.longest_ns };
        if let Some(phase) = phase_of(gap, span.start_ns, &report.phases) {
            *places.entry(phase).or_default() += 1;
        }
        for timing in &report.phases {
            let ms = longest(phase_span(span.start_ns, timing)) as f64 / 1e6;
            in_phase.entry(timing.phase).or_default().push(ms);
        }
    }
    let n = handovers.len();
    let seen = places.iter().map(|(phase, count)| format!("{phase} {count}")).collect::<Vec<_>>().join(", ");
    let inside = by_phase(|phase| median(in_phase.get(&phase)?));
    vec![
        Row::new("handover.peak_gap_us", median(&excess), "µs", n, conditions)
            .spread(quartiles(&excess))
            .note(Some(format!("the longest lies in: {seen}; median of the longest inside each, ms: {inside}"))),
        Row::new("handover.peak_gap_max_us", quantile(&excess, 1.0), "µs", n, conditions),
        Row::new("handover.usual_gap_us", median(&usual), "µs", n, conditions).spread(quartiles(&usual)),
    ]
}

fn phase_span(began_ns: u64, timing: &PhaseTiming) -> Span {
    let ns = |us: f64| began_ns + (us * 1e3) as u64;
    Span { start_ns: ns(timing.start_us), end_ns: ns(timing.start_us + timing.duration_us) }
}

/// In which phase most of a gap lies.
pub(super) fn phase_of(gap: Span, began_ns: u64, phases: &[PhaseTiming]) -> Option<Phase> {
    let overlap = |timing: &PhaseTiming| gap.overlap_ns(phase_span(began_ns, timing));
    let most = phases.iter().max_by_key(|timing| overlap(timing))?;
    (overlap(most) > 0).then_some(most.phase)
}

fn client_rows(load: &LoadResult, conditions: &Conditions) -> Vec<Row> {
    let totals = load.totals;
    let row = |id: &str, value: u64, n: u64| Row::new(id, Some(value as f64), "", n as usize, conditions);
    let connections = load.connections as u64;
    vec![
        row(FAILED, totals.failed_requests, totals.completed),
        row(LOST, totals.wrong() + totals.keys_unverified, totals.writes_acknowledged),
        row(RESETS, connections_lost(&totals), connections),
        row("handover.connections_kept", load.connections_kept as u64, connections),
    ]
}

/// Those that the server ended, and those that were given up for another reason.
pub(super) fn connections_lost(totals: &Totals) -> u64 {
    (totals.resets + totals.closed_by_server).max(totals.reconnects)
}

pub(super) const FAILED: &str = "handover.failed_requests";
pub(super) const LOST: &str = "handover.lost_writes";
pub(super) const RESETS: &str = "handover.resets";

fn flatness_row(measured: &Measured) -> Option<Row> {
    let (small, large) = (measured.cells.first()?, measured.cells.last()?);
    if small.state_mib == large.state_mib {
        return None;
    }
    let ratios = round_ratios(&measured.rounds);
    let mut conditions = conditions(large.state_mib, measured.group.connections, measured.group.hogs);
    conditions.insert("beside_mib".into(), json!(small.state_mib));
    let interval =
        median_interval(&ratios).map(|[low, high]| format!("median within {low:.3} to {high:.3} with 95 % confidence"));
    Some(Row::new(FLATNESS, median(&ratios), "", ratios.len(), &conditions).spread(quartiles(&ratios)).note(interval))
}

/// Over all groups without hogs, for the one figure that the budget is about.
pub(super) fn overall_flatness(groups: &[Measured]) -> Option<Row> {
    let calm = || groups.iter().filter(|measured| measured.group.hogs == 0);
    let ratios: Vec<f64> = calm().flat_map(|measured| round_ratios(&measured.rounds)).collect();
    let [low, high] = median_interval(&ratios)?;
    let sizes = calm().find_map(|measured| Some((measured.cells.first()?.state_mib, measured.cells.last()?.state_mib)));
    let mut conditions = Conditions::new();
    let (small, large) = sizes?;
    conditions.insert("state_mib".into(), json!(large));
    conditions.insert("beside_mib".into(), json!(small));
    conditions.insert("hogs".into(), json!(0));
    let note = format!("median within {low:.3} to {high:.3} with 95 % confidence");
    Some(
        Row::new("handover.size_flatness_overall", median(&ratios), "", ratios.len(), &conditions)
            .spread(quartiles(&ratios))
            .note(Some(note)),
    )
}

/// What must not be: each is a reason for a run to fail.
pub(super) fn violations(cells: &[Cell]) -> Vec<String> {
    let mut found = Vec::new();
    for cell in cells {
        let open = cell.handovers.iter().filter(|timed| timed.report.verdict != Verdict::Committed).count();
        let mut say = |count: u64, what: &str| {
            if count > 0 {
                found.push(format!("{} MiB of state: {count} {what}", cell.state_mib));
            }
        };
        say(open as u64, "handovers did not commit");
        if let Some(load) = &cell.load {
            let totals = load.totals;
            say(totals.failed_requests, "requests failed");
            say(totals.wrong() + totals.keys_unverified, "acknowledged writes were lost, doubled or unreadable");
            say(connections_lost(&totals), "connections were reset or closed");
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use warmswap_model::PhaseOutcome;

    use super::*;

    #[test]
    fn a_gap_lies_in_the_phase_that_has_most_of_it() {
        let timing =
            |phase, start_us, duration_us| PhaseTiming { phase, start_us, duration_us, outcome: PhaseOutcome::Done };
        let phases = [timing(Phase::Warm, 0.0, 100.0), timing(Phase::Sync, 100.0, 50.0)];
        let gap = |from_us: u64, to_us: u64| Span { start_ns: 7000 + from_us * 1000, end_ns: 7000 + to_us * 1000 };
        assert_eq!(phase_of(gap(20, 90), 7000, &phases), Some(Phase::Warm));
        assert_eq!(phase_of(gap(90, 140), 7000, &phases), Some(Phase::Sync));
        assert_eq!(phase_of(gap(200, 300), 7000, &phases), None);
    }
}
