//! The connections of a service: from the owner to whoever follows, and what becomes of them when ownership moves.

use std::collections::hash_map::Entry;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use warmswap_transfer::channel::files_max;
use warmswap_transfer::control::ControlWord;
use warmswap_transfer::message::{CARRY_LEN_MAX, ConnectionRecord, ToSupervisor, socket_cookie, split_connections};
use warmswap_transfer::state::State;

use super::{Event, Known, Link, RESEND_PER_POLL, Role, SdkError, Service, Yielded};

/// A follower that has fewer descriptors left than this, with all connections there are, could not take those that come in
/// the blackout. It says so while the owner still serves.
const DESCRIPTORS_LEFT_MIN: u64 = 64;

impl<S: State> Service<S> {
    /// What becomes of connections whose owner did not hand them over in order; see `ToService::Own`.
    pub(super) fn settle_connections(&mut self, connections_open: Option<u64>) {
        let yielded = self.yielded.take();
        let word = self.link.as_ref().map_or_else(ControlWord::default, Link::word);
        let servings = self.link.as_ref().map(|link| link.shared.ownership.servings());
        let untouched = |yielded: &Yielded| yielded.servings == servings || yielded.word == word;
        match yielded.filter(|yielded| untouched(yielded) && connections_open.is_none()) {
            // Nobody served since, whoever was to.
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
        // The kernel gives the lowest number that is free.
        let highest = fds.iter().map(AsRawFd::as_raw_fd).max().map_or(0, i32::unsigned_abs);
        if u64::from(highest) + DESCRIPTORS_LEFT_MIN >= files_max() {
            self.fail(format!(
                "{} connections leave fewer than {DESCRIPTORS_LEFT_MIN} of the {} files that this process may have open \
                 (RLIMIT_NOFILE)",
                self.connections.len() + fds.len(),
                files_max()
            ));
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

    /// Whatever a follower has not been told of.
    pub(super) fn send_all_connections(&mut self, deadline: Instant) -> Result<(), SdkError> {
        self.send_changes()?;
        while !self.resend.is_empty() {
            let before = self.resend.len();
            self.send_some_connections()?;
            // Too few descriptors for more duplicates: room comes when those that wait have left.
            if self.resend.len() >= before && !self.flush_until(deadline)? {
                break;
            }
        }
        Ok(())
    }

    /// False when the supervisor did not read everything in time.
    pub(super) fn flush_until(&mut self, deadline: Instant) -> Result<bool, SdkError> {
        let Some(link) = self.link.as_ref() else { return Ok(true) };
        let sent = self.outbox.flush_until(&link.channel, deadline);
        let all = matches!(sent, Ok(true));
        self.survive(sent.map(drop)).map(|()| all)
    }

    /// Says so when this process has fewer connections than its predecessor: those that are missing would hang, because
    /// nobody would read from them.
    pub(super) fn lacks_connections(&mut self, connections_open: Option<u64>) -> bool {
        let held = self.connections.len() as u64;
        let missing = connections_open.filter(|open| *open > held);
        if let Some(open) = missing {
            self.fail(format!("has {held} of {open} connections"));
        }
        missing.is_some()
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
            self.stop_sending("the control channel was full for too long");
        }
        Ok(())
    }

    /// No follower will have all connections: the handover that needed it is called off.
    fn stop_sending(&mut self, why: &str) {
        self.outbox.forget_connections();
        self.follow = false;
        self.resend.clear();
        self.fail(format!("{why}; connections are not followed any more"));
    }

    fn send_connections(&mut self, cookies: &[u64]) -> Result<(), SdkError> {
        let (mut records, mut fds) = (Vec::new(), Vec::new());
        let mut short_of_descriptors = None;
        for (at, cookie) in cookies.iter().enumerate() {
            // Closed again already, or about to be reported as closed: nobody needs to hear of it.
            let Some(known) = self.connections.get(cookie) else { continue };
            // SAFETY: the number is only used for the two calls below, in which the kernel refuses it if it is not
            // open; that it still is this connection is what the comparison of cookies says.
            let fd = unsafe { BorrowedFd::borrow_raw(known.fd) };
            if socket_cookie(fd).ok() != Some(*cookie) {
                continue;
            }
            let fd = match fd.try_clone_to_owned() {
                Ok(fd) => fd,
                Err(source) if is_shortage(&source) => {
                    short_of_descriptors = Some((at, source));
                    break;
                }
                Err(source) => return Err(SdkError::System { what: "duplicate a connection", source }),
            };
            records.push(self.record(*cookie, &[], true, false));
            fds.push(fd);
        }
        self.push_records(&records, fds);
        match short_of_descriptors {
            // Nothing waits to be sent, so nothing will become free by that.
            Some((_, source)) if self.outbox.is_empty() => {
                self.stop_sending(&format!("no descriptor is left to send a connection with: {source}"));
            }
            // Duplicates that wait are descriptors too: the rest goes when they have left.
            Some((at, _)) => cookies[at..].iter().rev().for_each(|cookie| self.resend.push_front(*cookie)),
            None => {}
        }
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

/// Too many open files, of this process or of the host.
fn is_shortage(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}
