//! The state of a service between owner and follower: what is done for a follower ahead, and how far both are.

use warmswap_transfer::message::{StateKind, ToSupervisor};
use warmswap_transfer::state::{Followed, Preparing, State};

use super::{Role, SdkError, Service, describe};

/// Work on the state for the present follower.
#[derive(Debug, Default)]
pub(super) struct Preparation {
    /// `None`: nothing is to be done, or it could not be done.
    left: Option<Preparing>,
    /// The follower cannot take over before it is done: the owner has not caught up.
    awaited: bool,
}

impl Preparation {
    pub(super) fn is_due(&self) -> bool {
        self.left == Some(Preparing::More)
    }

    pub(super) fn waits(&self) -> bool {
        self.left == Some(Preparing::Later)
    }

    pub(super) fn is_awaited(&self) -> bool {
        self.awaited
    }
}

impl<S: State> Service<S> {
    pub(super) fn state_followed(&mut self, by: Followed) {
        // State in the shared log is there for whoever follows.
        let copies = self.copies_state();
        let left = (copies && by != Followed::ByNobody).then_some(Preparing::More);
        self.preparation = Preparation { left, awaited: copies && by == Followed::ByNewcomer };
        if let Err(error) = self.state.followed(by) {
            self.preparation.left = None;
            self.fail(describe(&error));
        }
    }

    fn copies_state(&self) -> bool {
        matches!(self.state.kind(), StateKind::Precopied | StateKind::Snapshot)
    }

    /// A slice of what is to be done ahead, and the news of it.
    pub(super) fn prepare_state(&mut self) -> Result<(), SdkError> {
        if self.role != Role::Owner || self.preparation.left.is_none() {
            return Ok(());
        }
        match self.state.prepare() {
            Ok(Preparing::Done) => self.preparation = Preparation::default(),
            Ok(left) => self.preparation.left = Some(left),
            Err(error) => {
                // Said once; who waits for it is not told that it is done.
                self.preparation.left = None;
                self.fail(describe(&error));
            }
        }
        self.commit().map(drop)
    }

    /// Says how much was copied, when that is how the state moves.
    pub(super) fn say_moved(&mut self) {
        if self.copies_state() {
            self.outbox.push(ToSupervisor::StateMoved { bytes: self.state.bytes_moved() }, Vec::new());
        }
    }

    pub(super) fn follow_log(&mut self) {
        if self.state_broken {
            return;
        }
        if let Err(error) = self.state.follow() {
            // Said once. This process can not become owner any more; its `Own` would fail with the same reason.
            self.state_broken = true;
            self.fail(describe(&error));
        }
    }

    pub(super) fn answer_caught_up(&mut self) -> Result<(), SdkError> {
        let Some((round, wanted)) = self.caught_up else { return Ok(()) };
        let commit = match self.role {
            Role::Owner => {
                if !self.resend.is_empty() || self.preparation.is_awaited() {
                    return Ok(());
                }
                self.send_changes()?;
                let commit = self.commit()?;
                self.say_moved();
                commit
            }
            Role::Follower => {
                let reached = wanted.is_none_or(|wanted| self.state.position() >= Some(wanted.position));
                if self.state_broken || !reached || !self.state.is_ready() {
                    return Ok(());
                }
                self.state.commit()
            }
        };
        self.caught_up = None;
        self.tell(ToSupervisor::CaughtUp { round, commit, connections: self.connections.len() as u64 }, Vec::new())
    }
}
