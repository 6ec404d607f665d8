//! A histogram that forgets: values weigh half as much a day later. What autoscalers recommend from.

use serde::{Deserialize, Serialize};

use crate::calibrate::LEVELS;

/// Each bucket ends this many times where it begins.
const GROWTH: f64 = 1.05;
/// Weights are brought back when the newest is this many times the unit.
const WEIGHT_MAX: f64 = 1e12;
/// Buckets that hold less than this share of the newest weight are forgotten.
const SHARE_MIN: f64 = 1e-4;
/// The bucket of values that are as good as zero.
const ZERO: i16 = i16::MIN;

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Histogram {
    /// By bucket, its weight; sorted.
    buckets: Vec<(i16, f64)>,
    total: f64,
    /// What the next value weighs.
    weight: f64,
}

impl Histogram {
    /// `keep` is what is left of a value's weight after a step.
    pub(super) fn push(&mut self, value: f64, floor: f64, keep: f64) {
        self.weight = (self.weight / keep).max(1.0);
        let bucket = bucket(value, floor);
        match self.buckets.binary_search_by_key(&bucket, |(bucket, _)| *bucket) {
            Ok(at) => self.buckets[at].1 += self.weight,
            Err(at) => self.buckets.insert(at, (bucket, self.weight)),
        }
        self.total += self.weight;
        if self.weight > WEIGHT_MAX {
            let unit = 1.0 / self.weight;
            self.buckets.retain_mut(|(_, weight)| {
                *weight *= unit;
                *weight >= SHARE_MIN
            });
            self.total = self.buckets.iter().map(|(_, weight)| weight).sum();
            self.weight = 1.0;
        }
    }

    /// The upper ends of the buckets in which the levels lie.
    pub(super) fn quantiles(&self, levels: [f64; LEVELS]) -> Option<[f64; LEVELS]> {
        let mut buckets = self.buckets.iter();
        let (last, _) = self.buckets.last()?;
        let (mut sum, mut at) = (0.0, *last);
        Some(levels.map(|level| {
            while sum < level * self.total {
                let Some((bucket, weight)) = buckets.next() else { break };
                (sum, at) = (sum + weight, *bucket);
            }
            upper_end(at)
        }))
    }

    pub(super) fn is_sound(&self) -> bool {
        self.buckets.iter().all(|(_, weight)| weight.is_finite() && *weight >= 0.0)
            && self.buckets.windows(2).all(|pair| pair[0].0 < pair[1].0)
            && self.total.is_finite()
            && self.weight.is_finite()
    }

    pub(super) fn heap_bytes(&self) -> usize {
        self.buckets.capacity() * size_of::<(i16, f64)>()
    }
}

fn bucket(value: f64, floor: f64) -> i16 {
    if value <= floor { ZERO } else { (value.ln() / GROWTH.ln()).floor().clamp(-32_000.0, 32_000.0) as i16 }
}

fn upper_end(bucket: i16) -> f64 {
    if bucket == ZERO { 0.0 } else { GROWTH.powi(i32::from(bucket) + 1) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_a_bucket_and_the_old_is_forgotten() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.quantiles([0.5; LEVELS]), None);
        for _ in 0..50 {
            for value in 1..=100 {
                histogram.push(f64::from(value), 1e-9, 0.9999);
            }
        }
        let [low, median, .., high] = histogram.quantiles([0.05, 0.5, 0.9, 0.95, 0.99]).unwrap();
        // Between 5 and 6, whose buckets end up to 5 % further.
        for (found, [from, to]) in [(low, [5.0, 6.3]), (median, [50.0, 53.6]), (high, [99.0, 105.0])] {
            assert!((from..=to).contains(&found), "{found} for {from} to {to}");
        }
        for _ in 0..5000 {
            histogram.push(0.0, 1e-9, 0.99);
        }
        assert_eq!(histogram.quantiles([0.99; LEVELS]).unwrap(), [0.0; LEVELS]);
        assert!(histogram.buckets.len() < 5, "{histogram:?}");
        assert!(histogram.is_sound());
    }
}
