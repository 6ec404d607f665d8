//! Processes told apart by pid *and* start time, so that a reused pid fools nobody.

use std::os::fd::{FromRawFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

/// A process of this boot. Two with the same pid differ in their start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessId {
    pub(crate) pid: i32,
    /// Clock ticks since boot, as in `/proc/<pid>/stat`.
    pub(crate) start_ticks: u64,
}

impl ProcessId {
    /// `None` when there is no such process (a zombie counts as one).
    pub(crate) fn of(pid: i32) -> Option<Self> {
        Some(Self { pid, start_ticks: stat(pid)?.1 })
    }

    pub(crate) fn own() -> Option<Self> {
        Self::of(i32::try_from(std::process::id()).ok()?)
    }

    /// Runs still: exists, is the same process and is no zombie.
    pub(crate) fn is_alive(self) -> bool {
        stat(self.pid).is_some_and(|(state, start)| start == self.start_ticks && state != 'Z' && state != 'X')
    }

    /// A descriptor of exactly this process; `None` when it is gone.
    pub(crate) fn pidfd(self) -> Option<OwnedFd> {
        // SAFETY: pidfd_open takes two integers and returns a new descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, self.pid, 0) };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
        // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // Opened first, compared then: from here on the pid cannot be given to another without the comparison failing.
        (stat(self.pid)?.1 == self.start_ticks).then_some(fd)
    }

    /// Signals exactly this process. `false` when it is gone.
    pub(crate) fn signal(self, signal: i32) -> std::io::Result<bool> {
        use std::os::fd::AsRawFd;
        let Some(pidfd) = self.pidfd() else { return Ok(false) };
        // SAFETY: a live pidfd, a signal number, no siginfo and no flags.
        let done = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                pidfd.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        if done == 0 {
            return Ok(true);
        }
        let error = std::io::Error::last_os_error();
        if error.raw_os_error() == Some(libc::ESRCH) { Ok(false) } else { Err(error) }
    }

    /// Waits until it has ended; `false` when it has not after `timeout`.
    pub(crate) fn wait_end(self, timeout: Duration) -> bool {
        use std::os::fd::AsFd;
        match self.pidfd() {
            Some(pidfd) => wait_readable(pidfd.as_fd(), std::time::Instant::now() + timeout),
            None => true,
        }
    }

    /// Collects it if it is a zombie of ours. The start time makes sure that no other child is collected.
    pub(crate) fn reap(self) {
        if stat(self.pid).is_some_and(|(state, start)| state == 'Z' && start == self.start_ticks) {
            // An error means: not our child, so somebody else collects it.
            let _ = nix::sys::wait::waitpid(
                nix::unistd::Pid::from_raw(self.pid),
                Some(nix::sys::wait::WaitPidFlag::WNOHANG),
            );
        }
    }
}

/// Whether there is no such process any more, or only what its parent has not asked for yet.
#[must_use]
pub fn has_ended(pid: i32) -> bool {
    stat(pid).is_none_or(|(state, _)| matches!(state, 'Z' | 'X'))
}

/// A process that is stopped by a signal or a debugger, and nobody can say when it goes on. Two that are equal, of one
/// process: it has not run in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standstill {
    /// How often it has been taken off a processor since it began.
    switches: u64,
}

impl Standstill {
    /// `None` when the process is not stopped, or not there.
    #[must_use]
    pub fn of(pid: u32) -> Option<Self> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        if !field("State:")?.starts_with(['T', 't']) {
            return None;
        }
        let count = |name| field(name).and_then(|text| text.parse::<u64>().ok()).unwrap_or_default();
        Some(Self { switches: count("voluntary_ctxt_switches:") + count("nonvoluntary_ctxt_switches:") })
    }
}

/// Rounded up, so that a loop around `poll` does not spin in the last millisecond.
pub(crate) fn poll_timeout(left: Duration) -> PollTimeout {
    let ms = left.as_micros().div_ceil(1000).min(60_000);
    PollTimeout::try_from(u32::try_from(ms).unwrap_or(60_000)).unwrap_or(PollTimeout::ZERO)
}

/// Waits until there is something to read, or the other end is closed; `false` when not before `deadline`.
pub(crate) fn wait_readable(fd: std::os::fd::BorrowedFd<'_>, deadline: std::time::Instant) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    loop {
        let left = deadline.saturating_duration_since(std::time::Instant::now());
        match poll(&mut fds, poll_timeout(left)) {
            Ok(0) if left.is_zero() => return false,
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) | Err(_) => return true,
        }
    }
}

/// State letter and start time.
fn stat(pid: i32) -> Option<(char, u64)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name may contain anything, also spaces and parentheses: count from the last one.
    let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    // Field 22 of the line; the state is field 3.
    Some((state, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reused_pid_is_another_process() {
        let me = ProcessId::own().expect("this process exists");
        assert!(me.is_alive());
        assert!(me.pidfd().is_some());
        let earlier = ProcessId { start_ticks: me.start_ticks - 1, ..me };
        assert!(!earlier.is_alive());
        assert!(earlier.pidfd().is_none());
        assert!(matches!(earlier.signal(0), Ok(false)));
    }

    #[test]
    #[expect(clippy::zombie_processes, reason = "reaping is what is tested")]
    fn an_ended_child_is_seen_waited_for_and_reaped() {
        let child = std::process::Command::new("sleep").arg("0.05").spawn().expect("sleep runs");
        let id = ProcessId::of(child.id().try_into().expect("a pid")).expect("it exists");
        assert!(!id.wait_end(Duration::from_millis(1)));
        assert!(id.wait_end(Duration::from_secs(5)));
        id.reap();
        assert!(ProcessId::of(id.pid).is_none_or(|other| other != id));
    }
}
