//! Feature windows in, demand out: what each service will need over the next seconds, as quantiles that are honest
//! about their width.
//!
//! Three candidates forecast every resource of every service on every tick, each with its own adaptive
//! calibration: the last value, an L1 linear model on recent changes that learns online, and an LSTM that is trained
//! in the background and corrects the linear model. Per series whoever had the lowest recent pinball loss is the
//! champion and serves, so nobody is worse off than with the best baseline for long.
//!
//! ```text
//! window ─▶ profile: series, scales ─▶ inputs ─▶ one LSTM step for all profiles ─▶ raw quantiles
//!              │ due forecasts scored                                                  │
//!              └─▶ trackers: loss, coverage, offsets ─────────▶ bands ◀────────────────┘ ─▶ champion ─▶ demand
//! ```
//!
//! Confidence is the share of recent forecasts whose median was within `confidence_tolerance` (20 %) of what came, or
//! within `confidence_floor` of it: exponentially weighted over about 120 steps, begun with 3 wrong ones, and the
//! lowest of the four resources. A confidence of 0.83 says that the worst resource was right in 83 of 100 forecasts.
//!
//! Nothing here performs I/O, reads a clock or draws randomness: times, windows and seeds are arguments. Not here:
//! storage (`history`), when to train (`agent`), how much to reserve (`policy`).

mod calibrate;
mod config;
mod file;
mod forecaster;
mod linear;
mod lstm;
mod outlook;
mod profile;
mod random;
mod report;
mod series;
mod tracker;
mod train;

#[cfg(test)]
mod tests;

pub use config::ForecastConfig;
pub use file::ImportError;
pub use forecaster::Forecaster;
pub use lstm::{ModelWeights, Stepper, Validation};
pub use outlook::{HORIZONS, History, Outlook, OutlookConfig, Scored, SeriesId, seal_base, train_base, train_outlook};
pub use profile::Irregular;
pub use report::{CandidateReport, ForecastReport, LstmState, ResourceReport, TrainedReport};
pub use train::{HistorySlice, Progress, TrainConfig, TrainError, train};
