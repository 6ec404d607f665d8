//! Where peers leave their traces: two folders and a cgroup, removed with everything in them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::mount::{MntFlags, umount2};

use crate::process;

/// A cgroup is busy for a moment after its last process has ended.
const CGROUP_TIME_MAX: Duration = Duration::from_secs(3);

pub(crate) struct Ground {
    /// For sockets; short, because the path of a unix socket may not be long.
    pub(crate) run: PathBuf,
    pub(crate) state: PathBuf,
    /// Name below the root of every hierarchy.
    pub(crate) cgroup: String,
}

impl Ground {
    pub(crate) fn new(state: &Path) -> Result<Self> {
        let name = format!("warmswap-peers-{}", std::process::id());
        let ground = Self { run: Path::new("/run").join(&name), state: state.join("peers"), cgroup: name };
        for folder in [&ground.run, &ground.state] {
            fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        Ok(ground)
    }

    fn unmount(&self) {
        // The last mounted first: one may lie inside another.
        for place in mounts().into_iter().rev().map(|mount| mount.place) {
            if place.starts_with(&self.run) || place.starts_with(&self.state) {
                // What is still mounted makes the removal of its folder fail, which is said.
                let _ = umount2(&place, MntFlags::MNT_DETACH);
            }
        }
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        self.unmount();
        for folder in [&self.run, &self.state] {
            if let Err(error) = fs::remove_dir_all(folder) {
                eprintln!("{} stays behind: {error}", folder.display());
            }
        }
        for hierarchy in mounts().into_iter().filter(|mount| mount.kind == "cgroup" || mount.kind == "cgroup2") {
            let cgroup = hierarchy.place.join(&self.cgroup);
            let gone = process::within(CGROUP_TIME_MAX, || remove_cgroup(&cgroup).ok());
            if gone.is_none() {
                eprintln!("{} stays behind", cgroup.display());
            }
        }
    }
}

struct Mount {
    place: PathBuf,
    kind: String,
}

fn mounts() -> Vec<Mount> {
    let text = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mount = |line: &str| {
        let mut fields = line.split(' ');
        let (place, kind) = (fields.nth(1)?, fields.next()?);
        Some(Mount { place: place.into(), kind: kind.to_owned() })
    };
    text.lines().filter_map(mount).collect()
}

/// The files of a cgroup cannot be removed and go with it.
fn remove_cgroup(cgroup: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(cgroup) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries.map_while(Result::ok) {
        if entry.file_type()?.is_dir() {
            remove_cgroup(&entry.path())?;
        }
    }
    fs::remove_dir(cgroup)
}
