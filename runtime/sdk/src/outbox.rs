//! Messages on their way to the supervisor. A full socket (the supervisor is busy, or being restarted) delays them;
//! it never blocks the service.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use warmswap_transfer::channel::{ChannelError, ServiceChannel};
use warmswap_transfer::message::ToSupervisor;

/// Most messages that wait. When there are more, the news about connections is given up and the supervisor is told so
/// (`Failed`): a handover that needed it is called off, the service goes on. News about segments is always kept; there
/// are never more than living segments, because a segment that is retired before it was announced is not announced at all.
pub const OUTBOX_LEN_MAX: usize = 4096;

#[derive(Debug)]
struct Waiting {
    message: ToSupervisor,
    fds: Vec<OwnedFd>,
}

#[derive(Debug, Default)]
pub(crate) struct Outbox(VecDeque<Waiting>);

impl Outbox {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn is_overfull(&self) -> bool {
        self.0.len() > OUTBOX_LEN_MAX
    }

    pub(crate) fn push(&mut self, message: ToSupervisor, fds: Vec<OwnedFd>) {
        self.0.push_back(Waiting { message, fds });
    }

    /// Takes back an announcement of segment `index` that was not sent yet.
    pub(crate) fn forget_segment(&mut self, index: u64) -> bool {
        let before = self.0.len();
        self.0.retain(|waiting| waiting.message != ToSupervisor::Segment { index });
        self.0.len() < before
    }

    pub(crate) fn forget_connections(&mut self) {
        self.0.retain(|waiting| {
            !matches!(waiting.message, ToSupervisor::Connections { .. } | ToSupervisor::ConnectionsClosed { .. })
        });
    }

    /// Sends what fits; true when nothing waits any more.
    pub(crate) fn flush(&mut self, channel: &ServiceChannel) -> Result<bool, ChannelError> {
        while let Some(first) = self.0.front() {
            let fds: Vec<BorrowedFd<'_>> = first.fds.iter().map(AsFd::as_fd).collect();
            if !channel.try_send(&first.message, &fds)? {
                return Ok(false);
            }
            self.0.pop_front();
        }
        Ok(true)
    }

    /// As [`Self::flush`], waiting for room until `deadline`.
    pub(crate) fn flush_until(&mut self, channel: &ServiceChannel, deadline: Instant) -> Result<bool, ChannelError> {
        while let Some(first) = self.0.front() {
            let fds: Vec<BorrowedFd<'_>> = first.fds.iter().map(AsFd::as_fd).collect();
            let left = deadline.saturating_duration_since(Instant::now());
            match channel.send_within(&first.message, &fds, left.max(Duration::from_millis(1))) {
                Ok(()) => {}
                Err(ChannelError::Full { .. }) => return Ok(false),
                Err(error) => return Err(error),
            }
            self.0.pop_front();
        }
        Ok(true)
    }
}
