//! The one word through which a segment's writer shows records to its readers.
//!
//! Apart from the segment so that loom can run it: see `tests/loom.rs`.

use crate::sync::{AtomicU64, Ordering};

/// Bytes of the segment that are whole records, header included. Only grows.
#[repr(transparent)]
#[derive(Debug)]
pub struct CommitCell(AtomicU64);

impl CommitCell {
    #[cfg(loom)]
    #[must_use]
    pub fn new(committed: u64) -> Self {
        Self(AtomicU64::new(committed))
    }

    /// Release: every byte written below `committed` is visible to whoever reads this value. A writer killed before
    /// this store leaves only bytes that nobody looks at.
    pub fn publish(&self, committed: u64) {
        self.0.store(committed, Ordering::Release);
    }

    /// Acquire: the other side of [`Self::publish`].
    #[must_use]
    pub fn committed(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
}
