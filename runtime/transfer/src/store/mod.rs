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
//! A collection that this program does not declare belongs to another version: its records are kept alive unread, so that
//! the other version finds them when it comes back.
//!
//! Not here: values that change in place (a record can be torn, a log cannot), transactions over several commits.

mod compaction;
mod counters;
mod handle;
mod index;
mod ledger;
mod log;
mod map;
mod record;
mod types;

use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use rkyv::util::AlignedVec;

use crate::log::{LogConfig, LogError};
use crate::message::{Commit, LogPosition};
use crate::record::{RecordKind, Shape};
use crate::state::{SegmentNotice, State};

use handle::Handle;
use ledger::Ledger;
use types::Types;

pub use compaction::Statistics;
pub use counters::Counters;
pub use log::Log;
pub use map::Map;
pub use record::Record;
pub use types::{DeclareError, Value};

/// See the module.
#[derive(Debug)]
pub struct Store {
    /// Of all stores of this process, so that no collection is taken for one of another store.
    identity: u64,
    types: Types,
    main: Ledger,
    scratch: AlignedVec,
}

impl Store {
    /// An empty store, as follower: [`State::become_owner`] makes it writable.
    ///
    /// # Errors
    /// As [`LogReader::new`](crate::log::LogReader::new).
    pub fn new(config: LogConfig) -> Result<Self, LogError> {
        static STORES: AtomicU64 = AtomicU64::new(0);
        Ok(Self {
            identity: STORES.fetch_add(1, Ordering::Relaxed),
            types: Types::default(),
            main: Ledger::new(config)?,
            scratch: AlignedVec::new(),
        })
    }

    /// Declares a map.
    ///
    /// # Errors
    /// When the name is taken, or the state has arrived already.
    pub fn map<V: Value>(&mut self, name: &str) -> Result<Map<V>, DeclareError> {
        self.declare(name, Shape::Map).map(Map)
    }

    /// Declares counters.
    ///
    /// # Errors
    /// As [`Self::map`].
    pub fn counters(&mut self, name: &str) -> Result<Counters, DeclareError> {
        self.declare(name, Shape::Counters).map(Counters)
    }

    /// Declares a log.
    ///
    /// # Errors
    /// As [`Self::map`].
    pub fn log<V: Value>(&mut self, name: &str) -> Result<Log<V>, DeclareError> {
        self.declare(name, Shape::Log).map(Log)
    }

    /// Declares a single value.
    ///
    /// # Errors
    /// As [`Self::map`].
    pub fn record<V: Value>(&mut self, name: &str) -> Result<Record<V>, DeclareError> {
        self.declare(name, Shape::Record).map(Record)
    }

    fn declare<V: Value>(&mut self, name: &str, shape: Shape) -> Result<Handle<V>, DeclareError> {
        if self.main.is_owner() || self.main.segments().count() > 0 {
            // Its records may have been taken in unchecked.
            return Err(DeclareError::Late { name: name.to_owned() });
        }
        let tag = self.types.declare::<V>(name, shape)?;
        let place = self.main.index.declare(tag, Some(name.to_owned())) as u32;
        Ok(Handle { store: self.identity, place, value: PhantomData })
    }

    /// A bounded piece of compaction, for the owner: call it once per turn of the event loop. Looks at no more than
    /// four times the bytes appended since the last call, or 64 KiB.
    ///
    /// # Errors
    /// When there is no memory for the next segment; the store is whole then, only not smaller.
    pub fn maintain(&mut self) -> Result<(), LogError> {
        self.main.maintain()
    }

    #[must_use]
    pub fn statistics(&self) -> Statistics {
        self.main.statistics()
    }

    fn writable(&self) -> Result<(), LogError> {
        if self.main.is_owner() { Ok(()) } else { Err(LogError::NotOwner) }
    }

    /// True when the key was alive before.
    fn append(&mut self, place: usize, kind: RecordKind, key: &[u8], value: &[u8]) -> Result<bool, LogError> {
        self.main.append(place, kind, key, value)
    }
}

impl State for Store {
    fn schemas(&self) -> (Vec<u32>, u32) {
        self.main.config().map_or((Vec::new(), 0), |config| (config.schemas_read.clone(), config.schema_written))
    }

    fn add_segment(&mut self, index: u64, fd: OwnedFd) -> Result<(), LogError> {
        self.main.add_segment(index, fd)
    }

    fn retire_segment(&mut self, index: u64) -> Result<(), LogError> {
        self.follow()?;
        self.main.let_go(index)
    }

    fn follow(&mut self) -> Result<u64, LogError> {
        let mut followed = 0;
        while self.main.follow_one(&self.types)?.is_some() {
            followed += 1;
        }
        Ok(followed)
    }

    fn become_owner(&mut self, commit: Option<Commit>) -> Result<(), LogError> {
        self.follow()?;
        self.main.become_owner(commit)
    }

    fn become_follower(&mut self) {
        self.main.become_follower();
    }

    fn commit(&mut self) -> Option<Commit> {
        self.main.commit()
    }

    fn position(&self) -> Option<LogPosition> {
        self.main.position()
    }

    fn take_notice(&mut self) -> Option<SegmentNotice> {
        self.main.take_notice()
    }

    fn segment_fd(&self, index: u64) -> Option<BorrowedFd<'_>> {
        self.main.segments().get(index).map(AsFd::as_fd)
    }
}
