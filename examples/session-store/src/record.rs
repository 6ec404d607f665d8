//! What one key holds, and how it changes between versions.
//!
//! Schema 1, of versions 1 to 3: data, expiry and a `tail`. The tail is where later versions put fields that earlier ones do
//! not know: each version appends its fields in a fixed order, little-endian, and reads as many as it knows and finds. So v2
//! reads what v1 wrote (no tail: the field is absent), and v1 reads what v2 wrote and passes the tail on when it changes
//! nothing but the expiry.
//!
//! Schema 2, of version 4: what the tail held is a field like any other. Version 4 reads both, converts what it finds, and
//! writes schema 1 as well while a version that needs it may have to come back.

use rkyv::{Archive, Deserialize, Serialize};
use warmswap_sdk::transfer::store::Evolution;

/// The value of a key, in schema 1.
#[derive(Debug, Clone, PartialEq, Eq, Default, Archive, Serialize, Deserialize)]
pub struct Session {
    pub data: Vec<u8>,
    /// Unix ms after which the key is gone; 0 for never. Absolute, so that it means the same in every generation.
    pub expires_at_ms: u64,
    /// `updated_ms: u64` since v2; empty before.
    pub tail: Vec<u8>,
}

impl Session {
    /// A value as version 2 writes it.
    #[must_use]
    pub fn tail_of(updated_ms: u64) -> Vec<u8> {
        updated_ms.to_le_bytes().to_vec()
    }
}

impl ArchivedSession {
    /// Unix ms of the last write, if the version that wrote it knew the field.
    #[must_use]
    pub fn updated_ms(&self) -> Option<u64> {
        self.tail.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))
    }
}

/// The value of a key, in schema 2.
#[derive(Debug, Clone, PartialEq, Eq, Default, Archive, Serialize, Deserialize)]
pub struct DatedSession {
    pub data: Vec<u8>,
    /// As in [`Session`].
    pub expires_at_ms: u64,
    /// Unix ms of the last write; `None` when version 1 wrote it.
    pub updated_ms: Option<u64>,
}

impl DatedSession {
    fn up(old: &ArchivedSession) -> Self {
        let (data, expires_at_ms) = (old.data.to_vec(), old.expires_at_ms.to_native());
        Self { data, expires_at_ms, updated_ms: old.updated_ms() }
    }

    /// From schema 1 on and, if `back`, to it again.
    #[must_use]
    pub fn evolution(back: bool) -> Evolution<Self> {
        if back {
            Evolution::new().both_ways::<Session>(1, Self::up, ArchivedDatedSession::down)
        } else {
            Evolution::new().one_way::<Session>(1, Self::up)
        }
    }
}

impl ArchivedDatedSession {
    fn down(&self) -> Session {
        let tail = self.updated_ms.as_ref().map_or_else(Vec::new, |at| Session::tail_of(at.to_native()));
        Session { data: self.data.to_vec(), expires_at_ms: self.expires_at_ms.to_native(), tail }
    }
}
