//! What this host offers to the probes, for `warmswap check`. Attaches everything for a moment and leaves nothing.

use serde::Serialize;

use crate::btf::{Btf, KERNEL_BTF};
use crate::host::CgroupMounts;
use crate::{Sensor, SensorConfig};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FindingState {
    Ok,
    /// Works, but something is missing.
    Degraded,
    Missing,
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub name: String,
    pub state: FindingState,
    /// What was found.
    pub detail: String,
    /// What to do about it, or what does not work without it; empty when all is well.
    pub advice: String,
}

impl Finding {
    fn new(name: impl Into<String>, state: FindingState, detail: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name: name.into(), state, detail: detail.into(), advice: advice.into() }
    }
}

/// Looks at the host. Never fails: what does not work is a finding.
#[must_use]
pub fn check() -> Vec<Finding> {
    let mut findings = vec![btf(), cgroups()];
    match Sensor::load(SensorConfig::default()) {
        Ok(sensor) => {
            findings.push(Finding::new("bpf", FindingState::Ok, "maps, rings and mapped counters work", ""));
            findings.extend(sensor.probes().iter().map(|probe| {
                let name = format!("probe {}", probe.name);
                match &probe.reason {
                    None => Finding::new(name, FindingState::Ok, probe.hook.clone(), ""),
                    Some(reason) => Finding::new(
                        name,
                        FindingState::Missing,
                        reason.clone(),
                        format!("{} are not seen by it; everything else works", probe.class),
                    ),
                }
            }));
        }
        Err(error) => {
            let advice = "run as root on Linux 5.10 or newer with CONFIG_BPF_SYSCALL and CONFIG_DEBUG_INFO_BTF";
            findings.push(Finding::new("bpf", FindingState::Missing, chain(&error), advice));
        }
    }
    findings
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

fn btf() -> Finding {
    match Btf::of_kernel() {
        Ok(_) => Finding::new("kernel types (BTF)", FindingState::Ok, KERNEL_BTF, ""),
        Err(error) => Finding::new(
            "kernel types (BTF)",
            FindingState::Missing,
            chain(&error),
            "use a kernel with CONFIG_DEBUG_INFO_BTF=y; without it no probe can be loaded",
        ),
    }
}

fn cgroups() -> Finding {
    const NAME: &str = "cgroup hierarchy";
    match CgroupMounts::of_host() {
        Ok(CgroupMounts { v2: Some(v2), v1_block: None, .. }) => {
            Finding::new(NAME, FindingState::Ok, format!("v2 at {}", v2.display()), "")
        }
        Ok(CgroupMounts { v2: Some(v2), v1_block: Some(v1), .. }) => Finding::new(
            NAME,
            FindingState::Degraded,
            format!("v2 at {}, block I/O on v1 at {}", v2.display(), v1.display()),
            "delayed writes cannot be charged to a container; boot with a unified hierarchy to have them",
        ),
        Ok(CgroupMounts { v2: None, .. }) => Finding::new(
            NAME,
            FindingState::Missing,
            "no cgroup v2 hierarchy is mounted",
            "mount one: mount -t cgroup2 none /sys/fs/cgroup/unified",
        ),
        Err(error) => Finding::new(NAME, FindingState::Missing, format!("/proc/self/mountinfo: {error}"), ""),
    }
}
