//! The resident map against a `HashMap`: whatever is written, followed, compacted and handed over, both hold the same.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::collections::HashMap;

use proptest::prelude::*;
use warmswap_transfer::log::{LogConfig, LogError};
use warmswap_transfer::map::ResidentMap;
use warmswap_transfer::state::{SegmentNotice, State};

type Map = ResidentMap<Vec<u8>>;

fn config() -> LogConfig {
    LogConfig { segment_len: 64 << 10, ..LogConfig::new(1) }
}

/// An owner, a follower and what passes between them.
struct Pair {
    owner: Map,
    follower: Map,
}

impl Pair {
    fn new() -> Self {
        let mut owner = Map::new(config()).unwrap();
        owner.become_owner(None).unwrap();
        Self { owner, follower: Map::new(config()).unwrap() }
    }

    /// What the supervisor does: pass notices on in order.
    fn deliver(&mut self) {
        self.owner.commit();
        while let Some(notice) = self.owner.take_notice() {
            match notice {
                SegmentNotice::New(index) => {
                    // Gone already when it was retired before it was announced.
                    let Some(fd) = self.owner.segment_fd(index) else { continue };
                    let fd = fd.try_clone_to_owned().unwrap();
                    self.follower.add_segment(index, fd).unwrap();
                }
                SegmentNotice::Retired(index) => self.follower.retire_segment(index).unwrap(),
            }
        }
        self.follower.follow().unwrap();
        assert_eq!(self.follower.commit(), self.owner.commit());
    }

    fn hand_over(&mut self) {
        self.deliver();
        let commit = self.owner.commit();
        self.owner.become_follower();
        self.follower.become_owner(commit).unwrap();
        std::mem::swap(&mut self.owner, &mut self.follower);
    }
}

fn assert_same(map: &Map, model: &HashMap<Vec<u8>, Vec<u8>>) {
    assert_eq!(map.len(), model.len());
    for (key, value) in map.iter() {
        assert_eq!(model.get(key).map(Vec::as_slice), Some(value.as_slice()));
    }
    for (key, value) in model {
        assert_eq!(map.get(key).map(|value| value.as_slice()), Some(value.as_slice()));
    }
}

#[derive(Debug, Clone)]
enum Step {
    Insert(u8, usize),
    Remove(u8),
    Commit,
    Maintain,
    HandOver,
    /// The owner dies; what it had not committed is lost, and only that.
    OwnerDies,
    /// A new process joins with the segments there are.
    Rejoin,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        20 => (any::<u8>(), 0..6000_usize).prop_map(|(key, len)| Step::Insert(key, len)),
        4 => any::<u8>().prop_map(Step::Remove),
        4 => Just(Step::Commit),
        4 => Just(Step::Maintain),
        1 => Just(Step::HandOver),
        1 => Just(Step::OwnerDies),
        1 => Just(Step::Rejoin),
    ];
    prop::collection::vec(step, 1..400)
}

fn run(steps: Vec<Step>) {
    let mut pair = Pair::new();
    let mut model = HashMap::new();
    let mut written = 0_u32;
    for step in steps {
        match step {
            Step::Insert(key, len) => {
                written += 1;
                let mut value = vec![key; len];
                value.extend_from_slice(&written.to_le_bytes());
                let before = pair.owner.insert(&[key], &value).unwrap();
                assert_eq!(before, model.insert(vec![key], value).is_some());
            }
            Step::Remove(key) => {
                assert_eq!(pair.owner.remove(&[key]).unwrap(), model.remove(&vec![key]).is_some());
            }
            Step::Commit => {
                pair.deliver();
                assert_same(&pair.follower, &model);
            }
            Step::Maintain => pair.owner.maintain().unwrap(),
            Step::HandOver => pair.hand_over(),
            Step::OwnerDies => {
                pair.deliver();
                // Neither committed nor announced: no one will ever see it.
                pair.owner.insert(b"unpublished", &vec![0; 10]).unwrap();
                let Pair { owner, mut follower } = pair;
                drop(owner);
                follower.become_owner(None).unwrap();
                assert_same(&follower, &model);
                pair = Pair { owner: follower, follower: Map::new(config()).unwrap() };
                join(&mut pair);
            }
            Step::Rejoin => {
                pair.owner.commit();
                while pair.owner.take_notice().is_some() {}
                pair.follower = Map::new(config()).unwrap();
                join(&mut pair);
                assert_same(&pair.follower, &model);
            }
        }
        assert_eq!(pair.owner.len(), model.len());
    }
    pair.deliver();
    assert_same(&pair.owner, &model);
    assert_same(&pair.follower, &model);
}

/// Gives a new follower every segment there is.
fn join(pair: &mut Pair) {
    for index in 0..10_000 {
        if let Some(fd) = pair.owner.segment_fd(index) {
            let fd = fd.try_clone_to_owned().unwrap();
            pair.follower.add_segment(index, fd).unwrap();
        }
    }
    pair.follower.follow().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_map_holds_what_a_hash_map_holds(steps in steps()) {
        run(steps);
    }
}

#[test]
fn memory_stays_bounded_under_endless_overwrites() {
    let mut pair = Pair::new();
    let mut segments_max = 0;
    for round in 0..100_000_u32 {
        let key = round % 50;
        pair.owner.insert(&key.to_le_bytes(), &vec![round as u8; 400]).unwrap();
        if round % 10 == 0 {
            pair.owner.maintain().unwrap();
            pair.deliver();
            segments_max = segments_max.max(pair.owner.statistics().segments).max(pair.follower.statistics().segments);
        }
    }
    pair.deliver();
    // 40 MB were written, 20 kB are alive.
    assert!(segments_max <= 8, "{segments_max} segments of 64 KiB");
    assert_eq!(pair.follower.len(), 50);
    for key in 0..50_u32 {
        let expected = vec![(100_000 - 50 + key) as u8; 400];
        assert_eq!(pair.follower.get(&key.to_le_bytes()).unwrap().as_slice(), expected);
    }
    assert!(pair.owner.statistics().segments_retired > 500);
}

#[test]
fn fifty_handovers_leave_no_pile_of_half_used_segments() {
    let mut pair = Pair::new();
    for round in 0..50_u32 {
        pair.owner.insert(b"key", &round.to_le_bytes().to_vec()).unwrap();
        pair.owner.maintain().unwrap();
        pair.hand_over();
    }
    assert!(pair.owner.statistics().segments <= 8, "{:?}", pair.owner.statistics());
    assert_eq!(pair.owner.get(b"key").unwrap().as_slice(), 49_u32.to_le_bytes());
}

#[test]
fn an_owner_that_takes_back_over_goes_on_in_its_own_segment() {
    let mut pair = Pair::new();
    pair.owner.insert(b"a", &vec![1]).unwrap();
    let commit = pair.owner.commit();
    pair.owner.become_follower();
    assert!(matches!(pair.owner.insert(b"b", &vec![2]), Err(LogError::NotOwner)));
    pair.owner.become_owner(commit).unwrap();
    pair.owner.insert(b"b", &vec![2]).unwrap();
    assert_eq!(pair.owner.statistics().segments, 1);
}

#[test]
fn a_follower_that_is_behind_does_not_become_owner() {
    let mut pair = Pair::new();
    pair.owner.insert(b"a", &vec![1]).unwrap();
    let commit = pair.owner.commit();
    assert!(matches!(pair.follower.become_owner(commit), Err(LogError::Behind { .. })));
    pair.deliver();
    pair.follower.become_owner(commit).unwrap();
}

#[test]
fn what_a_stale_owner_publishes_after_its_successor_began_is_not_read() {
    let mut pair = Pair::new();
    pair.owner.insert(b"a", &vec![1]).unwrap();
    pair.deliver();
    // The old owner is taken for dead, the follower takes over and writes.
    pair.follower.become_owner(None).unwrap();
    pair.follower.insert(b"a", &vec![2]).unwrap();
    pair.follower.commit();
    let mut reader = Map::new(config()).unwrap();
    // But it was not dead.
    pair.owner.insert(b"a", &vec![66]).unwrap();
    pair.owner.commit();
    for (index, map) in [(0, &pair.owner), (1, &pair.follower)] {
        reader.add_segment(index, map.segment_fd(index).unwrap().try_clone_to_owned().unwrap()).unwrap();
    }
    reader.follow().unwrap();
    assert_eq!(reader.get(b"a").unwrap().as_slice(), [2]);
    // And the stale one learns that it is.
    let fd = pair.follower.segment_fd(1).unwrap().try_clone_to_owned().unwrap();
    pair.owner.become_follower();
    assert!(matches!(pair.owner.add_segment(1, fd), Err(LogError::Diverged { .. })));
}

/// A new segment that is announced before the ones before it must not pass for the whole log.
#[test]
fn a_follower_that_missed_a_segment_does_not_become_owner() {
    let mut pair = Pair::new();
    for key in 0..40_u32 {
        pair.owner.insert(&key.to_le_bytes(), &vec![1; 4000]).unwrap();
    }
    let commit = pair.owner.commit();
    let segment = |index| pair.owner.segment_fd(index).unwrap().try_clone_to_owned().unwrap();
    pair.follower.add_segment(2, segment(2)).unwrap();
    for index in [0, 1] {
        let refused = pair.follower.add_segment(index, segment(index));
        assert!(matches!(refused, Err(LogError::OutOfOrder { last: 2, .. })), "{refused:?}");
    }
    // It is where the owner is, and yet not all is there.
    assert!(matches!(pair.follower.become_owner(commit), Err(LogError::Different { .. })));

    let mut gap = Map::new(config()).unwrap();
    gap.add_segment(0, segment(0)).unwrap();
    let refused = gap.add_segment(2, segment(2));
    assert!(matches!(refused, Err(LogError::OutOfOrder { index: 2, last: 0 })), "{refused:?}");
}

#[test]
fn records_that_cannot_fit_are_refused_and_change_nothing() {
    let mut pair = Pair::new();
    pair.owner.insert(b"a", &vec![1]).unwrap();
    assert!(matches!(pair.owner.insert(b"a", &vec![0; 64 << 10]), Err(LogError::RecordTooLong { .. })));
    assert!(matches!(pair.owner.insert(&[0; 70_000], &vec![0]), Err(LogError::KeyTooLong { len: 70_000 })));
    assert_eq!(pair.owner.get(b"a").unwrap().as_slice(), [1]);
}

#[test]
fn values_of_another_layout_are_refused_once_and_for_all() {
    let mut owner = ResidentMap::<u32>::new(config()).unwrap();
    owner.become_owner(None).unwrap();
    owner.insert(b"a", &7).unwrap();
    owner.commit();
    let mut follower = ResidentMap::<(u64, String)>::new(config()).unwrap();
    follower.add_segment(0, owner.segment_fd(0).unwrap().try_clone_to_owned().unwrap()).unwrap();
    for _ in 0..2 {
        assert!(matches!(follower.follow(), Err(LogError::Value { schema: 1, .. })));
    }
    assert!(follower.become_owner(None).is_err());
}
