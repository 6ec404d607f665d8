//! Listeners outlive whoever accepts from them.
//!
//! Every generation has them as descriptors of the same sockets, so `close` by one means nothing to the others. But one that
//! calls `shutdown`, as programs do that believe to be alone when they are told to finish, closes a socket for all. A TCP
//! listener can listen again at once; clients that were in its queue have been refused.

use std::os::fd::{AsFd as _, BorrowedFd};

use nix::sys::socket::{
    AddressFamily, Backlog, SockType, SockaddrLike as _, SockaddrStorage, getsockname, getsockopt, listen, sockopt,
};

use crate::supervisor::Supervisor;

impl Supervisor {
    /// Of sockets that are watched: a closed one that cannot be opened again would wake whoever waits without end.
    pub(crate) fn watched_listeners(&self) -> impl Iterator<Item = (usize, BorrowedFd<'_>)> {
        let listeners = self.ground.listeners.iter().enumerate();
        listeners.filter(|(at, _)| !self.dead_listeners.contains(at)).map(|(at, listener)| (at, listener.fd.as_fd()))
    }

    /// Lets a listener listen again that somebody has shut down.
    pub(crate) fn reopen_listener(&mut self, at: usize) {
        let Some(listener) = self.ground.listeners.get(at) else { return };
        let name = &listener.name;
        let backlog = self
            .record
            .file
            .listen
            .get(name)
            .map_or(libc::SOMAXCONN, |wanted| i32::try_from(wanted.backlog).unwrap_or(i32::MAX));
        let backlog = Backlog::new(backlog).unwrap_or(Backlog::MAXCONN);
        let service = &self.record.file.name;
        match is_tcp(listener.fd.as_fd()).then(|| listen(&listener.fd, backlog)) {
            Some(Ok(())) => {
                tracing::warn!("a generation of {service} has shut the listener {name} down for all; it listens again");
            }
            other => {
                let why = other
                    .and_then(Result::err)
                    .map_or("only TCP can listen again".to_owned(), |errno| errno.to_string());
                let trouble = format!(
                    "a generation has shut the listener {name} down for all, and it stays so ({why}): \
                     `warmswap stop {service}`, then `warmswap run` it again"
                );
                tracing::error!("{service}: {trouble}");
                self.last_trouble = Some(trouble);
                self.dead_listeners.insert(at);
            }
        }
    }
}

fn is_tcp(fd: BorrowedFd<'_>) -> bool {
    let family =
        getsockname::<SockaddrStorage>(std::os::fd::AsRawFd::as_raw_fd(&fd)).ok().and_then(|address| address.family());
    getsockopt(&fd, sockopt::SockType) == Ok(SockType::Stream)
        && matches!(family, Some(AddressFamily::Inet | AddressFamily::Inet6))
}
