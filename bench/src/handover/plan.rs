//! Which conditions are measured, how often, and how long that may take.

use std::time::Duration;

/// Sizes of the state; in every round of a group, services of all of them are handed over in turn.
pub(super) const SIZES_MIB: [u64; 3] = [1, 64, 1024];

/// One condition under which services of every size are measured side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Group {
    /// Clients of each service.
    pub(super) connections: usize,
    /// Processes that burn CPU meanwhile.
    pub(super) hogs: usize,
    pub(super) rounds: usize,
    /// No round is begun after this; the first one always is.
    pub(super) time_max: Duration,
}

pub(super) struct Plan {
    pub(super) groups: &'static [Group],
    /// Counted from the start of the run; no group is begun after this.
    pub(super) groups_time_max: Duration,
    /// Handovers of each of the smaller states in a round, around the one of the largest.
    pub(super) small_per_round: usize,
    /// At the begin and end of a group nothing happens for so long, and after some rounds: what is usual is seen there.
    pub(super) calm: Duration,
    pub(super) calm_every_rounds: usize,
    /// The comparison with peers: how often each is replaced, and how long clients are watched after.
    pub(super) restarts: usize,
    pub(super) watch: Duration,
}

const fn group(connections: usize, hogs: usize, rounds: usize, seconds: u64) -> Group {
    Group { connections, hogs, rounds, time_max: Duration::from_secs(seconds) }
}

/// About 40 s.
pub(super) const QUICK: Plan = Plan {
    groups: &[group(0, 0, 1, 3), group(100, 0, 1, 3), group(1000, 0, 1, 3), group(100, 2, 1, 3)],
    groups_time_max: Duration::from_secs(22),
    small_per_round: 2,
    calm: Duration::from_millis(600),
    calm_every_rounds: 8,
    restarts: 2,
    watch: Duration::from_millis(600),
};

/// Less than ten minutes, on a slow host too: groups that are out of time end with fewer rounds, and rows say how many.
pub(super) const WHOLE: Plan = Plan {
    groups: &[
        group(0, 0, 20, 80),
        group(100, 0, 20, 105),
        group(1000, 0, 20, 120),
        group(0, 2, 20, 45),
        group(100, 2, 20, 45),
        group(1000, 2, 20, 45),
    ],
    groups_time_max: Duration::from_secs(440),
    small_per_round: 5,
    calm: Duration::from_millis(2500),
    calm_every_rounds: 8,
    restarts: 4,
    watch: Duration::from_secs(5),
};

/// The order of a round: sizes as indices.
pub(super) fn turns(sizes: usize, small_per_round: usize) -> Vec<usize> {
    let Some(largest) = sizes.checked_sub(1) else { return Vec::new() };
    let mut turns: Vec<usize> = (0..small_per_round).flat_map(|_| 0..largest).collect();
    // In the middle, so that the small ones lie around it.
    turns.insert(turns.len() / 2, largest);
    turns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_small_ones_lie_around_the_largest() {
        assert_eq!(turns(3, 2), [0, 1, 2, 0, 1]);
        assert_eq!(turns(2, 4), [0, 0, 1, 0, 0]);
        assert_eq!(turns(1, 4), [0], "one size is the largest");
    }

    #[test]
    fn quick_cells_of_the_whole_run_get_a_hundred_handovers() {
        let small = WHOLE.groups.iter().filter(|group| group.hogs == 0);
        assert!(small.map(|group| group.rounds * WHOLE.small_per_round).all(|handovers| handovers >= 100));
        let seconds = |plan: &Plan| plan.groups.iter().map(|group| group.time_max.as_secs()).sum::<u64>();
        assert!(seconds(&WHOLE) <= 440 && seconds(&QUICK) <= 15);
    }

    #[test]
    fn every_condition_is_measured() {
        for hogs in [0, 2] {
            for connections in [0, 100, 1000] {
                assert!(WHOLE.groups.iter().any(|group| (group.connections, group.hogs) == (connections, hogs)));
            }
        }
    }
}
