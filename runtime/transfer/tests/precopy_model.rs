//! Pre-copied state against a plain map: whatever is changed between slices of the base, handed over, called off, taken
//! back or killed, whoever owns afterwards holds what was acknowledged, or refuses to own.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use warmswap_transfer::heap::HeapError;
use warmswap_transfer::log::{LogConfig, LogError};
use warmswap_transfer::precopy::{Precopied, Precopy};
use warmswap_transfer::state::{Followed, Preparing, SegmentNotice, State};

type Model = BTreeMap<u8, Vec<u8>>;

#[derive(Debug, Default)]
struct Table(Model);

#[derive(Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
enum Entry {
    Is(u8, Vec<u8>),
    Gone(u8),
}

impl Precopy for Table {
    type Piece = Entry;
    type Cursor = Bound<u8>;

    fn begin(&self) -> Bound<u8> {
        Bound::Unbounded
    }

    fn next(&self, cursor: &mut Bound<u8>) -> Option<Entry> {
        let (key, value) = self.0.range((*cursor, Bound::Unbounded)).next()?;
        *cursor = Bound::Excluded(*key);
        Some(Entry::Is(*key, value.clone()))
    }

    fn apply(&mut self, piece: Entry) {
        match piece {
            Entry::Is(key, value) => drop(self.0.insert(key, value)),
            Entry::Gone(key) => drop(self.0.remove(&key)),
        }
    }

    fn clear(&mut self) {
        self.0.clear();
    }
}

fn config() -> LogConfig {
    LogConfig { segment_len: 64 << 10, ..LogConfig::new(1) }
}

fn table() -> Precopied<Table> {
    Precopied::new(Table::default(), config())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Alone,
    /// The other one is a shadow.
    Sync,
    /// The other one is parked.
    Verify,
}

struct Stage {
    owner: Precopied<Table>,
    other: Precopied<Table>,
    phase: Phase,
    /// Segments on their way to the other one.
    wire: VecDeque<(u64, OwnedFd)>,
    model: Model,
    /// What may be found after the owner's death: what was acknowledged last, and what came after it in order.
    possible: Vec<Model>,
}

impl Stage {
    fn new() -> Self {
        let mut owner = table();
        owner.become_owner(None).unwrap();
        let possible = vec![Model::new()];
        Self { owner, other: table(), phase: Phase::Alone, wire: VecDeque::new(), model: Model::new(), possible }
    }

    fn change(&mut self, piece: Entry) {
        match &piece {
            Entry::Is(key, value) => drop(self.model.insert(*key, value.clone())),
            Entry::Gone(key) => drop(self.model.remove(key)),
        }
        self.owner.change(piece).unwrap();
        self.possible.push(self.model.clone());
    }

    fn acknowledge(&mut self) -> Option<warmswap_transfer::message::Commit> {
        while let Some(notice) = self.owner.take_notice() {
            let SegmentNotice::New(index) = notice else { panic!("it retires nothing") };
            let fd = self.owner.segment_fd(index).expect("announced before it is given up");
            self.wire.push_back((index, fd.try_clone_to_owned().unwrap()));
        }
        self.possible = vec![self.model.clone()];
        self.owner.commit()
    }

    fn deliver(&mut self, count: usize) {
        for (index, fd) in self.wire.drain(..count.min(self.wire.len())) {
            self.other.add_segment(index, fd).unwrap();
        }
        self.other.follow().unwrap();
    }

    fn switch(&mut self) {
        self.owner.hand_over().unwrap();
        let commit = self.acknowledge();
        assert!(commit.is_some());
        self.deliver(usize::MAX);
        self.owner.become_follower();
        self.other.become_owner(commit).unwrap();
        std::mem::swap(&mut self.owner, &mut self.other);
        assert_eq!(self.owner.get().0, self.model);
        self.owner.followed(Followed::ByPredecessor).unwrap();
    }

    fn alone(&mut self) {
        self.owner.followed(Followed::ByNobody).unwrap();
        assert_eq!(self.owner.commit(), None, "nothing is written for nobody");
        self.other = table();
        self.wire.clear();
        self.phase = Phase::Alone;
    }

    /// Everything that was announced arrives; what was not published is lost.
    fn owner_dies(&mut self) {
        self.deliver(usize::MAX);
        self.owner = std::mem::replace(&mut self.other, table());
        let heard_of_it = self.owner.position().is_some();
        match self.owner.become_owner(None) {
            // Nobody told it that there is a state: it begins, as its image does when it is started again.
            Ok(()) if !heard_of_it => {
                *self = Self::new();
                return;
            }
            Ok(()) => self.model = self.owner.get().0.clone(),
            Err(LogError::Heap(HeapError::NotWhole { .. })) if self.phase == Phase::Sync => {
                // Its image starts again, with nothing.
                *self = Self::new();
                return;
            }
            Err(error) => panic!("{error}"),
        }
        assert!(self.possible.contains(&self.model), "neither what was acknowledged nor what came after");
        self.possible = vec![self.model.clone()];
        self.alone();
    }
}

#[derive(Debug, Clone)]
enum Step {
    Change(u8, usize),
    Remove(u8),
    Acknowledge,
    Prepare,
    Deliver(usize),
    Join,
    CallOff { yielded: bool },
    HandOver,
    Keep,
    RollBack,
    OwnerDies,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        30 => (any::<u8>(), 0..9000_usize).prop_map(|(key, len)| Step::Change(key, len)),
        6 => any::<u8>().prop_map(Step::Remove),
        10 => Just(Step::Acknowledge),
        10 => Just(Step::Prepare),
        5 => (0..4_usize).prop_map(Step::Deliver),
        4 => Just(Step::Join),
        1 => any::<bool>().prop_map(|yielded| Step::CallOff { yielded }),
        4 => Just(Step::HandOver),
        1 => Just(Step::Keep),
        2 => Just(Step::RollBack),
        1 => Just(Step::OwnerDies),
    ];
    prop::collection::vec(step, 1..300)
}

fn run(steps: Vec<Step>) {
    let mut stage = Stage::new();
    let mut written = 0_u32;
    for step in steps {
        match (step, stage.phase) {
            (Step::Change(key, len), _) => {
                written += 1;
                let mut value = vec![key; len];
                value.extend_from_slice(&written.to_le_bytes());
                stage.change(Entry::Is(key, value));
            }
            (Step::Remove(key), _) => stage.change(Entry::Gone(key)),
            (Step::Acknowledge, _) => drop(stage.acknowledge()),
            (Step::Prepare, Phase::Sync) => {
                let left = stage.owner.prepare().unwrap();
                if left == Preparing::Later {
                    std::thread::sleep(Duration::from_micros(300));
                }
            }
            (Step::Deliver(count), Phase::Sync | Phase::Verify) => stage.deliver(count),
            (Step::Join, Phase::Alone) => {
                stage.other = table();
                stage.owner.followed(Followed::ByNewcomer).unwrap();
                stage.phase = Phase::Sync;
            }
            (Step::CallOff { yielded }, Phase::Sync) => {
                if yielded {
                    stage.owner.hand_over().unwrap();
                    stage.acknowledge();
                    stage.owner.become_follower();
                    assert!(matches!(stage.owner.change(Entry::Gone(0)), Err(LogError::NotOwner)));
                    stage.owner.become_owner(None).unwrap();
                }
                stage.alone();
            }
            (Step::HandOver, Phase::Sync) => {
                stage.switch();
                stage.phase = Phase::Verify;
            }
            (Step::Keep, Phase::Verify) => stage.alone(),
            (Step::RollBack, Phase::Verify) => {
                stage.switch();
                stage.alone();
            }
            (Step::OwnerDies, Phase::Sync | Phase::Verify) => stage.owner_dies(),
            _ => {}
        }
        assert_eq!(stage.owner.get().0, stage.model);
    }
    if stage.phase != Phase::Alone {
        stage.switch();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn whoever_owns_holds_what_was_acknowledged(steps in steps()) {
        run(steps);
    }
}

/// An owner with `keys` values of `len` bytes, followed by a shadow.
fn followed(keys: u8, len: usize) -> Stage {
    let mut stage = Stage::new();
    for key in 0..keys {
        stage.change(Entry::Is(key, vec![key; len]));
    }
    stage.owner.followed(Followed::ByNewcomer).unwrap();
    stage.phase = Phase::Sync;
    stage
}

fn prepare_all(stage: &mut Stage) -> usize {
    let until = Instant::now() + Duration::from_secs(60);
    let mut slices = 0;
    while stage.owner.prepare().unwrap() != Preparing::Done {
        assert!(Instant::now() < until);
        stage.acknowledge();
        slices += 1;
    }
    stage.acknowledge();
    slices
}

#[test]
fn nothing_is_written_while_nobody_follows() {
    let mut stage = Stage::new();
    stage.change(Entry::Is(1, vec![1; 1000]));
    assert_eq!((stage.owner.commit(), stage.owner.bytes_moved()), (None, 0));
    assert_eq!(stage.owner.prepare().unwrap(), Preparing::Done);
    assert!(stage.owner.take_notice().is_none());
}

#[test]
fn the_base_goes_out_in_slices_and_passed_segments_are_given_up() {
    let mut stage = followed(255, 9000);
    let slices = prepare_all(&mut stage);
    assert!(slices > 3, "{slices} slices for two megabytes");
    let segments = stage.wire.len();
    assert!(segments > 20, "{segments}");
    let held = (0..1000).filter(|index| stage.owner.segment_fd(*index).is_some()).count();
    assert!(held <= 2, "{held} segments are held for what others have");
    assert!((255 * 9000..255 * 9500).contains(&stage.owner.bytes_moved()), "{}", stage.owner.bytes_moved());
    stage.switch();
}

#[test]
fn a_part_of_the_base_is_not_served() {
    let mut stage = followed(255, 9000);
    while stage.wire.len() < 3 {
        stage.owner.prepare().unwrap();
        stage.acknowledge();
    }
    stage.deliver(usize::MAX);
    assert!(!stage.other.get().0.is_empty());
    let refused = stage.other.become_owner(None).unwrap_err();
    assert!(matches!(refused, LogError::Heap(HeapError::NotWhole { .. })), "{refused}");
    let commit = stage.acknowledge();
    assert!(stage.other.become_owner(commit).is_err());
}

#[test]
fn a_follower_that_misses_the_end_or_a_segment_does_not_own() {
    let mut stage = followed(60, 3000);
    prepare_all(&mut stage);
    let mut lossy = table();
    let mut late = table();
    let last = stage.wire.len() - 1;
    for (at, (index, fd)) in stage.wire.iter().enumerate() {
        if at != 1 {
            let added = lossy.add_segment(*index, fd.try_clone().unwrap());
            assert_eq!(added.is_err(), at > 1, "{added:?}");
        }
        if at != last {
            late.add_segment(*index, fd.try_clone().unwrap()).unwrap();
        }
    }
    let commit = stage.acknowledge();
    assert!(lossy.become_owner(commit).is_err());
    assert!(late.become_owner(commit).is_err());
    stage.switch();
}

#[test]
fn what_the_image_brings_is_forgotten_when_a_base_comes() {
    let mut stage = followed(3, 10);
    prepare_all(&mut stage);
    stage.other = Precopied::new(Table(BTreeMap::from([(200, vec![1])])), config());
    stage.switch();
}

#[test]
fn a_stream_for_somebody_else_is_not_taken_for_ours() {
    let mut stage = followed(60, 3000);
    prepare_all(&mut stage);
    let (index, fd) = stage.wire.pop_back().unwrap();
    // From the middle of the stream for a shadow that is gone, then our own from its beginning.
    stage.other.add_segment(index, fd).unwrap();
    stage.other.follow().unwrap();
    assert!(stage.other.get().0.is_empty());
    stage.wire.clear();
    stage.owner.followed(Followed::ByNewcomer).unwrap();
    prepare_all(&mut stage);
    stage.switch();
}

#[test]
fn a_record_that_is_no_piece_is_refused() {
    use warmswap_transfer::log::LogReader;
    use warmswap_transfer::record::{RecordKind, Shape, Tag};
    for (key, value) in [(&b"p"[..], &b"\xff\xff"[..]), (b"x", b"")] {
        let Ok(mut writer) = LogReader::new(config()).unwrap().into_writer(None) else { panic!() };
        writer.append(RecordKind::Put, Tag { collection: 0, shape: Shape::Log }, key, value).unwrap();
        writer.commit();
        let fd = writer.segments().get(0).unwrap().as_fd().try_clone_to_owned().unwrap();
        let mut follower = table();
        follower.add_segment(0, fd).unwrap();
        let error = follower.follow().unwrap_err();
        assert!(matches!(error, LogError::Value { .. } | LogError::Heap(HeapError::NoPiece { .. })), "{error}");
        assert!(follower.become_owner(None).is_err());
    }
}

#[test]
fn a_parked_process_takes_no_new_base() {
    let mut stage = followed(5, 10);
    prepare_all(&mut stage);
    stage.switch();
    let mut intruder = followed(1, 10);
    prepare_all(&mut intruder);
    let (_, fd) = intruder.wire.pop_front().unwrap();
    assert!(stage.other.add_segment(0, fd).is_err());
    assert_eq!(stage.other.get().0, stage.model);
}
