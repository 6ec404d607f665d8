//! What the SDK needs to know of a service's state to carry it through a handover.
//!
//! Implemented by [`crate::store::Store`] for state that lives in the shared log; for state that lives in a
//! program's own structures by [`crate::precopy::Precopied`] and [`crate::snapshot::Snapshotted`]; and, for services that
//! keep none, by [`NoState`]. Not for the service's own use of its state.

use std::os::fd::{BorrowedFd, OwnedFd};

use crate::log::LogError;
use crate::message::{Commit, LogPosition, StateKind};

/// Something the other process must learn about this state's segments, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SegmentNotice {
    New(u64),
    Retired(u64),
}

/// Who follows an owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Followed {
    /// Nobody, or nobody any more.
    ByNobody,
    /// A process that holds nothing yet.
    ByNewcomer,
    /// The predecessor, which holds everything up to now.
    ByPredecessor,
}

/// What is left of the work that [`State::prepare`] does for a follower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preparing {
    /// Call again as soon as clients have had their turn.
    More,
    /// Call again in a while: something is awaited.
    Later,
    Done,
}

/// State that moves with a handover. The methods with defaults are for state outside the shared log.
pub trait State {
    /// Schemas this program reads, and the one it writes.
    fn schemas(&self) -> (Vec<u32>, u32);

    /// Older schemas that this program can write as well as the one it writes: a generation that writes one of them can
    /// follow it, and take back over.
    fn schemas_written_back(&self) -> Vec<u32> {
        Vec::new()
    }

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

    /// How this state moves. Two generations hand it over only when both say the same.
    fn kind(&self) -> StateKind {
        StateKind::Resident
    }

    /// Owner: another process, or nobody, follows from now on.
    ///
    /// # Errors
    /// When what a follower needs cannot be begun; nobody can follow then.
    fn followed(&mut self, _by: Followed) -> Result<(), LogError> {
        Ok(())
    }

    /// Owner, while it is followed: a slice of what a follower must have before the owner yields, short enough to be
    /// done between two requests.
    ///
    /// # Errors
    /// When it cannot be done; nobody can follow then.
    fn prepare(&mut self) -> Result<Preparing, LogError> {
        Ok(Preparing::Done)
    }

    /// Follower: could own without waiting for memory.
    fn is_ready(&mut self) -> bool {
        true
    }

    /// Owner, which has stopped serving: whatever is missing for a successor, before the last [`Self::commit`].
    ///
    /// # Errors
    /// When no successor can take over from here; this process still can.
    fn hand_over(&mut self) -> Result<(), LogError> {
        Ok(())
    }

    /// Bytes written for the present follower; 0 for a state that is shared.
    fn bytes_moved(&self) -> u64 {
        0
    }

    /// Nobody follows this owner (any more): what is written only for the sake of a follower need not be. True as long as
    /// there is something to announce because of that.
    fn let_followers_go(&mut self) -> bool {
        false
    }

    /// Nothing may be acknowledged before every notice has left for the supervisor.
    fn must_be_announced(&self) -> bool {
        false
    }

    /// To the owner: every notice that was taken has left for the supervisor. True when there are more because of that.
    fn announced(&mut self) -> bool {
        false
    }
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

    fn kind(&self) -> StateKind {
        StateKind::None
    }
}
