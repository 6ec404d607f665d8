//! Real-time priority for the few hundred microseconds in which nobody serves.

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
