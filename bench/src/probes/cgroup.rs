//! A cgroup of our own for what is watched; removed with everything that runs in it.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use warmswap_model::CgroupId;
use warmswap_sensor::{CgroupMounts, cgroup_id};

use crate::process;

/// A cgroup is busy for a moment after its last process has ended.
const EMPTY_TIME_MAX: Duration = Duration::from_secs(3);

pub(super) struct Cgroup {
    folder: PathBuf,
    pub(super) id: CgroupId,
}

impl Cgroup {
    pub(super) fn new() -> Result<Self> {
        let root = CgroupMounts::of_host()?.v2.context("no cgroup v2 hierarchy is mounted, nothing can be watched")?;
        let folder = root.join(format!("warmswap-bench-{}", std::process::id()));
        fs::create_dir(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let id = cgroup_id(&folder).with_context(|| format!("cannot look at {}", folder.display()))?;
        Ok(Self { folder, id })
    }

    pub(super) fn add(&self, process: u32) -> Result<()> {
        let file = self.folder.join("cgroup.procs");
        fs::write(&file, process.to_string()).with_context(|| format!("cannot write {}", file.display()))
    }

    fn remove(&self) -> Option<()> {
        let processes = fs::read_to_string(self.folder.join("cgroup.procs")).unwrap_or_default();
        for process in processes.lines().filter_map(|line| line.parse().ok()) {
            // Fails when it has ended, which is as good.
            let _ = kill(Pid::from_raw(process), Signal::SIGKILL);
        }
        fs::remove_dir(&self.folder).ok()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if process::within(EMPTY_TIME_MAX, || self.remove()).is_none() {
            eprintln!("{} stays behind", self.folder.display());
        }
    }
}
