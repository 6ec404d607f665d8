//! Where every record went. Per class, once both rings are empty: emitted = consumed + discarded + dropped.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use warmswap_events::{CLASSES, Class, ClassAccount};

use crate::mapped::MappedArray;

/// What became of the records of one class since the sensor was loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ClassTotals {
    /// Records that a probe wanted to send.
    pub emitted: u64,
    /// Handed to at least one subscriber or taker of marks.
    pub consumed: u64,
    /// Read, but nobody wanted it or its queue was full.
    pub discarded: u64,
    /// Lost in the kernel for want of room in the ring.
    pub dropped: u64,
    /// Of those dropped: to leave what room there was to classes of more value.
    pub shed: u64,
}

impl ClassTotals {
    /// Still in a ring.
    #[must_use]
    pub const fn pending(&self) -> u64 {
        self.emitted.saturating_sub(self.consumed + self.discarded + self.dropped)
    }
}

/// Totals per class, in the order of [`Class::ALL`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accounting {
    pub classes: Vec<(String, ClassTotals)>,
    /// Records that were no record of any class: always 0 unless probes and sensor are of different builds.
    pub malformed: u64,
}

impl Accounting {
    #[must_use]
    pub fn of(&self, class: Class) -> ClassTotals {
        self.classes.get(class as usize).map(|(_, totals)| *totals).unwrap_or_default()
    }
}

/// Says what is lost: the first time, then at every doubling.
#[derive(Debug, Default)]
pub(crate) struct Losses {
    told: [u64; CLASSES],
}

impl Losses {
    pub(crate) fn tell(&mut self, accounting: &Accounting) {
        for (told, (class, totals)) in self.told.iter_mut().zip(&accounting.classes) {
            let ClassTotals { emitted, dropped, shed, .. } = *totals;
            if dropped > 0 && dropped >= told.saturating_mul(2) {
                *told = dropped;
                tracing::warn!(
                    "more happens than can be read: {dropped} of {emitted} events of class {class} are lost, {shed} of them to leave \
                     room for others; counters and windows are not affected"
                );
            }
        }
    }
}

/// User space's side, written by the threads that read the rings.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    consumed: [AtomicU64; CLASSES],
    discarded: [AtomicU64; CLASSES],
    malformed: AtomicU64,
}

impl Tally {
    pub(crate) fn count(&self, class: Class, consumed: bool) {
        let counters = if consumed { &self.consumed } else { &self.discarded };
        // Relaxed: a statistic; nothing is read in consequence of it.
        counters[class as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_malformed(&self) {
        self.malformed.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn totals(&self, kernel: &MappedArray<ClassAccount>) -> Accounting {
        let classes = Class::ALL.into_iter().map(|class| {
            let index = class as usize;
            // What was read is loaded before what was emitted, so that nothing seems read before it was sent.
            let consumed = self.consumed[index].load(Ordering::Acquire);
            let discarded = self.discarded[index].load(Ordering::Acquire);
            let ClassAccount { emitted, dropped, shed } = kernel.read(index).unwrap_or_default();
            (class.name().to_owned(), ClassTotals { emitted, consumed, discarded, dropped, shed })
        });
        Accounting { classes: classes.collect(), malformed: self.malformed.load(Ordering::Relaxed) }
    }
}
