//! Calibration for a clock that leaves a microsecond: nothing is kept of the past but five numbers, and a scale that they are
//! measured in.
//!
//! Scores are those of [`crate::calibrate`]: errors, divided by the distance that the candidate gives. Their typical size, the
//! *spread*, is a geometric mean that forgets; what is far from it counts as not so far, so that one spike changes little.
//! Where the levels lie is followed in units of the spread: when a score comes in below the place of level *p*, the place moves down by
//! `rate·(1−p)`, otherwise up by `rate·p`. Whatever the series does, the share of scores below it tends to *p*.

use serde::{Deserialize, Serialize};
use warmswap_model::Quantiles;

use crate::ForecastConfig;
use crate::calibrate::{
    COVERAGE_MIN, LEVELS, Mean, Points, SCORE_MAX, calibrated, distances, inside, pinball, prior_share,
};

/// Steps over which the mean absolute error is averaged.
const ERROR_MEMORY: f64 = 120.0;
/// Steps of the spread's logarithm, and of the places of the levels. The first ones are larger, so many by the number of the
/// comparison: what a program does as it starts is soon forgotten.
const SPREAD_RATE: f64 = 0.003;
const SPREAD_FIRST: f64 = 3.0;
const PLACE_RATE: f64 = 0.02;
const PLACE_FIRST: f64 = 2.0;
const RATE_MAX: f64 = 0.5;
/// How far a score may be from the spread, in logarithms.
const APART_MAX: f64 = 3.0;
/// A spread below this is that of errors that matter to nobody: distances are not below a series' floor.
const SPREAD_MIN: f64 = 0.05;
/// Where the levels of a Laplace distribution lie, in geometric means of its sizes.
const PLACES: [f64; LEVELS] = [-4.1, 0.0, 2.9, 4.1, 7.0];

/// What a candidate said: its median, how far it may be off on either side, and the calibrated quantiles.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Said {
    median: f64,
    below: f64,
    above: f64,
    pub(crate) band: [f64; LEVELS],
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Tracker {
    spread: f64,
    places: [f64; LEVELS],
    /// Mean absolute error of the median.
    error: Mean,
    loss: Mean,
    covered: Mean,
    pub(crate) scored: u32,
}

impl Tracker {
    pub(crate) fn new() -> Self {
        Self {
            spread: 1.0,
            places: PLACES,
            error: Mean::default(),
            loss: Mean::default(),
            covered: Mean::default(),
            scored: 0,
        }
    }

    /// The median's typical error, not below `floor`.
    pub(crate) fn error(&self, floor: f64) -> f64 {
        self.error.get().unwrap_or(0.0).max(floor)
    }

    /// What a candidate says, calibrated.
    pub(crate) fn say(&self, points: &Points, floor: f64) -> Said {
        let (below, above) = distances(points, floor);
        let learned =
            self.places.map(|place| points[1] + place * self.spread * if place < 0.0 { below } else { above });
        let share = if self.scored == 0 { 0.0 } else { 1.0 - prior_share(self.scored as usize) };
        Said { median: points[1], below, above, band: calibrated(points, &learned, share) }
    }

    /// Learns from what was said and what came. It stands for so many `steps`, where not every forecast is compared.
    pub(crate) fn score(&mut self, said: &Said, actual: f64, steps: f64, config: &ForecastConfig) {
        let error = actual - said.median;
        self.error.add(error.abs(), steps, ERROR_MEMORY);
        self.loss.add(pinball(&said.band, actual), steps, config.loss_memory_steps);
        let covered = f64::from(u8::from(inside(&said.band, actual)));
        self.covered.add(covered, steps, config.coverage_memory_steps);

        let score = (error / if error < 0.0 { said.below } else { said.above }).clamp(-SCORE_MAX, SCORE_MAX);
        if self.scored == 0 {
            self.spread = score.abs().max(SPREAD_MIN);
        }
        self.scored = self.scored.saturating_add(1);
        let rate = |usual: f64, first: f64| (usual * steps).max(first / f64::from(self.scored)).min(RATE_MAX);
        let (spread_rate, place_rate) = (rate(SPREAD_RATE, SPREAD_FIRST), rate(PLACE_RATE, PLACE_FIRST));
        for (place, level) in self.places.iter_mut().zip(Quantiles::LEVELS) {
            let found = *place * self.spread;
            // An exact hit says nothing: a constant series is below none of its quantiles.
            let under = if score < found {
                1.0
            } else if score > found {
                0.0
            } else {
                level
            };
            *place += place_rate * place.abs().max(1.0) * (level - under);
        }
        let apart = (score.abs() / self.spread).max(f64::MIN_POSITIVE).ln().clamp(-APART_MAX, APART_MAX);
        self.spread = (self.spread * (spread_rate * apart).exp()).clamp(SPREAD_MIN, SCORE_MAX);
    }

    pub(crate) fn loss(&self) -> Option<f64> {
        self.loss.get()
    }

    pub(crate) fn coverage(&self) -> Option<f64> {
        if self.scored >= COVERAGE_MIN { self.covered.get() } else { None }
    }

    /// Whether an import brought something that this code could have made.
    pub(crate) fn is_sound(&self) -> bool {
        (SPREAD_MIN..=SCORE_MAX).contains(&self.spread) && self.places.iter().all(|place| place.is_finite())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibrate::around;
    use crate::random::Random;

    type Errors = fn(u32, &mut Random) -> f64;

    /// How often what came lay below each level, over the second half.
    fn shares(error_of: Errors) -> [f64; LEVELS] {
        let (config, mut random, mut tracker) = (ForecastConfig::default(), Random::new(5), Tracker::new());
        let (mut below, steps) = ([0.0; LEVELS], 8000);
        for step in 0..steps {
            let said = tracker.say(&around(1e6, 0.1), 0.1);
            let actual = 1e6 + error_of(step, &mut random);
            if step >= steps / 2 {
                for (below, value) in below.iter_mut().zip(said.band) {
                    *below += f64::from(u8::from(actual < value)) / f64::from(steps / 2);
                }
            }
            tracker.score(&said, actual, 1.0, &config);
        }
        below
    }

    #[test]
    fn each_level_is_exceeded_as_often_as_it_says() {
        let kinds: [(&str, Errors); 4] = [
            ("normal", |_, random| 3.0 * random.normal()),
            ("skewed", |_, random| (2.0 * random.normal()).exp()),
            ("growing", |step, random| f64::from(step) * random.normal()),
            ("spikes", |step, random| if step % 300 == 0 { 1e5 } else { random.normal() }),
        ];
        for (kind, error_of) in kinds {
            for (share, level) in shares(error_of).into_iter().zip(Quantiles::LEVELS) {
                assert!((share - level).abs() < 0.015, "{kind}: {share:.3} below the level of {level}");
            }
        }
    }
}
