//! What the supervisor is told of the state, and when: before anything is acknowledged that it says.

use std::time::{Duration, Instant};

use warmswap_transfer::message::{Commit, ToSupervisor};
use warmswap_transfer::state::{SegmentNotice, State};

use super::{Role, SdkError, Service};

/// How long a write waits for the announcement of a new log that alone holds it: once, after a change of schema that has no
/// way back.
const ANNOUNCE_TIME_MAX: Duration = Duration::from_secs(1);

impl<S: State> Service<S> {
    /// Publishes the state changed since the last call. Before any reply about it leaves.
    ///
    /// # Errors
    /// When the conversation broke.
    pub fn commit(&mut self) -> Result<Option<Commit>, SdkError> {
        // The supervisor learns of a segment before anything in it is acknowledged.
        self.announce_all()?;
        if self.state.must_be_announced()
            && let Some(link) = self.link.as_ref().filter(|link| !link.lost)
        {
            let sent = self.outbox.flush_until(&link.channel, Instant::now() + ANNOUNCE_TIME_MAX);
            self.survive(sent.map(drop))?;
            self.announce_all()?;
        }
        Ok(self.state.commit())
    }

    /// Tells the supervisor what there is to tell of the state, and the state that it was told.
    pub(super) fn announce_all(&mut self) -> Result<(), SdkError> {
        if self.role == Role::Owner && !self.follow {
            self.state.let_followers_go();
        }
        loop {
            while let Some(notice) = self.state.take_notice() {
                self.announce(notice)?;
            }
            if !self.outbox.is_empty() || !self.state.announced() {
                return Ok(());
            }
        }
    }

    fn announce(&mut self, notice: SegmentNotice) -> Result<(), SdkError> {
        if self.link.as_ref().is_none_or(|link| link.lost) {
            return Ok(());
        }
        match notice {
            SegmentNotice::New(index) => {
                let Some(fd) = self.state.segment_fd(index) else { return Ok(()) };
                let fd = fd
                    .try_clone_to_owned()
                    .map_err(|source| SdkError::System { what: "duplicate a segment", source })?;
                self.tell(ToSupervisor::Segment { index }, vec![fd])
            }
            SegmentNotice::Retired(index) if self.outbox.forget_segment(index) => Ok(()),
            SegmentNotice::Retired(index) => self.tell(ToSupervisor::SegmentRetired { index }, Vec::new()),
        }
    }
}
