//! One shard of a snapshot in a segment of its own: how it is written and what is believed of it.
//!
//! ```text
//!  segment
//!  byte  0             128      136      144     148      152     160        164      192
//!  ┌─────────────────┬────────┬────────┬───────┬────────┬───────┬──────────┬────────┬───────────────┐
//!  │ segment header  │ magic  │ number │ shard │ shards │ len   │ crc of   │ 0      │ archive (rkyv) │ … commit
//!  │                 │        │        │       │        │       │ 128..160 │        │ of len bytes   │
//!  └─────────────────┴────────┴────────┴───────┴────────┴───────┴──────────┴────────┴───────────────┘
//! ```
//!
//! The commit of the segment is stored last, when every shard of the snapshot is written. There is no checksum over the
//! archive: it would cost as much as writing it, while nobody serves. What it protects against (an archive that is none)
//! the validation finds; that bytes changed under way, memory sees to.

use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::Arc;

use rkyv::api::high::{HighDeserializer, HighSerializer, HighValidator};
use rkyv::bytecheck::CheckBytes;
use rkyv::ser::allocator::ArenaHandle;
use rkyv::ser::{Positional, Writer};
use rkyv::{Archive, Deserialize, Serialize, rancor};

use crate::heap::{HeapError, SHARDS_MAX};
use crate::log::LogError;
use crate::segment::{HEADER_LEN, SEGMENT_LEN_MAX, SEGMENT_LEN_MIN, Segment};

const MAGIC: u64 = u64::from_le_bytes(*b"WSWPSNP1");
/// With what follows it up to the archive, which begins at a multiple of 64 bytes.
pub(super) const SHARD_HEADER_LEN: usize = 64;
const CHECKED_LEN: usize = 32;
const ARCHIVE_OFFSET: usize = HEADER_LEN + SHARD_HEADER_LEN;

/// A type that can be a shard of a snapshot. Implemented for every fitting rkyv type.
pub trait Shard:
    Sized
    + Send
    + Sync
    + Archive<
        Archived: for<'a> CheckBytes<HighValidator<'a, rancor::Error>>
                      + Deserialize<Self, HighDeserializer<rancor::Error>>,
    > + for<'a> Serialize<HighSerializer<ShardWriter, ArenaHandle<'a>, rancor::Error>>
{
}

impl<S> Shard for S where
    S: Send
        + Sync
        + Archive<
            Archived: for<'a> CheckBytes<HighValidator<'a, rancor::Error>>
                          + Deserialize<S, HighDeserializer<rancor::Error>>,
        > + for<'a> Serialize<HighSerializer<ShardWriter, ArenaHandle<'a>, rancor::Error>>
{
}

/// Writes an archive where it is to lie, and goes on counting when there is no more room: then one knows how much it takes.
#[derive(Debug)]
pub struct ShardWriter {
    to: *mut u8,
    room: usize,
    len: usize,
}

impl Positional for ShardWriter {
    fn pos(&self) -> usize {
        self.len
    }
}

impl<E> Writer<E> for ShardWriter {
    fn write(&mut self, bytes: &[u8]) -> Result<(), E> {
        if bytes.len() <= self.room.saturating_sub(self.len) {
            // SAFETY: `write` made this from an exclusive slice of `room` bytes that it borrows until this is gone, and
            // `bytes` fits behind the first `len` of them.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.to.add(self.len), bytes.len()) };
        }
        self.len = self.len.saturating_add(bytes.len());
        Ok(())
    }
}

/// Archives a shard into a segment in which nothing is committed. Returns how long it is; when that is more than
/// [`room`], nothing of use was written.
pub(super) fn write<S: Shard>(shard: &S, segment: &mut Segment) -> Result<usize, LogError> {
    let room = segment.blank().get_mut(SHARD_HEADER_LEN..).unwrap_or_default();
    let writer = ShardWriter { to: room.as_mut_ptr(), room: room.len(), len: 0 };
    let writer = rkyv::api::high::to_bytes_in::<_, rancor::Error>(shard, writer).map_err(LogError::Archive)?;
    Ok(writer.len)
}

/// Bytes of archive that fit a segment.
pub(super) fn room(segment: &Segment) -> usize {
    segment.len() - ARCHIVE_OFFSET
}

/// The length of a segment for so many bytes of archive; `None` beyond what a segment can be.
pub(super) fn segment_len(archive_len: usize) -> Option<usize> {
    let len = archive_len.checked_add(ARCHIVE_OFFSET)?.checked_next_multiple_of(4096)?;
    (len <= SEGMENT_LEN_MAX).then_some(len.max(SEGMENT_LEN_MIN))
}

/// What a segment says of its shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ShardHeader {
    /// Of the snapshot; every one that is taken counts up.
    pub(super) number: u64,
    pub(super) shard: u32,
    pub(super) shards: u32,
    /// Of the archive, bytes.
    pub(super) len: u64,
}

impl ShardHeader {
    pub(super) fn to_bytes(self) -> [u8; SHARD_HEADER_LEN] {
        let mut bytes = [0; SHARD_HEADER_LEN];
        bytes[..8].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.number.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.shard.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.shards.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.len.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..CHECKED_LEN]);
        bytes[32..36].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Writes the header and shows the shard.
    pub(super) fn publish(self, segment: &mut Segment) {
        segment.blank()[..SHARD_HEADER_LEN].copy_from_slice(&self.to_bytes());
        segment.publish(ARCHIVE_OFFSET + self.len as usize);
    }

    /// Of an untrusted segment; `None` when nothing is published in it.
    pub(super) fn read(segment: &Segment) -> Result<Option<Self>, LogError> {
        let refused = |why| HeapError::NoShard { segment: segment.header().index, why };
        let committed = segment.committed()?;
        if committed == HEADER_LEN {
            return Ok(None);
        }
        let bytes = segment.get(HEADER_LEN, ARCHIVE_OFFSET).filter(|_| committed >= ARCHIVE_OFFSET);
        // A private copy: what is checked is what is used.
        let bytes: [u8; SHARD_HEADER_LEN] =
            bytes.and_then(|bytes| bytes.try_into().ok()).ok_or(refused("it is too short"))?;
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        if u64_at(0) != MAGIC {
            return Err(refused("the magic differs").into());
        }
        if u32_at(CHECKED_LEN) != crc32fast::hash(&bytes[..CHECKED_LEN]) {
            return Err(refused("the checksum of its header is wrong").into());
        }
        let header = Self { number: u64_at(8), shard: u32_at(16), shards: u32_at(20), len: u64_at(24) };
        if header.shards as usize > SHARDS_MAX || header.shard >= header.shards {
            return Err(refused("there is no such shard").into());
        }
        if header.len != (committed - ARCHIVE_OFFSET) as u64 {
            return Err(refused("its length is not what is committed").into());
        }
        Ok(Some(header))
    }
}

/// A shard of the predecessor's state, where it lies: validated, readable like `S::Archived`, and valid for as long as
/// this value is kept.
#[derive(Debug)]
pub struct ArchivedShard<S> {
    segment: Arc<Segment>,
    len: usize,
    shard: PhantomData<fn() -> S>,
}

impl<S: Shard> ArchivedShard<S> {
    /// Validates the archive of a shard whose header was read.
    pub(super) fn open(segment: Arc<Segment>, header: ShardHeader) -> Result<Self, LogError> {
        let opened = Self { segment, len: header.len as usize, shard: PhantomData };
        let schema = opened.segment.header().schema;
        rkyv::access::<S::Archived, rancor::Error>(opened.bytes()).map_err(|source| HeapError::ShardLayout {
            shard: header.shard as usize,
            schema,
            source,
        })?;
        Ok(opened)
    }

    fn bytes(&self) -> &[u8] {
        self.segment.get(ARCHIVE_OFFSET, ARCHIVE_OFFSET + self.len).unwrap_or_default()
    }

    /// A copy on the heap.
    ///
    /// # Errors
    /// When a value of the type cannot be made from its archive.
    pub fn to_shard(&self) -> Result<S, rancor::Error> {
        rkyv::deserialize::<S, rancor::Error>(&**self)
    }
}

impl<S: Shard> Deref for ArchivedShard<S> {
    type Target = S::Archived;

    fn deref(&self) -> &S::Archived {
        // SAFETY: `open` validated exactly these bytes as S::Archived; they are below the commit, so they do not change
        // (see `segment`), and stay mapped while `segment` is held.
        unsafe { rkyv::access_unchecked::<S::Archived>(self.bytes()) }
    }
}
