//! Which CPU works and which ones look on: what both do must not be each other's waiting time.

use anyhow::{Context as _, Result};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

const THIS_THREAD: Pid = Pid::from_raw(0);

#[derive(Clone, Copy)]
pub(super) struct Cpus {
    all: CpuSet,
    /// The last one: interrupts of devices mostly come to the first.
    pub(super) work: usize,
}

impl Cpus {
    pub(super) fn of_host() -> Result<Self> {
        let all = sched_getaffinity(THIS_THREAD).context("cannot ask which CPUs there are")?;
        let work = (0..CpuSet::count()).rev().find(|cpu| all.is_set(*cpu) == Ok(true)).unwrap_or(0);
        Ok(Self { all, work })
    }

    /// As long as the result lives, this thread and whatever it starts keep off the CPU that works, or have no other. On a
    /// host with one CPU they cannot keep off.
    pub(super) fn place(&self, place: Place) -> Result<Placed> {
        let mut set = CpuSet::new();
        set.set(self.work)?;
        if place == Place::Elsewhere {
            let mut others = self.all;
            others.unset(self.work)?;
            if others != CpuSet::new() {
                set = others;
            }
        }
        sched_setaffinity(THIS_THREAD, &set).context("cannot choose CPUs")?;
        Ok(Placed(self.all))
    }
}

/// Where those are who look on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Elsewhere,
    SameCpu,
}

impl Place {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Elsewhere => "another CPU",
            Self::SameCpu => "the same CPU",
        }
    }
}

pub(super) struct Placed(CpuSet);

impl Drop for Placed {
    fn drop(&mut self) {
        if let Err(error) = sched_setaffinity(THIS_THREAD, &self.0) {
            eprintln!("cannot go back to all CPUs: {error}");
        }
    }
}

/// The calling thread, and whatever it starts, run on this CPU only, and take turns there only when they have to wait: a
/// client and its server that interrupt each other do so in another pattern each time, which costs more than what is measured.
pub(super) fn stay_on(cpu: usize) -> Result<()> {
    let mut one = CpuSet::new();
    one.set(cpu)?;
    sched_setaffinity(THIS_THREAD, &one).with_context(|| format!("cannot stay on CPU {cpu}"))?;
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: a live structure; 0 is the calling thread.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const parameters) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()).context("cannot work in batches") }
}
