//! The supervisor of one service: the generations it has, what they say, and where that goes.
//!
//! One thread owns one supervisor. Between handovers it calls [`Supervisor::tick`]; a handover
//! (`protocol.rs`) is a call on the same thread, so nothing here is shared and nothing locks.
//!
//! Not here: the order of a handover (`protocol.rs`) and taking over from a predecessor (`recovery.rs`).

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::io::PipeReader;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use warmswap_backend::{Backend, ContainerId, ContainerState, Limits, ServiceGround};
use warmswap_model::{Generation, ServiceFile, ServiceName, with_causes};
use warmswap_transfer::channel::ChannelError;
use warmswap_transfer::control::{ControlPage, ControlWord};
use warmswap_transfer::message::{Commit, Message as _, ToService};
use warmswap_transfer::ownership::OwnershipLock;

use crate::conditions::Conditions;
use crate::errand::Errand;
use crate::error::{HandoverError, LogTail};
use crate::journal::{Journal, ServiceRecord};
use crate::lifecycle::REVIVE_DELAY_MIN;
use crate::listeners::TcpListeners;
use crate::member::{Member, MemberStatus, Role};
use crate::notify::FdStore;
use crate::standstill::Looks;
use crate::steps::{Step, Steps};

/// Names in the descriptor store of a container.
pub(crate) const KEPT_CONTROL: &str = "control";
/// Name of the container's own end.
pub(crate) const GIVEN_CONTROL: &str = "control-of-container";
pub(crate) const KEPT_PAGE: &str = "control-page";
pub(crate) const KEPT_OWNERSHIP: &str = "ownership-page";
pub(crate) const KEPT_SEGMENT: &str = "segment-";

/// How long a process may take to say that it serves where nobody else could.
pub(crate) const OWNED_TIME_MAX: Duration = Duration::from_secs(5);

/// What a generation said that a handover may wait for.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Notice {
    Ready,
    CaughtUp { round: u64, commit: Option<Commit>, connections: u64 },
    Yielded { handover: u64, commit: Option<Commit>, connections_open: u64 },
    Owned { handover: u64, connections: u64 },
    Failed { what: String },
    Closed,
}

/// Why a wait ended without what was waited for. The text is the reason a person reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stop {
    pub(crate) reason: String,
}

impl Stop {
    pub(crate) fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into() }
    }
}

impl From<HandoverError> for Stop {
    fn from(error: HandoverError) -> Self {
        Self { reason: with_causes(&error) }
    }
}

pub struct Supervisor {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) conditions: Arc<dyn Conditions>,
    pub(crate) ground: ServiceGround,
    pub(crate) record: ServiceRecord,
    pub(crate) journal: Journal,
    pub(crate) members: BTreeMap<Generation, Member>,
    pub(crate) control: ControlPage,
    pub(crate) ownership: OwnershipLock,
    /// The state of the service: one duplicate of every living segment, for followers to come.
    pub(crate) segments: BTreeMap<u64, OwnedFd>,
    /// Cookies of the connections that followers hold duplicates of.
    pub(crate) connections: HashSet<u64>,
    /// Descriptors that generations gave us to keep.
    pub(crate) stores: BTreeMap<Generation, FdStore>,
    pub(crate) notices: VecDeque<(Generation, Notice)>,
    pub(crate) round: u64,
    pub(crate) steps: Steps,
    /// An owner that died: its shim keeps the state until a successor owns.
    pub(crate) fallen: Option<Generation>,
    pub(crate) revive_at: Option<Instant>,
    pub(crate) revive_delay: Duration,
    pub(crate) revived_at: Option<Instant>,
    pub(crate) last_trouble: Option<String>,
    /// Bytes of state that the owner has copied for the present follower.
    pub(crate) state_moved: u64,
    /// To be said once the service is back without its state.
    pub(crate) state_lost: Option<String>,
    /// What a back end refused to do and is asked again.
    pub(crate) errands: Vec<Errand>,
    /// The wait that goes on may be called off.
    pub(crate) cancellable: bool,
    pub(crate) tcp_listeners: TcpListeners,
}

impl Supervisor {
    /// Starts a service for the first time: its ground, its first generation, its journal.
    ///
    /// # Errors
    /// Nothing is left behind then.
    pub fn start(
        backend: Arc<dyn Backend>,
        conditions: Arc<dyn Conditions>,
        file: ServiceFile,
        folder: PathBuf,
        journal_path: &Path,
    ) -> Result<Self, HandoverError> {
        // Resolved once: a later file may lie in another folder.
        let image = file.image.resolved(&folder);
        let prepared = backend.prepare_image(&image)?;
        let ground = backend.open_service(&file.name, &file.listen).inspect_err(|_| {
            // What was made before the listener that could not be opened.
            if let Err(error) = backend.close_service(&file.name) {
                tracing::warn!("after a failed start: {}", with_causes(&error));
            }
        })?;
        let record = ServiceRecord {
            file,
            folder,
            next_generation: Generation::FIRST,
            owner: None,
            greeting: None,
            image,
            previous: None,
        };
        let journal = Journal::create(journal_path, &record)?;
        let mut supervisor = Self::assemble(backend, conditions, ground, record, journal)?;
        let started = supervisor.launch(prepared, &Limits::default()).and_then(|first| supervisor.crown(first));
        if let Err(error) = started {
            if let Err(trouble) = supervisor.stop(journal_path) {
                tracing::warn!("after a failed start: {}", with_causes(&trouble));
            }
            return Err(error);
        }
        Ok(supervisor)
    }

    pub(crate) fn assemble(
        backend: Arc<dyn Backend>,
        conditions: Arc<dyn Conditions>,
        ground: ServiceGround,
        record: ServiceRecord,
        journal: Journal,
    ) -> Result<Self, HandoverError> {
        Ok(Self {
            tcp_listeners: TcpListeners::of(&ground),
            backend,
            conditions,
            ground,
            record,
            journal,
            members: BTreeMap::new(),
            control: ControlPage::create()?,
            ownership: OwnershipLock::create()?,
            segments: BTreeMap::new(),
            connections: HashSet::new(),
            stores: BTreeMap::new(),
            notices: VecDeque::new(),
            round: 0,
            steps: Steps::default(),
            fallen: None,
            revive_at: None,
            revive_delay: REVIVE_DELAY_MIN,
            revived_at: None,
            last_trouble: None,
            state_moved: 0,
            state_lost: None,
            errands: Vec::new(),
            cancellable: false,
        })
    }

    #[must_use]
    pub fn service(&self) -> &ServiceName {
        &self.record.file.name
    }

    #[must_use]
    pub fn record(&self) -> &ServiceRecord {
        &self.record
    }

    #[must_use]
    pub fn ground(&self) -> &ServiceGround {
        &self.ground
    }

    #[must_use]
    pub fn owner(&self) -> Option<Generation> {
        self.members.values().find(|member| member.role == Role::Owner).map(|member| member.id.generation)
    }

    #[must_use]
    pub fn members(&self) -> Vec<MemberStatus> {
        let status = |member: &Member| MemberStatus {
            generation: member.id.generation,
            role: member.role,
            image: member.image.image.0.display().to_string(),
            cgroup: member.cgroup,
            cooperates: member.cooperates(),
            says: member.spoken.in_words(),
        };
        self.members.values().map(status).collect()
    }

    /// Whether [`Plan::file`](crate::Plan::file) can be this one.
    ///
    /// # Errors
    /// When the file is of another service or wants other listeners.
    pub fn accepts(&self, file: &ServiceFile) -> Result<(), HandoverError> {
        if file.name != self.record.file.name {
            let problem = format!("the service file is of {}, not of {}", file.name, self.record.file.name);
            return Err(HandoverError::Refused(problem));
        }
        if file.listen != self.record.file.listen {
            let problem = "listeners cannot change in an update; `warmswap stop` and `warmswap run` it".to_owned();
            return Err(HandoverError::Refused(problem));
        }
        Ok(())
    }

    /// Why the service does not run as it should, if so.
    #[must_use]
    pub fn trouble(&self) -> Option<&str> {
        self.last_trouble.as_deref()
    }

    /// Takes in what the generations say, waiting up to `timeout` or until `wake` is readable; ends drained
    /// generations and revives a dead owner.
    pub fn tick(&mut self, timeout: Duration, wake: Option<BorrowedFd<'_>>) {
        let due = self.revive_at.map_or(timeout, |at| at.saturating_duration_since(Instant::now()));
        let due = self.watchdog_due().map_or(due, |watchdog| watchdog.min(due));
        self.pump_and_hear(timeout.min(due), wake);
        self.notices.clear(); // between handovers nobody waits for any
        self.watch_owner();
        self.end_drained();
        self.run_errands();
        self.revive_owner();
    }

    /// Ends every generation and removes everything of the service.
    ///
    /// # Errors
    /// When something could not be removed; the rest is removed all the same.
    pub fn stop(&mut self, journal_path: &Path) -> Result<(), HandoverError> {
        let mut first_error = None;
        let mut note = |result: Result<(), HandoverError>| {
            if let Err(error) = result {
                first_error.get_or_insert(error);
            }
        };
        for member in self.members.values() {
            // A program that wants to clean up gets the chance; SDK services have nothing to lose by SIGKILL.
            if !member.cooperates() && self.backend.signal(&member.id, member.stop_signal()).is_ok() {
                let _ = self.backend.wait(&member.id, Duration::from_secs(5));
            }
            note(self.backend.destroy(&member.id).map_err(Into::into));
        }
        if let Some(fallen) = self.fallen.take() {
            note(self.backend.destroy(&self.container(fallen)).map_err(Into::into));
        }
        for errand in std::mem::take(&mut self.errands) {
            if let Errand::Destroy(generation) = errand {
                note(self.backend.destroy(&self.container(generation)).map_err(Into::into));
            }
        }
        self.members.clear();
        self.stores.clear();
        self.segments.clear();
        note(self.backend.close_service(&self.record.file.name).map_err(Into::into));
        note(Journal::remove(journal_path).map_err(Into::into));
        first_error.map_or(Ok(()), Err)
    }

    pub(crate) fn container(&self, generation: Generation) -> ContainerId {
        ContainerId { service: self.record.file.name.clone(), generation }
    }

    pub(crate) fn generation_error(&self, generation: Generation, problem: impl Into<String>) -> HandoverError {
        let log = LogTail::read(&self.backend.log_path(&self.container(generation)));
        HandoverError::Generation { service: self.service().clone(), generation, problem: problem.into(), log }
    }

    /// Publishes a new owner in the control word.
    pub(crate) fn own_word(&self, generation: Generation, orderly: bool) {
        self.steps.take(Step::Word(generation));
        let epoch = self.control.load().epoch.wrapping_add(1);
        self.control.store(ControlWord { epoch, owner: generation.0, orderly });
    }

    pub(crate) fn set_role(&mut self, generation: Generation, role: Role) {
        if let Some(member) = self.members.get_mut(&generation) {
            member.role = role;
            member.spoken.begin_watch();
        }
        self.say_members();
    }

    /// `to` owns now and `from` is parked. Says it to nobody: this is a part of the blackout.
    pub(crate) fn exchange_roles(&mut self, from: Generation, to: Generation) {
        for (generation, role) in [(from, Role::Parked), (to, Role::Owner)] {
            if let Some(member) = self.members.get_mut(&generation) {
                member.role = role;
                member.spoken.begin_watch();
            }
        }
    }

    pub(crate) fn say_members(&self) {
        self.conditions.watch(&self.record.file.name, self.ground.cgroup, &self.members());
    }

    pub(crate) fn tell(&self, to: Generation, message: &ToService, fds: &[BorrowedFd<'_>]) -> Result<(), Stop> {
        let Some(member) = self.members.get(&to) else {
            return Err(Stop::new(format!("{to} is not there any more")));
        };
        self.steps.take(Step::Tell(to, message.name()));
        match member.channel.send(message, fds) {
            Ok(()) => Ok(()),
            Err(ChannelError::Closed) => Err(self.obituary(to)),
            Err(error) => Err(Stop::new(format!("{to}: {}", with_causes(&error)))),
        }
    }

    pub(crate) fn tell_own(
        &self,
        to: Generation,
        handover: u64,
        commit: Option<Commit>,
        connections_open: Option<u64>,
        follow: bool,
    ) -> Result<(), Stop> {
        self.tell(to, &ToService::Own { handover, commit, connections_open, follow }, &[])
    }

    /// Waits until `generation` says that it serves; returns with how many connections.
    pub(crate) fn await_owned(&mut self, generation: Generation, handover: u64, limit: Duration) -> Result<u64, Stop> {
        self.wait_for("serve", limit, &[generation], |from, notice| match notice {
            Notice::Owned { handover: of, connections } if from == generation && *of == handover => Some(*connections),
            _ => None,
        })
    }

    /// As [`Self::await_owned`], where it does not matter with how many connections: one that has taken the ownership serves,
    /// whatever is to be heard of it instead.
    pub(crate) fn await_serving(&mut self, generation: Generation, handover: u64) -> Result<(), Stop> {
        match self.await_owned(generation, handover, OWNED_TIME_MAX) {
            Err(_) if self.ownership.holder() == generation.0 && !self.is_dead(generation) => Ok(()),
            other => other.map(drop),
        }
    }

    /// Sends the state as it is, bytes; from here on every change of it is forwarded.
    pub(crate) fn send_segments(&mut self, to: Generation) -> Result<u64, Stop> {
        let mut bytes = 0;
        for (index, segment) in &self.segments {
            bytes += nix::sys::stat::fstat(segment).map_or(0, |stat| u64::try_from(stat.st_size).unwrap_or(0));
            self.tell(to, &ToService::Segment { index: *index }, &[segment.as_fd()])?;
        }
        if let Some(member) = self.members.get_mut(&to) {
            member.informed = true;
        }
        Ok(bytes)
    }

    /// Waits for a notice that `pick` takes. A death or failure of one of `involved` ends the wait.
    pub(crate) fn wait_for<T>(
        &mut self,
        what: &str,
        limit: Duration,
        involved: &[Generation],
        mut pick: impl FnMut(Generation, &Notice) -> Option<T>,
    ) -> Result<T, Stop> {
        let deadline = Instant::now() + limit;
        let mut looks = Looks::begin();
        let mut over = false;
        loop {
            while let Some((from, notice)) = self.notices.pop_front() {
                if let Some(picked) = pick(from, &notice) {
                    return Ok(picked);
                }
                if involved.contains(&from)
                    && let Some(stop) = self.failure(from, &notice)
                {
                    return Err(stop);
                }
            }
            if let Some(gone) =
                involved.iter().find(|generation| self.members.get(generation).is_none_or(|member| member.closed))
            {
                return Err(self.obituary(*gone));
            }
            if let Some(reason) = self.cancellable.then(|| self.conditions.cancelled(self.service())).flatten() {
                return Err(Stop::new(reason));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() && !std::mem::replace(&mut over, true) {
                // What has arrived meanwhile counts: whoever looks whether somebody stands still may wait for long itself.
                self.pump(Duration::ZERO, None);
                continue;
            }
            if left.is_zero() {
                let involved: Vec<String> = involved.iter().map(Generation::to_string).collect();
                let limit_ms = limit.as_secs_f64() * 1e3;
                return Err(Stop::new(format!("{} did not {what} within {limit_ms:.0} ms", involved.join(" and "))));
            }
            self.pump(left.min(looks.due_in()), None);
            if let Some(still) = looks.look(self, involved) {
                return Err(Stop::new(format!("{still} is stopped by a signal and did not {what}")));
            }
        }
    }

    /// Why a generation cannot do its part, when it has said so and nobody has waited for it since.
    pub(crate) fn unheard_failure(&self, generation: Generation) -> Option<Stop> {
        let mut of_it = self.notices.iter().filter(|(from, _)| *from == generation);
        of_it.find_map(|(from, notice)| self.failure(*from, notice))
    }

    fn failure(&self, from: Generation, notice: &Notice) -> Option<Stop> {
        match notice {
            Notice::Closed => Some(self.obituary(from)),
            Notice::Failed { what } => Some(Stop::new(format!("{from} failed: {what}"))),
            _ => None,
        }
    }

    /// What became of a generation whose channel closed.
    pub(crate) fn obituary(&self, generation: Generation) -> Stop {
        if let Some(reason) = self.members.get(&generation).and_then(|member| member.spoken.given_up()) {
            return Stop::new(format!("{generation} {reason}"));
        }
        let id = self.container(generation);
        // The socket closes a moment before the exit status is there.
        match self.backend.wait(&id, Duration::from_millis(500)) {
            Ok(ContainerState::Exited { code, signal }) => {
                Stop::new(format!("{generation} {}", describe_exit(code, signal)))
            }
            _ => Stop::new(format!("{generation} closed its control channel")),
        }
    }
}

/// What goes with `Welcome` and `NewSupervisor`.
pub(crate) fn pages<'a>(
    control: &'a ControlPage,
    ownership: &'a OwnershipLock,
    lifeline: &'a PipeReader,
) -> [BorrowedFd<'a>; 3] {
    [control.as_fd(), ownership.as_fd(), lifeline.as_fd()]
}

pub(crate) fn describe_exit(code: Option<i32>, signal: Option<i32>) -> String {
    match (code, signal) {
        (_, Some(signal)) => {
            let name = nix::sys::signal::Signal::try_from(signal).map_or("an unknown signal", |s| s.as_str());
            format!("was ended by {name} ({signal})")
        }
        (Some(code), None) => format!("ended with exit code {code}"),
        (None, None) => "ended".into(),
    }
}
