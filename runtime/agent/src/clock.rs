//! The wall clock, in one place: decisions get it as an argument.

use std::time::{SystemTime, UNIX_EPOCH};

/// Unix time, ms; 0 before 1970.
pub(crate) fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
