//! Will memory meet its limit? A trend that a leak shows and that garbage collection, caches that fill up and steps that
//! level off do not.
//!
//! The recent past is cut into bins, each with its median (so spikes do not count). It is a leak when all of this holds:
//!
//! * the Mann–Kendall statistic says that it rises, with a chance below 0.1 % of an accident;
//! * each third of the time rises, and the last one at least a quarter as fast as the whole (it does not level off);
//! * no fall gives back more than a quarter of the rise (no sawtooth);
//! * the line with the median of all pairwise slopes (Theil–Sen) meets the limit within the horizon.

use serde::{Deserialize, Serialize};

/// Bins the past is cut into.
const BINS: usize = 30;
/// Fewest samples per bin: below, one odd sample decides.
const SAMPLES_PER_BIN: usize = 2;
/// Shortest past that is judged, in seconds.
const SECONDS_MIN: f64 = 30.0;
/// Mann–Kendall z for a one-sided chance of 0.1 %.
const Z_MIN: f64 = 3.09;
const LAST_THIRD_SHARE_MIN: f64 = 0.25;
const FALL_SHARE_MAX: f64 = 0.25;

/// When memory will meet its limit if it goes on like this.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct MemoryForecast {
    pub mb_per_s: f64,
    /// From the slope, and from the slope's upper and lower 95 % bounds. `latest_s` is infinite when the lower bound
    /// does not rise.
    pub seconds_left: f64,
    pub earliest_s: f64,
    pub latest_s: f64,
}

/// `series`: (seconds, MB), ascending in time, all of one generation. `None` when no leak is seen that meets `limit_mb`
/// within `horizon_s`.
#[must_use]
pub fn memory_exhaustion(series: &[(f64, f64)], limit_mb: f64, horizon_s: f64) -> Option<MemoryForecast> {
    let bins = binned(series)?;
    if !rises_significantly(&bins) || !rises_throughout(&bins) || falls_back(&bins) {
        return None;
    }
    let (slope, low, high) = theil_sen(&bins)?;
    let (now, _) = *series.last()?;
    let mut levels: Vec<f64> = bins.iter().map(|(t, mb)| mb + slope * (now - t)).collect();
    let room = limit_mb - median(&mut levels)?;
    let left = |slope: f64| if slope > 0.0 { (room / slope).max(0.0) } else { f64::INFINITY };
    let forecast =
        MemoryForecast { mb_per_s: slope, seconds_left: left(slope), earliest_s: left(high), latest_s: left(low) };
    (forecast.seconds_left <= horizon_s).then_some(forecast)
}

/// Medians of [`BINS`] equal stretches of time; `None` when there is too little, or it is no series.
fn binned(series: &[(f64, f64)]) -> Option<Vec<(f64, f64)>> {
    let (first, last) = (series.first()?.0, series.last()?.0);
    let length = last - first;
    let sound = series.iter().all(|(t, mb)| t.is_finite() && mb.is_finite()) && series.is_sorted_by_key(|(t, _)| *t);
    if !sound || length < SECONDS_MIN || series.len() < BINS * SAMPLES_PER_BIN {
        return None;
    }
    let mut bins: Vec<(Vec<f64>, Vec<f64>)> = vec![Default::default(); BINS];
    for (t, mb) in series {
        let index = (((t - first) / length * BINS as f64) as usize).min(BINS - 1);
        bins[index].0.push(*t);
        bins[index].1.push(*mb);
    }
    let bins: Vec<(f64, f64)> =
        bins.into_iter().filter_map(|(mut t, mut mb)| Some((median(&mut t)?, median(&mut mb)?))).collect();
    // A hole in the middle leaves empty bins; half of them must be there.
    (bins.len() >= BINS / 2).then_some(bins)
}

fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 0 => Some(f64::midpoint(values[middle - 1], values[middle])),
        _ => Some(values[middle]),
    }
}

fn slopes(points: &[(f64, f64)]) -> Vec<f64> {
    let mut slopes = Vec::with_capacity(points.len() * points.len() / 2);
    for (index, (t0, y0)) in points.iter().enumerate() {
        slopes.extend(points[index + 1..].iter().filter(|(t1, _)| t1 > t0).map(|(t1, y1)| (y1 - y0) / (t1 - t0)));
    }
    slopes.sort_by(f64::total_cmp);
    slopes
}

/// Variance of Mann and Kendall's S without trend.
fn variance_of_s(n: usize) -> f64 {
    let n = n as f64;
    n * (n - 1.0) * (2.0 * n + 5.0) / 18.0
}

fn rises_significantly(points: &[(f64, f64)]) -> bool {
    let s: f64 = slopes(points).iter().map(|slope| if *slope == 0.0 { 0.0 } else { slope.signum() }).sum();
    (s - 1.0) / variance_of_s(points.len()).sqrt() >= Z_MIN
}

fn rises_throughout(points: &[(f64, f64)]) -> bool {
    // First to last bin of a third would hang on two values; the median slope of a staircase would be zero.
    let rise = |points: &[(f64, f64)]| {
        let half = points.len() / 2;
        let level = |part: &[(f64, f64)]| median(&mut part.iter().map(|(_, mb)| *mb).collect::<Vec<_>>());
        Some(level(&points[points.len() - half..])? - level(&points[..half])?)
    };
    let third = points.len() / 3;
    let thirds = [&points[..third], &points[third..points.len() - third], &points[points.len() - third..]];
    let Some(whole) = rise(points) else { return false };
    // The halves of the whole lie three times as far apart as those of a third.
    let steady = whole / 3.0;
    let rises = |part: &[(f64, f64)]| rise(part).is_some_and(|rise| rise > 0.0);
    thirds.iter().all(|part| rises(part)) && rise(thirds[2]).is_some_and(|last| last >= LAST_THIRD_SHARE_MIN * steady)
}

fn falls_back(points: &[(f64, f64)]) -> bool {
    let (mut highest, mut deepest) = (f64::NEG_INFINITY, 0.0_f64);
    for (_, mb) in points {
        highest = highest.max(*mb);
        deepest = deepest.max(highest - mb);
    }
    let lowest = points.iter().map(|(_, mb)| *mb).fold(f64::INFINITY, f64::min);
    deepest > FALL_SHARE_MAX * (highest - lowest)
}

/// The median slope with Sen's 95 % confidence bounds.
fn theil_sen(points: &[(f64, f64)]) -> Option<(f64, f64, f64)> {
    let mut slopes = slopes(points);
    let count = slopes.len();
    let reach = 1.96 * variance_of_s(points.len()).sqrt();
    let rank = |r: f64| (r.max(0.0) as usize).min(count.saturating_sub(1));
    let low = *slopes.get(rank((count as f64 - reach) / 2.0))?;
    let high = *slopes.get(rank((count as f64 + reach) / 2.0))?;
    Some((median(&mut slopes)?, low, high))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn noise(i: usize) -> f64 {
        let z = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((z ^ (z >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as f64 / (1 << 24) as f64 - 0.5
    }

    fn series(seconds: usize, at: impl Fn(f64) -> f64) -> Vec<(f64, f64)> {
        (0..seconds).map(|s| (s as f64, at(s as f64) + noise(s) * 2.0)).collect()
    }

    fn found(series: &[(f64, f64)]) -> bool {
        memory_exhaustion(series, 500.0, 600.0).is_some()
    }

    #[test]
    fn a_leak_is_forecast_with_the_right_time() {
        let leak = series(120, |t| 100.0 + t);
        let forecast = memory_exhaustion(&leak, 500.0, 600.0).expect("a leak");
        assert!((forecast.seconds_left - 281.0).abs() < 10.0, "{forecast:?}");
        assert!(forecast.earliest_s <= forecast.seconds_left && forecast.seconds_left <= forecast.latest_s);
        assert!(memory_exhaustion(&leak, 500.0, 200.0).is_none(), "beyond the horizon");
    }

    #[test]
    fn leaks_with_spikes_and_in_small_steps_are_seen() {
        assert!(found(&series(120, |t| 100.0 + t + if t % 17.0 == 0.0 { 150.0 } else { 0.0 })));
        assert!(found(&series(120, |t| 100.0 + (t / 6.0).floor() * 10.0)));
    }

    #[test]
    fn what_is_no_leak_is_not_taken_for_one() {
        let cases: [(&str, Vec<(f64, f64)>); 9] = [
            ("flat", series(200, |_| 480.0)),
            ("sawtooth", series(200, |t| 100.0 + (t % 40.0) * 8.0)),
            (
                "sawtooth whose last tooth is longest",
                series(200, |t| 100.0 + if t < 80.0 { t } else { t - 80.0 } * 3.0),
            ),
            ("one step", series(200, |t| if t < 100.0 { 100.0 } else { 300.0 })),
            ("step at the end", series(200, |t| if t < 190.0 { 100.0 } else { 450.0 })),
            ("levels off", series(300, |t| 100.0 + 350.0 * (1.0 - (-t / 40.0).exp()))),
            (
                "two steps",
                series(300, |t| 100.0 + if t > 60.0 { 100.0 } else { 0.0 } + if t > 150.0 { 100.0 } else { 0.0 }),
            ),
            ("falls", series(200, |t| 490.0 - t)),
            ("too short", series(20, |t| 100.0 + t * 10.0)),
        ];
        for (name, case) in cases {
            assert!(!found(&case), "{name}: {:?}", memory_exhaustion(&case, 500.0, 600.0));
        }
    }

    #[test]
    fn broken_series_are_refused() {
        for broken in [vec![], vec![(0.0, f64::NAN); 100], vec![(f64::INFINITY, 1.0); 100], vec![(5.0, 1.0); 100]] {
            assert!(!found(&broken));
        }
        let backwards: Vec<_> = series(120, |t| 100.0 + t).into_iter().rev().collect();
        assert!(!found(&backwards));
    }

    proptest! {
        #[test]
        fn noise_around_a_level_is_no_leak(level in 10.0..490.0_f64, spread in 0.0..200.0_f64, from in 0_usize..1_000_000) {
            let flat: Vec<_> = (0..200).map(|s| (s as f64, level + spread * noise(from + s))).collect();
            prop_assert!(!found(&flat));
        }

        #[test]
        fn steady_leaks_are_seen_through_noise(mb_per_s in 0.5..5.0_f64, from in 0_usize..1_000_000) {
            let leak: Vec<_> = (0..90).map(|s| (s as f64, mb_per_s * (s as f64 + 4.0 * noise(from + s)))).collect();
            prop_assert!(memory_exhaustion(&leak, 90.0 * mb_per_s * 2.0, 600.0).is_some());
        }
    }
}
