//! What a group has used, from v2 or from the v1 controllers.

use std::fs;
use std::path::Path;

use super::{Group, limits};
use crate::{BackendError, ContainerUsage};

/// Values whose controller this host lacks are 0.
pub(crate) fn read_usage(group: &Group<'_>) -> Result<ContainerUsage, BackendError> {
    let v2 = group.v2();
    // CPU time is counted by v2 itself, also where the cpu controller is in v1.
    let cpu = super::read(&v2.join("cpu.stat"))?;
    let mut usage = ContainerUsage {
        cpu_ns: field(&cpu, "usage_usec").unwrap_or(0) * 1000,
        throttled_ns: field(&cpu, "throttled_usec").unwrap_or(0) * 1000,
        memory_bytes_max: limits::memory_max(group),
        ..ContainerUsage::default()
    };
    if !group.hierarchies.has_v2("cpu")
        && let Some(v1) = group.v1("cpu")
    {
        usage.throttled_ns = field(&text(&v1, "cpu.stat"), "throttled_time").unwrap_or(0);
    }
    if group.hierarchies.has_v2("memory") {
        usage.memory_bytes = number(&v2, "memory.current");
        usage.oom_kills = field(&text(&v2, "memory.events"), "oom_kill").unwrap_or(0);
    } else if let Some(v1) = group.v1("memory") {
        usage.memory_bytes = number(&v1, "memory.usage_in_bytes");
        usage.oom_kills = field(&text(&v1, "memory.oom_control"), "oom_kill").unwrap_or(0);
    }
    (usage.read_bytes, usage.written_bytes) = if group.hierarchies.has_v2("io") {
        io_stat(&text(&v2, "io.stat"))
    } else if let Some(v1) = group.v1("blkio") {
        blkio(&text(&v1, "blkio.throttle.io_service_bytes_recursive"))
    } else {
        (0, 0)
    };
    Ok(usage)
}

fn text(folder: &Path, file: &str) -> String {
    fs::read_to_string(folder.join(file)).unwrap_or_default()
}

fn number(folder: &Path, file: &str) -> u64 {
    text(folder, file).trim().parse().unwrap_or(0)
}

/// The value of a line `name value`.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

/// Bytes read and written over all devices: `8:0 rbytes=1 wbytes=2 rios=…`.
fn io_stat(text: &str) -> (u64, u64) {
    let sum =
        |key: &str| text.split_ascii_whitespace().filter_map(|word| word.strip_prefix(key)?.parse::<u64>().ok()).sum();
    (sum("rbytes="), sum("wbytes="))
}

/// The same from v1: `8:0 Read 1` and a total at the end.
fn blkio(text: &str) -> (u64, u64) {
    let sum = |operation: &str| {
        text.lines()
            .filter_map(|line| {
                let mut words = line.split(' ');
                let (_device, op, value) = (words.next()?, words.next()?, words.next()?);
                (op == operation).then(|| value.parse::<u64>().ok())?
            })
            .sum()
    };
    (sum("Read"), sum("Write"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_summed_over_devices() {
        assert_eq!(io_stat("8:0 rbytes=10 wbytes=20 rios=1\n8:16 rbytes=1 wbytes=2 rios=1\n"), (11, 22));
        let v1 = "8:0 Read 10\n8:0 Write 20\n8:0 Sync 5\n8:0 Total 30\n8:16 Read 1\nTotal 31\n";
        assert_eq!(blkio(v1), (11, 20));
        assert_eq!(field("usage_usec 7\nuser_usec 3\n", "user_usec"), Some(3));
        assert_eq!(field("oom_kill_disable 0\nunder_oom 0\noom_kill 4\n", "oom_kill"), Some(4));
    }
}
