//! The owner dies, or stands still, in the middle of its own replacement: the shadow that is ready takes over by force.
//!
//! The alternative is to end the shadow and start the old image again, which takes as long as that image takes to start, while
//! a generation that is warm and knows the state stands beside it. What such a takeover costs is what the death of an owner
//! always costs, its connections, because nobody knows what it had read of them; never its state.

use std::time::Instant;

use warmswap_backend::{ContainerState, is_stopped};
use warmswap_model::{Blackout, Generation, Phase, PhaseOutcome, Rung, StateMove, with_causes};

use crate::attempt::Attempt;
use crate::member::{Member, Role};
use crate::protocol::Plan;
use crate::steps::Step;
use crate::supervisor::{OWNED_TIME_MAX, Stop, Supervisor};

impl Supervisor {
    /// Runs, but stopped by a signal: it answers nobody until somebody else continues it, if ever.
    pub(crate) fn is_stopped(&self, generation: Generation) -> bool {
        matches!(self.backend.state(&self.container(generation)),
            Ok(ContainerState::Running { pid }) if is_stopped(pid))
    }

    /// Whether the shadow of a handover that failed before PROMOTE should take over: its owner serves nobody, and it could.
    pub(crate) fn must_succeed(&self, attempt: &Attempt) -> bool {
        let ready = |member: &Member| member.ready && member.cooperates() && !member.closed;
        !attempt.promoted
            && attempt.rung >= Rung::Fds
            && self.has_whole_state(attempt)
            && self.members.get(&attempt.to).is_some_and(ready)
            && (self.is_dead(attempt.from) || self.is_stopped(attempt.from))
            && !self.is_dead(attempt.to)
            && !self.is_stopped(attempt.to)
    }

    /// State in the shared log is there for whoever comes. What is copied has arrived when SYNC has ended, or never does.
    fn has_whole_state(&self, attempt: &Attempt) -> bool {
        let synced =
            || attempt.phases.iter().any(|timing| timing.phase == Phase::Sync && timing.outcome == PhaseOutcome::Done);
        match attempt.state {
            StateMove::PreCopied => synced(),
            StateMove::Snapshot => false,
            StateMove::Resident | StateMove::None => true,
        }
    }

    /// Makes the shadow the owner without the old owner's help.
    pub(crate) fn succeed(&mut self, plan: &Plan, attempt: &mut Attempt) -> Result<(), Stop> {
        let (from, to) = (attempt.from, attempt.to);
        let began = Instant::now();
        self.confirm_dead(from)?;
        // What it said last may still be on the way, and what it said of its state holds acknowledged writes.
        self.read_rest(from);
        if !self.members.get(&to).is_some_and(|member| member.informed) {
            attempt.state_bytes = self.send_segments(to)?;
        }
        self.activate(plan, to);
        self.ownership.release(from.0);
        self.about_to_write("promoted");
        self.journal
            .promoted(attempt.handover, to, self.greeting_of(to))
            .map_err(|error| Stop::new(with_causes(&error)))?;
        self.own_word(to, false);
        attempt.promoted = true;
        attempt.undo.clear();
        self.exchange_roles(from, to);
        self.set_role(from, Role::Draining);
        self.tell_own(to, attempt.handover, None, None, false)?;
        self.await_serving(to, attempt.handover)?;
        if !self.connections.is_empty() {
            attempt.lost.push(format!("{} connections closed when {from} died", self.connections.len()));
            self.connections.clear();
        }
        attempt.record(Phase::Promote, began, PhaseOutcome::Done);
        attempt.blackouts.push(Blackout { us: began.elapsed().as_secs_f64() * 1e6, measured_in_kernel: false });
        Ok(())
    }

    /// Ends a generation and waits until it is known to be dead, for only then may another serve.
    pub(crate) fn confirm_dead(&mut self, generation: Generation) -> Result<(), Stop> {
        let id = self.container(generation);
        self.steps.take(Step::Backend("kill", generation));
        let _ = self.backend.signal(&id, libc::SIGKILL); // fails when it is dead already, which the wait confirms
        match self.backend.wait(&id, OWNED_TIME_MAX) {
            Ok(ContainerState::Exited { .. }) => Ok(()),
            other => Err(Stop::new(format!("{generation} cannot be confirmed dead ({other:?})"))),
        }
    }
}
