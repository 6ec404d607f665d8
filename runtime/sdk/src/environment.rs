//! Descriptors a service is started with: `LISTEN_FDS`, `LISTEN_FDNAMES` and `LISTEN_PID` as systemd has them, and
//! `WARMSWAP_CONTROL_FD`.

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::service::SdkError;

const LISTEN_FDS_START: RawFd = 3;
/// More listeners than this are taken for a damaged environment.
const LISTENERS_MAX: usize = 1024;

pub(crate) const CONTROL_FD: &str = "WARMSWAP_CONTROL_FD";
/// The supervisor's end of the control channel. A service holds it open without using it: should everything of warmswap be
/// killed, a new agent takes it from there and the conversation goes on.
const RESCUE_FD: &str = "WARMSWAP_RESCUE_FD";

/// What a [`Listener`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ListenerKind {
    /// Connections are accepted from it.
    Tcp,
    /// Connections are accepted from it.
    UnixStream,
    /// Datagrams are read from it and answered on it.
    Udp,
    /// Datagrams are read from it and answered on it.
    UnixDatagram,
    /// Something that warmswap opens for nobody, but others pass as `LISTEN_FDS`: a FIFO, say.
    Other,
}

impl ListenerKind {
    /// Whether connections are accepted from it.
    #[must_use]
    pub fn accepts(self) -> bool {
        matches!(self, Self::Tcp | Self::UnixStream)
    }

    fn of(fd: BorrowedFd<'_>) -> Self {
        match (socket_option(fd, libc::SO_DOMAIN), socket_option(fd, libc::SO_TYPE)) {
            (Some(libc::AF_INET | libc::AF_INET6), Some(libc::SOCK_STREAM)) => Self::Tcp,
            (Some(libc::AF_INET | libc::AF_INET6), Some(libc::SOCK_DGRAM)) => Self::Udp,
            (Some(libc::AF_UNIX), Some(libc::SOCK_STREAM)) => Self::UnixStream,
            (Some(libc::AF_UNIX), Some(libc::SOCK_DGRAM)) => Self::UnixDatagram,
            _ => Self::Other,
        }
    }
}

fn socket_option(fd: BorrowedFd<'_>, name: libc::c_int) -> Option<libc::c_int> {
    use std::os::fd::AsRawFd;
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the pointers refer to locals of the stated size that outlive the call.
    let result =
        unsafe { libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, name, (&raw mut value).cast(), &raw mut len) };
    (result == 0).then_some(value)
}

/// A socket where clients arrive, and its name in the service file. All generations hold it. The owner alone accepts from
/// it or reads it: what arrives while nobody owns waits in the socket, a datagram as well as a connection.
#[derive(Debug)]
pub struct Listener {
    pub name: String,
    pub kind: ListenerKind,
    fd: OwnedFd,
}

impl Listener {
    pub(crate) fn new(name: String, fd: OwnedFd) -> Self {
        Self { name, kind: ListenerKind::of(fd.as_fd()), fd }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// True when a warmswap supervisor started this process.
#[must_use]
pub fn is_supervised() -> bool {
    std::env::var_os(CONTROL_FD).is_some()
}

/// The descriptor of the control channel, if there is one. Call once.
pub(crate) fn control_fd() -> Result<Option<OwnedFd>, SdkError> {
    let Ok(text) = std::env::var(CONTROL_FD) else { return Ok(None) };
    let invalid = || SdkError::Environment { variable: CONTROL_FD, value: text.clone() };
    let number: RawFd = text.parse().map_err(|_| invalid())?;
    if let Some(rescue) = std::env::var(RESCUE_FD).ok().and_then(|text| text.parse().ok()).and_then(inherit) {
        std::mem::forget(rescue);
    }
    inherit(number).map(Some).ok_or_else(invalid)
}

/// The listeners this process was started with, in order. Call once.
pub(crate) fn listeners() -> Result<Vec<Listener>, SdkError> {
    let Ok(text) = std::env::var("LISTEN_FDS") else { return Ok(Vec::new()) };
    let for_us = std::env::var("LISTEN_PID").map_or(true, |pid| pid == std::process::id().to_string());
    if !for_us {
        return Ok(Vec::new());
    }
    let invalid = || SdkError::Environment { variable: "LISTEN_FDS", value: text.clone() };
    let count: usize = text.parse().ok().filter(|count| *count <= LISTENERS_MAX).ok_or_else(invalid)?;
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':');
    (0..count)
        .map(|at| {
            let name = names.next().filter(|name| !name.is_empty()).unwrap_or("unknown");
            let fd = inherit(LISTEN_FDS_START + at as RawFd).ok_or_else(invalid)?;
            set_nonblocking(&fd)?;
            Ok(Listener::new(name.to_owned(), fd))
        })
        .collect()
}

/// Takes a descriptor that the process was started with; `None` when it is not open.
fn inherit(number: RawFd) -> Option<OwnedFd> {
    if number < LISTEN_FDS_START {
        return None;
    }
    // SAFETY: plain system calls; they fail for a number that is not open. Also keeps it from children of the service.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
        return None;
    }
    // SAFETY: open (checked), passed to this process by the documented convention for it alone to own, and taken
    // once: the callers run once, at the start.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Listeners are shared with other processes, and so is their non-blocking mode; every warmswap service sets it.
pub(crate) fn set_nonblocking(fd: &OwnedFd) -> Result<(), SdkError> {
    use std::os::fd::AsRawFd;
    let failed = || SdkError::System { what: "make a listener non-blocking", source: std::io::Error::last_os_error() };
    // SAFETY: plain system call on an owned descriptor.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    if flags == -1 {
        return Err(failed());
    }
    // SAFETY: as above.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) } == -1 {
        return Err(failed());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use super::*;

    #[test]
    fn listeners_say_what_they_are() {
        let kind = |fd: OwnedFd| Listener::new("l".into(), fd).kind;
        assert_eq!(kind(TcpListener::bind("127.0.0.1:0").unwrap().into()), ListenerKind::Tcp);
        assert_eq!(kind(UdpSocket::bind("127.0.0.1:0").unwrap().into()), ListenerKind::Udp);
        assert_eq!(kind(UnixDatagram::unbound().unwrap().into()), ListenerKind::UnixDatagram);
        assert_eq!(kind(UnixStream::pair().unwrap().0.into()), ListenerKind::UnixStream);
        assert_eq!(kind(std::io::pipe().unwrap().0.into()), ListenerKind::Other);
        assert!(ListenerKind::Tcp.accepts() && !ListenerKind::Udp.accepts());
    }
}
