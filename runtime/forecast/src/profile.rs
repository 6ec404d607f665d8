//! Everything the forecaster knows about one service: its four series, the candidates' records, the network's state,
//! and the forecasts that are not due yet. One tick is [`Profile::begin`], the network's step, [`Profile::finish`].

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};
use warmswap_model::{Champion, FeatureWindow, Quantiles, Resource};

use crate::ForecastConfig;
use crate::calibrate::{COVERAGE_MIN, LEVELS, Mean, Points, Rates, Tracker, around, inside};
use crate::lstm::{HIDDEN, INPUTS, TARGETS, quantiles};
use crate::series::{SERIES_INPUTS, Series, View, squash};

/// The candidates and whom they stand for. The LSTM stands twice: with a band as wide as its recent errors, and with
/// the widths it gives itself. The second is better where it knows when it does not know, the first where spikes
/// spoil the scale that its widths are measured in.
pub(crate) const CANDIDATES: [Champion; 4] = [Champion::LastValue, Champion::Linear, Champion::Lstm, Champion::Lstm];
const LAST_VALUE: usize = 0;
const LINEAR: usize = 1;
pub(crate) const LSTM: usize = 2;
const LSTM_OWN_WIDTH: usize = 3;

/// Width, in floors, that a candidate without widths of its own is given; it cancels out once there are scores.
const FLAT_WIDTH: f64 = 1.0;

/// Missing steps that are bridged by holding the last value; more is a gap.
const BRIDGE_MAX: i128 = 2;
/// A gap longer than this, in steps, empties the network's state as well.
const FORGET_AFTER: i128 = 60;
/// Steps whose inputs are kept, to fill the state of newly installed weights.
pub(crate) const REPLAY: usize = 48;
/// Steps before targets are used for training: scales and the linear model are not settled.
const SETTLE: u64 = 30;
/// Inputs that come from probe counts.
const PROBES: usize = INPUTS - RESOURCES * SERIES_INPUTS;
/// Steps over which a probe's usual rate is averaged.
const PROBE_MEMORY: f32 = 300.0;
/// Steps over which confidence is averaged, and the wrong forecasts it begins with.
const CONFIDENCE_MEMORY: f64 = 120.0;
const CONFIDENCE_PRIOR: f64 = 3.0;
/// What is left of the weight of what the linear models learned, after a step: half of it is younger than about 350 steps.
const LINEAR_KEEP: f32 = 0.998;

const RESOURCES: usize = Resource::ALL.len();

/// What the network sees of one step, and what came of it: changes against the linear model's median, in scales.
#[derive(Debug, Clone)]
pub(crate) struct Sample {
    pub(crate) inputs: [f32; INPUTS],
    pub(crate) targets: Option<[f32; TARGETS]>,
}

/// One resource's forecast as it was given.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Given {
    view: View,
    pub(crate) bands: [[f64; LEVELS]; CANDIDATES.len()],
    /// What the candidates said before calibration.
    points: [Points; CANDIDATES.len()],
    floor: f64,
    /// Candidates that gave a band at all.
    gave: [bool; CANDIDATES.len()],
    pub(crate) champion: usize,
}

#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Issued {
    pub(crate) serial: u64,
    pub(crate) given: [Given; RESOURCES],
}

/// What came of a forecast, for training.
#[derive(Debug, Clone, Copy)]
struct Due {
    serial: u64,
    targets: [f32; RESOURCES],
}

/// Counts of what was not an ordinary step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Irregular {
    /// Windows for a time that was there already.
    pub duplicates: u64,
    /// Missing windows that were bridged.
    pub bridged: u64,
    /// Longer gaps and clock jumps, after which the short-term state began again.
    pub gaps: u64,
    /// Values that were not finite or negative; the value before took their place.
    pub bad_values: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Profile {
    last_ms: Option<u64>,
    pub(crate) samples: u64,
    pub(crate) irregular: Irregular,
    series: [Series; RESOURCES],
    probe_levels: [f32; PROBES],
    trackers: [[Tracker; CANDIDATES.len()]; RESOURCES],
    champions: [usize; RESOURCES],
    served_covered: [Mean; RESOURCES],
    served: u32,
    /// Medians within the tolerance.
    right: [Mean; RESOURCES],
    #[serde(skip)]
    pending: VecDeque<Option<Issued>>,
    #[serde(skip)]
    due: Option<Due>,
    #[serde(skip)]
    views: [View; RESOURCES],
    #[serde(skip)]
    pub(crate) inputs: [f32; INPUTS],
    #[serde(skip)]
    pub(crate) hidden: [f32; HIDDEN],
    #[serde(skip)]
    pub(crate) cell: [f32; HIDDEN],
    /// Inputs of the last [`REPLAY`] steps, oldest at `replay_head` once full.
    #[serde(skip)]
    replay: Vec<[f32; INPUTS]>,
    #[serde(skip)]
    replay_head: usize,
}

impl Profile {
    pub(crate) fn new(config: &ForecastConfig) -> Self {
        let rates = Rates::new(config);
        Self {
            last_ms: None,
            samples: 0,
            irregular: Irregular::default(),
            series: std::array::from_fn(|_| Series::new()),
            probe_levels: [0.0; PROBES],
            trackers: std::array::from_fn(|at| std::array::from_fn(|who| Tracker::new(&rates, at + who))),
            champions: [LAST_VALUE; RESOURCES],
            served_covered: Default::default(),
            served: 0,
            right: Default::default(),
            pending: VecDeque::with_capacity(config.horizon_steps + 1),
            due: None,
            views: Default::default(),
            inputs: [0.0; INPUTS],
            hidden: [0.0; HIDDEN],
            cell: [0.0; HIDDEN],
            replay: Vec::with_capacity(REPLAY),
            replay_head: 0,
        }
    }

    /// Takes a window in, scores the forecast that it completes, and prepares the inputs. `false`: nothing to do for
    /// this window (a duplicate), and [`Self::finish`] must not be called.
    pub(crate) fn begin(&mut self, unix_ms: u64, window: &FeatureWindow, config: &ForecastConfig) -> bool {
        let step_ms = i128::from(config.step_ms);
        let steps = match self.last_ms {
            None => 1,
            Some(last) => (i128::from(unix_ms) - i128::from(last) + step_ms / 2).div_euclid(step_ms),
        };
        let horizon = config.horizon_steps as i128;
        if (1 - horizon..=0).contains(&steps) {
            self.irregular.duplicates += 1;
            return false;
        }
        // After an import there is a last time but nothing recent.
        let begins = self.last_ms.is_none() || self.pending.is_empty();
        self.last_ms = Some(unix_ms);
        let values = self.values(window);
        if begins || !(1..=1 + BRIDGE_MAX).contains(&steps) {
            self.restart(&values, begins || !(0..=FORGET_AFTER).contains(&steps));
        } else {
            for _ in 1..steps {
                self.bridge(config.horizon_steps);
            }
        }
        for (series, value) in self.series.iter_mut().zip(values) {
            series.push(value);
        }
        self.samples = self.samples.saturating_add(1);
        if self.pending.len() >= config.horizon_steps
            && let Some(Some(issued)) = self.pending.pop_front()
        {
            self.score(&issued, config);
        }
        self.prepare(window, config);
        true
    }

    /// Usable values; a bad one is replaced by the one before.
    fn values(&mut self, window: &FeatureWindow) -> [f64; RESOURCES] {
        std::array::from_fn(|at| {
            Series::accept(window.usage[Resource::ALL[at]]).unwrap_or_else(|| {
                self.irregular.bad_values += 1;
                self.series[at].value(0)
            })
        })
    }

    /// What a gap leaves: scales, the linear models and the calibration stay, recent values and open forecasts go.
    fn restart(&mut self, values: &[f64; RESOURCES], forget_state: bool) {
        if self.samples > 0 {
            self.irregular.gaps += 1;
        }
        for (series, value) in self.series.iter_mut().zip(values) {
            series.restart(*value);
        }
        self.pending.clear();
        self.replay.clear();
        self.replay_head = 0;
        if forget_state {
            self.empty_state();
        }
    }

    fn bridge(&mut self, horizon: usize) {
        self.irregular.bridged += 1;
        for series in &mut self.series {
            series.push(series.value(0));
        }
        if self.pending.len() >= horizon {
            self.pending.pop_front();
        }
        self.pending.push_back(None);
    }

    fn score(&mut self, issued: &Issued, config: &ForecastConfig) {
        let rates = Rates::new(config);
        let mut targets = [0f32; RESOURCES];
        self.served = self.served.saturating_add(1);
        for (at, given) in issued.given.iter().enumerate() {
            let actual = self.series[at].outcome(Resource::ALL[at], config.horizon_steps);
            let view = &given.view;
            targets[at] = ((actual - view.linear) / view.scale) as f32;
            for (who, tracker) in self.trackers[at].iter_mut().enumerate() {
                if given.gave[who] {
                    tracker.score(&given.points[who], &given.bands[who], given.floor, actual, &rates);
                }
            }
            self.series[at].linear.learn(&view.linear_inputs, ((actual - view.last) / view.scale) as f32, LINEAR_KEEP);
            let band = &given.bands[given.champion];
            self.served_covered[at].add(f64::from(u8::from(inside(band, actual))), config.coverage_memory_steps);
            let allowed = (config.confidence_tolerance * actual).max(config.confidence_floor[Resource::ALL[at]]);
            self.right[at].add(f64::from(u8::from((actual - band[1]).abs() <= allowed)), CONFIDENCE_MEMORY);
        }
        self.due = Some(Due { serial: issued.serial, targets });
    }

    fn prepare(&mut self, window: &FeatureWindow, config: &ForecastConfig) {
        let (series_inputs, probe_inputs) = self.inputs.split_at_mut(RESOURCES * SERIES_INPUTS);
        for (at, inputs) in series_inputs.chunks_exact_mut(SERIES_INPUTS).enumerate() {
            let floor = self.series[at].floor(config.floor[Resource::ALL[at]]);
            let scale = self.trackers[at][LAST_VALUE].error(floor);
            self.views[at] = self.series[at].view(scale, floor, inputs);
        }
        let seconds = f64::from(window.length_ms.max(1)) / 1e3;
        let rate = (1.0 / PROBE_MEMORY).max(1.0 / (self.samples.min(1 << 20)) as f32);
        let logs = probe_logs(window, seconds);
        for ((input, level), log) in probe_inputs.iter_mut().zip(&mut self.probe_levels).zip(logs) {
            *input = squash(2.0 * (log - *level));
            *level += rate * (log - *level);
        }
        if self.replay.len() < REPLAY {
            self.replay.push(self.inputs);
        } else {
            self.replay[self.replay_head] = self.inputs;
            self.replay_head = (self.replay_head + 1) % REPLAY;
        }
    }

    /// Makes the forecasts of this tick. `raw` are the network's outputs, when there is one.
    pub(crate) fn finish(&mut self, raw: Option<&[f32]>, config: &ForecastConfig) {
        let mut issued = Issued { serial: self.samples, ..Issued::default() };
        for (at, given) in issued.given.iter_mut().enumerate() {
            let view = self.views[at];
            let floor = self.series[at].floor(config.floor[Resource::ALL[at]]);
            given.view = view;
            given.floor = floor;
            let trackers = &self.trackers[at];
            let mut give = |who: usize, points: Points| {
                given.bands[who] = trackers[who].band(&points, floor);
                given.points[who] = points;
                given.gave[who] = true;
            };
            let flat = FLAT_WIDTH * config.floor[Resource::ALL[at]];
            give(LAST_VALUE, around(view.last, flat));
            if self.series[at].linear.is_ready() {
                give(LINEAR, around(view.linear, flat));
            }
            if let Some(raw) = raw {
                let points = quantiles(raw, at).map(|q| view.linear + view.scale * f64::from(q));
                if points.iter().all(|point| point.is_finite()) {
                    give(LSTM, around(points[1], flat));
                    give(LSTM_OWN_WIDTH, points);
                }
            }
            given.champion = self.choose(at, &given.gave, config);
            self.champions[at] = given.champion;
        }
        self.pending.push_back(Some(issued));
    }

    /// The candidate with the lowest recent loss among those with evidence; the champion stays unless clearly beaten.
    fn choose(&self, at: usize, gave: &[bool; CANDIDATES.len()], config: &ForecastConfig) -> usize {
        let loss = |who: usize| {
            let tracker = &self.trackers[at][who];
            let serves = gave[who] && (who == LAST_VALUE || tracker.scored >= config.evidence_min);
            if serves { tracker.loss() } else { None }
        };
        let mut champion = self.champions[at];
        let mut bar = match loss(champion) {
            Some(loss) => loss * config.challenger_ratio,
            None => {
                champion = LAST_VALUE;
                loss(LAST_VALUE).unwrap_or(f64::MAX)
            }
        };
        for who in 0..CANDIDATES.len() {
            if who != champion
                && let Some(loss) = loss(who)
                && loss < bar
            {
                champion = who;
                bar = loss;
            }
        }
        champion
    }

    /// One step of training data: as [`Self::begin`] and [`Self::finish`] without a network.
    pub(crate) fn replay(&mut self, window: &FeatureWindow, config: &ForecastConfig, samples: &mut Vec<Sample>) {
        if !self.begin(window.end_unix_ms, window, config) {
            return;
        }
        samples.push(Sample { inputs: self.inputs, targets: None });
        if let Some(due) = self.due.take()
            && due.serial > SETTLE
            && let Some(sample) = samples.get_mut(due.serial as usize - 1)
        {
            sample.targets = Some(due.targets);
        }
        self.finish(None, config);
    }

    /// New weights have shown nothing yet: their record begins again, and open forecasts of the old ones are dropped.
    pub(crate) fn forget_network(&mut self) {
        for trackers in &mut self.trackers {
            trackers[LSTM].reset();
            trackers[LSTM_OWN_WIDTH].reset();
        }
        for issued in self.pending.iter_mut().flatten() {
            for given in &mut issued.given {
                given.gave[LSTM] = false;
                given.gave[LSTM_OWN_WIDTH] = false;
            }
        }
    }

    pub(crate) fn empty_state(&mut self) {
        self.hidden = [0.0; HIDDEN];
        self.cell = [0.0; HIDDEN];
    }

    pub(crate) fn replay_len(&self) -> usize {
        self.replay.len()
    }

    /// Inputs of the kept steps, `at` counted from the oldest.
    pub(crate) fn replay_inputs(&self, at: usize) -> &[f32; INPUTS] {
        &self.replay[(self.replay_head + at) % self.replay.len()]
    }

    /// The newest forecast; `None` before the first and right after an import.
    pub(crate) fn latest(&self) -> Option<&Issued> {
        self.pending.back()?.as_ref()
    }

    pub(crate) fn last_value(&self, at: usize) -> f64 {
        self.series[at].value(0)
    }

    pub(crate) fn tracker(&self, at: usize, who: usize) -> &Tracker {
        &self.trackers[at][who]
    }

    pub(crate) fn coverage(&self, at: usize) -> Option<f64> {
        if self.served >= COVERAGE_MIN { self.served_covered[at].get() } else { None }
    }

    pub(crate) fn confidence(&self) -> f64 {
        self.right.iter().map(|right| right.with_zeros(CONFIDENCE_PRIOR)).fold(1.0, f64::min).clamp(0.0, 1.0)
    }

    /// Whether an import brought something that this code could have made.
    pub(crate) fn is_sound(&self) -> bool {
        self.trackers.iter().flatten().all(Tracker::is_sound)
            && self.champions.iter().all(|who| *who < CANDIDATES.len())
            && self.series.iter().all(Series::is_sound)
    }

    pub(crate) fn bytes(&self) -> usize {
        size_of::<Self>()
            + self.pending.capacity() * size_of::<Option<Issued>>()
            + self.replay.capacity() * size_of::<[f32; INPUTS]>()
            + self.trackers.iter().flatten().map(Tracker::heap_bytes).sum::<usize>()
    }
}

impl Given {
    pub(crate) fn served(&self) -> Quantiles {
        Quantiles::from_levels(self.bands[self.champion])
    }

    pub(crate) fn gave(&self, who: usize) -> bool {
        self.gave[who]
    }
}

/// Rates per second that foretell usage, as logarithms: they span orders of magnitude.
fn probe_logs(window: &FeatureWindow, seconds: f64) -> [f32; PROBES] {
    let c = &window.counts;
    let requests =
        window.durations.request_latency.buckets.iter().fold(0u64, |sum, (_, count)| sum.saturating_add(*count));
    [
        c.reads.saturating_add(c.writes),
        c.rx_packets,
        c.tx_packets,
        c.tcp_opened,
        c.execs.saturating_add(c.forks),
        c.page_faults,
        c.block_requests,
        requests.saturating_add(c.tty_inputs).saturating_add(c.device_inputs),
    ]
    .map(|count| ((count as f64 / seconds) as f32).ln_1p())
}
