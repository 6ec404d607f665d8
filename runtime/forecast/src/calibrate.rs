//! Adaptive conformal calibration, loss and coverage of one candidate on one series.
//!
//! A candidate gives a median and how far it may be off on either side. What came is kept as a *score*: the error
//! divided by that distance. The calibrated quantile of level *p* is the empirical quantile of the scores of the last
//! [`WINDOW`] steps, put back into the candidate's distances: honest for any distribution, without a model of it.
//! Under drift the past is not like the future, so the level that is looked up adapts (Gibbs and Candès 2021): when a
//! value comes in below the quantile of level *p*, the lookup moves down by `rate·(1−p)`, otherwise up by `rate·p`.
//! Whatever the series does, the share of values below the quantile tends to *p*.

use serde::{Deserialize, Serialize};
use warmswap_model::Quantiles;

use crate::ForecastConfig;

pub(crate) const LEVELS: usize = Quantiles::LEVELS.len();

/// Steps whose scores are kept. Forecasts over several steps overlap, and neighbouring scores say nearly the same: only
/// every [`Rates::stride`]-th is kept, which saves memory and most of the work of a tick.
const WINDOW: usize = 256;
/// Until there are so many, every score is kept.
const STRIDE_FROM: usize = 64;
/// A score beyond this is as surprising as it gets.
const SCORE_MAX: f64 = 1e30;
/// Scores that the candidate's own distribution counts for at the start; it counts for nothing after `PRIOR_UNTIL`.
const PRIOR: f64 = 12.0;
const PRIOR_UNTIL: usize = 64;
/// Lookup levels outside 0 to 1 go beyond the largest score; further than this they stop.
const LOOKUP_BEYOND: f64 = 0.3;
/// Steps over which the mean absolute error is averaged.
const ERROR_MEMORY: f64 = 120.0;
/// Scored forecasts before coverage is told.
pub(crate) const COVERAGE_MIN: u32 = 50;

/// A mean that forgets exponentially and is not pulled towards zero at the start.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Mean {
    sum: f64,
    weight: f64,
}

impl Mean {
    pub(crate) fn add(&mut self, value: f64, memory_steps: f64) {
        let keep = 1.0 - 1.0 / memory_steps;
        self.sum = self.sum * keep + value;
        self.weight = self.weight * keep + 1.0;
    }

    pub(crate) fn get(&self) -> Option<f64> {
        (self.weight > 0.0).then(|| self.sum / self.weight)
    }

    /// The mean as if `prior_weight` zeros had been added first.
    pub(crate) fn with_zeros(&self, prior_weight: f64) -> f64 {
        self.sum / (self.weight + prior_weight)
    }
}

/// The last scores, in the order they came and sorted.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Scores {
    ring: Vec<f32>,
    sorted: Vec<f32>,
    head: usize,
}

impl Scores {
    fn new(rates: &Rates) -> Self {
        let window = WINDOW / rates.stride;
        Self { ring: Vec::with_capacity(window), sorted: Vec::with_capacity(window), head: 0 }
    }

    fn clear(&mut self) {
        self.ring.clear();
        self.sorted.clear();
        self.head = 0;
    }

    fn add(&mut self, score: f32, window: usize) {
        let to = self.sorted.partition_point(|other| *other < score);
        if self.ring.len() < window {
            self.ring.push(score);
            self.sorted.insert(to, score);
            return;
        }
        let old = std::mem::replace(&mut self.ring[self.head], score);
        self.head = (self.head + 1) % self.ring.len();
        let from = self.sorted.partition_point(|other| *other < old).min(self.sorted.len() - 1);
        // One move closes the gap of the old score and opens one for the new.
        if from < to {
            self.sorted.copy_within(from + 1..to, from);
            self.sorted[to - 1] = score;
        } else {
            self.sorted.copy_within(to..from, to + 1);
            self.sorted[to] = score;
        }
    }

    /// The score at `level`, between the neighbours in rank; beyond the ends it goes on with the spread of all.
    fn at(&self, level: f64) -> f64 {
        let last = self.sorted.len() - 1;
        let rank = level * (self.sorted.len() + 1) as f64 - 1.0;
        let value = |at: usize| f64::from(self.sorted[at]);
        if rank <= 0.0 {
            return value(0) + rank / (last + 1) as f64 * (value(last) - value(0));
        }
        if rank >= last as f64 {
            return value(last) + (rank - last as f64) / (last + 1) as f64 * (value(last) - value(0));
        }
        let low = rank as usize;
        value(low) + (rank - low as f64) * (value(low + 1) - value(low))
    }

    /// Whether an import brought something that [`Self::add`] could have made.
    fn is_sound(&self) -> bool {
        self.ring.len() == self.sorted.len()
            && self.ring.len() <= WINDOW
            && (self.head == 0 || self.head < self.ring.len())
            && self.sorted.windows(2).all(|pair| pair[0] <= pair[1])
            && self.ring.iter().all(|score| score.is_finite())
    }
}

/// What a candidate says before calibration: its quantiles, from which its distances are taken.
pub(crate) type Points = [f64; LEVELS];

/// How far the median may be off, below and above.
fn distances(points: &Points, floor: f64) -> (f64, f64) {
    ((points[1] - points[0]).max(floor), (points[3] - points[1]).max(floor))
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Tracker {
    scores: Scores,
    /// Which of every [`Rates::stride`] scores is kept: trackers take turns, so that ticks cost the same.
    phase: usize,
    /// What is looked up for each level, and the scores found there when the last score was kept.
    lookups: [f64; LEVELS],
    found: [f64; LEVELS],
    /// Mean absolute error of the median.
    error: Mean,
    loss: Mean,
    covered: Mean,
    pub(crate) scored: u32,
}

impl Tracker {
    pub(crate) fn new(rates: &Rates, phase: usize) -> Self {
        Self::with_scores(Scores::new(rates), phase)
    }

    fn with_scores(scores: Scores, phase: usize) -> Self {
        Self {
            scores,
            phase,
            lookups: Quantiles::LEVELS,
            found: [0.0; LEVELS],
            error: Mean::default(),
            loss: Mean::default(),
            covered: Mean::default(),
            scored: 0,
        }
    }

    /// As new, with the memory it has.
    pub(crate) fn reset(&mut self) {
        let empty = Scores { ring: Vec::new(), sorted: Vec::new(), head: 0 };
        let mut scores = std::mem::replace(&mut self.scores, empty);
        scores.clear();
        *self = Self::with_scores(scores, self.phase);
    }

    /// The median's typical error, not below `floor`.
    pub(crate) fn error(&self, floor: f64) -> f64 {
        self.error.get().unwrap_or(0.0).max(floor)
    }

    /// Calibrated quantiles. Usage is never negative, and the levels are sorted, so they cannot cross.
    pub(crate) fn band(&self, points: &Points, floor: f64) -> [f64; LEVELS] {
        let mut band = *points;
        let count = self.scores.sorted.len();
        if count > 0 {
            let own = if count < PRIOR_UNTIL { PRIOR / (PRIOR + count as f64) } else { 0.0 };
            let (below, above) = distances(points, floor);
            for (value, score) in band.iter_mut().zip(self.found) {
                let calibrated = points[1] + score * if score < 0.0 { below } else { above };
                *value = own * *value + (1.0 - own) * calibrated;
            }
        }
        for value in &mut band {
            *value = value.max(0.0);
        }
        sort(&mut band);
        band
    }

    /// Learns from a forecast and what came.
    pub(crate) fn score(&mut self, points: &Points, band: &[f64; LEVELS], floor: f64, actual: f64, rates: &Rates) {
        self.scored = self.scored.saturating_add(1);
        let error = actual - points[1];
        let (below, above) = distances(points, floor);
        let score = error / if error < 0.0 { below } else { above };
        self.error.add(error.abs(), ERROR_MEMORY);
        self.loss.add(pinball(band, actual), rates.loss_memory);
        self.covered.add(f64::from(u8::from(inside(band, actual))), rates.coverage_memory);
        for ((lookup, level), value) in self.lookups.iter_mut().zip(Quantiles::LEVELS).zip(band) {
            let under = f64::from(u8::from(actual < *value));
            *lookup = (*lookup + rates.calibration * (level - under)).clamp(-LOOKUP_BEYOND, 1.0 + LOOKUP_BEYOND);
        }
        if self.scores.sorted.len() < STRIDE_FROM || (self.scored as usize % rates.stride) == self.phase % rates.stride
        {
            self.scores.add(score.clamp(-SCORE_MAX, SCORE_MAX) as f32, WINDOW / rates.stride);
            self.found = self.lookups.map(|lookup| self.scores.at(lookup));
        }
    }

    pub(crate) fn loss(&self) -> Option<f64> {
        self.loss.get()
    }

    pub(crate) fn coverage(&self) -> Option<f64> {
        if self.scored >= COVERAGE_MIN { self.covered.get() } else { None }
    }

    pub(crate) fn is_sound(&self) -> bool {
        self.scores.is_sound() && self.lookups.iter().chain(&self.found).all(|value| value.is_finite())
    }

    /// Memory beyond the struct itself, bytes.
    pub(crate) fn heap_bytes(&self) -> usize {
        (self.scores.ring.capacity() + self.scores.sorted.capacity()) * size_of::<f32>()
    }
}

/// Where the levels lie on a normal distribution.
const NORMAL: [f64; LEVELS] = [-1.645, 0.0, 1.282, 1.645, 2.326];
/// Shifts beyond this, in deviations, are those of a curve that has nothing to do with the series.
const SHIFT_MAX: f64 = 12.0;

/// Adaptive calibration of quantiles that somebody gives: a level is looked up elsewhere on the same curve, on an axis on which
/// a normal distribution is a straight line. Where the value comes in below too often, the lookup moves down, otherwise up.
/// The widths stay those that were given for this moment.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Shifts([f64; LEVELS]);

impl Shifts {
    pub(crate) fn band(&self, points: &Points) -> [f64; LEVELS] {
        let mut band: [f64; LEVELS] =
            std::array::from_fn(|level| at_deviation(points, NORMAL[level] + self.0[level]).max(0.0));
        sort(&mut band);
        band
    }

    /// `rate` is in deviations.
    pub(crate) fn score(&mut self, band: &[f64; LEVELS], actual: f64, rate: f64) {
        for ((shift, level), value) in self.0.iter_mut().zip(Quantiles::LEVELS).zip(band) {
            let under = if actual < *value {
                1.0
            } else if actual == *value {
                level
            } else {
                0.0
            };
            *shift = (*shift + rate * (level - under)).clamp(-SHIFT_MAX, SHIFT_MAX);
        }
    }

    pub(crate) fn is_sound(&self) -> bool {
        self.0.iter().all(|shift| shift.abs() <= SHIFT_MAX)
    }
}

/// The curve through the points, and on as steep as it is between its middle and its ends.
fn at_deviation(points: &Points, deviation: f64) -> f64 {
    const LAST: usize = LEVELS - 1;
    let slope = |from: usize, to: usize| (points[to] - points[from]) / (NORMAL[to] - NORMAL[from]);
    if deviation <= NORMAL[0] {
        return points[0] + (deviation - NORMAL[0]) * slope(0, 1);
    }
    match (1..LEVELS).find(|at| deviation <= NORMAL[*at]) {
        Some(at) => points[at] + (deviation - NORMAL[at]) * slope(at - 1, at),
        None => points[LAST] + (deviation - NORMAL[LAST]) * slope(1, LAST).max(slope(LAST - 1, LAST)),
    }
}

/// How fast a tracker learns and forgets.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rates {
    pub(crate) loss_memory: f64,
    pub(crate) coverage_memory: f64,
    pub(crate) calibration: f64,
    /// Every how many scores one is kept.
    pub(crate) stride: usize,
}

impl Rates {
    pub(crate) fn new(config: &ForecastConfig) -> Self {
        Self {
            loss_memory: config.loss_memory_steps,
            coverage_memory: config.coverage_memory_steps,
            calibration: config.calibration_rate,
            stride: (config.horizon_steps / 2).clamp(1, 4),
        }
    }
}

/// Quantiles of a Laplace distribution around `centre` with mean absolute error `error`: what a candidate that only
/// gives a median is taken to say. With the same `error` every time, scores are errors and the band is as wide as the
/// recent errors were; that is robust when rare spikes make every running scale useless.
pub(crate) fn around(centre: f64, error: f64) -> Points {
    [-2.303, 0.0, 1.609, 2.303, 3.912].map(|at| centre + at * error)
}

/// Mean pinball loss over the five levels, in the unit of the series.
pub(crate) fn pinball(band: &[f64; LEVELS], actual: f64) -> f64 {
    let sum: f64 = band.iter().enumerate().map(|(level, value)| pinball_at(level, *value, actual)).sum();
    sum / LEVELS as f64
}

/// Pinball loss of one level.
pub(crate) fn pinball_at(level: usize, value: f64, actual: f64) -> f64 {
    let (level, over) = (Quantiles::LEVELS[level], actual - value);
    if over >= 0.0 { level * over } else { (level - 1.0) * over }
}

/// Whether the value lies in the 90 % interval.
pub(crate) fn inside(band: &[f64; LEVELS], actual: f64) -> bool {
    band[0] <= actual && actual <= band[3]
}

/// Five values are usually in order already: an insertion pass is cheaper than a sort.
fn sort(values: &mut [f64; LEVELS]) {
    for end in 1..LEVELS {
        let mut at = end;
        while at > 0 && values[at - 1] > values[at] {
            values.swap(at - 1, at);
            at -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sorted_scores_are_those_of_the_ring() {
        let rates = Rates::new(&ForecastConfig::default());
        let mut scores = Scores::new(&rates);
        let window = WINDOW / rates.stride;
        let mut random = crate::random::Random::new(1);
        for step in 0..1000 {
            // Coarse values, so that equal scores meet.
            scores.add((random.signed() * 20.0).round(), window);
            let mut expected = scores.ring.clone();
            expected.sort_by(f32::total_cmp);
            let zero_is_zero = |values: &[f32]| values.iter().map(|v| v + 0.0).collect::<Vec<_>>();
            assert_eq!(zero_is_zero(&scores.sorted), zero_is_zero(&expected), "step {step}");
            assert!(scores.is_sound());
        }
        assert_eq!(scores.ring.len(), window);
        assert!(scores.at(1.2) > scores.at(1.0) && scores.at(-0.2) < scores.at(0.0));
    }
}
