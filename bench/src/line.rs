//! What two processes of a suite say to each other beside what is measured: whole messages over a stream.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longer than the longest thing that one of them does on a loaded host.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(120);
const LEN_MAX: usize = 1 << 20;

pub(crate) struct Line(pub(crate) UnixStream);

impl Line {
    pub(crate) fn new(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        Ok(Self(stream))
    }

    pub(crate) fn tell(&mut self, message: &impl Serialize) -> Result<()> {
        let bytes = postcard::to_stdvec(message)?;
        self.0.write_all(&u32::try_from(bytes.len())?.to_le_bytes())?;
        self.0.write_all(&bytes)?;
        Ok(())
    }

    pub(crate) fn hear<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut len = [0; 4];
        self.0.read_exact(&mut len).context("the other process says nothing more")?;
        let len = u32::from_le_bytes(len) as usize;
        ensure!(len <= LEN_MAX, "a message of {len} bytes is longer than {LEN_MAX}");
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes)?;
        Ok(postcard::from_bytes(&bytes)?)
    }
}
