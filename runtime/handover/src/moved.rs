//! How state moves, when it is copied: what is forwarded and not kept, what is said of it, and what dies with an owner.
//!
//! State in the shared log is nobody's: the supervisor and the shims keep its segments. State that is copied (ahead, or
//! as a snapshot) is its owner's; what passes through here is of use to the one follower that it was written for.

use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use warmswap_model::{Generation, StateMove};
use warmswap_transfer::message::{Commit, StateKind, ToService};

use crate::attempt::Attempt;
use crate::member::Greeting;
use crate::supervisor::{Stop, Supervisor};

/// What may be left for DELTA after the last round.
const LITTLE_LOG_BYTES: u64 = 256 << 10;
const LITTLE_CONNECTIONS: usize = 16;

pub(crate) fn state_move(kind: StateKind) -> StateMove {
    match kind {
        StateKind::None => StateMove::None,
        StateKind::Resident => StateMove::Resident,
        StateKind::Precopied => StateMove::PreCopied,
        StateKind::Snapshot => StateMove::Snapshot,
    }
}

/// Lives in the memory of its owner.
fn is_copied(state: StateMove) -> bool {
    matches!(state, StateMove::PreCopied | StateMove::Snapshot)
}

/// Why state cannot pass from one to the other, if so.
pub(crate) fn incompatible(from: Generation, old: &Greeting, to: Generation, new: &Greeting) -> Option<String> {
    let (old, new) = (old.state, new.state);
    if old == StateMove::None || old == new {
        return None;
    }
    Some(format!(
        "the state of {from} moves {}, that of {to} {}: it cannot pass from one to the other",
        old.how(),
        new.how()
    ))
}

impl Supervisor {
    pub(crate) fn copies_state(&self, generation: Generation) -> bool {
        self.greeting_of(generation).is_some_and(|greeting| is_copied(greeting.state))
    }

    /// A segment that the present follower, and nobody after it, can use.
    pub(crate) fn pass_segment(&mut self, index: u64, fds: &[OwnedFd]) {
        if let Some(fd) = fds.first() {
            self.forward(&ToService::Segment { index }, &[fd.as_fd()]);
        }
    }

    /// Whether what was found in containers is the service's state.
    pub(crate) fn keeps_segments(&self) -> bool {
        !self.record.greeting.as_ref().is_some_and(|greeting| is_copied(greeting.state))
    }

    /// After SYNC: how the state got there so far, for people.
    pub(crate) fn synced_state(&self, attempt: &mut Attempt) -> String {
        if is_copied(attempt.state) {
            attempt.state_bytes = self.state_moved;
        }
        match attempt.state {
            StateMove::None => "no state".into(),
            StateMove::Resident => format!("{} of state mapped", size(attempt.state_bytes)),
            StateMove::PreCopied => format!("{} of state pre-copied", size(attempt.state_bytes)),
            StateMove::Snapshot => "room for a snapshot of the state mapped".into(),
        }
    }

    /// After DELTA: what was copied while nobody served.
    pub(crate) fn state_in_delta(&self, attempt: &mut Attempt) -> String {
        if !is_copied(attempt.state) {
            return String::new();
        }
        let late = self.state_moved.saturating_sub(attempt.state_bytes);
        attempt.state_bytes = self.state_moved;
        match attempt.state {
            StateMove::Snapshot => format!("snapshot of {}", size(late)),
            _ => format!("{} of changes since SYNC", size(late)),
        }
    }

    /// An owner that did not yield in time, when that is what a snapshot took.
    pub(crate) fn explain_late(attempt: &Attempt, began: Instant, budget: Duration, stop: Stop) -> Stop {
        if attempt.state != StateMove::Snapshot || began.elapsed() < budget {
            return stop;
        }
        let reason = stop.reason;
        Stop::new(format!(
            "{reason}; a snapshot takes the longer the more state there is: raise handover.quiesce_ms_max"
        ))
    }

    /// How long a generation that is worse may take to hand back.
    pub(crate) fn hand_back_time(&self, attempt: &Attempt, usual: Duration) -> Duration {
        match attempt.state {
            StateMove::Snapshot => usual.max(Duration::from_secs_f64(self.record.file.handover.quiesce_ms_max / 1e3)),
            _ => usual,
        }
    }

    /// What is lost when a new owner died, or had to, and its predecessor goes on with what it has.
    pub(crate) fn note_unreturned_state(attempt: &mut Attempt) {
        if attempt.state == StateMove::Snapshot {
            let to = attempt.to;
            attempt.lost.push(format!("what {to} wrote and did not hand back: its state moves as a snapshot"));
        }
    }

    /// Remembers, for whoever asks what is wrong, that a state died with its owner.
    pub(crate) fn note_lost_state(&mut self, owner: Generation, greeting: Option<&Greeting>) {
        let Some(greeting) = greeting.filter(|greeting| is_copied(greeting.state)) else { return };
        let how = greeting.state.how();
        let lost = format!(
            "{owner} died, and its state with it: it moves {how}, so it was in the memory of {owner} alone; the service began \
             again with what its image brings"
        );
        tracing::error!("{}: {lost}", self.service());
        self.state_lost = Some(lost);
    }
}

/// Whether so little happened between two rounds that the follower makes up for it in a fraction of a millisecond.
pub(crate) fn little_between(last: (Option<Commit>, usize), now: (Option<Commit>, usize)) -> bool {
    let connections = now.1.abs_diff(last.1);
    let bytes = match (last.0, now.0) {
        (Some(Commit { position: last, .. }), Some(Commit { position: now, .. })) if last.segment == now.segment => {
            now.offset.abs_diff(last.offset)
        }
        (None, None) => 0,
        _ => u64::MAX,
    };
    connections <= LITTLE_CONNECTIONS && bytes <= LITTLE_LOG_BYTES
}

fn size(bytes: u64) -> String {
    match bytes {
        0..1_048_576 => format!("{} KiB", bytes.div_ceil(1024)),
        _ => format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20)),
    }
}
