//! Learns the percentages of the reservation from the outcome of each handover.
//!
//! Per resource there are a few fixed percentages between the guard rails ("arms"), each with the mean cost seen at it;
//! the next handover takes the arm that looks cheapest after a random draw within the uncertainty of each mean (Thompson
//! sampling), so that arms that are little known are tried now and then. What has been learned can be read as a table.
//!
//! cost = what was reserved and not needed, in typical demands (slack)
//!      + the price of a shortfall (memory 2, others 0.5) + relative shortfall (at most 1) when it did not cover the demand
//!      + a penalty when it hurt: throttled 1, latency dip 1, OOM 4
//!
//! An outcome teaches more than the arm that was used, because more reservation never hurts more: the actual demand says
//! what the slack or shortfall would have been at every other percentage; if it hurt, every lower percentage would have
//! hurt too; if it did not, no higher one would have. So a dangerous low arm is priced without being tried. Inferred
//! costs count half. Old outcomes fade, because services change.

use serde::{Deserialize, Serialize};
use warmswap_model::{DemandVector, PerResource, Quantiles, Reserve, Resource};

use crate::reservation::Rails;

/// Arms per resource, besides the configured percentage.
const ARMS: usize = 13;
/// What remains of the weight of earlier outcomes at each new one: half after about 70.
const FADE: f64 = 0.99;
/// How fast the typical demand follows.
const TYPICAL_RATE: f64 = 0.02;
const INFERRED_WEIGHT: f64 = 0.5;
/// The configured percentage counts like this many outcomes in its favour.
const PRIOR_WEIGHT: f64 = 1.0;
const PRIOR_COST: f64 = 0.3;
const PRIOR_COST_PER_PERCENT: f64 = 0.004;
/// Spread of the cost of one outcome that is assumed when sampling; also keeps exploration alive.
const COST_SPREAD: f64 = 0.1;
/// Cost of not covering the demand, whether or not anything was seen to suffer, unless told otherwise: memory that is missing
/// kills, the others slow down.
const SHORT: PerResource<f64> = PerResource { cpu: 0.5, memory: 2.0, network: 0.5, disk: 0.5 };
const THROTTLED: f64 = 1.0;
const DIP: f64 = 1.0;
const OOM: f64 = 4.0;

/// What a handover showed about its reservation.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// The percentages that were used, as [`Tuner::choose`] gave them.
    pub percent: PerResource<f64>,
    /// What the percentages were of, as [`Tuner::bases`] gave it.
    pub base: PerResource<f64>,
    /// Highest demand in the horizon after the handover.
    pub actual: PerResource<f64>,
    /// The client latency dipped: p99 after was clearly above p99 before, though the handover was kept.
    pub dip: bool,
    /// The new generation was throttled (CPU).
    pub throttled: bool,
    /// The new generation, or something beside it, ran out of memory.
    pub oom: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Arm {
    percent: f64,
    mean_cost: f64,
    weight: f64,
    used: u64,
    hurt: u64,
}

/// Learned state; serialise it to keep it across restarts, and pass what was read back through [`Tuner::restore`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tuner {
    rails: Rails,
    configured: PerResource<f64>,
    tune: bool,
    short: PerResource<f64>,
    /// Mean demand of the outcomes, old ones faded; 0: not known.
    typical: PerResource<f64>,
    arms: PerResource<Vec<Arm>>,
    outcomes: u64,
}

/// The state of the tuner in words and numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TunerReport {
    pub resource: Resource,
    /// The percentage that looks best now, without exploration.
    pub percent: f64,
    pub outcomes: u64,
    pub arms: Vec<ArmReport>,
    pub text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ArmReport {
    pub percent: f64,
    pub mean_cost: f64,
    /// Outcomes behind the mean, inferred ones counted half, old ones faded.
    pub weight: f64,
    /// How often it was used, and how often it hurt then.
    pub used: u64,
    pub hurt: u64,
}

impl Tuner {
    #[must_use]
    pub fn new(reserve: &Reserve, rails: Rails) -> Self {
        let configured = reserve.percent.map(|_, percent| rails.clamp_percent(*percent));
        let arms = configured.map(|_, at| arms_around(*at, &rails));
        Self { rails, configured, tune: reserve.tune, short: SHORT, typical: PerResource::default(), arms, outcomes: 0 }
    }

    /// With another price of a shortfall, in typical demands: the dearer, the fewer.
    #[must_use]
    pub fn with_shortfall_price(self, price: f64) -> Self {
        Self { short: PerResource::from_fn(|_| price), ..self }
    }

    #[must_use]
    pub fn shortfall_price(&self, resource: Resource) -> f64 {
        self.short[resource]
    }

    /// `saved` if it was learned under the same settings and is sound, otherwise a new tuner: a changed service file or
    /// a damaged state never brings a percentage outside the rails.
    #[must_use]
    pub fn restore(saved: Option<Self>, reserve: &Reserve, rails: Rails) -> Self {
        let fresh = Self::new(reserve, rails);
        let same_arms = |saved: &Self| {
            Resource::ALL.into_iter().all(|resource| {
                let (old, new) = (&saved.arms[resource], &fresh.arms[resource]);
                old.len() == new.len()
                    && old.iter().zip(new).all(|(a, b)| a.percent == b.percent)
                    && old.iter().all(|a| a.mean_cost.is_finite() && a.weight.is_finite() && a.weight > 0.0)
                    && saved.typical[resource].is_finite()
                    && saved.typical[resource] >= 0.0
            })
        };
        match saved {
            Some(saved) if same_arms(&saved) => {
                Self { arms: saved.arms, typical: saved.typical, outcomes: saved.outcomes, ..fresh }
            }
            _ => fresh,
        }
    }

    /// The percentages for the next handover. `random` gives numbers uniform in 0 to 1; it is not called when tuning is
    /// switched off.
    pub fn choose(&self, mut random: impl FnMut() -> f64) -> PerResource<f64> {
        if !self.tune {
            return self.configured;
        }
        PerResource::from_fn(|resource| self.choose_for(resource, &mut random))
    }

    /// The percentage of one resource, as [`Self::choose`] draws it.
    pub fn choose_for(&self, resource: Resource, mut random: impl FnMut() -> f64) -> f64 {
        if !self.tune {
            return self.configured[resource];
        }
        let mut best = (f64::INFINITY, self.configured[resource]);
        for arm in &self.arms[resource] {
            let spread = COST_SPREAD / arm.weight.max(f64::MIN_POSITIVE).sqrt();
            let cost = arm.mean_cost + spread * normal(&mut random);
            if cost < best.0 {
                best = (cost, arm.percent);
            }
        }
        self.rails.clamp_percent(best.1)
    }

    /// What of a forecast the percentages are of. `memory_mb_now`: what the active holds. Counts when it is more than the forecast
    /// says, which may come from a program that was still starting: memory, unlike the rates, does not go down by itself.
    #[must_use]
    pub fn bases(&self, demand: &DemandVector, memory_mb_now: f64) -> PerResource<f64> {
        let bases = demand.quantiles.map(|resource, forecast| self.base(resource, forecast));
        PerResource { memory: bases.memory.max(memory_mb_now), ..bases }
    }

    /// What of one resource's forecast the percentage is of: the quantile at which one more unit reserved costs as much as it saves, by the
    /// forecast's own account. Where the demand is known well that is a high one; before a burst of which nobody knows how high it
    /// goes, covering it would cost more than it is worth.
    #[must_use]
    pub fn base(&self, resource: Resource, forecast: &Quantiles) -> f64 {
        /// Places that are looked at between two quantiles that are known.
        const BETWEEN: usize = 4;
        let (typical, points) = (self.typical[resource], forecast.to_levels());
        if typical <= 0.0 || !points.iter().all(|point| point.is_finite()) {
            return forecast.q90;
        }
        let (mut best, mut base) = (f64::INFINITY, forecast.q90);
        // The demand below the lowest quantile counts as that. `area`: of all below the place that is looked at.
        let (mut level, mut value) = (Quantiles::LEVELS[0], points[0]);
        let mut area = level * value;
        for (next_level, next_value) in Quantiles::LEVELS.into_iter().zip(points).skip(1) {
            let (level_step, value_step) =
                ((next_level - level) / BETWEEN as f64, (next_value - value) / BETWEEN as f64);
            for _ in 0..BETWEEN {
                area += level_step * (value + value_step / 2.0);
                (level, value) = (level + level_step, value + value_step);
                let cost = (level * value - area) / typical + self.short[resource] * (1.0 - level);
                if cost < best {
                    (best, base) = (cost, value);
                }
            }
        }
        base
    }

    /// Takes in what a handover showed. Resources whose forecast or demand is no number are left as they are.
    pub fn learn(&mut self, outcome: &Outcome) {
        self.outcomes += 1;
        // A dip is blamed on what fell short; if nothing did, on CPU, which is what a cold generation lacks.
        let falls_short = |r: Resource| outcome.actual[r] > outcome.base[r] * outcome.percent[r] / 100.0;
        let any_short = Resource::ALL.into_iter().any(falls_short);
        for resource in Resource::ALL {
            let (base, actual) = (outcome.base[resource], outcome.actual[resource]);
            let used = self.rails.clamp_percent(outcome.percent[resource]);
            if !(base.is_finite() && base > 0.0 && actual.is_finite() && actual >= 0.0) {
                continue;
            }
            let typical = &mut self.typical[resource];
            *typical = if *typical > 0.0 { *typical + TYPICAL_RATE * (actual - *typical) } else { actual };
            let typical = *typical;
            let dipped = outcome.dip && if any_short { falls_short(resource) } else { resource == Resource::Cpu };
            let penalty = [
                (dipped, DIP),
                (outcome.throttled && resource == Resource::Cpu, THROTTLED),
                (outcome.oom && resource == Resource::Memory, OOM),
            ];
            let penalty: f64 = penalty.iter().filter(|(holds, _)| *holds).map(|(_, cost)| cost).sum();
            let hurt = penalty > 0.0;
            // The arm nearest to what was used; equal unless the settings changed in between.
            let distance = |arm: &Arm| (arm.percent - used).abs();
            let arms = &mut self.arms[resource];
            let Some(nearest) = (0..arms.len()).min_by(|a, b| distance(&arms[*a]).total_cmp(&distance(&arms[*b])))
            else {
                continue;
            };
            for (index, arm) in arms.iter_mut().enumerate() {
                let fit = fit_cost(base * arm.percent / 100.0, actual, typical, self.short[resource]);
                let (cost, weight) = if index == nearest {
                    arm.used += 1;
                    arm.hurt += u64::from(hurt);
                    (fit + penalty, 1.0)
                } else if hurt && index > nearest {
                    // Whether more would have helped is not known; only trying it tells.
                    arm.weight *= FADE;
                    continue;
                } else {
                    (fit + penalty, INFERRED_WEIGHT)
                };
                // Demands near the end of what an f64 holds say nothing.
                if !cost.is_finite() {
                    continue;
                }
                arm.weight = arm.weight * FADE + weight;
                arm.mean_cost += (cost - arm.mean_cost) * weight / arm.weight;
            }
        }
    }

    /// What was learned, per resource, for a person.
    #[must_use]
    pub fn explain(&self) -> Vec<TunerReport> {
        Resource::ALL.into_iter().map(|resource| self.explain_one(resource)).collect()
    }

    fn explain_one(&self, resource: Resource) -> TunerReport {
        let arms = &self.arms[resource];
        let configured = self.configured[resource];
        let best = arms.iter().min_by(|a, b| a.mean_cost.total_cmp(&b.mean_cost));
        let percent = best.filter(|_| self.tune).map_or(configured, |arm| self.rails.clamp_percent(arm.percent));
        let text = match best {
            _ if !self.tune => format!("{resource}: {configured:.0} % as configured; tuning is off"),
            Some(best) if self.outcomes > 0 => {
                let rival = arms
                    .iter()
                    .filter(|arm| arm.percent != best.percent)
                    .min_by(|a, b| a.mean_cost.total_cmp(&b.mean_cost))
                    .map(|arm| format!("; next {:.0} % at {:.2}", arm.percent, arm.mean_cost))
                    .unwrap_or_default();
                format!(
                    "{resource}: {:.0} % of what is worth covering of the forecast looks best, mean cost {:.2} (used {}, hurt {}){rival}; {} outcomes",
                    best.percent, best.mean_cost, best.used, best.hurt, self.outcomes
                )
            }
            _ => format!("{resource}: {configured:.0} % as configured; no outcome yet"),
        };
        let arms = arms
            .iter()
            .map(|a| ArmReport {
                percent: a.percent,
                mean_cost: a.mean_cost,
                weight: a.weight,
                used: a.used,
                hurt: a.hurt,
            })
            .collect();
        TunerReport { resource, percent, outcomes: self.outcomes, arms, text }
    }
}

/// Slack in typical demands, or what a shortfall costs.
fn fit_cost(reserved: f64, actual: f64, typical: f64, short: f64) -> f64 {
    if reserved >= actual {
        if typical > 0.0 { (reserved - actual) / typical } else { 0.0 }
    } else {
        // Also for nothing reserved, where the quotient is infinite.
        short + ((actual - reserved) / reserved).min(1.0)
    }
}

/// Percentages in equal ratios from the lower to the upper rail, and the configured one.
fn arms_around(configured: f64, rails: &Rails) -> Vec<Arm> {
    let ratio = rails.percent_max / rails.percent_min;
    let grid = (0..ARMS).map(|i| rails.percent_min * ratio.powf(i as f64 / (ARMS - 1) as f64));
    // An arm next to the configured percentage would only split what is learned about it.
    let mut percents: Vec<f64> = grid.filter(|p| (p - configured).abs() > configured * 0.05).collect();
    percents.push(configured);
    percents.sort_by(f64::total_cmp);
    percents
        .into_iter()
        .map(|percent| Arm {
            percent: rails.clamp_percent(percent),
            mean_cost: PRIOR_COST + (percent - configured).abs() * PRIOR_COST_PER_PERCENT,
            weight: PRIOR_WEIGHT,
            used: 0,
            hurt: 0,
        })
        .collect()
}

/// A standard normal number from two uniform ones (Box and Muller).
fn normal(random: &mut dyn FnMut() -> f64) -> f64 {
    let radius = (-2.0 * random().clamp(1e-12, 1.0).ln()).sqrt();
    radius * (std::f64::consts::TAU * random()).cos()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use warmswap_model::Resources;

    fn rails() -> Rails {
        Rails::new(&Reserve::default(), &Resources::default())
    }

    fn uniform(seed: u64) -> impl FnMut() -> f64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1_u64 << 53) as f64
        }
    }

    /// A service that needs `needs` percent of its forecast's q90, give or take a tenth, and is hurt by less.
    fn simulate(needs: PerResource<f64>, seed: u64, rounds: usize) -> (Tuner, PerResource<f64>) {
        let mut random = uniform(seed);
        let mut tuner = Tuner::new(&Reserve::default(), rails());
        let mut chosen_last = PerResource::<f64>::default();
        let tail = rounds / 4;
        for round in 0..rounds {
            let percent = tuner.choose(&mut random);
            let base = PerResource::from_fn(|_| 50.0 + 50.0 * random());
            let actual = PerResource::from_fn(|r| base[r] * needs[r] / 100.0 * (0.9 + 0.2 * random()));
            let short = |r: Resource| actual[r] > base[r] * percent[r] / 100.0;
            tuner.learn(&Outcome {
                percent,
                base,
                actual,
                dip: short(Resource::Network) || short(Resource::Disk),
                throttled: short(Resource::Cpu),
                oom: short(Resource::Memory),
            });
            if round >= rounds - tail {
                for r in Resource::ALL {
                    chosen_last[r] += percent[r] / tail as f64;
                }
            }
        }
        (tuner, chosen_last)
    }

    #[test]
    fn converges_to_the_cheapest_percentage_that_does_not_hurt() {
        for seed in 1..=10 {
            let needs = PerResource { cpu: 70.0, memory: 130.0, network: 60.0, disk: 90.0 };
            let (tuner, mean_percent) = simulate(needs, seed, 300);
            for report in tuner.explain() {
                let need = needs[report.resource];
                let found = report.percent;
                assert!(found >= need && found <= need * 1.5, "seed {seed}: needs {need}: {}", report.text);
                let mean = mean_percent[report.resource];
                assert!(mean >= need && mean <= need * 1.6, "seed {seed}: needs {need}, uses {mean}");
            }
        }
    }

    #[test]
    fn costs_less_than_the_constant_it_started_from() {
        let needs = PerResource { cpu: 60.0, memory: 150.0, network: 100.0, disk: 60.0 };
        let (mut constant, mut tuned) = (0.0, 0.0);
        let mut random = uniform(7);
        let mut tuner = Tuner::new(&Reserve::default(), rails());
        for _ in 0..200 {
            let percent = tuner.choose(&mut random);
            let base = PerResource::from_fn(|_| 100.0);
            let actual = needs.map(|_, n| n * (0.9 + 0.2 * random()));
            let cost = |percent: f64, r: Resource| {
                fit_cost(percent, actual[r], 100.0, SHORT[r]) + if actual[r] > percent { 1.0 } else { 0.0 }
            };
            for r in Resource::ALL {
                constant += cost(Reserve::default().percent[r], r);
                tuned += cost(percent[r], r);
            }
            let short = |r: Resource| actual[r] > percent[r];
            let dip = Resource::ALL.into_iter().any(short);
            tuner.learn(&Outcome { percent, base, actual, dip, ..Outcome::default() });
        }
        assert!(tuned < 0.8 * constant, "tuned {tuned:.0}, constant {constant:.0}");
    }

    #[test]
    fn an_oom_drives_the_memory_percentage_up_at_once() {
        let mut tuner = Tuner::new(&Reserve::default(), rails());
        let percent = PerResource { memory: 110.0, ..Reserve::default().percent };
        let base = PerResource::from_fn(|_| 100.0);
        let actual = PerResource { memory: 120.0, cpu: 100.0, network: 90.0, disk: 90.0 };
        tuner.learn(&Outcome { percent, base, actual, oom: true, ..Outcome::default() });
        let report = &tuner.explain()[1];
        assert!(report.percent > 110.0, "{}", report.text);
        assert!(report.text.contains("1 outcomes"), "{}", report.text);
    }

    #[test]
    fn what_is_known_well_is_covered_and_a_burst_of_unknown_height_is_not() {
        let mut tuner = Tuner::new(&Reserve::default(), rails());
        let wide = Quantiles { q05: 1.0, q50: 10.0, q90: 100.0, q95: 400.0, q99: 2000.0 };
        assert_eq!(tuner.base(Resource::Cpu, &wide), wide.q90, "before anything is known");
        let all = |value: f64| PerResource::from_fn(|_| value);
        tuner.learn(&Outcome { percent: all(100.0), base: all(100.0), actual: all(100.0), ..Outcome::default() });
        let narrow = Quantiles { q05: 99.0, q50: 100.0, q90: 101.0, q95: 102.0, q99: 103.0 };
        assert!(tuner.base(Resource::Cpu, &narrow) >= narrow.q95);
        assert!(tuner.base(Resource::Cpu, &wide) < wide.q90);
        let dear = tuner.with_shortfall_price(1000.0);
        assert!((dear.base(Resource::Cpu, &wide) - wide.q99).abs() < 1e-6);
    }

    #[test]
    fn memory_that_is_held_counts_when_the_forecast_says_less() {
        let low = Quantiles { q05: 0.0, q50: 0.05, q90: 0.1, q95: 0.11, q99: 0.13 };
        let demand = DemandVector {
            horizon_s: 5.0,
            quantiles: PerResource::from_fn(|_| low),
            champion: PerResource::from_fn(|_| warmswap_model::Champion::Lstm),
            coverage90: PerResource::default(),
            confidence: 0.9,
        };
        let bases = Tuner::new(&Reserve::default(), rails()).bases(&demand, 30.0);
        assert_eq!((bases.memory, bases.cpu), (30.0, 0.1));
    }

    #[test]
    fn switched_off_it_keeps_what_is_configured() {
        let reserve = Reserve { tune: false, ..Reserve::default() };
        let mut tuner = Tuner::new(&reserve, rails());
        tuner.learn(&Outcome { oom: true, ..Outcome::default() });
        assert_eq!(tuner.choose(|| unreachable!("no randomness")), reserve.percent);
    }

    #[test]
    fn learned_state_survives_a_restart_and_a_damaged_one_does_not() {
        let (tuner, _) = simulate(PerResource::from_fn(|_| 80.0), 3, 50);
        let text = serde_json::to_string(&tuner).unwrap();
        let back: Tuner = serde_json::from_str(&text).unwrap();
        assert_eq!(Tuner::restore(Some(back.clone()), &Reserve::default(), rails()).arms, back.arms);
        let mut damaged = back.clone();
        damaged.arms.cpu[0].percent = 10_000.0;
        let fresh = Tuner::new(&Reserve::default(), rails());
        assert_eq!(Tuner::restore(Some(damaged), &Reserve::default(), rails()), fresh);
        let narrower = Reserve { percent_max: 120.0, ..Reserve::default() };
        let rails = Rails::new(&narrower, &Resources::default());
        assert_eq!(Tuner::restore(Some(back), &narrower, rails), Tuner::new(&narrower, rails));
    }

    proptest! {
        #[test]
        fn whatever_was_learned_the_rails_hold(
            low in 10.0..100.0_f64, width in 0.0..300.0_f64, configured in 1.0..1000.0_f64, seed in any::<u64>(),
            outcomes in prop::collection::vec((any::<f64>(), any::<f64>(), any::<f64>(), any::<u8>()), 0..40),
        ) {
            let reserve = Reserve {
                percent: PerResource::from_fn(|_| configured),
                percent_min: low,
                percent_max: low + width,
                tune: true,
            };
            let rails = Rails::new(&reserve, &Resources::default());
            let mut tuner = Tuner::new(&reserve, rails);
            let mut random = uniform(seed);
            for (base, actual, percent, flags) in outcomes {
                tuner.learn(&Outcome {
                    percent: PerResource::from_fn(|_| percent),
                    base: PerResource::from_fn(|_| base),
                    actual: PerResource::from_fn(|_| actual),
                    dip: flags & 1 != 0,
                    throttled: flags & 2 != 0,
                    oom: flags & 4 != 0,
                });
                let chosen = tuner.choose(&mut random);
                for resource in Resource::ALL {
                    prop_assert!((low..=low + width).contains(&chosen[resource]), "{chosen:?}");
                }
                for report in tuner.explain() {
                    prop_assert!((low..=low + width).contains(&report.percent));
                    prop_assert!(report.arms.iter().all(|arm| arm.mean_cost.is_finite()));
                }
            }
        }
    }
}
