//! The LSTM at inference: weights, and one fused step for all profiles of a tick.
//!
//! ```text
//! z [rows × 64] = inputs (32) | hidden of the step before (32)
//! gates [rows × 128] = z · W + b          W in blocks of 16 columns, so that a block stays in the nearest cache
//! i, f, o = σ(gates 0..96)   g = tanh(gates 96..128)   c = f·c + i·g   h = o·tanh(c)
//! raw [rows × 20] = h · V + v             level-major: [median | below | to q90 | to q95 | to q99] × 4 targets
//! ```
//!
//! Quantiles cannot cross: the network gives a median and four widths, each through [`width`], which is positive.
//! Rows go four at a time, so that each weight that is loaded is used four times. The same code is compiled for the
//! baseline instruction set, for AVX2 with FMA, and for AVX-512; the processor is asked once.

use serde::{Deserialize, Serialize};

use crate::calibrate::LEVELS;

pub(crate) const INPUTS: usize = 32;
pub(crate) const HIDDEN: usize = 32;
pub(crate) const GATES: usize = 4 * HIDDEN;
/// What is forecast at once: the resources of a profile, or the horizons of a series.
pub(crate) const TARGETS: usize = 4;
pub(crate) const OUTPUTS: usize = LEVELS * TARGETS;
pub(crate) const ROW: usize = INPUTS + HIDDEN;

/// Columns of one block of weights.
const BLOCK: usize = 16;
/// Rows that share one load of the weights.
const TILE: usize = 4;
/// Head columns, padded to whole blocks.
const HEAD: usize = OUTPUTS.next_multiple_of(BLOCK);
/// A cell beyond this is saturated anyway.
const CELL_MAX: f32 = 60.0;

/// What training measured on the newest part of each slice, which it did not train on. Losses are mean pinball in
/// units of the last value's typical error.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Validation {
    pub samples: u64,
    /// Before this training.
    pub loss_before: f64,
    /// Of the weights that were kept.
    pub loss: f64,
}

impl Validation {
    pub(crate) fn is_no_worse(&self) -> bool {
        self.loss <= self.loss_before
    }
}

/// A trained network with where it comes from. Plain numbers: saved with [`crate::Forecaster::export`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelWeights {
    /// `[INPUTS + HIDDEN][GATES]`, row-major, gates in the order i, f, o, g.
    pub(crate) gates: Vec<f32>,
    pub(crate) gates_bias: Vec<f32>,
    /// `[HIDDEN][OUTPUTS]`, row-major.
    pub(crate) head: Vec<f32>,
    pub(crate) head_bias: Vec<f32>,
    /// Equal for weights that were trained on from each other.
    pub(crate) lineage: u64,
    /// Optimiser steps over all trainings that led here.
    pub steps: u64,
    /// End of the newest window trained on, Unix ms.
    pub trained_until_unix_ms: u64,
    pub validation: Validation,
}

impl ModelWeights {
    /// Untrained: the head gives no correction and the widths of a typical residual, so the network begins as the
    /// linear model with a fixed band. The rest is drawn from `random`, which gives numbers in −1 to 1.
    pub(crate) fn untrained(lineage: u64, mut random: impl FnMut() -> f32) -> Self {
        let spread = (6.0 / (ROW + HIDDEN) as f32).sqrt();
        let mut gates_bias = vec![0.0; GATES];
        // A forget gate that begins open keeps the state, and its gradient, alive.
        gates_bias[HIDDEN..2 * HIDDEN].fill(1.0);
        let widths = [0.0, 1.8, 1.25, 0.55, 1.25];
        let mut head_bias = vec![0.0; OUTPUTS];
        for (level, wide) in widths.iter().enumerate().skip(1) {
            head_bias[level * TARGETS..(level + 1) * TARGETS].fill(width_inverse(*wide));
        }
        Self {
            gates: (0..ROW * GATES).map(|_| spread * random()).collect(),
            gates_bias,
            head: vec![0.0; HIDDEN * OUTPUTS],
            head_bias,
            lineage,
            steps: 0,
            trained_until_unix_ms: 0,
            validation: Validation::default(),
        }
    }

    /// Moves a share of the way to other weights; the rest of it is theirs.
    pub(crate) fn follow(&mut self, to: &Self, share: f32) {
        let pairs = [
            (&mut self.gates, &to.gates),
            (&mut self.gates_bias, &to.gates_bias),
            (&mut self.head, &to.head),
            (&mut self.head_bias, &to.head_bias),
        ];
        for (mine, theirs) in pairs {
            for (mine, theirs) in mine.iter_mut().zip(theirs) {
                *mine += share * (theirs - *mine);
            }
        }
        (self.steps, self.trained_until_unix_ms) = (to.steps, to.trained_until_unix_ms);
    }

    /// Whether these were trained on from `now` and came out no worse.
    pub(crate) fn continues(&self, now: &Self) -> bool {
        now.lineage == self.lineage && now.steps <= self.steps && self.validation.is_no_worse()
    }

    /// Whether every part has its size and every number is finite and of a size that training can produce.
    pub(crate) fn check(&self) -> Result<(), &'static str> {
        let parts = [
            (&self.gates, ROW * GATES),
            (&self.gates_bias, GATES),
            (&self.head, HIDDEN * OUTPUTS),
            (&self.head_bias, OUTPUTS),
        ];
        for (part, length) in parts {
            if part.len() != length {
                return Err("a matrix of the network has another size than this version uses");
            }
            if !part.iter().all(|w| w.is_finite() && w.abs() < 1e4) {
                return Err("the network holds numbers that are not finite or absurdly large");
            }
        }
        Ok(())
    }
}

/// The step by itself, to be measured, and compared with the same network elsewhere.
#[derive(Debug, Clone)]
pub struct Stepper {
    network: Network,
    batch: Batch,
}

impl Stepper {
    pub const INPUTS: usize = INPUTS;
    pub const HIDDEN: usize = HIDDEN;
    pub const OUTPUTS: usize = OUTPUTS;

    /// The state of so many rows is empty until [`Self::begin`].
    #[must_use]
    pub fn new(weights: &ModelWeights, rows: usize) -> Self {
        let mut batch = Batch::default();
        batch.resize(rows);
        Self { network: Network::new(weights), batch }
    }

    /// Weights that mean nothing and depend only on `seed`.
    #[must_use]
    pub fn weights_of_anything(seed: u64) -> ModelWeights {
        let mut random = crate::random::Random::new(seed);
        let mut weights = ModelWeights::untrained(0, || random.signed());
        weights.head.fill_with(|| random.signed());
        weights
    }

    /// Empties the state, and has every input be this.
    pub fn begin(&mut self, input: f32) {
        for row in 0..self.batch.rows {
            self.batch.set(row, &[input; INPUTS], &[0.0; HIDDEN], &[0.0; HIDDEN]);
        }
    }

    /// One step of all rows, with the same inputs and the state of the step before.
    pub fn step(&mut self) {
        self.network.step(&mut self.batch);
    }

    /// What the network gives for a row.
    #[must_use]
    pub fn outputs(&self, row: usize) -> &[f32] {
        self.batch.raw(row)
    }
}

/// A positive width from any number: smooth, about `x` for large `x`, 1 at 0; without exp, so it vectorises.
pub(crate) fn width(x: f32) -> f32 {
    0.5 * (x + (x * x + 4.0).sqrt())
}

fn width_inverse(y: f32) -> f32 {
    y - 1.0 / y
}

/// Quantiles in the order of the levels, of one target, from the raw outputs of one row.
pub(crate) fn quantiles(raw: &[f32], target: usize) -> [f32; LEVELS] {
    let at = |level: usize| raw[level * TARGETS + target];
    let q50 = at(0);
    let q90 = q50 + width(at(2));
    let q95 = q90 + width(at(3));
    [q50 - width(at(1)), q50, q90, q95, q95 + width(at(4))]
}

/// Weights laid out for the step.
#[derive(Debug, Clone)]
pub(crate) struct Network {
    /// `[GATES / BLOCK][ROW][BLOCK]`.
    gates: Vec<f32>,
    gates_bias: Vec<f32>,
    /// `[HEAD / BLOCK][HIDDEN][BLOCK]`, padded with zeros.
    head: Vec<f32>,
    head_bias: Vec<f32>,
    level: Simd,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Simd {
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Simd {
    /// The best this processor has.
    fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
            {
                return Self::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Self::Avx2;
            }
        }
        Self::Baseline
    }
}

/// Rows of one step. Buffers are kept between ticks: a tick allocates only when there are more rows than ever before.
#[derive(Debug, Clone, Default)]
pub(crate) struct Batch {
    /// Inputs and hidden state of each row.
    pub(crate) z: Vec<f32>,
    /// Cell state of each row.
    pub(crate) c: Vec<f32>,
    /// Raw outputs, [`HEAD`] apart.
    raw: Vec<f32>,
    rows: usize,
}

impl Batch {
    /// Makes room for `rows` rows; whole tiles, so that the last tile needs no special case.
    pub(crate) fn resize(&mut self, rows: usize) {
        let padded = rows.next_multiple_of(TILE);
        if self.c.len() < padded * HIDDEN {
            self.z.resize(padded * ROW, 0.0);
            self.c.resize(padded * HIDDEN, 0.0);
            self.raw.resize(padded * HEAD, 0.0);
        }
        self.rows = rows;
    }

    pub(crate) fn set(&mut self, row: usize, inputs: &[f32], hidden: &[f32], cell: &[f32]) {
        let z = &mut self.z[row * ROW..(row + 1) * ROW];
        z[..INPUTS].copy_from_slice(inputs);
        z[INPUTS..].copy_from_slice(hidden);
        self.c[row * HIDDEN..(row + 1) * HIDDEN].copy_from_slice(cell);
    }

    pub(crate) fn hidden(&self, row: usize) -> &[f32] {
        &self.z[row * ROW + INPUTS..(row + 1) * ROW]
    }

    pub(crate) fn cell(&self, row: usize) -> &[f32] {
        &self.c[row * HIDDEN..(row + 1) * HIDDEN]
    }

    /// The state of a row after the step.
    pub(crate) fn state_into(&self, row: usize, hidden: &mut [f32; HIDDEN], cell: &mut [f32; HIDDEN]) {
        hidden.copy_from_slice(self.hidden(row));
        cell.copy_from_slice(self.cell(row));
    }

    pub(crate) fn raw(&self, row: usize) -> &[f32] {
        &self.raw[row * HEAD..row * HEAD + OUTPUTS]
    }
}

impl Network {
    pub(crate) fn new(weights: &ModelWeights) -> Self {
        Self::with_simd(weights, Simd::detect())
    }

    pub(crate) fn with_simd(weights: &ModelWeights, level: Simd) -> Self {
        let mut head_bias = weights.head_bias.clone();
        head_bias.resize(HEAD, 0.0);
        Self {
            gates: in_blocks(&weights.gates, ROW, GATES, GATES),
            gates_bias: weights.gates_bias.clone(),
            head: in_blocks(&weights.head, HIDDEN, OUTPUTS, HEAD),
            head_bias,
            level,
        }
    }

    /// One step of every row of the batch: replaces hidden and cell state, fills the raw outputs.
    pub(crate) fn step(&self, batch: &mut Batch) {
        match self.level {
            Simd::Baseline => step::<false>(self, batch),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `level` is Avx2 only when `detect` found AVX2 and FMA on this processor.
            Simd::Avx2 => unsafe { step_avx2(self, batch) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `level` is Avx512 only when `detect` found AVX-512F, AVX2 and FMA on this processor.
            Simd::Avx512 => unsafe { step_avx512(self, batch) },
        }
    }
}

fn in_blocks(matrix: &[f32], rows: usize, columns: usize, padded: usize) -> Vec<f32> {
    let mut blocks = vec![0.0; rows * padded];
    for row in 0..rows {
        for column in 0..columns {
            let (block, within) = (column / BLOCK, column % BLOCK);
            blocks[(block * rows + row) * BLOCK + within] = matrix[row * columns + column];
        }
    }
    blocks
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn step_avx2(network: &Network, batch: &mut Batch) {
    step::<true>(network, batch);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn step_avx512(network: &Network, batch: &mut Batch) {
    step::<true>(network, batch);
}

/// Inlined into each instruction set's function above, so that it is compiled with that set.
#[inline(always)]
fn step<const FMA: bool>(network: &Network, batch: &mut Batch) {
    let tiles = batch.rows.div_ceil(TILE);
    let rows = batch.z.chunks_exact_mut(TILE * ROW).zip(batch.c.chunks_exact_mut(TILE * HIDDEN));
    let mut gates = [[0f32; GATES]; TILE];
    for ((z, c), raw) in rows.zip(batch.raw.chunks_exact_mut(TILE * HEAD)).take(tiles) {
        for block in 0..GATES / BLOCK {
            let weights = &network.gates[block * ROW * BLOCK..(block + 1) * ROW * BLOCK];
            let bias = &network.gates_bias[block * BLOCK..(block + 1) * BLOCK];
            let sums = multiply::<FMA>(weights, bias, z, ROW, 0);
            for (gates, sums) in gates.iter_mut().zip(&sums) {
                gates[block * BLOCK..(block + 1) * BLOCK].copy_from_slice(sums);
            }
        }
        for ((gates, z), c) in gates.iter().zip(z.chunks_exact_mut(ROW)).zip(c.chunks_exact_mut(HIDDEN)) {
            cell::<FMA>(gates, &mut z[INPUTS..], c);
        }
        for block in 0..HEAD / BLOCK {
            let weights = &network.head[block * HIDDEN * BLOCK..(block + 1) * HIDDEN * BLOCK];
            let bias = &network.head_bias[block * BLOCK..(block + 1) * BLOCK];
            let sums = multiply::<FMA>(weights, bias, z, ROW, INPUTS);
            for (raw, sums) in raw.chunks_exact_mut(HEAD).zip(&sums) {
                raw[block * BLOCK..(block + 1) * BLOCK].copy_from_slice(sums);
            }
        }
    }
}

/// Sums of one block of columns for one tile of rows: 4 × 16 accumulators stay in registers.
#[inline(always)]
fn multiply<const FMA: bool>(
    weights: &[f32],
    bias: &[f32],
    z: &[f32],
    stride: usize,
    offset: usize,
) -> [[f32; BLOCK]; TILE] {
    let mut start = [0f32; BLOCK];
    start.copy_from_slice(bias);
    let mut sums = [start; TILE];
    let (weights, _) = weights.as_chunks::<BLOCK>();
    let depth = weights.len();
    let rows: [&[f32]; TILE] = std::array::from_fn(|row| &z[row * stride + offset..row * stride + offset + depth]);
    for (k, weights) in weights.iter().enumerate() {
        for (sums, row) in sums.iter_mut().zip(&rows) {
            let x = row[k];
            for (sum, weight) in sums.iter_mut().zip(weights) {
                *sum = madd::<FMA>(x, *weight, *sum);
            }
        }
    }
    sums
}

#[inline(always)]
fn cell<const FMA: bool>(gates: &[f32; GATES], h: &mut [f32], c: &mut [f32]) {
    let mut active = [0f32; GATES];
    for (active, gate) in active[..3 * HIDDEN].iter_mut().zip(&gates[..3 * HIDDEN]) {
        *active = madd::<FMA>(0.5, tanh::<FMA>(0.5 * gate), 0.5);
    }
    for (active, gate) in active[3 * HIDDEN..].iter_mut().zip(&gates[3 * HIDDEN..]) {
        *active = tanh::<FMA>(*gate);
    }
    let (input, rest) = active.split_at(HIDDEN);
    let (forget, rest) = rest.split_at(HIDDEN);
    let (output, candidate) = rest.split_at(HIDDEN);
    let h = &mut h[..HIDDEN];
    let c = &mut c[..HIDDEN];
    for k in 0..HIDDEN {
        let cell = madd::<FMA>(forget[k], c[k], input[k] * candidate[k]).clamp(-CELL_MAX, CELL_MAX);
        c[k] = cell;
        h[k] = output[k] * tanh::<FMA>(cell);
    }
}

#[inline(always)]
fn madd<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// tanh as a quotient of polynomials, within 4e-7 everywhere: no branch and no call, so it vectorises.
#[inline(always)]
fn tanh<const FMA: bool>(x: f32) -> f32 {
    let x = x.clamp(-7.905, 7.905);
    let s = x * x;
    let mut p = -2.760_768_5e-16;
    for k in [2.000_188e-13, -8.604_672e-11, 5.122_297e-8, 1.485_722_4e-5, 6.372_619e-4, 4.893_524_6e-3] {
        p = madd::<FMA>(p, s, k);
    }
    let mut q = 1.198_258_4e-6;
    for k in [1.185_347_1e-4, 2.268_434_6e-3, 4.893_525e-3] {
        q = madd::<FMA>(q, s, k);
    }
    x * p / q
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tanh_is_close_everywhere() {
        for step in -40_000..=40_000 {
            let x = step as f32 / 2_000.0;
            let error = (tanh::<false>(x) - x.tanh()).abs().max((tanh::<true>(x) - x.tanh()).abs());
            assert!(error < 1e-6, "tanh({x}) is off by {error}");
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same() {
        let mut seed = 7u64;
        let mut random = move || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 40) as f32 / 8_388_608.0 - 1.0
        };
        let mut weights = ModelWeights::untrained(1, &mut random);
        weights.head.fill_with(&mut random);
        let inputs: Vec<f32> = (0..INPUTS).map(|_| random()).collect();
        let reference = Network::with_simd(&weights, Simd::Baseline);
        let best = Network::new(&weights);
        let run = |network: &Network| {
            let mut batch = Batch::default();
            // Five rows: one whole tile and one begun.
            batch.resize(5);
            for row in 0..5 {
                batch.set(row, &inputs, &[0.0; HIDDEN], &[0.0; HIDDEN]);
            }
            for _ in 0..20 {
                network.step(&mut batch);
            }
            (0..5).map(|row| batch.raw(row).to_vec()).collect::<Vec<_>>()
        };
        let (expected, found) = (run(&reference), run(&best));
        for (row, found) in found.iter().enumerate() {
            assert_eq!(&found[..], &run(&best)[0][..], "row {row} differs from its equal");
            for (a, b) in expected[row].iter().zip(found) {
                assert!((a - b).abs() < 1e-5, "{a} and {b}");
            }
        }
    }

    #[test]
    fn raw_outputs_become_quantiles_that_never_cross() {
        for step in -50..50 {
            let raw: Vec<f32> = (0..OUTPUTS).map(|k| (step * (k as i32 % 7 - 3)) as f32).collect();
            for target in 0..TARGETS {
                let q = quantiles(&raw, target);
                assert!(q.windows(2).all(|pair| pair[0] <= pair[1]), "{q:?}");
            }
        }
    }
}
