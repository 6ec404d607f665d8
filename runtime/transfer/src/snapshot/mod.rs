//! State in structures of the program's own that is copied when the owner has stopped serving: one archive, written and
//! read by all processors at once, a shard each. The program changes its state as it likes and says nothing; the price
//! is that nobody serves while the archive is written and taken in, so the blackout grows with the state.
//!
//! What can be done before is: the segments that the archive goes to are made, faulted in and sent to the follower, which
//! maps them, while the owner serves.
//!
//! ```text
//!   owner     Follow{on}: makes a segment per shard, by the hint          Yield: archives shards ‖, publishes
//!   follower              maps them, touches every page                   Own:   validates shards ‖, takes them in
//! ```
//!
//! A snapshot is whole or nothing: one with a shard missing, twice, of another snapshot or not valid is refused. The
//! parked generation keeps the state that it had; a way back takes a new snapshot of the new owner.

mod parallel;
mod shard;

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::thread;

use rkyv::rancor;

use crate::heap::{HeapError, SHARDS_MAX, drop_elsewhere};
use crate::log::{LogConfig, LogError};
use crate::message::{Commit, LogPosition, StateKind};
use crate::segment::{BlankSegment, Segment, SegmentError};
use crate::state::{Followed, Preparing, SegmentNotice, State};

use shard::ShardHeader;
pub use shard::{ArchivedShard, Shard, ShardWriter};

/// Room in a prepared segment beyond the hint: a fifth, because shards are never equal, and what fits the smallest state.
const ROOM_MIN: usize = 64 << 10;

/// State that can be told as a whole.
pub trait Snapshot {
    /// A part that one thread archives, and another takes in. Parts of about equal size are fastest.
    type Shard: Shard;

    /// All of the state. As many shards each time, and at least as many as processors, is best.
    fn shards(&self) -> Vec<&Self::Shard>;

    /// About how many bytes the archive takes, all shards together. Too little costs time in the blackout, too much memory
    /// before it.
    fn len_hint(&self) -> usize;

    /// Replaces the state by that of the predecessor. The shards may be kept and read where they lie, or copied, all
    /// processors at once, by [`to_shards`].
    ///
    /// # Errors
    /// When the state cannot be taken in; it must be what it was then.
    fn restore(&mut self, shards: Vec<ArchivedShard<Self::Shard>>) -> Result<(), rancor::Error>;
}

/// Copies of shards on the heap, made in parallel.
///
/// # Errors
/// When a value of the type cannot be made from its archive.
pub fn to_shards<S: Shard>(shards: &[ArchivedShard<S>]) -> Result<Vec<S>, rancor::Error> {
    parallel::map(shards.iter().collect(), ArchivedShard::to_shard).into_iter().collect()
}

/// Segments that are being made for the next snapshot.
#[derive(Debug)]
enum Order {
    None,
    Wanted,
    Placed { made: Receiver<Result<BlankSegment, SegmentError>>, left: usize },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Follower,
    Owner,
}

/// Makes a [`Snapshot`] type the state of a service. See the module.
#[derive(Debug)]
pub struct Snapshotted<D> {
    data: D,
    schemas_read: Vec<u32>,
    schema_written: u32,
    role: Role,
    /// `data` is a state that was served; without a snapshot it can be served again.
    served: bool,
    /// Of the last snapshot that was taken or taken in.
    number: u64,
    order: Order,
    /// Made here and announced, in the order of the shards.
    prepared: BTreeMap<u64, Segment>,
    /// From the other process.
    arrived: BTreeMap<u64, Arc<Segment>>,
    next_segment: u64,
    /// Of the last snapshot, all shards, bytes.
    len: usize,
    /// What [`State::hand_over`] has published.
    taken: Option<Commit>,
    notices: VecDeque<SegmentNotice>,
}

impl<D: Snapshot> Snapshotted<D> {
    /// `data` is what the service begins with when it has no predecessor. Of the configuration only the schemas count.
    #[must_use]
    pub fn new(data: D, config: LogConfig) -> Self {
        Self {
            data,
            schemas_read: config.schemas_read,
            schema_written: config.schema_written,
            role: Role::Follower,
            served: false,
            number: 0,
            order: Order::None,
            prepared: BTreeMap::new(),
            arrived: BTreeMap::new(),
            next_segment: 0,
            len: 0,
            taken: None,
            notices: VecDeque::new(),
        }
    }

    #[must_use]
    pub fn get(&self) -> &D {
        &self.data
    }

    /// Only the owner's changes count: a follower's are gone when it becomes owner.
    #[must_use]
    pub fn get_mut(&mut self) -> &mut D {
        &mut self.data
    }

    /// Has segments made for the next snapshot, as large as it will probably be.
    fn place_order(&mut self) -> Result<Order, LogError> {
        let count = self.data.shards().len();
        if !(1..=SHARDS_MAX).contains(&count) {
            return Err(HeapError::ShardCount { count }.into());
        }
        let each = self.data.len_hint().max(self.len) / count;
        let len = shard::segment_len(each).ok_or(HeapError::ShardTooLong { shard: 0, len: each })?;
        let len = shard::segment_len(each + each / 5 + ROOM_MIN).unwrap_or(len);
        let (made_out, made) = channel();
        let work = move || {
            for _ in 0..count {
                // Nobody waits for it any more: the follower has gone.
                if made_out.send(BlankSegment::create(len)).is_err() {
                    return;
                }
            }
        };
        thread::Builder::new().name("warmswap-pool".into()).spawn(work).map_err(|source| SegmentError::System {
            what: "start the thread that makes",
            len: len as u64,
            source,
        })?;
        Ok(Order::Placed { made, left: count })
    }

    fn forget_segments(&mut self) {
        self.order = Order::None;
        self.notices.clear();
        if !self.prepared.is_empty() || !self.arrived.is_empty() {
            drop_elsewhere((std::mem::take(&mut self.prepared), std::mem::take(&mut self.arrived)));
        }
    }

    /// The snapshot that `commit` names, or the newest one that is whole and newer than what is here.
    fn find(&self, commit: Option<Commit>) -> Result<Option<(u64, Vec<Published>)>, LogError> {
        let mut snapshots: BTreeMap<u64, Vec<Published>> = BTreeMap::new();
        for segment in self.arrived.values() {
            match ShardHeader::read(segment) {
                Ok(Some(header)) => {
                    snapshots.entry(header.number).or_default().push((Arc::clone(segment), header));
                }
                Ok(None) => {}
                Err(error) if commit.is_some() => return Err(error),
                // It makes no snapshot whole.
                Err(_) => {}
            }
        }
        let wanted = commit.map(|commit| commit.position.segment);
        let found = snapshots.into_iter().rev().find_map(|(number, mut shards)| {
            shards.sort_unstable_by_key(|(_, header)| header.shard);
            let new = wanted.map_or(number > self.number, |wanted| number == wanted);
            let headers: Vec<ShardHeader> = shards.iter().map(|(_, header)| *header).collect();
            (new && is_whole(&headers)).then_some((number, shards, commit_of(&headers)))
        });
        match (found, commit) {
            (Some((number, shards, found)), commit) if commit.is_none_or(|commit| commit == found) => {
                Ok(Some((number, shards)))
            }
            (_, Some(commit)) => {
                let what = format!("snapshot {} has not arrived as it was taken", commit.position.segment);
                Err(HeapError::NotWhole { what }.into())
            }
            (_, None) => Ok(None),
        }
    }
}

/// A shard that somebody has published, not validated.
type Published = (Arc<Segment>, ShardHeader);

/// Shards in their order: every one there, once.
fn is_whole(headers: &[ShardHeader]) -> bool {
    headers
        .iter()
        .enumerate()
        .all(|(at, header)| header.shard as usize == at && header.shards as usize == headers.len())
}

/// What both sides must agree on: the number of the snapshot in place of a segment, its length in place of an offset, and
/// the lengths of its shards as the digest.
fn commit_of(headers: &[ShardHeader]) -> Commit {
    let mut hasher = crc32fast::Hasher::new();
    headers.iter().for_each(|header| hasher.update(&header.to_bytes()));
    let position = LogPosition {
        segment: headers.first().map_or(0, |header| header.number),
        offset: headers.iter().map(|header| header.len).fold(0, u64::saturating_add),
    };
    Commit { position, digest: u64::from(hasher.finalize()) }
}

impl<D: Snapshot> State for Snapshotted<D> {
    fn schemas(&self) -> (Vec<u32>, u32) {
        (self.schemas_read.clone(), self.schema_written)
    }

    fn add_segment(&mut self, index: u64, fd: OwnedFd) -> Result<(), LogError> {
        if self.role == Role::Owner {
            return Err(LogError::NotFollower);
        }
        if self.arrived.contains_key(&index) {
            return Err(LogError::Duplicate { index });
        }
        // One prepared for each shard, and one in its place that was too small.
        if self.arrived.len() >= 2 * SHARDS_MAX {
            return Err(HeapError::ShardCount { count: self.arrived.len() + 1 }.into());
        }
        let segment = Segment::open(fd, index, &self.schemas_read)?;
        segment.touch();
        self.arrived.insert(index, Arc::new(segment));
        self.next_segment = self.next_segment.max(index.saturating_add(1));
        // A snapshot that we gave has been taken in: its taker prepares the next.
        if !self.prepared.is_empty() {
            drop_elsewhere(std::mem::take(&mut self.prepared));
        }
        Ok(())
    }

    /// Owners of such a state retire nothing.
    fn retire_segment(&mut self, _index: u64) -> Result<(), LogError> {
        Ok(())
    }

    fn follow(&mut self) -> Result<u64, LogError> {
        Ok(0)
    }

    fn become_owner(&mut self, commit: Option<Commit>) -> Result<(), LogError> {
        if self.role == Role::Owner {
            return Ok(());
        }
        match self.find(commit)? {
            Some((number, shards)) => {
                let opened = parallel::map(shards, |(segment, header)| ArchivedShard::open(segment, header));
                self.data.restore(opened.into_iter().collect::<Result<_, _>>()?).map_err(HeapError::Restore)?;
                self.number = number;
            }
            None if !self.served && !self.arrived.is_empty() => {
                let what = "it was to come with the ownership".to_owned();
                return Err(HeapError::NotWhole { what }.into());
            }
            None => {}
        }
        self.role = Role::Owner;
        self.served = true;
        self.taken = None;
        Ok(())
    }

    fn become_follower(&mut self) {
        self.role = Role::Follower;
    }

    fn commit(&mut self) -> Option<Commit> {
        self.taken
    }

    fn position(&self) -> Option<LogPosition> {
        self.taken.map(|taken| taken.position)
    }

    fn take_notice(&mut self) -> Option<SegmentNotice> {
        self.notices.pop_front()
    }

    fn segment_fd(&self, index: u64) -> Option<BorrowedFd<'_>> {
        self.prepared.get(&index).map(AsFd::as_fd)
    }

    fn kind(&self) -> StateKind {
        StateKind::Snapshot
    }

    fn followed(&mut self, by: Followed) -> Result<(), LogError> {
        match by {
            Followed::ByNobody => self.forget_segments(),
            // This may be the blackout; `prepare` comes after it.
            Followed::ByNewcomer | Followed::ByPredecessor => self.order = Order::Wanted,
        }
        Ok(())
    }

    fn prepare(&mut self) -> Result<Preparing, LogError> {
        if matches!(self.order, Order::Wanted) {
            self.forget_segments();
            self.order = self.place_order()?;
        }
        let Order::Placed { made, left } = &mut self.order else { return Ok(Preparing::Done) };
        while *left > 0 {
            match made.try_recv() {
                Ok(blank) => {
                    let index = self.next_segment;
                    self.next_segment += 1;
                    self.prepared.insert(index, blank?.activate(index, self.schema_written, 0, false));
                    self.notices.push_back(SegmentNotice::New(index));
                    *left -= 1;
                }
                Err(TryRecvError::Empty) => return Ok(Preparing::Later),
                Err(TryRecvError::Disconnected) => {
                    let source = std::io::Error::other("the thread that makes segments has ended");
                    return Err(SegmentError::System { what: "get", len: 0, source }.into());
                }
            }
        }
        self.order = Order::None;
        Ok(Preparing::Done)
    }

    fn hand_over(&mut self) -> Result<(), LogError> {
        let Self { data, prepared, next_segment, notices, .. } = self;
        let shards = data.shards();
        let count = shards.len();
        if !(1..=SHARDS_MAX).contains(&count) {
            return Err(HeapError::ShardCount { count }.into());
        }
        let mut ready = std::mem::take(prepared).into_values();
        let work: Vec<_> = shards.into_iter().enumerate().map(|(at, shard)| (at, shard, ready.next())).collect();
        prepared.extend(ready.map(|segment| (segment.header().index, segment)));
        let (next, schema) = (AtomicU64::new(*next_segment), self.schema_written);
        let written = parallel::map(work, |(at, shard, segment)| {
            let make = |len: usize| {
                let len = shard::segment_len(len).ok_or(HeapError::ShardTooLong { shard: at, len })?;
                let index = next.fetch_add(1, Ordering::Relaxed);
                Ok::<_, LogError>(BlankSegment::create(len)?.activate(index, schema, 0, false))
            };
            let mut segment = segment.map_or_else(|| make(0), Ok)?;
            let len = shard::write(shard, &mut segment)?;
            if len > shard::room(&segment) {
                segment = make(len)?;
                shard::write(shard, &mut segment)?;
            }
            Ok::<_, LogError>((segment, len))
        });
        let written: Vec<(Segment, usize)> = written.into_iter().collect::<Result<_, _>>()?;
        notices.extend((*next_segment..next.load(Ordering::Relaxed)).map(SegmentNotice::New));
        *next_segment = next.load(Ordering::Relaxed);
        self.number += 1;
        let headers: Vec<ShardHeader> = (0..count as u32)
            .zip(&written)
            .map(|(shard, (_, len))| ShardHeader { number: self.number, shard, shards: count as u32, len: *len as u64 })
            .collect();
        for ((mut segment, _), header) in written.into_iter().zip(&headers) {
            header.publish(&mut segment);
            prepared.insert(segment.header().index, segment);
        }
        let taken = commit_of(&headers);
        self.len = usize::try_from(taken.position.offset).unwrap_or(usize::MAX);
        self.taken = Some(taken);
        Ok(())
    }

    fn bytes_moved(&self) -> u64 {
        self.taken.map_or(0, |taken| taken.position.offset)
    }
}
