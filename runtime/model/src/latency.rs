//! Latency distributions as the probes count them.

use serde::{Deserialize, Serialize};

/// Counts per bucket, with each bucket's upper bound in nanoseconds, ascending; empty buckets may be left out.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct LatencyHistogram {
    pub buckets: Vec<(u64, u64)>,
}

impl LatencyHistogram {
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|(_, count)| count).sum()
    }

    /// Upper bound, in ns, of the bucket that holds quantile `q` (0 to 1); `None` when nothing was counted.
    #[must_use]
    pub fn quantile_ns(&self, q: f64) -> Option<u64> {
        let total = self.count();
        if total == 0 {
            return None;
        }
        let rank = ((q.clamp(0.0, 1.0) * total as f64).ceil() as u64).max(1);
        let mut seen = 0;
        self.buckets.iter().find_map(|(upper, count)| {
            seen += count;
            (seen >= rank).then_some(*upper)
        })
    }

    pub fn add(&mut self, other: &Self) {
        for (upper, count) in &other.buckets {
            match self.buckets.binary_search_by_key(upper, |(u, _)| *u) {
                Ok(at) => self.buckets[at].1 += count,
                Err(at) => self.buckets.insert(at, (*upper, *count)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_come_from_ranks() {
        let mut h = LatencyHistogram { buckets: vec![(10, 98), (100, 1)] };
        h.add(&LatencyHistogram { buckets: vec![(50, 0), (1000, 1)] });
        assert_eq!(h.count(), 100);
        assert_eq!(h.quantile_ns(0.5), Some(10));
        assert_eq!(h.quantile_ns(0.99), Some(100));
        assert_eq!(h.quantile_ns(1.0), Some(1000));
        assert_eq!(LatencyHistogram::default().quantile_ns(0.5), None);
    }
}
