//! One log and the index of what is alive in it, as owner or as follower. Knows collections by their tags and values as
//! bytes; types are [`super::types`].

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use crate::log::{LogConfig, LogError, LogReader, LogWriter, RecordAt, Segments};
use crate::message::{Commit, LogPosition};
use crate::record::{RecordKind, RecordView, Tag};
use crate::state::SegmentNotice;

use super::compaction::Compaction;
use super::index::{self, Index};
use super::types::Types;

#[derive(Debug)]
enum Role {
    Follower(LogReader),
    Owner(LogWriter),
    /// Only inside a change of role.
    Changing,
}

impl Role {
    fn segments(&self) -> &Segments {
        match self {
            Self::Follower(reader) => reader.segments(),
            Self::Owner(writer) => writer.segments(),
            Self::Changing => const { &Segments::empty() },
        }
    }
}

#[derive(Debug)]
pub(super) struct Ledger {
    role: Role,
    pub(super) index: Index,
    pub(super) compaction: Compaction,
    notices: VecDeque<SegmentNotice>,
}

impl Ledger {
    /// An empty log, as follower.
    pub(super) fn new(config: LogConfig) -> Result<Self, LogError> {
        Ok(Self {
            role: Role::Follower(LogReader::new(config)?),
            index: Index::default(),
            compaction: Compaction::default(),
            notices: VecDeque::new(),
        })
    }

    pub(super) fn config(&self) -> Option<&LogConfig> {
        match &self.role {
            Role::Follower(reader) => Some(reader.config()),
            Role::Owner(writer) => Some(writer.config()),
            Role::Changing => None,
        }
    }

    pub(super) fn segments(&self) -> &Segments {
        self.role.segments()
    }

    pub(super) fn is_owner(&self) -> bool {
        matches!(self.role, Role::Owner(_))
    }

    pub(super) fn writer(&mut self) -> Result<&mut LogWriter, LogError> {
        match &mut self.role {
            Role::Owner(writer) => Ok(writer),
            _ => Err(LogError::NotOwner),
        }
    }

    /// The living record of a key.
    pub(super) fn get(&self, place: usize, key: &[u8]) -> Option<RecordView<'_>> {
        self.index.find(self.segments(), place, key).map(|(_, view)| view)
    }

    pub(super) fn iter(&self, place: usize) -> impl Iterator<Item = RecordView<'_>> {
        let segments = self.segments();
        self.index.iter(place).filter_map(move |living| segments.record(living.position()))
    }

    /// Appends a record and takes it in; true when its key was alive before.
    pub(super) fn append(
        &mut self,
        place: usize,
        kind: RecordKind,
        key: &[u8],
        value: &[u8],
    ) -> Result<bool, LogError> {
        let tag = self.index.tag(place);
        let at = self.append_only(tag, kind, key, value)?;
        self.compaction.appended(at.len);
        Ok(self.index.take_in(self.role.segments(), place, at, (kind, key, value)))
    }

    fn append_only(&mut self, tag: Tag, kind: RecordKind, key: &[u8], value: &[u8]) -> Result<RecordAt, LogError> {
        let Role::Owner(writer) = &mut self.role else { return Err(LogError::NotOwner) };
        let at = writer.append(kind, tag, key, value)?;
        self.notices.extend(writer.take_new().into_iter().map(SegmentNotice::New));
        Ok(at)
    }

    /// Appends a living record again; returns how long it is.
    pub(super) fn copy(&mut self, at: LogPosition) -> Result<usize, LogError> {
        let Some(view) = self.segments().record(at) else { return Ok(0) };
        let (tag, key, value) = (view.tag, view.key.to_vec(), view.value.to_vec());
        let place = self.index.place_of(tag, at)?;
        let new = self.append_only(tag, RecordKind::Put, &key, &value)?;
        self.index.take_in(self.role.segments(), place, new, (RecordKind::Put, &key, &value));
        Ok(new.len)
    }

    pub(super) fn add_segment(&mut self, index: u64, fd: OwnedFd) -> Result<(), LogError> {
        match &mut self.role {
            Role::Follower(reader) => reader.add_segment(index, fd),
            _ => Err(LogError::NotFollower),
        }
    }

    /// What the owner retired; everything is followed.
    pub(super) fn let_go(&mut self, index: u64) -> Result<(), LogError> {
        if self.index.living_bytes_in(index) > 0 {
            return Err(LogError::RetiredTooEarly { index, what: "it has living records" });
        }
        match &mut self.role {
            Role::Follower(reader) => reader.retire_segment(index)?,
            _ => return Err(LogError::NotFollower),
        }
        self.index.forget_segment(index);
        Ok(())
    }

    /// Gives up a segment without living records, as owner.
    pub(super) fn retire(&mut self, index: u64) -> Result<(), LogError> {
        // Followers unmap on the notice, so what was copied out of the segment must be published before.
        self.commit();
        self.writer()?.retire_segment(index)?;
        self.index.forget_segment(index);
        self.notices.push_back(SegmentNotice::Retired(index));
        Ok(())
    }

    /// Takes in the next record of another process, after its bytes, its form and its value have been checked.
    pub(super) fn follow_one(&mut self, types: &Types) -> Result<Option<(usize, RecordAt)>, LogError> {
        let Role::Follower(reader) = &mut self.role else { return Ok(None) };
        let before = reader.position();
        let Some((at, _)) = reader.advance()? else { return Ok(None) };
        let taken = self.take_in_checked(types, at);
        if taken.is_err()
            && let Role::Follower(reader) = &mut self.role
        {
            // Not taken in: the next call meets the same record and the same error.
            reader.rewind(before);
        }
        taken.map(|place| Some((place, at)))
    }

    fn take_in_checked(&mut self, types: &Types, at: RecordAt) -> Result<usize, LogError> {
        let Self { role, index, .. } = self;
        let segments = role.segments();
        let view = segments.record(at.position).ok_or(LogError::NotOwner)?;
        index::check_form(&view, at.position)?;
        let place = index.place_of(view.tag, at.position)?;
        let schema = segments.get(at.position.segment).map_or(0, |segment| segment.header().schema);
        types.check(place, schema, &view, at.position)?;
        index.take_in(segments, place, at, (view.kind, view.key, view.value));
        Ok(place)
    }

    /// Everything there is has been followed.
    pub(super) fn become_owner(&mut self, commit: Option<Commit>) -> Result<(), LogError> {
        if let (Some(commit), Role::Follower(reader)) = (commit, &self.role)
            && commit.position == reader.position()
            && commit.digest != self.index.digest()
        {
            return Err(LogError::Different { at: commit.position });
        }
        let commit = commit.map(|commit| commit.position);
        match std::mem::replace(&mut self.role, Role::Changing) {
            Role::Follower(reader) => match reader.into_writer(commit) {
                Ok(writer) => {
                    self.role = Role::Owner(writer);
                    self.compaction = Compaction::default();
                    Ok(())
                }
                Err(refused) => {
                    let (reader, error) = *refused;
                    self.role = Role::Follower(reader);
                    Err(error)
                }
            },
            other => {
                self.role = other;
                Ok(())
            }
        }
    }

    pub(super) fn become_follower(&mut self) {
        self.role = match std::mem::replace(&mut self.role, Role::Changing) {
            Role::Owner(writer) => Role::Follower(writer.into_reader()),
            other => other,
        };
    }

    pub(super) fn commit(&mut self) -> Option<Commit> {
        let position = match &mut self.role {
            Role::Owner(writer) => writer.commit(),
            Role::Follower(reader) => reader.position(),
            Role::Changing => return None,
        };
        Some(Commit { position, digest: self.index.digest() })
    }

    pub(super) fn position(&self) -> Option<LogPosition> {
        match &self.role {
            Role::Owner(writer) => Some(writer.committed()),
            Role::Follower(reader) => Some(reader.position()),
            Role::Changing => None,
        }
    }

    pub(super) fn take_notice(&mut self) -> Option<SegmentNotice> {
        self.notices.pop_front()
    }
}
