//! What one key holds, and how it changes between versions.
//!
//! All versions write schema 1: data, expiry and a `tail`. The tail is where later versions put fields that earlier ones do
//! not know: each version appends its fields in a fixed order, little-endian, and reads as many as it knows and finds. So v2
//! reads what v1 wrote (no tail: the field is absent), and v1 reads what v2 wrote and passes the tail on when it changes
//! nothing but the expiry. A change that cannot be made this way takes a new schema number, and a rollback across it
//! is refused before the handover, not after.

use rkyv::{Archive, Deserialize, Serialize};

pub const SCHEMA: u32 = 1;

/// The value of a key.
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
    #[must_use]
    pub fn is_expired(&self, now_ms: u64) -> bool {
        let at = self.expires_at_ms.to_native();
        at != 0 && at <= now_ms
    }

    /// Unix ms of the last write, if the version that wrote it knew the field.
    #[must_use]
    pub fn updated_ms(&self) -> Option<u64> {
        self.tail.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))
    }
}
