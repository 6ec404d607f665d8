//! Snapshots: whole or refused, whatever is left out, added or damaged; state old or new, never mixed.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rkyv::rancor;
use warmswap_transfer::heap::{HeapError, SHARDS_MAX};
use warmswap_transfer::log::{LogConfig, LogError};
use warmswap_transfer::message::Commit;
use warmswap_transfer::segment::SegmentError;
use warmswap_transfer::snapshot::{ArchivedShard, Snapshot, Snapshotted, to_shards};
use warmswap_transfer::state::{Followed, Preparing, SegmentNotice, State};

type Shard = BTreeMap<u8, String>;

/// What the offsets of the formats are, for damage at the right place.
const ARCHIVE: u64 = 192;

#[derive(Debug, Default)]
struct Table {
    shards: Vec<Shard>,
    hint: usize,
    /// The predecessor's, read where they lie.
    in_place: Vec<ArchivedShard<Shard>>,
    keep_in_place: bool,
}

impl Table {
    fn new(shards: usize) -> Self {
        Self { shards: vec![Shard::new(); shards], hint: 1 << 16, ..Self::default() }
    }

    fn set(&mut self, key: u8, value: String) {
        let shard = usize::from(key) % self.shards.len();
        self.shards[shard].insert(key, value);
    }

    fn all(&self) -> Shard {
        self.shards.iter().flatten().map(|(key, value)| (*key, value.clone())).collect()
    }
}

impl Snapshot for Table {
    type Shard = Shard;

    fn shards(&self) -> Vec<&Shard> {
        self.shards.iter().collect()
    }

    fn len_hint(&self) -> usize {
        self.hint
    }

    fn restore(&mut self, shards: Vec<ArchivedShard<Shard>>) -> Result<(), rancor::Error> {
        self.shards = to_shards(&shards)?;
        if self.keep_in_place {
            self.in_place = shards;
        }
        Ok(())
    }
}

struct Stage {
    owner: Snapshotted<Table>,
    other: Snapshotted<Table>,
    wire: Vec<(u64, OwnedFd)>,
    model: Shard,
}

impl Stage {
    fn new(shards: usize) -> Self {
        let mut owner = Snapshotted::new(Table::new(shards), LogConfig::new(1));
        owner.become_owner(None).unwrap();
        let mut stage = Self { owner, other: shadow(), wire: Vec::new(), model: Shard::new() };
        for key in 0..100 {
            stage.set(key, usize::from(key) * 10);
        }
        stage
    }

    fn set(&mut self, key: u8, len: usize) {
        let value = "x".repeat(len) + &key.to_string();
        self.model.insert(key, value.clone());
        self.owner.get_mut().set(key, value);
    }

    fn collect(&mut self) {
        while let Some(notice) = self.owner.take_notice() {
            let SegmentNotice::New(index) = notice else { panic!("it retires nothing") };
            let fd = self.owner.segment_fd(index).unwrap().try_clone_to_owned().unwrap();
            self.wire.push((index, fd));
        }
    }

    fn prepare(&mut self, by: Followed) {
        self.owner.followed(by).unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        while self.owner.prepare().unwrap() != Preparing::Done {
            assert!(Instant::now() < until);
            std::thread::sleep(Duration::from_micros(100));
        }
        self.collect();
    }

    fn yields(&mut self) -> Option<Commit> {
        self.owner.hand_over().unwrap();
        self.collect();
        let commit = self.owner.commit();
        self.owner.become_follower();
        commit
    }

    fn deliver(&mut self) {
        for (index, fd) in self.wire.drain(..) {
            self.other.add_segment(index, fd).unwrap();
        }
    }

    fn switch(&mut self) {
        let commit = self.yields();
        assert!(commit.is_some());
        self.deliver();
        self.other.become_owner(commit).unwrap();
        std::mem::swap(&mut self.owner, &mut self.other);
        assert_eq!(self.owner.get().all(), self.model);
    }
}

fn shadow() -> Snapshotted<Table> {
    let mut own = Table::new(3);
    own.set(255, "what the image brings".into());
    Snapshotted::new(own, LogConfig::new(1))
}

fn assert_not_whole(result: &Result<(), LogError>) {
    assert!(matches!(result, Err(LogError::Heap(HeapError::NotWhole { .. }))), "{result:?}");
}

#[test]
fn state_moves_there_and_back_with_what_was_changed() {
    let mut stage = Stage::new(4);
    stage.prepare(Followed::ByNewcomer);
    assert_eq!(stage.wire.len(), 4, "a segment for each shard is made ahead");
    stage.deliver();
    stage.set(7, 3000);
    let before = stage.model.clone();
    stage.switch();
    stage.prepare(Followed::ByPredecessor);
    stage.set(8, 3000);
    assert_eq!(stage.other.get().all(), before, "the parked one keeps what it had");
    stage.switch();
    stage.owner.followed(Followed::ByNobody).unwrap();
    assert_eq!(stage.owner.segment_fd(0).is_none(), stage.owner.segment_fd(1).is_none());
}

#[test]
fn shards_may_be_read_where_they_lie_for_as_long_as_they_are_kept() {
    let mut stage = Stage::new(4);
    stage.prepare(Followed::ByNewcomer);
    stage.other.get_mut().keep_in_place = true;
    stage.switch();
    // Both let go of their segments; the memory stays for who reads it.
    stage.owner.followed(Followed::ByNobody).unwrap();
    stage.other = shadow();
    let kept = &stage.owner.get().in_place;
    assert_eq!(kept.len(), 4);
    for (key, value) in &stage.model {
        let shard = &kept[usize::from(*key) % 4];
        assert_eq!(shard.get(key).unwrap().as_str(), value);
    }
}

#[test]
fn more_state_than_the_hint_said_moves_too() {
    let mut stage = Stage::new(2);
    stage.owner.get_mut().hint = 0;
    stage.prepare(Followed::ByNewcomer);
    stage.deliver();
    // Both shards outgrow what was prepared, and one is longer than any record of a log.
    stage.set(0, 6 << 20);
    stage.set(1, 300 << 10);
    stage.switch();
    assert!(stage.other.bytes_moved() > 6 << 20);
    // The next time it is known.
    stage.prepare(Followed::ByPredecessor);
    let announced = stage.wire.len();
    stage.switch();
    assert_eq!(announced, 2);
}

#[test]
fn what_is_prepared_too_late_is_done_in_the_blackout() {
    let mut stage = Stage::new(4);
    stage.owner.followed(Followed::ByNewcomer).unwrap();
    stage.switch();
}

#[test]
fn a_shard_longer_than_a_segment_can_be_is_refused_before_the_blackout() {
    let mut stage = Stage::new(2);
    stage.owner.get_mut().hint = 3 << 30;
    stage.owner.followed(Followed::ByNewcomer).unwrap();
    let refused = stage.owner.prepare().unwrap_err();
    assert!(matches!(refused, LogError::Heap(HeapError::ShardTooLong { .. })), "{refused}");
    assert!(refused.to_string().contains("more shards"));
}

#[test]
fn neither_no_shards_nor_too_many_are_taken() {
    for count in [0, SHARDS_MAX + 1] {
        let mut owner = Snapshotted::new(Table::new(count), LogConfig::new(1));
        owner.become_owner(None).unwrap();
        owner.followed(Followed::ByNewcomer).unwrap();
        assert!(matches!(owner.prepare(), Err(LogError::Heap(HeapError::ShardCount { .. }))));
        assert!(matches!(owner.hand_over(), Err(LogError::Heap(HeapError::ShardCount { .. }))));
        assert_eq!(owner.commit(), None);
    }
}

#[test]
fn who_yielded_in_vain_goes_on_with_what_it_has() {
    let mut stage = Stage::new(3);
    stage.prepare(Followed::ByNewcomer);
    stage.yields();
    stage.owner.become_owner(None).unwrap();
    stage.owner.followed(Followed::ByNobody).unwrap();
    assert_eq!(stage.owner.get().all(), stage.model);
    // A snapshot of the attempt before is not mixed up with this one.
    stage.set(9, 5);
    stage.other = shadow();
    stage.wire.clear();
    stage.prepare(Followed::ByNewcomer);
    stage.switch();
}

#[test]
fn a_snapshot_with_a_shard_missing_is_refused() {
    let mut stage = Stage::new(4);
    stage.prepare(Followed::ByNewcomer);
    let commit = stage.yields();
    stage.wire.remove(2);
    stage.deliver();
    assert_not_whole(&stage.other.become_owner(commit));
    assert_not_whole(&stage.other.become_owner(None));
    assert_eq!(stage.other.get().all(), shadow().get().all(), "nothing of it was taken in");
}

#[test]
fn a_shadow_does_not_serve_what_its_image_brings_when_a_snapshot_was_to_come() {
    let mut stage = Stage::new(4);
    stage.prepare(Followed::ByNewcomer);
    stage.deliver();
    assert_not_whole(&stage.other.become_owner(None));
}

#[test]
fn a_parked_process_whose_successor_died_serves_what_it_had_or_a_whole_snapshot() {
    for (published, expected_new) in [(true, true), (false, false)] {
        let mut stage = Stage::new(4);
        stage.prepare(Followed::ByNewcomer);
        stage.switch();
        stage.prepare(Followed::ByPredecessor);
        let old = stage.model.clone();
        stage.set(50, 1234);
        if published {
            stage.yields();
        }
        stage.deliver();
        stage.other.become_owner(None).unwrap();
        let expected = if expected_new { &stage.model } else { &old };
        assert_eq!(stage.other.get().all(), *expected);
    }
}

#[test]
fn a_torn_snapshot_of_a_successor_leaves_the_parked_process_what_it_had() {
    let mut stage = Stage::new(4);
    stage.prepare(Followed::ByNewcomer);
    stage.switch();
    stage.prepare(Followed::ByPredecessor);
    let old = stage.model.clone();
    stage.set(50, 1234);
    stage.yields();
    // As if it had been killed before it published the last shard.
    let (_, fd) = stage.wire.last().unwrap();
    write_at(fd, 64, &128_u64.to_le_bytes());
    stage.deliver();
    stage.other.become_owner(None).unwrap();
    assert_eq!(stage.other.get().all(), old);
}

fn write_at(fd: &OwnedFd, at: u64, bytes: &[u8]) {
    File::from(fd.try_clone().unwrap()).write_all_at(bytes, at).unwrap();
}

/// The second shard of a snapshot changed by `damage`, given to a shadow with the first and the third.
fn damaged(damage: impl FnOnce(&OwnedFd, &OwnedFd)) -> Result<(), LogError> {
    let mut stage = Stage::new(3);
    stage.prepare(Followed::ByNewcomer);
    let commit = stage.yields();
    damage(&stage.wire[1].1, &stage.wire[0].1);
    let Stage { mut other, wire, .. } = stage;
    let result = wire.into_iter().try_for_each(|(index, fd)| other.add_segment(index, fd));
    let result = result.and_then(|()| other.become_owner(commit));
    assert_eq!(other.get().all(), shadow().get().all(), "nothing of it was taken in");
    result
}

fn header_of(fd: &OwnedFd) -> Vec<u8> {
    let mut bytes = vec![0; 64];
    File::from(fd.try_clone().unwrap()).read_exact_at(&mut bytes, 128).unwrap();
    bytes
}

#[test]
fn hostile_shards_are_refused() {
    let no_shard = |result: Result<(), LogError>, why: &str| {
        let error = result.unwrap_err();
        assert!(matches!(error, LogError::Heap(HeapError::NoShard { .. })), "{error}");
        assert!(error.to_string().contains(why), "{error}");
    };
    no_shard(damaged(|fd, _| write_at(fd, 128, b"nonsense")), "magic");
    no_shard(damaged(|fd, _| write_at(fd, 136, &[9])), "checksum");
    no_shard(damaged(|fd, _| write_at(fd, 64, &130_u64.to_le_bytes())), "too short");
    no_shard(damaged(|fd, _| write_at(fd, 64, &500_u64.to_le_bytes())), "committed");
    // A shard number beyond the number of shards, with a right checksum.
    no_shard(
        damaged(|fd, _| {
            let mut header = header_of(fd);
            header[16] = 3;
            let crc = crc32fast::hash(&header[..32]);
            header[32..36].copy_from_slice(&crc.to_le_bytes());
            write_at(fd, 128, &header);
        }),
        "no such shard",
    );
    let beyond = damaged(|fd, _| write_at(fd, 64, &u64::MAX.to_le_bytes()));
    assert!(matches!(beyond, Err(LogError::Segment(SegmentError::Commit { .. }))), "{beyond:?}");
    // One shard twice and another not at all.
    assert_not_whole(&damaged(|fd, first| {
        let mut header = header_of(fd);
        header[16..20].copy_from_slice(&header_of(first)[16..20]);
        let crc = crc32fast::hash(&header[..32]);
        header[32..36].copy_from_slice(&crc.to_le_bytes());
        write_at(fd, 128, &header);
    }));
    // Whole, but of an older snapshot.
    assert_not_whole(&damaged(|fd, _| {
        let mut header = header_of(fd);
        header[8] = 0;
        let crc = crc32fast::hash(&header[..32]);
        header[32..36].copy_from_slice(&crc.to_le_bytes());
        write_at(fd, 128, &header);
    }));
}

#[test]
fn an_archive_that_is_none_is_refused() {
    let result = damaged(|fd, _| {
        let len = u64::from_le_bytes(header_of(fd)[24..32].try_into().unwrap());
        // The root, where pointers and lengths are.
        write_at(fd, ARCHIVE + len - 8, &[0xff; 8]);
    });
    assert!(matches!(result, Err(LogError::Heap(HeapError::ShardLayout { shard: 1, .. }))), "{result:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_changed_before_moves(
        shards in 1..9_usize,
        changes in prop::collection::vec((any::<u8>(), 0..20_000_usize), 0..60),
        ways in 1..4_usize,
        hint in 0..200_000_usize,
    ) {
        let mut stage = Stage::new(shards);
        stage.owner.get_mut().hint = hint;
        let mut by = Followed::ByNewcomer;
        for changes in changes.chunks(changes.len() / ways + 1) {
            stage.prepare(by);
            for (key, len) in changes {
                stage.set(*key, *len);
            }
            stage.switch();
            by = Followed::ByPredecessor;
        }
    }

    #[test]
    fn any_damage_to_an_archive_is_refused_or_harmless(
        at in any::<prop::sample::Index>(),
        bytes in prop::collection::vec(any::<u8>(), 1..16),
    ) {
        let mut stage = Stage::new(1);
        stage.prepare(Followed::ByNewcomer);
        let commit = stage.yields();
        let fd = &stage.wire[0].1;
        let len = u64::from_le_bytes(header_of(fd)[24..32].try_into().unwrap());
        write_at(fd, ARCHIVE + at.index((len - 16) as usize) as u64, &bytes);
        stage.deliver();
        // Text that is other text is a state as well; anything else must not get past the validation.
        if stage.other.become_owner(commit).is_ok() {
            prop_assert!(stage.other.get().all().len() <= stage.model.len());
        }
    }
}
