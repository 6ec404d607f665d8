//! What of ours is on the host, and how to be rid of it whatever state it is in: for `warmswap stop --all`, which must
//! work after any crash, and for tests that compare before and after.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};

use super::{EmbeddedBackend, EmbeddedConfig, lock, remove_empty_cgroups, remove_folder, remove_netns, sockets};
use crate::cgroup::{Group, Hierarchies, file_error};
use crate::contract::{Backend, Result};
use crate::host;
use crate::layout::{Layout, STATE_DIR, folder_names};

/// Points from the run folder to the state folder, for whoever knows only the former.
const STATE_LINK: &str = "state";

pub(super) fn remember_state_dir(layout: &Layout) -> Result<()> {
    let link = layout.run_dir.join(STATE_LINK);
    match fs::remove_file(&link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(file_error("replace", &link)(error)),
        _ => {}
    }
    match std::os::unix::fs::symlink(&layout.state_dir, &link) {
        // Another instance was faster.
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(file_error("make", &link)(error)),
        _ => Ok(()),
    }
}

fn layout_of(run_dir: &Path) -> Layout {
    let state_dir = fs::read_link(run_dir.join(STATE_LINK)).unwrap_or_else(|_| STATE_DIR.into());
    Layout::new(run_dir.to_owned(), state_dir)
}

/// Whatever of the runtime with this run folder is on the host, a line each: processes, mounts, cgroups, network
/// namespaces, folders of containers, files of unix sockets. Unpacked images and logs are not counted: they are meant to stay.
#[must_use]
pub fn leftovers(run_dir: &Path) -> Vec<String> {
    let layout = layout_of(run_dir);
    let mut left = Vec::new();
    if let Ok(hierarchies) = Hierarchies::detect() {
        let ours = Group::new(&hierarchies, layout.cgroup.clone());
        for folder in ours.existing() {
            // The v1 hierarchies have the same folders again.
            if folder == ours.v2() {
                host::describe_cgroup(&folder, &mut left);
            } else {
                left.push(format!("cgroup {}", folder.display()));
            }
        }
    }
    // A shim that never reached its cgroup.
    left.extend(host::processes_with_arguments(&[super::SHIM_VERB.as_bytes(), run_dir.as_os_str().as_encoded_bytes()]));
    left.extend(host::mounts_below(run_dir).into_iter().map(|mount| format!("mount {}", mount.display())));
    for folder in [layout.netns_folder(), layout.containers_run(), layout.state_dir.join("containers")] {
        left.extend(folder_names(&folder).iter().map(|name| format!("folder {}", folder.join(name).display())));
    }
    left.extend(sockets::left_in(&layout.sockets_folder()).iter().map(|path| format!("socket {}", path.display())));
    left
}

/// Ends and removes everything that [`leftovers`] names. Returns what it found.
pub fn purge(run_dir: &Path) -> Result<Vec<String>> {
    let found = leftovers(run_dir);
    if found.is_empty() {
        return Ok(found);
    }
    let layout = layout_of(run_dir);
    let config = EmbeddedConfig { run_dir: layout.run_dir, state_dir: layout.state_dir, ..EmbeddedConfig::default() };
    EmbeddedBackend::new(config)?.purge()?;
    Ok(found)
}

impl EmbeddedBackend {
    /// Ends and removes everything of this runtime, whatever state it is in. Unpacked images and logs stay.
    pub fn purge(&self) -> Result<()> {
        for id in self.layout.container_ids() {
            self.destroy(&id)?;
        }
        let _guard = lock(&self.ground);
        for name in folder_names(&Group::new(&self.hierarchies, self.layout.cgroup.clone()).v2()) {
            let group = Group::new(&self.hierarchies, self.layout.cgroup.join(&name));
            // Those with '@' belong to runtimes with another run folder.
            if group.exists() && !name.starts_with('@') {
                group.kill()?;
                group.remove()?;
            }
        }
        for name in folder_names(&self.layout.netns_folder()) {
            remove_netns(&self.layout.netns_folder().join(name))?;
        }
        for record in sockets::records_in(&self.layout.sockets_folder()) {
            sockets::remove_all(&record)?;
        }
        let mounts: Vec<PathBuf> = host::mounts_below(&self.layout.run_dir);
        for mount in mounts.iter().rev().filter(|mount| **mount != self.layout.run_dir) {
            umount2(mount, MntFlags::MNT_DETACH).map_err(|errno| file_error("unmount", mount)(errno.into()))?;
        }
        for folder in [self.layout.containers_run(), self.layout.state_dir.join("containers")] {
            for name in folder_names(&folder) {
                remove_folder(&folder.join(name))?;
            }
        }
        for (_, mut child) in std::mem::take(&mut *lock(&self.children)) {
            // A shim that has not joined its cgroup yet; all others were killed with it.
            let _ = child.kill();
            let _ = child.wait();
        }
        remove_empty_cgroups(&self.hierarchies, &self.layout);
        Ok(())
    }
}
