//! The base that every outlook begins with: a network trained ahead on loads that are made here, in the ways in which loads of
//! computers move. It has seen no trace of anybody. A host's own history is trained on from it, and with little history it is
//! what keeps intervals honest.
//!
//! `warmswap-bench base FILE` makes it again: the same seed gives the same weights.

use std::f64::consts::TAU;
use std::ops::ControlFlow;

use super::OutlookConfig;
use super::train::{History, prepare};
use crate::lstm::ModelWeights;
use crate::random::Random;
use crate::train::{Progress, TrainConfig, TrainError, train_on};
use crate::{ImportError, file};

/// As it was trained.
const IMAGE: &[u8] = include_bytes!("base.bin");

const MINUTE_MS: u64 = 60_000;
const DAY_MS: u64 = 1440 * MINUTE_MS;
const WEEK_MS: u64 = 7 * DAY_MS;
/// A Monday, 00:00 UTC.
const BEGIN_MS: u64 = 1_700_438_400_000;
/// Clocks that the base is trained for: length of a step, how many loads, and for how many days.
const CLOCKS: [(u64, u64, u64); 3] = [(MINUTE_MS, 60, 8), (5 * MINUTE_MS, 90, 24), (1000, 30, 1)];
/// Steps of a load at most.
const STEPS_MAX: u64 = 12_000;

/// The base of this build.
pub(super) fn base() -> Result<ModelWeights, ImportError> {
    file::open(file::BASE, IMAGE)
}

/// Trains the base. Takes some minutes.
pub fn train_base(keep_going: &mut dyn FnMut(Progress) -> ControlFlow<()>) -> Result<ModelWeights, TrainError> {
    let mut prepared = Vec::new();
    for (step_ms, loads, days) in CLOCKS {
        let config = OutlookConfig::every(step_ms);
        let steps = (days * DAY_MS / step_ms).min(STEPS_MAX);
        let histories = (0..loads).map(|seed| load(step_ms, steps, seed * 1_000_003 + step_ms));
        prepared.extend(histories.filter_map(|history| prepare(&history, &config)));
    }
    let config =
        TrainConfig { seed: 1, steps_max: 9000, learning_rate: 3e-3, patience_steps: 9000, look_every_steps: 500 };
    train_on(&prepared, &config, None, keep_going)
}

/// The file of a base.
#[must_use]
pub fn seal_base(weights: &ModelWeights) -> Vec<u8> {
    file::seal(file::BASE, weights)
}

/// A load that could be one: a level with a slow drift, days and weeks, noise that is not always as strong, bursts, jobs that come
/// by the clock, changes for good, and what counts things. Which of them, and how much of each, depends on the seed.
fn load(step_ms: u64, steps: u64, seed: u64) -> History {
    let mut random = Random::new(seed);
    let minutes = step_ms as f64 / MINUTE_MS as f64;
    let begin = BEGIN_MS + (random.between(0.0, 7.0) * DAY_MS as f64 / step_ms as f64) as u64 * step_ms;
    let mut level = random.between(-2.0, 6.0).exp();
    let day = Day::new(&mut random);
    let weekend = if random.chance(0.4) { random.between(0.3, 1.0) } else { 1.0 };
    // An Ornstein-Uhlenbeck process in logarithms: how far it strays, and how long it remembers.
    let (stray, remembers) = (0.6 * random.between(0.0, 1.0).powi(2), random.between(2.0, 8.0).exp());
    let noise = if random.chance(0.2) { 0.0 } else { 0.3 * random.between(0.0, 1.0).powi(2) };
    let bursts_per_minute = if random.chance(0.5) { random.between(-9.0, -3.0).exp() } else { 0.0 };
    let (burst_size, burst_minutes) = (random.between(-1.0, 1.5).exp(), random.between(0.0, 3.5).exp());
    let job_period = [15, 30, 60, 120, 360, 1440][random.below(6)] * MINUTE_MS;
    let (job_size, job_length) = (random.between(-1.5, 1.0).exp(), random.between(0.02, 0.4));
    let has_jobs = random.chance(0.3);
    let changes_per_minute = if random.chance(0.4) { random.between(-10.0, -6.5).exp() } else { 0.0 };
    let leak = random.chance(0.1).then(|| random.between(200.0, 4000.0));
    let counts = random.chance(0.3);
    let (mut drift, mut burst, mut rough, mut leaked) = (0.0, 0.0, 1.0, 0.0);
    (0..steps)
        .map(|step| {
            let at = begin + step * step_ms;
            let keep = (-minutes / remembers).exp();
            drift = keep * drift + stray * (1.0 - keep * keep).sqrt() * random.normal();
            if random.chance(minutes / 300.0) {
                rough = random.between(-0.7, 0.7).exp();
            }
            burst *= (-minutes / burst_minutes).exp();
            if random.chance(bursts_per_minute * minutes) {
                burst += burst_size * random.between(0.3, 1.5);
            }
            if random.chance(changes_per_minute * minutes) {
                level *= (0.5 * random.normal()).exp();
            }
            let mut value = day.at(at) * drift.exp() * (1.0 + noise * rough * random.normal()).max(0.0) + burst;
            if (at - BEGIN_MS) % WEEK_MS >= 5 * DAY_MS {
                value *= weekend;
            }
            if has_jobs && ((at % job_period) as f64) < job_length * job_period as f64 {
                value += job_size;
            }
            if let Some(until) = leak {
                leaked = if leaked > until { 0.0 } else { leaked + minutes };
                value += leaked / until;
            }
            value *= level;
            if counts {
                value = (value + value.max(0.0).sqrt() * random.normal()).max(0.0).round();
            }
            (at, value)
        })
        .collect()
}

/// What a day looks like.
struct Day([(f64, f64); 3]);

impl Day {
    fn new(random: &mut Random) -> Self {
        let strength = if random.chance(0.3) { 0.0 } else { random.between(0.0, 0.8) };
        Self(std::array::from_fn(|k| (strength * random.between(0.0, 1.0) / (k + 1) as f64, random.between(0.0, TAU))))
    }

    fn at(&self, unix_ms: u64) -> f64 {
        let turn = (unix_ms % DAY_MS) as f64 / DAY_MS as f64 * TAU;
        let harmonics = self.0.iter().zip(1..).map(|((size, phase), k)| size * (f64::from(k) * turn + phase).sin());
        (1.0 + harmonics.sum::<f64>()).max(0.05)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]
mod tests {
    use super::*;
    use crate::train::held_out_loss;

    #[test]
    fn the_base_knows_more_than_nothing_of_loads_that_it_has_not_seen() {
        let base = base().unwrap();
        assert!(base.check().is_ok() && base.steps > 0);
        let nothing = ModelWeights::untrained(0, || 0.0);
        for (step_ms, _, days) in CLOCKS {
            let config = OutlookConfig::every(step_ms);
            let steps = (days * DAY_MS / step_ms).min(STEPS_MAX);
            let unseen: Vec<_> =
                (0..6).filter_map(|seed| prepare(&load(step_ms, steps, 77_000 + seed), &config)).collect();
            let (base, nothing) = (held_out_loss(&base, &unseen), held_out_loss(&nothing, &unseen));
            println!("steps of {step_ms} ms: {base:.4} beside {nothing:.4} of an untrained network");
            assert!(base < 0.99 * nothing, "steps of {step_ms} ms: {base} beside {nothing}");
        }
    }

    #[test]
    fn loads_are_usable_and_depend_on_their_seed_only() {
        for seed in 0..200 {
            let made = load(MINUTE_MS, 1500, seed);
            assert!(made.iter().all(|(_, value)| value.is_finite() && *value >= 0.0), "seed {seed}");
            assert_eq!(made, load(MINUTE_MS, 1500, seed));
        }
    }
}
