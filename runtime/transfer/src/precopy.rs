//! State in structures of the program's own that is copied while the owner serves: first all of it, in slices between
//! requests (the *base*), and every change from the beginning of the base on. What is left for the blackout are the last
//! changes, whatever the size of the state.
//!
//! ```text
//!   owner      Follow{on}                      base is out: may yield       Yield
//!   serves ───────┬──────┬──────┬──────┬──────────────┬────────────────────────┤
//!   stream:       base   change base   change  base   BASE_OUT   change change │  the new owner's changes, for the way back
//!   follower:     ───▶ clears itself, takes in piece by piece ───▶ whole       ▶
//! ```
//!
//! The stream is a log as [`crate::log`] has it, so that ownership passes on it both ways with the same fence. Unlike the
//! shared log it is no home of the state: a segment is given up as soon as the next one is begun, and all of it when nobody
//! follows. While nobody follows, a change costs one branch.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use rkyv::rancor;
use rkyv::util::AlignedVec;

use crate::heap::{HeapError, Piece, drop_elsewhere};
use crate::log::{LogConfig, LogError, LogReader, LogWriter, RecordAt};
use crate::message::{Commit, LogPosition, StateKind};
use crate::record::{RecordKind, Shape, Tag};
use crate::segment::{HEADER_LEN, Header, Segment};
use crate::state::{Followed, Preparing, SegmentNotice, State};

/// How long a slice of the base takes, at most a piece longer.
const SLICE: Duration = Duration::from_micros(200);
/// Segments ready ahead while somebody follows: the base leaves the last one to the changes, which cannot wait.
const SPARES_MIN: usize = 2;
/// The stream is no store: its records belong to no collection that has a name.
const PIECES: Tag = Tag { collection: 0, shape: Shape::Log };
/// Keys of the stream's records.
const PIECE: &[u8] = b"p";
const BASE_OUT: &[u8] = b"e";

/// State that can be told in pieces.
///
/// A piece says what a part of the state *is* from then on, not what is done to it: pieces of the base and changes mix,
/// so a change may come before the piece of the base that holds the same part, or after it. "Score of a: 7" is a
/// piece, "add 1 to a" and "rename a to b" are none.
pub trait Precopy {
    /// What one part of the state is, or that it is gone. At most 4 MiB archived.
    type Piece: Piece;
    /// How far a base has got. It must stay valid under changes: what is changed or added meanwhile is told as a change
    /// and may be left out, what is there all the time must not.
    type Cursor;

    /// Before the first piece of a base.
    fn begin(&self) -> Self::Cursor;

    /// The next piece of the base; `None` after the last.
    fn next(&self, cursor: &mut Self::Cursor) -> Option<Self::Piece>;

    /// Takes in a piece. It may replace what is there, and what it takes away may be gone already.
    fn apply(&mut self, piece: Self::Piece);

    /// Forgets everything: a base follows.
    fn clear(&mut self);
}

#[derive(Debug)]
struct Stream<C> {
    writer: LogWriter,
    /// Of the base; `None` when it is out.
    cursor: Option<C>,
    /// Written here, bytes.
    bytes: u64,
}

#[derive(Debug)]
enum Role<C> {
    /// With the stream it reads, if one has begun.
    Follower(Option<LogReader>),
    /// With the stream it writes, while somebody follows.
    Owner(Option<Stream<C>>),
}

/// Makes a [`Precopy`] type the state of a service. See the module.
#[derive(Debug)]
pub struct Precopied<P: Precopy> {
    data: P,
    config: LogConfig,
    role: Role<P::Cursor>,
    /// `data` is a state that was whole at some time, no part of a base.
    whole: bool,
    /// It owned before it followed: nobody sends it a base.
    parked: bool,
    /// In the stream so far; equal on both sides.
    records: u64,
    notices: VecDeque<SegmentNotice>,
    scratch: AlignedVec,
}

impl<P: Precopy> Precopied<P> {
    /// `data` is what the service begins with when it has no predecessor. Of the configuration, `segment_len` bounds the
    /// memory that the stream takes beside the state.
    #[must_use]
    pub fn new(data: P, config: LogConfig) -> Self {
        let config = LogConfig { spares: config.spares.max(SPARES_MIN), ..config };
        Self {
            data,
            config,
            role: Role::Follower(None),
            whole: true,
            parked: false,
            records: 0,
            notices: VecDeque::new(),
            scratch: AlignedVec::new(),
        }
    }

    #[must_use]
    pub fn get(&self) -> &P {
        &self.data
    }

    /// Changes the state. A follower learns of it with the next [`State::commit`].
    ///
    /// # Errors
    /// Nothing is changed when this process is no owner, or a follower cannot be told.
    pub fn change(&mut self, piece: P::Piece) -> Result<(), LogError> {
        match &mut self.role {
            Role::Owner(None) => {}
            Role::Owner(Some(stream)) => {
                archive(&mut self.scratch, &piece)?;
                stream.append(PIECE, &self.scratch, &mut self.notices)?;
                self.records += 1;
            }
            Role::Follower(_) => return Err(LogError::NotOwner),
        }
        self.data.apply(piece);
        Ok(())
    }

    /// Writes pieces of the base until its end, or until `until`.
    fn write_base(&mut self, until: Option<Instant>) -> Result<Preparing, LogError> {
        let Self { data, role, records, notices, scratch, .. } = self;
        let Role::Owner(Some(stream)) = role else { return Ok(Preparing::Done) };
        while let Some(cursor) = &mut stream.cursor {
            if until.is_some() && !stream.writer.spare_is_ready() {
                return Ok(Preparing::Later);
            }
            match data.next(cursor) {
                Some(piece) => {
                    archive(scratch, &piece)?;
                    stream.append(PIECE, scratch, notices)?;
                }
                None => {
                    stream.append(BASE_OUT, &[], notices)?;
                    stream.cursor = None;
                }
            }
            *records += 1;
            if until.is_some_and(|until| Instant::now() >= until) {
                return Ok(Preparing::More);
            }
        }
        Ok(Preparing::Done)
    }

    fn take(&mut self, at: RecordAt) -> Result<(), LogError> {
        let Role::Follower(Some(reader)) = &self.role else { return Err(LogError::NotFollower) };
        let at = at.position;
        let view = reader.segments().record(at).ok_or(HeapError::NoPiece { at })?;
        match view.key {
            PIECE => {
                let schema = reader.segments().get(at.segment).map_or(0, |segment| segment.header().schema);
                let piece = rkyv::from_bytes::<P::Piece, rancor::Error>(view.value);
                self.data.apply(piece.map_err(|source| LogError::Value { at, schema, source })?);
            }
            BASE_OUT => self.whole = true,
            _ => return Err(HeapError::NoPiece { at }.into()),
        }
        self.records += 1;
        Ok(())
    }

    fn stop_stream(&mut self) {
        if let Role::Owner(stream) = &mut self.role
            && let Some(stream) = stream.take()
        {
            drop_elsewhere(stream.writer);
        }
        self.notices.clear();
    }
}

impl<C> Stream<C> {
    fn append(&mut self, key: &[u8], value: &[u8], notices: &mut VecDeque<SegmentNotice>) -> Result<(), LogError> {
        let at = self.writer.append(RecordKind::Put, PIECES, key, value)?;
        self.bytes += at.len as u64;
        notices.extend(self.writer.take_new().into_iter().map(SegmentNotice::New));
        Ok(())
    }
}

fn archive<V: Piece>(scratch: &mut AlignedVec, piece: &V) -> Result<(), LogError> {
    let mut bytes = std::mem::take(scratch);
    bytes.clear();
    *scratch = rkyv::api::high::to_bytes_in::<_, rancor::Error>(piece, bytes).map_err(LogError::Archive)?;
    Ok(())
}

/// Whether a segment is the first of its stream, as far as one can tell before it is checked.
fn begins_a_stream(fd: &OwnedFd) -> bool {
    let mut bytes = [0; HEADER_LEN];
    let read = fd.try_clone().and_then(|fd| File::from(fd).read_exact_at(&mut bytes, 0));
    read.is_ok() && Header::parse(&bytes).is_ok_and(|header| header.previous_end == 0)
}

/// Everything that was read, or that followers were told of, is not needed here any more.
fn passed(first: Option<u64>, current: u64) -> std::ops::Range<u64> {
    first.unwrap_or(current)..current
}

impl<P: Precopy> State for Precopied<P> {
    fn schemas(&self) -> (Vec<u32>, u32) {
        (self.config.schemas_read.clone(), self.config.schema_written)
    }

    fn add_segment(&mut self, index: u64, fd: OwnedFd) -> Result<(), LogError> {
        let Role::Follower(reader) = &mut self.role else { return Err(LogError::NotFollower) };
        if !self.parked && begins_a_stream(&fd) {
            let mut begun = LogReader::new(self.config.clone())?;
            begun.add_segment(index, fd)?;
            *reader = Some(begun);
            self.data.clear();
            self.whole = false;
            self.records = 0;
            return Ok(());
        }
        match reader {
            Some(reader) => reader.add_segment(index, fd),
            // From the stream for somebody before us, still on its way when we came.
            None => Ok(Segment::open(fd, index, &self.config.schemas_read).map(drop)?),
        }
    }

    /// Owners of such a state retire nothing; followers let go of what they have read.
    fn retire_segment(&mut self, _index: u64) -> Result<(), LogError> {
        self.follow().map(drop)
    }

    fn follow(&mut self) -> Result<u64, LogError> {
        let mut followed = 0;
        loop {
            let Role::Follower(Some(reader)) = &mut self.role else { return Ok(followed) };
            let before = reader.position();
            let Some((at, _)) = reader.advance()? else {
                for index in passed(reader.segments().first(), reader.position().segment) {
                    reader.retire_segment(index)?;
                }
                return Ok(followed);
            };
            if let Err(error) = self.take(at) {
                // Not taken in: the next call meets the same record and the same error.
                if let Role::Follower(Some(reader)) = &mut self.role {
                    reader.rewind(before);
                }
                return Err(error);
            }
            followed += 1;
        }
    }

    fn become_owner(&mut self, commit: Option<Commit>) -> Result<(), LogError> {
        self.follow()?;
        let Role::Follower(reader) = &mut self.role else { return Ok(()) };
        if !self.whole {
            return Err(HeapError::NotWhole { what: "its base has not ended".into() }.into());
        }
        let stream = match (reader.take(), commit) {
            (Some(read), commit) => {
                let at = read.position();
                if commit.is_some_and(|commit| commit.position == at && commit.digest != self.records) {
                    *reader = Some(read);
                    return Err(LogError::Different { at });
                }
                match read.into_writer(commit.map(|commit| commit.position)) {
                    Ok(writer) => Some(Stream { writer, cursor: None, bytes: 0 }),
                    Err(refused) => {
                        let (read, error) = *refused;
                        *reader = Some(read);
                        return Err(error);
                    }
                }
            }
            (None, Some(commit)) => {
                return Err(LogError::Behind { at: LogPosition::default(), commit: commit.position });
            }
            (None, None) => None,
        };
        self.role = Role::Owner(stream);
        Ok(())
    }

    fn become_follower(&mut self) {
        if let Role::Owner(stream) = &mut self.role {
            self.role = Role::Follower(stream.take().map(|stream| stream.writer.into_reader()));
            self.parked = true;
        }
    }

    fn commit(&mut self) -> Option<Commit> {
        let position = match &mut self.role {
            Role::Follower(reader) => reader.as_ref()?.position(),
            Role::Owner(stream) => {
                let writer = &mut stream.as_mut()?.writer;
                let position = writer.commit();
                // What nobody was told of yet must still be there when they are.
                if self.notices.is_empty() {
                    for index in passed(writer.segments().first(), position.segment) {
                        // Never the last one, which is the only one that it would refuse.
                        let _ = writer.retire_segment(index);
                    }
                }
                position
            }
        };
        Some(Commit { position, digest: self.records })
    }

    fn position(&self) -> Option<LogPosition> {
        match &self.role {
            Role::Follower(reader) => reader.as_ref().map(LogReader::position),
            Role::Owner(stream) => stream.as_ref().map(|stream| stream.writer.committed()),
        }
    }

    fn take_notice(&mut self) -> Option<SegmentNotice> {
        self.notices.pop_front()
    }

    fn segment_fd(&self, index: u64) -> Option<BorrowedFd<'_>> {
        match &self.role {
            Role::Owner(Some(stream)) => stream.writer.segments().get(index).map(AsFd::as_fd),
            _ => None,
        }
    }

    fn kind(&self) -> StateKind {
        StateKind::Precopied
    }

    fn followed(&mut self, by: Followed) -> Result<(), LogError> {
        match by {
            Followed::ByNobody => self.stop_stream(),
            Followed::ByNewcomer => {
                self.stop_stream();
                self.records = 0;
                let empty = LogReader::new(self.config.clone())?;
                let writer = empty.into_writer(None).map_err(|refused| refused.1)?;
                let cursor = Some(self.data.begin());
                if let Role::Owner(stream) = &mut self.role {
                    *stream = Some(Stream { writer, cursor, bytes: 0 });
                }
            }
            Followed::ByPredecessor if matches!(self.role, Role::Owner(None)) => {
                return Err(HeapError::NoPredecessor.into());
            }
            Followed::ByPredecessor => {}
        }
        Ok(())
    }

    fn prepare(&mut self) -> Result<Preparing, LogError> {
        self.write_base(Some(Instant::now() + SLICE))
    }

    fn is_ready(&mut self) -> bool {
        match &mut self.role {
            Role::Follower(Some(reader)) => reader.spare_is_ready(),
            _ => true,
        }
    }

    fn hand_over(&mut self) -> Result<(), LogError> {
        self.write_base(None).map(drop)
    }

    fn bytes_moved(&self) -> u64 {
        match &self.role {
            Role::Owner(Some(stream)) => stream.bytes,
            _ => 0,
        }
    }
}
