//! Containers and cgroups behind one trait.
//!
//! [`EmbeddedBackend`] runs containers itself, [`FakeBackend`] only pretends to, for tests. Whoever embeds it calls [`internal_main`] first in `main`, because its
//! helper processes are re-executed copies of the same program.
//!
//! Not here: what a service is, when it is updated and how much it gets.

mod cgroup;
mod contract;
mod embedded;
mod error;
mod fake;
mod host;
mod image;
mod inside;
mod layout;
mod process;

pub use contract::{
    Backend, ContainerId, ContainerSpec, ContainerState, ContainerUsage, FoundContainer, HostCapacity, Limits,
    MEMORY_FILE_PREFIX, NOTIFY, NamedFd, PreparedImage, Result, ServiceGround,
};
#[cfg(fuzzing)]
pub use embedded::fuzz_wire;
pub use embedded::{EmbeddedBackend, EmbeddedConfig, internal_main, leftovers, purge};
pub use error::BackendError;
pub use fake::{Call, FakeBackend};
pub use host::{Finding, check};
pub use layout::{RUN_DIR, STATE_DIR};
pub use process::{Standstill, has_ended};
