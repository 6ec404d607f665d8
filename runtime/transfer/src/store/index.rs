//! Which record is the living one of each key, for every collection of a log: private memory of each process, built by
//! following the log, so that it needs no pointers into shared memory and a half-written one can not exist.
//!
//! Owner and followers run the same code over the same records and so agree on what is alive, also in collections that
//! this program does not declare: what keeps or drops a record follows from its header alone, never from its type.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

use crate::log::{LogError, RecordAt, Segments};
use crate::message::LogPosition;
use crate::record::{RecordKind, RecordView, Shape, Tag};

/// Most collections in one log, those of other versions included.
const COLLECTIONS_MAX: usize = 1024;

/// Where the living record of a key is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Living {
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

    pub(super) fn position(self) -> LogPosition {
        LogPosition { segment: self.segment, offset: self.offset.into() }
    }

    /// Its part of the digest in a [`Commit`](crate::message::Commit): the output function of splitmix64, so that sums
    /// of nearby places differ.
    fn digest(self) -> u64 {
        let mixed = |z: u64| {
            let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        };
        mixed(mixed(self.segment.wrapping_add(0x9e37_79b9_7f4a_7c15)) ^ u64::from(self.offset))
    }
}

/// Everything alive in a log, in one sum and by segment.
#[derive(Debug, Default)]
struct Census {
    digest: u64,
    /// Bytes of living records per segment.
    bytes: BTreeMap<u64, u64>,
}

impl Census {
    fn bear(&mut self, new: Living) {
        self.digest = self.digest.wrapping_add(new.digest());
        *self.bytes.entry(new.segment).or_default() += u64::from(new.len);
    }

    fn bury(&mut self, old: Living) {
        self.digest = self.digest.wrapping_sub(old.digest());
        if let Some(bytes) = self.bytes.get_mut(&old.segment) {
            *bytes = bytes.saturating_sub(old.len.into());
        }
    }
}

#[derive(Debug)]
struct Collection {
    tag: Tag,
    /// `None`: of another version; kept alive and not read.
    name: Option<String>,
    records: HashTable<Living>,
    /// Of a log: the first sequence number that is kept, and the next to be given.
    sequence: (u64, u64),
}

/// See the module. Collections are named by their place: the declared ones first, in the order of declaration.
#[derive(Debug, Default)]
pub(super) struct Index {
    collections: Vec<Collection>,
    places: BTreeMap<u32, usize>,
    census: Census,
    hasher: RandomState,
}

impl Index {
    pub(super) fn declare(&mut self, tag: Tag, name: Option<String>) -> usize {
        let place = self.collections.len();
        self.collections.push(Collection { tag, name, records: HashTable::new(), sequence: (0, 0) });
        self.places.insert(tag.collection, place);
        place
    }

    pub(super) fn tag(&self, place: usize) -> Tag {
        self.collections[place].tag
    }

    pub(super) fn count(&self, place: usize) -> usize {
        let collection = &self.collections[place];
        // A log that was trimmed has a record that says so.
        let without_value = collection.tag.shape == Shape::Log && collection.sequence.0 > 0;
        collection.records.len() - usize::from(without_value)
    }

    /// Of every collection, undeclared ones too.
    pub(super) fn count_all(&self) -> usize {
        self.collections.iter().map(|collection| collection.records.len()).sum()
    }

    /// Of a log: the first number that is kept, and the next to be given.
    pub(super) fn sequence(&self, place: usize) -> (u64, u64) {
        self.collections[place].sequence
    }

    pub(super) fn digest(&self) -> u64 {
        self.census.digest
    }

    pub(super) fn living_bytes(&self) -> u64 {
        self.census.bytes.values().sum()
    }

    pub(super) fn living_bytes_in(&self, segment: u64) -> u64 {
        self.census.bytes.get(&segment).copied().unwrap_or(0)
    }

    /// A segment without living records is gone.
    pub(super) fn forget_segment(&mut self, segment: u64) {
        self.census.bytes.remove(&segment);
    }

    /// The living record of a key, looked at once.
    pub(super) fn find<'s>(
        &self,
        segments: &'s Segments,
        place: usize,
        key: &[u8],
    ) -> Option<(Living, RecordView<'s>)> {
        let mut found = None;
        let is_of = |living: &Living| {
            found = segments.record(living.position()).filter(|view| view.key == key);
            found.is_some()
        };
        let living = *self.collections[place].records.find(self.hasher.hash_one(key), is_of)?;
        found.map(|view| (living, view))
    }

    /// Whether this record, at this place, is the living one of its key.
    pub(super) fn is_living(&self, segments: &Segments, view: &RecordView<'_>, at: LogPosition) -> bool {
        let place = self.places.get(&view.tag.collection);
        let found = place.and_then(|place| self.find(segments, *place, view.key));
        view.kind == RecordKind::Put && found.is_some_and(|(living, _)| living.position() == at)
    }

    /// The living records of a collection, in no order.
    pub(super) fn iter(&self, place: usize) -> impl Iterator<Item = Living> {
        self.collections[place].records.iter().copied()
    }

    /// Where the collection of a record of another process is; makes a place for one that is not declared.
    pub(super) fn place_of(&mut self, tag: Tag, at: LogPosition) -> Result<usize, LogError> {
        match self.places.get(&tag.collection) {
            Some(place) => {
                let Collection { tag: Tag { shape: declared, .. }, name, .. } = &self.collections[*place];
                if *declared != tag.shape {
                    let name = name.clone().unwrap_or_else(|| format!("{:08x}", tag.collection));
                    return Err(LogError::Shape { at, name, found: tag.shape, declared: *declared });
                }
                Ok(*place)
            }
            None if self.collections.len() >= COLLECTIONS_MAX => Err(LogError::Collections { max: COLLECTIONS_MAX }),
            None => Ok(self.declare(tag, None)),
        }
    }

    /// Takes one record in; true when its key was alive before. A record that was checked by [`check_form`].
    pub(super) fn take_in(
        &mut self,
        segments: &Segments,
        place: usize,
        at: RecordAt,
        (kind, key, value): (RecordKind, &[u8], &[u8]),
    ) -> bool {
        let before = match kind {
            RecordKind::Put => self.set(segments, place, key, at),
            RecordKind::Remove => self.unset(segments, place, key),
        };
        if kind == RecordKind::Put && self.collections[place].tag.shape == Shape::Log {
            match key.first_chunk() {
                Some(number) => {
                    let sequence = &mut self.collections[place].sequence;
                    sequence.1 = sequence.1.max(u64::from_be_bytes(*number).saturating_add(1));
                }
                None => self.trim(segments, place, floor(value)),
            }
        }
        before
    }

    fn set(&mut self, segments: &Segments, place: usize, key: &[u8], at: RecordAt) -> bool {
        let Self { collections, census, hasher, .. } = self;
        let new = Living::new(at);
        census.bear(new);
        let rehash = |entry: &Living| segments.record(entry.position()).map_or(0, |view| hasher.hash_one(view.key));
        let records = &mut collections[place].records;
        match records.entry(hasher.hash_one(key), |entry| is_of(segments, *entry, key), rehash) {
            Entry::Occupied(mut entry) => {
                census.bury(std::mem::replace(entry.get_mut(), new));
                true
            }
            Entry::Vacant(entry) => {
                entry.insert(new);
                false
            }
        }
    }

    fn unset(&mut self, segments: &Segments, place: usize, key: &[u8]) -> bool {
        let Self { collections, census, hasher, .. } = self;
        let found = collections[place].records.find_entry(hasher.hash_one(key), |entry| is_of(segments, *entry, key));
        found.map(|entry| census.bury(entry.remove().0)).is_ok()
    }

    /// Drops what a log holds below `floor`. Everything there was appended before the record that says so.
    fn trim(&mut self, segments: &Segments, place: usize, floor: u64) {
        let (first, next) = self.collections[place].sequence;
        if floor <= first {
            return;
        }
        let end = floor.min(next);
        if end.saturating_sub(first) <= self.collections[place].records.len() as u64 {
            for number in first..end {
                self.unset(segments, place, &number.to_be_bytes());
            }
        } else {
            // Numbers with gaps between them: a damaged log must not keep anybody busy for ever.
            let Self { collections, census, .. } = self;
            collections[place].records.retain(|living| {
                let key = segments.record(living.position()).map_or(&[][..], |view| view.key);
                let keep = key.first_chunk().is_none_or(|number| u64::from_be_bytes(*number) >= floor);
                if !keep {
                    census.bury(*living);
                }
                keep
            });
        }
        self.collections[place].sequence = (floor, next.max(floor));
    }
}

fn is_of(segments: &Segments, living: Living, key: &[u8]) -> bool {
    segments.record(living.position()).is_some_and(|view| view.key == key)
}

/// The value of a log's record with an empty key: the first number that is kept.
fn floor(value: &[u8]) -> u64 {
    value.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// Whether key and value can be those of a record of this shape, whatever its type.
pub(super) fn check_form(view: &RecordView<'_>, at: LogPosition) -> Result<(), LogError> {
    let (key_len, value_len) = (view.key.len(), view.value.len());
    let put = view.kind == RecordKind::Put;
    let fits = match view.tag.shape {
        Shape::Map => true,
        Shape::Counters => !put || value_len == size_of::<i64>(),
        // Entries of a log are dropped by the first number that is kept, never one by one.
        Shape::Log => put && (key_len == size_of::<u64>() || (key_len == 0 && value_len == size_of::<u64>())),
        Shape::Record => key_len == 0,
    };
    if fits { Ok(()) } else { Err(LogError::Malformed { at, shape: view.tag.shape, key_len, value_len }) }
}
