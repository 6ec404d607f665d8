//! What a service is expected to need.

use serde::{Deserialize, Serialize};

use crate::PerResource;

/// A distribution as five quantiles that never cross. `[q05, q95]` is the 90 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Quantiles {
    pub q05: f64,
    pub q50: f64,
    pub q90: f64,
    pub q95: f64,
    pub q99: f64,
}

impl Quantiles {
    pub const LEVELS: [f64; 5] = [0.05, 0.50, 0.90, 0.95, 0.99];

    /// From values in the order of [`Self::LEVELS`]; sorts them, so that quantiles cannot cross.
    #[must_use]
    pub fn from_levels(mut values: [f64; 5]) -> Self {
        values.sort_by(f64::total_cmp);
        let [q05, q50, q90, q95, q99] = values;
        Self { q05, q50, q90, q95, q99 }
    }

    #[must_use]
    pub fn to_levels(self) -> [f64; 5] {
        [self.q05, self.q50, self.q90, self.q95, self.q99]
    }
}

/// Who makes the forecast of one series: whoever had the lower recent loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Champion {
    LastValue,
    /// What was at this time a day ago.
    Seasonal,
    /// A short exponentially weighted mean.
    Ewma,
    Linear,
    /// Quantiles of a histogram of values that forgets.
    Histogram,
    Lstm,
    /// The others together, weighted by recent loss.
    Blend,
}

impl Champion {
    /// For people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::LastValue => "last value",
            Self::Seasonal => "a day ago",
            Self::Ewma => "short mean",
            Self::Linear => "linear",
            Self::Histogram => "histogram",
            Self::Lstm => "lstm",
            Self::Blend => "blend",
        }
    }
}

/// Demand over one horizon. For every resource the quantiles are of the *highest* one-second value in the horizon
/// for memory, and of the *mean* over the horizon for the rates (CPU, network, disk).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DemandVector {
    pub horizon_s: f64,
    pub quantiles: PerResource<Quantiles>,
    pub champion: PerResource<Champion>,
    /// Share of recent actual values that fell inside the 90 % interval, `None` until enough were seen.
    pub coverage90: PerResource<Option<f64>>,
    /// 0 to 1: share of recent forecasts whose median was within 20 % of what came, or within what matters to nobody;
    /// the lowest of the four resources. Measured on residuals, and low until enough were seen.
    pub confidence: f64,
}
