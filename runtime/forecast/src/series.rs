//! One resource of one service as a series: recent values, slow statistics, the inputs of both models.

use serde::{Deserialize, Serialize};
use warmswap_model::Resource;

use crate::linear::{INPUTS, Linear};

/// Recent values kept, a power of two and above [`crate::ForecastConfig::HORIZON_STEPS_MAX`].
const RING: usize = 32;
/// Values of the short means, fewer than the ring holds.
const MEANS: [usize; 3] = [5, 10, 30];
/// Steps over which the slow level and its deviation are averaged.
const LEVEL_MEMORY: f64 = 300.0;
/// Largest usage that is believed, in any unit.
const USAGE_MAX: f64 = 1e12;
/// Scale below which changes are noise, as a share of the level.
const RELATIVE_FLOOR: f64 = 1e-4;

/// Changes beyond this many scales count as this many.
pub(crate) const CHANGE_MAX: f32 = 100.0;

/// Inputs of the LSTM that each resource gives.
pub(crate) const SERIES_INPUTS: usize = 6;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Series {
    ring: [f64; RING],
    /// Where the next value goes; the one before is the newest.
    head: usize,
    seen: u64,
    /// Of the newest [`MEANS`] values.
    sums: [f64; MEANS.len()],
    level: f64,
    deviation: f64,
    pub(crate) linear: Linear,
}

/// What a series looked like when a forecast was made.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct View {
    pub(crate) last: f64,
    /// Typical change of the last value over the horizon.
    pub(crate) scale: f64,
    pub(crate) linear_inputs: [f32; INPUTS],
    /// The linear model's median.
    pub(crate) linear: f64,
}

impl Series {
    pub(crate) fn new() -> Self {
        Self {
            ring: [0.0; RING],
            head: 0,
            seen: 0,
            sums: [0.0; MEANS.len()],
            level: 0.0,
            deviation: 0.0,
            linear: Linear::new(),
        }
    }

    /// A value that can be used: finite, not negative, not absurd.
    pub(crate) fn accept(value: f64) -> Option<f64> {
        (value.is_finite() && value >= 0.0).then(|| value.min(USAGE_MAX))
    }

    /// The value `back` steps before the newest.
    pub(crate) fn value(&self, back: usize) -> f64 {
        self.ring[(self.head + RING - 1 - back % RING) % RING]
    }

    /// Forgets the recent values, which a gap made meaningless, and starts again from `value`.
    pub(crate) fn restart(&mut self, value: f64) {
        self.ring = [value; RING];
        self.sums = MEANS.map(|steps| value * steps as f64);
        if self.seen == 0 {
            self.level = value;
        }
    }

    pub(crate) fn push(&mut self, value: f64) {
        if self.seen == 0 {
            self.restart(value);
        }
        for (sum, steps) in self.sums.iter_mut().zip(MEANS) {
            *sum += value - self.ring[(self.head + RING - steps) % RING];
        }
        self.ring[self.head] = value;
        self.head = (self.head + 1) % RING;
        if self.head == 0 {
            // Sums that only ever add and subtract would keep the rounding of the largest value they ever held.
            self.sums = MEANS.map(|steps| self.ring[RING - steps..].iter().sum());
        }
        self.seen = self.seen.saturating_add(1);
        let rate = (1.0 / LEVEL_MEMORY).max(1.0 / self.seen.min(1 << 30) as f64);
        self.level += rate * (value - self.level);
        self.deviation += rate * ((value - self.level).abs() - self.deviation);
    }

    /// What the newest `steps` values came to: the highest for memory, the mean for rates.
    pub(crate) fn outcome(&self, resource: Resource, steps: usize) -> f64 {
        let values = (0..steps).map(|back| self.value(back));
        match resource {
            Resource::Memory => values.fold(0.0, f64::max),
            Resource::Cpu | Resource::Network | Resource::Disk => values.sum::<f64>() / steps as f64,
        }
    }

    /// Whether an import brought something that this code could have made.
    pub(crate) fn is_sound(&self) -> bool {
        let mut numbers = self.ring.iter().chain(&self.sums).chain([&self.level, &self.deviation]);
        self.head < RING && numbers.all(|v| v.is_finite())
    }

    /// Scale below which changes do not count.
    pub(crate) fn floor(&self, absolute: f64) -> f64 {
        absolute.max(RELATIVE_FLOOR * self.level.abs())
    }

    /// The state a forecast starts from, and the LSTM's inputs of this series into `inputs`.
    pub(crate) fn view(&self, scale: f64, floor: f64, inputs: &mut [f32]) -> View {
        let last = self.value(0);
        let per_scale = |value: f64| (((value - last) / scale) as f32).clamp(-CHANGE_MAX, CHANGE_MAX);
        let means: [f64; MEANS.len()] = std::array::from_fn(|at| self.sums[at] / MEANS[at] as f64);
        let linear_inputs = [
            per_scale(self.value(1)),
            per_scale(self.value(2)),
            per_scale(self.value(3)),
            per_scale(means[0]),
            per_scale(means[1]),
            per_scale(means[2]),
            per_scale(self.level),
            0.25,
        ];
        let change = self.linear.predict(&linear_inputs);
        let deviation = self.deviation.max(floor);
        let values = [
            squash(linear_inputs[0]),
            squash(per_scale(self.value(5))),
            squash(linear_inputs[4]),
            squash(((last - self.level) / deviation) as f32),
            squash(change),
            ((scale / (self.level.abs() + floor)).ln() as f32 / 4.0).clamp(-2.0, 2.0),
        ];
        inputs[..SERIES_INPUTS].copy_from_slice(&values);
        View { last, scale, linear_inputs, linear: last + scale * f64::from(change) }
    }
}

/// Keeps small values, bounds large ones to ±16, so that one spike is not the only thing a model sees.
pub(crate) fn squash(value: f32) -> f32 {
    if value.is_nan() { 0.0 } else { value.clamp(-1e6, 1e6) / (1.0 + value.clamp(-1e6, 1e6).abs() / 16.0) }
}
