//! A change of schema between processes of two versions, against plain structures: whoever owns, follows, dies or comes back,
//! everything acknowledged is there in the layout of whoever reads it.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use warmswap_transfer::log::{LogConfig, LogError};
use warmswap_transfer::message::Commit;
use warmswap_transfer::segment::{SegmentError, segment_schema};
use warmswap_transfer::state::{SegmentNotice, State};
use warmswap_transfer::store::{Counters, DeclareError, Evolution, Log, Map, Store};

/// What each version writes and reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    /// Schema 1: a value is a text.
    One,
    /// Schema 2: a value is a text after its length in bytes. Reads and writes back schema 1. One collection more.
    Two,
    /// As two, without a way back.
    TwoForGood,
    /// Schema 3: schema 2 with the text reversed, in both ways; reads schema 1 too, for good.
    Three,
}

impl Version {
    fn config(self, segment_len: usize) -> LogConfig {
        let (schema, schemas_read) = match self {
            Self::One => (1, vec![1]),
            Self::Two | Self::TwoForGood => (2, vec![1, 2]),
            Self::Three => (3, vec![1, 2, 3]),
        };
        LogConfig { segment_len, schemas_read, ..LogConfig::new(schema) }
    }

    fn reads(self, schema: u32) -> bool {
        self.config(1 << 16).schemas_read.contains(&schema)
    }
}

const SEGMENT_LEN: usize = 64 << 10;

type Text = String;
type Sized = (u64, String);

fn up(text: &str) -> Sized {
    (text.len() as u64, text.to_owned())
}

fn reversed(text: &str) -> String {
    text.chars().rev().collect()
}

fn evolution(version: Version) -> Evolution<Sized> {
    match version {
        Version::One => unreachable!("its values are texts"),
        Version::Two => {
            Evolution::new().both_ways::<Text>(1, |text| up(text.as_str()), |sized| sized.1.as_str().to_owned())
        }
        Version::TwoForGood => Evolution::new().one_way::<Text>(1, |text| up(text.as_str())),
        Version::Three => Evolution::new().one_way::<Text>(1, |text| up(&reversed(text.as_str()))).both_ways::<Sized>(
            2,
            |sized| (sized.0.to_native(), reversed(sized.1.as_str())),
            |sized| (sized.0.to_native(), reversed(sized.1.as_str())),
        ),
    }
}

#[derive(Debug, Clone, Copy)]
enum Values {
    Texts(Map<Text>, Log<Text>),
    Sized { map: Map<Sized>, log: Log<Sized>, extra: Map<u32> },
}

/// A process of a version.
struct Process {
    version: Version,
    store: Store,
    counters: Counters,
    values: Values,
}

/// What a process holds, in words that all versions share.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Held {
    map: BTreeMap<Vec<u8>, String>,
    log: Vec<(u64, String)>,
    counters: BTreeMap<Vec<u8>, i64>,
    extra: BTreeMap<Vec<u8>, u32>,
}

impl Process {
    fn new(version: Version) -> Self {
        Self::with(version, SEGMENT_LEN)
    }

    fn with(version: Version, segment_len: usize) -> Self {
        let mut store = Store::new(version.config(segment_len)).unwrap();
        let values = if version == Version::One {
            Values::Texts(store.map("map").unwrap(), store.log("log").unwrap())
        } else {
            let extra = store.map("extra").unwrap();
            let log = store.log_evolved("log", evolution(version)).unwrap();
            Values::Sized { map: store.map_evolved("map", evolution(version)).unwrap(), log, extra }
        };
        let counters = store.counters("counters").unwrap();
        Self { version, store, counters, values }
    }

    fn own(version: Version) -> Self {
        let mut process = Self::new(version);
        process.store.become_owner(None).unwrap();
        process
    }

    fn text(&self, (len, text): (u64, &str)) -> String {
        assert_eq!(len, text.len() as u64);
        if self.version == Version::Three { reversed(text) } else { text.to_owned() }
    }

    fn sized(&self, text: &str) -> Sized {
        up(&if self.version == Version::Three { reversed(text) } else { text.to_owned() })
    }

    fn put(&mut self, key: &[u8], text: &str) {
        let sized = self.sized(text);
        match self.values {
            Values::Texts(map, _) => map.insert(&mut self.store, key, &text.to_owned()).unwrap(),
            Values::Sized { map, .. } => map.insert(&mut self.store, key, &sized).unwrap(),
        };
    }

    fn remove(&mut self, key: &[u8]) -> bool {
        match self.values {
            Values::Texts(map, _) => map.remove(&mut self.store, key).unwrap(),
            Values::Sized { map, .. } => map.remove(&mut self.store, key).unwrap(),
        }
    }

    fn append(&mut self, text: &str) {
        let sized = self.sized(text);
        match self.values {
            Values::Texts(_, log) => log.append(&mut self.store, &text.to_owned()).unwrap(),
            Values::Sized { log, .. } => log.append(&mut self.store, &sized).unwrap(),
        };
    }

    /// Keeps the last `count` entries.
    fn keep(&mut self, count: u64) {
        match self.values {
            Values::Texts(_, log) => {
                let number = log.next(&self.store).saturating_sub(count);
                log.trim_before(&mut self.store, number).unwrap();
            }
            Values::Sized { log, .. } => {
                let number = log.next(&self.store).saturating_sub(count);
                log.trim_before(&mut self.store, number).unwrap();
            }
        }
    }

    fn held(&self) -> Held {
        let store = &self.store;
        let counters = self.counters.iter(store).map(|(name, value)| (name.to_vec(), value)).collect();
        match self.values {
            Values::Texts(map, log) => Held {
                map: map.iter(store).map(|(key, text)| (key.to_vec(), text.as_str().to_owned())).collect(),
                log: log.iter(store).map(|(number, text)| (number, text.as_str().to_owned())).collect(),
                counters,
                extra: BTreeMap::new(),
            },
            Values::Sized { map, log, extra } => {
                let text = |value: &rkyv::Archived<Sized>| self.text((value.0.to_native(), value.1.as_str()));
                Held {
                    map: map.iter(store).map(|(key, value)| (key.to_vec(), text(value))).collect(),
                    log: log.iter(store).map(|(number, value)| (number, text(value))).collect(),
                    counters,
                    extra: extra.iter(store).map(|(key, value)| (key.to_vec(), value.to_native())).collect(),
                }
            }
        }
    }
}

/// What a supervisor does with the state of a service: it keeps the segments that the owner announced and passes news on.
struct Service {
    owner: Process,
    follower: Option<Process>,
    segments: BTreeMap<u64, OwnedFd>,
    /// What was acknowledged.
    model: Held,
    next: u64,
}

impl Service {
    fn new(version: Version) -> Self {
        Self {
            owner: Process::own(version),
            follower: None,
            segments: BTreeMap::new(),
            model: Held::default(),
            next: 0,
        }
    }

    /// Passes on at most `limit` notices; true when there are no more.
    fn deliver_some(&mut self, limit: usize) -> bool {
        for _ in 0..limit {
            let Some(notice) = self.owner.store.take_notice() else { return true };
            match notice {
                SegmentNotice::New(index) => {
                    let Some(fd) = self.owner.store.segment_fd(index) else { continue };
                    let fd = fd.try_clone_to_owned().unwrap();
                    let schema = segment_schema(fd.as_fd()).unwrap();
                    // One that cannot read it cannot follow any more.
                    self.follower = self.follower.take().filter(|follower| follower.version.reads(schema));
                    if let Some(follower) = &mut self.follower {
                        follower.store.add_segment(index, fd.try_clone().unwrap()).unwrap();
                    }
                    self.segments.insert(index, fd);
                }
                SegmentNotice::Retired(index) => {
                    self.segments.remove(&index);
                    if let Some(follower) = &mut self.follower {
                        follower.store.retire_segment(index).unwrap();
                    }
                }
            }
        }
        false
    }

    /// As the SDK before it acknowledges.
    fn commit(&mut self) -> Option<Commit> {
        while !self.deliver_some(usize::MAX) || self.owner.store.announced() {}
        let commit = self.owner.store.commit();
        assert!(self.owner.store.take_notice().is_none());
        commit
    }

    fn check(&mut self) {
        let commit = self.commit();
        assert_eq!(self.owner.held(), self.known_to(self.owner.version), "the owner, {:?}", self.owner.version);
        if let Some(follower) = &mut self.follower {
            follower.store.follow().unwrap();
            assert_eq!(follower.store.commit(), commit);
            assert_eq!(follower.held(), known(&self.model, follower.version), "the follower, {:?}", follower.version);
        }
    }

    fn known_to(&self, version: Version) -> Held {
        known(&self.model, version)
    }

    /// A process that gets everything there is. `None` when its version cannot read it.
    fn joined(&mut self, version: Version) -> Option<Process> {
        let mut process = Process::new(version);
        for (index, fd) in &self.segments {
            match process.store.add_segment(*index, fd.try_clone().unwrap()) {
                Err(LogError::Segment(SegmentError::Schema { .. })) => return None,
                result => result.unwrap(),
            }
            // In between, as messages come.
            process.store.follow().unwrap();
        }
        Some(process)
    }

    fn join(&mut self, version: Version) {
        self.commit();
        if let Some(process) = self.joined(version) {
            self.follower = Some(process);
            self.check();
        }
    }

    /// Ownership to the follower; the old owner follows.
    fn switch(&mut self) {
        if self.follower.is_none() {
            return;
        }
        self.commit();
        let Some(mut heir) = self.follower.take() else { return };
        let commit = self.owner.store.commit();
        self.owner.store.become_follower();
        heir.store.become_owner(commit).unwrap();
        self.follower = Some(std::mem::replace(&mut self.owner, heir));
    }

    /// The owner is gone; a process of another version, or of its own, takes over what is announced.
    fn owner_dies(&mut self, version: Version) {
        let heir = self.joined(version).or_else(|| self.joined(self.owner.version));
        self.owner = heir.unwrap();
        self.follower = None;
        self.owner.store.become_owner(None).unwrap();
        // Nobody follows a process that was started alone.
        self.owner.store.let_followers_go();
    }
}

/// Version one keeps the extra collection of the others and cannot see it.
fn known(model: &Held, version: Version) -> Held {
    let extra = if version == Version::One { BTreeMap::new() } else { model.extra.clone() };
    Held { extra, ..model.clone() }
}

#[derive(Debug, Clone)]
enum Step {
    Put(u8, usize),
    Remove(u8),
    Append(usize),
    Keep(u64),
    Add(u8, i8),
    Extra(u8, u32),
    Commit,
    Maintain,
    Join(Version),
    Switch,
    LetGo,
    /// The owner lets go and dies when so many of its notices have left.
    DiesMoving(usize, Version),
    Dies(Version),
}

fn versions() -> impl Strategy<Value = Version> {
    prop::sample::select(vec![Version::One, Version::Two, Version::Two, Version::TwoForGood, Version::Three])
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        20 => (any::<u8>(), 0..6000_usize).prop_map(|(key, len)| Step::Put(key, len)),
        4 => any::<u8>().prop_map(Step::Remove),
        6 => (0..2000_usize).prop_map(Step::Append),
        2 => (0..30_u64).prop_map(Step::Keep),
        4 => (0..20_u8, any::<i8>()).prop_map(|(name, by)| Step::Add(name, by)),
        4 => (0..20_u8, any::<u32>()).prop_map(|(key, value)| Step::Extra(key, value)),
        4 => Just(Step::Commit),
        4 => Just(Step::Maintain),
        4 => versions().prop_map(Step::Join),
        4 => Just(Step::Switch),
        2 => Just(Step::LetGo),
        1 => (0..12_usize, versions()).prop_map(|(notices, version)| Step::DiesMoving(notices, version)),
        1 => versions().prop_map(Step::Dies),
    ];
    prop::collection::vec(step, 1..400)
}

fn run(first: Version, steps: Vec<Step>) {
    let mut service = Service::new(first);
    let mut written = 0;
    for step in steps {
        written += 1;
        let Service { owner, model, next, .. } = &mut service;
        match step {
            Step::Put(key, len) => {
                let text = format!("{written} {}", "é".repeat(len / 2));
                owner.put(&[key], &text);
                model.map.insert(vec![key], text);
            }
            Step::Remove(key) => assert_eq!(owner.remove(&[key]), model.map.remove(&vec![key]).is_some()),
            Step::Append(len) => {
                let text = format!("{written} {}", "x".repeat(len));
                owner.append(&text);
                model.log.push((*next, text));
                *next += 1;
            }
            Step::Keep(count) => {
                owner.keep(count);
                let first = next.saturating_sub(count);
                model.log.retain(|(number, _)| *number >= first);
            }
            Step::Add(name, by) => {
                let value = owner.counters.add(&mut owner.store, &[name], by.into()).unwrap();
                let expected = model.counters.entry(vec![name]).or_default();
                *expected += i64::from(by);
                assert_eq!(value, *expected);
            }
            Step::Extra(key, value) => {
                if let Values::Sized { extra, .. } = owner.values {
                    extra.insert(&mut owner.store, &[key], &value).unwrap();
                    model.extra.insert(vec![key], value);
                }
            }
            Step::Commit => service.check(),
            Step::Maintain => owner.store.maintain().unwrap(),
            Step::Join(version) => service.join(version),
            Step::Switch => service.switch(),
            Step::LetGo => {
                service.commit();
                service.follower = None;
                service.owner.store.let_followers_go();
                service.check();
                let schemas: Vec<_> = service.segments.values().map(AsFd::as_fd).map(segment_schema).collect();
                assert!(schemas.iter().all(|schema| *schema == schemas[0]), "one log is left: {schemas:?}");
            }
            Step::DiesMoving(notices, version) => {
                service.commit();
                service.follower = None;
                service.owner.store.let_followers_go();
                service.owner.store.commit();
                let left = notices.saturating_sub(service.segments.len());
                if service.deliver_some(notices) && service.owner.store.announced() {
                    service.deliver_some(left);
                }
                service.owner_dies(version);
                service.check();
            }
            Step::Dies(version) => {
                service.commit();
                // Neither committed nor announced: no one will ever see it.
                service.owner.put(b"unpublished", "never");
                service.owner_dies(version);
                service.check();
            }
        }
    }
    service.check();
    let schema = service.owner.store.schemas().1;
    let last = if schema == 1 { Version::One } else { Version::Three };
    let reader = service.joined(last).or_else(|| service.joined(Version::Three)).unwrap();
    assert_eq!(reader.held(), service.known_to(reader.version));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn every_version_holds_what_plain_structures_hold(first in versions(), steps in steps()) {
        run(first, steps);
    }
}

/// Version one with `keys` values of `len` bytes, and a process of another version that follows it.
fn followed(version: Version, keys: u32, len: usize) -> Service {
    let mut service = Service::new(Version::One);
    for key in 0..keys {
        service.owner.put(&key.to_le_bytes(), &"x".repeat(len));
        service.model.map.insert(key.to_le_bytes().to_vec(), "x".repeat(len));
    }
    service.join(version);
    assert!(service.follower.is_some());
    service
}

#[test]
fn a_rollback_carries_what_the_new_version_wrote_when_it_can_write_the_old_schema() {
    let mut service = followed(Version::Two, 100, 1000);
    assert_eq!(service.follower.as_ref().unwrap().store.schemas_written_back(), [1]);
    service.switch();
    service.owner.put(b"new", "written by version two");
    service.model.map.insert(b"new".to_vec(), "written by version two".into());
    service.check();
    assert!(service.owner.remove(&7_u32.to_le_bytes()));
    service.model.map.remove(7_u32.to_le_bytes().as_slice());
    service.switch();
    assert_eq!(service.owner.version, Version::One);
    service.check();
    // And what version one writes then goes on into the other schema.
    service.owner.put(b"newer", "written by version one");
    service.model.map.insert(b"newer".to_vec(), "written by version one".into());
    service.check();
}

#[test]
fn a_version_without_a_way_back_announces_its_log_before_it_acknowledges_and_leaves_the_old_one() {
    let mut service = followed(Version::TwoForGood, 300, 1000);
    assert_eq!(service.follower.as_ref().unwrap().store.schemas_written_back(), [0_u32; 0]);
    service.switch();
    assert!(service.owner.store.must_be_announced());
    service.owner.put(b"new", "written");
    service.model.map.insert(b"new".to_vec(), "written".into());
    service.check();
    assert!(!service.owner.store.must_be_announced());
    assert!(service.follower.is_none(), "version one was shown what it cannot read");
    assert!(service.segments.values().all(|fd| segment_schema(fd.as_fd()) == Some(2)));
    service.owner_dies(Version::TwoForGood);
    service.check();
}

#[test]
fn wherever_an_owner_dies_as_it_moves_to_its_schema_one_whole_log_is_there() {
    for version in [Version::Two, Version::TwoForGood] {
        let mut points = 0;
        for notices in 0.. {
            let mut service = followed(version, 600, 1000);
            service.switch();
            if version == Version::Two {
                service.owner.put(b"verify", "written while version one was parked");
                service.model.map.insert(b"verify".to_vec(), "written while version one was parked".into());
                service.check();
            }
            service.follower = None;
            service.owner.store.let_followers_go();
            service.owner.store.commit();
            // So many messages reach the supervisor.
            let mut left = notices;
            let ended = loop {
                if left == 0 {
                    break false;
                }
                left -= 1;
                if service.deliver_some(1) && !service.owner.store.announced() {
                    break true;
                }
            };
            let schemas: Vec<_> = service.segments.values().map(AsFd::as_fd).map(segment_schema).collect();
            // The successor of the successor finds the rest of both.
            for _ in 0..2 {
                service.owner_dies(version);
                service.check();
                assert!(service.segments.values().all(|fd| segment_schema(fd.as_fd()) == Some(2)));
            }
            points += usize::from(schemas.contains(&Some(1)) && schemas.contains(&Some(2)));
            if ended {
                break;
            }
        }
        assert!(points > 10, "{points} points with segments of both logs");
    }
}

/// The supervisor passes on what the owner announces while the owner unstages it.
#[test]
fn a_log_that_becomes_the_state_while_it_arrives_is_read_from_its_beginning() {
    // So many of its segments arrive before.
    for early in 0..6 {
        let mut service = followed(Version::Two, 600, 1000);
        service.switch();
        service.follower = None;
        service.owner.store.let_followers_go();
        assert!(service.deliver_some(usize::MAX));
        let segments: Vec<_> = service.segments.iter().map(|(index, fd)| (*index, fd.try_clone().unwrap())).collect();
        let first = segments.iter().position(|(_, fd)| segment_schema(fd.as_fd()) == Some(2)).unwrap();
        assert!(segments.len() > first + early);
        let mut reader = Process::new(Version::Three);
        for (at, (index, fd)) in segments.into_iter().enumerate() {
            if at == first + early {
                assert!(service.owner.store.announced());
            }
            reader.store.add_segment(index, fd).unwrap();
            reader.store.follow().unwrap();
        }
        service.follower = Some(reader);
        service.check();
    }
}

#[test]
fn a_staged_log_alone_is_not_taken_for_the_state() {
    let mut service = followed(Version::Two, 300, 1000);
    service.switch();
    service.follower = None;
    service.owner.store.let_followers_go();
    assert!(service.deliver_some(usize::MAX));
    let mut reader = Process::new(Version::Two);
    for (index, fd) in service.segments.iter().filter(|(_, fd)| segment_schema(fd.as_fd()) == Some(2)) {
        reader.store.add_segment(*index, fd.try_clone().unwrap()).unwrap();
    }
    assert!(matches!(reader.store.become_owner(None), Err(LogError::Unfinished)));
}

#[test]
fn a_version_that_cannot_read_the_schema_is_refused_by_its_first_segment() {
    let mut service = Service::new(Version::Two);
    service.owner.put(b"a", "text");
    service.commit();
    let fd = service.segments[&0].try_clone().unwrap();
    let refused = Process::new(Version::One).store.add_segment(0, fd);
    let Err(LogError::Segment(error)) = refused else { panic!("{refused:?}") };
    assert_eq!(error.to_string(), "segment 0 is written in schema 2, and this program reads [1]");
}

#[test]
fn old_values_of_another_layout_are_refused_once_and_for_all() {
    let mut owner = Store::new(LogConfig { segment_len: SEGMENT_LEN, ..LogConfig::new(1) }).unwrap();
    let map = owner.map::<u8>("map").unwrap();
    owner.become_owner(None).unwrap();
    map.insert(&mut owner, b"a", &7).unwrap();
    owner.commit();
    let mut follower = Process::new(Version::Two);
    let fd = owner.segment_fd(0).unwrap().try_clone_to_owned().unwrap();
    follower.store.add_segment(0, fd).unwrap();
    for _ in 0..2 {
        assert!(matches!(follower.store.follow(), Err(LogError::Value { schema: 1, .. })));
    }
    assert!(follower.store.become_owner(None).is_err());
}

#[test]
fn an_evolution_names_older_schemas_that_are_read() {
    for schema in [2, 9] {
        let mut store = Store::new(Version::Two.config(SEGMENT_LEN)).unwrap();
        let evolution = Evolution::<Sized>::new().one_way::<Text>(schema, |text| up(text.as_str()));
        let refused = store.map_evolved("map", evolution);
        assert!(matches!(refused, Err(DeclareError::Schema { schema: named, .. }) if named == schema), "{refused:?}");
    }
}

#[test]
fn memory_stays_bounded_while_both_schemas_are_written() {
    let mut service = followed(Version::Two, 50, 400);
    service.switch();
    let mut segments_max = 0;
    for round in 0..50_000_u32 {
        let text = format!("{round:0>400}");
        service.owner.put(&(round % 50).to_le_bytes(), &text);
        service.model.map.insert((round % 50).to_le_bytes().to_vec(), text);
        if round % 10 == 0 {
            service.owner.store.maintain().unwrap();
            service.commit();
            service.follower.as_mut().unwrap().store.follow().unwrap();
            segments_max = segments_max.max(service.owner.store.statistics().segments);
        }
    }
    // 20 MB were written to each log, 20 kB are alive in each.
    assert!(segments_max <= 16, "{segments_max} segments of 64 KiB in two logs");
    service.check();
    service.switch();
    service.check();
}

/// A hundred times the state, the same blackout.
#[test]
fn becoming_owner_does_not_depend_on_how_much_was_converted() {
    const VALUE_LEN: usize = 8000;
    let shortest = |mib: usize| {
        let mut owner = Process::with(Version::One, 16 << 20);
        owner.store.become_owner(None).unwrap();
        for key in 0..(mib << 20) / VALUE_LEN {
            owner.put(&key.to_le_bytes(), &"x".repeat(VALUE_LEN));
        }
        let mut heir = Process::with(Version::Two, 16 << 20);
        owner.store.commit();
        for index in 0..10_000 {
            let Some(fd) = owner.store.segment_fd(index) else { break };
            heir.store.add_segment(index, fd.try_clone_to_owned().unwrap()).unwrap();
        }
        heir.store.follow().unwrap();
        assert_eq!(heir.held().map.len(), (mib << 20) / VALUE_LEN);
        let mut shortest = Duration::MAX;
        for round in 0..10 {
            owner.store.become_owner(None).unwrap();
            // The last record is what a blackout has to convert.
            owner.put(b"last", &format!("round {round}"));
            let commit = owner.store.commit();
            owner.store.become_follower();
            let began = Instant::now();
            heir.store.become_owner(commit).unwrap();
            shortest = shortest.min(began.elapsed());
            let Values::Sized { map, .. } = heir.values else { unreachable!() };
            assert_eq!(map.get(&heir.store, b"last").unwrap().1.as_str(), format!("round {round}"));
            heir.store.become_follower();
        }
        shortest
    };
    let (small, large) = (shortest(1), shortest(256));
    println!("becoming owner took {small:?} after 1 MiB and {large:?} after 256 MiB of the older schema");
    assert!(large < Duration::from_micros(200).max(small * 10), "{small:?} after 1 MiB, {large:?} after 256 MiB");
}
