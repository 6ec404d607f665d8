//! What generations say, one message after the other, and to whom it goes on.
//!
//! Nothing here trusts what it reads, and nobody is read without end.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout};
use warmswap_model::{Generation, with_causes};
use warmswap_transfer::channel::ChannelError;
use warmswap_transfer::message::{
    ConnectionRecord, Message as _, PROTOCOL_VERSION, ToService, ToSupervisor, socket_cookie,
};
use warmswap_transfer::segment::{check_segment, segment_schema};

use crate::errand::Errand;
use crate::error::plain;
use crate::member::{Greeting, Member, Role};
use crate::moved::state_move;
use crate::steps::Step;
use crate::supervisor::{Notice, Supervisor, pages};

/// Most segments one service may have at a time; with the usual 16 MiB segments this is 64 GiB.
const SEGMENTS_MAX: usize = 4096;
/// Most connections of one service that a follower can hold.
const CONNECTIONS_MAX: usize = 1 << 20;
/// Most schemas one program may read.
const SCHEMAS_MAX: usize = 64;
/// Messages read of one generation before the others, and whoever waits for something else, have their turn.
const MESSAGES_AT_A_TIME: usize = 64;
/// More messages than can wait of a generation that says no more.
const MESSAGES_LEFT_MAX: usize = 8192;
/// A generation that sends this many messages that nobody understands is not listened to any more.
const GARBLED_MAX: u32 = 16;

/// Whose words on the channel of a generation count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heed {
    /// Those of its own processes.
    ItsOwn,
    /// Everybody's. It is dead: the number of its process may be another's by now, and what it said of its state last holds
    /// acknowledged writes.
    All,
}

impl Supervisor {
    /// Reads what has arrived, waiting up to `timeout` for the first. Of a generation that does not stop talking only so
    /// much that the caller gets to look at its clock.
    pub(crate) fn pump(&mut self, timeout: Duration, wake: Option<BorrowedFd<'_>>) {
        self.pump_from(timeout, wake, false);
    }

    /// Also what programs say by the conventions of systemd, which nobody waits for in a blackout.
    pub(crate) fn pump_and_hear(&mut self, timeout: Duration, wake: Option<BorrowedFd<'_>>) {
        self.pump_from(timeout, wake, true);
        self.hear_all();
    }

    fn pump_from(&mut self, timeout: Duration, wake: Option<BorrowedFd<'_>>, hear: bool) {
        let generations: Vec<Generation> =
            self.members.iter().filter(|(_, member)| !member.closed).map(|(generation, _)| *generation).collect();
        let shut: Vec<usize> = {
            let mut polled: Vec<PollFd<'_>> = generations
                .iter()
                .filter_map(|generation| self.members.get(generation))
                .map(|member| PollFd::new(member.channel.as_fd(), PollFlags::POLLIN))
                .collect();
            polled.extend(wake.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
            let spoken = self.members.values().filter(|_| hear).filter_map(|member| member.spoken.socket());
            polled.extend(spoken.map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)));
            let others = polled.len();
            // Not for connections, which are none of ours: that one is shut down is always told.
            polled.extend(self.watched_listeners().map(|(_, fd)| PollFd::new(fd, PollFlags::empty())));
            // Rounded up, or the last millisecond of a wait would spin.
            let ms = timeout.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32;
            let _ = nix::poll::poll(&mut polled, PollTimeout::try_from(ms).unwrap_or(PollTimeout::MAX));
            let hung_up = |polled: &PollFd<'_>| polled.revents().is_some_and(|seen| seen.contains(PollFlags::POLLHUP));
            let listeners = self.watched_listeners().zip(&polled[others..]);
            listeners.filter(|(_, polled)| hung_up(polled)).map(|((at, _), _)| at).collect()
        };
        shut.into_iter().for_each(|at| self.reopen_listener(at));
        for generation in generations {
            self.read_some(generation, MESSAGES_AT_A_TIME, Heed::ItsOwn);
        }
    }

    /// Everything that a generation has left to say which is dead.
    pub(crate) fn read_rest(&mut self, generation: Generation) {
        self.read_some(generation, MESSAGES_LEFT_MAX, Heed::All);
    }

    fn read_some(&mut self, generation: Generation, count: usize, heed: Heed) {
        for _ in 0..count {
            if !self.read_one(generation, heed) {
                return;
            }
            // Only now: an agent that dies while it deals with a message leaves it to the next one. What an owner says of a
            // segment it says once.
            if let Some(member) = self.members.get_mut(&generation) {
                member.channel.consume();
            }
        }
    }

    /// Deals with the next message of a generation; false when there is none.
    fn read_one(&mut self, generation: Generation, heed: Heed) -> bool {
        let Some(member) = self.members.get_mut(&generation).filter(|member| !member.closed) else { return false };
        let heard = member.channel.try_peek();
        if heed == Heed::ItsOwn
            && heard.as_ref().map_or_else(ChannelError::is_of_one_message, Option::is_some)
            && let Some(stranger) = member.channel.sender().filter(|sender| member.is_stranger(&*self.backend, *sender))
        {
            self.note(
                generation,
                &format!("is not heard by the mouth of process {stranger}, which is none of its own"),
            );
            return true;
        }
        match heard {
            Ok(None) => false,
            Ok(Some((message, fds))) => {
                self.route(generation, message, fds);
                true
            }
            Err(error @ ChannelError::DescriptorsLost { connections: true, .. }) => {
                // Who follows lacks them now; a later one may not. The generation serves on either way.
                self.members.values_mut().filter(|m| m.follows()).for_each(|m| m.informed = false);
                let what = format!("sent connections that the agent could not take: {}", with_causes(&error));
                self.notices.push_back((generation, Notice::Failed { what }));
                true
            }
            Err(error) if error.is_of_one_message() && member.garbled < GARBLED_MAX => {
                member.garbled += 1;
                let what = format!("sent what is no message: {}", with_causes(&error));
                tracing::warn!("{generation} of {} {what}", self.record.file.name);
                self.notices.push_back((generation, Notice::Failed { what }));
                true
            }
            Err(error) => {
                member.closed = true;
                // Nothing but a lack of ours is worth another agent's try.
                if !matches!(error, ChannelError::DescriptorsLost { .. } | ChannelError::System { .. }) {
                    member.channel.hang_up();
                }
                if !matches!(error, ChannelError::Closed) {
                    let what = format!("broke the control protocol: {}", with_causes(&error));
                    tracing::warn!("{generation} of {} {what}", self.record.file.name);
                    if member.role == Role::Owner {
                        self.last_trouble = Some(format!("{generation} {what}; it cannot be updated any more"));
                    }
                    self.notices.push_back((generation, Notice::Failed { what }));
                }
                self.notices.push_back((generation, Notice::Closed));
                false
            }
        }
    }

    fn route(&mut self, from: Generation, message: ToSupervisor, fds: Vec<OwnedFd>) {
        self.steps.take(Step::Hear(from, message.name()));
        if let Some(member) = self.members.get_mut(&from) {
            member.spoken.begin_watch();
        }
        let notice = match message {
            ToSupervisor::Hello { protocol, schemas_read, schema_written, schemas_written_back, state, .. } => {
                let state = state_move(state);
                self.welcome(from, protocol, Greeting { schemas_read, schema_written, schemas_written_back, state })
            }
            ToSupervisor::Ready => {
                if let Some(member) = self.members.get_mut(&from) {
                    member.ready = true;
                }
                Some(Notice::Ready)
            }
            // Only the owner has anything to say about state and connections; whoever else tries is not heard.
            ToSupervisor::Segment { index } if self.speaks_for_service(from) && self.copies_state(from) => {
                self.pass_segment(index, &fds);
                None
            }
            ToSupervisor::Segment { index } if self.speaks_for_service(from) => self.keep_segment(from, index, fds),
            ToSupervisor::StateMoved { bytes } if self.speaks_for_service(from) => {
                self.state_moved = bytes;
                None
            }
            ToSupervisor::SegmentRetired { index } if self.speaks_for_service(from) => {
                self.drop_segment(index);
                None
            }
            ToSupervisor::Connections { records } if self.speaks_for_service(from) => {
                self.forward_connections(records, &fds)
            }
            ToSupervisor::ConnectionsClosed { cookies } if self.speaks_for_service(from) => {
                for cookie in &cookies {
                    self.connections.remove(cookie);
                }
                self.forward(&ToService::ConnectionsClosed { cookies }, &[]);
                None
            }
            ToSupervisor::Segment { .. }
            | ToSupervisor::SegmentRetired { .. }
            | ToSupervisor::StateMoved { .. }
            | ToSupervisor::Connections { .. }
            | ToSupervisor::ConnectionsClosed { .. } => {
                self.note(from, "is not the owner; what it says of state and connections is not heard");
                None
            }
            ToSupervisor::CaughtUp { round, commit, connections } => {
                Some(Notice::CaughtUp { round, commit, connections })
            }
            ToSupervisor::Yielded { handover, commit, connections_open } => {
                Some(Notice::Yielded { handover, commit, connections_open })
            }
            ToSupervisor::Owned { handover, connections } => Some(Notice::Owned { handover, connections }),
            ToSupervisor::Drained => None, // its exit follows, and that is what counts
            ToSupervisor::Failed { what } => {
                // A follower that could not follow lacks something of what an owner needs.
                if let Some(member) = self.members.get_mut(&from).filter(|member| member.follows()) {
                    member.informed = false;
                }
                Some(Notice::Failed { what: plain(&what) })
            }
        };
        if let Some(notice) = notice {
            self.notices.push_back((from, notice));
        }
    }

    /// Once for each generation: one that means harm could fill the log.
    fn note(&mut self, generation: Generation, what: &str) {
        if let Some(member) = self.members.get_mut(&generation)
            && !std::mem::replace(&mut member.noted, true)
        {
            tracing::warn!("{generation} of {} {what}", self.record.file.name);
        }
    }

    /// The owner, or the generation that the control word has just made owner.
    fn speaks_for_service(&self, from: Generation) -> bool {
        self.control.load().owner == from.0
    }

    fn welcome(&mut self, from: Generation, protocol: u32, greeting: Greeting) -> Option<Notice> {
        if protocol != PROTOCOL_VERSION {
            let what = format!("speaks version {protocol} of the control protocol, this agent {PROTOCOL_VERSION}");
            return Some(Notice::Failed { what });
        }
        if greeting.schemas_read.len() > SCHEMAS_MAX {
            let what = format!("reads {} schemas, more than {SCHEMAS_MAX}", greeting.schemas_read.len());
            return Some(Notice::Failed { what });
        }
        let service = self.record.file.name.to_string();
        let message = ToService::Welcome { service, generation: from.0, owner: false };
        let member = self.members.get_mut(&from)?;
        if member.greeting.is_some() {
            return Some(Notice::Failed { what: "greeted a second time".to_owned() });
        }
        member.greeting = Some(greeting);
        let (reader, writer) = match std::io::pipe() {
            Ok(pipe) => pipe,
            Err(error) => return Some(Notice::Failed { what: format!("cannot be given a lifeline: {error}") }),
        };
        member.lifeline = Some(writer);
        if let Err(error) = member.channel.send(&message, &pages(&self.control, &self.ownership, &reader)) {
            return Some(Notice::Failed { what: with_causes(&error) });
        }
        // It took so long to join that it was made owner as a program that does not know us.
        if self.owner() == Some(from) && self.speaks_for_service(from) {
            let told = self.send_segments(from).and_then(|_| self.tell_own(from, 0, None, None, false));
            return told.err().map(|stop| Notice::Failed { what: stop.reason });
        }
        None
    }

    fn keep_segment(&mut self, from: Generation, index: u64, fds: Vec<OwnedFd>) -> Option<Notice> {
        let fd = fds.into_iter().next()?;
        if let Err(error) = check_segment(fd.as_fd(), index) {
            let what = format!("sent no segment of state: {}", with_causes(&error));
            self.note(from, &what);
            return Some(Notice::Failed { what });
        }
        if self.segments.len() >= SEGMENTS_MAX {
            return Some(Notice::Failed { what: format!("has more than {SEGMENTS_MAX} segments of state") });
        }
        self.leave_behind(segment_schema(fd.as_fd()));
        self.forward(&ToService::Segment { index }, &[fd.as_fd()]);
        self.segments.insert(index, fd);
        let keepers = self.members.values().filter(|member| member.role != Role::Draining);
        for generation in keepers.map(|member| member.id.generation).collect::<Vec<_>>() {
            self.run_errand(Errand::Keep(generation, index));
        }
        None
    }

    fn drop_segment(&mut self, index: u64) {
        self.segments.remove(&index);
        self.forward(&ToService::SegmentRetired { index }, &[]);
        for generation in self.members.keys().copied().collect::<Vec<_>>() {
            self.run_errand(Errand::Drop(generation, index));
        }
    }

    /// Passes connections on to the followers, after comparing each with its own descriptor. The supervisor's
    /// duplicates close when `fds` is dropped, or a client would never see the end of its connection.
    fn forward_connections(&mut self, records: Vec<ConnectionRecord>, fds: &[OwnedFd]) -> Option<Notice> {
        if !self.members.values().any(Member::follows) {
            return None; // said to a follower that has gone meanwhile
        }
        if self.connections.len() > CONNECTIONS_MAX {
            return Some(Notice::Failed { what: format!("has more than {CONNECTIONS_MAX} connections") });
        }
        let attached = records.iter().filter(|record| record.attached);
        for (record, fd) in attached.zip(fds) {
            match socket_cookie(fd.as_fd()) {
                Ok(cookie) if cookie == record.cookie => {
                    self.connections.insert(cookie);
                }
                other => {
                    let what = format!("sent a descriptor with cookie {other:?} for connection {}", record.cookie);
                    return Some(Notice::Failed { what });
                }
            }
        }
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        self.forward(&ToService::Connections { records }, &borrowed);
        None
    }

    pub(crate) fn forward(&mut self, message: &ToService, fds: &[BorrowedFd<'_>]) {
        for member in self.members.values_mut().filter(|member| member.follows()) {
            self.steps.take(Step::Tell(member.id.generation, message.name()));
            if let Err(error) = member.channel.send(message, fds) {
                let notice = match error {
                    ChannelError::Closed => Notice::Closed,
                    error => {
                        member.informed = false;
                        let what = format!("cannot be told what the owner does: {}", with_causes(&error));
                        Notice::Failed { what }
                    }
                };
                self.notices.push_back((member.id.generation, notice));
            }
        }
    }
}
