//! A set of descriptors to wait for, level-triggered.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// Events taken per wait.
const EVENTS_MAX: usize = 256;

#[derive(Debug)]
pub(crate) struct Epoll {
    fd: OwnedFd,
    buffer: Vec<libc::epoll_event>,
}

/// What one descriptor is ready for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ready {
    pub(crate) token: u64,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

impl Epoll {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: plain system call.
        let fd = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: just created, owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd, buffer: vec![libc::epoll_event { events: 0, u64: 0 }; EVENTS_MAX] })
    }

    fn control(&self, operation: libc::c_int, fd: BorrowedFd<'_>, token: u64, interest: u32) -> io::Result<()> {
        let mut event = libc::epoll_event { events: interest, u64: token };
        // SAFETY: `event` outlives the call.
        check(unsafe { libc::epoll_ctl(self.fd.as_raw_fd(), operation, fd.as_raw_fd(), &raw mut event) }).map(drop)
    }

    pub(crate) fn add(&self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, fd, token, libc::EPOLLIN as u32)
    }

    pub(crate) fn change(&self, fd: BorrowedFd<'_>, token: u64, read: bool, write: bool) -> io::Result<()> {
        let interest = if read { libc::EPOLLIN } else { 0 } | if write { libc::EPOLLOUT } else { 0 };
        self.control(libc::EPOLL_CTL_MOD, fd, token, interest as u32)
    }

    /// To be called before a descriptor is closed: another process may hold a duplicate, and closing ours alone
    /// would leave it in the set.
    pub(crate) fn remove(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_DEL, fd, 0, 0)
    }

    /// Lets the kernel forget what was ready once and no more is, without looking at anything: it would do so in the first
    /// wait after a handover otherwise, a third of a microsecond per connection that was in use before.
    pub(crate) fn settle(&mut self) -> io::Result<()> {
        self.wait(Some(Duration::ZERO), &mut Vec::new())
    }

    /// Waits for at most `timeout`, forever without one.
    pub(crate) fn wait(&mut self, timeout: Option<Duration>, ready: &mut Vec<Ready>) -> io::Result<()> {
        ready.clear();
        // Rounded up: rounding down would spin for the last part of a millisecond.
        let timeout = timeout.map_or(-1, |timeout| {
            libc::c_int::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(libc::c_int::MAX)
        });
        let room = self.buffer.len() as libc::c_int;
        // SAFETY: the buffer has `room` entries.
        let count = unsafe { libc::epoll_wait(self.fd.as_raw_fd(), self.buffer.as_mut_ptr(), room, timeout) };
        let count = match check(count) {
            Ok(count) => count as usize,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        ready.extend(self.buffer[..count].iter().map(|event| {
            let events = event.events as libc::c_int;
            // An error or hang-up is met by reading.
            let readable = events & (libc::EPOLLIN | libc::EPOLLERR | libc::EPOLLHUP) != 0;
            Ready { token: event.u64, readable, writable: events & libc::EPOLLOUT != 0 }
        }));
        Ok(())
    }
}
