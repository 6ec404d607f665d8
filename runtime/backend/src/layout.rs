//! Where everything of ours lies on the host. Only names: nothing here touches the machine.
//!
//! ```text
//! <run_dir>/                           tmpfs as a rule, gone after a reboot, like the containers
//!   netns/<service>                    network namespace, bind-mounted
//!   containers/<service>/g<N>/
//!     spec.json                        what was asked for (ContainerSpec)
//!     state.json                       who runs it (ShimRecord), replaced atomically
//!     shim.sock                        the shim's socket, root only
//!     notify/socket                    what the program says by the conventions of systemd; in the container it is
//!                                      /run/warmswap/socket
//!     shim.log                         what the shim itself has to say
//!     rootfs/                          mount point, mounted only inside the shim's mount namespace
//!     oci/                             libcontainer's own state
//! <state_dir>/
//!   layers/<digest>/                   unpacked image layers, read-only, shared
//!   containers/<service>/g<N>/         overlay upper and work folders
//!   logs/<service>/g<N>.log            standard output and error of the container
//!   sockets/<service>.json             unix sockets that were made where the service file says
//! <cgroup>/warmswap/<service>/g<N>     the container
//! <cgroup>/warmswap/.shims/<service>.g<N>   its shim, so that neither a freeze nor the end of the agent hits it
//! ```

use std::path::{Path, PathBuf};

use warmswap_model::{Generation, ServiceName};

use crate::ContainerId;

/// Where things lie when nobody says otherwise.
pub const RUN_DIR: &str = "/run/warmswap";
/// Where things lie that outlive a reboot.
pub const STATE_DIR: &str = "/var/lib/warmswap";
/// Our folder in every cgroup hierarchy.
pub(crate) const CGROUP: &str = "warmswap";

/// In every container: the folder with the socket that its `NOTIFY_SOCKET` names.
pub(crate) const NOTIFY_INSIDE: &str = "/run/warmswap";
/// The socket in that folder.
pub(crate) const NOTIFY_SOCKET: &str = "socket";

#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub(crate) run_dir: PathBuf,
    pub(crate) state_dir: PathBuf,
    /// Relative to the root of each cgroup hierarchy.
    pub(crate) cgroup: PathBuf,
}

impl Layout {
    /// A run folder other than the usual one gets a cgroup folder of its own below `warmswap/`, so that two runtimes
    /// on one host (tests, say) never touch each other's containers.
    pub(crate) fn new(run_dir: PathBuf, state_dir: PathBuf) -> Self {
        let cgroup = if run_dir == Path::new(RUN_DIR) {
            PathBuf::from(CGROUP)
        } else {
            let hash = crate::image::sha256_hex(run_dir.as_os_str().as_encoded_bytes());
            // '@' cannot begin a service name.
            Path::new(CGROUP).join(format!("@{}", &hash[..12]))
        };
        Self { run_dir, state_dir, cgroup }
    }

    pub(crate) fn containers_run(&self) -> PathBuf {
        self.run_dir.join("containers")
    }

    pub(crate) fn container_run(&self, id: &ContainerId) -> PathBuf {
        self.containers_run().join(id.service.as_str()).join(id.generation.to_string())
    }

    /// Bound to [`NOTIFY_INSIDE`] in the container. Not there when nobody listens.
    pub(crate) fn notify_folder(&self, id: &ContainerId) -> PathBuf {
        self.container_run(id).join("notify")
    }

    pub(crate) fn container_state(&self, id: &ContainerId) -> PathBuf {
        self.state_dir.join("containers").join(id.service.as_str()).join(id.generation.to_string())
    }

    pub(crate) fn layers(&self) -> PathBuf {
        self.state_dir.join("layers")
    }

    pub(crate) fn logs(&self, service: &ServiceName) -> PathBuf {
        self.state_dir.join("logs").join(service.as_str())
    }

    pub(crate) fn log(&self, id: &ContainerId) -> PathBuf {
        self.logs(&id.service).join(format!("{}.log", id.generation))
    }

    pub(crate) fn sockets_folder(&self) -> PathBuf {
        self.state_dir.join("sockets")
    }

    pub(crate) fn sockets(&self, service: &ServiceName) -> PathBuf {
        self.sockets_folder().join(format!("{service}.json"))
    }

    pub(crate) fn netns_folder(&self) -> PathBuf {
        self.run_dir.join("netns")
    }

    pub(crate) fn netns(&self, service: &ServiceName) -> PathBuf {
        self.netns_folder().join(service.as_str())
    }

    pub(crate) fn cgroup_service(&self, service: &ServiceName) -> PathBuf {
        self.cgroup.join(service.as_str())
    }

    pub(crate) fn cgroup_container(&self, id: &ContainerId) -> PathBuf {
        self.cgroup_service(&id.service).join(id.generation.to_string())
    }

    pub(crate) fn cgroup_shims(&self) -> PathBuf {
        self.cgroup.join(".shims")
    }

    pub(crate) fn cgroup_shim(&self, id: &ContainerId) -> PathBuf {
        self.cgroup_shims().join(format!("{}.{}", id.service, id.generation))
    }

    /// The ids of all container folders, in order. What does not look like one of ours is left alone.
    pub(crate) fn container_ids(&self) -> Vec<ContainerId> {
        let mut ids = Vec::new();
        for service in folder_names(&self.containers_run()) {
            let Ok(name) = ServiceName::new(service.clone()) else { continue };
            for generation in folder_names(&self.containers_run().join(service)) {
                if let Some(number) = generation.strip_prefix('g').and_then(|n| n.parse().ok()) {
                    ids.push(ContainerId { service: name.clone(), generation: Generation(number) });
                }
            }
        }
        ids.sort();
        ids
    }
}

/// Names in a folder that are UTF-8; none when there is no folder.
pub(crate) fn folder_names(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_run_folders_never_share_a_cgroup() {
        let usual = Layout::new(RUN_DIR.into(), STATE_DIR.into());
        let one = Layout::new("/tmp/a".into(), "/tmp/s".into());
        let two = Layout::new("/tmp/b".into(), "/tmp/s".into());
        assert_eq!(usual.cgroup, Path::new("warmswap"));
        assert_ne!(one.cgroup, two.cgroup);
        assert!(one.cgroup.starts_with("warmswap"));
    }
}
