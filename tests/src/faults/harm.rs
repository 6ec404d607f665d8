//! Who is there, and what can be done to them.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};

use crate::channel::{End, send_as};
use crate::store::Store;

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

/// Sends garbage over the control channel of a generation, in its name.
pub(super) fn garble(pid: i32, end: End) {
    // One that has not begun to run, or has ended, says nothing.
    let Some(end) = end.of(pid) else { return };
    let garbage: Vec<u8> = (0..200_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for length in [200, 64, 7] {
        send_as(pid, &end, &garbage[..length]);
    }
}
