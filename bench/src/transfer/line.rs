//! What sender and receiver say to each other beside what is measured.

use std::path::PathBuf;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

pub(super) use crate::line::{Line, TIMEOUT};

/// A way to bring state to another process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Way {
    Segments,
    SocketCopy,
    TmpfsFile,
}

/// A way to tell another process something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Signal {
    Channel,
    Word,
    Futex,
    IceoryxEvent { folder: PathBuf },
    IceoryxSample { folder: PathBuf },
}

/// To the receiver.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Command {
    Receive {
        way: Way,
        records: u64,
    },
    /// The file is complete.
    File {
        path: PathBuf,
    },
    /// Answer so many signals.
    Echo {
        signal: Signal,
        count: u32,
    },
    End,
}

/// From the receiver.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    /// Everything is set up; the clock may start.
    Ready,
    Received(Received, Effort),
    Echoed,
    Failed {
        what: String,
    },
}

/// CLOCK_MONOTONIC, ns, is the same in both processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Received {
    /// When the first value was read.
    pub(super) first_ns: u64,
    /// When the key of every record was read.
    pub(super) all_ns: u64,
    pub(super) records: u64,
    /// Of all keys, in order.
    pub(super) digest: u64,
}

/// What a transfer cost the receiver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Effort {
    pub(super) user_us: i64,
    pub(super) kernel_us: i64,
    pub(super) page_faults: i64,
}

impl Line {
    pub(super) fn expect_ready(&mut self) -> Result<()> {
        match self.hear()? {
            Answer::Ready => Ok(()),
            Answer::Failed { what } => bail!("the receiver failed: {what}"),
            other => bail!("the receiver said {other:?} instead of being ready"),
        }
    }
}
