//! Processes that do nothing but burn CPU, at normal priority: the neighbours nobody chose.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{self, Pid};

use crate::process;

/// Name of the hidden command that is one of them.
pub(crate) const COMMAND: &str = "burn";

const START_TIME_MAX: Duration = Duration::from_secs(5);

/// Ended when dropped.
pub(crate) struct Hogs(Vec<Child>);

impl Hogs {
    pub(crate) fn start(count: usize) -> Result<Self> {
        let program = std::env::current_exe()?;
        let mut hogs = Self(Vec::with_capacity(count));
        for _ in 0..count {
            // Not `process::command`: what leads a process group cannot leave its session.
            let hog = Command::new(&program).arg(COMMAND).stdin(Stdio::null()).spawn();
            hogs.0.push(hog.context("cannot start a CPU hog")?);
        }
        for hog in &hogs.0 {
            let pid = Pid::from_raw(i32::try_from(hog.id())?);
            let burns = process::within(START_TIME_MAX, || (unistd::getsid(Some(pid)) == Ok(pid)).then_some(()));
            ensure!(burns.is_some(), "a CPU hog has no session of its own after {START_TIME_MAX:?}: it does not run");
        }
        Ok(hogs)
    }
}

impl Drop for Hogs {
    fn drop(&mut self) {
        for hog in &mut self.0 {
            // Fails when it has ended, which is as good.
            let _ = hog.kill();
            let _ = hog.wait();
        }
    }
}

/// What a hog does, until its parent ends.
pub(crate) fn burn() -> Result<std::convert::Infallible> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    // A neighbour is not of our session. With autogroups (`kernel.sched_autogroup_enabled`) it would share the clients' group,
    // whose weight changes at every request; on Linux 6.18 a busy group whose weight does that can keep every other one
    // from a processor for seconds.
    unistd::setsid()?;
    let mut number = 1_u64;
    loop {
        number = std::hint::black_box(number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number >> 7);
    }
}
