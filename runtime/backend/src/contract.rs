//! The contract between `handover` and whatever runs containers. Every back end passes the same conformance suite
//! (`conformance.rs`). Calls block; whoever calls from an async task does so on a blocking thread.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use warmswap_model::{CgroupId, Generation, ImageRef, Listen, ServiceName, Signal};

use crate::BackendError;

pub type Result<T> = std::result::Result<T, BackendError>;

/// One container: a generation of a service.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ContainerId {
    pub service: ServiceName,
    pub generation: Generation,
}

impl std::fmt::Display for ContainerId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.service, self.generation)
    }
}

/// A descriptor with the name under which it is passed or kept.
#[derive(Debug)]
pub struct NamedFd {
    pub name: String,
    pub fd: OwnedFd,
}

/// What all generations of a service share.
#[derive(Debug)]
pub struct ServiceGround {
    /// v2 cgroup of the service, parent of its generations'. The listeners, and so the connections accepted from
    /// them, are accounted to it.
    pub cgroup: CgroupId,
    /// In the order of their names. Sockets that accept connections, or take datagrams. Non-blocking, because several
    /// generations wait for the same queue.
    pub listeners: Vec<NamedFd>,
}

/// An image made ready: found, unpacked, its config read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreparedImage {
    pub image: ImageRef,
    /// Identifies the content: changes when the image changes.
    pub digest: String,
    pub entrypoint: Vec<String>,
    pub env: Vec<String>,
    pub working_dir: PathBuf,
    /// `user[:group]`, names or numbers, as in the image config.
    pub user: String,
    /// With which the image wants its program to be told to end.
    #[serde(default)]
    pub stop_signal: Option<Signal>,
    /// Where the (read-only) layers lie, lowest first. One entry for a plain folder.
    pub layers: Vec<PathBuf>,
}

/// What a container may and shall get. `None` leaves a value as it is.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Limits {
    /// Percent of one core.
    pub cpu_pct_max: Option<f64>,
    /// 1 to 10,000, 100 is usual (cgroup v2 scale).
    pub cpu_weight: Option<u32>,
    /// CPUs it may run on.
    pub cpus: Option<Vec<u32>>,
    pub memory_mb_max: Option<f64>,
    /// Protected from reclaim (`memory.low`, or the soft limit on v1).
    pub memory_mb_reserved: Option<f64>,
    /// 1 to 10,000.
    pub disk_weight: Option<u32>,
    pub processes_max: Option<u32>,
}

/// Everything that is needed to create one generation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContainerSpec {
    pub id: ContainerId,
    pub image: PreparedImage,
    /// Replaces the image's entrypoint.
    pub command: Option<Vec<String>>,
    /// Added to the image's environment; the caller adds `LISTEN_FDS` and the like.
    pub env: BTreeMap<String, String>,
    pub limits: Limits,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum ContainerState {
    Created {
        pid: u32,
    },
    Running {
        pid: u32,
    },
    /// Ended: exit code, or the signal that ended it.
    Exited {
        code: Option<i32>,
        signal: Option<i32>,
    },
}

/// Totals since the container was created.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct ContainerUsage {
    pub cpu_ns: u64,
    /// In use now.
    pub memory_bytes: u64,
    /// The ceiling in force; `None` when there is none.
    pub memory_bytes_max: Option<u64>,
    pub oom_kills: u64,
    pub throttled_ns: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
}

/// Begins the names of memory files among [`Backend::kept_fds`].
pub const MEMORY_FILE_PREFIX: &str = "memfd:";

/// Name, among what is to be kept for a container, of an unbound unix datagram socket: [`Backend::create`] binds it where
/// processes of the container reach it, and tells them where in `NOTIFY_SOCKET`.
pub const NOTIFY: &str = "notify";

/// A container that outlived its supervisor.
#[derive(Debug, Clone, PartialEq)]
pub struct FoundContainer {
    pub spec: ContainerSpec,
    pub state: ContainerState,
    pub cgroup: CgroupId,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HostCapacity {
    pub cpus: u32,
    pub memory_mb_available: f64,
    pub memory_mb_total: f64,
}

pub trait Backend: Send + Sync {
    fn name(&self) -> &'static str;

    fn capacity(&self) -> Result<HostCapacity>;

    /// Finds the image, unpacks it when needed and reads its config. Cheap when the content was prepared before.
    fn prepare_image(&self, image: &ImageRef) -> Result<PreparedImage>;

    /// Makes (or finds) the network namespace and cgroups of a service and opens its listeners from inside them.
    /// Listeners that a container of the service was created with are found again, also by a new supervisor. The file
    /// of a unix socket replaces one that we made and nobody holds, and no other.
    fn open_service(&self, service: &ServiceName, listen: &BTreeMap<String, Listen>) -> Result<ServiceGround>;

    /// Removes what [`Self::open_service`] made. All containers of the service must be destroyed before.
    fn close_service(&self, service: &ServiceName) -> Result<()>;

    /// Creates a container that has not begun to run. `fds` become its descriptors 3, 4, … in this order.
    /// `keep` are put into the container's descriptor store as if by [`Self::keep_fd`]; for the one that is called
    /// [`NOTIFY`] see there. Returns its v2 cgroup.
    fn create(&self, spec: &ContainerSpec, fds: Vec<NamedFd>, keep: Vec<NamedFd>) -> Result<CgroupId>;

    fn start(&self, id: &ContainerId) -> Result<()>;

    fn state(&self, id: &ContainerId) -> Result<ContainerState>;

    /// Waits until the container has ended, at most `timeout`; returns the state then.
    fn wait(&self, id: &ContainerId, timeout: Duration) -> Result<ContainerState>;

    /// To the first process of the container.
    fn signal(&self, id: &ContainerId, signal: i32) -> Result<()>;

    /// Whether a process (by its number on the host) is one of the container's.
    fn has_process(&self, id: &ContainerId, pid: i32) -> Result<bool>;

    /// Returns when every process of the container is confirmed frozen.
    fn freeze(&self, id: &ContainerId) -> Result<()>;

    fn thaw(&self, id: &ContainerId) -> Result<()>;

    fn usage(&self, id: &ContainerId) -> Result<ContainerUsage>;

    fn set_limits(&self, id: &ContainerId, limits: &Limits) -> Result<()>;

    /// Ends every process, then removes cgroups, mounts, folders and the shim. Succeeds when nothing is there.
    fn destroy(&self, id: &ContainerId) -> Result<()>;

    /// Containers that exist, whoever created them, in the order of service and generation.
    fn list(&self) -> Result<Vec<FoundContainer>>;

    /// Where the container's standard output and error go.
    fn log_path(&self, id: &ContainerId) -> PathBuf;

    /// Keeps a duplicate that outlives the supervisor *and* the container's processes, until dropped or destroyed.
    /// A descriptor kept under the same name is replaced.
    fn keep_fd(&self, id: &ContainerId, fd: NamedFd) -> Result<()>;

    fn drop_kept_fd(&self, id: &ContainerId, name: &str) -> Result<()>;

    /// Duplicates of everything kept, in the order kept. When whoever kept it was killed and the container runs still: of
    /// what the container itself holds, its descriptors from [`Self::create`] by name and its memory files by
    /// [`MEMORY_FILE_PREFIX`] and their name.
    fn kept_fds(&self, id: &ContainerId) -> Result<Vec<NamedFd>>;
}
