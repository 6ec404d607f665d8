//! Training data of an outlook.

use std::ops::ControlFlow;

use super::series::OutlookSeries;
use super::{HORIZONS, OutlookConfig};
use crate::lstm::ModelWeights;
use crate::profile::Sample;
use crate::train::{Prepared, Progress, TrainConfig, TrainError, train_on};

/// Steps before targets are used: scales and the linear models are not settled.
const SETTLE: usize = 288;

/// One series, oldest first: Unix ms at which each step ended, and its value.
pub type History = Vec<(u64, f64)>;

/// Trains one network for all series of an outlook, from `start` when given, and returns the weights that were best on the
/// newest part of each series, which is not trained on. As [`crate::train`] otherwise.
pub fn train_outlook(
    histories: &[History],
    outlook: &OutlookConfig,
    config: &TrainConfig,
    start: Option<&ModelWeights>,
    keep_going: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<ModelWeights, TrainError> {
    let prepared: Vec<Prepared> = histories.iter().filter_map(|history| prepare(history, outlook)).collect();
    train_on(&prepared, config, start, keep_going)
}

/// Replays the values through the same code that runs at inference.
pub(super) fn prepare(history: &History, config: &OutlookConfig) -> Option<Prepared> {
    let mut series = OutlookSeries::new(config);
    let mut samples = Vec::with_capacity(history.len());
    // When each sample was taken, in steps; its value; and where its targets are measured from.
    let mut taken = Vec::with_capacity(history.len());
    for (unix_ms, value) in history {
        if series.begin(*unix_ms, *value, config) {
            samples.push(Sample { inputs: series.inputs, targets: None });
            taken.push((config.step_number(*unix_ms), series.last_value(), series.origin()));
            series.finish(None, config);
        }
    }
    for at in SETTLE.min(samples.len())..samples.len() {
        let (step, _, origin) = taken[at];
        let target = |horizon: usize| {
            let ahead = config.horizons[horizon];
            // Where nothing is missing it is so many samples later.
            let (then, value, _) = taken.get(at + ahead)?;
            let (from, scale) = origin[horizon];
            (*then == step + ahead as u64).then_some(((value - from) / scale) as f32)
        };
        let targets: [Option<f32>; HORIZONS] = std::array::from_fn(target);
        if let [Some(a), Some(b), Some(c), Some(d)] = targets {
            samples[at].targets = Some([a, b, c, d]);
        }
    }
    Prepared::from_samples(samples, history.last().map_or(0, |(unix_ms, _)| *unix_ms))
}
