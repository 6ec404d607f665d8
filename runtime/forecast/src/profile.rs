//! Everything the forecaster knows about one service: its four series, the candidates' records, the network's state,
//! and the forecasts that are not due yet. One tick is [`Profile::begin`], the network's step, [`Profile::finish`].

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};
use warmswap_model::{Champion, FeatureWindow, Quantiles, Resource};

use crate::ForecastConfig;
use crate::calibrate::{COVERAGE_MIN, LEVELS, Mean, Points, around, inside};
use crate::lstm::{HIDDEN, INPUTS, OUTPUTS, TARGETS, quantiles};
use crate::series::{SERIES_INPUTS, Series, View, squash};
use crate::tracker::{Said, Tracker};

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
/// Until a candidate has so many scores, every forecast is compared with what came. Later forecasts whose steps overlap say
/// nearly the same: one in a horizon is compared, and stands for all of it.
const EAGER_UNTIL: u32 = 64;

const RESOURCES: usize = Resource::ALL.len();

/// What the network sees of one step, and what came of it: changes against the linear model's median, in scales.
#[derive(Debug, Clone)]
pub(crate) struct Sample {
    pub(crate) inputs: [f32; INPUTS],
    pub(crate) targets: Option<[f32; TARGETS]>,
}

/// One resource's forecast as it was given, to be compared with what comes.
#[derive(Debug, Clone, Copy, Default)]
struct Given {
    /// `None`: the candidate gave nothing.
    said: [Option<Said>; CANDIDATES.len()],
    champion: usize,
}

#[derive(Debug, Clone, Copy, Default)]
struct Issued {
    due_age: u64,
    /// Steps that it stands for when it is compared.
    steps: usize,
    given: [Given; RESOURCES],
}

/// Where a forecast started from.
#[derive(Debug, Clone, Copy)]
struct Start {
    due_age: u64,
    serial: u64,
    views: [View; RESOURCES],
}

/// What came of it.
#[derive(Debug, Clone, Copy)]
struct Came {
    serial: u64,
    actual: [f64; RESOURCES],
    /// The same as the network is trained to say it.
    targets: [f32; TARGETS],
}

/// Who serves a resource, and with which band.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Served {
    pub(crate) champion: usize,
    band: [f64; LEVELS],
}

impl Served {
    pub(crate) fn quantiles(&self) -> Quantiles {
        Quantiles::from_levels(self.band)
    }
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
    served_scored: u32,
    /// Medians within the tolerance.
    right: [Mean; RESOURCES],
    /// Steps since the recent values began; 0: there are none.
    #[serde(skip)]
    age: u64,
    /// Where forecasts started from whose horizon has not passed.
    #[serde(skip)]
    starts: VecDeque<Start>,
    #[serde(skip)]
    came: Option<Came>,
    /// Forecasts that are to be compared, in the order in which they are due.
    #[serde(skip)]
    open: Vec<Issued>,
    #[serde(skip)]
    served: Option<[Served; RESOURCES]>,
    #[serde(skip)]
    views: [View; RESOURCES],
    /// What the network gave at the last step.
    #[serde(skip)]
    raw: Option<[f32; OUTPUTS]>,
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
        Self {
            last_ms: None,
            samples: 0,
            irregular: Irregular::default(),
            series: std::array::from_fn(|_| Series::new()),
            probe_levels: [0.0; PROBES],
            trackers: std::array::from_fn(|_| std::array::from_fn(|_| Tracker::new())),
            champions: [LAST_VALUE; RESOURCES],
            served_covered: Default::default(),
            served_scored: 0,
            right: Default::default(),
            age: 0,
            starts: VecDeque::with_capacity(config.horizon_steps + 1),
            came: None,
            open: Vec::new(),
            served: None,
            views: Default::default(),
            raw: None,
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
        let begins = self.age == 0;
        self.last_ms = Some(unix_ms);
        let values = self.values(window);
        if begins || !(1..=1 + BRIDGE_MAX).contains(&steps) {
            self.restart(&values, begins || !(0..=FORGET_AFTER).contains(&steps));
        } else {
            for _ in 1..steps {
                self.irregular.bridged += 1;
                self.push(&std::array::from_fn(|at| self.series[at].value(0)));
            }
        }
        self.push(&values);
        self.samples = self.samples.saturating_add(1);
        self.learn(config);
        self.compare(config);
        self.prepare(window, config);
        true
    }

    fn push(&mut self, values: &[f64; RESOURCES]) {
        for (series, value) in self.series.iter_mut().zip(values) {
            series.push(*value);
        }
        self.age += 1;
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
        self.age = 0;
        self.starts.clear();
        self.open.clear();
        self.replay.clear();
        self.replay_head = 0;
        if forget_state {
            self.empty_state();
        }
    }

    /// The linear models learn from each step.
    fn learn(&mut self, config: &ForecastConfig) {
        self.came = None;
        // What came due at a bridged step is compared with nothing.
        while let Some(start) = self.starts.pop_front_if(|start| start.due_age <= self.age) {
            if start.due_age < self.age {
                continue;
            }
            let actual = std::array::from_fn(|at| self.series[at].outcome(Resource::ALL[at], config.horizon_steps));
            let mut targets = [0f32; TARGETS];
            for (at, view) in start.views.iter().enumerate() {
                targets[at] = ((actual[at] - view.linear) / view.scale) as f32;
                let change = ((actual[at] - view.last) / view.scale) as f32;
                self.series[at].linear.learn(&view.linear_inputs, change, LINEAR_KEEP);
            }
            self.came = Some(Came { serial: start.serial, actual, targets });
        }
    }

    /// Compares the forecast that is due, if it is one of those that are compared.
    fn compare(&mut self, config: &ForecastConfig) {
        let past = self.open.iter().take_while(|issued| issued.due_age < self.age).count();
        self.open.drain(..past);
        let Some((issued, came)) = self.open.first().filter(|issued| issued.due_age == self.age).zip(self.came) else {
            return;
        };
        let steps = issued.steps as f64;
        self.served_scored = self.served_scored.saturating_add(1);
        for (at, (given, actual)) in issued.given.iter().zip(came.actual).enumerate() {
            for (tracker, said) in self.trackers[at].iter_mut().zip(&given.said) {
                if let Some(said) = said {
                    tracker.score(said, actual, steps, config);
                }
            }
            let Some(Said { band, .. }) = &given.said[given.champion] else { continue };
            let yes = |is: bool| f64::from(u8::from(is));
            self.served_covered[at].add(yes(inside(band, actual)), steps, config.coverage_memory_steps);
            let allowed = (config.confidence_tolerance * actual).max(config.confidence_floor[Resource::ALL[at]]);
            self.right[at].add(yes((actual - band[1]).abs() <= allowed), steps, CONFIDENCE_MEMORY);
        }
        self.open.drain(..1);
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

    /// Makes the forecasts of this tick. `raw` are the network's outputs, when there is one; `turn` says which steps are this
    /// profile's, where others have others, so that every tick has as much to do.
    pub(crate) fn finish(&mut self, raw: Option<&[f32]>, turn: usize, config: &ForecastConfig) {
        self.raw = raw.and_then(|raw| raw.try_into().ok());
        let horizon = config.horizon_steps as u64;
        let due_age = self.age + horizon;
        self.starts.push_back(Start { due_age, serial: self.samples, views: self.views });
        let eager = self.trackers[0][LAST_VALUE].scored < EAGER_UNTIL
            || (self.raw.is_some() && self.trackers[0][LSTM].scored < EAGER_UNTIL);
        if eager || is_turn(self.age + turn as u64, horizon) {
            let mut issued =
                Issued { due_age, steps: if eager { 1 } else { config.horizon_steps }, ..Issued::default() };
            let mut served = [Served::default(); RESOURCES];
            for (at, (given, served)) in issued.given.iter_mut().zip(&mut served).enumerate() {
                given.said = std::array::from_fn(|who| self.say(at, who, config));
                given.champion = self.choose(at, &given.said, config);
                let band = given.said[given.champion].map_or([0.0; LEVELS], |said| said.band);
                *served = Served { champion: given.champion, band };
                self.champions[at] = given.champion;
            }
            self.open.push(issued);
            self.served = Some(served);
        } else {
            self.served = Some(std::array::from_fn(|at| self.serve(at, config)));
        }
    }

    /// The champion's band; the last value's where the champion has nothing to say.
    fn serve(&self, at: usize, config: &ForecastConfig) -> Served {
        let said = |who| self.say(at, who, config).map(|said| Served { champion: who, band: said.band });
        said(self.champions[at]).or_else(|| said(LAST_VALUE)).unwrap_or_default()
    }

    /// What a candidate says of the horizon that began with the newest window.
    pub(crate) fn say(&self, at: usize, who: usize, config: &ForecastConfig) -> Option<Said> {
        let view = &self.views[at];
        let flat = |centre: f64| around(centre, FLAT_WIDTH * config.floor[Resource::ALL[at]]);
        let points: Points = match who {
            LAST_VALUE => flat(view.last),
            LINEAR if !self.series[at].linear.is_ready() => return None,
            LINEAR => flat(view.linear),
            _ => {
                let points = quantiles(self.raw.as_ref()?, at).map(|q| view.linear + view.scale * f64::from(q));
                if !points.iter().all(|point| point.is_finite()) {
                    return None;
                }
                if who == LSTM_OWN_WIDTH { points } else { flat(points[1]) }
            }
        };
        let floor = self.series[at].floor(config.floor[Resource::ALL[at]]);
        Some(self.trackers[at][who].say(&points, floor))
    }

    /// The candidate with the lowest recent loss among those with evidence; the champion stays unless clearly beaten.
    fn choose(&self, at: usize, said: &[Option<Said>; CANDIDATES.len()], config: &ForecastConfig) -> usize {
        let loss = |who: usize| {
            let tracker = &self.trackers[at][who];
            let serves = said[who].is_some() && (who == LAST_VALUE || tracker.scored >= config.evidence_min);
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
        if let Some(came) = self.came
            && came.serial > SETTLE
            && let Some(sample) = samples.get_mut(came.serial as usize - 1)
        {
            sample.targets = Some(came.targets);
        }
        self.finish(None, 0, config);
    }

    /// New weights have shown nothing yet: their record begins again, and open forecasts of the old ones are dropped.
    pub(crate) fn forget_network(&mut self) {
        self.raw = None;
        for trackers in &mut self.trackers {
            trackers[LSTM] = Tracker::new();
            trackers[LSTM_OWN_WIDTH] = Tracker::new();
        }
        for given in self.open.iter_mut().flat_map(|issued| &mut issued.given) {
            given.said[LSTM] = None;
            given.said[LSTM_OWN_WIDTH] = None;
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

    /// Which form of the LSTM stands for it: the one that serves, or else that with the lower loss.
    pub(crate) fn lstm_form(&self, at: usize) -> usize {
        let loss = |who: usize| self.trackers[at][who].loss().unwrap_or(f64::MAX);
        match self.champions[at] {
            serves @ (LSTM | LSTM_OWN_WIDTH) => serves,
            _ if loss(LSTM_OWN_WIDTH) < loss(LSTM) => LSTM_OWN_WIDTH,
            _ => LSTM,
        }
    }

    /// The newest forecast; `None` before the first and right after an import.
    pub(crate) fn served(&self) -> Option<&[Served; RESOURCES]> {
        self.served.as_ref()
    }

    pub(crate) fn last_value(&self, at: usize) -> f64 {
        self.series[at].value(0)
    }

    pub(crate) fn tracker(&self, at: usize, who: usize) -> &Tracker {
        &self.trackers[at][who]
    }

    pub(crate) fn coverage(&self, at: usize) -> Option<f64> {
        if self.served_scored >= COVERAGE_MIN { self.served_covered[at].get() } else { None }
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
            + self.open.capacity() * size_of::<Issued>()
            + self.starts.capacity() * size_of::<Start>()
            + self.replay.capacity() * size_of::<[f32; INPUTS]>()
    }
}

/// Whether this step is the one of its horizon whose forecast is compared. Always another one (multiples of the golden ratio are
/// spread evenly over every remainder), or a load whose period is a multiple of the horizon would be seen at few of its phases.
fn is_turn(step: u64, horizon: u64) -> bool {
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    let share = (step / horizon).wrapping_mul(GOLDEN) >> 32;
    step % horizon == (share * horizon) >> 32
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
