//! Training the LSTM with burn: truncated backpropagation through time with carried state, pinball loss, Adam.
//!
//! Each row of a batch walks through one slice of history; at the end of a slice, or after [`WALK_MAX`] steps, it
//! jumps to a random place of a random slice with an empty state. The state is carried between chunks as it is at
//! inference, so the network is trained for what it will be used for. The newest fifth of each slice is never
//! trained on: the weights with the lowest loss there are kept.
//!
//! No clock and no thread here: the caller's `keep_going` is asked after every step and decides how long it lasts.

use std::ops::ControlFlow;

use burn::module::{Module, Param};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::activation::{relu, sigmoid};
use burn::tensor::{Device, Tensor, TensorData};
use warmswap_model::{FeatureWindow, Quantiles};

use crate::ForecastConfig;
use crate::calibrate::LEVELS;
use crate::lstm::{Batch, GATES, HIDDEN, INPUTS, ModelWeights, Network, OUTPUTS, ROW, TARGETS, Validation, quantiles};
use crate::profile::{Profile, Sample};
use crate::random::Random;

/// Steps of one chunk of backpropagation.
const CHUNK: usize = 32;
/// Rows of a batch.
const ROWS: usize = 32;
/// Steps after a jump that are not counted: the state is not filled yet.
const WARM_UP: usize = 8;
/// Steps a row walks before it jumps.
const WALK_MAX: usize = 512;
/// Share of a slice that is held out.
const HELD_OUT: f64 = 0.2;
/// What is kept is a mean of the weights of the last few hundred steps: single steps follow the noise of their chunk.
const MEAN_SHARE: f32 = 0.003;
/// Weights that nothing needs fade.
const WEIGHT_DECAY: f32 = 0.05;
/// Samples needed to train at all.
pub(crate) const SAMPLES_MIN: usize = 90;
/// Targets beyond this many scales count as this many.
const TARGET_MAX: f32 = 20.0;

/// How to train.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainConfig {
    pub seed: u64,
    /// Optimiser steps at most; about 10 ms each.
    pub steps_max: usize,
    pub learning_rate: f64,
    /// Stop when the held-out loss has not improved for this many steps.
    pub patience_steps: usize,
    /// Steps between two looks at the held-out part.
    pub look_every_steps: usize,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self { seed: 1, steps_max: 600, learning_rate: 4e-3, patience_steps: 200, look_every_steps: 20 }
    }
}

/// How far training is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    pub step: usize,
    pub steps_max: usize,
    /// Pinball loss on the held-out part, in units of the last value's typical error; `None` before the first look.
    pub held_out_loss: Option<f64>,
}

/// Why there are no weights.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TrainError {
    #[error("cannot train on {have} samples: at least {need} are needed, wait for more history")]
    TooLittleHistory { have: usize, need: usize },
    #[error("training was interrupted before its first result")]
    Interrupted,
    #[error("training diverged: the loss is not a number; the weights before it stay")]
    Diverged,
}

/// One stretch of history of one service, oldest first.
pub type HistorySlice = Vec<FeatureWindow>;

/// Trains on slices of history, from `start` when given, and returns the weights that were best on the held-out part.
///
/// `keep_going` is called after every step; on [`ControlFlow::Break`] the best weights so far are returned. The same
/// arguments give the same weights.
pub fn train(
    slices: &[HistorySlice],
    forecast: &ForecastConfig,
    config: &TrainConfig,
    start: Option<&ModelWeights>,
    keep_going: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<ModelWeights, TrainError> {
    let forecast = forecast.clone().sane();
    let slices: Vec<Prepared> = slices.iter().filter_map(|slice| Prepared::new(slice, &forecast)).collect();
    train_on(&slices, config, start, keep_going)
}

pub(crate) fn train_on(
    slices: &[Prepared],
    config: &TrainConfig,
    start: Option<&ModelWeights>,
    keep_going: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<ModelWeights, TrainError> {
    let have = slices.iter().map(|slice| slice.samples.len()).sum();
    if have < SAMPLES_MIN {
        return Err(TrainError::TooLittleHistory { have, need: SAMPLES_MIN });
    }
    let until = slices.iter().map(|slice| slice.until_unix_ms).max().unwrap_or(0);
    let mut random = Random::new(config.seed);
    let start = match start {
        Some(weights) if weights.check().is_ok() => weights.clone(),
        _ => ModelWeights::untrained(until ^ config.seed.rotate_left(32), || random.signed()),
    };

    let device = Device::flex().autodiff();
    let mut model = Lstm::new(&start, &device);
    let mut optimizer = AdamWConfig::new()
        .with_weight_decay(WEIGHT_DECAY)
        .with_grad_clipping(Some(burn::grad_clipping::GradientClippingConfig::Norm(1.0)))
        .init();
    let mut walkers = Walkers::new(slices, &mut random);
    let loss_before = held_out_loss(&start, slices);
    let samples = slices.iter().map(|slice| (slice.samples.len() - slice.train_len) as u64).sum();
    let mut best = start.clone();
    let mut mean = start.clone();
    let mut best_loss = loss_before;
    let mut best_step = None;
    let mut last_look = None;
    for step in 1..=config.steps_max {
        let chunk = walkers.chunk(slices, &mut random);
        let (loss, hidden, cell) = model.loss(&chunk, &device);
        walkers.keep_state(hidden, cell);
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        // Cosine from the full rate to a twentieth of it.
        let share = step as f64 / config.steps_max as f64;
        let rate = config.learning_rate * (0.05 + 0.95 * 0.5 * (1.0 + (std::f64::consts::PI * share).cos()));
        model = optimizer.step(rate, model, grads);

        mean.follow(&model.weights(&start, step as u64, until), MEAN_SHARE.max(1.0 / step as f32));
        let looks = step % config.look_every_steps.max(1) == 0 || step == config.steps_max;
        if looks {
            let weights = mean.clone();
            let loss = held_out_loss(&weights, slices);
            if !loss.is_finite() || weights.check().is_err() {
                return if best_step.is_some() { Ok(best) } else { Err(TrainError::Diverged) };
            }
            last_look = Some(loss);
            if loss < best_loss || best_step.is_none() && loss <= loss_before {
                best_loss = loss;
                best = weights;
                best_step = Some(step);
            }
        }
        let progress = Progress { step, steps_max: config.steps_max, held_out_loss: last_look };
        let out_of_patience = looks && step > best_step.unwrap_or(0) + config.patience_steps;
        if keep_going(progress).is_break() || out_of_patience {
            if last_look.is_none() {
                return Err(TrainError::Interrupted);
            }
            break;
        }
    }
    best.trained_until_unix_ms = until;
    best.validation = Validation { samples, loss_before, loss: best_loss };
    Ok(best)
}

/// A slice as the network sees it.
pub(crate) struct Prepared {
    samples: Vec<Sample>,
    /// Samples before this are trained on, the rest is held out.
    train_len: usize,
    until_unix_ms: u64,
}

impl Prepared {
    /// Replays the windows through the same code that runs at inference.
    fn new(windows: &[FeatureWindow], config: &ForecastConfig) -> Option<Self> {
        let mut profile = Profile::new(config);
        let mut samples = Vec::with_capacity(windows.len());
        for window in windows {
            profile.replay(window, config, &mut samples);
        }
        Self::from_samples(samples, windows.last().map_or(0, |window| window.end_unix_ms))
    }

    /// `None` when there are too few to learn from.
    pub(crate) fn from_samples(samples: Vec<Sample>, until_unix_ms: u64) -> Option<Self> {
        if samples.len() < SAMPLES_MIN / 2 {
            return None;
        }
        let train_len = (samples.len() as f64 * (1.0 - HELD_OUT)) as usize;
        Some(Self { samples, train_len, until_unix_ms })
    }
}

/// On the way through a slice.
struct Walk<'a> {
    slice: &'a Prepared,
    at: usize,
    hidden: [f32; HIDDEN],
    cell: [f32; HIDDEN],
}

/// Mean pinball loss on the held-out parts, by the step that inference uses.
pub(crate) fn held_out_loss<'a>(weights: &ModelWeights, slices: &'a [Prepared]) -> f64 {
    let network = Network::new(weights);
    let mut batch = Batch::default();
    let (mut sum, mut count) = (0.0, 0u64);
    // The state needs no more than a walk's length to be what it would be.
    let begin = |slice: &'a Prepared| Walk {
        slice,
        at: slice.train_len.saturating_sub(WALK_MAX),
        hidden: [0.0; HIDDEN],
        cell: [0.0; HIDDEN],
    };
    let mut walks: Vec<Walk<'a>> = slices.iter().map(begin).collect();
    while !walks.is_empty() {
        batch.resize(walks.len());
        for (row, walk) in walks.iter().enumerate() {
            batch.set(row, &walk.slice.samples[walk.at].inputs, &walk.hidden, &walk.cell);
        }
        network.step(&mut batch);
        for (row, walk) in walks.iter_mut().enumerate() {
            batch.state_into(row, &mut walk.hidden, &mut walk.cell);
            let targets = walk.slice.samples[walk.at].targets.filter(|_| walk.at >= walk.slice.train_len);
            walk.at += 1;
            for (target, value) in targets.iter().flatten().enumerate() {
                let band = quantiles(batch.raw(row), target);
                for (quantile, level) in band.iter().zip(Quantiles::LEVELS) {
                    let over = f64::from(value.clamp(-TARGET_MAX, TARGET_MAX) - quantile);
                    sum += (level * over).max((level - 1.0) * over);
                    count += 1;
                }
            }
        }
        walks.retain(|walk| walk.at < walk.slice.samples.len());
    }
    if count == 0 { f64::MAX } else { sum / count as f64 }
}

/// Inputs and targets of [`CHUNK`] steps of [`ROWS`] rows, step-major, with the state they begin from.
struct Chunk {
    inputs: Vec<f32>,
    targets: Vec<f32>,
    counted: Vec<f32>,
    hidden: Vec<f32>,
    cell: Vec<f32>,
}

struct Walker {
    slice: usize,
    at: usize,
    walked: usize,
}

struct Walkers {
    rows: Vec<Walker>,
    hidden: Vec<f32>,
    cell: Vec<f32>,
}

impl Walkers {
    fn new(slices: &[Prepared], random: &mut Random) -> Self {
        let rows = (0..ROWS).map(|_| jump(slices, random)).collect();
        Self { rows, hidden: vec![0.0; ROWS * HIDDEN], cell: vec![0.0; ROWS * HIDDEN] }
    }

    fn chunk(&mut self, slices: &[Prepared], random: &mut Random) -> Chunk {
        for (row, walker) in self.rows.iter_mut().enumerate() {
            if walker.at + CHUNK > slices[walker.slice].train_len || walker.walked >= WALK_MAX {
                *walker = jump(slices, random);
                self.hidden[row * HIDDEN..(row + 1) * HIDDEN].fill(0.0);
                self.cell[row * HIDDEN..(row + 1) * HIDDEN].fill(0.0);
            }
        }
        let mut chunk = Chunk {
            inputs: Vec::with_capacity(CHUNK * ROWS * INPUTS),
            targets: Vec::with_capacity(CHUNK * ROWS * TARGETS),
            counted: Vec::with_capacity(CHUNK * ROWS),
            hidden: self.hidden.clone(),
            cell: self.cell.clone(),
        };
        for step in 0..CHUNK {
            for walker in &self.rows {
                let sample = &slices[walker.slice].samples[walker.at + step];
                chunk.inputs.extend(sample.inputs);
                chunk.targets.extend(sample.targets.unwrap_or_default().map(|t| t.clamp(-TARGET_MAX, TARGET_MAX)));
                let counts = sample.targets.is_some() && walker.walked + step >= WARM_UP;
                chunk.counted.push(f32::from(u8::from(counts)));
            }
        }
        for walker in &mut self.rows {
            walker.at += CHUNK;
            walker.walked += CHUNK;
        }
        chunk
    }

    fn keep_state(&mut self, hidden: Vec<f32>, cell: Vec<f32>) {
        self.hidden = hidden;
        self.cell = cell;
    }
}

/// A random place: slices by their length, so that every sample is as likely.
fn jump(slices: &[Prepared], random: &mut Random) -> Walker {
    let total: usize = slices.iter().map(|slice| slice.train_len).sum();
    let mut at = random.below(total.max(1));
    for (slice, prepared) in slices.iter().enumerate() {
        if at < prepared.train_len {
            return Walker { slice, at: at.min(prepared.train_len.saturating_sub(CHUNK)), walked: 0 };
        }
        at -= prepared.train_len;
    }
    Walker { slice: 0, at: 0, walked: 0 }
}

/// The network as burn trains it: the same matrices as [`ModelWeights`].
#[derive(Module, Debug)]
pub(crate) struct Lstm {
    input: Param<Tensor<2>>,
    recurrent: Param<Tensor<2>>,
    bias: Param<Tensor<1>>,
    head: Param<Tensor<2>>,
    head_bias: Param<Tensor<1>>,
}

impl Lstm {
    pub(crate) fn new(weights: &ModelWeights, device: &Device) -> Self {
        let (input, recurrent) = weights.gates.split_at(INPUTS * GATES);
        let matrix =
            |values: &[f32], shape: [usize; 2]| Param::from_data(TensorData::new(values.to_vec(), shape), device);
        let vector = |values: &[f32]| Param::from_data(TensorData::new(values.to_vec(), [values.len()]), device);
        Self {
            input: matrix(input, [INPUTS, GATES]),
            recurrent: matrix(recurrent, [HIDDEN, GATES]),
            bias: vector(&weights.gates_bias),
            head: matrix(&weights.head, [HIDDEN, OUTPUTS]),
            head_bias: vector(&weights.head_bias),
        }
    }

    fn weights(&self, start: &ModelWeights, steps: u64, until_unix_ms: u64) -> ModelWeights {
        let mut gates = numbers(self.input.val());
        gates.extend(numbers(self.recurrent.val()));
        debug_assert_eq!(gates.len(), ROW * GATES);
        ModelWeights {
            gates,
            gates_bias: numbers(self.bias.val()),
            head: numbers(self.head.val()),
            head_bias: numbers(self.head_bias.val()),
            lineage: start.lineage,
            steps: start.steps.saturating_add(steps),
            trained_until_unix_ms: until_unix_ms,
            validation: Validation::default(),
        }
    }

    /// Raw outputs `[steps · rows, OUTPUTS]` and the state after the last step. `inputs` is step-major.
    pub(crate) fn forward(
        &self,
        inputs: Tensor<2>,
        steps: usize,
        mut hidden: Tensor<2>,
        mut cell: Tensor<2>,
    ) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
        let [rows, _] = hidden.dims();
        // The inputs of all steps in one product; only the recurrent part has to wait for the step before.
        let projected = inputs.matmul(self.input.val()) + self.bias.val().unsqueeze();
        let recurrent = self.recurrent.val();
        let mut states = Vec::with_capacity(steps);
        for step in 0..steps {
            let gates = projected.clone().narrow(0, step * rows, rows) + hidden.matmul(recurrent.clone());
            let open = sigmoid(gates.clone().narrow(1, 0, 3 * HIDDEN));
            let candidate = gates.narrow(1, 3 * HIDDEN, HIDDEN).tanh();
            let input = open.clone().narrow(1, 0, HIDDEN);
            let forget = open.clone().narrow(1, HIDDEN, HIDDEN);
            let output = open.narrow(1, 2 * HIDDEN, HIDDEN);
            cell = forget * cell + input * candidate;
            hidden = output * cell.clone().tanh();
            states.push(hidden.clone());
        }
        let raw = Tensor::cat(states, 0).matmul(self.head.val()) + self.head_bias.val().unsqueeze();
        (raw, hidden, cell)
    }

    /// Mean pinball loss over the counted steps, and the state after the chunk.
    fn loss(&self, chunk: &Chunk, device: &Device) -> (Tensor<1>, Vec<f32>, Vec<f32>) {
        let tensor =
            |values: &[f32], shape: [usize; 2]| Tensor::<2>::from_data(TensorData::new(values.to_vec(), shape), device);
        let inputs = tensor(&chunk.inputs, [CHUNK * ROWS, INPUTS]);
        let targets = tensor(&chunk.targets, [CHUNK * ROWS, TARGETS]);
        let counted = tensor(&chunk.counted, [CHUNK * ROWS, 1]);
        let hidden = tensor(&chunk.hidden, [ROWS, HIDDEN]);
        let cell = tensor(&chunk.cell, [ROWS, HIDDEN]);
        let (raw, hidden, cell) = self.forward(inputs, CHUNK, hidden, cell);
        let part = |level: usize| raw.clone().narrow(1, level * TARGETS, TARGETS);
        // The same widths as `lstm::width`.
        let wide = |level: usize| {
            let x = part(level);
            (x.clone() + (x.clone() * x + 4.0).sqrt()) * 0.5
        };
        let q50 = part(0);
        let q05 = q50.clone() - wide(1);
        let q90 = q50.clone() + wide(2);
        let q95 = q90.clone() + wide(3);
        let q99 = q95.clone() + wide(4);
        let mut sum = targets.zeros_like();
        for (value, level) in [q05, q50, q90, q95, q99].into_iter().zip(Quantiles::LEVELS) {
            let over = targets.clone() - value;
            sum = sum + over.clone() * level + relu(-over);
        }
        let samples = chunk.counted.iter().sum::<f32>().max(1.0);
        let scale = 1.0 / (f64::from(samples) * (TARGETS * LEVELS) as f64);
        ((sum * counted).sum() * scale, numbers(hidden), numbers(cell))
    }
}

pub(crate) fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.detach().into_data().try_to_vec::<f32>().unwrap_or_default()
}
