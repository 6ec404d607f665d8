//! Everything an outlook knows about one series: what is remembered, the candidates' records at each horizon, the network's
//! state, and the forecasts that are not due yet. One tick is [`OutlookSeries::begin`], the network's step,
//! [`OutlookSeries::finish`].

use std::collections::VecDeque;
use std::f64::consts::TAU;

use serde::{Deserialize, Serialize};
use warmswap_model::{Champion, Quantiles};

use super::blend::Blend;
use super::histogram::Histogram;
use super::memory::{MEMORIES, Memory};
use super::{HORIZONS, OutlookConfig};
use crate::calibrate::{COVERAGE_MIN, Conformal, LEVELS, Mean, Points, Rates, Shifts, around, inside};
use crate::linear::Linear;
use crate::lstm::{HIDDEN, INPUTS, quantiles};
use crate::series::{CHANGE_MAX, Series, View, squash};

/// The candidates and whom they stand for. The LSTM stands three times: with a band as wide as its recent errors; with the
/// widths it gives itself, calibrated for this series; and just as it says, which holds what all series have in common.
pub(crate) const CANDIDATES: [Champion; 9] = [
    Champion::LastValue,
    Champion::Seasonal,
    Champion::Ewma,
    Champion::Linear,
    Champion::Histogram,
    Champion::Lstm,
    Champion::Lstm,
    Champion::Lstm,
    Champion::Blend,
];
const LAST_VALUE: usize = 0;
const SEASONAL: usize = 1;
const EWMA: usize = 2;
const LINEAR: usize = 3;
const HISTOGRAM: usize = 4;
pub(super) const LSTM: usize = 5;
const LSTM_OWN_WIDTH: usize = 6;
const LSTM_UNCALIBRATED: usize = 7;
const BLEND: usize = 8;

/// Missing steps that are bridged by holding the last value; more is a gap.
const BRIDGE_MAX: u64 = 6;
/// A gap longer than this, in steps, empties the network's state as well.
const FORGET_AFTER: u64 = 60;
/// Steps whose inputs are kept, to fill the state of newly installed weights.
const REPLAY: usize = 48;
/// Half of what the histogram knows is from the last day.
const HALF_LIFE_MS: f64 = 86_400_000.0;
/// What is left of the weight of what the linear model learned, after a step.
const LINEAR_KEEP: f32 = 0.9995;
/// Step of the shifts of what has widths of its own, in deviations.
const SHIFT_RATE: f64 = 0.015;

/// One horizon's forecast as it was given.
#[derive(Debug, Clone, Copy)]
pub(super) struct Issued {
    view: View,
    pub(super) bands: [[f64; LEVELS]; CANDIDATES.len()],
    /// What the candidates said before calibration.
    points: [Points; CANDIDATES.len()],
    /// Candidates that gave a band at all.
    pub(super) gave: [bool; CANDIDATES.len()],
    pub(super) served: [f64; LEVELS],
    /// Who serves the median.
    pub(super) champion: usize,
}

/// A forecast that came due.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scored {
    /// Place in [`OutlookConfig::horizons`].
    pub horizon: usize,
    pub actual: f64,
    /// What was served.
    pub served: Quantiles,
    pub champion: Champion,
    /// What each candidate said, calibrated; the LSTM in its three forms.
    pub candidates: [(Champion, Option<Quantiles>); CANDIDATES.len()],
}

/// What makes a candidate's band of what it says.
#[derive(Debug, Clone, Serialize, Deserialize)]
enum Calibration {
    /// As wide as its errors were, for who only says a middle.
    Conformal(Conformal),
    /// For who has widths of its own.
    Shifted(Shifts),
    AsSaid,
}

impl Calibration {
    fn new(who: usize, rates: &Rates) -> Self {
        match who {
            LSTM_UNCALIBRATED => Self::AsSaid,
            HISTOGRAM | LSTM_OWN_WIDTH | BLEND => Self::Shifted(Shifts::default()),
            _ => Self::Conformal(Conformal::new(rates, who)),
        }
    }

    fn band(&self, points: &Points, floor: f64) -> [f64; LEVELS] {
        match self {
            Self::Conformal(conformal) => conformal.band(points, floor),
            Self::Shifted(shifts) => shifts.band(points),
            Self::AsSaid => points.map(|point| point.max(0.0)),
        }
    }

    fn score(&mut self, points: &Points, band: &[f64; LEVELS], floor: f64, actual: f64, rates: &Rates) {
        match self {
            Self::Conformal(conformal) => conformal.score(points, band, floor, actual, rates),
            Self::Shifted(shifts) => shifts.score(band, actual, SHIFT_RATE),
            Self::AsSaid => {}
        }
    }

    fn reset(&mut self) {
        match self {
            Self::Conformal(conformal) => conformal.reset(),
            Self::Shifted(shifts) => *shifts = Shifts::default(),
            Self::AsSaid => {}
        }
    }

    fn is_sound(&self) -> bool {
        match self {
            Self::Conformal(conformal) => conformal.is_sound(),
            Self::Shifted(shifts) => shifts.is_sound(),
            Self::AsSaid => true,
        }
    }

    fn bytes(&self) -> usize {
        size_of::<Self>() + if let Self::Conformal(conformal) = self { conformal.heap_bytes() } else { 0 }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Horizon {
    linear: Linear,
    /// By candidate.
    calibrations: Vec<Calibration>,
    blend: Blend,
    served_covered: Mean,
    served: u32,
    #[serde(skip)]
    pending: VecDeque<Option<Issued>>,
    #[serde(skip)]
    due: Option<(Issued, f64)>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct OutlookSeries {
    pub(super) last_ms: Option<u64>,
    memory: Memory,
    histogram: Histogram,
    pub(super) horizons: Vec<Horizon>,
    #[serde(skip)]
    views: [View; HORIZONS],
    #[serde(skip)]
    pub(super) inputs: [f32; INPUTS],
    #[serde(skip)]
    pub(super) hidden: [f32; HIDDEN],
    #[serde(skip)]
    pub(super) cell: [f32; HIDDEN],
    #[serde(skip)]
    replay: VecDeque<[f32; INPUTS]>,
}

impl OutlookSeries {
    pub(super) fn new(config: &OutlookConfig) -> Self {
        let horizon = |steps: &usize| Horizon {
            linear: Linear::new(),
            calibrations: (0..CANDIDATES.len()).map(|who| Calibration::new(who, &config.rates(*steps))).collect(),
            blend: Blend::new(CANDIDATES.len()),
            served_covered: Mean::default(),
            served: 0,
            pending: VecDeque::with_capacity(*steps + 1),
            due: None,
        };
        Self {
            last_ms: None,
            memory: Memory::new(config),
            histogram: Histogram::default(),
            horizons: config.horizons.iter().map(horizon).collect(),
            views: Default::default(),
            inputs: [0.0; INPUTS],
            hidden: [0.0; HIDDEN],
            cell: [0.0; HIDDEN],
            replay: VecDeque::with_capacity(REPLAY),
        }
    }

    /// Takes a value in, scores the forecasts that it completes, and prepares the inputs. `false`: nothing to do for this
    /// value (a duplicate, or no number), and [`Self::finish`] must not be called.
    pub(super) fn begin(&mut self, unix_ms: u64, value: f64, config: &OutlookConfig) -> bool {
        for horizon in &mut self.horizons {
            horizon.due = None;
        }
        let Some(value) = Series::accept(value) else { return false };
        // After an import there is a last time but nothing recent.
        let recent = self.last_ms.filter(|_| self.horizons.iter().all(|horizon| !horizon.pending.is_empty()));
        match recent.map(|last| (config.step_number(unix_ms).checked_sub(config.step_number(last)), last)) {
            Some((Some(0), _)) => return false,
            Some((Some(steps), last)) if steps <= 1 + BRIDGE_MAX => {
                for missing in 1..steps {
                    self.bridge(last + missing * config.step_ms, config);
                }
            }
            Some((steps, _)) => self.restart(value, steps.is_none_or(|steps| steps > FORGET_AFTER)),
            None => self.restart(value, true),
        }
        self.last_ms = Some(unix_ms);
        self.memory.push(unix_ms, value, true, config);
        self.histogram.push(value, self.memory.floor(config), 0.5f64.powf(config.step_ms as f64 / HALF_LIFE_MS));
        for (at, steps) in config.horizons.iter().enumerate() {
            if self.horizons[at].pending.len() >= *steps
                && let Some(Some(issued)) = self.horizons[at].pending.pop_front()
            {
                self.horizons[at].score(issued, value, *steps, config);
            }
        }
        self.prepare(unix_ms, config);
        true
    }

    /// What a gap leaves: what is usual, the linear models and the calibration stay, recent values and open forecasts go.
    fn restart(&mut self, value: f64, forget_state: bool) {
        self.memory.restart(value);
        for horizon in &mut self.horizons {
            horizon.pending.clear();
        }
        self.replay.clear();
        if forget_state {
            self.empty_state();
        }
    }

    fn bridge(&mut self, unix_ms: u64, config: &OutlookConfig) {
        self.memory.push(unix_ms, self.memory.value(0), false, config);
        for (horizon, steps) in self.horizons.iter_mut().zip(config.horizons) {
            if horizon.pending.len() >= steps {
                horizon.pending.pop_front();
            }
            horizon.pending.push_back(None);
        }
    }

    fn prepare(&mut self, unix_ms: u64, config: &OutlookConfig) {
        let memory = &self.memory;
        let last = memory.value(0);
        let ahead = |horizon: usize| unix_ms + config.horizons[horizon] as u64 * config.step_ms;
        for (at, view) in self.views.iter_mut().enumerate() {
            let scale = memory.scale(at, config);
            let per_scale = |value: f64| (((value - last) / scale) as f32).clamp(-CHANGE_MAX, CHANGE_MAX);
            let linear_inputs = [
                per_scale(memory.value(1)),
                per_scale(memory.value(2)),
                per_scale(memory.means[0]),
                per_scale(memory.means[1]),
                per_scale(memory.means[2]),
                per_scale(memory.level()),
                per_scale(memory.season.yesterday(ahead(at)).unwrap_or(last)),
                0.25,
            ];
            let change = self.horizons[at].linear.predict(&linear_inputs);
            *view = View { last, scale, linear_inputs, linear: last + scale * f64::from(change) };
        }
        // All of the network's inputs are in one scale, that of the second horizon.
        let scale = self.views[1].scale;
        let per_scale = |value: f64| squash(((value - last) / scale) as f32);
        let known = |value: Option<f64>| per_scale(value.unwrap_or(last));
        let share = |value: f64| (value / scale + 0.02).ln() as f32;
        let mut inputs = self.inputs.iter_mut();
        let mut put = |value: f32| {
            if let Some(input) = inputs.next() {
                *input = value;
            }
        };
        for back in [1, 2, 3, 5, 8] {
            put(per_scale(memory.value(back)));
        }
        for mean in memory.means {
            put(per_scale(mean));
        }
        for at in 0..HORIZONS {
            put(known(memory.season.yesterday(ahead(at))));
        }
        put(known(memory.season.usual(ahead(0))));
        put(known(memory.season.usual(ahead(2))));
        put(known(memory.season.last_week(ahead(1))));
        for view in &self.views {
            put(per_scale(view.linear));
        }
        for at in 0..MEMORIES.len() {
            put(share(memory.moves[at]));
        }
        put(per_scale(memory.high));
        put(per_scale(memory.low));
        const WEEK_MS: u64 = 604_800_000;
        for period in [WEEK_MS / 7, WEEK_MS] {
            let (sin, cos) = ((unix_ms % period) as f64 / period as f64 * TAU).sin_cos();
            put(sin as f32);
            put(cos as f32);
        }
        put(((scale / (memory.level().abs() + memory.floor(config))).ln() as f32 / 4.0).clamp(-2.0, 2.0));
        put((self.views[HORIZONS - 1].scale / self.views[0].scale).ln() as f32);
        if self.replay.len() == REPLAY {
            self.replay.pop_front();
        }
        self.replay.push_back(self.inputs);
    }

    /// Makes the forecasts of this tick. `raw` are the network's outputs, when there is one.
    pub(super) fn finish(&mut self, raw: Option<&[f32]>, config: &OutlookConfig) {
        let now = self.last_ms.unwrap_or(0);
        let histogram = self.histogram.quantiles(Quantiles::LEVELS);
        for (at, horizon) in self.horizons.iter_mut().enumerate() {
            let view = self.views[at];
            let ahead = now + config.horizons[at] as u64 * config.step_ms;
            let mut issued = Issued {
                view,
                bands: [[0.0; LEVELS]; CANDIDATES.len()],
                points: [[0.0; LEVELS]; CANDIDATES.len()],
                gave: [false; CANDIDATES.len()],
                served: [0.0; LEVELS],
                champion: LAST_VALUE,
            };
            let flat = |centre: f64| around(centre, config.floor);
            horizon.give(&mut issued, LAST_VALUE, flat(view.last), config);
            if let Some(yesterday) = self.memory.season.yesterday(ahead) {
                horizon.give(&mut issued, SEASONAL, flat(yesterday), config);
            }
            horizon.give(&mut issued, EWMA, flat(self.memory.means[0]), config);
            if horizon.linear.is_ready() {
                horizon.give(&mut issued, LINEAR, flat(view.linear), config);
            }
            if let Some(points) = histogram {
                horizon.give(&mut issued, HISTOGRAM, points, config);
            }
            if let Some(raw) = raw {
                let points = quantiles(raw, at).map(|q| view.linear + view.scale * f64::from(q));
                if points.iter().all(|point| point.is_finite()) {
                    horizon.give(&mut issued, LSTM, flat(points[1]), config);
                    horizon.give(&mut issued, LSTM_OWN_WIDTH, points, config);
                    horizon.give(&mut issued, LSTM_UNCALIBRATED, points, config);
                }
            }
            if let Some(points) = horizon.blend.band(&issued.bands[..BLEND], &issued.gave[..BLEND]) {
                horizon.give(&mut issued, BLEND, points, config);
            }
            // Before anybody has shown anything: what the network knows of all series, with the widths it gives itself.
            let untried = if issued.gave[LSTM_UNCALIBRATED] { LSTM_UNCALIBRATED } else { LAST_VALUE };
            let best: [usize; LEVELS] =
                std::array::from_fn(|level| horizon.blend.best(level, &issued.gave).unwrap_or(untried));
            issued.served = std::array::from_fn(|level| issued.bands[best[level]][level]);
            issued.served.sort_by(f64::total_cmp);
            issued.champion = best[1];
            horizon.pending.push_back(Some(issued));
        }
    }

    /// New weights have shown nothing yet: their record begins again, and open forecasts of the old ones are dropped.
    pub(super) fn forget_network(&mut self) {
        for horizon in &mut self.horizons {
            for who in [LSTM, LSTM_OWN_WIDTH, LSTM_UNCALIBRATED] {
                horizon.calibrations[who].reset();
                horizon.blend.forget(who);
                for issued in horizon.pending.iter_mut().flatten() {
                    issued.gave[who] = false;
                }
            }
        }
    }

    pub(super) fn empty_state(&mut self) {
        self.hidden = [0.0; HIDDEN];
        self.cell = [0.0; HIDDEN];
    }

    /// Inputs of the last steps, oldest first.
    pub(super) fn replay(&self) -> impl Iterator<Item = &[f32; INPUTS]> {
        self.replay.iter()
    }

    /// Of each horizon: the linear model's median and the scale, which targets are measured from and in.
    pub(super) fn origin(&self) -> [(f64, f64); HORIZONS] {
        self.views.map(|view| (view.linear, view.scale))
    }

    pub(super) fn latest(&self, horizon: usize) -> Option<&Issued> {
        self.horizons[horizon].pending.back()?.as_ref()
    }

    pub(super) fn last_value(&self) -> f64 {
        self.memory.value(0)
    }

    /// What came due at the last tick.
    pub(super) fn scored(&self) -> impl Iterator<Item = Scored> {
        self.horizons.iter().enumerate().filter_map(|(at, horizon)| {
            let (issued, actual) = horizon.due.as_ref()?;
            let candidate =
                |who: usize| (CANDIDATES[who], issued.gave[who].then(|| Quantiles::from_levels(issued.bands[who])));
            Some(Scored {
                horizon: at,
                actual: *actual,
                served: issued.served(),
                champion: CANDIDATES[issued.champion],
                candidates: std::array::from_fn(candidate),
            })
        })
    }

    /// Whether an import brought something that this code could have made.
    pub(super) fn is_sound(&self) -> bool {
        self.memory.is_sound()
            && self.histogram.is_sound()
            && self.horizons.len() == HORIZONS
            && self.horizons.iter().all(|horizon| {
                horizon.calibrations.len() == CANDIDATES.len()
                    && horizon.calibrations.iter().all(Calibration::is_sound)
                    && horizon.blend.is_sound(CANDIDATES.len())
            })
    }

    pub(super) fn bytes(&self) -> usize {
        let horizon = |horizon: &Horizon| {
            size_of::<Horizon>()
                + horizon.pending.capacity() * size_of::<Option<Issued>>()
                + horizon.calibrations.iter().map(Calibration::bytes).sum::<usize>()
        };
        size_of::<Self>()
            + self.memory.heap_bytes()
            + self.histogram.heap_bytes()
            + self.replay.capacity() * size_of::<[f32; INPUTS]>()
            + self.horizons.iter().map(horizon).sum::<usize>()
    }
}

impl Horizon {
    fn give(&self, issued: &mut Issued, who: usize, points: Points, config: &OutlookConfig) {
        issued.bands[who] = self.calibrations[who].band(&points, config.floor);
        issued.points[who] = points;
        issued.gave[who] = true;
    }

    fn score(&mut self, issued: Issued, actual: f64, steps: usize, config: &OutlookConfig) {
        let rates: Rates = config.rates(steps);
        for who in (0..CANDIDATES.len()).filter(|who| issued.gave[*who]) {
            self.calibrations[who].score(&issued.points[who], &issued.bands[who], config.floor, actual, &rates);
            self.blend.score(who, &issued.bands[who], actual);
        }
        let View { last, scale, linear_inputs, .. } = issued.view;
        self.linear.learn(&linear_inputs, ((actual - last) / scale) as f32, LINEAR_KEEP);
        self.served = self.served.saturating_add(1);
        let covered = f64::from(u8::from(inside(&issued.served, actual)));
        self.served_covered.add(covered, 1.0, config.coverage_memory_steps);
        self.due = Some((issued, actual));
    }

    pub(super) fn coverage(&self) -> Option<f64> {
        if self.served >= COVERAGE_MIN { self.served_covered.get() } else { None }
    }
}

impl Issued {
    pub(super) fn served(&self) -> Quantiles {
        Quantiles::from_levels(self.served)
    }
}
