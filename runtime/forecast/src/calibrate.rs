//! Calibration over many steps, for the clocks on which there is time for it; and what all calibrations share.
//!
//! A candidate gives a median and how far it may be off on either side. What came is kept as a *score*: the error
//! divided by that distance. [`Conformal`]: the calibrated quantile of level *p* is the empirical quantile of the scores of the
//! last [`WINDOW`] steps, put back into the candidate's distances: honest for any distribution, without a model of it.
//! Under drift the past is not like the future, so the level that is looked up adapts (Gibbs and Candès 2021): when a
//! value comes in below the quantile of level *p*, the lookup moves down by `rate·(1−p)`, otherwise up by `rate·p`.
//! Whatever the series does, the share of values below the quantile tends to *p*. [`crate::tracker`] does without the scores.

use serde::{Deserialize, Serialize};
use warmswap_model::Quantiles;

pub(crate) const LEVELS: usize = Quantiles::LEVELS.len();

/// Steps whose scores are kept. Forecasts over several steps overlap, and neighbouring scores say nearly the same: only
/// every [`Rates::stride`]-th is kept, which saves memory and work.
const WINDOW: usize = 256;
/// Until there are so many, every score is kept.
const STRIDE_FROM: usize = 64;
/// A score beyond this is as surprising as it gets.
pub(crate) const SCORE_MAX: f64 = 1e30;
/// Scores that the candidate's own distribution counts for at the start; it counts for nothing after `PRIOR_UNTIL`.
const PRIOR: f64 = 12.0;
const PRIOR_UNTIL: usize = 64;

/// The share that a candidate's own distribution has beside what so many scores say.
pub(crate) fn prior_share(scores: usize) -> f64 {
    if scores < PRIOR_UNTIL { PRIOR / (PRIOR + scores as f64) } else { 0.0 }
}

/// Lookup levels outside 0 to 1 go beyond the largest score; further than this they stop.
const LOOKUP_BEYOND: f64 = 0.3;
/// Scored forecasts before coverage is told.
pub(crate) const COVERAGE_MIN: u32 = 50;

/// A mean that forgets exponentially and is not pulled towards zero at the start.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Mean {
    sum: f64,
    weight: f64,
}

impl Mean {
    /// Adds a value that stands for `steps` steps.
    pub(crate) fn add(&mut self, value: f64, steps: f64, memory_steps: f64) {
        let keep = (1.0 - steps / memory_steps).max(0.0);
        self.sum = self.sum * keep + steps * value;
        self.weight = self.weight * keep + steps;
    }

    pub(crate) fn get(&self) -> Option<f64> {
        (self.weight > 0.0).then(|| self.sum / self.weight)
    }

    /// The mean as if `prior_weight` zeros had been added first.
    pub(crate) fn with_zeros(&self, prior_weight: f64) -> f64 {
        self.sum / (self.weight + prior_weight)
    }
}

/// The last scores, sorted.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Scores {
    sorted: Vec<f32>,
    /// Of each the number it came with, which goes round: with it the oldest one is found.
    numbers: Vec<u8>,
    next: u8,
}

impl Scores {
    fn new(kept: usize) -> Self {
        Self { sorted: Vec::with_capacity(kept), numbers: Vec::with_capacity(kept), next: 0 }
    }

    fn clear(&mut self) {
        self.sorted.clear();
        self.numbers.clear();
    }

    /// `kept` is at most [`WINDOW`], which is how many numbers there are.
    fn add(&mut self, score: f32, kept: usize) {
        let number = self.next;
        self.next = number.wrapping_add(1);
        let to = self.sorted.partition_point(|other| *other < score);
        if self.sorted.len() < kept {
            self.sorted.insert(to, score);
            self.numbers.insert(to, number);
            return;
        }
        let oldest = number.wrapping_sub(self.sorted.len() as u8);
        let from = self.numbers.iter().position(|other| *other == oldest).unwrap_or(0);
        // One move closes the gap of the old score and opens one for the new.
        let at = if from < to {
            self.sorted.copy_within(from + 1..to, from);
            self.numbers.copy_within(from + 1..to, from);
            to - 1
        } else {
            self.sorted.copy_within(to..from, to + 1);
            self.numbers.copy_within(to..from, to + 1);
            to
        };
        (self.sorted[at], self.numbers[at]) = (score, number);
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
        let count = self.sorted.len();
        let mut seen = [false; WINDOW];
        count == self.numbers.len()
            && count <= WINDOW
            && self.sorted.iter().all(|score| score.is_finite())
            && self.sorted.is_sorted()
            // Each of the last numbers once.
            && self.numbers.iter().all(|number| {
                usize::from(self.next.wrapping_sub(*number).wrapping_sub(1)) < count
                    && !std::mem::replace(&mut seen[usize::from(*number)], true)
            })
    }
}

/// What a candidate says before calibration: its quantiles, from which its distances are taken.
pub(crate) type Points = [f64; LEVELS];

/// How far the median may be off, below and above.
pub(crate) fn distances(points: &Points, floor: f64) -> (f64, f64) {
    ((points[1] - points[0]).max(floor), (points[3] - points[1]).max(floor))
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Conformal {
    scores: Scores,
    /// Which of every [`Rates::stride`] scores is kept: candidates take turns, so that ticks cost the same.
    phase: usize,
    scored: u32,
    /// What is looked up for each level, and the scores found there when the last score was kept.
    lookups: [f64; LEVELS],
    found: [f64; LEVELS],
}

impl Conformal {
    pub(crate) fn new(rates: &Rates, phase: usize) -> Self {
        Self::with_scores(Scores::new(rates.kept()), phase)
    }

    fn with_scores(scores: Scores, phase: usize) -> Self {
        Self { scores, phase, scored: 0, lookups: Quantiles::LEVELS, found: [0.0; LEVELS] }
    }

    /// As new, with the memory it has.
    pub(crate) fn reset(&mut self) {
        let empty = Scores { sorted: Vec::new(), numbers: Vec::new(), next: 0 };
        let mut scores = std::mem::replace(&mut self.scores, empty);
        scores.clear();
        *self = Self::with_scores(scores, self.phase);
    }

    pub(crate) fn band(&self, points: &Points, floor: f64) -> [f64; LEVELS] {
        match self.scores.sorted.len() {
            0 => calibrated(points, points, 0.0),
            count => {
                let (below, above) = distances(points, floor);
                let found = self.found.map(|score| points[1] + score * if score < 0.0 { below } else { above });
                calibrated(points, &found, 1.0 - prior_share(count))
            }
        }
    }

    /// Learns from a forecast and what came.
    pub(crate) fn score(&mut self, points: &Points, band: &[f64; LEVELS], floor: f64, actual: f64, rates: &Rates) {
        self.scored = self.scored.saturating_add(1);
        let error = actual - points[1];
        let (below, above) = distances(points, floor);
        let score = error / if error < 0.0 { below } else { above };
        for ((lookup, level), value) in self.lookups.iter_mut().zip(Quantiles::LEVELS).zip(band) {
            let under = f64::from(u8::from(actual < *value));
            *lookup = (*lookup + rates.calibration * (level - under)).clamp(-LOOKUP_BEYOND, 1.0 + LOOKUP_BEYOND);
        }
        if self.scores.sorted.len() < STRIDE_FROM || (self.scored as usize % rates.stride) == self.phase % rates.stride
        {
            self.scores.add(score.clamp(-SCORE_MAX, SCORE_MAX) as f32, rates.kept());
            self.found = self.lookups.map(|lookup| self.scores.at(lookup));
        }
    }

    pub(crate) fn is_sound(&self) -> bool {
        self.scores.is_sound() && self.lookups.iter().chain(&self.found).all(|value| value.is_finite())
    }

    /// Memory beyond the struct itself, bytes.
    pub(crate) fn heap_bytes(&self) -> usize {
        self.scores.sorted.capacity() * size_of::<f32>() + self.scores.numbers.capacity()
    }
}

/// Quantiles between what somebody said and what was learned of it. Usage is never negative, and the levels are sorted, so they
/// cannot cross.
pub(crate) fn calibrated(said: &Points, learned: &Points, share: f64) -> [f64; LEVELS] {
    let mut band = *said;
    for (value, learned) in band.iter_mut().zip(learned) {
        *value = ((1.0 - share) * *value + share * learned).max(0.0);
    }
    sort(&mut band);
    band
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

/// How a [`Conformal`] learns.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rates {
    pub(crate) calibration: f64,
    /// Every how many scores one is kept.
    pub(crate) stride: usize,
}

impl Rates {
    fn kept(&self) -> usize {
        WINDOW / self.stride
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
pub(crate) fn sort(values: &mut [f64; LEVELS]) {
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
    fn the_scores_are_the_last_ones_sorted() {
        for kept in [WINDOW / 4, WINDOW] {
            let (mut scores, mut came) = (Scores::new(kept), Vec::new());
            let mut random = crate::random::Random::new(1);
            for step in 0..1000 {
                // Coarse values, so that equal scores meet.
                let score = (random.signed() * 20.0).round() + 0.0;
                came.push(score);
                scores.add(score, kept);
                let mut expected = came[came.len().saturating_sub(kept)..].to_vec();
                expected.sort_by(f32::total_cmp);
                assert_eq!(scores.sorted, expected, "step {step}");
                assert!(scores.is_sound());
            }
            assert!(scores.at(1.2) > scores.at(1.0) && scores.at(-0.2) < scores.at(0.0));
        }
    }
}
