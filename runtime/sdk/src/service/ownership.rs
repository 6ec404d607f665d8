//! Becoming owner: told by the supervisor, or by itself when there is nobody who could tell.

use std::time::Instant;

use warmswap_transfer::message::{Commit, ToSupervisor};
use warmswap_transfer::ownership::CLAIM_AFTER;
use warmswap_transfer::state::{Followed, State};

use super::{Event, Link, Role, Service, describe};

impl<S: State> Service<S> {
    /// Does what `ToService::Own` says.
    pub(super) fn own(&mut self, handover: u64, commit: Option<Commit>, connections_open: Option<u64>, follow: bool) {
        if self.role == Role::Owner {
            // Owns already: a handover was called off before it yielded, it has helped itself, or a new supervisor makes
            // sure.
            self.quiescing = None;
            self.events.retain(|event| !matches!(event, Event::Quiesce { .. }));
            if self.silenced.take() {
                // For a moment the word named somebody else, and answers were held back.
                self.begin_to_serve(handover);
            } else {
                let answer = ToSupervisor::Owned { handover, connections: self.connections.len() as u64 };
                self.outbox.push(answer, Vec::new());
            }
            return;
        }
        if self.lacks_connections(connections_open) {
            return;
        }
        if let Err(holder) = self.take_ownership() {
            self.fail(format!("g{holder} serves, so this process does not"));
            return;
        }
        if let Err(error) = self.state.become_owner(commit) {
            self.release_ownership();
            self.fail(describe(&error));
            return;
        }
        self.role = Role::Owner;
        self.named_since = None;
        self.pieces.clear();
        self.settle_connections(connections_open);
        self.follow = follow;
        self.state_followed(if follow { Followed::ByPredecessor } else { Followed::ByNobody });
        self.begin_to_serve(handover);
    }

    fn begin_to_serve(&mut self, handover: u64) {
        if let Some(link) = &self.link {
            link.shared.ownership.begin_serving();
        }
        self.serving_for = Some(handover);
        self.events.push_back(Event::BecomeOwner { handover });
    }

    /// Whom the control word names serves, whatever has become of the supervisor.
    ///
    /// One that dies in the blackout leaves a process that yielded, or was to become owner and never heard of it; nobody
    /// can change the word any more, and the next supervisor begins with the process that it names. One that is merely late
    /// may still change it, and may tell somebody else to serve: the ownership lock decides between the two.
    ///
    /// With the supervisor dead nobody else is needed any more: a follower would only keep connections open that the owner
    /// closes, and so would what an owner goes on sending to it.
    pub(super) fn outlive_supervisor(&mut self) {
        let concerned = match self.role {
            Role::Owner => self.follow,
            Role::Follower => !self.leaving,
        };
        let Some(link) = self.link.as_ref().filter(|link| concerned && !link.lost) else { return };
        let (dead, named) = (link.supervisor_is_dead(), link.is_named());
        match self.role {
            Role::Owner if dead => {
                self.follow = false;
                self.state_followed(Followed::ByNobody);
                self.resend.clear();
                self.opened.clear();
                self.closed.clear();
                self.outbox.forget_connections();
            }
            Role::Owner => {}
            Role::Follower if named => {
                let named_since = *self.named_since.get_or_insert_with(Instant::now);
                let overdue = named_since.elapsed() >= CLAIM_AFTER;
                let free = self.link.as_ref().is_some_and(|link| link.shared.ownership.holder() == 0);
                if (dead || overdue) && free && !self.state_broken {
                    let handover = self.yielded.as_ref().map_or(0, |yielded| yielded.handover);
                    // The late supervisor may still want to go back: whoever follows hears of every change.
                    self.own(handover, None, None, !dead);
                    // Said once, as with the log.
                    self.state_broken = self.role == Role::Follower;
                }
            }
            Role::Follower => {
                self.named_since = None;
                if dead {
                    self.leaving = true;
                    self.events.push_back(Event::Retire { deadline: Instant::now() });
                }
            }
        }
    }

    /// Who has it instead, if somebody has.
    fn take_ownership(&self) -> Result<(), u32> {
        let Some(link) = &self.link else { return Ok(()) };
        match link.shared.ownership.try_acquire(link.generation) {
            true => Ok(()),
            false => Err(link.shared.ownership.holder()),
        }
    }

    pub(super) fn release_ownership(&self) {
        if let Some(Link { shared, generation, .. }) = &self.link {
            shared.ownership.release(*generation);
        }
    }
}
