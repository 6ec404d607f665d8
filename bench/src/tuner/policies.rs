//! Who decides how much to reserve for the time until the next decision. Each is told, after it has decided, what the need was.

use std::collections::BTreeMap;

use warmswap_model::{PerResource, Quantiles, Reserve, Resource};
use warmswap_policy::{Outcome, Rails, Tuner};

/// What is known when a decision is made.
#[derive(Debug, Clone, Copy)]
pub(super) struct Known<'a> {
    /// For the time until the next decision.
    pub(super) forecast: Quantiles,
    /// Every value since the decision before, this moment's last.
    pub(super) since: &'a [f64],
}

pub(super) trait Policy {
    fn reserve(&mut self, known: &Known<'_>) -> f64;
    fn learn(&mut self, need: f64);
}

/// Percentages that everybody who multiplies the forecast may use.
pub(super) const PERCENT_MIN: f64 = 50.0;
pub(super) const PERCENT_MAX: f64 = 400.0;

/// The tuner, as it learns from handovers: each interval is one.
pub(super) struct Ours {
    tuner: Tuner,
    resource: Resource,
    seed: u64,
    used: (f64, f64),
}

impl Ours {
    /// `price` is that of a shortfall.
    pub(super) fn new(resource: Resource, price: f64, seed: u64) -> Self {
        Self { tuner: Self::tuner().with_shortfall_price(price), resource, seed, used: (0.0, 0.0) }
    }

    /// The price that the agent uses.
    pub(super) fn usual_price(resource: Resource) -> f64 {
        Self::tuner().shortfall_price(resource)
    }

    fn tuner() -> Tuner {
        let percent = PerResource::from_fn(|_| 110.0);
        let reserve = Reserve { percent, percent_min: PERCENT_MIN, percent_max: PERCENT_MAX, tune: true };
        let rails = Rails { percent_min: PERCENT_MIN, percent_max: PERCENT_MAX, ceiling: PerResource::default() };
        Tuner::new(&reserve, rails)
    }
}

impl Policy for Ours {
    fn reserve(&mut self, known: &Known<'_>) -> f64 {
        // SplitMix64: the same seed explores the same.
        let seed = &mut self.seed;
        let percent = self.tuner.choose_for(self.resource, || {
            *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = *seed;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
        });
        let base = self.tuner.base(self.resource, &known.forecast);
        self.used = (base, percent);
        base * percent / 100.0
    }

    fn learn(&mut self, need: f64) {
        let (base, percent) = self.used;
        let one = |value: f64| PerResource::from_fn(|resource| if resource == self.resource { value } else { 0.0 });
        self.tuner.learn(&Outcome { percent: one(percent), base: one(base), actual: one(need), ..Outcome::default() });
    }
}

/// One percentage of the 90th percentile of the forecast, for ever.
pub(super) struct Constant(pub(super) f64);

impl Policy for Constant {
    fn reserve(&mut self, known: &Known<'_>) -> f64 {
        known.forecast.q90 * self.0 / 100.0
    }

    fn learn(&mut self, _need: f64) {}
}

/// What the Vertical Pod Autoscaler recommends: a margin on the 90th percentile of a histogram whose values weigh half as much a
/// day later. Its buckets grow by 5 %, like its own.
pub(super) struct Vpa {
    buckets: BTreeMap<i32, f64>,
    total: f64,
    weight: f64,
    growth_of_weight: f64,
}

impl Vpa {
    pub(super) const MARGIN: f64 = 1.15;

    pub(super) fn new(steps_of_a_day: f64) -> Self {
        let growth_of_weight = 2f64.powf(1.0 / steps_of_a_day.max(1.0));
        Self { buckets: BTreeMap::new(), total: 0.0, weight: 1.0, growth_of_weight }
    }
}

impl Policy for Vpa {
    fn reserve(&mut self, known: &Known<'_>) -> f64 {
        const GROWTH: f64 = 1.05;
        for value in known.since {
            let bucket = if *value > 1e-9 { (value.ln() / GROWTH.ln()).floor() as i32 } else { i32::MIN };
            *self.buckets.entry(bucket).or_default() += self.weight;
            self.total += self.weight;
            self.weight *= self.growth_of_weight;
            if self.weight > 1e200 {
                self.buckets.values_mut().for_each(|weight| *weight /= self.weight);
                (self.total, self.weight) = (self.total / self.weight, 1.0);
            }
        }
        let mut sum = 0.0;
        let at = self.buckets.iter().find(|(_, weight)| {
            sum += **weight;
            sum >= 0.9 * self.total
        });
        let p90 = at.map_or(0.0, |(bucket, _)| if *bucket == i32::MIN { 0.0 } else { GROWTH.powi(bucket + 1) });
        Self::MARGIN * p90
    }

    fn learn(&mut self, _need: f64) {}
}

/// A controller that keeps the reservation at a share above the need.
pub(super) struct Pid {
    /// Proportional, integral, derivative.
    gains: [f64; 3],
    above: f64,
    reserved: Option<f64>,
    error_before: f64,
    sum: f64,
}

impl Pid {
    /// Slow, usual and quick.
    pub(super) const GAINS: [[f64; 3]; 3] = [[0.2, 0.02, 0.0], [0.5, 0.05, 0.05], [0.9, 0.02, 0.1]];

    pub(super) fn new(gains: [f64; 3], above: f64) -> Self {
        Self { gains, above, reserved: None, error_before: 0.0, sum: 0.0 }
    }
}

impl Policy for Pid {
    fn reserve(&mut self, known: &Known<'_>) -> f64 {
        let begin = known.since.last().copied().unwrap_or(0.0) * (1.0 + self.above);
        *self.reserved.get_or_insert(begin)
    }

    fn learn(&mut self, need: f64) {
        let Some(reserved) = &mut self.reserved else { return };
        let error = need * (1.0 + self.above) - *reserved;
        // What has built up is bounded by what is needed, or a long rise would be paid for long after.
        self.sum = (self.sum + error).clamp(-10.0 * need, 10.0 * need);
        let [p, i, d] = self.gains;
        *reserved = (*reserved + p * error + i * self.sum + d * (error - self.error_before)).max(0.0);
        self.error_before = error;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reserved_at_last(policy: &mut dyn Policy, need: impl Fn(usize) -> f64) -> f64 {
        let mut reserved = 0.0;
        for interval in 0..400 {
            let forecast = Quantiles { q05: 90.0, q50: 95.0, q90: 100.0, q95: 105.0, q99: 110.0 };
            reserved = policy.reserve(&Known { forecast, since: &[need(interval); 3] });
            policy.learn(need(interval));
        }
        reserved
    }

    #[test]
    fn each_policy_comes_to_what_it_is_for() {
        assert!((reserved_at_last(&mut Constant(120.0), |_| 1.0) - 120.0).abs() < 1e-9);
        let vpa = reserved_at_last(&mut Vpa::new(96.0), |_| 50.0);
        assert!((57.5..=60.5).contains(&vpa), "{vpa}");
        for gains in Pid::GAINS {
            let pid = reserved_at_last(&mut Pid::new(gains, 0.2), |_| 50.0);
            assert!((59.0..=61.0).contains(&pid), "{gains:?}: {pid}");
        }
        let ours =
            reserved_at_last(
                &mut Ours::new(Resource::Cpu, 4.0, 1),
                |interval| if interval % 2 == 0 { 80.0 } else { 120.0 },
            );
        assert!((120.0..=145.0).contains(&ours), "{ours}");
    }
}
