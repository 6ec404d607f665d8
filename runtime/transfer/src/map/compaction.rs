//! Keeps the memory of a map bounded: the living records of the oldest segment are appended again at the tail, then
//! the segment is retired. Records are idempotent puts, so a follower that sees both sees the same map.
//!
//! A removal in the oldest segment is simply dropped: whatever it removed was older, and older segments are gone.

use crate::log::LogError;
use crate::map::{Living, ResidentMap, Role, Value};
use crate::message::LogPosition;
use crate::record::RecordKind;
use crate::segment::HEADER_LEN;
use crate::state::{SegmentNotice, State};

/// Segments a map may have before compaction looks at it.
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

/// What a map holds and what keeping it compact has cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MapStatistics {
    pub keys: usize,
    /// Records of living keys, bytes.
    pub living_bytes: u64,
    /// All segments, bytes.
    pub segment_bytes: u64,
    pub segments: usize,
    /// Bytes that compaction appended again, since this process became owner.
    pub copied_bytes: u64,
    /// Segments retired since this process became owner.
    pub segments_retired: u64,
}

impl<V: Value> ResidentMap<V> {
    #[must_use]
    pub fn statistics(&self) -> MapStatistics {
        let segments = self.role.segments();
        MapStatistics {
            keys: self.index.len(),
            living_bytes: self.living.values().sum(),
            segment_bytes: segments.bytes(),
            segments: segments.count(),
            copied_bytes: self.compaction.copied,
            segments_retired: self.compaction.retired,
        }
    }

    /// A bounded piece of compaction, for the owner: call it once per turn of the event loop. Looks at no more than
    /// four times the bytes appended since the last call, or 64 KiB.
    ///
    /// # Errors
    /// When there is no memory for the next segment; the map is whole then, only not smaller.
    pub fn maintain(&mut self) -> Result<(), LogError> {
        if !matches!(self.role, Role::Owner(_)) {
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
                    self.retire_oldest(cursor.segment)?;
                    self.compaction.cursor = None;
                }
            }
        }
        Ok(())
    }

    /// The oldest segment, when less than half of what all segments hold is alive.
    fn compaction_start(&self) -> Option<LogPosition> {
        let segments = self.role.segments();
        let living: u64 = self.living.values().sum();
        let worth = segments.count() as u64 > SEGMENTS_FREE && living * 2 < segments.bytes();
        let first = segments.first().filter(|first| Some(*first) != segments.last())?;
        worth.then_some(LogPosition { segment: first, offset: HEADER_LEN as u64 })
    }

    /// Looks at one record; `None` at the end of the segment, else the record's length.
    fn compact_one(&mut self, at: LogPosition) -> Result<Option<usize>, LogError> {
        let segments = self.role.segments();
        let Some(end) = segments.end(at.segment)? else { return Ok(None) };
        if at.offset >= end as u64 {
            return Ok(None);
        }
        let Some(view) = segments.record(at) else { return Ok(None) };
        let len = view.len;
        if view.kind == RecordKind::Put && self.is_living(view.key, at) {
            let (key, value) = (view.key.to_vec(), view.value.to_vec());
            let writer = self.role.writer()?;
            let new = writer.append(RecordKind::Put, &key, &value)?;
            let begun = writer.take_new();
            self.notices.extend(begun.into_iter().map(SegmentNotice::New));
            self.set(&key, new)?;
            self.compaction.copied += new.len as u64;
        }
        Ok(Some(len))
    }

    fn is_living(&self, key: &[u8], at: LogPosition) -> bool {
        let segments = self.role.segments();
        let hash = std::hash::BuildHasher::hash_one(&self.hasher, key);
        let found = self.index.find(hash, |living: &Living| super::is_of(segments, *living, key));
        found.is_some_and(|living| living.position() == at)
    }

    fn retire_oldest(&mut self, index: u64) -> Result<(), LogError> {
        // Followers unmap on the notice, so what was copied out of the segment must be published before.
        self.commit();
        self.role.writer()?.retire_segment(index)?;
        self.living.remove(&index);
        self.compaction.retired += 1;
        self.notices.push_back(SegmentNotice::Retired(index));
        Ok(())
    }

    /// Walks over living records in the order of the log, for work that spreads over time (expiry): looks at up to
    /// `budget` bytes from `from` and returns where to go on, beginning again at the oldest after the end.
    pub fn walk(
        &self,
        from: LogPosition,
        budget: usize,
        mut visit: impl FnMut(&[u8], &rkyv::Archived<V>),
    ) -> LogPosition {
        let segments = self.role.segments();
        let Some(first) = segments.first() else { return LogPosition::default() };
        let start = LogPosition { segment: first, offset: HEADER_LEN as u64 };
        let mut at = from.max(start);
        let mut left = budget;
        while left > 0 {
            let Ok(Some(end)) = segments.end(at.segment) else { return start };
            match segments.record(at).filter(|_| at.offset < end as u64) {
                Some(view) => {
                    if view.kind == RecordKind::Put
                        && self.is_living(view.key, at)
                        && let Some(value) = self.get(view.key)
                    {
                        visit(view.key, value);
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
