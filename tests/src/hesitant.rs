//! A shadow that waits at a place of its handover, so that a scenario can do something exactly there: what it
//! (`tests/src/bin/hesitant.rs`) and the scenario agree on.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Is there once it waits.
pub const HESITATES: &str = "/tmp/hesitates";
/// It goes on once this is there.
pub const GO_ON: &str = "/tmp/go-on";

/// The process, as the host sees it.
#[derive(Debug)]
pub struct Hesitant {
    pid: i32,
}

impl Hesitant {
    /// `None` when this process does not wait (yet).
    #[must_use]
    pub fn find(pid: i32) -> Option<Self> {
        let found = Self { pid };
        found.inside(HESITATES).exists().then_some(found)
    }

    /// # Errors
    /// When the process has ended.
    pub fn go_on(&self) -> io::Result<()> {
        fs::write(self.inside(GO_ON), "")
    }

    /// A path of its container.
    fn inside(&self, path: &str) -> PathBuf {
        Path::new("/proc").join(self.pid.to_string()).join("root").join(path.trim_start_matches('/'))
    }
}
