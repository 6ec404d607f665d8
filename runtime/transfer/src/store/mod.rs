//! The state of a service: any number of named, typed collections in one shared log.
//!
//! ```
//! # use warmswap_transfer::{log::LogConfig, state::State, store::Store};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut store = Store::new(LogConfig::new(1))?;
//! let names = store.map::<String>("names")?;
//! let visits = store.counters("visits")?;
//! let events = store.log::<(u64, String)>("events")?;
//! let settings = store.record::<Vec<u16>>("settings")?;
//! // A service joins now; `become_owner` comes from the supervisor.
//! store.become_owner(None)?;
//! names.insert(&mut store, b"7", &"Ada".to_owned())?;
//! assert_eq!(visits.add(&mut store, b"7", 1)?, 1);
//! assert_eq!(events.append(&mut store, &(7, "came".to_owned()))?, 0);
//! settings.set(&mut store, &vec![80, 443])?;
//! store.commit();
//! assert_eq!(names.get(&store, b"7").map(|name| name.as_str()), Some("Ada"));
//! # Ok(())
//! # }
//! ```
//!
//! Values are read where they lie, whoever wrote them. Every change is one record in the log, so whatever happens to the
//! writer, everything up to a [`State::commit`] is there and nothing after it; the owner commits before it acknowledges.
//! Each process keeps an index of its own ([`index`]), which costs 16 bytes and a hash per living record.
//! [`Store::maintain`] keeps the memory bounded under endless overwrites.
//!
//! When the types of values change, the new version has a new schema number and says with an [`Evolution`] for each
//! collection how old values become new ones and, if it can, how new ones become old: see [`older`] for what happens then.
//!
//! A collection that this program does not declare belongs to another version: its records are kept alive unread, so that
//! the other version finds them when it comes back.
//!
//! Not here: values that change in place (a record can be torn, a log cannot), transactions over several commits.

mod compaction;
mod counters;
mod evolution;
mod handle;
mod index;
mod ledger;
mod log;
mod map;
mod older;
mod record;
mod types;

use std::collections::{BTreeMap, VecDeque};
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use rkyv::util::AlignedVec;

use crate::log::{LogConfig, LogError};
use crate::message::{Commit, LogPosition};
use crate::record::Shape;
use crate::segment;
use crate::state::{SegmentNotice, State};

use handle::Handle;
use ledger::Ledger;
use older::{Older, config_of};
use types::Types;

pub use compaction::Statistics;
pub use counters::Counters;
pub use evolution::Evolution;
pub use log::Log;
pub use map::Map;
pub use record::Record;
pub use types::{DeclareError, Value};

/// See the module.
#[derive(Debug)]
pub struct Store {
    /// Of all stores of this process, so that no collection is taken for one of another store.
    identity: u64,
    config: LogConfig,
    types: Types,
    /// What is read. In the current schema, and this process's own as long as there is an older log.
    main: Ledger,
    older: Option<Older>,
    /// Number of the log that is staged in `main`.
    staging: u64,
    /// Segments that are not part of the state: of a log that was staged and not finished, or replaced and not retired.
    aside: BTreeMap<u64, Option<OwnedFd>>,
    /// News that comes before that of the ledgers.
    outgoing: VecDeque<SegmentNotice>,
    scratch: AlignedVec,
    older_scratch: AlignedVec,
}

impl Store {
    /// An empty store, as follower: [`State::become_owner`] makes it writable.
    ///
    /// # Errors
    /// As [`LogReader::new`](crate::log::LogReader::new).
    pub fn new(config: LogConfig) -> Result<Self, LogError> {
        static STORES: AtomicU64 = AtomicU64::new(0);
        config.check()?;
        let types = Types::default();
        Ok(Self {
            identity: STORES.fetch_add(1, Ordering::Relaxed),
            main: Ledger::new(config_of(&config, config.schema_written), &types)?,
            config,
            types,
            older: None,
            staging: 0,
            aside: BTreeMap::new(),
            outgoing: VecDeque::new(),
            scratch: AlignedVec::new(),
            older_scratch: AlignedVec::new(),
        })
    }

    /// Declares a map whose values have the same type in every schema that is read.
    ///
    /// # Errors
    /// When the name is taken, or the state has arrived already.
    pub fn map<V: Value>(&mut self, name: &str) -> Result<Map<V>, DeclareError> {
        self.map_evolved(name, Evolution::new())
    }

    /// Declares a map whose values had other types in older schemas.
    ///
    /// # Errors
    /// As [`Self::map`], and when `evolution` names a schema that is not read.
    pub fn map_evolved<V: Value>(&mut self, name: &str, evolution: Evolution<V>) -> Result<Map<V>, DeclareError> {
        self.declare(name, Shape::Map, evolution).map(Map)
    }

    /// Declares counters.
    ///
    /// # Errors
    /// As [`Self::map`].
    pub fn counters(&mut self, name: &str) -> Result<Counters, DeclareError> {
        self.declare(name, Shape::Counters, Evolution::new()).map(Counters)
    }

    /// Declares a log.
    ///
    /// # Errors
    /// As [`Self::map`].
    pub fn log<V: Value>(&mut self, name: &str) -> Result<Log<V>, DeclareError> {
        self.log_evolved(name, Evolution::new())
    }

    /// Declares a log whose values had other types in older schemas.
    ///
    /// # Errors
    /// As [`Self::map_evolved`].
    pub fn log_evolved<V: Value>(&mut self, name: &str, evolution: Evolution<V>) -> Result<Log<V>, DeclareError> {
        self.declare(name, Shape::Log, evolution).map(Log)
    }

    /// Declares a single value.
    ///
    /// # Errors
    /// As [`Self::map`].
    pub fn record<V: Value>(&mut self, name: &str) -> Result<Record<V>, DeclareError> {
        self.record_evolved(name, Evolution::new())
    }

    /// Declares a single value that had other types in older schemas.
    ///
    /// # Errors
    /// As [`Self::map_evolved`].
    pub fn record_evolved<V: Value>(&mut self, name: &str, evolution: Evolution<V>) -> Result<Record<V>, DeclareError> {
        self.declare(name, Shape::Record, evolution).map(Record)
    }

    fn declare<V: Value>(
        &mut self,
        name: &str,
        shape: Shape,
        evolution: Evolution<V>,
    ) -> Result<Handle<V>, DeclareError> {
        if self.main.is_owner() || self.shared().segments().count() > 0 {
            // Its records may have been taken in unchecked.
            return Err(DeclareError::Late { name: name.to_owned() });
        }
        let tag = self.types.declare::<V>(name, shape, evolution, &self.config)?;
        let place = self.main.index.declare(tag, Some(name.to_owned())) as u32;
        Ok(Handle { store: self.identity, place, value: PhantomData })
    }

    /// A bounded piece of compaction, for the owner: call it once per turn of the event loop. Looks at no more than
    /// four times the bytes appended since the last call, or 64 KiB.
    ///
    /// # Errors
    /// When there is no memory for the next segment; the store is whole then, only not smaller.
    pub fn maintain(&mut self) -> Result<(), LogError> {
        match &mut self.older {
            Some(older) if older.ledger.is_owner() => {
                if older.is_written() {
                    older.ledger.maintain()?;
                }
                self.main.maintain()
            }
            // The main log is kept compact as it is converted.
            Some(_) => Ok(()),
            None => self.main.maintain(),
        }
    }

    #[must_use]
    pub fn statistics(&self) -> Statistics {
        let mut statistics = self.main.statistics();
        if let Some(older) = &self.older {
            statistics.segments += older.ledger.segments().count();
            statistics.segment_bytes += older.ledger.segments().bytes();
        }
        statistics
    }

    fn writable(&self) -> Result<(), LogError> {
        if self.shared().is_owner() { Ok(()) } else { Err(LogError::NotOwner) }
    }
}

impl State for Store {
    fn schemas(&self) -> (Vec<u32>, u32) {
        (self.config.schemas_read.clone(), self.config.schema_written)
    }

    fn schemas_written_back(&self) -> Vec<u32> {
        let older = self.config.schemas_read.iter().filter(|schema| **schema != self.config.schema_written);
        older.copied().filter(|schema| self.types.write_back(*schema)).collect()
    }

    fn add_segment(&mut self, index: u64, fd: OwnedFd) -> Result<(), LogError> {
        self.writable().map_or(Ok(()), |()| Err(LogError::NotFollower))?;
        match segment::peek(fd.as_fd()) {
            Some((header, staged)) if header.index == index => self.place(fd, &header, staged),
            // Opening it says what is wrong with it.
            _ => self.main.add_segment(index, fd),
        }
    }

    fn retire_segment(&mut self, index: u64) -> Result<(), LogError> {
        self.follow()?;
        if self.aside.remove(&index).is_some() {
            return Ok(());
        }
        // Why else would a whole log be retired?
        if self.change_log()? {
            self.aside.remove(&index);
            return Ok(());
        }
        self.shared_mut().let_go(index)
    }

    fn follow(&mut self) -> Result<u64, LogError> {
        if self.older.is_some() {
            return self.follow_older();
        }
        let mut followed = 0;
        while self.main.follow_one(&self.types, |_, _| Ok(()))?.is_some() {
            followed += 1;
        }
        Ok(followed)
    }

    fn become_owner(&mut self, commit: Option<Commit>) -> Result<(), LogError> {
        self.follow()?;
        if self.shared().segments().count() == 0 && self.aside.values().any(Option::is_some) {
            return Err(LogError::Unfinished);
        }
        self.shared_mut().become_owner(commit)?;
        match &self.older {
            Some(older) if !older.is_written() => self.move_on(),
            Some(_) => {}
            None => self.forget_aside(),
        }
        Ok(())
    }

    fn become_follower(&mut self) {
        // What was acknowledged is in the main log alone. It reaches everybody before they hear that this process yielded.
        if self.is_left_behind() {
            self.moved();
        } else {
            self.stay();
        }
        self.shared_mut().become_follower();
    }

    fn commit(&mut self) -> Option<Commit> {
        if self.older.as_ref().is_some_and(|older| older.ledger.is_owner()) {
            self.main.commit();
        }
        self.shared_mut().commit()
    }

    fn position(&self) -> Option<LogPosition> {
        self.shared().position()
    }

    fn take_notice(&mut self) -> Option<SegmentNotice> {
        self.outgoing.pop_front().or_else(|| match &mut self.older {
            None => self.main.take_notice(),
            Some(older) => {
                let private = !older.moving;
                if private {
                    self.main.forget_notices();
                }
                older.ledger.take_notice().or_else(|| self.main.take_notice())
            }
        })
    }

    fn segment_fd(&self, index: u64) -> Option<BorrowedFd<'_>> {
        let older = self.older.as_ref().and_then(|older| older.ledger.segments().get(index));
        older.or_else(|| self.main.segments().get(index)).map(AsFd::as_fd)
    }

    fn let_followers_go(&mut self) -> bool {
        self.move_on();
        self.older.is_some()
    }

    fn must_be_announced(&self) -> bool {
        self.is_left_behind()
    }

    fn announced(&mut self) -> bool {
        !self.has_notices() && self.moved()
    }
}
