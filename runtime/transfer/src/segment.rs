//! One segment of the shared log: a memfd that grows records from its header to its end and never shrinks.
//!
//! ```text
//!  byte  0        8         12        16       24        28       32       40           48            56       60
//!  ┌────────┬─────────┬─────────┬────────┬─────────┬────────┬────────┬────────────┬─────────────┬────────┬────────┐
//!  │ magic  │ version │ 0       │ index  │ schema  │ 0      │ len    │ created    │ previous    │ crc of │ staged │
//!  │        │         │         │        │         │        │        │ (unix ms)  │ end         │ 0..56  │        │
//!  ├────────┴─────────┴─────────┴────────┴─────────┴────────┴────────┴────────────┴─────────────┴────────┴────────┤
//!  │ 64: commit, alone in its cache line                                                                          │
//!  ├──────────────────────────────────────────────────────────────────────────────────────────────────────────────┤
//!  │ 128: records ……………………………………………………………………… commit │ bytes nobody looks at ……………………………………………………………… len │
//!  └──────────────────────────────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! All numbers are little-endian. `previous end` fences: it says where segment `index - 1` ends, whatever that segment's
//! own commit says. A writer that lost the ownership without noticing can only publish records in its own segment past
//! that point, and nobody reads them.
//!
//! `staged` is 1 in a segment of a log that a process converts from an older schema and that is not the state yet, else 0.
//! It goes back to 0 when the new log is complete and everybody knows all of it, in the oldest segment last: so one store
//! decides which of the two logs counts, whoever dies when.
//!
//! Who may write: every process that ever owned keeps its own segments mapped writable (sealing `F_SEAL_WRITE` is not
//! possible while such a mapping exists, and undoing it would cost tens of milliseconds per GiB at the worst moment). A new
//! owner therefore never writes into a segment of its predecessor: it begins a new one. Bytes below the commit are not
//! written again by this code; against a generation of the same service that does so on purpose nothing protects the
//! others. The supervisor reads headers only, by copying.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::publication::CommitCell;
use crate::sync::{AtomicU32, Ordering};
use crate::sys::{self, Mapping};

/// Bytes before the first record.
pub const HEADER_LEN: usize = 128;
/// Longest segment that is mapped, bytes.
pub const SEGMENT_LEN_MAX: usize = 1 << 30;
/// Shortest segment, bytes.
pub const SEGMENT_LEN_MIN: usize = 1 << 16;

const MAGIC: u64 = u64::from_le_bytes(*b"WSWPLOG1");
const VERSION: u32 = 2;
const COMMIT_OFFSET: usize = 64;
const STAGED_OFFSET: usize = 60;
const CHECKED_LEN: usize = 56;
const SEALS: libc::c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;

/// Why a segment is not used.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    #[error("cannot {what} a segment of {len} bytes")]
    System {
        what: &'static str,
        len: u64,
        #[source]
        source: io::Error,
    },
    #[error("segment {index} is not sealed against shrinking")]
    NotSealed { index: u64 },
    #[error("segment {index} is no ordinary memory file")]
    NotMemory { index: u64 },
    #[error("segment {index} is {len} bytes long, which no segment is")]
    Length { index: u64, len: u64 },
    #[error("what came as segment {index} is none: {why}")]
    Foreign { index: u64, why: HeaderError },
    #[error("segment {index} says it is segment {found}")]
    WrongIndex { index: u64, found: u64 },
    #[error("segment {index} is written in schema {schema}, and this program reads {read:?}")]
    Schema { index: u64, schema: u32, read: Vec<u32> },
    #[error("segment {index} says it is committed up to byte {committed} of {len}")]
    Commit { index: u64, committed: u64, len: usize },
}

/// What is wrong with a header's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    #[error("the magic differs")]
    Magic,
    #[error("version {found} instead of {VERSION}")]
    Version { found: u32 },
    #[error("the checksum of the header is wrong")]
    Checksum,
    #[error("its length of {len} bytes is impossible")]
    Length { len: u64 },
    #[error("the previous segment cannot have ended at byte {previous_end}")]
    PreviousEnd { previous_end: u64 },
}

/// The part of a header that is written once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub index: u64,
    pub schema: u32,
    /// Of the whole segment, bytes.
    pub len: u64,
    pub created_unix_ms: u64,
    /// Where segment `index - 1` ends, bytes; 0 for the first.
    pub previous_end: u64,
}

impl Header {
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &MAGIC.to_le_bytes());
        put(8, &VERSION.to_le_bytes());
        put(16, &self.index.to_le_bytes());
        put(24, &self.schema.to_le_bytes());
        put(32, &self.len.to_le_bytes());
        put(40, &self.created_unix_ms.to_le_bytes());
        put(48, &self.previous_end.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..CHECKED_LEN]);
        bytes[CHECKED_LEN..CHECKED_LEN + 4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads an untrusted header.
    ///
    /// # Errors
    /// [`HeaderError`] for the first field that cannot be.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self, HeaderError> {
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        if u64_at(0) != MAGIC {
            return Err(HeaderError::Magic);
        }
        if u32_at(8) != VERSION {
            return Err(HeaderError::Version { found: u32_at(8) });
        }
        if u32_at(CHECKED_LEN) != crc32fast::hash(&bytes[..CHECKED_LEN]) {
            return Err(HeaderError::Checksum);
        }
        let header = Self {
            index: u64_at(16),
            schema: u32_at(24),
            len: u64_at(32),
            created_unix_ms: u64_at(40),
            previous_end: u64_at(48),
        };
        if !length_is_possible(header.len) {
            return Err(HeaderError::Length { len: header.len });
        }
        let first = header.previous_end == 0;
        if !first && !(HEADER_LEN as u64..=SEGMENT_LEN_MAX as u64).contains(&header.previous_end) {
            return Err(HeaderError::PreviousEnd { previous_end: header.previous_end });
        }
        Ok(header)
    }
}

fn length_is_possible(len: u64) -> bool {
    (SEGMENT_LEN_MIN as u64..=SEGMENT_LEN_MAX as u64).contains(&len) && len.is_multiple_of(4096)
}

/// Which segment of a log this memory file is; `None` when it is none, or has no place in a log yet.
#[must_use]
pub fn segment_index(fd: BorrowedFd<'_>) -> Option<u64> {
    peek(fd).map(|(header, _)| header.index)
}

/// In which schema the records of this segment are written; `None` as with [`segment_index`].
#[must_use]
pub fn segment_schema(fd: BorrowedFd<'_>) -> Option<u32> {
    peek(fd).map(|(header, _)| header.schema)
}

/// The header of a segment that is not mapped, and whether it is staged.
pub(crate) fn peek(fd: BorrowedFd<'_>) -> Option<(Header, bool)> {
    // Nothing but memory has seals, and only of memory is it certain that reading does not wait.
    sys::seals(fd).ok()?;
    let bytes = read_header(fd).ok()?;
    let header = Header::parse(&bytes).ok()?;
    Some((header, bytes[STAGED_OFFSET..STAGED_OFFSET + 4] != [0; 4]))
}

fn read_header(fd: BorrowedFd<'_>) -> io::Result<[u8; HEADER_LEN]> {
    let mut bytes = [0; HEADER_LEN];
    File::from(fd.try_clone_to_owned()?).read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// Whether this can be segment `index`, without mapping it: for a supervisor, which keeps and forwards segments of others
/// and must not be handed a file that is none.
///
/// # Errors
/// As [`Segment::open`], but for schema and commit.
pub fn check_segment(fd: BorrowedFd<'_>, index: u64) -> Result<Header, SegmentError> {
    let len = check_memory(fd, index)?;
    let bytes = read_header(fd).map_err(|source| SegmentError::System { what: "read", len, source })?;
    check_header(&bytes, index, len)
}

/// Its length, once it is certain that it can neither shrink nor lack memory.
fn check_memory(fd: BorrowedFd<'_>, index: u64) -> Result<u64, SegmentError> {
    let seals = sys::seals(fd).map_err(|_| SegmentError::NotSealed { index })?;
    if seals & libc::F_SEAL_SHRINK == 0 {
        return Err(SegmentError::NotSealed { index });
    }
    // One of huge pages raises SIGBUS when the host has none left.
    if !sys::is_tmpfs(fd).map_err(|source| SegmentError::System { what: "look at", len: 0, source })? {
        return Err(SegmentError::NotMemory { index });
    }
    let len = sys::len(fd).map_err(|source| SegmentError::System { what: "measure", len: 0, source })?;
    if length_is_possible(len) { Ok(len) } else { Err(SegmentError::Length { index, len }) }
}

fn check_header(bytes: &[u8; HEADER_LEN], index: u64, len: u64) -> Result<Header, SegmentError> {
    let header = Header::parse(bytes).map_err(|why| SegmentError::Foreign { index, why })?;
    if header.len != len {
        return Err(SegmentError::Length { index, len });
    }
    if header.index != index {
        return Err(SegmentError::WrongIndex { index, found: header.index });
    }
    Ok(header)
}

/// A segment whose pages exist and that has no place in a log yet.
#[derive(Debug)]
pub(crate) struct BlankSegment {
    fd: OwnedFd,
    map: Mapping,
}

impl BlankSegment {
    /// Makes the memfd, faults every page in and seals it. Slow on purpose: called ahead, on a thread of its own.
    pub(crate) fn create(len: usize) -> Result<Self, SegmentError> {
        let system = |what| move |source| SegmentError::System { what, len: len as u64, source };
        let fd = sys::memfd(c"warmswap-segment", len as u64).map_err(system("create"))?;
        let map = Mapping::new(fd.as_fd(), len, true).map_err(system("map"))?;
        map.populate().map_err(system("get memory for"))?;
        sys::add_seals(fd.as_fd(), SEALS).map_err(system("seal"))?;
        Ok(Self { fd, map })
    }

    pub(crate) fn activate(self, index: u64, schema: u32, previous_end: u64, staged: bool) -> Segment {
        let created_unix_ms =
            SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| u64::try_from(age.as_millis()).unwrap_or(0));
        let header = Header { index, schema, len: self.map.len() as u64, created_unix_ms, previous_end };
        let bytes = header.to_bytes();
        // SAFETY: the mapping is writable, at least SEGMENT_LEN_MIN long, and no other process has its descriptor yet.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.map.as_ptr(), HEADER_LEN) };
        let segment = Segment { fd: self.fd, map: self.map, header, writable: true };
        segment.staged_cell().store(staged.into(), Ordering::Release);
        segment.commit_cell().publish(HEADER_LEN as u64);
        segment
    }
}

/// A mapped segment with a place in a log.
#[derive(Debug)]
pub struct Segment {
    fd: OwnedFd,
    map: Mapping,
    header: Header,
    writable: bool,
}

impl Segment {
    /// Maps what came from another process as segment `index`, read-only, after checking seals, size and header.
    ///
    /// # Errors
    /// Everything that could make reading it unsound is refused.
    pub fn open(fd: OwnedFd, index: u64, schemas_read: &[u32]) -> Result<Self, SegmentError> {
        let len = check_memory(fd.as_fd(), index)?;
        let map = Mapping::new(fd.as_fd(), len as usize, false).map_err(|source| SegmentError::System {
            what: "map",
            len,
            source,
        })?;
        let mut bytes = [0; HEADER_LEN];
        // SAFETY: the mapping is longer than a header and cannot shrink; the copy is private from here on.
        unsafe { std::ptr::copy_nonoverlapping(map.as_ptr(), bytes.as_mut_ptr(), HEADER_LEN) };
        let header = check_header(&bytes, index, len)?;
        if !schemas_read.contains(&header.schema) {
            return Err(SegmentError::Schema { index, schema: header.schema, read: schemas_read.to_vec() });
        }
        let segment = Self { fd, map, header, writable: false };
        segment.committed()?;
        Ok(segment)
    }

    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.map.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.commit_cell().committed() <= HEADER_LEN as u64
    }

    /// This process made the segment and may append to it while it owns.
    pub(crate) fn is_ours(&self) -> bool {
        self.writable
    }

    fn commit_cell(&self) -> &CommitCell {
        // SAFETY: inside the mapping, aligned to 64 bytes because the mapping begins at a page, alive as long as
        // `self`; every process accesses it atomically only.
        unsafe { &*self.map.as_ptr().add(COMMIT_OFFSET).cast::<CommitCell>() }
    }

    fn staged_cell(&self) -> &AtomicU32 {
        // SAFETY: inside the mapping, aligned to 4 bytes because the mapping begins at a page, alive as long as `self`;
        // other processes read it with a system call.
        unsafe { &*self.map.as_ptr().add(STAGED_OFFSET).cast::<AtomicU32>() }
    }

    /// From now on this segment is part of the state.
    pub(crate) fn unstage(&self) {
        debug_assert!(self.writable);
        self.staged_cell().store(0, Ordering::Release);
    }

    /// Up to which byte records are whole.
    ///
    /// # Errors
    /// [`SegmentError::Commit`] when the word is outside the segment.
    pub fn committed(&self) -> Result<usize, SegmentError> {
        let committed = self.commit_cell().committed();
        if committed < HEADER_LEN as u64 || committed > self.len() as u64 {
            return Err(SegmentError::Commit { index: self.header.index, committed, len: self.len() });
        }
        Ok(committed as usize)
    }

    pub(crate) fn publish(&self, committed: usize) {
        debug_assert!(self.writable && committed <= self.len());
        self.commit_cell().publish(committed as u64);
    }

    /// Bytes that are committed, or appended by this process: they do not change any more.
    /// `None` for a range that is not inside the segment's records.
    pub(crate) fn get(&self, from: usize, to: usize) -> Option<&[u8]> {
        if from < HEADER_LEN || from > to || to > self.len() {
            return None;
        }
        // SAFETY: inside the mapping; callers pass ranges below the commit (acquired) or below their own append
        // position, and no process of this code writes there again.
        Some(unsafe { std::slice::from_raw_parts(self.map.as_ptr().add(from), to - from) })
    }

    /// Everything behind the header, while nothing is committed: nobody looks at it.
    pub(crate) fn blank(&mut self) -> &mut [u8] {
        assert!(self.writable && self.is_empty());
        let len = self.len() - HEADER_LEN;
        // SAFETY: inside the writable mapping; `get` hands out nothing of it before something is committed, for which
        // this borrow must have ended.
        unsafe { std::slice::from_raw_parts_mut(self.map.as_ptr().add(HEADER_LEN), len) }
    }

    /// Maps every page of a segment that another process has filled or will fill, so that reading it waits for nothing.
    pub(crate) fn touch(&self) {
        self.map.touch();
    }

    /// Writes past the append position.
    pub(crate) fn write(&mut self, at: usize, parts: &[&[u8]]) {
        assert!(self.writable);
        let mut at = at;
        for part in parts {
            assert!(at >= HEADER_LEN && part.len() <= self.len() - at);
            // SAFETY: inside the writable mapping (asserted); past the commit and the append position, so that no
            // slice handed out by `bytes` covers it.
            unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), self.map.as_ptr().add(at), part.len()) };
            at += part.len();
        }
    }
}

impl AsFd for Segment {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn segment(index: u64) -> Segment {
        BlankSegment::create(SEGMENT_LEN_MIN).unwrap().activate(index, 3, 0, false)
    }

    fn dup(segment: &Segment) -> OwnedFd {
        segment.as_fd().try_clone_to_owned().unwrap()
    }

    #[test]
    fn a_segment_opens_in_another_mapping() {
        let ours = segment(5);
        let theirs = Segment::open(dup(&ours), 5, &[3]).unwrap();
        assert_eq!(theirs.header(), ours.header());
        assert_eq!(theirs.committed().unwrap(), HEADER_LEN);
        assert_eq!(segment_index(ours.as_fd()), Some(5));
        assert_eq!(segment_index(BlankSegment::create(SEGMENT_LEN_MIN).unwrap().fd.as_fd()), None);
        ours.publish(4096);
        assert_eq!(theirs.committed().unwrap(), 4096);
    }

    #[test]
    fn a_staged_segment_says_so_until_it_is_part_of_the_state() {
        let staged = BlankSegment::create(SEGMENT_LEN_MIN).unwrap().activate(1, 3, 0, true);
        assert_eq!(peek(staged.as_fd()).map(|(header, staged)| (header.schema, staged)), Some((3, true)));
        staged.unstage();
        assert_eq!(peek(staged.as_fd()), Some((*staged.header(), false)));
        assert_eq!(segment_schema(staged.as_fd()), Some(3));
    }

    #[test]
    fn wrong_index_schema_or_commit_is_refused() {
        let ours = segment(5);
        assert!(matches!(Segment::open(dup(&ours), 6, &[3]), Err(SegmentError::WrongIndex { found: 5, .. })));
        assert!(matches!(Segment::open(dup(&ours), 5, &[1, 2]), Err(SegmentError::Schema { schema: 3, .. })));
        ours.commit_cell().publish(u64::MAX);
        assert!(matches!(Segment::open(dup(&ours), 5, &[3]), Err(SegmentError::Commit { .. })));
    }

    #[test]
    fn what_could_shrink_or_is_short_or_foreign_is_refused() {
        let shrinkable = sys::memfd(c"x", SEGMENT_LEN_MIN as u64).unwrap();
        assert!(matches!(Segment::open(shrinkable, 0, &[3]), Err(SegmentError::NotSealed { .. })));
        let short = sys::memfd(c"x", 100).unwrap();
        sys::add_seals(short.as_fd(), SEALS).unwrap();
        assert!(matches!(Segment::open(short, 0, &[3]), Err(SegmentError::Length { len: 100, .. })));
        let blank = sys::memfd(c"x", SEGMENT_LEN_MIN as u64).unwrap();
        sys::add_seals(blank.as_fd(), SEALS).unwrap();
        let refused = Segment::open(blank, 0, &[3]);
        assert!(matches!(refused, Err(SegmentError::Foreign { why: HeaderError::Magic, .. })), "{refused:?}");
        let pipe = std::io::pipe().unwrap().0;
        assert!(matches!(check_segment(pipe.as_fd(), 0), Err(SegmentError::NotSealed { .. })));
        assert_eq!(segment_index(pipe.as_fd()), None, "and did not wait for somebody to write");
        assert!(matches!(Segment::open(pipe.into(), 0, &[3]), Err(SegmentError::NotSealed { .. })));
    }

    #[test]
    fn a_supervisor_takes_the_same_for_a_segment_as_a_follower() {
        let ours = segment(5);
        assert_eq!(check_segment(ours.as_fd(), 5).unwrap(), *ours.header());
        assert!(matches!(check_segment(ours.as_fd(), 6), Err(SegmentError::WrongIndex { found: 5, .. })));
        let endless = sys::memfd(c"x", i64::MAX as u64).unwrap();
        sys::add_seals(endless.as_fd(), SEALS).unwrap();
        assert!(matches!(check_segment(endless.as_fd(), 0), Err(SegmentError::Length { .. })));
        // SAFETY: a valid name; the result is checked.
        let huge = unsafe { libc::memfd_create(c"x".as_ptr(), libc::MFD_ALLOW_SEALING | libc::MFD_HUGETLB) };
        if huge >= 0 {
            use std::os::fd::FromRawFd;
            // SAFETY: just made, owned by nobody else.
            let huge = unsafe { OwnedFd::from_raw_fd(huge) };
            sys::add_seals(huge.as_fd(), libc::F_SEAL_SHRINK).unwrap();
            assert!(matches!(check_segment(huge.as_fd(), 0), Err(SegmentError::NotMemory { .. })));
        }
    }

    #[test]
    fn the_kernel_refuses_to_shrink_a_sealed_segment() {
        use std::os::fd::AsRawFd;
        let ours = segment(0);
        // SAFETY: plain system call on an owned descriptor.
        let result = unsafe { libc::ftruncate(ours.as_fd().as_raw_fd(), 0) };
        assert_eq!((result, io::Error::last_os_error().raw_os_error()), (-1, Some(libc::EPERM)));
    }

    proptest! {
        #[test]
        fn headers_survive_the_round_trip(index: u64, schema: u32, pages in 16_u64..1000, created_unix_ms: u64) {
            let header = Header { index, schema, len: pages * 4096, created_unix_ms, previous_end: 128 };
            prop_assert_eq!(Header::parse(&header.to_bytes()), Ok(header));
        }

        #[test]
        fn a_damaged_header_is_refused(at in 0..60_usize, bit in 0..8_u32) {
            let header = Header { index: 1, schema: 1, len: 1 << 20, created_unix_ms: 1, previous_end: 128 };
            let mut bytes = header.to_bytes();
            bytes[at] ^= 1 << bit;
            prop_assert!(Header::parse(&bytes).is_err());
        }
    }
}
