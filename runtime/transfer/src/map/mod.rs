//! A map from bytes to an rkyv type, resident in the shared log: values are read where they lie, whoever wrote them.
//!
//! The index (which record is the living one of each key) is private memory of each process, built by following the
//! log, so that it needs no pointers into shared memory and a half-written one can not exist. Not for values that need
//! order or ranges.
//!
//! An insertion is visible to other processes after [`State::commit`]; the owner commits before it acknowledges.
//! [`ResidentMap::maintain`] keeps the memory bounded under endless overwrites.

mod compaction;

use std::collections::{BTreeMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use rkyv::api::high::{HighSerializer, HighValidator};
use rkyv::bytecheck::CheckBytes;
use rkyv::ser::allocator::ArenaHandle;
use rkyv::util::AlignedVec;
use rkyv::{Archive, Archived, Serialize, rancor};

use crate::log::{LogConfig, LogError, LogReader, LogWriter, RecordAt, Segments};
use crate::message::{Commit, LogPosition};
use crate::record::RecordKind;
use crate::state::{SegmentNotice, State};

use compaction::Compaction;
pub use compaction::MapStatistics;

/// A type that can be a value of a [`ResidentMap`]. Implemented for every fitting rkyv type.
pub trait Value:
    Archive<Archived: for<'a> CheckBytes<HighValidator<'a, rancor::Error>>>
    + for<'a> Serialize<HighSerializer<AlignedVec, ArenaHandle<'a>, rancor::Error>>
{
}

impl<V> Value for V where
    V: Archive<Archived: for<'a> CheckBytes<HighValidator<'a, rancor::Error>>>
        + for<'a> Serialize<HighSerializer<AlignedVec, ArenaHandle<'a>, rancor::Error>>
{
}

/// Where the living record of a key is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Living {
    segment: u64,
    /// Bytes; a segment is at most 1 GiB.
    offset: u32,
    /// Of the record, bytes.
    len: u32,
}

impl Living {
    fn new(at: RecordAt) -> Self {
        Self { segment: at.position.segment, offset: at.position.offset as u32, len: at.len as u32 }
    }

    fn position(self) -> LogPosition {
        LogPosition { segment: self.segment, offset: self.offset.into() }
    }

    /// Its part of the digest in a [`Commit`]: the output function of splitmix64, so that sums of nearby places differ.
    fn digest(self) -> u64 {
        let mixed = |z: u64| {
            let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        };
        mixed(mixed(self.segment.wrapping_add(0x9e37_79b9_7f4a_7c15)) ^ u64::from(self.offset))
    }
}

#[derive(Debug)]
enum Role {
    Follower(LogReader),
    Owner(LogWriter),
    /// Only inside a change of role.
    Changing,
}

impl Role {
    fn segments(&self) -> &Segments {
        match self {
            Self::Follower(reader) => reader.segments(),
            Self::Owner(writer) => writer.segments(),
            Self::Changing => const { &Segments::empty() },
        }
    }

    fn writer(&mut self) -> Result<&mut LogWriter, LogError> {
        match self {
            Self::Owner(writer) => Ok(writer),
            _ => Err(LogError::NotOwner),
        }
    }
}

/// The map. See the module.
#[derive(Debug)]
pub struct ResidentMap<V> {
    role: Role,
    index: HashTable<Living>,
    /// Of everything in the index.
    digest: u64,
    hasher: RandomState,
    /// Bytes of living records per segment.
    living: BTreeMap<u64, u64>,
    compaction: Compaction,
    notices: VecDeque<SegmentNotice>,
    scratch: AlignedVec,
    value: PhantomData<fn() -> V>,
}

impl<V: Value> ResidentMap<V> {
    /// An empty map, as follower: [`State::become_owner`] makes it writable.
    ///
    /// # Errors
    /// As [`LogReader::new`].
    pub fn new(config: LogConfig) -> Result<Self, LogError> {
        Ok(Self {
            role: Role::Follower(LogReader::new(config)?),
            index: HashTable::new(),
            digest: 0,
            hasher: RandomState::new(),
            living: BTreeMap::new(),
            compaction: Compaction::default(),
            notices: VecDeque::new(),
            scratch: AlignedVec::new(),
            value: PhantomData,
        })
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.index.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// The value of `key`, where it lies.
    #[must_use]
    pub fn get(&self, key: &[u8]) -> Option<&Archived<V>> {
        let segments = self.role.segments();
        let living = self.index.find(self.hasher.hash_one(key), |living| is_of(segments, *living, key))?;
        Self::value_at(segments, *living).map(|(_, value)| value)
    }

    #[must_use]
    pub fn contains(&self, key: &[u8]) -> bool {
        self.get(key).is_some()
    }

    fn value_at(segments: &Segments, living: Living) -> Option<(&[u8], &Archived<V>)> {
        let view = segments.record(living.position())?;
        // SAFETY: only records whose value `apply` validated as Archived<V>, or that `insert` archived from a V, are in
        // the index; their bytes never change (see `segment`), and their segment stays mapped while it has living records.
        Some((view.key, unsafe { rkyv::access_unchecked::<Archived<V>>(view.value) }))
    }

    /// Every key and value, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &Archived<V>)> {
        let segments = self.role.segments();
        self.index.iter().filter_map(move |living| Self::value_at(segments, *living))
    }

    /// Sets the value of `key`; true when it had one before. Not visible to others before [`State::commit`].
    ///
    /// # Errors
    /// Nothing is changed when the record is too long, memory is missing, or this process is no owner.
    pub fn insert(&mut self, key: &[u8], value: &V) -> Result<bool, LogError> {
        let mut bytes = std::mem::take(&mut self.scratch);
        bytes.clear();
        self.scratch = rkyv::api::high::to_bytes_in::<_, rancor::Error>(value, bytes).map_err(LogError::Archive)?;
        let at = self.append(RecordKind::Put, key)?;
        self.set(key, at)
    }

    /// Appends; the value is `scratch` for a put.
    fn append(&mut self, kind: RecordKind, key: &[u8]) -> Result<RecordAt, LogError> {
        let Self { role, scratch, notices, compaction, .. } = self;
        let writer = role.writer()?;
        let value: &[u8] = if kind == RecordKind::Put { scratch } else { &[] };
        let at = writer.append(kind, key, value)?;
        compaction.appended(at.len);
        notices.extend(writer.take_new().into_iter().map(SegmentNotice::New));
        Ok(at)
    }

    /// Removes `key`; true when it was there.
    ///
    /// # Errors
    /// As [`Self::insert`].
    pub fn remove(&mut self, key: &[u8]) -> Result<bool, LogError> {
        self.role.writer()?;
        if !self.contains(key) {
            return Ok(false);
        }
        self.append(RecordKind::Remove, key)?;
        self.unset(key);
        Ok(true)
    }

    /// Makes the record at `at` the living one of `key`.
    fn set(&mut self, key: &[u8], at: RecordAt) -> Result<bool, LogError> {
        let Self { role, index, digest, hasher, living, .. } = self;
        let segments = role.segments();
        let new = Living::new(at);
        *digest = digest.wrapping_add(new.digest());
        *living.entry(new.segment).or_default() += u64::from(new.len);
        let rehash = |entry: &Living| segments.record(entry.position()).map_or(0, |view| hasher.hash_one(view.key));
        match index.entry(hasher.hash_one(key), |entry| is_of(segments, *entry, key), rehash) {
            Entry::Occupied(mut entry) => {
                let old = std::mem::replace(entry.get_mut(), new);
                *digest = digest.wrapping_sub(old.digest());
                bury(living, old);
                Ok(true)
            }
            Entry::Vacant(entry) => {
                entry.insert(new);
                Ok(false)
            }
        }
    }

    fn unset(&mut self, key: &[u8]) {
        let Self { role, index, digest, hasher, living, .. } = self;
        let segments = role.segments();
        if let Ok(entry) = index.find_entry(hasher.hash_one(key), |entry| is_of(segments, *entry, key)) {
            let (old, _) = entry.remove();
            *digest = digest.wrapping_sub(old.digest());
            bury(living, old);
        }
    }

    /// Takes one record of another process into the index, validating its value.
    fn apply(&mut self, at: RecordAt, kind: RecordKind) -> Result<(), LogError> {
        // The key is copied so that the index can change while the segments are borrowed; keys are short.
        let view = self.role.segments().record(at.position).ok_or(LogError::NotOwner)?;
        let key = view.key.to_vec();
        match kind {
            RecordKind::Put => {
                let schema = self.role.segments().get(at.position.segment).map_or(0, |segment| segment.header().schema);
                rkyv::access::<Archived<V>, rancor::Error>(view.value).map_err(|source| LogError::Value {
                    at: at.position,
                    schema,
                    source,
                })?;
                self.set(&key, at)?;
            }
            RecordKind::Remove => self.unset(&key),
        }
        Ok(())
    }
}

fn is_of(segments: &Segments, living: Living, key: &[u8]) -> bool {
    segments.record(living.position()).is_some_and(|view| view.key == key)
}

fn bury(living: &mut BTreeMap<u64, u64>, old: Living) {
    if let Some(bytes) = living.get_mut(&old.segment) {
        *bytes = bytes.saturating_sub(old.len.into());
    }
}

impl<V: Value> State for ResidentMap<V> {
    fn schemas(&self) -> (Vec<u32>, u32) {
        let config = match &self.role {
            Role::Follower(reader) => reader.config(),
            Role::Owner(writer) => writer.config(),
            Role::Changing => return (Vec::new(), 0),
        };
        (config.schemas_read.clone(), config.schema_written)
    }

    fn add_segment(&mut self, index: u64, fd: OwnedFd) -> Result<(), LogError> {
        match &mut self.role {
            Role::Follower(reader) => reader.add_segment(index, fd),
            _ => Err(LogError::NotFollower),
        }
    }

    fn retire_segment(&mut self, index: u64) -> Result<(), LogError> {
        self.follow()?;
        if self.living.get(&index).is_some_and(|bytes| *bytes > 0) {
            return Err(LogError::RetiredTooEarly { index, what: "it has living records" });
        }
        match &mut self.role {
            Role::Follower(reader) => reader.retire_segment(index)?,
            _ => return Err(LogError::NotFollower),
        }
        self.living.remove(&index);
        Ok(())
    }

    fn follow(&mut self) -> Result<u64, LogError> {
        let mut followed = 0;
        loop {
            let Role::Follower(reader) = &mut self.role else { return Ok(followed) };
            let before = reader.position();
            let Some((at, kind)) = reader.advance()? else { return Ok(followed) };
            if let Err(error) = self.apply(at, kind) {
                // Not taken in: the next call meets the same record and the same error.
                if let Role::Follower(reader) = &mut self.role {
                    reader.rewind(before);
                }
                return Err(error);
            }
            followed += 1;
        }
    }

    fn become_owner(&mut self, commit: Option<Commit>) -> Result<(), LogError> {
        self.follow()?;
        if let (Some(commit), Role::Follower(reader)) = (commit, &self.role)
            && commit.position == reader.position()
            && commit.digest != self.digest
        {
            return Err(LogError::Different { at: commit.position });
        }
        let commit = commit.map(|commit| commit.position);
        match std::mem::replace(&mut self.role, Role::Changing) {
            Role::Follower(reader) => match reader.into_writer(commit) {
                Ok(writer) => {
                    self.role = Role::Owner(writer);
                    self.compaction = Compaction::default();
                    Ok(())
                }
                Err(refused) => {
                    let (reader, error) = *refused;
                    self.role = Role::Follower(reader);
                    Err(error)
                }
            },
            other => {
                self.role = other;
                Ok(())
            }
        }
    }

    fn become_follower(&mut self) {
        self.role = match std::mem::replace(&mut self.role, Role::Changing) {
            Role::Owner(writer) => Role::Follower(writer.into_reader()),
            other => other,
        };
    }

    fn commit(&mut self) -> Option<Commit> {
        let position = match &mut self.role {
            Role::Owner(writer) => writer.commit(),
            Role::Follower(reader) => reader.position(),
            Role::Changing => return None,
        };
        Some(Commit { position, digest: self.digest })
    }

    fn position(&self) -> Option<LogPosition> {
        match &self.role {
            Role::Owner(writer) => Some(writer.committed()),
            Role::Follower(reader) => Some(reader.position()),
            Role::Changing => None,
        }
    }

    fn take_notice(&mut self) -> Option<SegmentNotice> {
        self.notices.pop_front()
    }

    fn segment_fd(&self, index: u64) -> Option<BorrowedFd<'_>> {
        self.role.segments().get(index).map(AsFd::as_fd)
    }
}
