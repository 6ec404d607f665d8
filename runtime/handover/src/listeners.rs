//! Listeners outlive whoever accepts from them.
//!
//! Every generation has them as descriptors of the same sockets, so `close` by one means nothing to the others. But one that
//! calls `shutdown`, as programs do that believe to be alone when they are told to finish, closes a socket for all. A TCP
//! listener can listen again at once; clients that were in its queue have been refused. Other sockets stay as they are.

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::time::{Duration, Instant};

use nix::sys::socket::{
    Backlog, SockType, SockaddrIn, SockaddrIn6, SockaddrStorage, getsockname, getsockopt, listen, sockopt,
};
use warmswap_backend::ServiceGround;

use crate::supervisor::Supervisor;

/// So often one is opened again: whoever shuts it down without end gets no more of this thread's time.
const REOPEN_INTERVAL: Duration = Duration::from_secs(1);

/// The TCP listeners of a service, by their places in its ground, and when each was opened again.
#[derive(Debug)]
pub(crate) struct TcpListeners(BTreeMap<usize, Option<Instant>>);

impl TcpListeners {
    pub(crate) fn of(ground: &ServiceGround) -> Self {
        let listeners = ground.listeners.iter().enumerate();
        Self(listeners.filter(|(_, l)| tcp_port(l.fd.as_fd()).is_some()).map(|(at, _)| (at, None)).collect())
    }
}

impl Supervisor {
    /// TCP listeners with their places in the ground, to be told when one is shut down.
    pub(crate) fn watched_listeners(&self) -> impl Iterator<Item = (usize, BorrowedFd<'_>)> {
        let due = |last: &Option<Instant>| last.is_none_or(|last| last.elapsed() >= REOPEN_INTERVAL);
        let places = self.tcp_listeners.0.iter().filter(move |(_, last)| due(last)).map(|(at, _)| *at);
        places.filter_map(|at| Some((at, self.ground.listeners.get(at)?.fd.as_fd())))
    }

    /// Lets a listener listen again that somebody has shut down.
    pub(crate) fn reopen_listener(&mut self, at: usize) {
        let Some(listener) = self.ground.listeners.get(at) else { return };
        let (service, name) = (&self.record.file.name, &listener.name);
        let wanted = self.record.file.listen.get(name).map_or(u32::MAX, |wanted| wanted.backlog);
        let backlog = Backlog::new(i32::try_from(wanted).unwrap_or(i32::MAX)).unwrap_or(Backlog::MAXCONN);
        let port = tcp_port(listener.fd.as_fd());
        let again = listen(&listener.fd, backlog).map_err(|errno| errno.to_string()).and_then(|()| {
            // One that the kernel chose, where the service file says 0, is given up with the listener.
            let now = tcp_port(listener.fd.as_fd());
            if now == port { Ok(()) } else { Err(format!("its port was given up, {} is another", now.unwrap_or(0))) }
        });
        let first = self.tcp_listeners.0.insert(at, Some(Instant::now())).flatten().is_none();
        match again {
            Ok(()) if first => {
                tracing::warn!("{service}: a generation has shut the listener {name} down for all; it listens again");
            }
            Ok(()) => {}
            Err(why) => {
                let trouble = format!(
                    "a generation has shut the listener {name} down for all: {why}; `warmswap stop {service}`, then \
                     `warmswap run` it again"
                );
                if first {
                    tracing::error!("{service}: {trouble}");
                }
                self.last_trouble = Some(trouble);
            }
        }
    }
}

/// The port, 0 for one that was given up; `None` for what is no TCP socket.
fn tcp_port(fd: BorrowedFd<'_>) -> Option<u16> {
    let is_stream = getsockopt(&fd, sockopt::SockType) == Ok(SockType::Stream);
    let bound = getsockname::<SockaddrStorage>(fd.as_raw_fd()).ok().filter(|_| is_stream)?;
    let v4 = bound.as_sockaddr_in().map(SockaddrIn::port);
    v4.or_else(|| bound.as_sockaddr_in6().map(SockaddrIn6::port))
}
