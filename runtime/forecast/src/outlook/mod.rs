//! Forecasts over minutes: what a series will come to 5, 15, 30 and 60 minutes from now.
//!
//! A series is any number that is known once a step: one resource of one service, the requests of one user. All series of one
//! [`Outlook`] share one clock and one network, so that a new one starts with what the others have taught; what is its own is the
//! network's state, its scales, its linear models and its calibration.
//!
//! Beside the LSTM five baselines run on each series, at each horizon and with the same calibration: the last value, the value a
//! day ago, a short mean, an L1 linear model and a histogram that forgets. A blend of all of them, weighted by recent loss,
//! competes as well. What serves is chosen per series, horizon and level by recent loss: who knows the median best need not know
//! the 99th percentile. The champion that is named is the median's.

mod base;
mod blend;
mod histogram;
mod memory;
mod series;
mod train;

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]
mod tests;

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use warmswap_model::{Champion, Quantiles};

use crate::calibrate::Rates;
use crate::lstm::{Batch, ModelWeights, Network, TARGETS};
use crate::{ImportError, file};
use series::{CANDIDATES, OutlookSeries};

pub use base::{seal_base, train_base};
pub use series::Scored;
pub use train::{History, train_outlook};

/// Horizons of an outlook.
pub const HORIZONS: usize = TARGETS;

/// How an outlook works: its clock and how fast it forgets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OutlookConfig {
    /// Time between two values, ms.
    pub step_ms: u64,
    /// Steps ahead, rising.
    pub horizons: [usize; HORIZONS],
    /// Smallest scale: changes below it are noise. In the unit of the series.
    pub floor: f64,
    /// Steps over which coverage is averaged.
    pub coverage_memory_steps: f64,
    /// Step of the adaptive conformal levels: larger follows drift faster and wobbles more.
    pub calibration_rate: f64,
}

impl OutlookConfig {
    /// Longest horizon in steps: the ring of recent values must hold it.
    pub const HORIZON_STEPS_MAX: usize = 63;

    /// One value a minute, 5, 15, 30 and 60 minutes ahead.
    #[must_use]
    pub fn minutes() -> Self {
        Self::every(60_000)
    }

    /// One value in this many ms. Horizons are 5, 15, 30 and 60 minutes where steps are that short, and 1, 3, 6 and 12 steps
    /// where they are not.
    #[must_use]
    pub fn every(step_ms: u64) -> Self {
        let steps = |minutes: u64| (minutes * 60_000 / step_ms.max(1)) as usize;
        let in_time = [5, 15, 30, 60].map(steps);
        let holds = in_time[0] >= 1 && in_time[HORIZONS - 1] <= Self::HORIZON_STEPS_MAX;
        Self {
            step_ms: step_ms.max(1),
            horizons: if holds { in_time } else { [1, 3, 6, 12] },
            floor: 1e-6,
            coverage_memory_steps: 500.0,
            calibration_rate: 0.008,
        }
    }

    /// The step whose end is nearest to this time.
    fn step_number(&self, unix_ms: u64) -> u64 {
        (unix_ms + self.step_ms / 2) / self.step_ms
    }

    fn rates(&self, steps: usize) -> Rates {
        Rates { calibration: self.calibration_rate, stride: (steps / 4).clamp(1, 2) }
    }
}

/// A series of an [`Outlook`], from [`Outlook::open`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SeriesId(usize);

/// Forecasts many series over several horizons. Times and values come in as arguments; nothing else is read, so a recording
/// replays to the same forecasts.
#[derive(Debug, Clone)]
pub struct Outlook {
    config: OutlookConfig,
    names: HashMap<String, SeriesId>,
    series: Vec<OutlookSeries>,
    model: Option<(ModelWeights, Network)>,
    batch: Batch,
    /// Series of this tick, kept between ticks for its memory.
    active: Vec<usize>,
}

impl Outlook {
    /// Knows no series, and of loads what the base does.
    #[must_use]
    pub fn new(config: OutlookConfig) -> Self {
        Self {
            config,
            names: HashMap::new(),
            series: Vec::new(),
            model: base::base().ok().map(with_network),
            batch: Batch::default(),
            active: Vec::new(),
        }
    }

    #[must_use]
    pub fn config(&self) -> &OutlookConfig {
        &self.config
    }

    /// The series of this name, a new one when there is none.
    pub fn open(&mut self, name: &str) -> SeriesId {
        if let Some(id) = self.names.get(name) {
            return *id;
        }
        let id = SeriesId(self.series.len());
        self.series.push(OutlookSeries::new(&self.config));
        self.names.insert(name.to_owned(), id);
        id
    }

    /// The series of this name, if there is one.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<SeriesId> {
        self.names.get(name).copied()
    }

    /// Stops following a series. Other [`SeriesId`]s are void: they are to be found again.
    pub fn forget(&mut self, name: &str) {
        let Some(SeriesId(at)) = self.names.remove(name) else { return };
        self.series.swap_remove(at);
        let moved = SeriesId(self.series.len());
        for id in self.names.values_mut().filter(|id| **id == moved) {
            *id = SeriesId(at);
        }
    }

    /// When the series' newest value was, Unix ms. `None` before its first.
    #[must_use]
    pub fn last_ms(&self, SeriesId(at): SeriesId) -> Option<u64> {
        self.series[at].last_ms
    }

    /// One tick at `tick_unix_ms`: takes each series' value in, scores the forecasts that came due, and makes new ones. A series
    /// is named at most once per tick; a second value counts as a duplicate and is not taken. Allocates nothing.
    pub fn observe(&mut self, tick_unix_ms: u64, values: &[(SeriesId, f64)]) {
        self.active.clear();
        for (SeriesId(at), value) in values {
            if self.series[*at].begin(tick_unix_ms, *value, &self.config) {
                self.active.push(*at);
            }
        }
        if let Some((_, network)) = &self.model {
            self.batch.resize(self.active.len());
            for (row, at) in self.active.iter().enumerate() {
                let series = &self.series[*at];
                self.batch.set(row, &series.inputs, &series.hidden, &series.cell);
            }
            network.step(&mut self.batch);
        }
        for (row, at) in self.active.iter().enumerate() {
            let series = &mut self.series[*at];
            if self.model.is_some() {
                self.batch.state_into(row, &mut series.hidden, &mut series.cell);
                series.finish(Some(self.batch.raw(row)), &self.config);
            } else {
                series.finish(None, &self.config);
            }
        }
    }

    /// What the series is expected to be at each horizon, and who says so. `None` before its first value.
    #[must_use]
    pub fn bands(&self, SeriesId(at): SeriesId) -> Option<[(Quantiles, Champion); HORIZONS]> {
        let latest: Vec<_> = (0..HORIZONS).map_while(|horizon| self.series[at].latest(horizon)).collect();
        let latest = <[_; HORIZONS]>::try_from(latest).ok()?;
        Some(latest.map(|issued| (issued.served(), CANDIDATES[issued.champion])))
    }

    /// Share of the recent values that lay in their 90 % interval, by horizon. `None` until there are enough.
    #[must_use]
    pub fn coverage(&self, SeriesId(at): SeriesId) -> [Option<f64>; HORIZONS] {
        std::array::from_fn(|horizon| self.series[at].horizons[horizon].coverage())
    }

    /// The forecasts of this series that came due at the last tick, and what came.
    pub fn scored(&self, SeriesId(at): SeriesId) -> impl Iterator<Item = Scored> {
        self.series[at].scored()
    }

    /// Puts new weights to work. Their state is filled from the last inputs of every series; they begin to count once enough of
    /// their own forecasts were compared with what came.
    pub fn install(&mut self, weights: ModelWeights) -> Result<(), ImportError> {
        weights.check().map_err(|what| ImportError::BadContent { what: what.to_owned() })?;
        let network = Network::new(&weights);
        let continues = self.model.as_ref().is_some_and(|(now, _)| weights.continues(now));
        self.batch.resize(1);
        for series in &mut self.series {
            series.empty_state();
            if !continues {
                series.forget_network();
            }
            let inputs: Vec<_> = series.replay().copied().collect();
            for inputs in inputs {
                self.batch.set(0, &inputs, &series.hidden, &series.cell);
                network.step(&mut self.batch);
                self.batch.state_into(0, &mut series.hidden, &mut series.cell);
            }
        }
        self.model = Some((weights, network));
        Ok(())
    }

    /// The weights that are installed, to continue training from.
    #[must_use]
    pub fn weights(&self) -> Option<&ModelWeights> {
        self.model.as_ref().map(|(weights, _)| weights)
    }

    /// Weights, scales, linear models and calibration of every series as one image (see [`ImportError`] for what is checked when
    /// it is read back).
    #[must_use]
    pub fn export(&self) -> Vec<u8> {
        let mut series: Vec<(&String, &OutlookSeries)> =
            self.names.iter().map(|(name, SeriesId(at))| (name, &self.series[*at])).collect();
        series.sort_by_key(|(name, _)| *name);
        file::seal(file::OUTLOOK, &(&self.config, self.model.as_ref().map(|(weights, _)| weights), series))
    }

    /// Takes an image up, in the place of all that is known. On an error nothing has changed. Earlier [`SeriesId`]s are void: the
    /// series are to be opened again.
    pub fn import(&mut self, image: &[u8]) -> Result<(), ImportError> {
        type Body = (OutlookConfig, Option<ModelWeights>, Vec<(String, OutlookSeries)>);
        let (config, weights, series): Body = file::open(file::OUTLOOK, image)?;
        let bad = |what: String| ImportError::BadContent { what };
        if config != self.config {
            let clock =
                |config: &OutlookConfig| format!("steps of {} ms, horizons {:?}", config.step_ms, config.horizons);
            return Err(ImportError::OtherClock { found: clock(&config), wanted: clock(&self.config) });
        }
        if let Some(weights) = &weights {
            weights.check().map_err(|what| bad(what.to_owned()))?;
        }
        if let Some((name, _)) = series.iter().find(|(_, series)| !series.is_sound()) {
            return Err(bad(format!("the record of series {name} contradicts itself")));
        }
        let names: HashMap<String, SeriesId> =
            series.iter().enumerate().map(|(at, (name, _))| (name.clone(), SeriesId(at))).collect();
        if names.len() != series.len() {
            return Err(bad("a series is there twice".to_owned()));
        }
        self.names = names;
        self.series = series.into_iter().map(|(_, series)| series).collect();
        self.model = weights.map(with_network);
        Ok(())
    }

    /// Memory held for all series, bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.series.iter().map(OutlookSeries::bytes).sum()
    }
}

fn with_network(weights: ModelWeights) -> (ModelWeights, Network) {
    let network = Network::new(&weights);
    (weights, network)
}
