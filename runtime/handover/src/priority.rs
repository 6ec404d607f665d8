//! To be scheduled soon, in the few hundred microseconds in which nobody serves: the supervisor by real-time priority, the
//! generations by short slices.

use std::fs;

/// While this lives, the calling thread is scheduled before every ordinary one (SCHED_FIFO). Where the host refuses
/// (no CAP_SYS_NICE, a cgroup without real-time budget) the thread stays as it was: slower, not wrong.
#[derive(Debug)]
pub(crate) struct Urgent {
    raised: bool,
}

impl Urgent {
    const PRIORITY: i32 = 10;

    pub(crate) fn raise() -> Self {
        Self { raised: set(libc::SCHED_FIFO, Self::PRIORITY) }
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        if self.raised {
            set(libc::SCHED_OTHER, 0);
        }
    }
}

fn set(policy: i32, priority: i32) -> bool {
    let parameters = libc::sched_param { sched_priority: priority };
    // SAFETY: 0 means the calling thread; `parameters` lives through the call, which only reads it.
    unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) == 0 }
}

/// What a generation runs for at a time in the handover, ns: the shortest that the scheduler knows. Whoever has less to do than
/// others is given a CPU at once (Linux 6.12); what usually runs for 3 ms at a time is not waited for.
const SLICE_NS: u64 = 100_000;

/// Of each process; those that come after have nothing to do with the handover.
const THREADS_MAX: usize = 64;

/// While this lives, the threads of these processes are given a CPU sooner than those that run for longer at a time. It changes
/// neither their share nor their policy. Where the kernel is older, or refuses, they stay as they were: slower, not wrong.
#[derive(Debug)]
pub(crate) struct Hastened {
    threads: Vec<(libc::pid_t, Attributes)>,
}

/// `struct sched_attr` as of its first version.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

impl Hastened {
    pub(crate) fn processes(pids: impl IntoIterator<Item = libc::pid_t>) -> Self {
        let threads = pids.into_iter().flat_map(threads).filter_map(|thread| {
            let usual = Attributes::of(thread)?;
            // With another policy it means something else.
            let fair = matches!(usual.policy as libc::c_int, libc::SCHED_OTHER | libc::SCHED_BATCH);
            (fair && Attributes { runtime: SLICE_NS, ..usual }.set(thread)).then_some((thread, usual))
        });
        Self { threads: threads.collect() }
    }
}

impl Drop for Hastened {
    fn drop(&mut self) {
        for (thread, usual) in &self.threads {
            // Fails only when it has ended.
            usual.set(*thread);
        }
    }
}

fn threads(pid: libc::pid_t) -> impl Iterator<Item = libc::pid_t> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).take(THREADS_MAX)
}

impl Attributes {
    const SIZE: u32 = size_of::<Self>() as u32;
    /// Of the flags that the kernel tells, the one that it also takes.
    const RESET_ON_FORK: u64 = 1;

    fn of(thread: libc::pid_t) -> Option<Self> {
        let mut attributes = Self::default();
        // SAFETY: the kernel writes as many bytes as it is told of a live structure.
        let result = unsafe {
            libc::syscall(libc::SYS_sched_getattr, thread, &raw mut attributes, Self::SIZE, 0 as libc::c_uint)
        };
        attributes.flags &= Self::RESET_ON_FORK;
        (result == 0).then_some(attributes)
    }

    fn set(self, thread: libc::pid_t) -> bool {
        let attributes = Self { size: Self::SIZE, ..self };
        // SAFETY: the kernel reads as many bytes as the structure says of itself.
        unsafe { libc::syscall(libc::SYS_sched_setattr, thread, &raw const attributes, 0 as libc::c_uint) == 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_as_before_when_it_is_over() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id() as libc::pid_t;
        let usual = Attributes::of(pid).unwrap();
        let hastened = Hastened::processes([pid]);
        assert_eq!(hastened.threads.len(), 1);
        let now = Attributes::of(pid).unwrap();
        // Kernels before 6.12 take it, know of no slices and tell none.
        assert!(now.runtime == SLICE_NS || usual.runtime == 0, "{now:?}");
        drop(hastened);
        let after = Attributes::of(pid).unwrap();
        assert_eq!((after.policy, after.nice, after.runtime), (usual.policy, usual.nice, usual.runtime));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(Hastened::processes([pid]).threads.is_empty(), "nobody is there any more");
    }
}
