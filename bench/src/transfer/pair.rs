//! The sender's side of the two processes, and what is measured with them.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use warmswap_load::monotonic_ns;
use warmswap_transfer::channel::{ServiceChannel, SupervisorChannel};

use super::line::{Answer, Command, Effort, Line, Received, Signal, Way};
use super::receiver;
use super::records::{Record, digest};
use super::signals;
use super::ways::segments::Source;
use super::ways::socket_copy;
use super::ways::tmpfs_file::Place;
use crate::process;

/// A receiver in a process of its own. Ended when dropped.
pub(super) struct Pair {
    child: Child,
    channel: SupervisorChannel,
    line: Line,
}

/// How long one transfer took, µs, and what it cost.
#[derive(Debug, Clone, Copy)]
pub(super) struct Took {
    pub(super) first_us: f64,
    pub(super) all_us: f64,
    pub(super) effort: Effort,
}

/// The same state, ready to be sent in each way.
pub(super) struct State {
    records: Vec<Record>,
    digest: u64,
    source: Source,
    place: Place,
}

impl State {
    pub(super) fn new(records: Vec<Record>) -> Result<Self> {
        let digest = records.iter().fold(0, |before, record| digest(before, &record.key.0));
        Ok(Self { source: Source::new(&records)?, place: Place::new()?, digest, records })
    }
}

impl Pair {
    pub(super) fn start() -> Result<Self> {
        let (channel, theirs): (_, ServiceChannel) = SupervisorChannel::pair()?;
        let (line, their_line) = UnixStream::pair()?;
        let child = process::command(&std::env::current_exe()?)
            .arg(receiver::COMMAND)
            .stdin(Stdio::from(theirs.into_fd()))
            .stdout(Stdio::from(OwnedFd::from(their_line)))
            .spawn()
            .context("cannot start the receiver")?;
        Ok(Self { child, channel, line: Line::new(line)? })
    }

    pub(super) fn transfer(&mut self, way: Way, state: &State) -> Result<Took> {
        let records = state.records.len() as u64;
        self.line.tell(&Command::Receive { way, records })?;
        self.line.expect_ready()?;
        let began_ns = monotonic_ns();
        match way {
            Way::Segments => state.source.send(&self.channel)?,
            Way::SocketCopy => socket_copy::send(&mut self.line.0, &state.records)?,
            Way::TmpfsFile => state.place.send(&mut self.line, &state.records)?,
        }
        let (received, effort): (Received, Effort) = match self.line.hear()? {
            Answer::Received(received, effort) => (received, effort),
            Answer::Failed { what } => bail!("the receiver failed: {what}"),
            other => bail!("the receiver said {other:?} after a transfer"),
        };
        state.place.clear();
        ensure!(received.digest == state.digest, "{way:?} did not bring the same keys");
        let us = |at_ns: u64| at_ns.saturating_sub(began_ns) as f64 / 1e3;
        Ok(Took { first_us: us(received.first_ns), all_us: us(received.all_ns), effort })
    }

    pub(super) fn signal(&mut self, signal: &Signal, count: u32) -> Result<Vec<f64>> {
        signals::measure(signal, count, &mut self.channel, &mut self.line)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // Killed all the same when it does not listen: it may be in the middle of something.
        let _ = self.line.tell(&Command::End);
        if process::within(std::time::Duration::from_secs(2), || self.child.try_wait().transpose()).is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
