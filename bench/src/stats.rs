//! The arithmetic of a result: quantiles by rank, their spread, ratios of what was measured side by side.

/// Quantile by rank of values in any order; `None` when there are none.
pub(crate) fn quantile(values: &[f64], q: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (q * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied()
}

pub(crate) fn median(values: &[f64]) -> Option<f64> {
    quantile(values, 0.5)
}

/// First and third quartile: the spread of a median.
pub(crate) fn quartiles(values: &[f64]) -> Option<[f64; 2]> {
    Some([quantile(values, 0.25)?, quantile(values, 0.75)?])
}

/// Within these lies the median of what `values` are a sample of, with 95 % confidence, whatever their distribution: the
/// values whose ranks are 1.96 standard deviations of a binomial count away from the middle. `None` below 6 values, where
/// no two values are that far apart.
pub(crate) fn median_interval(values: &[f64]) -> Option<[f64; 2]> {
    const VALUES_MIN: usize = 6;
    if values.len() < VALUES_MIN {
        return None;
    }
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len() as f64;
    let half = 0.98 * n.sqrt();
    let low = (n / 2.0 - half).floor().max(0.0) as usize;
    let high = ((n / 2.0 + half).ceil() as usize).min(sorted.len() - 1);
    Some([sorted[low], sorted[high]])
}

/// `ours[i] / theirs[i]`, where that can be divided: what both saw at the same time cancels.
pub(crate) fn ratios(ours: &[f64], theirs: &[f64]) -> Vec<f64> {
    ours.iter().zip(theirs).filter(|(_, theirs)| **theirs > 0.0).map(|(a, b)| a / b).collect()
}

/// The median of [`ratios`]. `None` when nothing can be divided.
pub(crate) fn paired_ratio(ours: &[f64], theirs: &[f64]) -> Option<f64> {
    median(&ratios(ours, theirs))
}

/// One round of alternating measurements: some of a small state around one of a large state.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Round {
    pub(crate) small: Vec<f64>,
    pub(crate) large: Option<f64>,
}

/// Each round's large value over the median of its small ones.
pub(crate) fn round_ratios(rounds: &[Round]) -> Vec<f64> {
    let ratio = |round: &Round| {
        let small = median(&round.small).filter(|small| *small > 0.0)?;
        Some(round.large? / small)
    };
    rounds.iter().filter_map(ratio).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_by_rank() {
        let values = [5.0, 1.0, 3.0, 2.0, 4.0];
        assert_eq!(median(&values), Some(3.0));
        assert_eq!(quantile(&values, 0.99), Some(5.0));
        assert_eq!(quantile(&values, 0.0), Some(1.0));
        assert_eq!(quartiles(&values), Some([2.0, 4.0]));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn the_interval_of_a_median_narrows_with_more_values() {
        let values = |n: u32| (1..=n).map(f64::from).collect::<Vec<_>>();
        assert_eq!(median_interval(&values(5)), None);
        let [low, high] = median_interval(&values(10)).unwrap();
        assert_eq!((low, high), (2.0, 10.0));
        let [low, high] = median_interval(&values(100)).unwrap();
        assert_eq!((low, high), (41.0, 61.0));
    }

    #[test]
    fn a_drift_that_both_see_cancels() {
        let ours = [10.0, 20.0, 40.0, 80.0];
        let theirs = [5.0, 10.0, 20.0, 40.0];
        assert_eq!(paired_ratio(&ours, &theirs), Some(2.0));
        assert_eq!(paired_ratio(&ours, &[0.0; 4]), None);
        assert_eq!(paired_ratio(&[], &[]), None);
    }

    #[test]
    fn a_round_counts_only_with_both_sizes() {
        let rounds = [
            Round { small: vec![100.0, 90.0, 300.0], large: Some(110.0) },
            Round { small: vec![200.0, 180.0, 900.0], large: Some(200.0) },
            Round { small: vec![100.0], large: None },
            Round { small: vec![], large: Some(100.0) },
        ];
        assert_eq!(round_ratios(&rounds), [1.1, 1.0]);
    }
}
