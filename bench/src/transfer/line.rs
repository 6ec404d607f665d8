//! What sender and receiver say to each other beside what is measured: whole messages over a stream.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Longer than the largest transfer of the slowest way on a loaded host.
pub(super) const TIMEOUT: Duration = Duration::from_secs(120);
const LEN_MAX: usize = 1 << 20;

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

pub(super) struct Line(pub(super) UnixStream);

impl Line {
    pub(super) fn new(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        Ok(Self(stream))
    }

    pub(super) fn tell(&mut self, message: &impl Serialize) -> Result<()> {
        let bytes = postcard::to_stdvec(message)?;
        self.0.write_all(&u32::try_from(bytes.len())?.to_le_bytes())?;
        self.0.write_all(&bytes)?;
        Ok(())
    }

    pub(super) fn hear<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut len = [0; 4];
        self.0.read_exact(&mut len).context("the other process says nothing more")?;
        let len = u32::from_le_bytes(len) as usize;
        ensure!(len <= LEN_MAX, "a message of {len} bytes is longer than {LEN_MAX}");
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes)?;
        Ok(postcard::from_bytes(&bytes)?)
    }

    pub(super) fn expect_ready(&mut self) -> Result<()> {
        match self.hear()? {
            Answer::Ready => Ok(()),
            Answer::Failed { what } => bail!("the receiver failed: {what}"),
            other => bail!("the receiver said {other:?} instead of being ready"),
        }
    }
}
