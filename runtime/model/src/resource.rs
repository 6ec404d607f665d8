//! The four resources that are watched, forecast and reserved.

use std::fmt;
use std::ops::{Index, IndexMut};

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resource {
    /// Percent of one core: 150 is one core and a half.
    Cpu,
    /// MiB in use.
    Memory,
    /// Mbit/s, both directions together.
    Network,
    /// MB/s, reads and writes together.
    Disk,
}

impl Resource {
    pub const ALL: [Self; 4] = [Self::Cpu, Self::Memory, Self::Network, Self::Disk];

    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Network => "network",
            Self::Disk => "disk",
        }
    }

    #[must_use]
    pub const fn unit(self) -> &'static str {
        match self {
            Self::Cpu => "%",
            Self::Memory => "MB",
            Self::Network => "Mbps",
            Self::Disk => "MB/s",
        }
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// One value for each [`Resource`].
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct PerResource<T> {
    pub cpu: T,
    pub memory: T,
    pub network: T,
    pub disk: T,
}

impl<T> PerResource<T> {
    pub fn from_fn(mut make: impl FnMut(Resource) -> T) -> Self {
        Self {
            cpu: make(Resource::Cpu),
            memory: make(Resource::Memory),
            network: make(Resource::Network),
            disk: make(Resource::Disk),
        }
    }

    pub fn map<U>(&self, mut change: impl FnMut(Resource, &T) -> U) -> PerResource<U> {
        PerResource::from_fn(|r| change(r, &self[r]))
    }
}

impl<T> Index<Resource> for PerResource<T> {
    type Output = T;
    fn index(&self, resource: Resource) -> &T {
        match resource {
            Resource::Cpu => &self.cpu,
            Resource::Memory => &self.memory,
            Resource::Network => &self.network,
            Resource::Disk => &self.disk,
        }
    }
}

impl<T> IndexMut<Resource> for PerResource<T> {
    fn index_mut(&mut self, resource: Resource) -> &mut T {
        match resource {
            Resource::Cpu => &mut self.cpu,
            Resource::Memory => &mut self.memory,
            Resource::Network => &mut self.network,
            Resource::Disk => &mut self.disk,
        }
    }
}
