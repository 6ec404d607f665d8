//! A change of schema: following a log of an older schema while its records are converted into a log of the current one,
//! keeping the older one up to date while somebody may have to go back to it, and moving on to the new one for good.
//!
//! ```text
//!  older log  (schema 1, shared)  ══▶ follow ══▶ owner: every write goes here too, through `down` ══▶ retired
//!                                      │ up                  │                                         ▲
//!  main log   (schema 2, staged)       ▼ append              ▼ append                                  │ one store
//!                                 ─────────────────────────────────▶ nobody follows: announce all ─────┴══▶ shared
//!                   SYNC, shadow      │  blackout: the last records only, VERIFY     │ COMMIT
//! ```
//!
//! Everything that depends on the size of the state happens before the blackout (conversion) or after COMMIT (announcing),
//! never in [`become_owner`](crate::state::State::become_owner). Until the one store that unstages the main log (see
//! [`segment`](crate::segment)) the older log is complete and announced; from then on the main log is. Whoever dies,
//! one of them holds every acknowledged write.
//!
//! Without a way `down` the older log can not be kept up to date, so the main log is announced before the first write is
//! acknowledged, and a generation that follows the older one can come back only if it reads the new one.
//!
//! The logs of a service are told apart by the upper half of the index of their segments; the newer one has the
//! greater. A staged log that its process did not live to announce in full is left aside.

use std::os::fd::{AsFd, OwnedFd};

use rkyv::util::AlignedVec;

use crate::log::{LogConfig, LogError};
use crate::message::LogPosition;
use crate::record::{RecordKind, RecordView};
use crate::segment::{self, Header, SegmentError};
use crate::state::SegmentNotice;

use super::Store;
use super::ledger::Ledger;
use super::types::Types;

/// Bytes converted between two pieces of compaction of the staged log.
const MAINTAIN_EVERY: usize = 64 << 10;

/// Which of a service's logs a segment belongs to.
fn log_of(segment: u64) -> u64 {
    segment >> 32
}

/// The log of an older schema that was, or still is, the state.
#[derive(Debug)]
pub(super) struct Older {
    pub(super) ledger: Ledger,
    schema: u32,
    /// What this process writes as owner can be written there too.
    written: bool,
    /// The main log is being announced.
    pub(super) moving: bool,
    /// Bytes converted since the last piece of compaction.
    converted: usize,
}

impl Store {
    /// The ledger that the other processes of the service share.
    pub(super) fn shared(&self) -> &Ledger {
        self.older.as_ref().map_or(&self.main, |older| &older.ledger)
    }

    pub(super) fn shared_mut(&mut self) -> &mut Ledger {
        self.older.as_mut().map_or(&mut self.main, |older| &mut older.ledger)
    }

    /// Takes in a segment: into the log that is followed, as the first of one that is to be followed, or aside.
    pub(super) fn place(&mut self, fd: OwnedFd, header: &Header, staged: bool) -> Result<(), LogError> {
        let (log, index) = (log_of(header.index), header.index);
        let current = self.shared().segments().first().map(log_of);
        if current == Some(log) || (current > Some(log) && !staged) {
            return self.shared_mut().add_segment(index, fd); // which says what is wrong, if anything
        }
        if staged || self.aside.range(log << 32..).next().is_some_and(|(index, _)| log_of(*index) == log) {
            self.aside.insert(index, Some(fd));
            // Two logs with the same numbers could not be told apart.
            if let Some(older) = &mut self.older
                && self.staging <= log
            {
                older.ledger.reread(&self.types);
                self.stage(log + 1)?;
            }
            // The rest of a log that became the state meanwhile.
            return if staged { Ok(()) } else { self.change_log().map(drop) };
        }
        // The first segment, or a newer log that replaced the one that was followed.
        self.begin(log, header)?;
        self.shared_mut().add_segment(index, fd)
    }

    /// If the newest log that was put aside has become the state, follows that one from its beginning. True when it does.
    pub(super) fn change_log(&mut self) -> Result<bool, LogError> {
        let current = self.shared().segments().first().map(log_of);
        let Some(log) = self.aside.last_key_value().map(|(index, _)| log_of(*index)) else { return Ok(false) };
        let oldest = self.aside.range(log << 32..).next().and_then(|(_, fd)| segment::peek(fd.as_ref()?.as_fd()));
        let Some((header, false)) = oldest.filter(|_| Some(log) > current) else { return Ok(false) };
        let segments = self.aside.split_off(&(log << 32));
        self.begin(log, &header)?;
        for (index, fd) in segments {
            if let Some(fd) = fd {
                self.shared_mut().add_segment(index, fd)?;
            }
        }
        Ok(true)
    }

    fn begin(&mut self, log: u64, header: &Header) -> Result<(), LogError> {
        let (index, schema) = (header.index, header.schema);
        if !self.config.schemas_read.contains(&schema) {
            let read = self.config.schemas_read.clone();
            return Err(SegmentError::Schema { index, schema, read }.into());
        }
        // Replaced, and its owner did not live to retire it.
        let replaced: Vec<u64> = self.shared().segments().iter().map(|segment| segment.header().index).collect();
        self.aside.extend(replaced.into_iter().map(|index| (index, None)));
        if schema == self.config.schema_written {
            self.older = None;
            return self.begin_main();
        }
        let ledger = Ledger::new(config_of(&self.config, schema), &self.types)?;
        let written = self.types.write_back(schema);
        self.older = Some(Older { ledger, schema, written, moving: false, converted: 0 });
        let newest = self.aside.last_key_value().map_or(log, |(index, _)| log_of(*index)).max(log);
        self.stage(newest + 1)
    }

    /// The main log begins again, as log number `log`.
    fn stage(&mut self, log: u64) -> Result<(), LogError> {
        self.begin_main()?;
        self.main.stage(log << 32);
        self.staging = log;
        Ok(())
    }

    /// An empty main ledger, as follower.
    fn begin_main(&mut self) -> Result<(), LogError> {
        if self.main.is_owner() || self.main.segments().count() > 0 {
            self.main = Ledger::new(config_of(&self.config, self.config.schema_written), &self.types)?;
        }
        Ok(())
    }

    /// Follows the older log and converts what it says; returns how many records that were.
    pub(super) fn follow_older(&mut self) -> Result<u64, LogError> {
        let Self { main, older, types, scratch, .. } = self;
        let Some(Older { ledger, schema, converted, .. }) = older else { return Ok(0) };
        let mut followed = 0;
        while let Some(len) =
            ledger.follow_one(types, |view, at| pass_on(types, main, scratch, (*schema, &view, at)))?
        {
            followed += 1;
            *converted += len;
            if *converted >= MAINTAIN_EVERY {
                *converted = 0;
                main.maintain()?;
            }
        }
        Ok(followed)
    }

    /// A change of the owner's, in every log that is written: in all or in none.
    pub(super) fn append(
        &mut self,
        place: usize,
        kind: RecordKind,
        key: &[u8],
        value: &[u8],
    ) -> Result<bool, LogError> {
        let Self { main, older, types, older_scratch, .. } = self;
        if let Some(Older { ledger, schema, written: true, .. }) = older {
            let older_value = match types.down(place, *schema, (kind, key, value), older_scratch) {
                None => value,
                Some(converted) => {
                    converted.map_err(|error| error.at(LogPosition::default(), *schema))?;
                    older_scratch.as_slice()
                }
            };
            main.reserve(key, value)?;
            ledger.append(place, kind, key, older_value)?;
        }
        main.append(place, kind, key, value)
    }

    /// Leaves the older log: everything in the main log is to be announced.
    pub(super) fn move_on(&mut self) {
        let Some(older) = &mut self.older else { return };
        if older.moving || !older.ledger.is_owner() {
            return;
        }
        older.moving = true;
        self.main.commit();
        self.main.forget_notices();
        self.outgoing.extend(self.main.segments().iter().map(|segment| SegmentNotice::New(segment.header().index)));
    }

    /// It was not to be: the main log is this process's own again.
    pub(super) fn stay(&mut self) {
        let Some(older) = self.older.as_mut().filter(|older| older.moving) else { return };
        older.moving = false;
        self.main.forget_notices();
        self.outgoing.retain(|notice| !matches!(notice, SegmentNotice::New(index) if log_of(*index) == self.staging));
        self.outgoing.extend(self.main.segments().iter().map(|segment| SegmentNotice::Retired(segment.header().index)));
    }

    /// Nothing may be acknowledged before the main log is announced: the older one does not hold it.
    pub(super) fn is_left_behind(&self) -> bool {
        self.older.as_ref().is_some_and(|older| older.moving && !older.written)
    }

    pub(super) fn has_notices(&self) -> bool {
        !self.outgoing.is_empty() || self.main.has_notices() || self.shared().has_notices()
    }

    /// Everybody knows all of the main log: one store makes it the state. True when the older one went.
    pub(super) fn moved(&mut self) -> bool {
        let Some(older) = self.older.take_if(|older| older.moving) else { return false };
        self.main.commit();
        let retired: Vec<u64> = older.ledger.segments().iter().map(|segment| segment.header().index).collect();
        self.main.replace(older.ledger);
        self.outgoing.extend(retired.into_iter().map(SegmentNotice::Retired));
        self.forget_aside();
        true
    }

    /// Segments of logs that never became the state are of no use to anybody any more.
    pub(super) fn forget_aside(&mut self) {
        self.outgoing.extend(std::mem::take(&mut self.aside).into_keys().map(SegmentNotice::Retired));
    }
}

impl Older {
    /// After this process became owner of the older log.
    pub(super) fn is_written(&self) -> bool {
        self.written
    }
}

/// A ledger is written in one schema and reads no other.
pub(super) fn config_of(config: &LogConfig, schema: u32) -> LogConfig {
    LogConfig { schema_written: schema, schemas_read: vec![schema], ..config.clone() }
}

/// One record of the older log into the main one.
fn pass_on(
    types: &Types,
    main: &mut Ledger,
    buffer: &mut AlignedVec,
    (schema, view, at): (u32, &RecordView<'_>, LogPosition),
) -> Result<(), LogError> {
    let place = main.index.place_of(view.tag, at)?;
    if view.kind == RecordKind::Remove && main.get(place, view.key).is_none() {
        return Ok(());
    }
    let value = match types.up(place, schema, view, buffer) {
        None => view.value,
        Some(converted) => {
            converted.map_err(|error| error.at(at, schema))?;
            buffer.as_slice()
        }
    };
    main.append(place, view.kind, view.key, value).map(drop)
}
