//! What state outside the shared log has in common: it lives in structures of the program's own, and what moves is a
//! copy that is written for one follower, either ahead ([`crate::precopy`]) or at the last moment ([`crate::snapshot`]).
//!
//! Such state dies with its owner: unlike the shared log, nothing of it is in memory that others keep.

use std::thread;

use rkyv::api::high::{HighDeserializer, HighSerializer, HighValidator};
use rkyv::bytecheck::CheckBytes;
use rkyv::ser::allocator::ArenaHandle;
use rkyv::util::AlignedVec;
use rkyv::{Archive, Deserialize, Serialize, rancor};

use crate::message::LogPosition;
use crate::segment::SEGMENT_LEN_MAX;

/// Most shards of one snapshot.
pub const SHARDS_MAX: usize = 1024;

/// Why copied state is not taken, or cannot be given. Nothing changes then.
#[derive(Debug, thiserror::Error)]
pub enum HeapError {
    #[error("the copy of the state is not whole ({what}): this process must not serve with a part of it")]
    NotWhole { what: String },
    #[error("the record at {at} is no piece of a copied state")]
    NoPiece { at: LogPosition },
    #[error("the predecessor cannot follow: this process did not take its state over from it")]
    NoPredecessor,
    #[error(
        "shard {shard} takes {len} bytes and a segment at most {SEGMENT_LEN_MAX}: divide the state into more shards"
    )]
    ShardTooLong { shard: usize, len: usize },
    #[error("the state is divided into {count} shards: give it 1 to {SHARDS_MAX}")]
    ShardCount { count: usize },
    #[error("segment {segment} holds no shard of a snapshot: {why}")]
    NoShard { segment: u64, why: &'static str },
    #[error("shard {shard} of the snapshot does not have the layout of schema {schema}")]
    ShardLayout {
        shard: usize,
        schema: u32,
        #[source]
        source: rancor::Error,
    },
    #[error("the snapshot cannot be taken in")]
    Restore(#[source] rancor::Error),
}

/// A type that can be a piece of pre-copied state. Implemented for every fitting rkyv type.
pub trait Piece:
    Sized
    + Archive<
        Archived: for<'a> CheckBytes<HighValidator<'a, rancor::Error>>
                      + Deserialize<Self, HighDeserializer<rancor::Error>>,
    > + for<'a> Serialize<HighSerializer<AlignedVec, ArenaHandle<'a>, rancor::Error>>
{
}

impl<P> Piece for P where
    P: Archive<
            Archived: for<'a> CheckBytes<HighValidator<'a, rancor::Error>>
                          + Deserialize<P, HighDeserializer<rancor::Error>>,
        > + for<'a> Serialize<HighSerializer<AlignedVec, ArenaHandle<'a>, rancor::Error>>
{
}

/// Drops on another thread what takes long to unmap, because clients wait for this one.
pub(crate) fn drop_elsewhere(what: impl Send + 'static) {
    // Without a thread it is dropped here, with the closure.
    let _ = thread::Builder::new().name("warmswap-drop".into()).spawn(move || drop(what));
}
