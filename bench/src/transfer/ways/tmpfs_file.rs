//! The state as a file in memory, written by the old process and read by the new one.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use super::frames;
use crate::transfer::line::{Command, Line, Received};
use crate::transfer::records::Record;

pub(in crate::transfer) const NAME: &str = "file on tmpfs, serde and postcard";

const FOLDERS: [&str; 2] = ["/dev/shm", "/run"];

/// Removed when dropped.
pub(in crate::transfer) struct Place(PathBuf);

impl Place {
    pub(in crate::transfer) fn new() -> Result<Self> {
        let is_tmpfs = |folder: &&str| statfs(*folder).is_ok_and(|found| found.filesystem_type() == TMPFS_MAGIC);
        let folder = FOLDERS.into_iter().find(is_tmpfs);
        let folder = folder.with_context(|| format!("no tmpfs is mounted on {}", FOLDERS.join(" or ")))?;
        Ok(Self(Path::new(folder).join(format!("warmswap-bench-{}", std::process::id()))))
    }

    pub(in crate::transfer) fn send(&self, line: &mut Line, records: &[Record]) -> Result<()> {
        let mut file = File::create(&self.0).with_context(|| format!("cannot create {}", self.0.display()))?;
        frames::write(&mut file, records)?;
        line.tell(&Command::File { path: self.0.clone() })
    }

    /// So that the next transfer needs new memory, as this one did.
    pub(in crate::transfer) fn clear(&self) {
        // There is nothing to remove when another way was measured.
        let _ = fs::remove_file(&self.0);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.clear();
    }
}

pub(in crate::transfer) fn receive(path: &Path, records: u64) -> Result<(Received, Vec<Record>)> {
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    frames::read(&mut file, records)
}
