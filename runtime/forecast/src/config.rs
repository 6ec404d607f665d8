//! Settings of a forecaster: its clock and how fast it forgets. Not for training, see `train`.

use serde::{Deserialize, Serialize};
use warmswap_model::PerResource;

/// How a [`Forecaster`](crate::Forecaster) works: its clock and how fast it forgets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ForecastConfig {
    /// Time between two windows, ms.
    pub step_ms: u64,
    /// Windows that one forecast covers.
    pub horizon_steps: usize,
    /// Smallest scale of each resource, in its unit: changes below it are noise.
    pub floor: PerResource<f64>,
    /// Steps over which losses are averaged, exponentially weighted, to choose the champion.
    pub loss_memory_steps: f64,
    /// Steps over which coverage is averaged.
    pub coverage_memory_steps: f64,
    /// Forecasts of a candidate that must have been compared with what came before it may serve.
    pub evidence_min: u32,
    /// A challenger replaces the champion when its loss is below this share of the champion's.
    pub challenger_ratio: f64,
    /// A median forecast counts as right within this share of the actual value,
    pub confidence_tolerance: f64,
    /// or within this much of it, in the resource's unit: less than this matters to nobody.
    pub confidence_floor: PerResource<f64>,
}

impl Default for ForecastConfig {
    fn default() -> Self {
        Self {
            step_ms: 1000,
            horizon_steps: 5,
            floor: PerResource { cpu: 0.05, memory: 0.05, network: 0.005, disk: 0.005 },
            loss_memory_steps: 300.0,
            coverage_memory_steps: 300.0,
            evidence_min: 30,
            challenger_ratio: 0.98,
            confidence_tolerance: 0.2,
            confidence_floor: PerResource { cpu: 2.0, memory: 2.0, network: 0.5, disk: 0.5 },
        }
    }
}

impl ForecastConfig {
    /// Longest horizon in steps: the ring of recent values must hold it.
    pub const HORIZON_STEPS_MAX: usize = 31;

    /// The same with every number brought into the range in which the arithmetic holds.
    #[must_use]
    pub(crate) fn sane(mut self) -> Self {
        let or = |value: f64, low: f64, high: f64| if value.is_finite() { value.clamp(low, high) } else { low };
        self.step_ms = self.step_ms.max(1);
        self.horizon_steps = self.horizon_steps.clamp(1, Self::HORIZON_STEPS_MAX);
        self.floor = self.floor.map(|_, floor| or(*floor, 1e-9, 1e9));
        self.confidence_floor = self.confidence_floor.map(|_, floor| or(*floor, 0.0, 1e9));
        self.loss_memory_steps = or(self.loss_memory_steps, 2.0, 1e6);
        self.coverage_memory_steps = or(self.coverage_memory_steps, 2.0, 1e6);
        self.challenger_ratio = or(self.challenger_ratio, 0.0, 1.0);
        self.confidence_tolerance = or(self.confidence_tolerance, 1e-3, 10.0);
        self
    }
}
