//! The life of a generation: created, awaited, crowned, retired, discarded; and reviving an owner that died.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use warmswap_backend::{BackendError, ContainerSpec, ContainerState, Limits, NamedFd, PreparedImage};
use warmswap_model::{Generation, Readiness, with_causes};
use warmswap_transfer::channel::SupervisorChannel;
use warmswap_transfer::message::ToService;

use crate::errand::Errand;
use crate::error::HandoverError;
use crate::member::{Greeting, Member, Role};
use crate::notify::{self, NotifySocket, Spoken};
use crate::standstill::Looks;
use crate::steps::Step;
use crate::supervisor::{
    GIVEN_CONTROL, KEPT_CONTROL, KEPT_OWNERSHIP, KEPT_PAGE, KEPT_SEGMENT, OWNED_TIME_MAX, Supervisor, describe_exit,
};

/// A program that has not spoken this long after its start neither links the SDK nor says `READY=1`.
const GREETING_TIME_MAX: Duration = Duration::from_secs(3);
/// The same where the owner links it: its successor most likely does as well, and is only slow.
const GREETING_TIME_MAX_EXPECTED: Duration = Duration::from_secs(10);
/// Share of CPU of a generation that does not serve, against 100 for one that does.
const SHADOW_CPU_WEIGHT: u32 = 20;
const OWNER_CPU_WEIGHT: u32 = 100;

pub(crate) const REVIVE_DELAY_MIN: Duration = Duration::from_millis(100);
const REVIVE_DELAY_MAX: Duration = Duration::from_secs(10);
/// An owner that lived this long is not in a crash loop.
const STABLE_AFTER: Duration = Duration::from_secs(60);

impl Supervisor {
    /// The ceilings of the service file.
    fn ceilings(&self) -> Limits {
        let resources = &self.record.file.resources;
        Limits {
            cpu_pct_max: Some(resources.cpu_pct_max),
            memory_mb_max: Some(resources.memory_mb_max),
            processes_max: Some(resources.processes_max),
            ..Limits::default()
        }
    }

    pub(crate) fn shadow_limits(&self, cpus: Option<Vec<u32>>, memory_mb_reserved: f64) -> Limits {
        Limits {
            cpu_weight: Some(SHADOW_CPU_WEIGHT),
            cpus,
            memory_mb_reserved: Some(memory_mb_reserved.min(self.record.file.resources.memory_mb_max)),
            ..Limits::default()
        }
    }

    /// What a generation gets when it is to serve.
    pub(crate) fn owner_limits(&self, cpus: Option<Vec<u32>>) -> Limits {
        Limits { cpu_weight: Some(OWNER_CPU_WEIGHT), cpus, ..Limits::default() }
    }

    /// Creates and starts a generation and waits until it is ready. It is a shadow then.
    ///
    /// # Errors
    /// The container is gone again then.
    pub(crate) fn launch(&mut self, image: PreparedImage, limits: &Limits) -> Result<Generation, HandoverError> {
        let generation = self.record.next_generation;
        self.record.next_generation = generation.next();
        let result = self.create(generation, image, limits).and_then(|()| self.await_ready(generation));
        if let Err(error) = result {
            // One that was there before is not ours to remove.
            if !matches!(error, HandoverError::Backend(BackendError::ContainerExists { .. })) {
                self.discard(generation);
            }
            return Err(error);
        }
        Ok(generation)
    }

    fn create(
        &mut self,
        generation: Generation,
        mut image: PreparedImage,
        limits: &Limits,
    ) -> Result<(), HandoverError> {
        let id = self.container(generation);
        let channel_error =
            |source| HandoverError::Channel { service: self.record.file.name.clone(), generation, source };
        let (ours, theirs) = SupervisorChannel::pair().map_err(channel_error)?;
        ours.attest_senders().map_err(channel_error)?;
        let duplicate = |fd: BorrowedFd<'_>| {
            fd.try_clone_to_owned().map_err(|source| HandoverError::System { action: "duplicate a descriptor", source })
        };
        let mut fds = Vec::with_capacity(self.ground.listeners.len() + 1);
        for listener in &self.ground.listeners {
            fds.push(NamedFd { name: listener.name.clone(), fd: duplicate(listener.fd.as_fd())? });
        }
        let mut names: Vec<String> = fds.iter().map(|fd| fd.name.clone()).collect();
        let mut keep = vec![
            NamedFd { name: KEPT_CONTROL.into(), fd: duplicate(ours.as_fd())? },
            NamedFd { name: KEPT_PAGE.into(), fd: duplicate(self.control.as_fd())? },
            NamedFd { name: KEPT_OWNERSHIP.into(), fd: duplicate(self.ownership.as_fd())? },
        ];
        let heritage = self.heritage()?;
        for stored in heritage.iter() {
            names.push(stored.name.clone());
            for given in [&mut fds, &mut keep] {
                given.push(NamedFd { name: stored.kept_name(), fd: duplicate(stored.fd.as_fd())? });
            }
        }
        let mut env = self.record.file.env.clone();
        env.extend(self.watchdog_env());
        if !fds.is_empty() {
            env.insert("LISTEN_FDS".into(), fds.len().to_string());
            env.insert("LISTEN_FDNAMES".into(), names.join(":"));
            env.insert("LISTEN_PID".into(), "1".into());
        }
        env.insert("WARMSWAP_CONTROL_FD".into(), (3 + fds.len()).to_string());
        fds.push(NamedFd { name: GIVEN_CONTROL.into(), fd: theirs.into_fd() });
        // Our end too, so that a new agent finds it there when this one and the shim are killed together.
        env.insert("WARMSWAP_RESCUE_FD".into(), (3 + fds.len()).to_string());
        fds.push(NamedFd { name: KEPT_CONTROL.into(), fd: duplicate(ours.as_fd())? });

        let socket = NotifySocket::new()
            .map_err(|source| HandoverError::System { action: "make a notification socket", source })?;
        keep.push(notify::kept(duplicate(socket.as_fd())?));
        for (index, segment) in &self.segments {
            keep.push(NamedFd { name: format!("{KEPT_SEGMENT}{index}"), fd: duplicate(segment.as_fd())? });
        }
        let ceilings = self.ceilings();
        let limits = Limits {
            cpu_pct_max: ceilings.cpu_pct_max,
            memory_mb_max: ceilings.memory_mb_max,
            processes_max: ceilings.processes_max,
            ..limits.clone()
        };
        let command = self.record.file.command.clone();
        // With the container, because a later service file may be of another program.
        image.stop_signal = self.record.file.stop_signal.or(image.stop_signal);
        let spec = ContainerSpec { id: id.clone(), image: image.clone(), command, env, limits };
        self.steps.take(Step::Backend("create", generation));
        let cgroup = self.backend.create(&spec, fds, keep)?;
        let member = Member {
            id: id.clone(),
            image,
            cgroup,
            role: Role::Shadow,
            channel: ours,
            greeting: None,
            ready: false,
            informed: false,
            closed: false,
            speaker: None,
            garbled: 0,
            drain_until: None,
            spoken: Spoken::new(Some(socket), self.watchdog()),
            lifeline: None,
            noted: false,
        };
        self.members.insert(generation, member);
        self.stores.insert(generation, heritage);
        self.say_members();
        self.steps.take(Step::Backend("start", generation));
        self.backend.start(&id)?;
        Ok(())
    }

    /// A program that links the SDK says when it is ready, as does one that follows the conventions of systemd; any other
    /// counts as ready when it still runs after [`GREETING_TIME_MAX`].
    fn await_ready(&mut self, generation: Generation) -> Result<(), HandoverError> {
        let began = Instant::now();
        let warm_max = Duration::from_secs_f64(self.record.file.handover.warm_s_max);
        let expected = self.owner().and_then(|owner| self.members.get(&owner)).is_some_and(Member::cooperates);
        let mut looks = Looks::begin();
        let greeting_max = if expected { GREETING_TIME_MAX_EXPECTED } else { GREETING_TIME_MAX };
        loop {
            self.pump_and_hear(Duration::from_millis(20), None);
            self.notices.retain(|(from, _)| *from != generation);
            let Some(member) = self.members.get(&generation) else {
                return Err(self.generation_error(generation, "disappeared"));
            };
            if let Some(reason) = member.spoken.given_up() {
                return Err(self.generation_error(generation, reason));
            }
            if member.ready {
                return Ok(());
            }
            let guess = self.record.file.ready == Readiness::Guess;
            let (greeted, closed) = (member.cooperates(), member.closed);
            if closed || !greeted {
                match self.backend.state(&member.id)? {
                    ContainerState::Exited { code, signal } => {
                        return Err(self.generation_error(generation, describe_exit(code, signal)));
                    }
                    _ if closed && greeted => {
                        return Err(self.generation_error(generation, "closed its control channel while it started"));
                    }
                    _ if guess && !greeted && began.elapsed() >= greeting_max.min(warm_max) => {
                        tracing::info!("{generation} of {} says nothing; it counts as ready", self.service());
                        if let Some(member) = self.members.get_mut(&generation) {
                            member.spoken.begin_watch();
                        }
                        return Ok(());
                    }
                    _ => {}
                }
            }
            if looks.look(self, &[generation]).is_some() {
                return Err(self.generation_error(generation, "is stopped by a signal while it starts"));
            }
            if let Some(reason) = self.conditions.cancelled(self.service()) {
                return Err(HandoverError::Refused(reason));
            }
            if began.elapsed() >= warm_max {
                let problem = format!("was not ready within {} s", warm_max.as_secs_f64());
                return Err(self.generation_error(generation, problem));
            }
        }
    }

    /// Makes a ready generation the owner when there is none: the first one, or the successor of a dead one.
    pub(crate) fn crown(&mut self, generation: Generation) -> Result<(), HandoverError> {
        let cooperates = self.members.get(&generation).is_some_and(Member::cooperates);
        if cooperates {
            self.send_segments(generation).map_err(|stop| HandoverError::Refused(stop.reason))?;
        }
        let limits = self.owner_limits(None);
        self.backend.set_limits(&self.container(generation), &limits)?;
        self.journal.promoted(0, generation, self.greeting_of(generation))?;
        self.own_word(generation, false);
        if cooperates {
            self.tell_own(generation, 0, None, None, false)
                .and_then(|()| self.await_owned(generation, 0, OWNED_TIME_MAX).map(drop))
                .map_err(|stop| self.generation_error(generation, stop.reason))?;
        }
        self.set_role(generation, Role::Owner);
        self.remember_owner(generation);
        self.journal.rewrite(&self.record)?;
        Ok(())
    }

    pub(crate) fn remember_owner(&mut self, generation: Generation) {
        self.record.owner = Some(generation);
        self.record.greeting = self.greeting_of(generation);
    }

    pub(crate) fn greeting_of(&self, generation: Generation) -> Option<Greeting> {
        self.members.get(&generation).and_then(|member| member.greeting.clone())
    }

    /// Ends a generation at once and forgets it.
    pub(crate) fn discard(&mut self, generation: Generation) {
        self.steps.take(Step::Backend("destroy", generation));
        self.run_errand(Errand::Destroy(generation));
        // If it served, what it said last of its state holds acknowledged writes.
        self.read_rest(generation);
        self.members.remove(&generation);
        self.stores.remove(&generation);
    }

    /// Tells a generation to finish; [`Self::tick`] removes it once it has, or when its time is over.
    pub(crate) fn retire(&mut self, generation: Generation) {
        let drain = Duration::from_secs_f64(self.record.file.handover.drain_s_max);
        let Some(member) = self.members.get_mut(&generation) else { return };
        member.role = Role::Draining;
        member.drain_until = Some(Instant::now() + drain);
        let drain_ms = u64::try_from(drain.as_millis()).unwrap_or(u64::MAX);
        let told = if member.cooperates() {
            self.steps.take(Step::Tell(generation, "Retire"));
            member.channel.send(&ToService::Retire { drain_ms }, &[]).map_err(|error| with_causes(&error))
        } else {
            self.steps.take(Step::Backend("end", generation));
            self.backend.signal(&member.id, member.stop_signal()).map_err(|error| with_causes(&error))
        };
        if let Err(problem) = told {
            tracing::info!("{generation} cannot be told to finish: {problem}");
            member.drain_until = Some(Instant::now());
        }
    }

    pub(crate) fn end_drained(&mut self) {
        let now = Instant::now();
        let exited = |member: &Member| {
            !matches!(
                self.backend.state(&member.id),
                Ok(ContainerState::Running { .. } | ContainerState::Created { .. })
            )
        };
        let over: Vec<Generation> = self
            .members
            .values()
            .filter(|member| member.role == Role::Draining)
            .filter(|member| member.drain_until.is_none_or(|until| now >= until) || exited(member))
            .map(|member| member.id.generation)
            .collect();
        for generation in over {
            self.discard(generation);
        }
    }

    /// An owner that died is followed by a new generation of the same image, with the state that the segments hold.
    pub(crate) fn revive_owner(&mut self) {
        let now = Instant::now();
        if let Some(owner) = self.owner() {
            let closed = self.members.get(&owner).is_some_and(|member| member.closed);
            if !closed || !self.is_dead(owner) {
                return;
            }
            let reason = self.obituary(owner).reason;
            tracing::error!("{} lost its owner: {reason}; it is started again", self.service());
            self.last_trouble = Some(reason);
            if self.parked_takes_over(owner) {
                return;
            }
            let greeting = self.greeting_of(owner);
            self.note_lost_state(owner, greeting.as_ref());
            self.members.remove(&owner);
            self.ownership.release(owner.0);
            self.fallen = Some(owner);
            self.connections.clear();
            if self.revived_at.is_none_or(|at| now.duration_since(at) >= STABLE_AFTER) {
                self.revive_delay = REVIVE_DELAY_MIN;
            }
            self.revive_later();
        }
        if self.owner().is_some() || self.revive_at.is_some_and(|at| now < at) {
            return;
        }
        let image = self.record.image.resolved(&self.record.folder);
        let revived = self
            .backend
            .prepare_image(&image)
            .map_err(HandoverError::from)
            .and_then(|image| self.launch(image, &Limits::default()))
            .and_then(|generation| {
                let crowned = self.crown(generation);
                if crowned.is_err() {
                    self.discard(generation);
                }
                crowned
            });
        match revived {
            Ok(()) => {
                if let Some(fallen) = self.fallen.take() {
                    self.discard(fallen);
                }
                self.revive_at = None;
                self.revived_at = Some(Instant::now());
                self.last_trouble = self.state_lost.take();
            }
            Err(error) => {
                let reason = with_causes(&error);
                tracing::error!("{} cannot be started again: {reason}", self.service());
                self.last_trouble = Some(reason);
                self.revive_later();
            }
        }
    }

    pub(crate) fn revive_later(&mut self) {
        self.revive_at = Some(Instant::now() + self.revive_delay);
        self.revive_delay = (self.revive_delay * 2).min(REVIVE_DELAY_MAX);
    }
}
