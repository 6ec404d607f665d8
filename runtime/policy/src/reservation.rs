//! How much is held for the shadow: a quantile of the demand times a percentage, inside hard limits, and only if it is
//! there.

use serde::{Deserialize, Serialize};
use warmswap_model::{PerResource, Reserve, Resource, Resources};

/// Limits that no forecast and no tuner can cross.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rails {
    /// Percent of what the tuner takes of the forecast.
    pub percent_min: f64,
    pub percent_max: f64,
    /// Largest reservation per resource, in its own unit; `None` when there is no limit.
    pub ceiling: PerResource<Option<f64>>,
}

impl Rails {
    /// From a service file: reserving more than a generation may ever use would be waste.
    #[must_use]
    pub fn new(reserve: &Reserve, resources: &Resources) -> Self {
        Self {
            percent_min: reserve.percent_min,
            percent_max: reserve.percent_max,
            ceiling: PerResource {
                cpu: Some(resources.cpu_pct_max),
                memory: Some(resources.memory_mb_max),
                network: None,
                disk: None,
            },
        }
    }

    /// `percent` brought inside the limits; what is no number becomes the lower limit.
    #[must_use]
    pub fn clamp_percent(&self, percent: f64) -> f64 {
        if percent.is_nan() { self.percent_min } else { percent.max(self.percent_min).min(self.percent_max) }
    }
}

/// What the tuner takes of the forecast ([`Tuner::bases`](crate::Tuner::bases)) × percentage, per resource, in the resource's unit;
/// never negative, never above the ceiling. A base that is no number reserves nothing: the shadow then starts as it would without
/// a forecast.
#[must_use]
pub fn reservation(base: &PerResource<f64>, percent: &PerResource<f64>, rails: &Rails) -> PerResource<f64> {
    PerResource::from_fn(|resource| {
        let wanted = base[resource] * rails.clamp_percent(percent[resource]) / 100.0;
        let ceiling = rails.ceiling[resource].unwrap_or(f64::INFINITY).max(0.0);
        if wanted.is_finite() { wanted.max(0.0).min(ceiling) } else { 0.0 }
    })
}

/// What the host can promise, per resource. `None` when that is not known: then it is not checked.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Capacity {
    pub available: PerResource<Option<f64>>,
}

impl Capacity {
    /// Share of all memory that is never promised, so that a shadow does not push the host itself into reclaim.
    pub const MEMORY_KEPT_SHARE: f64 = 0.02;

    /// From what the host reports. CPU counts whole cores, because CPU can be taken back at any moment and memory cannot.
    #[must_use]
    pub fn of_host(cpus: u32, memory_mb_available: f64, memory_mb_total: f64) -> Self {
        let memory = (memory_mb_available - memory_mb_total * Self::MEMORY_KEPT_SHARE).max(0.0);
        Self {
            available: PerResource {
                cpu: Some(f64::from(cpus) * 100.0),
                memory: Some(memory),
                network: None,
                disk: None,
            },
        }
    }
}

/// The host does not have what the reservation needs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error(
    "too little {resource} for the reservation: {needed:.0} {} are needed, {available:.0} {} are free to promise; free \
     some, lower reserve.percent.{resource} or resources in the service file, or update at a quieter time",
    resource.unit(), resource.unit()
)]
pub struct Shortage {
    pub resource: Resource,
    pub needed: f64,
    pub available: f64,
}

/// Whether a reservation can be promised beside the leases that are held already. Memory first, because only memory
/// kills when it is missing.
pub fn fits(
    reservation: &PerResource<f64>,
    capacity: &Capacity,
    leases_held: &PerResource<f64>,
) -> Result<(), Shortage> {
    for resource in [Resource::Memory, Resource::Cpu, Resource::Network, Resource::Disk] {
        let Some(capacity) = capacity.available[resource] else { continue };
        let needed = reservation[resource];
        let available = (capacity - leases_held[resource].max(0.0)).max(0.0);
        // A comparison that is false for NaN must not let NaN through.
        let enough = needed <= available;
        if !enough {
            return Err(Shortage { resource, needed, available });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rails() -> Rails {
        Rails::new(&Reserve::default(), &Resources::default())
    }

    fn any_number() -> impl Strategy<Value = f64> {
        prop_oneof![
            4 => -1e6..1e6_f64,
            1 => prop::sample::select(vec![f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -0.0, f64::MAX]),
        ]
    }

    fn any_per_resource() -> impl Strategy<Value = PerResource<f64>> {
        (any_number(), any_number(), any_number(), any_number()).prop_map(|(cpu, memory, network, disk)| PerResource {
            cpu,
            memory,
            network,
            disk,
        })
    }

    #[test]
    fn a_reservation_is_a_percentage_of_its_base() {
        let base = PerResource { cpu: 50.0, memory: 200.0, network: 8.0, disk: 4.0 };
        let percent = PerResource { cpu: 110.0, memory: 120.0, network: 100.0, disk: 50.0 };
        let reserved = reservation(&base, &percent, &rails());
        assert!((reserved.cpu - 55.0).abs() < 1e-9 && (reserved.memory - 240.0).abs() < 1e-9);
        assert!((reserved.network - 8.0).abs() < 1e-9 && (reserved.disk - 2.0).abs() < 1e-9);
    }

    #[test]
    fn memory_that_the_host_does_not_have_is_not_promised() {
        let capacity = Capacity::of_host(2, 1000.0, 2000.0);
        let held = PerResource { memory: 700.0, ..PerResource::default() };
        let wants = |memory| PerResource { memory, ..PerResource::default() };
        assert_eq!(fits(&wants(260.0), &capacity, &held), Ok(()));
        let shortage = fits(&wants(261.0), &capacity, &held).expect_err("1 MB too much");
        assert_eq!((shortage.resource, shortage.available), (Resource::Memory, 260.0));
        let text = shortage.to_string();
        assert!(text.starts_with("too little memory for the reservation: 261 MB are needed, 260 MB"), "{text}");
        assert!(fits(&wants(f64::NAN), &capacity, &held).is_err());
    }

    proptest! {
        #[test]
        fn no_forecast_and_no_percentage_crosses_the_rails(base in any_per_resource(), percent in any_per_resource()) {
            let reserved = reservation(&base, &percent, &rails());
            for resource in Resource::ALL {
                let value = reserved[resource];
                prop_assert!(value.is_finite() && value >= 0.0);
                prop_assert!(rails().ceiling[resource].is_none_or(|ceiling| value <= ceiling));
                if base[resource].is_finite() && base[resource] > 0.0 {
                    prop_assert!(value <= base[resource] * 2.0 * 1.000_001);
                }
            }
        }

        #[test]
        fn what_fits_was_free(
            wanted in any_per_resource(), held in any_per_resource(), free_mb in 0.0..4000.0_f64,
        ) {
            let capacity = Capacity::of_host(2, free_mb, 4000.0);
            if fits(&wanted, &capacity, &held).is_ok() {
                for resource in Resource::ALL {
                    let Some(available) = capacity.available[resource] else { continue };
                    // Others may already hold more than there is; then only nothing fits.
                    let free = (available - held[resource].max(0.0)).max(0.0);
                    prop_assert!(wanted[resource] <= free);
                }
            }
        }
    }
}
