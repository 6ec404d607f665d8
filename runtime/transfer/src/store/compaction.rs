//! Keeps the memory of a log bounded: the living records of the oldest segment are appended again at the tail, then
//! the segment is retired. Records are idempotent puts, so a follower that sees both sees the same state.
//!
//! A removal in the oldest segment is simply dropped: whatever it removed was older, and older segments are gone. Entries
//! of a log keep their numbers, so they keep their order.

use crate::log::LogError;
use crate::message::LogPosition;
use crate::record::RecordView;
use crate::segment::HEADER_LEN;

use super::ledger::Ledger;

/// Segments a log may have before compaction looks at it.
const SEGMENTS_FREE: u64 = 4;
/// Bytes looked at per call of `maintain` when nothing was appended since the last.
const SCAN_LEN_MIN: usize = 64 << 10;
/// Bytes looked at per byte appended. At the threshold half of a segment is alive, so two bytes scanned free at least
/// one: four keeps ahead of any writer.
const SCAN_PER_APPENDED: usize = 4;

#[derive(Debug, Default)]
pub(super) struct Compaction {
    /// Where the scan of the oldest segment stands.
    cursor: Option<LogPosition>,
    /// Bytes since the last call of `maintain`, copies by compaction not counted.
    appended: usize,
    copied: u64,
    retired: u64,
}

impl Compaction {
    pub(super) fn appended(&mut self, len: usize) {
        self.appended += len;
    }
}

/// What a store holds and what keeping it compact has cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Statistics {
    /// Living records of all collections, also of those that this program does not declare.
    pub records: usize,
    /// Of these records, bytes.
    pub living_bytes: u64,
    /// All segments, bytes.
    pub segment_bytes: u64,
    pub segments: usize,
    /// Bytes that compaction appended again, since this process became owner.
    pub copied_bytes: u64,
    /// Segments retired since this process became owner.
    pub segments_retired: u64,
}

impl Ledger {
    pub(super) fn statistics(&self) -> Statistics {
        let segments = self.segments();
        Statistics {
            records: self.index.count_all(),
            living_bytes: self.index.living_bytes(),
            segment_bytes: segments.bytes(),
            segments: segments.count(),
            copied_bytes: self.compaction.copied,
            segments_retired: self.compaction.retired,
        }
    }

    /// A bounded piece of compaction, for the owner.
    pub(super) fn maintain(&mut self) -> Result<(), LogError> {
        if !self.is_owner() {
            return Ok(());
        }
        let appended = std::mem::take(&mut self.compaction.appended);
        let mut budget = SCAN_LEN_MIN.max(appended.saturating_mul(SCAN_PER_APPENDED));
        while budget > 0 {
            let Some(cursor) = self.compaction.cursor.or_else(|| self.compaction_start()) else { return Ok(()) };
            match self.compact_one(cursor)? {
                Some(len) => {
                    budget = budget.saturating_sub(len);
                    let offset = cursor.offset + len as u64;
                    self.compaction.cursor = Some(LogPosition { offset, ..cursor });
                }
                None => {
                    self.retire(cursor.segment)?;
                    self.compaction.retired += 1;
                    self.compaction.cursor = None;
                }
            }
        }
        Ok(())
    }

    /// The oldest segment, when less than half of what all segments hold is alive.
    fn compaction_start(&self) -> Option<LogPosition> {
        let segments = self.segments();
        let worth = segments.count() as u64 > SEGMENTS_FREE && self.index.living_bytes() * 2 < segments.bytes();
        let first = segments.first().filter(|first| Some(*first) != segments.last())?;
        worth.then_some(LogPosition { segment: first, offset: HEADER_LEN as u64 })
    }

    /// Looks at one record; `None` at the end of the segment, else the record's length.
    fn compact_one(&mut self, at: LogPosition) -> Result<Option<usize>, LogError> {
        let segments = self.segments();
        let Some(end) = segments.end(at.segment)? else { return Ok(None) };
        if at.offset >= end as u64 {
            return Ok(None);
        }
        let Some(view) = segments.record(at) else { return Ok(None) };
        let len = view.len;
        if self.index.is_living(segments, &view, at) {
            self.compaction.copied += self.copy(at)? as u64;
        }
        Ok(Some(len))
    }

    /// Looks at up to `budget` bytes of the log from `from` on and shows what is alive there; returns where to go on,
    /// beginning again at the oldest after the end.
    pub(super) fn walk(&self, from: LogPosition, budget: usize, mut visit: impl FnMut(RecordView<'_>)) -> LogPosition {
        let segments = self.segments();
        let Some(first) = segments.first() else { return LogPosition::default() };
        let start = LogPosition { segment: first, offset: HEADER_LEN as u64 };
        let mut at = from.max(start);
        let mut left = budget;
        while left > 0 {
            let Ok(Some(end)) = segments.end(at.segment) else { return start };
            match segments.record(at).filter(|_| at.offset < end as u64) {
                Some(view) => {
                    if self.index.is_living(segments, &view, at) {
                        visit(view);
                    }
                    at.offset += view.len as u64;
                    left = left.saturating_sub(view.len);
                }
                None if segments.last() == Some(at.segment) => return start,
                None => at = LogPosition { segment: at.segment + 1, offset: HEADER_LEN as u64 },
            }
        }
        at
    }
}
