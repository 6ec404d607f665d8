//! The owner dies, or stands still, in the middle of its own replacement: the shadow that is ready takes over by force.
//!
//! The alternative is to end the shadow and start the old image again, which takes as long as that image takes to start, while
//! a generation that is warm and knows the state stands beside it. What such a takeover costs is what the death of an owner
//! always costs, its connections, because nobody knows what it had read of them; never its state.

use std::time::{Duration, Instant};

use warmswap_backend::ContainerState;
use warmswap_model::{Generation, Phase, PhaseOutcome, Rung, StateMove, with_causes};

use crate::attempt::Attempt;
use crate::member::{Member, Role};
use crate::protocol::Plan;
use crate::steps::Step;
use crate::supervisor::{Stop, Supervisor};

/// How long a killed process may take to end: it needs a processor for that, and a starved host gives none. Nobody may serve
/// before it has.
const DEATH_TIME_MAX: Duration = Duration::from_secs(30);

impl Supervisor {
    /// Whether the shadow of a handover that failed before PROMOTE should take over: its owner serves nobody, and it could.
    pub(crate) fn must_succeed(&self, attempt: &Attempt) -> bool {
        let ready = |member: &Member| member.ready && member.cooperates() && !member.closed;
        !attempt.promoted
            && attempt.rung >= Rung::Fds
            && self.has_whole_state(attempt)
            && self.members.get(&attempt.to).is_some_and(ready)
            && self.stands_still(attempt.from)
            && !self.stands_still(attempt.to)
    }

    /// Dead or stopped: it serves nobody.
    pub(crate) fn stands_still(&self, generation: Generation) -> bool {
        self.is_dead(generation) || self.is_stopped(generation)
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
        attempt.stopped_at.get_or_insert(began);
        self.end_and_hear(from)?;
        if !self.members.get(&to).is_some_and(|member| member.informed) {
            attempt.state_bytes = self.send_segments(to)?;
        }
        self.activate(plan, to);
        self.inherit(attempt, from, to)?;
        self.connections.clear();
        attempt.record(Phase::Promote, began, PhaseOutcome::Done);
        Ok(())
    }

    /// The new owner is dead or must die; only when that is confirmed may the old one serve again.
    pub(crate) fn take_back(&mut self, attempt: &mut Attempt) -> Result<(), Stop> {
        let (from, to) = (attempt.from, attempt.to);
        attempt.stopped_at.get_or_insert_with(Instant::now);
        self.end_and_hear(to)?;
        self.informed(from)?;
        if self.inherit(attempt, to, from)? {
            Self::note_unreturned_state(attempt);
        }
        Ok(())
    }

    /// The old one, which was to serve again, died or stopped as it was about to: the new one, however bad, is what there is.
    pub(crate) fn keep(&mut self, attempt: &mut Attempt) -> Result<(), Stop> {
        let (from, to) = (attempt.from, attempt.to);
        self.end_and_hear(from)?;
        self.inherit(attempt, from, to)?;
        Ok(())
    }

    /// Going back failed because the new owner could not be confirmed dead; now it is. Whether its predecessor, which has been
    /// parked since, serves.
    pub(crate) fn parked_takes_over(&mut self, dead: Generation) -> bool {
        let parked = self.members.values().filter(|member| member.role == Role::Parked);
        for heir in parked.map(|member| member.id.generation).collect::<Vec<_>>() {
            let mut attempt = Attempt::new(0, heir, dead, self.record.version());
            if let Err(stop) = self.take_back(&mut attempt) {
                tracing::error!("{heir} of {} cannot take back: {}", self.service(), stop.reason);
                self.discard(heir);
                continue;
            }
            if let Err(stop) = self.discard_follower_of(heir, dead) {
                tracing::warn!("{}", stop.reason);
            }
            self.remember_owner(heir);
            if let Err(error) = self.journal.rewrite(&self.record) {
                tracing::error!("{}", with_causes(&error));
            }
            return true;
        }
        false
    }

    /// What it said last may still be on the way: segments that hold acknowledged writes, connections.
    fn end_and_hear(&mut self, generation: Generation) -> Result<(), Stop> {
        self.confirm_dead(generation)?;
        self.read_rest(generation);
        Ok(())
    }

    /// Makes `heir` the owner after `dead`, which is; whether that one had begun to serve.
    fn inherit(&mut self, attempt: &mut Attempt, dead: Generation, heir: Generation) -> Result<bool, Stop> {
        self.ownership.release(dead.0);
        let served = self.ownership.servings() != attempt.servings;
        self.about_to_write("promoted");
        self.journal
            .promoted(attempt.handover, heir, self.greeting_of(heir))
            .map_err(|error| Stop::new(with_causes(&error)))?;
        self.own_word(heir, false);
        if heir == attempt.to {
            attempt.promoted = true;
            attempt.undo.clear();
        }
        // At once, as in `switch`: whatever is heard of it, this is who serves.
        self.exchange_roles(dead, heir);
        self.set_role(dead, Role::Draining);
        self.tell_own(heir, attempt.handover, None, None, false)?;
        self.await_serving(heir, attempt.handover)?;
        // Nobody knows what the dead one had read of them, so their clients are told by a closed connection.
        if served && !self.connections.is_empty() {
            attempt.lost.push(format!("{} connections closed when {dead} died", self.connections.len()));
        }
        attempt.end_blackout();
        Ok(served)
    }

    /// Ends a generation and waits until it is known to be dead, for only then may another serve.
    pub(crate) fn confirm_dead(&mut self, generation: Generation) -> Result<(), Stop> {
        let id = self.container(generation);
        self.steps.take(Step::Backend("kill", generation));
        let _ = self.backend.signal(&id, libc::SIGKILL); // fails when it is dead already, which the wait confirms
        match self.backend.wait(&id, DEATH_TIME_MAX) {
            Ok(ContainerState::Exited { .. }) => Ok(()),
            other => Err(Stop::new(format!("{generation} cannot be confirmed dead ({other:?})"))),
        }
    }
}
