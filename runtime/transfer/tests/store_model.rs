//! The store against plain structures of the standard library: whatever is written, followed, compacted and handed over,
//! both hold the same.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::collections::{BTreeMap, HashMap};

use proptest::prelude::*;
use warmswap_transfer::log::{LogConfig, LogError};
use warmswap_transfer::state::{SegmentNotice, State};
use warmswap_transfer::store::{Counters, DeclareError, Log, Map, Record, Store};

fn config() -> LogConfig {
    LogConfig { segment_len: 64 << 10, ..LogConfig::new(1) }
}

/// One collection of each kind, and one that only some processes declare.
struct Held {
    store: Store,
    map: Map<Vec<u8>>,
    counters: Counters,
    log: Log<String>,
    record: Record<(u32, String)>,
    extra: Option<Map<u32>>,
}

impl Held {
    fn new(knows_extra: bool) -> Self {
        let mut store = Store::new(config()).unwrap();
        // The place of a collection in a process has nothing to do with its place in another.
        let extra = knows_extra.then(|| store.map("extra").unwrap());
        let (record, log) = (store.record("record").unwrap(), store.log("log").unwrap());
        let (counters, map) = (store.counters("counters").unwrap(), store.map("map").unwrap());
        Self { store, map, counters, log, record, extra }
    }

    fn insert(&mut self, key: &[u8], value: &[u8]) -> Result<bool, LogError> {
        self.map.insert(&mut self.store, key, &value.to_vec())
    }

    fn get(&self, key: &[u8]) -> Option<&[u8]> {
        self.map.get(&self.store, key).map(|value| value.as_slice())
    }
}

#[derive(Default)]
struct Model {
    map: HashMap<Vec<u8>, Vec<u8>>,
    counters: HashMap<Vec<u8>, i64>,
    log: BTreeMap<u64, String>,
    next: u64,
    record: Option<(u32, String)>,
    extra: HashMap<Vec<u8>, u32>,
}

fn assert_same(held: &Held, model: &Model) {
    let Held { store, map, counters, log, record, extra } = held;
    assert_eq!(map.len(store), model.map.len());
    for (key, value) in map.iter(store) {
        assert_eq!(model.map.get(key).map(Vec::as_slice), Some(value.as_slice()));
    }
    for (key, value) in &model.map {
        assert_eq!(held.get(key), Some(value.as_slice()));
    }
    assert_eq!(
        counters.iter(store).map(|(key, value)| (key.to_vec(), value)).collect::<HashMap<_, _>>(),
        model.counters
    );
    assert_eq!(counters.len(store), model.counters.len());
    let entries: Vec<_> = log.iter(store).map(|(number, entry)| (number, entry.as_str())).collect();
    assert_eq!(entries, model.log.iter().map(|(number, entry)| (*number, entry.as_str())).collect::<Vec<_>>());
    assert_eq!((log.len(store), log.next(store)), (model.log.len(), model.next));
    let value = record.get(store).map(|value| (value.0.to_native(), value.1.as_str().to_owned()));
    assert_eq!(value, model.record);
    if let Some(extra) = extra {
        let found: HashMap<_, _> = extra.iter(store).map(|(key, value)| (key.to_vec(), value.to_native())).collect();
        assert_eq!(found, model.extra);
    }
}

/// An owner, a follower and what passes between them.
struct Pair {
    owner: Held,
    follower: Held,
}

impl Pair {
    fn new() -> Self {
        let mut owner = Held::new(true);
        owner.store.become_owner(None).unwrap();
        Self { owner, follower: Held::new(true) }
    }

    /// What the supervisor does: pass notices on in order.
    fn deliver(&mut self) {
        let (owner, follower) = (&mut self.owner.store, &mut self.follower.store);
        owner.commit();
        while let Some(notice) = owner.take_notice() {
            match notice {
                SegmentNotice::New(index) => {
                    // Gone already when it was retired before it was announced.
                    let Some(fd) = owner.segment_fd(index) else { continue };
                    let fd = fd.try_clone_to_owned().unwrap();
                    follower.add_segment(index, fd).unwrap();
                }
                SegmentNotice::Retired(index) => follower.retire_segment(index).unwrap(),
            }
        }
        follower.follow().unwrap();
        assert_eq!(follower.commit(), owner.commit());
    }

    fn hand_over(&mut self) {
        self.deliver();
        let commit = self.owner.store.commit();
        self.owner.store.become_follower();
        self.follower.store.become_owner(commit).unwrap();
        std::mem::swap(&mut self.owner, &mut self.follower);
    }

    /// A new process joins with the segments there are.
    fn rejoin(&mut self, knows_extra: bool) {
        self.owner.store.commit();
        while self.owner.store.take_notice().is_some() {}
        self.follower = Held::new(knows_extra);
        for index in 0..10_000 {
            if let Some(fd) = self.owner.store.segment_fd(index) {
                let fd = fd.try_clone_to_owned().unwrap();
                self.follower.store.add_segment(index, fd).unwrap();
            }
        }
        self.follower.store.follow().unwrap();
    }
}

#[derive(Debug, Clone)]
enum Step {
    Insert(u8, usize),
    Remove(u8),
    Add(u8, i64),
    RemoveCounter(u8),
    Append(usize),
    Trim(u64),
    Set(u32),
    Clear,
    InsertExtra(u8, u32),
    Commit,
    Maintain,
    HandOver,
    /// The owner dies; what it had not committed is lost, and only that.
    OwnerDies,
    /// A new process takes the follower's place; it may be of a version that knows one collection less.
    Rejoin(bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        20 => (any::<u8>(), 0..6000_usize).prop_map(|(key, len)| Step::Insert(key, len)),
        4 => any::<u8>().prop_map(Step::Remove),
        8 => (0..20_u8, any::<i64>()).prop_map(|(key, by)| Step::Add(key, by)),
        1 => (0..20_u8).prop_map(Step::RemoveCounter),
        8 => (0..3000_usize).prop_map(Step::Append),
        2 => (0..40_u64).prop_map(Step::Trim),
        3 => any::<u32>().prop_map(Step::Set),
        1 => Just(Step::Clear),
        4 => (0..20_u8, any::<u32>()).prop_map(|(key, value)| Step::InsertExtra(key, value)),
        4 => Just(Step::Commit),
        4 => Just(Step::Maintain),
        1 => Just(Step::HandOver),
        1 => Just(Step::OwnerDies),
        1 => any::<bool>().prop_map(Step::Rejoin),
    ];
    prop::collection::vec(step, 1..500)
}

fn run(steps: Vec<Step>) {
    let mut pair = Pair::new();
    let mut model = Model::default();
    let mut written = 0_u32;
    for step in steps {
        let Held { store, map, counters, log, record, extra } = &mut pair.owner;
        match step {
            Step::Insert(key, len) => {
                written += 1;
                let mut value = vec![key; len];
                value.extend_from_slice(&written.to_le_bytes());
                let before = map.insert(store, &[key], &value).unwrap();
                assert_eq!(before, model.map.insert(vec![key], value).is_some());
            }
            Step::Remove(key) => {
                assert_eq!(map.remove(store, &[key]).unwrap(), model.map.remove(&vec![key]).is_some());
            }
            Step::Add(key, by) => {
                let before = model.counters.get(&vec![key]).copied().unwrap_or(0);
                match (counters.add(store, &[key], by), before.checked_add(by)) {
                    (Ok(now), Some(expected)) => {
                        assert_eq!(now, expected);
                        model.counters.insert(vec![key], now);
                    }
                    (Err(LogError::CounterOverflow), None) => {}
                    other => panic!("{other:?}"),
                }
            }
            Step::RemoveCounter(key) => {
                assert_eq!(counters.remove(store, &[key]).unwrap(), model.counters.remove(&vec![key]).is_some());
            }
            Step::Append(len) => {
                let entry = format!("{} {}", model.next, "x".repeat(len));
                assert_eq!(log.append(store, &entry).unwrap(), model.next);
                model.log.insert(model.next, entry);
                model.next += 1;
            }
            // So many are to stay.
            Step::Trim(keep) => {
                let number = model.next.saturating_sub(keep);
                log.trim_before(store, number).unwrap();
                model.log = model.log.split_off(&number);
            }
            Step::Set(number) => {
                let value = (number, format!("{number}"));
                assert_eq!(record.set(store, &value).unwrap(), model.record.replace(value).is_some());
            }
            Step::Clear => assert_eq!(record.clear(store).unwrap(), model.record.take().is_some()),
            Step::InsertExtra(key, value) => {
                if let Some(extra) = extra {
                    extra.insert(store, &[key], &value).unwrap();
                    model.extra.insert(vec![key], value);
                }
            }
            Step::Commit => {
                pair.deliver();
                assert_same(&pair.follower, &model);
            }
            Step::Maintain => store.maintain().unwrap(),
            Step::HandOver => pair.hand_over(),
            Step::OwnerDies => {
                pair.deliver();
                // Neither committed nor announced: no one will ever see it.
                pair.owner.insert(b"unpublished", &[0; 10]).unwrap();
                let Pair { owner, mut follower } = pair;
                drop(owner);
                follower.store.become_owner(None).unwrap();
                assert_same(&follower, &model);
                pair = Pair { owner: follower, follower: Held::new(true) };
                pair.rejoin(true);
            }
            Step::Rejoin(knows_extra) => {
                pair.rejoin(knows_extra);
                assert_same(&pair.follower, &model);
            }
        }
        assert_eq!(pair.owner.map.len(&pair.owner.store), model.map.len());
    }
    pair.deliver();
    assert_same(&pair.owner, &model);
    assert_same(&pair.follower, &model);
    // Whoever follows now knows all collections, also those that the processes in between only kept.
    pair.rejoin(true);
    assert_same(&pair.follower, &model);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_store_holds_what_plain_structures_hold(steps in steps()) {
        run(steps);
    }
}

#[test]
fn memory_stays_bounded_under_endless_overwrites() {
    let mut pair = Pair::new();
    let mut segments_max = 0;
    for round in 0..100_000_u32 {
        let key = round % 50;
        pair.owner.insert(&key.to_le_bytes(), &[round as u8; 400]).unwrap();
        if round % 10 == 0 {
            pair.owner.store.maintain().unwrap();
            pair.deliver();
            for held in [&pair.owner, &pair.follower] {
                segments_max = segments_max.max(held.store.statistics().segments);
            }
        }
    }
    pair.deliver();
    // 40 MB were written, 20 kB are alive.
    assert!(segments_max <= 8, "{segments_max} segments of 64 KiB");
    assert_eq!(pair.follower.map.len(&pair.follower.store), 50);
    for key in 0..50_u32 {
        let expected = vec![(100_000 - 50 + key) as u8; 400];
        assert_eq!(pair.follower.get(&key.to_le_bytes()).unwrap(), expected);
    }
    assert!(pair.owner.store.statistics().segments_retired > 500);
}

#[test]
fn a_log_that_is_trimmed_takes_bounded_memory_and_never_gives_a_number_twice() {
    let mut pair = Pair::new();
    for number in 0..20_000_u64 {
        let Held { store, log, .. } = &mut pair.owner;
        assert_eq!(log.append(store, &"entry ".repeat(50)).unwrap(), number);
        log.trim_before(store, number.saturating_sub(20)).unwrap();
        if number % 10 == 0 {
            store.maintain().unwrap();
            pair.deliver();
        }
    }
    let Held { store, log, .. } = &mut pair.owner;
    log.trim_before(store, u64::MAX).unwrap();
    assert!(log.is_empty(store) && store.statistics().segments <= 8, "{:?}", store.statistics());
    // Every segment with an entry goes, and the number stays.
    while pair.owner.store.statistics().segments_retired < 200 {
        pair.owner.insert(b"key", &[0; 5000]).unwrap();
        pair.owner.store.maintain().unwrap();
    }
    pair.rejoin(true);
    let Held { store, log, .. } = &pair.follower;
    assert_eq!((log.first(store), log.next(store), log.len(store)), (20_000, 20_000, 0));
    pair.hand_over();
    let Held { store, log, .. } = &mut pair.owner;
    assert_eq!(log.append(store, &"after".to_owned()).unwrap(), 20_000);
}

#[test]
fn fifty_handovers_leave_no_pile_of_half_used_segments() {
    let mut pair = Pair::new();
    for round in 0..50_u32 {
        pair.owner.insert(b"key", &round.to_le_bytes()).unwrap();
        pair.owner.store.maintain().unwrap();
        pair.hand_over();
    }
    let statistics = pair.owner.store.statistics();
    assert!(statistics.segments <= 8, "{statistics:?}");
    assert_eq!(pair.owner.get(b"key").unwrap(), 49_u32.to_le_bytes());
}

#[test]
fn an_owner_that_takes_back_over_goes_on_in_its_own_segment() {
    let mut pair = Pair::new();
    pair.owner.insert(b"a", &[1]).unwrap();
    let commit = pair.owner.store.commit();
    pair.owner.store.become_follower();
    assert!(matches!(pair.owner.insert(b"b", &[2]), Err(LogError::NotOwner)));
    pair.owner.store.become_owner(commit).unwrap();
    pair.owner.insert(b"b", &[2]).unwrap();
    assert_eq!(pair.owner.store.statistics().segments, 1);
}

#[test]
fn a_follower_that_is_behind_does_not_become_owner() {
    let mut pair = Pair::new();
    pair.owner.insert(b"a", &[1]).unwrap();
    let commit = pair.owner.store.commit();
    assert!(matches!(pair.follower.store.become_owner(commit), Err(LogError::Behind { .. })));
    pair.deliver();
    pair.follower.store.become_owner(commit).unwrap();
}

fn segment(held: &Held, index: u64) -> std::os::fd::OwnedFd {
    held.store.segment_fd(index).unwrap().try_clone_to_owned().unwrap()
}

#[test]
fn what_a_stale_owner_publishes_after_its_successor_began_is_not_read() {
    let mut pair = Pair::new();
    pair.owner.insert(b"a", &[1]).unwrap();
    pair.deliver();
    // The old owner is taken for dead, the follower takes over and writes.
    pair.follower.store.become_owner(None).unwrap();
    pair.follower.insert(b"a", &[2]).unwrap();
    pair.follower.store.commit();
    let mut reader = Held::new(true);
    // But it was not dead.
    pair.owner.insert(b"a", &[66]).unwrap();
    pair.owner.store.commit();
    for (index, held) in [(0, &pair.owner), (1, &pair.follower)] {
        reader.store.add_segment(index, segment(held, index)).unwrap();
    }
    reader.store.follow().unwrap();
    assert_eq!(reader.get(b"a").unwrap(), [2]);
    // And the stale one learns that it is.
    let fd = segment(&pair.follower, 1);
    pair.owner.store.become_follower();
    assert!(matches!(pair.owner.store.add_segment(1, fd), Err(LogError::Diverged { .. })));
}

/// A new segment that is announced before the ones before it must not pass for the whole log.
#[test]
fn a_follower_that_missed_a_segment_does_not_become_owner() {
    let mut pair = Pair::new();
    for key in 0..40_u32 {
        pair.owner.insert(&key.to_le_bytes(), &[1; 4000]).unwrap();
    }
    let commit = pair.owner.store.commit();
    pair.follower.store.add_segment(2, segment(&pair.owner, 2)).unwrap();
    for index in [0, 1] {
        let refused = pair.follower.store.add_segment(index, segment(&pair.owner, index));
        assert!(matches!(refused, Err(LogError::OutOfOrder { last: 2, .. })), "{refused:?}");
    }
    // It is where the owner is, and yet not all is there.
    assert!(matches!(pair.follower.store.become_owner(commit), Err(LogError::Different { .. })));

    let mut gap = Held::new(true).store;
    gap.add_segment(0, segment(&pair.owner, 0)).unwrap();
    let refused = gap.add_segment(2, segment(&pair.owner, 2));
    assert!(matches!(refused, Err(LogError::OutOfOrder { index: 2, last: 0 })), "{refused:?}");
}

#[test]
fn records_that_cannot_fit_are_refused_and_change_nothing() {
    let mut pair = Pair::new();
    pair.owner.insert(b"a", &[1]).unwrap();
    assert!(matches!(pair.owner.insert(b"a", &[0; 64 << 10]), Err(LogError::RecordTooLong { .. })));
    assert!(matches!(pair.owner.insert(&[0; 70_000], &[0]), Err(LogError::KeyTooLong { len: 70_000 })));
    assert_eq!(pair.owner.get(b"a").unwrap(), [1]);
}

/// A store that has one collection, as `declare` says, and follows the first segment of `owner`.
fn follower_of<C>(owner: &Store, declare: impl Fn(&mut Store) -> Result<C, DeclareError>) -> Store {
    let mut store = Store::new(config()).unwrap();
    declare(&mut store).unwrap();
    store.add_segment(0, owner.segment_fd(0).unwrap().try_clone_to_owned().unwrap()).unwrap();
    store
}

#[test]
fn values_of_another_layout_are_refused_once_and_for_all() {
    let mut owner = Store::new(config()).unwrap();
    let map = owner.map::<u32>("map").unwrap();
    owner.become_owner(None).unwrap();
    map.insert(&mut owner, b"a", &7).unwrap();
    owner.commit();
    let mut follower = follower_of(&owner, |store| store.map::<(u64, String)>("map"));
    for _ in 0..2 {
        assert!(matches!(follower.follow(), Err(LogError::Value { schema: 1, .. })));
    }
    assert!(follower.become_owner(None).is_err());
}

#[test]
fn a_collection_of_another_shape_is_refused_by_name() {
    let mut owner = Store::new(config()).unwrap();
    let counters = owner.counters("visits").unwrap();
    owner.become_owner(None).unwrap();
    counters.add(&mut owner, b"a", 7).unwrap();
    owner.commit();
    let error = follower_of(&owner, |store| store.map::<i64>("visits")).follow().unwrap_err();
    assert!(matches!(error, LogError::Shape { .. }) && error.to_string().contains("\"visits\" is counters"), "{error}");
}

#[test]
fn a_name_is_declared_once_and_before_the_state_arrives() {
    let mut store = Store::new(config()).unwrap();
    store.map::<u32>("a").unwrap();
    assert!(matches!(store.counters("a"), Err(DeclareError::Twice { .. })));
    // Different names, the same CRC-32.
    store.map::<u32>("plumless").unwrap();
    let collision = store.map::<u32>("buckeroo").unwrap_err();
    assert!(matches!(collision, DeclareError::Collision { .. }), "{collision}");
    store.become_owner(None).unwrap();
    assert!(matches!(store.map::<u32>("late"), Err(DeclareError::Late { .. })));
}

#[test]
#[should_panic(expected = "did not declare it")]
fn a_collection_is_of_no_use_with_another_store() {
    let mut one = Store::new(config()).unwrap();
    let mut other = Store::new(config()).unwrap();
    let map = one.map::<String>("map").unwrap();
    other.map::<u8>("map").unwrap();
    let _ = map.get(&other, b"a");
}
