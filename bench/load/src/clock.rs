//! CLOCK_MONOTONIC in nanoseconds: the clock of `bpf_ktime_get_ns`, so that times here and marks of the kernel can be
//! laid over one another.

use std::time::{SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};

/// Now, ns since boot without suspend.
#[must_use]
pub fn monotonic_ns() -> u64 {
    // It cannot fail for this clock and a valid pointer; 0 would only shift the picture.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
}

/// Wall clock, ms since 1970.
#[must_use]
pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}
