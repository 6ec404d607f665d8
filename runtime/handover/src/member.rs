//! One generation as its supervisor sees it.

use std::io::PipeWriter;
use std::time::Instant;

use warmswap_backend::{Backend, ContainerId, PreparedImage, has_ended};
use warmswap_model::{CgroupId, Generation, StateMove};
use warmswap_transfer::channel::SupervisorChannel;

use crate::notify::Spoken;

#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Started and warmed, does not serve.
    Shadow,
    /// Serves.
    Owner,
    /// Served until the last handover, which is not decided yet.
    Parked,
    /// Finishes what is left, then ends.
    Draining,
}

/// What a process that links the SDK said about itself.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Greeting {
    pub schemas_read: Vec<u32>,
    pub schema_written: u32,
    #[serde(default)]
    pub state: StateMove,
    /// Older schemas that it writes as well while a generation follows it that needs them.
    #[serde(default)]
    pub schemas_written_back: Vec<u32>,
}

impl Greeting {
    /// Why a generation that greeted as `old` did cannot take back over once this one has written; `None` when it can.
    pub(crate) fn no_state_rollback(&self, old: &Self) -> Option<String> {
        let (new, read) = (self.schema_written, &old.schemas_read);
        let follows = read.contains(&new) || self.schemas_written_back.contains(&old.schema_written);
        (!follows).then(|| format!("no state rollback: schema {new} is written, the generation before reads {read:?}"))
    }
}

#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) id: ContainerId,
    pub(crate) image: PreparedImage,
    pub(crate) cgroup: CgroupId,
    pub(crate) role: Role,
    pub(crate) channel: SupervisorChannel,
    /// Set once it spoke: it links the SDK and takes part in full.
    pub(crate) greeting: Option<Greeting>,
    pub(crate) ready: bool,
    /// It was sent the state as it was and has heard of every change since, so that it may become owner. News must not
    /// come before the state: a log is read from its oldest segment on.
    pub(crate) informed: bool,
    /// Its end of the conversation is closed: it is dead, about to be, or closed every descriptor it did not know.
    pub(crate) closed: bool,
    /// The process that is known to speak for it.
    pub(crate) speaker: Option<i32>,
    /// Messages from it that nobody could understand.
    pub(crate) garbled: u32,
    pub(crate) drain_until: Option<Instant>,
    /// What it said by the conventions of systemd.
    pub(crate) spoken: Spoken,
    /// The other end of the pipe by which it sees that this supervisor lives. Each has its own, because whoever holds the
    /// reading end of a pipe can open it for writing.
    pub(crate) lifeline: Option<PipeWriter>,
    /// It said something that nobody wanted to hear, and the log has it.
    pub(crate) noted: bool,
}

impl Member {
    pub(crate) fn cooperates(&self) -> bool {
        self.greeting.is_some()
    }

    /// Whether `sender` is known to be no process of the container. A channel that got into other hands, by a leak or on
    /// purpose, speaks for nobody. What a process said that has ended since, and cannot be looked up any more, counts: it may
    /// hold the last acknowledged writes.
    pub(crate) fn is_stranger(&mut self, backend: &dyn Backend, sender: i32) -> bool {
        if self.speaker == Some(sender) {
            return false;
        }
        match backend.has_process(&self.id, sender) {
            Ok(true) => {
                self.speaker = Some(sender);
                false
            }
            Ok(false) => !has_ended(sender),
            Err(_) => false,
        }
    }

    /// Holds duplicates of the owner's connections and follows its log.
    pub(crate) fn follows(&self) -> bool {
        self.informed && self.cooperates() && !self.closed && matches!(self.role, Role::Shadow | Role::Parked)
    }
}

/// A generation for `warmswap status`.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct MemberStatus {
    pub generation: Generation,
    pub role: Role,
    pub image: String,
    pub cgroup: CgroupId,
    /// It links the SDK: connections and state move with a handover.
    pub cooperates: bool,
    /// What it says of itself by `sd_notify`.
    pub says: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_comes_back_to_who_reads_what_is_written() {
        let greeting = |schema_written, read: &[u32], back: &[u32]| Greeting {
            schemas_read: read.to_vec(),
            schema_written,
            schemas_written_back: back.to_vec(),
            state: StateMove::Resident,
        };
        let old = greeting(1, &[1], &[]);
        assert_eq!(greeting(1, &[1], &[]).no_state_rollback(&old), None);
        assert_eq!(greeting(2, &[1, 2], &[1]).no_state_rollback(&old), None);
        assert_eq!(greeting(2, &[2], &[]).no_state_rollback(&greeting(1, &[1, 2], &[])), None);
        let reason = greeting(2, &[1, 2], &[]).no_state_rollback(&old).unwrap();
        assert_eq!(reason, "no state rollback: schema 2 is written, the generation before reads [1]");
    }
}
