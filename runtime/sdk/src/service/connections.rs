//! The connections of a service: from the owner to whoever follows, and what becomes of them when ownership moves.

use std::collections::hash_map::Entry;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use warmswap_transfer::control::ControlWord;
use warmswap_transfer::message::{CARRY_LEN_MAX, ConnectionRecord, ToSupervisor, socket_cookie, split_connections};
use warmswap_transfer::state::State;

use super::{Event, Known, Link, RESEND_PER_POLL, Role, SdkError, Service};

impl<S: State> Service<S> {
    /// What becomes of connections whose owner did not hand them over in order; see `ToService::Own`.
    pub(super) fn settle_connections(&mut self, connections_open: Option<u64>) {
        let yielded = self.yielded.take();
        let word = self.link.as_ref().map_or_else(ControlWord::default, Link::word);
        match yielded.filter(|yielded| word == yielded.word && connections_open.is_none()) {
            // Nobody served since.
            Some(yielded) => {
                for (cookie, carry) in yielded.carry {
                    if self.connections.contains_key(&cookie) {
                        self.stale_carry.insert(cookie);
                        self.events.push_back(Event::ConnectionCarry { cookie, carry });
                    }
                }
            }
            // The owner before yielded in order, with carries of its own.
            None if connections_open.is_some() || word.orderly => {}
            None => {
                for cookie in self.connections.keys().copied().collect::<Vec<_>>() {
                    self.drop_connection(cookie);
                }
            }
        }
    }

    pub(super) fn take_connections(&mut self, records: Vec<ConnectionRecord>, fds: Vec<OwnedFd>) {
        if self.role == Role::Owner {
            return; // on its way when this process became owner; the descriptors close here
        }
        let mut fds = fds.into_iter();
        for record in records {
            let fd = if record.attached { fds.next() } else { None };
            let ConnectionRecord { cookie, listener, carry, attached: _, more } = record;
            if let Some(fd) = &fd
                && socket_cookie(fd.as_fd()).ok() != Some(cookie)
            {
                self.fail(format!("the descriptor that came as connection {cookie} is another socket"));
                continue;
            }
            let mut whole = self.pieces.remove(&cookie).unwrap_or_default();
            whole.extend_from_slice(&carry);
            if more {
                self.pieces.insert(cookie, whole);
                continue;
            }
            match (self.connections.entry(cookie), fd) {
                // A duplicate of one that is here closes here.
                (Entry::Occupied(_), _) => self.events.push_back(Event::ConnectionCarry { cookie, carry: whole }),
                (Entry::Vacant(entry), Some(fd)) => {
                    entry.insert(Known { fd: fd.as_raw_fd(), listener: listener.clone() });
                    self.events.push_back(Event::ConnectionArrived { cookie, fd, listener, carry: whole });
                }
                (Entry::Vacant(_), None) => {}
            }
        }
    }

    /// Lets a connection go that ended elsewhere.
    pub(super) fn drop_connection(&mut self, cookie: u64) {
        self.pieces.remove(&cookie);
        if self.connections.remove(&cookie).is_none() {
            return;
        }
        let waiting = self
            .events
            .iter()
            .position(|event| matches!(event, Event::ConnectionArrived { cookie: arrived, .. } if *arrived == cookie));
        match waiting {
            Some(at) => drop(self.events.remove(at)),
            None => self.events.push_back(Event::ConnectionClosed { cookie }),
        }
    }

    pub(super) fn record(&self, cookie: u64, carry: &[u8], attached: bool, more: bool) -> ConnectionRecord {
        let listener = self.connections.get(&cookie).map_or_else(String::new, |known| known.listener.clone());
        ConnectionRecord { cookie, listener, carry: carry.to_vec(), attached, more }
    }

    /// A slice of the connections that a new follower does not have yet.
    pub(super) fn send_some_connections(&mut self) -> Result<(), SdkError> {
        let count = self.resend.len().min(RESEND_PER_POLL);
        let slice: Vec<u64> = self.resend.drain(..count).collect();
        self.send_connections(&slice)
    }

    /// What opened and closed since the last call.
    pub(super) fn send_changes(&mut self) -> Result<(), SdkError> {
        if !self.opened.is_empty() {
            let opened = std::mem::take(&mut self.opened);
            self.send_connections(&opened)?;
        }
        if !self.closed.is_empty() {
            for cookies in std::mem::take(&mut self.closed).chunks(CARRY_LEN_MAX / size_of::<u64>()) {
                self.outbox.push(ToSupervisor::ConnectionsClosed { cookies: cookies.to_vec() }, Vec::new());
            }
        }
        if self.outbox.is_overfull() {
            self.outbox.forget_connections();
            self.follow = false;
            self.resend.clear();
            self.fail("the control channel was full for too long; connections are not followed any more".to_owned());
        }
        Ok(())
    }

    fn send_connections(&mut self, cookies: &[u64]) -> Result<(), SdkError> {
        let (mut records, mut fds) = (Vec::new(), Vec::new());
        for cookie in cookies {
            // Closed again already, or about to be reported as closed: nobody needs to hear of it.
            let Some(known) = self.connections.get(cookie) else { continue };
            // SAFETY: the number is only used for the two calls below, in which the kernel refuses it if it is not
            // open; that it still is this connection is what the comparison of cookies says.
            let fd = unsafe { BorrowedFd::borrow_raw(known.fd) };
            if socket_cookie(fd).ok() != Some(*cookie) {
                continue;
            }
            let fd = fd
                .try_clone_to_owned()
                .map_err(|source| SdkError::System { what: "duplicate a connection", source })?;
            records.push(self.record(*cookie, &[], true, false));
            fds.push(fd);
        }
        self.push_records(&records, fds);
        Ok(())
    }

    pub(super) fn push_records(&mut self, records: &[ConnectionRecord], fds: Vec<OwnedFd>) {
        let mut fds = fds.into_iter();
        let mut begin = 0;
        for end in split_connections(records) {
            let group = records[begin..end].to_vec();
            let attached = group.iter().filter(|record| record.attached).count();
            self.outbox.push(ToSupervisor::Connections { records: group }, fds.by_ref().take(attached).collect());
            begin = end;
        }
    }
}
