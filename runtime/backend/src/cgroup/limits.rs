//! Limits as files of v2 or of the v1 controllers.

use std::fs;
use std::path::PathBuf;

use super::{Group, write};
use crate::{BackendError, Limits};

/// Length of the period a CPU quota is counted over, µs: the kernel's own default.
const CPU_PERIOD_US: f64 = 100_000.0;
/// The kernel refuses shorter quotas.
const CPU_QUOTA_US_MIN: f64 = 1_000.0;
const BYTES_PER_MB: f64 = 1024.0 * 1024.0;

/// Writes what is given and leaves the rest as it is. A limit whose controller this host lacks is left out with a
/// warning; a limit that the kernel refuses is an error.
pub(crate) fn write_limits(group: &Group<'_>, limits: &Limits) -> Result<(), BackendError> {
    let target = |v2_controller, v1_controller| target(group, v2_controller, v1_controller);
    if let Some(percent) = limits.cpu_pct_max {
        let quota_us = (percent / 100.0 * CPU_PERIOD_US).round().max(CPU_QUOTA_US_MIN);
        match target("cpu", "cpu") {
            Some(Target::V2(folder)) => write(&folder.join("cpu.max"), &format!("{quota_us} {CPU_PERIOD_US}"))?,
            Some(Target::V1(folder)) => write(&folder.join("cpu.cfs_quota_us"), &quota_us.to_string())?,
            None => missing("cpu", "cpu_pct_max"),
        }
    }
    if let Some(weight) = limits.cpu_weight {
        let weight = weight.clamp(1, 10_000);
        match target("cpu", "cpu") {
            Some(Target::V2(folder)) => write(&folder.join("cpu.weight"), &weight.to_string())?,
            // The usual value is 100 on v2 and 1,024 on v1.
            Some(Target::V1(folder)) => {
                write(&folder.join("cpu.shares"), &(u64::from(weight) * 1024 / 100).max(2).to_string())?;
            }
            None => missing("cpu", "cpu_weight"),
        }
    }
    if let Some(cpus) = &limits.cpus {
        let list = cpus.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        match target("cpuset", "cpuset") {
            Some(Target::V2(folder) | Target::V1(folder)) => write(&folder.join("cpuset.cpus"), &list)?,
            None => missing("cpuset", "cpus"),
        }
    }
    if let Some(mb) = limits.memory_mb_max {
        let bytes = bytes(mb);
        match target("memory", "memory") {
            Some(Target::V2(folder)) => write(&folder.join("memory.max"), &bytes)?,
            Some(Target::V1(folder)) => write(&folder.join("memory.limit_in_bytes"), &bytes)?,
            None => missing("memory", "memory_mb_max"),
        }
    }
    if let Some(mb) = limits.memory_mb_reserved {
        let bytes = bytes(mb);
        match target("memory", "memory") {
            Some(Target::V2(folder)) => write(&folder.join("memory.low"), &bytes)?,
            Some(Target::V1(folder)) => write(&folder.join("memory.soft_limit_in_bytes"), &bytes)?,
            None => missing("memory", "memory_mb_reserved"),
        }
    }
    if let Some(weight) = limits.disk_weight {
        write_disk_weight(group, weight.clamp(1, 10_000))?;
    }
    if let Some(count) = limits.processes_max {
        match target("pids", "pids") {
            Some(Target::V2(folder) | Target::V1(folder)) => write(&folder.join("pids.max"), &count.to_string())?,
            None => missing("pids", "processes_max"),
        }
    }
    Ok(())
}

/// Which weight file there is depends on the I/O scheduler, not only on the cgroup version.
fn write_disk_weight(group: &Group<'_>, weight: u32) -> Result<(), BackendError> {
    let v1_weight = weight.clamp(10, 1000).to_string();
    let v2 = group.v2();
    let mut candidates =
        vec![(v2.join("io.weight"), weight.to_string()), (v2.join("io.bfq.weight"), v1_weight.clone())];
    if let Some(v1) = group.v1("blkio") {
        candidates.push((v1.join("blkio.weight"), v1_weight.clone()));
        candidates.push((v1.join("blkio.bfq.weight"), v1_weight));
    }
    match candidates.into_iter().find(|(path, _)| path.exists()) {
        Some((path, value)) => write(&path, &value),
        None => {
            missing("io", "disk_weight");
            Ok(())
        }
    }
}

enum Target {
    V2(PathBuf),
    V1(PathBuf),
}

fn target(group: &Group<'_>, v2_controller: &str, v1_controller: &str) -> Option<Target> {
    if group.hierarchies.has_v2(v2_controller) {
        return Some(Target::V2(group.v2()));
    }
    group.v1(v1_controller).map(Target::V1)
}

fn missing(controller: &str, limit: &str) {
    tracing::warn!(controller, limit, "this host has no such cgroup controller: the limit is left out");
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "negative and huge values saturate")]
fn bytes(mb: f64) -> String {
    ((mb * BYTES_PER_MB).round() as u64).to_string()
}

/// The memory ceiling in force, in bytes; `None` when there is none.
pub(super) fn memory_max(group: &Group<'_>) -> Option<u64> {
    let path = match target(group, "memory", "memory")? {
        Target::V2(folder) => folder.join("memory.max"),
        Target::V1(folder) => folder.join("memory.limit_in_bytes"),
    };
    let value: u64 = fs::read_to_string(path).ok()?.trim().parse().ok()?;
    // v1 says "none" by the largest page-aligned number.
    (value < (i64::MAX as u64) - (1 << 20)).then_some(value)
}
