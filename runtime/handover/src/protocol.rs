//! A handover, from lease to commit.
//!
//! ```text
//!  RESERVE ─▶ WARM ─▶ SYNC ─▶ QUIESCE ─▶ DELTA ─▶ PROMOTE ─▶ VERIFY ─▶ COMMIT
//!     │         │       │        │         │         │          │
//!     ▼         ▼       ▼        ▼         ▼         ▼          ▼
//!     └──── undo in reverse; the active goes on ─────┘      switch back: the same
//!           serving: *aborted*                              steps reversed: *rolled back*
//! ```
//!
//! [`Supervisor::phases`] is that line as code. Everything before PROMOTE pushes what undoes it; PROMOTE is one journal
//! record and one store to the control word. Between QUIESCE and the answer to `Own` nobody serves, so nothing in
//! [`Supervisor::switch`] allocates by state or connection, prints, or talks to a disk that waits.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use warmswap_backend::{BackendError, ContainerState};
use warmswap_model::{
    Blackout, ConnectionCounts, DemandVector, Generation, HandoverReport, ImageRef, PerResource, Phase, PhaseOutcome,
    Rung, ServiceFile, StateMove, Trigger, Verdict, with_causes,
};
use warmswap_transfer::message::{Commit, ToService};

use crate::attempt::{Attempt, Undo};
use crate::conditions::Progress;
use crate::journal::Version;
use crate::member::{Member, Role};
use crate::moved::{incompatible, little_between};
use crate::notify::FdStore;
use crate::ports::Ports;
use crate::priority::{Hastened, Urgent};
use crate::steps::Step;
use crate::supervisor::{Notice, OWNED_TIME_MAX, Stop, Supervisor};
use crate::way_back::HAND_BACK_TIME_MAX;

/// How far back "before" reaches.
const BASELINE: Duration = Duration::from_secs(10);
/// How long a process that is told to own may take to say that it serves, where another one waits that would take back. A
/// longer budget for the blackout is one for this as well: a snapshot has to be read.
const PROMOTE_TIME_MAX: Duration = Duration::from_secs(1);
/// SYNC repeats until a round adds nothing, at most this often.
const SYNC_ROUNDS_MAX: u32 = 16;
/// How long COMMIT itself waits for the old generation; after that it drains beside the next handover.
const COMMIT_WAIT: Duration = Duration::from_secs(1);
/// How long generations sleep before QUIESCE, when nothing wants them: longer than others run on a busy CPU before the scheduler
/// looks at it again, which is a tick, or the slice of an ordinary thread.
const REST: Duration = Duration::from_millis(10);

/// What to do, decided by somebody else.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    pub handover: u64,
    pub trigger: Trigger,
    pub image: ImageRef,
    /// Settings that come with it, and the folder for its relative paths: one that the supervisor [accepts](Supervisor::accepts).
    pub file: Option<(ServiceFile, PathBuf)>,
    pub forecast: Option<DemandVector>,
    /// Held for the shadow.
    pub reservation: PerResource<f64>,
    /// CPUs of the shadow until it is to serve; `None`: any.
    pub shadow_cpus: Option<Vec<u32>>,
    /// For tests of what happens when somebody dies or lies at any moment: this process stops itself (SIGSTOP) before the step
    /// with this number, from 1. `HandoverReport::steps` of an undisturbed handover says which ones there are.
    pub stop_before_step: Option<usize>,
}

impl Supervisor {
    /// Hands the service over to a new generation of `plan.image`, or says why not. Blocks until the verdict.
    ///
    /// Whatever happens, a generation serves afterwards if one served before and did not die by itself.
    pub fn update(&mut self, plan: &Plan) -> HandoverReport {
        let started_unix_ms = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX));
        let from = self.owner().unwrap_or(Generation(0));
        let mut attempt = Attempt::new(plan.handover, from, self.record.next_generation, self.record.version());
        if let Some((file, folder)) = &plan.file {
            debug_assert!(self.accepts(file).is_ok());
            (self.record.file, self.record.folder) = (file.clone(), folder.clone());
        }
        self.steps.begin(plan.stop_before_step);
        let mut succeeded = None;
        let result = self.phases(plan, &mut attempt).or_else(|stop| {
            if !self.must_succeed(&attempt) {
                return Err(stop);
            }
            self.succeed(plan, &mut attempt)?;
            succeeded = Some(format!("{}; {} took over its state", stop.reason, attempt.to));
            self.timed(&mut attempt, Phase::Commit, |s, a| s.commit(plan, a))
        });
        let back = result.as_ref().err().map(|_| match self.why_kept(&mut attempt) {
            Some(because) => Ok(Back::Kept(because)),
            None => self.unwind(&mut attempt),
        });
        let (verdict, reason) = match (result, back) {
            (Ok(()), _) => (Verdict::Committed, succeeded),
            (Err(stop), Some(Ok(Back::Kept(because)))) => {
                let kept = format!("{}; kept all the same, because {because}", stop.reason);
                let committed = self.timed(&mut attempt, Phase::Commit, |s, a| s.commit(plan, a));
                debug_assert!(committed.is_ok(), "nothing in COMMIT can fail");
                (Verdict::Committed, Some(kept))
            }
            (Err(stop), back) => {
                let verdict = if attempt.promoted { Verdict::RolledBack } else { Verdict::Aborted };
                let failed = attempt.phases.iter().find(|timing| timing.outcome == PhaseOutcome::Failed);
                let mut reason = match (verdict, failed) {
                    (Verdict::Aborted, Some(timing)) => format!("{} during {}", stop.reason, timing.phase),
                    _ => stop.reason,
                };
                if let Some(Err(trouble)) = back {
                    reason.push_str(&format!("; going back: {}", trouble.reason));
                }
                (verdict, Some(reason))
            }
        };
        self.conclude(&attempt, verdict);
        HandoverReport {
            id: plan.handover,
            service: self.service().clone(),
            from: attempt.from,
            to: attempt.to,
            from_image: attempt.replaced.image.0.display().to_string(),
            to_image: plan.image.0.display().to_string(),
            trigger: plan.trigger.clone(),
            rung: attempt.rung,
            verdict,
            reason,
            lost: attempt.lost,
            started_unix_ms,
            duration_ms: attempt.began.elapsed().as_secs_f64() * 1e3,
            phases: attempt.phases,
            steps: self.steps.end(),
            blackouts: attempt.blackouts,
            connections: attempt.connections,
            state: attempt.state,
            state_bytes: attempt.state_bytes,
            before: attempt.before,
            after: attempt.after,
            forecast: plan.forecast.clone(),
            reservation: plan.reservation,
        }
    }

    /// The phases, in order. Before PROMOTE an error means: undo. After it: switch back.
    fn phases(&mut self, plan: &Plan, attempt: &mut Attempt) -> Result<(), Stop> {
        self.timed(attempt, Phase::Reserve, |s, a| s.reserve(plan, a))?;
        self.timed(attempt, Phase::Warm, |s, a| s.warm(plan, a))?;
        self.timed(attempt, Phase::Sync, |s, a| s.sync(plan, a))?;
        self.quiesce_delta_promote(attempt)?;
        self.timed(attempt, Phase::Verify, |s, a| s.verify(a))?;
        self.timed(attempt, Phase::Commit, |s, a| s.commit(plan, a))
    }

    fn timed(
        &mut self,
        attempt: &mut Attempt,
        phase: Phase,
        step: impl FnOnce(&mut Self, &mut Attempt) -> Result<String, Stop>,
    ) -> Result<(), Stop> {
        self.conditions.progress(&self.record.file.name, &Progress::PhaseBegun { phase });
        let began = Instant::now();
        let result = match self.conditions.cancelled(&self.record.file.name) {
            Some(reason) if phase != Phase::Commit => Err(Stop::new(reason)),
            _ => step(self, attempt),
        };
        let outcome = if result.is_ok() { PhaseOutcome::Done } else { PhaseOutcome::Failed };
        let duration_us = attempt.record(phase, began, outcome);
        let detail = result.as_ref().map_or_else(|stop| stop.reason.clone(), String::clone);
        self.conditions.progress(&self.record.file.name, &Progress::PhaseEnded { phase, outcome, duration_us, detail });
        result.map(drop)
    }

    /// A record of the journal is about to be written.
    pub(crate) fn about_to_write(&self, record: &'static str) {
        self.steps.take(Step::Journal(record));
    }

    fn reserve(&mut self, plan: &Plan, attempt: &mut Attempt) -> Result<String, Stop> {
        if self.owner().is_none() {
            return Err(Stop::new(format!("{} has no generation that serves", self.service())));
        }
        self.about_to_write("begin");
        self.journal
            .begin(attempt.handover, attempt.from, attempt.to, &plan.image, &self.record)
            .map_err(|error| Stop::new(with_causes(&error)))?;
        let (from, to) = (attempt.from, attempt.to);
        let begun = Progress::Begun { handover: attempt.handover, from, to };
        self.conditions.progress(&self.record.file.name, &begun);
        self.conditions.lease(&self.record.file.name, &plan.reservation).map_err(Stop::new)?;
        attempt.undo.push(Undo::ReleaseLease);
        let r = &plan.reservation;
        Ok(format!("{:.0} % CPU, {:.0} MB, {:.1} Mbps, {:.1} MB/s held", r.cpu, r.memory, r.network, r.disk))
    }

    fn warm(&mut self, plan: &Plan, attempt: &mut Attempt) -> Result<String, Stop> {
        let image = plan.image.resolved(&self.record.folder);
        let prepared = self.backend.prepare_image(&image).map_err(|error| Stop::new(with_causes(&error)))?;
        let limits = self.shadow_limits(plan.shadow_cpus.clone(), plan.reservation.memory);
        attempt.undo.push(Undo::DestroyShadow(attempt.to));
        if self.ground.listeners.is_empty() {
            attempt.ports = self.ports_of(attempt.from);
        }
        let to = self.launch(prepared, &limits)?;
        debug_assert_eq!(to, attempt.to);
        attempt.rung = self.rung(attempt.from, to, &attempt.ports)?;
        attempt.state =
            self.greeting_of(attempt.from).filter(|_| attempt.rung == Rung::Full).map_or(StateMove::None, |g| g.state);
        Ok(format!("{to} ready, rung {}", attempt.rung))
    }

    /// How much the two generations can do together.
    fn rung(&self, from: Generation, to: Generation, ports: &Ports) -> Result<Rung, Stop> {
        let greeting = |generation| self.members.get(&generation).and_then(|member| member.greeting.as_ref());
        match (greeting(from), greeting(to)) {
            (Some(old), Some(new)) if new.schemas_read.contains(&old.schema_written) => {
                if let Some(reason) = incompatible(from, old, to, new) {
                    return Err(Stop::new(reason));
                }
                let nothing = self.segments.is_empty() && !self.copies_state(from);
                Ok(if nothing { Rung::Fds } else { Rung::Full })
            }
            (Some(old), Some(new)) => Err(Stop::new(format!(
                "{to} cannot read the state of {from}: it is written in schema {}, {to} reads {:?}",
                old.schema_written, new.schemas_read
            ))),
            (Some(_), None) => Err(Stop::new(format!(
                "{to} does not link the warmswap SDK, or did not join in time, while {from} does: its connections and state \
                 would be lost"
            ))),
            (None, _) => Ok(self.rung_of_a_stranger(ports)),
        }
    }

    fn sync(&mut self, plan: &Plan, attempt: &mut Attempt) -> Result<String, Stop> {
        let (from, to) = (attempt.from, attempt.to);
        if attempt.rung < Rung::Fds {
            let stored = self.stores.get(&to).filter(|stored| !stored.is_empty());
            attempt.state_bytes = stored.map_or(0, FdStore::bytes);
            attempt.lost = self.what_a_stranger_loses(attempt);
            let said = stored.map_or_else(|| "nothing to copy".into(), |stored| format!("{stored} passed on"));
            self.activate(plan, to);
            return Ok(format!("{said}: the program does not link the SDK"));
        }
        let deadline = Instant::now() + Duration::from_secs_f64(self.record.file.handover.sync_s_max);
        // What the owner has not said yet of its state comes before this answer: after a change of schema, that the older
        // log is no part of it any more.
        self.ask_caught_up(from, None, &[from, to], deadline)?;
        attempt.state_bytes = self.send_segments(to)?;
        self.state_moved = 0;
        self.connections.clear();
        attempt.undo.push(Undo::StopFollowing);
        self.tell(from, &ToService::Follow { on: true }, &[])?;
        // The bulk, with a shadow's small share of the CPU: the owner serves meanwhile.
        self.catch_up_round(from, to, deadline)?;
        // Before the last rounds, because both take milliseconds in which the log grows.
        self.activate(plan, to);
        attempt.before = self.conditions.measure(&self.record.file.name, BASELINE);
        self.cancellable = true;
        let rounds = self.catch_up(from, to, deadline);
        self.cancellable = false;
        let rounds = 1 + rounds?;
        let state = self.synced_state(attempt);
        let mut said = format!("{state}, {} connections, {rounds} rounds", self.connections.len());
        said.push_str(&self.schema_change(attempt));
        Ok(said)
    }

    /// Brings the follower to where the owner is, until what is left is small; returns how many rounds it took.
    fn catch_up(&mut self, from: Generation, to: Generation, deadline: Instant) -> Result<u32, Stop> {
        let mut last = None;
        for round in 1..=SYNC_ROUNDS_MAX {
            let now = (self.catch_up_round(from, to, deadline)?, self.connections.len());
            if last.is_some_and(|last| little_between(last, now)) {
                return Ok(round);
            }
            last = Some(now);
        }
        Ok(SYNC_ROUNDS_MAX) // the owner writes faster than rounds end; the rest goes with DELTA
    }

    /// Asks the owner how far it is, then the follower to get there.
    fn catch_up_round(&mut self, from: Generation, to: Generation, deadline: Instant) -> Result<Option<Commit>, Stop> {
        let commit = self.ask_caught_up(from, None, &[from, to], deadline)?;
        self.ask_caught_up(to, commit, &[from, to], deadline)?;
        Ok(commit)
    }

    /// Where a generation is, once it has got to `commit`.
    pub(crate) fn ask_caught_up(
        &mut self,
        side: Generation,
        commit: Option<Commit>,
        both: &[Generation],
        deadline: Instant,
    ) -> Result<Option<Commit>, Stop> {
        self.round += 1;
        let round = self.round;
        self.tell(side, &ToService::CaughtUp { round, commit }, &[])?;
        let left = deadline.saturating_duration_since(Instant::now());
        self.wait_for("catch up", left, both, |who, notice| match notice {
            Notice::CaughtUp { round: of, commit, .. } if who == side && *of == round => Some(*commit),
            _ => None,
        })
    }

    /// The reservation stops being held and is the shadow's: CPUs, weight. Before QUIESCE, because a cgroup write may wait.
    pub(crate) fn activate(&self, plan: &Plan, to: Generation) {
        let cpus = plan.shadow_cpus.as_ref().and_then(|_| self.backend.capacity().ok());
        let cpus = cpus.map(|capacity| (0..capacity.cpus).collect());
        self.steps.take(Step::Backend("set limits of", to));
        if let Err(error) = self.backend.set_limits(&self.container(to), &self.owner_limits(cpus)) {
            tracing::warn!("the limits of {to} stay as they were: {}", with_causes(&error));
        }
    }

    fn quiesce_delta_promote(&mut self, attempt: &mut Attempt) -> Result<(), Stop> {
        let (from, to) = (attempt.from, attempt.to);
        if attempt.rung < Rung::Fds {
            // Both accept from the same listeners; nobody has to stop for the other to serve.
            return self.timed(attempt, Phase::Promote, |s, a| {
                s.about_to_write("promoted");
                s.journal
                    .promoted(a.handover, to, s.greeting_of(to))
                    .map_err(|error| Stop::new(with_causes(&error)))?;
                s.own_word(to, false);
                a.promoted = true;
                a.undo.clear();
                if s.members.get(&to).is_some_and(Member::cooperates) {
                    s.tell_own(to, a.handover, None, None, false)?;
                    s.await_owned(to, a.handover, OWNED_TIME_MAX)?;
                }
                s.exchange_roles(from, to);
                s.say_members();
                Ok(format!("{to} accepts beside {from}"))
            });
        }
        self.rest();
        self.conditions.progress(&self.record.file.name, &Progress::PhaseBegun { phase: Phase::Quiesce });
        attempt.undo.push(Undo::ResumeOwner(from));
        let sent = self.connections.len() as u64;
        let budget = Duration::from_secs_f64(self.record.file.handover.quiesce_ms_max / 1e3);
        let switched = self.switch(attempt, from, to, budget);
        let times = match switched {
            Ok(times) => times,
            Err(SwitchError::Before { began, stop }) => {
                let stop = Self::explain_late(attempt, began, budget, stop);
                attempt.record(Phase::Quiesce, began, PhaseOutcome::Failed);
                self.say_ended(attempt, &stop.reason);
                return Err(stop);
            }
            Err(SwitchError::After { told, yielded, checked, stop }) => {
                attempt.promote([told, yielded, checked, Instant::now()], PhaseOutcome::Failed);
                self.say_ended(attempt, &stop.reason);
                return Err(stop);
            }
        };
        let said = attempt.phases.len();
        attempt.promote([times.told, times.yielded, times.checked, times.owned], PhaseOutcome::Done);
        attempt.connections = ConnectionCounts {
            sent: times.connections_open,
            received: times.connections_adopted,
            closed_meanwhile: sent.saturating_sub(times.connections_open),
        };
        let blackout = self.blackout(attempt.handover, from, to, &times);
        attempt.blackouts.push(blackout);
        let delta = self.state_in_delta(attempt);
        for timing in &attempt.phases[said..] {
            let detail = match timing.phase {
                Phase::Delta => delta.clone(),
                Phase::Promote => format!("blackout {:.0} µs", blackout.us),
                _ => String::new(),
            };
            let (phase, outcome, duration_us) = (timing.phase, timing.outcome, timing.duration_us);
            self.conditions
                .progress(&self.record.file.name, &Progress::PhaseEnded { phase, outcome, duration_us, detail });
        }
        Ok(())
    }

    /// Lets the generations sleep before the switch. Whoever has just had more than its share of a busy CPU is not given it
    /// again before the others have had theirs, however short its slices: it would be waited for while nobody serves.
    fn rest(&mut self) {
        let until = Instant::now() + REST;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            self.pump(left, None);
        }
    }

    fn say_ended(&self, attempt: &Attempt, detail: &str) {
        let Some(timing) = attempt.phases.last() else { return };
        let (phase, outcome, duration_us) = (timing.phase, timing.outcome, timing.duration_us);
        let ended = Progress::PhaseEnded { phase, outcome, duration_us, detail: detail.to_owned() };
        self.conditions.progress(&self.record.file.name, &ended);
    }

    fn blackout(&self, handover: u64, from: Generation, to: Generation, times: &SwitchTimes) -> Blackout {
        let own = Blackout {
            us: times.owned.saturating_duration_since(times.told).as_secs_f64() * 1e6,
            measured_in_kernel: false,
        };
        self.conditions.kernel_blackout(&self.record.file.name, handover, from, to).unwrap_or(own)
    }

    /// Moves ownership from one living generation to another that follows it. Forward and backward alike.
    fn switch(
        &mut self,
        attempt: &mut Attempt,
        from: Generation,
        to: Generation,
        budget: Duration,
    ) -> Result<SwitchTimes, SwitchError> {
        let handover = attempt.handover;
        let budget_us = u64::try_from(budget.as_micros()).unwrap_or(u64::MAX);
        let speakers = [from, to].map(|who| self.members.get(&who).and_then(|member| member.speaker));
        let _hastened = Hastened::processes(speakers.into_iter().flatten());
        let _urgent = Urgent::raise();
        let told = Instant::now();
        let before = |stop| SwitchError::Before { began: told, stop };
        attempt.stopped_at = Some(told);
        self.tell(from, &ToService::Yield { handover, budget_us }, &[]).map_err(before)?;
        // Connections and segments that changed since SYNC arrive before `Yielded` and are forwarded on the way.
        let (commit, connections_open) = self
            .wait_for("stop serving", budget, &[from, to], |who, notice| match notice {
                Notice::Yielded { handover: of, commit, connections_open } if who == from && *of == handover => {
                    Some((*commit, *connections_open))
                }
                _ => None,
            })
            .map_err(before)?;
        let yielded = Instant::now();
        // Heard in the same breath as `Yielded`, or it would be taken for the answer to `Own`.
        if let Some(stop) = self.unheard_failure(to) {
            return Err(before(stop));
        }
        let forwarded = self.connections.len() as u64;
        if forwarded != connections_open {
            let reason = format!("{from} has {connections_open} connections but {forwarded} reached {to}");
            return Err(before(Stop::new(reason)));
        }
        self.informed(to).map_err(before)?;
        if self.ownership.holder() != 0 {
            let reason = format!("this supervisor stood still for so long that {from} serves again by itself");
            return Err(before(Stop::new(reason)));
        }
        if from == attempt.from {
            attempt.servings = self.ownership.servings();
        }
        let checked = Instant::now();
        self.about_to_write("promoted");
        self.journal
            .promoted(handover, to, self.greeting_of(to))
            .map_err(|error| SwitchError::Before { began: told, stop: Stop::new(with_causes(&error)) })?;
        self.own_word(to, true);
        // At once: from here on the new owner may serve, whether it says so or not, and what it writes must reach the old one.
        self.exchange_roles(from, to);
        let after = |stop| SwitchError::After { told, yielded, checked, stop };
        self.tell_own(to, handover, commit, Some(connections_open), true).map_err(after)?;
        let connections_adopted = self.await_owned(to, handover, budget.max(PROMOTE_TIME_MAX)).map_err(after)?;
        let owned = Instant::now();
        (attempt.answers, attempt.stopped_at) = (true, None);
        self.say_members();
        if connections_adopted != connections_open {
            let reason = format!("{to} serves {connections_adopted} of {connections_open} connections");
            return Err(after(Stop::new(reason)));
        }
        Ok(SwitchTimes { told, yielded, checked, owned, connections_open, connections_adopted })
    }

    /// Whether a generation has heard of everything that it must have to own.
    pub(crate) fn informed(&self, generation: Generation) -> Result<(), Stop> {
        if self.members.get(&generation).is_some_and(|member| member.informed) {
            return Ok(());
        }
        Err(Stop::new(format!("{generation} has missed news of the state and must not serve")))
    }

    /// Known to be dead: one that cannot be asked about may live.
    pub(crate) fn is_dead(&self, generation: Generation) -> bool {
        matches!(
            self.backend.state(&self.container(generation)),
            Ok(ContainerState::Exited { .. }) | Err(BackendError::NoSuchContainer { .. })
        )
    }

    fn commit(&mut self, plan: &Plan, attempt: &mut Attempt) -> Result<String, Stop> {
        let (from, to) = (attempt.from, attempt.to);
        if attempt.rung >= Rung::Fds {
            // From here the old generation cannot take back; failing to stop the stream only wastes work.
            if let Err(stop) = self.tell(to, &ToService::Follow { on: false }, &[]) {
                tracing::warn!("{}", stop.reason);
            }
        }
        self.connections.clear();
        self.record.previous = Some(attempt.replaced.clone());
        self.record.image = plan.image.clone();
        self.remember_owner(to);
        self.last_trouble = None;
        self.end_in_journal(attempt.handover, to);
        attempt.lost.extend(self.stored_too_late(from, to));
        attempt.lost.extend(self.ports_left(attempt));
        self.retire(from);
        let until = Instant::now() + COMMIT_WAIT;
        while self.members.contains_key(&from) && Instant::now() < until {
            self.pump_and_hear(Duration::from_millis(5), None);
            self.end_drained();
        }
        Ok(match self.members.contains_key(&from) {
            true => format!("{from} drains"),
            false => format!("{from} ended"),
        })
    }

    /// Makes the old generation the owner again, however far the handover got.
    fn unwind(&mut self, attempt: &mut Attempt) -> Result<Back, Stop> {
        if attempt.promoted {
            return self.roll_back(attempt);
        }
        let mut first_trouble = Ok(());
        while let Some(step) = attempt.undo.pop() {
            let result = self.undo(step, attempt);
            if let Err(stop) = result {
                tracing::error!("undoing a handover of {}: {}", self.service(), stop.reason);
                first_trouble = first_trouble.and(Err(stop));
            }
        }
        first_trouble.map(|()| Back::Done)
    }

    fn undo(&mut self, step: Undo, attempt: &mut Attempt) -> Result<(), Stop> {
        match step {
            Undo::ReleaseLease => {
                self.conditions.release(&self.record.file.name);
                Ok(())
            }
            Undo::DestroyShadow(generation) => {
                self.discard(generation);
                Ok(())
            }
            Undo::StopFollowing => {
                self.connections.clear();
                self.tell(attempt.from, &ToService::Follow { on: false }, &[])
            }
            // The owner answers whether it had stopped or not; a late `Yielded` is behind us then.
            Undo::ResumeOwner(generation) => {
                self.tell_own(generation, attempt.handover, None, None, false)?;
                self.await_serving(generation, attempt.handover)?;
                attempt.end_blackout();
                Ok(())
            }
        }
    }

    fn roll_back(&mut self, attempt: &mut Attempt) -> Result<Back, Stop> {
        let (from, to) = (attempt.from, attempt.to);
        self.conditions.release(&self.record.file.name);
        if attempt.rung < Rung::Fds {
            self.own_word(from, false);
            self.set_role(from, Role::Owner);
            self.retire(to);
            // It only finishes what it has; its state is its own at this rung.
            self.ownership.release(to.0);
            return Ok(Back::Done);
        }
        let alive = self.members.get(&to).is_some_and(|member| !member.closed) && !self.is_dead(to);
        if !alive || !attempt.answers {
            self.take_back(attempt)?;
            return self.discard_follower_of(from, to).map(|()| Back::Done);
        }
        // The parked one takes in what was written since, while the worse one still serves.
        if let Err(stop) = self.catch_up(to, from, Instant::now() + HAND_BACK_TIME_MAX) {
            if self.stands_still(from) {
                return Ok(Back::Kept(stop.reason));
            }
            tracing::warn!("{}", stop.reason);
        }
        let budget = self.hand_back_time(attempt, HAND_BACK_TIME_MAX);
        let servings = self.ownership.servings();
        match self.switch(attempt, to, from, budget) {
            Ok(times) => attempt.blackouts.push(self.blackout(attempt.handover, to, from, &times)),
            Err(SwitchError::Before { stop, .. } | SwitchError::After { stop, .. })
                if self.stands_still(from) && !self.stands_still(to) =>
            {
                attempt.servings = servings;
                self.keep(attempt)?;
                return Ok(Back::Kept(stop.reason));
            }
            Err(SwitchError::Before { stop, .. } | SwitchError::After { stop, .. }) => {
                tracing::warn!("{to} does not hand back ({}); it is ended", stop.reason);
                self.take_back(attempt)?;
            }
        }
        self.discard_follower_of(from, to).map(|()| Back::Done)
    }

    /// The way back is over: `owner` goes on alone.
    pub(crate) fn discard_follower_of(&mut self, owner: Generation, follower: Generation) -> Result<(), Stop> {
        self.discard(follower);
        self.connections.clear();
        self.tell(owner, &ToService::Follow { on: false }, &[])
    }

    fn end_in_journal(&mut self, handover: u64, owner: Generation) {
        self.about_to_write("end");
        let ended = self.journal.end(handover, owner);
        self.about_to_write("service");
        if let Err(error) = ended.and_then(|()| self.journal.rewrite(&self.record)) {
            tracing::error!("{}", with_causes(&error));
        }
    }

    fn conclude(&mut self, attempt: &Attempt, verdict: Verdict) {
        if verdict == Verdict::Committed {
            self.conditions.release(&self.record.file.name);
            return;
        }
        let Version { image: _, file, folder } = &attempt.replaced;
        (self.record.file, self.record.folder) = (file.clone(), folder.clone());
        let owner = self.owner().unwrap_or(attempt.from);
        self.remember_owner(owner);
        self.end_in_journal(attempt.handover, owner);
        // Where going back has failed, the parked one is all there is: it takes over once the other one is known to be dead.
        if attempt.promoted && owner == attempt.to {
            return;
        }
        // Whoever neither serves nor drains has no part any more, dead or alive.
        let rest = self.members.values().filter(|member| matches!(member.role, Role::Shadow | Role::Parked));
        for generation in rest.map(|member| member.id.generation).collect::<Vec<_>>() {
            self.discard(generation);
        }
    }
}

struct SwitchTimes {
    told: Instant,
    yielded: Instant,
    checked: Instant,
    owned: Instant,
    connections_open: u64,
    connections_adopted: u64,
}

/// What became of a way back.
enum Back {
    /// The old generation serves again.
    Done,
    /// It cannot, for this reason; the new one serves on.
    Kept(String),
}

enum SwitchError {
    /// Ownership did not move.
    Before { began: Instant, stop: Stop },
    /// The control word names the new generation, which does not serve as it should.
    After { told: Instant, yielded: Instant, checked: Instant, stop: Stop },
}
