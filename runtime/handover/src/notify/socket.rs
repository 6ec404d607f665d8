//! The receiving end of a container's `NOTIFY_SOCKET`.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixCredentials, recvmsg, setsockopt, socket,
    sockopt,
};

use super::message::BYTES_MAX;

/// The kernel passes no more descriptors with one message.
const FDS_MAX: usize = 253;

#[derive(Debug)]
pub(crate) struct NotifySocket {
    fd: OwnedFd,
}

/// One datagram.
#[derive(Debug)]
pub(crate) struct Heard {
    pub(crate) bytes: Vec<u8>,
    /// As the kernel attests it; `None` when it does not.
    pub(crate) sender: Option<i32>,
    pub(crate) fds: Vec<OwnedFd>,
    /// Neither text nor descriptors were cut off.
    pub(crate) whole: bool,
}

impl AsFd for NotifySocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl NotifySocket {
    /// Unbound: the back end knows where the container can reach it.
    pub(crate) fn new() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::Datagram, flags, None)?;
        setsockopt(&fd, sockopt::PassCred, &true)?;
        Ok(Self { fd })
    }

    /// One that a predecessor made.
    pub(crate) fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// `None` when nothing waits.
    pub(crate) fn receive(&self) -> io::Result<Option<Heard>> {
        let mut bytes = vec![0; BYTES_MAX];
        let mut control = nix::cmsg_space!([RawFd; FDS_MAX], UnixCredentials);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let message = loop {
            match recvmsg::<()>(self.fd.as_raw_fd(), &mut parts, Some(&mut control), flags) {
                Ok(message) => break message,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            }
        };
        let mut sender = None;
        let mut fds = Vec::new();
        for cmsg in message.cmsgs()? {
            match cmsg {
                ControlMessageOwned::ScmCredentials(credentials) => sender = Some(credentials.pid()),
                ControlMessageOwned::ScmRights(raw) => {
                    // SAFETY: the kernel has just installed these descriptors for us; nobody else owns them.
                    fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                }
                _ => {}
            }
        }
        let whole = !message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
        let length = message.bytes;
        bytes.truncate(length);
        Ok(Some(Heard { bytes, sender, fds, whole }))
    }
}
