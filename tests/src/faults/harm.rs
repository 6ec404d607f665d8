//! Who is there, and what can be done to them.

use std::fs;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};

use crate::store::Store;

/// In the name of whom garbage is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// The generation seems to say it.
    ToAgent,
    /// The agent seems to say it.
    FromAgent,
}

/// The processes of the service before a handover. While the agent stands still nobody can ask it.
#[derive(Debug)]
pub(super) struct Processes {
    pub(super) owner: u32,
    pub(super) active: Vec<i32>,
    /// Cgroup of the active generation.
    group: PathBuf,
}

impl Processes {
    pub(super) fn find(store: &Store) -> Result<Self> {
        let owner = store.owner()?;
        Ok(Self { owner, active: store.pids(owner)?, group: store.cgroup(owner)? })
    }

    /// Of every generation that there is now.
    pub(super) fn cgroups(&self) -> Result<impl Iterator<Item = PathBuf>> {
        let service = self.group.parent().context("a cgroup without a parent")?;
        let entries = fs::read_dir(service).with_context(|| format!("cannot read {}", service.display()))?;
        Ok(entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()))
    }

    /// Whoever runs in another generation's cgroup of the same service.
    pub(super) fn shadow_pids(&self) -> Result<Vec<i32>> {
        let mut pids = Vec::new();
        for group in self.cgroups()?.filter(|path| *path != self.group) {
            // Gone since the folder was read, perhaps.
            let text = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
            pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
        }
        Ok(pids)
    }
}

pub(super) fn signal(pid: i32, number: i32) -> Result<()> {
    ensure!(pid > 0, "{pid} is no process");
    // SAFETY: a signal to one process, found as ours; without memory. That it has ended meanwhile is no error.
    unsafe { libc::kill(pid, number) };
    Ok(())
}

/// Stopped by a signal.
pub(super) fn is_stopped(pid: i32) -> bool {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    text.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('T'))
}

/// Sends garbage over the control channel of a generation. Both of its ends are in the process's environment.
pub(super) fn garble(pid: i32, direction: Direction) {
    let variable = match direction {
        Direction::ToAgent => "WARMSWAP_CONTROL_FD=",
        Direction::FromAgent => "WARMSWAP_RESCUE_FD=",
    };
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let mut values = environment.split(|byte| *byte == 0).filter_map(|line| line.strip_prefix(variable.as_bytes()));
    let number = values.next().and_then(|value| std::str::from_utf8(value).ok()?.parse::<i32>().ok());
    // One that has not begun to run, or has ended, says nothing.
    let Some(end) = number.and_then(|number| descriptor_of(pid, number)) else { return };
    let garbage: Vec<u8> = (0..200_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for length in [200, 64, 7] {
        // SAFETY: a live descriptor and a buffer at least `length` long. A full socket is as good: nothing is said then.
        unsafe {
            libc::send(end.as_raw_fd(), garbage.as_ptr().cast(), length, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
        };
    }
}

/// A duplicate of another process's descriptor.
fn descriptor_of(pid: i32, number: i32) -> Option<OwnedFd> {
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
