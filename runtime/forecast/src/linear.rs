//! L1 regression on (recent values minus the last value), learned while it runs.
//!
//! Iteratively reweighted least squares: every due forecast adds its features to exponentially forgotten normal
//! equations with weight 1/|residual|, which makes the fit minimise absolute errors. The 8 equations are solved every
//! few steps, with a ridge that shrinks towards the last value: a series without structure costs nothing.

use serde::{Deserialize, Serialize};

use crate::series::CHANGE_MAX;

pub(crate) const INPUTS: usize = 8;

const SOLVE_EVERY: u32 = 12;
/// Steps before the coefficients are used.
const READY: u32 = 24;
/// Residuals below this share of the scale weigh no more than it: without it one exact hit would weigh infinitely.
const RESIDUAL_MIN: f32 = 0.2;
const RIDGE: f64 = 0.01;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Linear {
    normal: [[f32; INPUTS]; INPUTS],
    right: [f32; INPUTS],
    weights: [f32; INPUTS],
    learned: u32,
}

impl Linear {
    pub(crate) fn new() -> Self {
        Self { normal: [[0.0; INPUTS]; INPUTS], right: [0.0; INPUTS], weights: [0.0; INPUTS], learned: 0 }
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.learned >= READY
    }

    /// Predicted change from the last value, in scales. 0 until ready.
    pub(crate) fn predict(&self, inputs: &[f32; INPUTS]) -> f32 {
        if !self.is_ready() {
            return 0.0;
        }
        self.dot(inputs).clamp(-CHANGE_MAX, CHANGE_MAX)
    }

    fn dot(&self, inputs: &[f32; INPUTS]) -> f32 {
        self.weights.iter().zip(inputs).map(|(w, x)| w * x).sum()
    }

    /// `change` is what the value did over the horizon, in scales of when `inputs` were taken; `keep` is what is left of the
    /// weight of what was learned before.
    pub(crate) fn learn(&mut self, inputs: &[f32; INPUTS], change: f32, keep: f32) {
        let change = change.clamp(-CHANGE_MAX, CHANGE_MAX);
        let weight = 1.0 / (change - self.dot(inputs)).abs().max(RESIDUAL_MIN);
        for (row, left) in inputs.iter().enumerate() {
            let weighted = weight * left;
            for (sum, right) in self.normal[row].iter_mut().zip(inputs) {
                *sum = keep * *sum + weighted * right;
            }
            self.right[row] = keep * self.right[row] + weighted * change;
        }
        self.learned = self.learned.saturating_add(1);
        if self.learned.is_multiple_of(SOLVE_EVERY) {
            self.solve();
        }
    }

    /// Cholesky; leaves the old weights when the equations have no finite solution.
    #[expect(clippy::needless_range_loop, reason = "indices read like the formulas")]
    fn solve(&mut self) {
        let mut a = [[0f64; INPUTS]; INPUTS];
        let trace: f64 = (0..INPUTS).map(|i| f64::from(self.normal[i][i])).sum();
        let ridge = RIDGE * trace / INPUTS as f64 + 1e-6;
        for row in 0..INPUTS {
            for column in 0..=row {
                a[row][column] = f64::from(self.normal[column][row]);
            }
            a[row][row] += ridge;
        }
        for row in 0..INPUTS {
            for column in 0..=row {
                let before: f64 = (0..column).map(|k| a[row][k] * a[column][k]).sum();
                let rest = a[row][column] - before;
                if row == column {
                    if rest.is_nan() || rest <= 0.0 {
                        return;
                    }
                    a[row][row] = rest.sqrt();
                } else {
                    a[row][column] = rest / a[column][column];
                }
            }
        }
        let mut x = [0f64; INPUTS];
        for row in 0..INPUTS {
            let before: f64 = (0..row).map(|k| a[row][k] * x[k]).sum();
            x[row] = (f64::from(self.right[row]) - before) / a[row][row];
        }
        for row in (0..INPUTS).rev() {
            let after: f64 = (row + 1..INPUTS).map(|k| a[k][row] * x[k]).sum();
            x[row] = (x[row] - after) / a[row][row];
        }
        if x.iter().all(|w| w.is_finite() && w.abs() < 1e3) {
            self.weights = x.map(|w| w as f32);
        }
    }
}
