//! `warmswap-bench forecast`: the forecasts on real traces, beside the baselines.
//!
//! The network is trained on the first half of each trace, and again on what has come as the trace goes on; calibration, linear
//! models, blend and champions learn from each value as it comes, as they do at work. Nothing is known of a value before it has
//! been forecast. Every baseline is calibrated as adaptively. `docs/benchmarks.md` says how each row is measured.

pub(crate) mod data;
pub(crate) mod replay;
mod tally;

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::json;
use warmswap_forecast::{TrainConfig, seal_base, train_base};
use warmswap_model::Champion;

use crate::interrupt;
use crate::progress::Progress;
use crate::rows::{Conditions, Row};
use crate::stats::{median, quantile, quartiles};
use crate::suite::Outcome;
use replay::{Effort, Replayed, TESTED_MIN, replay};
use tally::{COMPARED, Sum, Tally};

const BASELINES: [Champion; 5] =
    [Champion::LastValue, Champion::Seasonal, Champion::Ewma, Champion::Linear, Champion::Histogram];

const QUICK: Effort = Effort {
    series_max: 6,
    steps_max: 4000,
    train: TrainConfig { seed: 1, steps_max: 100, learning_rate: 2e-3, patience_steps: 200, look_every_steps: 50 },
};
const WHOLE: Effort = Effort {
    series_max: usize::MAX,
    steps_max: u64::MAX,
    train: TrainConfig { seed: 1, steps_max: 3000, learning_rate: 2e-3, patience_steps: 1000, look_every_steps: 100 },
};

/// What is claimed.
const RATIO_MEAN: f64 = 0.9;
const RATIO_WORST: f64 = 1.0;

pub(crate) fn run(options: &data::Options) -> Result<Outcome> {
    let effort = if options.common.quick { QUICK } else { WHOLE };
    let mut outcome = Outcome::default();
    let mut by_file = Vec::new();
    for trace in options.traces()? {
        let trace = trace?;
        let replayed = replay(&trace, &effort)?;
        let (rows, ratios) = rows_of(&trace.name, trace.step_s, &replayed);
        outcome.rows.extend(rows);
        if let Some(mean) = mean(&ratios) {
            by_file.push((trace.name, mean));
        }
    }
    let all: Vec<f64> = by_file.iter().map(|(_, ratio)| *ratio).collect();
    let worst = by_file.iter().max_by(|a, b| a.1.total_cmp(&b.1));
    let each = by_file.iter().map(|(name, ratio)| format!("{name} {ratio:.3}")).collect::<Vec<_>>().join(", ");
    let none = Conditions::new();
    outcome.rows.push(
        Row::new("forecast.pinball_ratio_mean", mean(&all), "", all.len(), &none).at_most(RATIO_MEAN).note(Some(each)),
    );
    outcome.rows.push(
        Row::new("forecast.pinball_ratio_worst", worst.map(|(_, ratio)| *ratio), "", all.len(), &none)
            .at_most(RATIO_WORST)
            .note(worst.map(|(name, _)| name.clone())),
    );
    Ok(outcome)
}

/// Makes the file that outlooks begin with.
pub(crate) fn make_base(path: &Path) -> Result<()> {
    interrupt::install()?;
    let mut progress = Progress::begin("the base, on made-up loads");
    let weights = train_base(&mut |at| {
        let loss = at.held_out_loss.map_or_else(String::new, |loss| format!(", held-out loss {loss:.4}"));
        progress.at(format_args!("training step {} of {}{loss}", at.step, at.steps_max));
        if interrupt::check().is_err() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    let (before, after) = (weights.validation.loss_before, weights.validation.loss);
    println!("held-out loss {after:.4}, untrained {before:.4}, after {} steps", weights.steps);
    std::fs::write(path, seal_base(&weights)).with_context(|| format!("cannot write {}", path.display()))
}

fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// The rows of one trace, and its pinball ratios.
fn rows_of(file: &str, step_s: u64, replayed: &Replayed) -> (Vec<Row>, Vec<f64>) {
    let columns: BTreeSet<&str> = replayed.series.iter().map(|series| series.column.as_str()).collect();
    let (mut rows, mut ratios) = (Vec::new(), Vec::new());
    for column in columns {
        for (at, steps) in replayed.config.horizons.iter().enumerate() {
            let mut conditions = Conditions::new();
            conditions.insert("file".into(), json!(file));
            conditions.insert("column".into(), json!(column));
            conditions.insert("horizon_s".into(), json!(step_s * *steps as u64));
            let of = replayed.series.iter().filter(|series| series.column == column);
            let tested: Vec<(f64, &Tally)> = of
                .map(|series| (series.naive_error, &series.tallies[at]))
                .filter(|(_, tally)| tally.served.count >= TESTED_MIN)
                .collect();
            let note = match &replayed.training {
                Ok((steps, loss)) => format!("trained {steps} steps, held-out loss {loss:.3} of untrained"),
                Err(error) => format!("no LSTM: {error}"),
            };
            rows.extend(compared(&tested, &conditions, &note, &mut ratios));
        }
    }
    (rows, ratios)
}

fn compared(tested: &[(f64, &Tally)], conditions: &Conditions, note: &str, ratios: &mut Vec<f64>) -> Vec<Row> {
    let mut rows = Vec::new();
    for (level, name) in COMPARED {
        let id = format!("forecast.pinball_ratio_{name}");
        let mine = relative(tested, level, |tally| Some(&tally.served));
        let baseline = |who: Champion| Some((who, relative(tested, level, |tally| tally.of(who, 0))?));
        let best = BASELINES.iter().filter_map(|who| baseline(*who)).min_by(|a, b| a.1.total_cmp(&b.1));
        let (Some(mine), Some((who, theirs))) = (mine, best) else {
            let reason = format!("no series has {TESTED_MIN} values after the split that the last value misses");
            rows.push(Row::unmeasured(&id, "", &reason, conditions));
            continue;
        };
        ratios.push(mine / theirs);
        let part = |label: &str, who: Champion, form: usize| {
            let value = relative(tested, level, |tally| tally.of(who, form))?;
            Some(format!("{label} {:.3}", value / theirs))
        };
        let parts = [
            part("lstm", Champion::Lstm, 0),
            part("with its widths", Champion::Lstm, 1),
            part("uncalibrated", Champion::Lstm, 2),
            part("blend", Champion::Blend, 0),
        ];
        let parts = parts.into_iter().flatten().collect::<Vec<_>>().join(", ");
        let row = Row::new(&id, Some(mine / theirs), "", tested.len(), conditions);
        rows.push(row.beside(who.name(), None, None).note(Some(format!("{parts}; {note}"))));
    }
    let values = |of: &dyn Fn(f64, &Tally) -> Option<f64>| {
        tested.iter().filter_map(|(naive, tally)| of(*naive, tally)).collect::<Vec<f64>>()
    };
    let mase = |sum: Option<&Sum>, naive: f64| Some(sum?.error()? / naive).filter(|value| value.is_finite());
    let ours = values(&|naive, tally| mase(Some(&tally.served), naive));
    let best = BASELINES
        .iter()
        .filter_map(|who| Some((who, median(&values(&|naive, tally| mase(tally.of(*who, 0), naive)))?)))
        .min_by(|a, b| a.1.total_cmp(&b.1));
    let row = Row::new("forecast.mase_median", median(&ours), "", ours.len(), conditions).spread(quartiles(&ours));
    rows.push(match best {
        Some((who, value)) => row.beside(who.name(), Some(value), median(&ours).map(|ours| ours / value)),
        None => row,
    });
    let covered = values(&|_, tally| tally.served.coverage());
    let served: Vec<String> = BASELINES
        .iter()
        .chain(&[Champion::Lstm, Champion::Blend])
        .filter_map(|who| {
            let share = mean(&values(&|_, tally| Some(tally.served_by(*who))))?;
            (share >= 0.01).then(|| format!("{} {:.0} %", who.name(), 100.0 * share))
        })
        .collect();
    let spread = quantile(&covered, 0.1).zip(quantile(&covered, 0.9)).map(|(low, high)| [low, high]);
    rows.push(
        Row::new("forecast.coverage90", median(&covered), "", covered.len(), conditions)
            .spread(spread)
            .note(Some(format!("spread: 10th to 90th percentile of series; served by {}", served.join(", ")))),
    );
    let widths = |who: Champion| {
        let ratio = |tally: &Tally| Some(tally.served.width()? / tally.of(who, 0)?.width()?);
        values(&|_, tally| ratio(tally).filter(|ratio| ratio.is_finite()))
    };
    let narrowest = BASELINES
        .iter()
        .filter_map(|who| Some((who, median(&widths(*who))?, widths(*who).len())))
        .max_by(|a, b| a.1.total_cmp(&b.1));
    if let Some((who, ratio, n)) = narrowest {
        let row = Row::new("forecast.width_ratio", Some(ratio), "", n, conditions);
        rows.push(row.spread(quartiles(&widths(*who))).beside(who.name(), None, None));
    }
    rows
}

/// Mean over series of a loss, each in units of the last value's loss on the same series: no series counts for more because its
/// numbers are large. Series on which the last value is never wrong have no such unit.
fn relative<'a>(tested: &[(f64, &'a Tally)], level: usize, of: impl Fn(&'a Tally) -> Option<&'a Sum>) -> Option<f64> {
    let mut sum = (0.0, 0.0);
    for (_, tally) in tested {
        let unit = tally.of(Champion::LastValue, 0)?.loss(level)?;
        if unit > 0.0 {
            // Whoever has nothing to say, as of a day ago on the first day, says the last value.
            let loss = of(tally).or_else(|| tally.of(Champion::LastValue, 0))?.loss(level)?;
            sum = (sum.0 + loss / unit, sum.1 + 1.0);
        }
    }
    (sum.1 > 0.0).then(|| sum.0 / sum.1)
}
