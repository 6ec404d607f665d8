//! The supervisor of one service: the generations it has, what they say, and where that goes.
//!
//! One thread owns one supervisor. Between handovers it calls [`Supervisor::tick`]; a handover
//! (`protocol.rs`) is a call on the same thread, so nothing here is shared and nothing locks.
//!
//! Not here: the order of a handover (`protocol.rs`) and taking over from a predecessor (`recovery.rs`).

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::io::{PipeReader, PipeWriter};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use warmswap_backend::{Backend, ContainerId, ContainerState, Limits, NamedFd, ServiceGround};
use warmswap_model::{Generation, ServiceFile, ServiceName, with_causes};
use warmswap_transfer::channel::ChannelError;
use warmswap_transfer::control::{ControlPage, ControlWord};
use warmswap_transfer::message::{Commit, ConnectionRecord, PROTOCOL_VERSION, ToService, ToSupervisor, socket_cookie};
use warmswap_transfer::segment::segment_schema;

use crate::conditions::Conditions;
use crate::error::{HandoverError, LogTail};
use crate::journal::{Journal, ServiceRecord};
use crate::lifecycle::REVIVE_DELAY_MIN;
use crate::member::{Greeting, Member, MemberStatus, Role};

/// Names in the descriptor store of a container.
pub(crate) const KEPT_CONTROL: &str = "control";
/// Name of the container's own end.
pub(crate) const GIVEN_CONTROL: &str = "control-of-container";
pub(crate) const KEPT_PAGE: &str = "control-page";
pub(crate) const KEPT_SEGMENT: &str = "segment-";

/// Most segments one service may have at a time; with the usual 16 MiB segments this is 64 GiB.
const SEGMENTS_MAX: usize = 4096;
/// How long a resumed or promoted process may take to say that it serves.
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
    /// Generations hold the reading end: when this process dies, the one that the control word names serves by itself.
    pub(crate) lifeline: (PipeReader, PipeWriter),
    /// The state of the service: one duplicate of every living segment, for followers to come.
    pub(crate) segments: BTreeMap<u64, OwnedFd>,
    /// Cookies of the connections that followers hold duplicates of.
    pub(crate) connections: HashSet<u64>,
    pub(crate) notices: VecDeque<(Generation, Notice)>,
    pub(crate) round: u64,
    /// An owner that died: its shim keeps the state until a successor owns.
    pub(crate) fallen: Option<Generation>,
    pub(crate) revive_at: Option<Instant>,
    pub(crate) revive_delay: Duration,
    pub(crate) revived_at: Option<Instant>,
    pub(crate) last_trouble: Option<String>,
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
        let ground = backend.open_service(&file.name, &file.listen)?;
        let record = ServiceRecord {
            file,
            folder,
            next_generation: Generation::FIRST,
            owner: None,
            greeting: None,
            image,
            previous_image: None,
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
            backend,
            conditions,
            ground,
            record,
            journal,
            members: BTreeMap::new(),
            control: ControlPage::create()?,
            lifeline: std::io::pipe().map_err(|source| HandoverError::System { action: "make a pipe", source })?,
            segments: BTreeMap::new(),
            connections: HashSet::new(),
            notices: VecDeque::new(),
            round: 0,
            fallen: None,
            revive_at: None,
            revive_delay: REVIVE_DELAY_MIN,
            revived_at: None,
            last_trouble: None,
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
        };
        self.members.values().map(status).collect()
    }

    /// Settings that hold from now on; returns what held before. Listeners stay as they are.
    ///
    /// # Errors
    /// When the file is of another service or wants other listeners.
    pub fn configure(&mut self, file: ServiceFile, folder: PathBuf) -> Result<(ServiceFile, PathBuf), HandoverError> {
        if file.name != self.record.file.name {
            let problem = format!("the service file is of {}, not of {}", file.name, self.record.file.name);
            return Err(HandoverError::Refused(problem));
        }
        if file.listen != self.record.file.listen {
            let problem = "listeners cannot change in an update; `warmswap stop` and `warmswap run` it".to_owned();
            return Err(HandoverError::Refused(problem));
        }
        Ok((std::mem::replace(&mut self.record.file, file), std::mem::replace(&mut self.record.folder, folder)))
    }

    /// Writes down what holds now, after [`Self::configure`].
    ///
    /// # Errors
    /// When the journal cannot be written.
    pub fn save(&mut self) -> Result<(), HandoverError> {
        Ok(self.journal.rewrite(&self.record)?)
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
        self.pump(timeout.min(due), wake);
        self.notices.clear(); // between handovers nobody waits for any
        self.end_drained();
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
            if !member.cooperates() && self.backend.signal(&member.id, libc::SIGTERM).is_ok() {
                let _ = self.backend.wait(&member.id, Duration::from_secs(5));
            }
            note(self.backend.destroy(&member.id).map_err(Into::into));
        }
        if let Some(fallen) = self.fallen.take() {
            note(self.backend.destroy(&self.container(fallen)).map_err(Into::into));
        }
        self.members.clear();
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
        let epoch = self.control.load().epoch.wrapping_add(1);
        self.control.store(ControlWord { epoch, owner: generation.0, orderly });
    }

    pub(crate) fn set_role(&mut self, generation: Generation, role: Role) {
        if let Some(member) = self.members.get_mut(&generation) {
            member.role = role;
        }
        self.say_members();
    }

    pub(crate) fn say_members(&self) {
        self.conditions.watch(&self.record.file.name, self.ground.cgroup, &self.members());
    }

    pub(crate) fn tell(&self, to: Generation, message: &ToService, fds: &[BorrowedFd<'_>]) -> Result<(), Stop> {
        let Some(member) = self.members.get(&to) else {
            return Err(Stop::new(format!("{to} is not there any more")));
        };
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
    pub(crate) fn await_owned(&mut self, generation: Generation, handover: u64) -> Result<u64, Stop> {
        self.wait_for("serve", OWNED_TIME_MAX, &[generation], |from, notice| match notice {
            Notice::Owned { handover: of, connections } if from == generation && *of == handover => Some(*connections),
            _ => None,
        })
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
        loop {
            while let Some((from, notice)) = self.notices.pop_front() {
                if let Some(picked) = pick(from, &notice) {
                    return Ok(picked);
                }
                match notice {
                    Notice::Closed if involved.contains(&from) => return Err(self.obituary(from)),
                    Notice::Failed { what } if involved.contains(&from) => {
                        return Err(Stop::new(format!("{from} failed: {what}")));
                    }
                    _ => {}
                }
            }
            if let Some(gone) =
                involved.iter().find(|generation| self.members.get(generation).is_none_or(|member| member.closed))
            {
                return Err(self.obituary(*gone));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let involved: Vec<String> = involved.iter().map(Generation::to_string).collect();
                let limit_ms = limit.as_secs_f64() * 1e3;
                return Err(Stop::new(format!("{} did not {what} within {limit_ms:.0} ms", involved.join(" and "))));
            }
            self.pump(left, None);
        }
    }

    /// What became of a generation whose channel closed.
    pub(crate) fn obituary(&self, generation: Generation) -> Stop {
        let id = self.container(generation);
        // The socket closes a moment before the exit status is there.
        match self.backend.wait(&id, Duration::from_millis(500)) {
            Ok(ContainerState::Exited { code, signal }) => {
                Stop::new(format!("{generation} {}", describe_exit(code, signal)))
            }
            _ => Stop::new(format!("{generation} closed its control channel")),
        }
    }

    /// Reads everything that has arrived, waiting up to `timeout` for the first.
    pub(crate) fn pump(&mut self, timeout: Duration, wake: Option<BorrowedFd<'_>>) {
        let generations: Vec<Generation> =
            self.members.iter().filter(|(_, member)| !member.closed).map(|(generation, _)| *generation).collect();
        {
            let mut polled: Vec<PollFd<'_>> = generations
                .iter()
                .filter_map(|generation| self.members.get(generation))
                .map(|member| PollFd::new(member.channel.as_fd(), PollFlags::POLLIN))
                .collect();
            polled.extend(wake.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
            // Rounded up, or the last millisecond of a wait would spin.
            let ms = timeout.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32;
            let _ = nix::poll::poll(&mut polled, PollTimeout::try_from(ms).unwrap_or(PollTimeout::MAX));
        }
        for generation in generations {
            self.read_all(generation);
        }
    }

    pub(crate) fn read_all(&mut self, generation: Generation) {
        loop {
            let Some(member) = self.members.get_mut(&generation) else { return };
            let received = match member.channel.try_recv() {
                Ok(None) => return,
                Ok(Some(received)) => Ok(received),
                Err(error) => Err(error),
            };
            match received {
                Ok((message, fds)) => self.route(generation, message, fds),
                Err(error) => {
                    member.closed = true;
                    if !matches!(error, ChannelError::Closed) {
                        let what = format!("broke the control protocol: {}", with_causes(&error));
                        tracing::warn!("{generation} of {} {what}", self.record.file.name);
                        self.notices.push_back((generation, Notice::Failed { what }));
                    }
                    self.notices.push_back((generation, Notice::Closed));
                    return;
                }
            }
        }
    }

    fn route(&mut self, from: Generation, message: ToSupervisor, fds: Vec<OwnedFd>) {
        let notice = match message {
            ToSupervisor::Hello { protocol, schemas_read, schema_written, schemas_written_back, .. } => {
                self.welcome(from, protocol, Greeting { schemas_read, schema_written, schemas_written_back })
            }
            ToSupervisor::Ready => {
                if let Some(member) = self.members.get_mut(&from) {
                    member.ready = true;
                }
                Some(Notice::Ready)
            }
            // Only the owner has anything to say about state and connections; whoever else tries is not heard.
            ToSupervisor::Segment { index } if self.speaks_for_service(from) => self.keep_segment(index, fds),
            ToSupervisor::SegmentRetired { index } if self.speaks_for_service(from) => {
                self.drop_segment(index);
                None
            }
            ToSupervisor::Connections { records } if self.speaks_for_service(from) => {
                self.forward_connections(records, &fds)
            }
            ToSupervisor::ConnectionsClosed { cookies } if self.speaks_for_service(from) => {
                for cookie in &cookies {
                    self.connections.remove(cookie);
                }
                self.forward(&ToService::ConnectionsClosed { cookies }, &[]);
                None
            }
            ToSupervisor::Segment { .. }
            | ToSupervisor::SegmentRetired { .. }
            | ToSupervisor::Connections { .. }
            | ToSupervisor::ConnectionsClosed { .. } => {
                tracing::warn!("{from} of {} is not the owner; its message is dropped", self.record.file.name);
                None
            }
            ToSupervisor::CaughtUp { round, commit, connections } => {
                Some(Notice::CaughtUp { round, commit, connections })
            }
            ToSupervisor::Yielded { handover, commit, connections_open } => {
                Some(Notice::Yielded { handover, commit, connections_open })
            }
            ToSupervisor::Owned { handover, connections } => Some(Notice::Owned { handover, connections }),
            ToSupervisor::Drained => None, // its exit follows, and that is what counts
            ToSupervisor::Failed { what } => Some(Notice::Failed { what }),
        };
        if let Some(notice) = notice {
            self.notices.push_back((from, notice));
        }
    }

    /// The owner, or the generation that the control word has just made owner.
    fn speaks_for_service(&self, from: Generation) -> bool {
        self.control.load().owner == from.0
    }

    fn welcome(&mut self, from: Generation, protocol: u32, greeting: Greeting) -> Option<Notice> {
        if protocol != PROTOCOL_VERSION {
            let what = format!("speaks version {protocol} of the control protocol, this agent {PROTOCOL_VERSION}");
            return Some(Notice::Failed { what });
        }
        let service = self.record.file.name.to_string();
        let message = ToService::Welcome { service, generation: from.0, owner: false };
        let member = self.members.get_mut(&from)?;
        member.greeting = Some(greeting);
        if let Err(error) = member.channel.send(&message, &[self.control.as_fd(), self.lifeline.0.as_fd()]) {
            return Some(Notice::Failed { what: with_causes(&error) });
        }
        // It took so long to join that it was made owner as a program that does not know us.
        if self.owner() == Some(from) && self.speaks_for_service(from) {
            let told = self.send_segments(from).and_then(|_| self.tell_own(from, 0, None, None, false));
            return told.err().map(|stop| Notice::Failed { what: stop.reason });
        }
        None
    }

    fn keep_segment(&mut self, index: u64, fds: Vec<OwnedFd>) -> Option<Notice> {
        let fd = fds.into_iter().next()?;
        if self.segments.len() >= SEGMENTS_MAX {
            return Some(Notice::Failed { what: format!("has more than {SEGMENTS_MAX} segments of state") });
        }
        self.leave_behind(segment_schema(fd.as_fd()));
        self.forward(&ToService::Segment { index }, &[fd.as_fd()]);
        for member in self.members.values().filter(|member| member.role != Role::Draining) {
            let kept = fd.try_clone().map_err(|source| HandoverError::System { action: "duplicate a segment", source });
            let kept = kept.and_then(|fd| {
                let name = format!("{KEPT_SEGMENT}{index}");
                self.backend.keep_fd(&member.id, NamedFd { name, fd }).map_err(HandoverError::from)
            });
            if let Err(error) = kept {
                tracing::warn!("segment {index} of {} is not kept for a crash: {}", member.id, with_causes(&error));
            }
        }
        self.segments.insert(index, fd);
        None
    }

    /// A follower that cannot read what the owner writes from now on does not follow any more.
    fn leave_behind(&mut self, schema: Option<u32>) {
        let Some(schema) = schema else { return };
        for member in self.members.values_mut().filter(|member| member.follows()) {
            if member.greeting.as_ref().is_some_and(|greeting| !greeting.schemas_read.contains(&schema)) {
                tracing::info!("{} cannot read schema {schema} and is left behind", member.id);
                member.informed = false;
            }
        }
    }

    /// The schema of the state, when this generation cannot read it.
    pub(crate) fn outgrown(&self, generation: Generation) -> Option<u32> {
        let greeting = self.members.get(&generation)?.greeting.as_ref()?;
        let mut schemas = self.segments.values().filter_map(|fd| segment_schema(fd.as_fd()));
        schemas.find(|schema| !greeting.schemas_read.contains(schema))
    }

    fn drop_segment(&mut self, index: u64) {
        self.segments.remove(&index);
        self.forward(&ToService::SegmentRetired { index }, &[]);
        for member in self.members.values() {
            if let Err(error) = self.backend.drop_kept_fd(&member.id, &format!("{KEPT_SEGMENT}{index}")) {
                tracing::warn!("{}", with_causes(&error));
            }
        }
    }

    /// Passes connections on to the followers, after comparing each with its own descriptor. The supervisor's
    /// duplicates close when `fds` is dropped, or a client would never see the end of its connection.
    fn forward_connections(&mut self, records: Vec<ConnectionRecord>, fds: &[OwnedFd]) -> Option<Notice> {
        let attached = records.iter().filter(|record| record.attached);
        for (record, fd) in attached.zip(fds) {
            match socket_cookie(fd.as_fd()) {
                Ok(cookie) if cookie == record.cookie => {
                    self.connections.insert(cookie);
                }
                other => {
                    let what = format!("sent a descriptor with cookie {other:?} for connection {}", record.cookie);
                    return Some(Notice::Failed { what });
                }
            }
        }
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        self.forward(&ToService::Connections { records }, &borrowed);
        None
    }

    fn forward(&mut self, message: &ToService, fds: &[BorrowedFd<'_>]) {
        for member in self.members.values_mut().filter(|member| member.follows()) {
            if let Err(error) = member.channel.send(message, fds) {
                let notice = match error {
                    ChannelError::Closed => Notice::Closed,
                    error => {
                        member.informed = false;
                        let what = format!("cannot be told what the owner does: {}", with_causes(&error));
                        Notice::Failed { what }
                    }
                };
                self.notices.push_back((member.id.generation, notice));
            }
        }
    }
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
