//! One trace, from its first step to its last: what comes before the split is learned from, what comes after is forecast.

use std::collections::BTreeSet;
use std::ops::ControlFlow;

use anyhow::Result;
use warmswap_forecast::{
    HORIZONS, History, ModelWeights, Outlook, OutlookConfig, SeriesId, TrainConfig, TrainError, train_outlook,
};

use super::data::{Series, Trace};
use super::tally::Tally;
use crate::interrupt;
use crate::progress::Progress;

/// Shares of a trace's time at which the network is trained on what was until then, as an agent does again and again, and from
/// which forecasts count. What lies between the first two lets the calibration begin on values that were not trained on.
const TRAIN_AT: [f64; 5] = [0.5, 0.6, 0.7, 0.8, 0.9];
const TEST_FROM: f64 = 0.6;
/// Values after the split that say something.
pub(super) const TESTED_MIN: u64 = 100;

/// How much is done.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Effort {
    /// Series of each column, evenly chosen.
    pub(crate) series_max: usize,
    /// Newest steps of each series.
    pub(crate) steps_max: u64,
    pub(crate) train: TrainConfig,
}

/// What became of one series.
#[derive(Debug, Clone)]
pub(super) struct Outcome {
    pub(super) column: String,
    /// Mean change from one step to the next before the split: what MASE is measured in.
    pub(super) naive_error: f64,
    pub(super) tallies: [Tally; HORIZONS],
}

pub(super) struct Replayed {
    pub(super) config: OutlookConfig,
    pub(super) series: Vec<Outcome>,
    /// Optimiser steps and held-out loss, or why there is no network.
    pub(super) training: std::result::Result<(u64, f64), TrainError>,
}

pub(super) fn replay(trace: &Trace, effort: &Effort) -> Result<Replayed> {
    let mut tallies: Vec<[Tally; HORIZONS]> = Vec::new();
    let walked = walk(trace, effort, &mut |after| {
        if tallies.len() <= after.series {
            tallies.resize_with(after.series + 1, Default::default);
        }
        if after.step >= after.test_from {
            for scored in after.outlook.scored(after.id) {
                tallies[after.series][scored.horizon].add(&scored);
            }
        }
    })?;
    tallies.resize_with(walked.chosen.len(), Default::default);
    let series = walked
        .chosen
        .iter()
        .zip(tallies)
        .map(|(series, tallies)| Outcome {
            column: series.column.clone(),
            naive_error: naive_error(series, walked.test_from),
            tallies,
        })
        .collect();
    Ok(Replayed { config: walked.config, series, training: walked.training })
}

/// An outlook after it has seen one value of one series.
pub(crate) struct After<'a> {
    pub(crate) outlook: &'a Outlook,
    pub(crate) id: SeriesId,
    /// Place in [`Walked::chosen`].
    pub(crate) series: usize,
    pub(crate) step: u64,
    pub(crate) value: f64,
    pub(crate) test_from: u64,
}

/// What was walked through.
pub(crate) struct Walked {
    pub(crate) config: OutlookConfig,
    pub(crate) chosen: Vec<Series>,
    /// First step that counts.
    pub(crate) test_from: u64,
    /// Optimiser steps and held-out loss, or why there is no network.
    pub(crate) training: std::result::Result<(u64, f64), TrainError>,
}

/// Shows a trace to an outlook, step by step, and has the network trained on the way.
pub(crate) fn walk(trace: &Trace, effort: &Effort, look: &mut dyn FnMut(&After<'_>)) -> Result<Walked> {
    let chosen = choose(&trace.series, effort);
    let step_ms = trace.step_s * 1000;
    let config = OutlookConfig::every(step_ms);
    let first = chosen.iter().filter_map(|s| s.values.first()).map(|(at, _)| *at).min().unwrap_or(0);
    let last = chosen.iter().filter_map(|s| s.values.last()).map(|(at, _)| *at).max().unwrap_or(0);
    let at_share = |share: f64| first + ((last - first) as f64 * share) as u64;
    let (train_at, test_from) = (TRAIN_AT.map(at_share), at_share(TEST_FROM));

    let mut outlook = Outlook::new(config.clone());
    let ids: Vec<_> = chosen.iter().map(|s| outlook.open(&format!("{}/{}", s.entity, s.column))).collect();
    let mut next = vec![0; chosen.len()];
    let (mut values, mut present) = (Vec::with_capacity(chosen.len()), Vec::with_capacity(chosen.len()));
    let mut training = Err(TrainError::Interrupted);
    let what = format!("{}: {} series of {} s steps", trace.name, chosen.len(), trace.step_s);
    let mut progress = Progress::begin(&what);
    for step in first..=last {
        if train_at.contains(&step) {
            let start = outlook.weights().cloned();
            training = train(&chosen, step, step_ms, &config, &effort.train, start.as_ref(), &mut progress).and_then(
                |weights| {
                    let came_to = (weights.steps, weights.validation.loss / weights.validation.loss_before);
                    outlook.install(weights).map_err(|_| TrainError::Diverged)?;
                    Ok(came_to)
                },
            );
        }
        values.clear();
        present.clear();
        for (at, (series, next)) in chosen.iter().zip(&mut next).enumerate() {
            if let Some((_, value)) = series.values.get(*next).filter(|(number, _)| *number == step) {
                values.push((ids[at], *value));
                present.push(at);
                *next += 1;
            }
        }
        outlook.observe(step * step_ms, &values);
        for (series, (id, value)) in present.iter().zip(&values) {
            look(&After { outlook: &outlook, id: *id, series: *series, step, value: *value, test_from });
        }
        if step % 64 == 0 {
            interrupt::check()?;
            progress.at(format_args!("step {} of {}", step - first, last - first));
        }
    }
    Ok(Walked { config, chosen, test_from, training })
}

/// What the effort allows, with the newest steps.
fn choose(series: &[Series], effort: &Effort) -> Vec<Series> {
    let columns: BTreeSet<&str> = series.iter().map(|s| s.column.as_str()).collect();
    let newest = series.iter().filter_map(|s| s.values.last()).map(|(at, _)| *at).max().unwrap_or(0);
    let from = newest.saturating_sub(effort.steps_max);
    let mut chosen = Vec::new();
    for column in columns {
        let of: Vec<&Series> = series.iter().filter(|s| s.column == column).collect();
        let stride = of.len().div_ceil(effort.series_max).max(1);
        for one in of.into_iter().step_by(stride) {
            let values: Vec<_> = one.values.iter().filter(|(at, _)| *at >= from).copied().collect();
            if !values.is_empty() {
                chosen.push(Series { values, ..one.clone() });
            }
        }
    }
    chosen
}

fn train(
    chosen: &[Series],
    until: u64,
    step_ms: u64,
    config: &OutlookConfig,
    effort: &TrainConfig,
    start: Option<&ModelWeights>,
    progress: &mut Progress,
) -> std::result::Result<ModelWeights, TrainError> {
    let past = |series: &Series| -> History {
        series.values.iter().take_while(|(at, _)| *at < until).map(|(at, value)| (at * step_ms, *value)).collect()
    };
    let histories: Vec<History> = chosen.iter().map(past).collect();
    train_outlook(&histories, config, effort, start, &mut |at| {
        let loss = at.held_out_loss.map_or_else(String::new, |loss| format!(", held-out loss {loss:.4}"));
        progress.at(format_args!("training step {} of {}{loss}", at.step, at.steps_max));
        if interrupt::check().is_err() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
}

fn naive_error(series: &Series, until: u64) -> f64 {
    let past: Vec<_> = series.values.iter().take_while(|(at, _)| *at < until).collect();
    let changes = past.windows(2).filter(|pair| pair[1].0 == pair[0].0 + 1).map(|pair| (pair[1].1 - pair[0].1).abs());
    let (sum, count) = changes.fold((0.0, 0.0), |(sum, count), change| (sum + change, count + 1.0));
    if count > 0.0 { sum / count } else { 0.0 }
}
