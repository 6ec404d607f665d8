//! `warmswap-bench tuner`: how much to reserve, on real traces.
//!
//! Every 15 minutes of a trace (every third step where steps are not that short) each policy says how much it reserves until the
//! next time, knowing what came before. What was needed is the highest value until then. A *violation* is a need above the
//! reservation; *slack* is what was reserved and not needed, in mean needs of the series. Forecasts and policies learn as the trace
//! goes; what comes after the split counts. `docs/benchmarks.md` says how each row is measured.

mod policies;

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use serde_json::json;
use warmswap_forecast::TrainConfig;
use warmswap_model::{Quantiles, Resource};

use crate::forecast::data;
use crate::forecast::replay::{Effort, walk};
use crate::interrupt;
use crate::progress::Progress;
use crate::rows::{Conditions, Row};
use crate::stats::{median, quartiles};
use crate::suite::Outcome;
use policies::{Constant, Known, Ours, PERCENT_MAX, PERCENT_MIN, Pid, Policy, Vpa};

const TRAIN: TrainConfig =
    TrainConfig { seed: 1, steps_max: 100, learning_rate: 1e-3, patience_steps: 100, look_every_steps: 50 };
const QUICK: Effort = Effort { series_max: 4, steps_max: 4000, train: TRAIN };
const WHOLE: Effort = Effort { series_max: 24, steps_max: 30_000, train: TRAIN };

/// Seeds of the tuner's exploration.
const SEEDS: u64 = 5;
/// Prices of a shortfall: what our curve of slack over violations is drawn with. The tuner's own are among them.
const PRICES: [f64; 15] = [0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 1024.0, 16_384.0];
/// Set-points of the controller: shares above the need.
const ABOVE: [f64; 11] = [0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0, 3.0, 5.0];
/// Percentages of the constants, among which the best one is looked for in hindsight.
const GRID: usize = 25;
const VPA: &str = "p90 of a histogram × 1.15";
const SLACK_VS_VPA: f64 = 0.5;
const SLACK_VS_PID: f64 = 1.0;
const WEEK_S: u64 = 604_800;
/// Decisions that say something.
const DECISIONS_MIN: usize = 50;

pub(crate) fn run(options: &data::Options) -> Result<Outcome> {
    let effort = if options.common.quick { QUICK } else { WHOLE };
    let mut outcome = Outcome::default();
    for trace in options.traces()? {
        outcome.rows.extend(rows_of(&trace?, &effort)?);
    }
    Ok(outcome)
}

/// One step of a series, and what was forecast then for an interval.
#[derive(Debug, Clone, Copy)]
struct Seen {
    step: u64,
    value: f64,
    forecast: Quantiles,
}

/// One decision: what is known, what was needed, and whether it counts.
struct Decision {
    step: u64,
    forecast: Quantiles,
    since: Vec<f64>,
    need: f64,
    counts: bool,
}

struct Lane {
    column: String,
    decisions: Vec<Decision>,
    /// Of the decisions that count; slack is measured in it.
    mean_need: f64,
}

/// What a policy came to over all series of a column.
#[derive(Debug, Clone, Copy, Default)]
struct Came {
    violations: f64,
    slack: f64,
    cost: f64,
    worst_week: f64,
}

fn rows_of(trace: &data::Trace, effort: &Effort) -> Result<Vec<Row>> {
    let mut seen: Vec<Vec<Seen>> = Vec::new();
    let walked = walk(trace, effort, &mut |after| {
        if seen.len() <= after.series {
            seen.resize_with(after.series + 1, Vec::new);
        }
        // What is needed is the highest value of the interval: at each level the higher of the two forecasts within it.
        let forecast = after.outlook.bands(after.id).map(|[(near, _), (end, _), ..]| {
            let (near, end) = (near.to_levels(), end.to_levels());
            Quantiles::from_levels(std::array::from_fn(|level| near[level].max(end[level])))
        });
        let forecast = forecast.unwrap_or_default();
        seen[after.series].push(Seen { step: after.step, value: after.value, forecast });
    })?;
    seen.resize_with(walked.chosen.len(), Vec::new);
    let interval = walked.config.horizons[1];
    let lanes: Vec<Lane> = walked
        .chosen
        .iter()
        .zip(&seen)
        .map(|(series, seen)| Lane::new(&series.column, seen, interval, walked.test_from))
        .filter(|lane| lane.mean_need > 0.0)
        .collect();
    let columns: BTreeSet<&str> = lanes.iter().map(|lane| lane.column.as_str()).collect();
    let mut progress = Progress::begin(format!("{}: policies over {} series", trace.name, lanes.len()));
    let mut rows = Vec::new();
    for column in columns {
        let lanes: Vec<&Lane> = lanes.iter().filter(|lane| lane.column == column).collect();
        let mut conditions = Conditions::new();
        conditions.insert("file".into(), json!(trace.name));
        conditions.insert("column".into(), json!(column));
        conditions.insert("interval_s".into(), json!(trace.step_s * interval as u64));
        rows.extend(compare(&lanes, trace.step_s, &conditions, &mut progress)?);
    }
    Ok(rows)
}

impl Lane {
    fn new(column: &str, seen: &[Seen], interval: usize, test_from: u64) -> Self {
        let mut decisions: Vec<Decision> = Vec::new();
        let (mut at, mut from) = (0, 0);
        while at + interval < seen.len() {
            let Seen { step, forecast, .. } = seen[at];
            // Where a step is missing it is not known what was needed.
            if seen[at + interval].step != step + interval as u64 {
                at += 1;
                continue;
            }
            let values = |range: std::ops::RangeInclusive<usize>| seen[range].iter().map(|seen| seen.value);
            let need = values(at + 1..=at + interval).fold(0.0, f64::max);
            decisions.push(Decision {
                step,
                forecast,
                since: values(from..=at).collect(),
                need,
                counts: step >= test_from,
            });
            (from, at) = (at + 1, at + interval);
        }
        let counted: Vec<f64> = decisions.iter().filter(|one| one.counts).map(|one| one.need).collect();
        let enough = counted.len() >= DECISIONS_MIN;
        let mean_need = if enough { counted.iter().sum::<f64>() / counted.len() as f64 } else { 0.0 };
        Self { column: column.to_owned(), decisions, mean_need }
    }
}

/// Runs one policy per series. `price` is that of a shortfall, for the cost.
fn play(lanes: &[&Lane], step_s: u64, price: f64, mut make: impl FnMut() -> Box<dyn Policy>) -> Result<Came> {
    interrupt::check()?;
    let mut came = Came::default();
    let (mut count, mut weeks) = (0.0, BTreeMap::<u64, (f64, f64)>::new());
    let counted = || lanes.iter().flat_map(|lane| &lane.decisions).filter(|one| one.counts).map(|one| one.step);
    let (first, last) = (counted().min().unwrap_or(0), counted().max().unwrap_or(0));
    // A week, or a seventh of what is shorter than two.
    let week = if (last - first) * step_s >= 2 * WEEK_S { WEEK_S / step_s } else { (last - first) / 7 + 1 };
    for lane in lanes {
        let mut policy = make();
        for one in &lane.decisions {
            let reserved = policy.reserve(&Known { forecast: one.forecast, since: &one.since });
            policy.learn(one.need);
            if !one.counts {
                continue;
            }
            count += 1.0;
            let short = one.need > reserved;
            let week = weeks.entry((one.step - first) / week).or_default();
            (week.0, week.1) = (week.0 + f64::from(u8::from(short)), week.1 + 1.0);
            came.violations += f64::from(u8::from(short));
            came.slack += (reserved - one.need).max(0.0) / lane.mean_need;
            came.cost += if short {
                price + ((one.need - reserved) / reserved).min(1.0)
            } else {
                (reserved - one.need) / lane.mean_need
            };
        }
    }
    came.violations /= count;
    came.slack /= count;
    came.cost /= count;
    // A week of which little is there says little.
    let whole = weeks.values().filter(|(_, decisions)| *decisions >= DECISIONS_MIN as f64);
    came.worst_week = whole.map(|(short, decisions)| short / decisions).fold(0.0, f64::max);
    Ok(came)
}

fn compare(lanes: &[&Lane], step_s: u64, conditions: &Conditions, progress: &mut Progress) -> Result<Vec<Row>> {
    let n = lanes.iter().flat_map(|lane| &lane.decisions).filter(|one| one.counts).count();
    let resource = resource_of(&lanes[0].column);
    let usual = Ours::usual_price(resource);
    let steps_of_a_day = 86_400.0 / step_s as f64;
    let vpa = play(lanes, step_s, usual, || Box::new(Vpa::new(steps_of_a_day)))?;
    let mut pids = Vec::new();
    for gains in Pid::GAINS {
        for above in ABOVE {
            pids.push(play(lanes, step_s, usual, || Box::new(Pid::new(gains, above)))?);
        }
        progress.at(format_args!("the controller with the gains {gains:?}"));
    }
    let percent = |at: usize| PERCENT_MIN * (PERCENT_MAX / PERCENT_MIN).powf(at as f64 / (GRID - 1) as f64);
    // Each series has its own best constant.
    let mut best = 0.0;
    for lane in lanes {
        let mut of_lane = f64::INFINITY;
        for at in 0..GRID {
            of_lane = of_lane.min(play(&[*lane], step_s, usual, || Box::new(Constant(percent(at))))?.cost);
        }
        best += of_lane * lane.decisions.iter().filter(|one| one.counts).count() as f64 / n as f64;
    }
    let (mut vs_vpa, mut vs_pid, mut regret, mut worst) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut curve_said = String::new();
    let mut met = (0, 0);
    for seed in 0..SEEDS {
        let (mut curve, mut weeks) = (Vec::new(), Vec::new());
        for price in PRICES {
            let mut lane = 0u64;
            let came = play(lanes, step_s, usual, || {
                lane += 1;
                Box::new(Ours::new(resource, price, seed * 1_000_003 + lane))
            })?;
            progress.at(format_args!("the tuner, seed {seed}, price {price}"));
            if price == usual {
                regret.push(came.cost / best - 1.0);
            }
            curve.push((came.violations, came.slack));
            weeks.push((came.violations, came.worst_week));
        }
        worst.extend(between(&weeks, vpa.violations));
        vs_vpa.extend(between(&curve, vpa.violations).map(|slack| slack / vpa.slack));
        // The controller at whatever set-point and gains, wherever both curves are known: the median of these points.
        let settings = front(&pids);
        let ratio = |pid: &Came| Some(between(&curve, pid.violations)? / pid.slack).filter(|ratio| ratio.is_finite());
        let against: Vec<f64> = settings.iter().filter_map(ratio).collect();
        met = (met.0 + against.len(), met.1 + settings.len());
        vs_pid.extend(median(&against));
        let ends = |curve: &[(f64, f64)]| (curve.first().copied(), curve.last().copied());
        if let (Some(first), Some(last)) = ends(&curve) {
            curve_said = format!(
                "ours from {:.1} % violations at slack {:.3} to {:.2} % at {:.3}",
                100.0 * first.0,
                first.1,
                100.0 * last.0,
                last.1
            );
        }
    }
    let row = |id: &str, values: &[f64]| Row::new(id, median(values), "", n, conditions).spread(quartiles(values));
    let vs = |id: &str, values: &[f64], peer: &str, target: f64| {
        if values.is_empty() {
            return Row::left_out(id, "", peer, &format!("the curves do not meet: {curve_said}"), conditions);
        }
        row(id, values).beside(peer, None, None).at_most(target)
    };
    let said = format!(
        "it has {:.1} % violations at slack {:.3}; {} of {SEEDS} seeds compared; {curve_said}",
        100.0 * vpa.violations,
        vpa.slack,
        vs_vpa.len()
    );
    let met = format!("{} of {} settings of all seeds compared", met.0, met.1);
    let weeks = if worst.is_empty() {
        Row::left_out(
            "tuner.worst_week_violations",
            "",
            VPA,
            &format!("the curves do not meet: {curve_said}"),
            conditions,
        )
    } else {
        row("tuner.worst_week_violations", &worst).beside(VPA, Some(vpa.worst_week), None)
    };
    Ok(vec![
        vs("tuner.slack_vs_vpa", &vs_vpa, VPA, SLACK_VS_VPA).note(Some(said)),
        vs("tuner.slack_vs_pid", &vs_pid, "PID, best gains in hindsight", SLACK_VS_PID).note(Some(met)),
        row("tuner.regret", &regret).beside("best constant of each series in hindsight", None, None),
        weeks,
    ])
}

fn resource_of(column: &str) -> Resource {
    match column {
        _ if column.starts_with("mem") => Resource::Memory,
        _ if column.starts_with("net") => Resource::Network,
        _ if column.starts_with("disk") => Resource::Disk,
        _ => Resource::Cpu,
    }
}

/// What a policy comes to at a share of violations, between the settings that are known; on a logarithmic axis, because a tenth of the
/// violations costs about as much everywhere. `None` beyond the ends.
fn between(curve: &[(f64, f64)], violations: f64) -> Option<f64> {
    if violations == 0.0 {
        let never = curve.iter().filter(|(share, _)| *share == 0.0).map(|(_, slack)| *slack);
        return never.min_by(f64::total_cmp);
    }
    let mut curve: Vec<(f64, f64)> = curve.iter().filter(|(share, _)| *share > 0.0).copied().collect();
    curve.sort_by(|a, b| a.0.total_cmp(&b.0));
    let pair = curve.windows(2).find(|pair| pair[0].0 <= violations && violations <= pair[1].0)?;
    let [(low, at_low), (high, at_high)] = [pair[0], pair[1]];
    let share = if high > low { (violations / low).ln() / (high / low).ln() } else { 0.5 };
    Some(at_low + share * (at_high - at_low))
}

/// Settings that no other one beats in both.
fn front(all: &[Came]) -> Vec<Came> {
    let beaten = |one: &Came| all.iter().any(|other| other.violations <= one.violations && other.slack < one.slack);
    all.iter().filter(|one| !beaten(one) && one.violations > 0.0).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slack_is_read_between_settings_and_not_beyond() {
        let curve = [(0.1, 1.0), (0.01, 2.0), (0.001, 3.0)];
        let close = |at: f64, slack: f64| between(&curve, at).is_some_and(|found| (found - slack).abs() < 1e-9);
        assert!(close(0.1, 1.0) && close(0.01, 2.0) && close(0.1f64.sqrt() * 0.1, 1.5));
        assert!(between(&curve, 0.0).is_none() && between(&[(0.0, 4.0), (0.0, 3.0)], 0.0) == Some(3.0));
        assert!(between(&curve, 0.2).is_none() && between(&curve, 0.0001).is_none());
    }

    #[test]
    fn a_decision_knows_the_past_and_its_need_is_the_highest_until_the_next() {
        let seen = |step: u64| Seen { step, value: step as f64, forecast: Quantiles::default() };
        let seen: Vec<Seen> = (0..200).filter(|step| *step != 100).map(seen).collect();
        let lane = Lane::new("c", &seen, 3, 0);
        let [first, second, ..] = lane.decisions.as_slice() else { panic!("too few") };
        assert_eq!((first.step, first.need, &first.since[..]), (0, 3.0, &[0.0][..]));
        assert_eq!((second.step, second.need, &second.since[..]), (3, 6.0, &[1.0, 2.0, 3.0][..]));
        assert!(lane.decisions.iter().all(|one| !(one.step < 100 && one.step + 3 > 100)), "a need with a hole");
    }
}
