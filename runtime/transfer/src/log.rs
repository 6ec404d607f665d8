//! The shared log: segments that one process appends to and any number follow, in place.
//!
//! The owner appends records and publishes them with one release store before it acknowledges anything; followers map
//! the same memory, check each record once (CRC) and read it where it lies. A writer killed at any instruction leaves
//! only bytes past the commit. Ownership passes without copying: [`LogReader::into_writer`] and
//! [`LogWriter::into_reader`] keep every mapping.
//!
//! Not here: what the records mean ([`crate::store`]), and how the descriptors of segments get to other processes
//! ([`crate::state`] says which, `sdk` sends them).
//!
//! ```text
//!   segment 4 (A's)          segment 5 (A's)          segment 6 (B's: previous_end = 9000)
//!   ┌──────────────┐         ┌──────────────┐         ┌──────────────┐
//!   │ records      │ ──────▶ │ records 9000 │ ──────▶ │ records      │ ──▶ commit of 6
//!   └──────────────┘         │ (stale A)    │         └──────────────┘
//!    ends where 5 says       └──────────────┘ ends where 6 says, not where A's commit says
//! ```

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use crate::message::LogPosition;
use crate::pool::SegmentPool;
use crate::record::{self, RecordError, RecordKind, RecordView, Shape, Tag};
use crate::segment::{HEADER_LEN, SEGMENT_LEN_MAX, SEGMENT_LEN_MIN, Segment, SegmentError};

/// Default length of a segment, bytes.
pub const SEGMENT_LEN: usize = 16 << 20;
/// Longest record with its header, bytes, whatever the segment could take.
pub const RECORD_LEN_MAX: usize = 4 << 20;

/// How a log is kept.
#[derive(Debug, Clone)]
pub struct LogConfig {
    /// Of the segments this process makes, bytes.
    pub segment_len: usize,
    /// Segments kept ready ahead.
    pub spares: usize,
    /// Schema of the records this process writes.
    pub schema_written: u32,
    /// Schemas it can read; must contain the one it writes.
    pub schemas_read: Vec<u32>,
}

impl LogConfig {
    /// Default sizes for a service that reads and writes one schema.
    #[must_use]
    pub fn new(schema: u32) -> Self {
        Self { segment_len: SEGMENT_LEN, spares: 1, schema_written: schema, schemas_read: vec![schema] }
    }
}

/// Why the log cannot be read or written. Every variant leaves the log as it was.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error(
        "segments of {len} bytes are not possible: use a multiple of 4096 from {SEGMENT_LEN_MIN} to {SEGMENT_LEN_MAX}"
    )]
    SegmentLength { len: usize },
    #[error("schema {written} is written but only {read:?} are read")]
    SchemaNotRead { written: u32, read: Vec<u32> },
    #[error(transparent)]
    Segment(#[from] SegmentError),
    #[error("segment {index} is there already")]
    Duplicate { index: u64 },
    #[error("segment {index} came after segment {last}: segments of a log come one after the other, none left out")]
    OutOfOrder { index: u64, last: u64 },
    #[error("a record of {len} bytes is longer than {max}")]
    RecordTooLong { len: usize, max: usize },
    #[error("a key of {len} bytes is longer than {}", record::KEY_LEN_MAX)]
    KeyTooLong { len: usize },
    #[error("the record at {at} cannot be read: {why}")]
    Record { at: LogPosition, why: RecordError },
    #[error("the value at {at} does not have the layout of schema {schema}")]
    Value {
        at: LogPosition,
        schema: u32,
        #[source]
        source: rkyv::rancor::Error,
    },
    #[error("the record at {at} says that collection {name:?} is {found}; this program declares {declared}")]
    Shape { at: LogPosition, name: String, found: Shape, declared: Shape },
    #[error("the record at {at} is none of {shape}: its key has {key_len} bytes, its value {value_len}")]
    Malformed { at: LogPosition, shape: Shape, key_len: usize, value_len: usize },
    #[error("the log has more than {max} collections")]
    Collections { max: usize },
    #[error("the counter would leave the range of 64 bits")]
    CounterOverflow,
    #[error("a value cannot be archived")]
    Archive(#[source] rkyv::rancor::Error),
    #[error("this process followed to {at}, but its successor took over at {fence}")]
    Diverged { at: LogPosition, fence: LogPosition },
    #[error("the log ends at {at} here and at {commit} where it was written")]
    Behind { at: LogPosition, commit: LogPosition },
    #[error("the log ends at {at} here and where it was written, but what is alive differs")]
    Different { at: LogPosition },
    #[error("segment {index} was retired although {what}")]
    RetiredTooEarly { index: u64, what: &'static str },
    #[error("only the owner of the log can write it")]
    NotOwner,
    #[error("the owner of the log takes no segments from others")]
    NotFollower,
}

/// Where a record lies, and how long it is with its padding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordAt {
    pub position: LogPosition,
    pub len: usize,
}

/// The segments of a log, mapped.
#[derive(Debug, Default)]
pub struct Segments(BTreeMap<u64, Segment>);

impl Segments {
    pub(crate) const fn empty() -> Self {
        Self(BTreeMap::new())
    }

    #[must_use]
    pub fn get(&self, index: u64) -> Option<&Segment> {
        self.0.get(&index)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Segment> {
        self.0.values()
    }

    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    #[must_use]
    pub fn first(&self) -> Option<u64> {
        self.0.first_key_value().map(|(index, _)| *index)
    }

    #[must_use]
    pub fn last(&self) -> Option<u64> {
        self.0.last_key_value().map(|(index, _)| *index)
    }

    /// Bytes mapped.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.values().map(|segment| segment.len() as u64).sum()
    }

    /// Where segment `index` ends: as its successor says, else as far as it is committed.
    pub(crate) fn end(&self, index: u64) -> Result<Option<usize>, SegmentError> {
        let Some(segment) = self.get(index) else { return Ok(None) };
        let Some(next) = index.checked_add(1).and_then(|next| self.get(next)) else {
            return segment.committed().map(Some);
        };
        let end = next.header().previous_end;
        if end < HEADER_LEN as u64 || end > segment.len() as u64 {
            return Err(SegmentError::Commit { index, committed: end, len: segment.len() });
        }
        Ok(Some(end as usize))
    }

    /// A record that was validated or written by this process before.
    #[must_use]
    pub fn record(&self, position: LogPosition) -> Option<RecordView<'_>> {
        let segment = self.get(position.segment)?;
        let from = usize::try_from(position.offset).ok()?;
        // First the header, then exactly the record: what lies behind it may be written at this moment.
        let header = segment.get(from, from.checked_add(record::RECORD_HEADER_LEN)?)?;
        let len = record::len_from_header(header.first_chunk()?);
        record::parse_trusted(segment.get(from, from.checked_add(len)?)?).ok()
    }
}

/// A follower's view.
#[derive(Debug)]
pub struct LogReader {
    config: LogConfig,
    segments: Segments,
    pool: SegmentPool,
    /// Everything before is read. Default (segment 0, offset 0) before the first record.
    position: LogPosition,
}

impl LogReader {
    /// An empty log that waits for segments, or becomes the first writer.
    ///
    /// # Errors
    /// When the configuration is impossible or the thread for segments does not start.
    pub fn new(config: LogConfig) -> Result<Self, LogError> {
        let len = config.segment_len;
        if !(SEGMENT_LEN_MIN..=SEGMENT_LEN_MAX).contains(&len) || !len.is_multiple_of(4096) {
            return Err(LogError::SegmentLength { len });
        }
        if !config.schemas_read.contains(&config.schema_written) {
            return Err(LogError::SchemaNotRead { written: config.schema_written, read: config.schemas_read });
        }
        let pool = SegmentPool::start(len, config.spares)?;
        Ok(Self { config, segments: Segments::default(), pool, position: LogPosition::default() })
    }

    #[must_use]
    pub fn config(&self) -> &LogConfig {
        &self.config
    }

    #[must_use]
    pub fn segments(&self) -> &Segments {
        &self.segments
    }

    /// Everything before has been read.
    #[must_use]
    pub fn position(&self) -> LogPosition {
        self.position
    }

    /// Adds a segment that came from another process. Segments come in ascending order and none is left out; the first
    /// that comes is where reading begins.
    ///
    /// # Errors
    /// When it is not what it should be; it is closed then.
    pub fn add_segment(&mut self, index: u64, fd: OwnedFd) -> Result<(), LogError> {
        if self.segments.0.contains_key(&index) {
            return Err(LogError::Duplicate { index });
        }
        if let Some(last) = self.segments.last().filter(|last| last.checked_add(1) != Some(index)) {
            return Err(LogError::OutOfOrder { index, last });
        }
        let segment = Segment::open(fd, index, &self.config.schemas_read)?;
        let fence = LogPosition { segment: index.wrapping_sub(1), offset: segment.header().previous_end };
        if self.position.segment == fence.segment && self.position.offset > fence.offset {
            return Err(LogError::Diverged { at: self.position, fence });
        }
        self.segments.0.insert(index, segment);
        if self.position == LogPosition::default() {
            self.position = LogPosition { segment: index, offset: HEADER_LEN as u64 };
        }
        Ok(())
    }

    /// The next committed record, checked; `None` when there is none yet.
    ///
    /// # Errors
    /// When the bytes are damaged. The position stays, so that the error repeats.
    pub fn advance(&mut self) -> Result<Option<(RecordAt, RecordKind)>, LogError> {
        loop {
            let at = self.position;
            let Some(end) = self.segments.end(at.segment)? else { return Ok(None) };
            let from = at.offset as usize;
            if from < end {
                let Some(segment) = self.segments.get(at.segment) else { return Ok(None) };
                let view = segment
                    .get(from, end)
                    .ok_or(RecordError::Short)
                    .and_then(record::parse)
                    .map_err(|why| LogError::Record { at, why })?;
                self.position.offset += view.len as u64;
                return Ok(Some((RecordAt { position: at, len: view.len }, view.kind)));
            }
            if from > end {
                return Err(LogError::Diverged { at, fence: LogPosition { offset: end as u64, ..at } });
            }
            if self.segments.get(at.segment + 1).is_none() {
                return Ok(None);
            }
            self.position = LogPosition { segment: at.segment + 1, offset: HEADER_LEN as u64 };
        }
    }

    /// Back to a position that [`Self::position`] gave, to read the same records again.
    pub(crate) fn rewind(&mut self, position: LogPosition) {
        self.position = position;
    }

    /// Unmaps a segment that was read to its end.
    ///
    /// # Errors
    /// [`LogError::RetiredTooEarly`] when it was not.
    pub fn retire_segment(&mut self, index: u64) -> Result<(), LogError> {
        if self.segments.get(index).is_some() && self.position.segment <= index {
            return Err(LogError::RetiredTooEarly { index, what: "not all of it was read" });
        }
        if let Some(segment) = self.segments.0.remove(&index) {
            self.pool.discard(segment);
        }
        Ok(())
    }

    /// Becomes the writer. `commit` is where the owner before said the log ends; `None` when it could not say (it is
    /// dead): then what was read so far counts. The caller has read everything (`advance` gave `None`).
    ///
    /// # Errors
    /// [`LogError::Behind`] when `commit` was not reached; the reader comes back unchanged.
    pub fn into_writer(self, commit: Option<LogPosition>) -> Result<LogWriter, Box<(Self, LogError)>> {
        if let Some(commit) = commit
            && commit != self.position
        {
            let at = self.position;
            return Err(Box::new((self, LogError::Behind { at, commit })));
        }
        let Self { config, segments, pool, position } = self;
        // Our own last segment goes on when nobody has written since (an update that was given up); a predecessor's
        // segment is never written.
        let continues = segments.last() == Some(position.segment)
            && segments.get(position.segment).is_some_and(|segment| {
                segment.is_ours() && segment.committed().is_ok_and(|committed| committed as u64 == position.offset)
            });
        Ok(LogWriter {
            config,
            segments,
            pool,
            end: position,
            committed: position,
            has_tail: continues,
            new: Vec::new(),
        })
    }
}

/// The owner's view.
#[derive(Debug)]
pub struct LogWriter {
    config: LogConfig,
    segments: Segments,
    pool: SegmentPool,
    /// Where the next record goes if it fits.
    end: LogPosition,
    committed: LogPosition,
    /// The segment of `end` is ours to append to.
    has_tail: bool,
    new: Vec<u64>,
}

impl LogWriter {
    #[must_use]
    pub fn config(&self) -> &LogConfig {
        &self.config
    }

    #[must_use]
    pub fn segments(&self) -> &Segments {
        &self.segments
    }

    /// The last published position.
    #[must_use]
    pub fn committed(&self) -> LogPosition {
        self.committed
    }

    /// How often an append had to wait for a segment.
    #[must_use]
    pub fn stalls(&self) -> u64 {
        self.pool.stalls()
    }

    /// Longest record this log takes, bytes, with header and padding.
    #[must_use]
    pub fn record_len_max(&self) -> usize {
        RECORD_LEN_MAX.min(self.config.segment_len - HEADER_LEN)
    }

    /// Writes a record where no reader looks yet; [`Self::commit`] shows it.
    ///
    /// # Errors
    /// When the record is too long, or there is no memory for the next segment.
    pub fn append(&mut self, kind: RecordKind, tag: Tag, key: &[u8], value: &[u8]) -> Result<RecordAt, LogError> {
        if key.len() > record::KEY_LEN_MAX {
            return Err(LogError::KeyTooLong { len: key.len() });
        }
        let len = record::record_len(key.len(), value.len());
        if len > self.record_len_max() {
            return Err(LogError::RecordTooLong { len, max: self.record_len_max() });
        }
        let position = self.make_room(len)?;
        let header = record::encode_header(kind, tag, key, value);
        let segment = self.segments.0.get_mut(&position.segment).ok_or(LogError::NotOwner)?;
        segment.write(position.offset as usize, &[&header, value, key]);
        self.end.offset += len as u64;
        Ok(RecordAt { position, len })
    }

    /// Makes sure that `len` bytes fit at `end`, beginning a new segment if they do not.
    fn make_room(&mut self, len: usize) -> Result<LogPosition, LogError> {
        if self.has_tail
            && let Some(tail) = self.segments.get(self.end.segment)
            && self.end.offset as usize + len <= tail.len()
        {
            return Ok(self.end);
        }
        let blank = self.pool.take()?;
        // What was appended so far becomes visible a little before its commit, which no one can tell from a commit
        // that was a little earlier: nothing is acknowledged yet.
        if self.has_tail {
            self.commit();
        }
        let index = if self.segments.count() == 0 { 0 } else { self.end.segment + 1 };
        let previous_end = if self.segments.count() == 0 { 0 } else { self.end.offset };
        self.segments.0.insert(index, blank.activate(index, self.config.schema_written, previous_end));
        self.new.push(index);
        self.has_tail = true;
        self.end = LogPosition { segment: index, offset: HEADER_LEN as u64 };
        Ok(self.end)
    }

    /// Shows everything appended so far to every follower: one release store.
    pub fn commit(&mut self) -> LogPosition {
        if self.has_tail
            && self.committed != self.end
            && let Some(tail) = self.segments.get(self.end.segment)
        {
            tail.publish(self.end.offset as usize);
            self.committed = self.end;
        }
        self.committed
    }

    /// Segments begun since the last call: their descriptors must reach the supervisor before anything in them is
    /// acknowledged to a client.
    pub fn take_new(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.new)
    }

    /// Gives up a segment without living records. Never the last one.
    ///
    /// # Errors
    /// [`LogError::RetiredTooEarly`] for the last segment.
    pub fn retire_segment(&mut self, index: u64) -> Result<(), LogError> {
        if self.segments.last() == Some(index) {
            return Err(LogError::RetiredTooEarly { index, what: "it is the last" });
        }
        if let Some(segment) = self.segments.0.remove(&index) {
            self.pool.discard(segment);
        }
        Ok(())
    }

    /// Stops writing: publishes what was appended and follows from there.
    #[must_use]
    pub fn into_reader(mut self) -> LogReader {
        let position = self.commit();
        let Self { config, segments, pool, .. } = self;
        LogReader { config, segments, pool, position }
    }
}
