//! What the SDK needs to know of a service's state to carry it through a handover.
//!
//! Implemented by [`crate::store::Store`] and, for services that keep none, by [`NoState`]. Not for the service's own
//! use of its state.

use std::os::fd::{BorrowedFd, OwnedFd};

use crate::log::LogError;
use crate::message::{Commit, LogPosition};

/// Something the other process must learn about this state's segments, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SegmentNotice {
    New(u64),
    Retired(u64),
}

/// State in a shared log.
pub trait State {
    /// Schemas this program reads, and the one it writes.
    fn schemas(&self) -> (Vec<u32>, u32);

    /// A segment arrived.
    ///
    /// # Errors
    /// When it is refused; the state stays as it was.
    fn add_segment(&mut self, index: u64, fd: OwnedFd) -> Result<(), LogError>;

    /// The owner retired a segment: follow, then let go of it.
    ///
    /// # Errors
    /// When it still holds something alive.
    fn retire_segment(&mut self, index: u64) -> Result<(), LogError>;

    /// Reads everything that is committed; returns how many records that were.
    ///
    /// # Errors
    /// When the log is damaged.
    fn follow(&mut self) -> Result<u64, LogError>;

    /// From follower to owner; `commit` as in `ToService::Own`.
    ///
    /// # Errors
    /// When `commit` is not reached or something else is alive here than there; stays follower.
    fn become_owner(&mut self, commit: Option<Commit>) -> Result<(), LogError>;

    /// From owner to follower. Nothing to do for a follower.
    fn become_follower(&mut self);

    /// Publishes everything appended (owner) and says what there is; `None` for a state without a log.
    fn commit(&mut self) -> Option<Commit>;

    /// Where this view of the log ends; `None` for a state without a log.
    fn position(&self) -> Option<LogPosition>;

    /// The next notice for the supervisor.
    fn take_notice(&mut self) -> Option<SegmentNotice>;

    /// The descriptor of a segment that [`Self::take_notice`] named as new; `None` when it was retired since.
    fn segment_fd(&self, index: u64) -> Option<BorrowedFd<'_>>;
}

/// For services whose connections move but that keep nothing else.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoState;

impl State for NoState {
    fn schemas(&self) -> (Vec<u32>, u32) {
        (vec![0], 0)
    }

    fn add_segment(&mut self, _index: u64, _fd: OwnedFd) -> Result<(), LogError> {
        Ok(())
    }

    fn retire_segment(&mut self, _index: u64) -> Result<(), LogError> {
        Ok(())
    }

    fn follow(&mut self) -> Result<u64, LogError> {
        Ok(0)
    }

    fn become_owner(&mut self, _commit: Option<Commit>) -> Result<(), LogError> {
        Ok(())
    }

    fn become_follower(&mut self) {}

    fn commit(&mut self) -> Option<Commit> {
        None
    }

    fn position(&self) -> Option<LogPosition> {
        None
    }

    fn take_notice(&mut self) -> Option<SegmentNotice> {
        None
    }

    fn segment_fd(&self, _index: u64) -> Option<BorrowedFd<'_>> {
        None
    }
}
