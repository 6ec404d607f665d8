//! The control channel of a generation in other hands: taken out of the process by whoever may look into it, as root may.

use std::fs;
use std::io::IoSlice;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use nix::sys::socket::{ControlMessage, MsgFlags, UnixCredentials, sendmsg};

/// Both ends are in the environment of a container's processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// What is sent on it the agent receives.
    Service,
    /// What is sent on it the generation receives.
    Agent,
}

impl End {
    /// A duplicate; `None` when the process has not begun to run, or has ended.
    #[must_use]
    pub fn of(self, pid: i32) -> Option<OwnedFd> {
        let variable = match self {
            Self::Service => "WARMSWAP_CONTROL_FD=",
            Self::Agent => "WARMSWAP_RESCUE_FD=",
        };
        let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
        let mut values = environment.split(|byte| *byte == 0).filter_map(|line| line.strip_prefix(variable.as_bytes()));
        descriptor_of(pid, std::str::from_utf8(values.next()?).ok()?.parse().ok()?)
    }
}

/// Sends a packet of which the kernel attests that `sender` sent it, which root may have it do. A full channel is as good as
/// one that is gone: nothing is said then.
pub fn send_as(sender: i32, end: &OwnedFd, bytes: &[u8]) {
    let who = UnixCredentials::from(libc::ucred { pid: sender, uid: 0, gid: 0 });
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let _ =
        sendmsg::<()>(end.as_raw_fd(), &[IoSlice::new(bytes)], &[ControlMessage::ScmCredentials(&who)], flags, None);
}

/// A duplicate of another process's descriptor, however it came by it.
#[must_use]
pub fn descriptor_of(pid: i32, number: i32) -> Option<OwnedFd> {
    let owned = |fd: libc::c_long| {
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
        // SAFETY: the kernel has just made it for us.
        Some(unsafe { OwnedFd::from_raw_fd(fd) })
    };
    // SAFETY: integers only; a new descriptor or -1.
    let pidfd = owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: as above, on a live pidfd.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) })
}
