//! Messages between the back end and its helper processes: JSON with descriptors, one message per packet of a
//! `SOCK_SEQPACKET` socket. Both ends are the same program running as root; peers are checked by `SO_PEERCRED`.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, bind, connect,
    getsockopt, listen, recvmsg, sendmsg, setsockopt, socket, socketpair, sockopt,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use warmswap_model::{Listen, ServiceName};

use crate::{ContainerId, ContainerState};

/// The shim's socket in the runtime folder of its container.
const SHIM_SOCKET: &str = "shim.sock";
/// The longest message, in bytes.
const MESSAGE_MAX: usize = 64 * 1024;
/// Descriptors in one message (the kernel takes up to 253).
pub(crate) const FDS_MAX: usize = 200;
/// Descriptors one container can be given or have kept.
pub(crate) const FDS_PER_CONTAINER_MAX: usize = 16_384;

/// To a new shim, until `last`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct BootFds {
    /// Names of the descriptors the container gets, in order. They come first in the message.
    pub(crate) pass: Vec<String>,
    /// Names of those that are only kept.
    pub(crate) keep: Vec<String>,
    pub(crate) last: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    Start,
    State,
    /// Answered when the container has ended.
    Wait,
    Signal {
        signal: i32,
    },
    /// With one descriptor.
    Keep {
        name: String,
    },
    Drop {
        name: String,
    },
    Kept,
    /// End: the container is being destroyed.
    Quit,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    Created,
    Done,
    State(ContainerState),
    /// With one descriptor per name; more of them follow unless `last`.
    Kept {
        names: Vec<String>,
        last: bool,
    },
    Failed {
        problem: String,
    },
}

/// To the helper that opens listeners.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct GroundRequest {
    pub(crate) service: ServiceName,
    pub(crate) listen: Vec<(String, Listen)>,
    /// `cgroup.procs` of the service.
    pub(crate) cgroup_procs: std::path::PathBuf,
    pub(crate) netns: std::path::PathBuf,
    /// Where the service's socket files are written down.
    pub(crate) sockets: std::path::PathBuf,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum GroundReply {
    /// With one descriptor per name.
    Listeners {
        names: Vec<String>,
        last: bool,
    },
    Listen {
        name: String,
        errno: Option<i32>,
        problem: String,
    },
    Failed {
        problem: String,
    },
}

/// One end of a connection.
#[derive(Debug)]
pub(crate) struct Channel {
    fd: OwnedFd,
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Channel {
    pub(crate) fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    pub(crate) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self { fd: ours }, theirs))
    }

    /// Connects to the shim of a container. `folder` is its runtime folder.
    pub(crate) fn connect(folder: &Path, timeout: Duration) -> io::Result<Self> {
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        let channel = Self { fd };
        channel.set_timeout(timeout)?;
        with_short_path(folder, SHIM_SOCKET, |path| Ok(connect(channel.fd.as_raw_fd(), &UnixAddr::new(path)?)?))?;
        Ok(channel)
    }

    /// How long a send or receive may take; zero for ever.
    pub(crate) fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        let time = nix::sys::time::TimeVal::new(
            timeout.as_secs().try_into().unwrap_or(i64::MAX),
            timeout.subsec_micros().into(),
        );
        setsockopt(&self.fd, sockopt::ReceiveTimeout, &time)?;
        setsockopt(&self.fd, sockopt::SendTimeout, &time)?;
        Ok(())
    }

    pub(crate) fn send<T: Serialize>(&self, message: &T, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let text = serde_json::to_vec(message)?;
        if text.len() > MESSAGE_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "message is too long"));
        }
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights[..] };
        loop {
            let sent = sendmsg::<()>(
                self.fd.as_raw_fd(),
                &[IoSlice::new(&text)],
                control,
                // A peer that is gone is an error, never a signal: the shim must survive everything.
                MsgFlags::MSG_NOSIGNAL,
                None,
            );
            match sent {
                Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// `None` when the peer has closed.
    pub(crate) fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        let mut text = vec![0; MESSAGE_MAX];
        let mut control = nix::cmsg_space!([RawFd; 253]);
        let (length, fds, truncated) = {
            let mut parts = [IoSliceMut::new(&mut text)];
            let message = loop {
                match recvmsg::<()>(self.fd.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC) {
                    Err(nix::errno::Errno::EINTR) => {}
                    other => break other?,
                }
            };
            let mut fds = Vec::new();
            for cmsg in message.cmsgs()? {
                if let ControlMessageOwned::ScmRights(raw) = cmsg {
                    // SAFETY: the kernel has just installed these descriptors for us; nobody else owns them.
                    fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                }
            }
            (message.bytes, fds, message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC))
        };
        if truncated {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "message was cut off"));
        }
        if length == 0 {
            return Ok(None);
        }
        Ok(Some((serde_json::from_slice(&text[..length])?, fds)))
    }

    /// Receives one message that must come.
    pub(crate) fn expect<T: DeserializeOwned>(&self) -> io::Result<(T, Vec<OwnedFd>)> {
        self.receive()?.ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "the peer has ended"))
    }

    /// Only root may talk to a shim.
    pub(crate) fn peer_is_root(&self) -> bool {
        getsockopt(&self.fd, sockopt::PeerCredentials).is_ok_and(|peer| peer.uid() == 0)
    }
}

/// The listening socket of a shim.
pub(crate) fn listen_at(folder: &Path) -> io::Result<OwnedFd> {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    bind_at(folder, SHIM_SOCKET, fd.as_fd())?;
    listen(&fd, Backlog::new(64)?)?;
    Ok(fd)
}

/// Gives a unix socket the address of a file in this folder.
pub(crate) fn bind_at(folder: &Path, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
    with_short_path(folder, name, |path| Ok(bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?))
}

/// A socket address holds 107 bytes of path and a run folder may be longer, so the folder is opened and named
/// through its descriptor.
fn with_short_path<T>(folder: &Path, name: &str, f: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    use std::os::unix::fs::OpenOptionsExt;
    let dir = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(folder)?;
    f(Path::new(&format!("/proc/self/fd/{}/{name}", dir.as_raw_fd())))
}

/// For the fuzz target: `bytes` as a packet that a peer sent, taken for each kind of message.
#[cfg(fuzzing)]
pub fn fuzz_wire(bytes: &[u8]) {
    fn take<T: DeserializeOwned>(bytes: &[u8]) {
        let Ok((ours, theirs)) = Channel::pair() else { return };
        if nix::sys::socket::send(theirs.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT).is_ok() {
            let _ = ours.receive::<T>();
        }
    }
    take::<BootFds>(bytes);
    take::<Request>(bytes);
    take::<Reply>(bytes);
    take::<GroundRequest>(bytes);
    take::<GroundReply>(bytes);
    take::<ShimRecord>(bytes);
}

/// What a shim writes down about itself, so that its container can be found and ended without it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ShimRecord {
    pub(crate) id: ContainerId,
    pub(crate) shim: crate::process::ProcessId,
    pub(crate) init: Option<crate::process::ProcessId>,
    pub(crate) state: Option<ContainerState>,
    /// Names of the descriptors the container was given, as 3, 4, ….
    pub(crate) passed: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_descriptors_arrive_together() {
        let (ours, theirs) = Channel::pair().unwrap();
        let theirs = Channel::from_fd(theirs);
        let (reader, writer) = std::io::pipe().unwrap();
        ours.send(&Request::Keep { name: "pipe".into() }, &[reader.as_fd()]).unwrap();
        drop(reader);
        let (request, fds): (Request, _) = theirs.expect().unwrap();
        assert!(matches!(request, Request::Keep { name } if name == "pipe"));
        let mut reader = std::fs::File::from(fds.into_iter().next().unwrap());
        io::Write::write_all(&mut &writer, b"x").unwrap();
        let mut byte = [0];
        io::Read::read_exact(&mut reader, &mut byte).unwrap();
        assert_eq!(byte, *b"x");
        drop(ours);
        assert!(theirs.receive::<Request>().unwrap().is_none());
    }
}
