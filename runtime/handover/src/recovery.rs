//! Taking over from a supervisor that died: find the generations that run, take up the conversations where they
//! stopped, and finish or undo the handover that was open.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use warmswap_backend::{Backend, BackendError, ContainerState, FoundContainer, MEMORY_FILE_PREFIX, NOTIFY, NamedFd};
use warmswap_model::{
    ConnectionCounts, Generation, HandoverReport, PerResource, Rung, StateMove, Trigger, Verdict, with_causes,
};
use warmswap_transfer::channel::SupervisorChannel;
use warmswap_transfer::control::{ControlView, ControlWord};
use warmswap_transfer::message::ToService;
use warmswap_transfer::ownership::OwnershipLock;
use warmswap_transfer::segment::segment_index;

use crate::conditions::Conditions;
use crate::error::HandoverError;
use crate::journal::{Journal, OpenHandover};
use crate::member::{Member, Role};
use crate::notify::{FdStore, NotifySocket, Spoken, WATCHDOG_USEC};
use crate::supervisor::{
    GIVEN_CONTROL, KEPT_CONTROL, KEPT_OWNERSHIP, KEPT_PAGE, KEPT_SEGMENT, OWNED_TIME_MAX, Stop, Supervisor, pages,
};

impl Supervisor {
    /// Takes over the service whose journal lies at `journal_path`, and reports the handover that the last supervisor did
    /// not live to report. `None` when there is no journal.
    ///
    /// # Errors
    /// A journal that cannot be read. Containers that cannot be taken over are ended and the service is revived from
    /// its state.
    pub fn recover(
        backend: Arc<dyn Backend>,
        conditions: Arc<dyn Conditions>,
        journal_path: &Path,
    ) -> Result<Option<(Self, Option<HandoverReport>)>, HandoverError> {
        let Some(mut recovered) = Journal::read(journal_path)? else { return Ok(None) };
        let service = recovered.service.file.name.clone();
        let found = backend.list()?.into_iter().filter(|container| container.spec.id.service == service);
        let found: Vec<(FoundContainer, Result<Kept, BackendError>)> = found
            .map(|container| {
                let kept = backend.kept_fds(&container.spec.id).map(Kept::sort);
                (container, kept)
            })
            .collect();
        // All of one supervisor's time hold the same page.
        let words = found.iter().filter_map(|(_, kept)| kept.as_ref().ok()?.word);
        let word = words.max_by_key(|word| word.epoch).unwrap_or_default();
        recovered.believe(Generation(word.owner));
        for (container, kept) in &found {
            let (id, running) = (&container.spec.id, matches!(container.state, ContainerState::Running { .. }));
            match kept {
                // Another beside it would make two owners, and with another state.
                Err(error) if running && recovered.service.owner == Some(id.generation) => {
                    return Err(HandoverError::Refused(format!(
                        "{id} serves and cannot be taken over: {}; it is left alone, `warmswap stop --all` ends it",
                        with_causes(error)
                    )));
                }
                Err(error) => tracing::error!("{id} cannot be taken over, it is ended: {}", with_causes(error)),
                Ok(_) => {}
            }
        }
        let ground = backend.open_service(&service, &recovered.service.file.listen)?;
        let mut record = recovered.service;
        if let Some(open) = recovered.open.as_ref().filter(|open| open.promoted) {
            record.previous = Some(record.version());
            record.image = open.image.clone();
            (record.file, record.folder) = ((*open.file).clone(), open.folder.clone());
        }
        for (container, _) in &found {
            record.next_generation = record.next_generation.max(container.spec.id.generation.next());
        }
        let journal = Journal::create(journal_path, &record)?;
        let mut supervisor = Self::assemble(backend, conditions, ground, record, journal)?;
        // To the epoch, so that a process sees whether anybody else owned in between.
        supervisor.control.store(word);
        for (container, kept) in found {
            supervisor.adopt(&container, kept.unwrap_or_default());
        }
        let report = recovered.open.as_ref().map(|open| supervisor.report_open(open));
        supervisor.settle(recovered.open.as_ref());
        Ok(Some((supervisor, report)))
    }

    /// Takes up the conversation with one container, or ends it when there is none to take up.
    fn adopt(&mut self, container: &FoundContainer, kept: Kept) {
        let id = container.spec.id.clone();
        let generation = id.generation;
        let Kept { channel, segments, ownership, rescued, notify, stored, word: _ } = kept;
        if let Some(ownership) = ownership {
            self.ownership = ownership; // the same for all of them
        }
        if rescued {
            let trouble =
                format!("the shim of {generation} was killed or hangs; the next handover gives the service a new one");
            self.last_trouble = Some(trouble);
        }
        let is_owner = self.record.owner == Some(generation);
        if (is_owner || self.segments.is_empty()) && self.keeps_segments() {
            // The owner's store is the one that is complete; a dead owner's store still holds the state.
            self.segments.extend(segments);
        }
        let running = matches!(container.state, ContainerState::Running { .. });
        let Some(channel) = channel.filter(|_| running || is_owner) else {
            self.discard(generation);
            return;
        };
        let watchdog = container.spec.env.get(WATCHDOG_USEC).and_then(|us| us.parse().ok()).map(Duration::from_micros);
        self.stores.insert(generation, stored);
        // It greeted our predecessor, who wrote down what the owner said.
        let member = Member {
            image: container.spec.image.clone(),
            cgroup: container.cgroup,
            role: if is_owner { Role::Owner } else { Role::Shadow },
            channel,
            greeting: self.record.greeting.clone().filter(|_| is_owner),
            ready: true,
            informed: is_owner,
            closed: false,
            speaker: None,
            garbled: 0,
            drain_until: None,
            spoken: Spoken::new(notify, watchdog),
            lifeline: None,
            noted: false,
            id,
        };
        self.members.insert(generation, member);
        if !running {
            // What it said of its state while nobody listened is still in the channel, and holds acknowledged writes.
            self.name_owner(generation);
            self.read_rest(generation);
            self.members.remove(&generation);
            self.ownership.release(generation.0);
            self.fallen = Some(generation);
        }
    }

    /// Makes sure that the control word names a generation which owns already.
    fn name_owner(&self, generation: Generation) {
        if self.control.load().owner != generation.0 {
            self.own_word(generation, false);
        }
    }

    /// One owner, everybody else gone: what was not promoted is undone, what was promoted stays.
    fn settle(&mut self, open: Option<&OpenHandover>) {
        let owner = self.record.owner;
        if let Some(open) = open {
            tracing::warn!(
                "the last agent died during handover {} of {} ({} to {}, {}promoted)",
                open.handover,
                self.service(),
                open.from,
                open.to,
                if open.promoted { "" } else { "not " }
            );
        }
        let others: Vec<Generation> = self.members.keys().copied().filter(|g| Some(*g) != owner).collect();
        let owner = owner.filter(|owner| self.members.contains_key(owner));
        if let Some(owner) = owner {
            self.name_owner(owner);
        }
        // First, so that none of them holds the ownership any more.
        for generation in others {
            // What was replaced before may drain still; what was to replace, or is replaced by what was promoted, ends.
            let drains = owner.is_some_and(|owner| generation < owner) && open.is_none_or(|o| o.from != generation);
            if drains { self.retire(generation) } else { self.discard(generation) }
        }
        let cooperating = owner.filter(|owner| self.members.get(owner).is_some_and(Member::cooperates));
        if let Some(owner) = cooperating {
            if self.ownership.holder() == 0 {
                // It may be a new page, because nobody had kept the one before. One that yielded takes it anyway.
                self.ownership.try_acquire(owner.0);
            }
            self.resume(owner, open.map_or(0, |open| open.handover));
        }
        if self.owner().is_none() {
            self.last_trouble = Some("its owner died while no agent ran; it is started again".into());
            if let Some(owner) = self.record.owner {
                let greeting = self.record.greeting.clone();
                self.note_lost_state(owner, greeting.as_ref());
            }
            self.revive_later();
        }
        if let Err(error) = self.journal.rewrite(&self.record) {
            tracing::error!("{}", with_causes(&error));
        }
    }

    /// The handover that was open when the last supervisor died. What was promoted stays: the new owner serves, and with
    /// the supervisor the values before were lost, so it cannot be compared any more.
    fn report_open(&self, open: &OpenHandover) -> HandoverReport {
        let (verdict, reason) = match (open.promoted, open.rolled_back) {
            (true, _) => (Verdict::Committed, "the agent died after PROMOTE; kept without being verified"),
            (false, true) => (Verdict::RolledBack, "the agent died as it went back"),
            (false, false) => (Verdict::Aborted, "the agent died before PROMOTE"),
        };
        HandoverReport {
            id: open.handover,
            service: self.service().clone(),
            from: open.from,
            to: open.to,
            from_image: open.from_image.0.display().to_string(),
            to_image: open.image.0.display().to_string(),
            trigger: Trigger::Request,
            rung: self
                .record
                .greeting
                .as_ref()
                .map_or_else(|| self.rung_of_a_stranger(&self.ports_of(open.from)), |_| Rung::Full),
            verdict,
            reason: Some(reason.to_owned()),
            lost: Vec::new(),
            started_unix_ms: 0,
            duration_ms: 0.0,
            phases: Vec::new(),
            steps: Vec::new(),
            blackouts: Vec::new(),
            connections: ConnectionCounts::default(),
            state: self.record.greeting.as_ref().map_or(StateMove::None, |greeting| greeting.state),
            state_bytes: 0,
            before: None,
            after: None,
            forecast: None,
            reservation: PerResource::default(),
        }
    }

    /// Gives the owner a control page that this process can write, and tells it to serve: it may have stopped for a
    /// handover that nobody finishes now. An owner that serves already takes this as a repetition.
    fn resume(&mut self, owner: Generation, handover: u64) {
        self.keep_page(owner);
        let result = self
            .tell_page(owner)
            .and_then(|()| self.tell(owner, &ToService::Follow { on: false }, &[]))
            .and_then(|()| self.tell_own(owner, handover, None, None, false))
            .and_then(|()| self.await_owned(owner, handover, OWNED_TIME_MAX));
        match result {
            Ok(connections) => tracing::info!("{owner} of {} serves {connections} connections", self.service()),
            Err(stop) if self.is_dead(owner) => {
                tracing::error!("{owner} of {} died as it was taken over: {}", self.service(), stop.reason);
                self.members.remove(&owner);
                self.ownership.release(owner.0);
                self.fallen = Some(owner);
            }
            // The control word names it, so it serves as soon as it can.
            Err(stop) => {
                tracing::error!("{owner} of {} does not answer: {}", self.service(), stop.reason);
                self.last_trouble = Some(format!("{owner} does not answer: {}", stop.reason));
            }
        }
    }

    fn tell_page(&mut self, owner: Generation) -> Result<(), Stop> {
        let (reader, writer) = std::io::pipe().map_err(|error| Stop::new(format!("no pipe for {owner}: {error}")))?;
        if let Some(member) = self.members.get_mut(&owner) {
            member.lifeline = Some(writer);
        }
        self.tell(owner, &ToService::NewSupervisor, &pages(&self.control, &self.ownership, &reader))
    }

    /// For the supervisor after this one.
    fn keep_page(&self, owner: Generation) {
        let page = self.control.as_fd().try_clone_to_owned();
        let page = page.map_err(|source| HandoverError::System { action: "duplicate the control page", source });
        let kept = page.and_then(|fd| {
            let name = KEPT_PAGE.to_owned();
            self.backend.keep_fd(&self.container(owner), NamedFd { name, fd }).map_err(HandoverError::from)
        });
        if let Err(error) = kept {
            tracing::warn!("the control page of {owner} is not kept: {}", with_causes(&error));
        }
    }
}

/// What was kept for a container, by what it is.
#[derive(Default)]
struct Kept {
    channel: Option<SupervisorChannel>,
    segments: BTreeMap<u64, OwnedFd>,
    ownership: Option<OwnershipLock>,
    word: Option<ControlWord>,
    notify: Option<NotifySocket>,
    stored: FdStore,
    /// Taken from the container itself.
    rescued: bool,
}

impl Kept {
    fn sort(fds: Vec<NamedFd>) -> Self {
        let mut kept = Self::default();
        for named in fds {
            let Some(NamedFd { name, fd }) = kept.stored.take_kept(named) else { continue };
            if name == NOTIFY {
                kept.notify = Some(NotifySocket::from_fd(fd));
            } else if name == KEPT_CONTROL {
                kept.channel = SupervisorChannel::from_fd(fd).ok();
            } else if name == GIVEN_CONTROL {
                kept.rescued = true;
            } else if let Some(index) = name.strip_prefix(KEPT_SEGMENT).and_then(|index| index.parse().ok()) {
                kept.segments.insert(index, fd);
            } else if [KEPT_PAGE, KEPT_OWNERSHIP].contains(&name.as_str()) || name.starts_with(MEMORY_FILE_PREFIX) {
                if let Some(index) = segment_index(fd.as_fd()) {
                    kept.segments.insert(index, fd);
                } else if let Ok(page) = ControlView::map(fd.as_fd()) {
                    // A process holds one, or for a moment the one before as well.
                    kept.word = kept.word.into_iter().chain([page.load()]).max_by_key(|word| word.epoch);
                } else if let Ok(ownership) = OwnershipLock::map(fd.as_fd()) {
                    kept.ownership = Some(ownership);
                }
            }
        }
        kept
    }
}
