//! Names and numbers that identify things.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The name of a service: 1 to 63 of `a-z`, `0-9` and `-`, beginning and ending with a letter or digit,
/// so that it can stand in a path, a cgroup, a network namespace and a metric label unchanged.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ServiceName(String);

/// Why a text is no service name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is no service name: use 1 to 63 of a-z, 0-9 and -, beginning and ending with a letter or digit")]
pub struct InvalidServiceName {
    /// What was given.
    pub name: String,
}

impl ServiceName {
    pub const LENGTH_MAX: usize = 63;

    pub fn new(name: impl Into<String>) -> Result<Self, InvalidServiceName> {
        let name = name.into();
        let plain = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let bytes = name.as_bytes();
        let well_formed = (1..=Self::LENGTH_MAX).contains(&bytes.len())
            && bytes.iter().all(|b| plain(b) || *b == b'-')
            && bytes.first().is_some_and(plain)
            && bytes.last().is_some_and(plain);
        if well_formed { Ok(Self(name)) } else { Err(InvalidServiceName { name }) }
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl TryFrom<String> for ServiceName {
    type Error = InvalidServiceName;
    fn try_from(name: String) -> Result<Self, Self::Error> {
        Self::new(name)
    }
}

impl From<ServiceName> for String {
    fn from(name: ServiceName) -> Self {
        name.0
    }
}

impl FromStr for ServiceName {
    type Err = InvalidServiceName;
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::new(name)
    }
}

/// One container of a service. Counts up from 1 and is never used twice for the same service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u32);

impl Generation {
    pub const FIRST: Self = Self(1);

    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.checked_add(1).expect("4 billion generations of one service"))
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("g{}", self.0))
    }
}

/// The kernel's id of a cgroup v2 directory (its inode number), as `bpf_get_current_cgroup_id` returns it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CgroupId(pub u64);

impl fmt::Display for CgroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn service_names_are_safe_in_paths() {
        for good in ["a", "a1", "session-store", &"x".repeat(63)] {
            assert_eq!(ServiceName::new(good).map(|n| n.to_string()).as_deref(), Ok(good));
        }
        for bad in ["", "-a", "a-", "A", "a/b", "..", "a.b", "ä", &"x".repeat(64)] {
            assert!(ServiceName::new(bad).is_err(), "{bad:?} was accepted");
        }
    }
}
