//! One process of a service: its role, and the conversation with the supervisor.

mod connections;
mod news;
mod ownership;
mod state;

use std::cell::Cell;
use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use warmswap_transfer::channel::{ChannelError, ServiceChannel};
use warmswap_transfer::control::{ControlView, ControlWord};
use warmswap_transfer::log::LogError;
use warmswap_transfer::message::{
    CARRY_LEN_MAX, Commit, Message as _, PROTOCOL_VERSION, ToService, ToSupervisor, socket_cookie,
};
use warmswap_transfer::ownership::OwnershipLock;
use warmswap_transfer::page::PageError;
use warmswap_transfer::state::{Followed, State};

use crate::environment::{self, Listener};
use crate::outbox::Outbox;
use state::Preparation;

/// How long [`join`] waits for the supervisor's welcome.
const WELCOME_TIME_MAX: Duration = Duration::from_secs(10);
/// How often a follower looks at the log: what comes in between is what the blackout has to read.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(2);
/// How soon a full control socket is tried again.
const RETRY_INTERVAL: Duration = Duration::from_millis(1);
/// Connections sent to a follower per call of [`Service::poll`] while serving: about 30 µs.
const RESEND_PER_POLL: usize = 64;
/// `prctl` option of the handover marks ("WSWP"): fails with EINVAL, but the probes see it.
const MARK_OPTION: libc::c_int = 0x5753_5750;
const MARK_STOPPED: libc::c_ulong = 1;
const MARK_SERVING: libc::c_ulong = 2;

/// Why a service cannot take part.
#[derive(Debug, thiserror::Error)]
pub enum SdkError {
    #[error("{variable}={value:?} does not name descriptors that this process was started with")]
    Environment { variable: &'static str, value: String },
    #[error("cannot {what}")]
    System {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot listen on {address}")]
    Listen {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("the supervisor did not answer within {} s", WELCOME_TIME_MAX.as_secs())]
    NoWelcome,
    #[error("the supervisor said {got} before its welcome")]
    Unexpected { got: &'static str },
    #[error("the conversation with the supervisor broke")]
    Channel(#[from] ChannelError),
    #[error("what the supervisor shares cannot be used")]
    Page(#[from] PageError),
    #[error("the state cannot be used")]
    State(#[from] LogError),
}

/// What the service's loop has to do.
#[derive(Debug)]
pub enum Event {
    /// A connection that the owner serves: keep it, touch nothing before [`Event::BecomeOwner`]. `carry` is empty
    /// unless a handover is under way.
    ConnectionArrived { cookie: u64, fd: OwnedFd, listener: String, carry: Vec<u8> },
    /// What the owner carried over for a connection that is here already; replaces what came before.
    ConnectionCarry { cookie: u64, carry: Vec<u8> },
    /// Close this connection: it has ended in the owner, or cannot be continued.
    ConnectionClosed { cookie: u64 },
    /// Take up what was carried over and serve, then call [`Service::serving`].
    BecomeOwner { handover: u64 },
    /// Stop taking work; finish and flush what is possible by `deadline`; then call [`Service::yielded`].
    Quiesce { handover: u64, deadline: Instant },
    /// Finish by `deadline`, call [`Service::drained`] and exit.
    Retire { deadline: Instant },
    /// No supervisor will ever speak again: stop watching [`Service::control_fd`]. An owner goes on serving.
    ControlLost,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Follower,
    Owner,
}

#[derive(Debug)]
struct Link {
    channel: ServiceChannel,
    shared: Shared,
    generation: u32,
    lost: bool,
}

/// What the supervisor shares with every generation of the service.
#[derive(Debug)]
struct Shared {
    page: ControlView,
    ownership: OwnershipLock,
    /// Closed at the other end when the supervisor dies.
    supervisor: OwnedFd,
}

impl Shared {
    /// The channel has checked how many descriptors came.
    fn new(fds: Vec<OwnedFd>) -> Result<Self, SdkError> {
        let [page, ownership, supervisor] =
            <[OwnedFd; 3]>::try_from(fds).map_err(|_| SdkError::Unexpected { got: "half a greeting" })?;
        let (page, ownership) = (ControlView::map(page.as_fd())?, OwnershipLock::map(ownership.as_fd())?);
        Ok(Self { page, ownership, supervisor })
    }
}

impl Link {
    fn word(&self) -> ControlWord {
        self.shared.page.load()
    }

    fn is_named(&self) -> bool {
        self.word().owner == self.generation
    }

    fn supervisor_is_dead(&self) -> bool {
        let mut entry = libc::pollfd { fd: self.shared.supervisor.as_raw_fd(), events: 0, revents: 0 };
        // SAFETY: one live entry.
        let reported = unsafe { libc::poll(&raw mut entry, 1, 0) == 1 };
        reported && entry.revents & (libc::POLLHUP | libc::POLLERR | libc::POLLNVAL) != 0
    }
}

/// A connection that the service has open.
#[derive(Debug)]
struct Known {
    /// Number of a descriptor that the service owns. Its cookie is compared before every use, so that a number
    /// the service closed (and the kernel gave away again) is never sent for somebody else's connection.
    fd: RawFd,
    listener: String,
}

/// What this process carried over when it yielded, in case nobody takes it up.
#[derive(Debug)]
struct Yielded {
    handover: u64,
    carry: HashMap<u64, Vec<u8>>,
    word: ControlWord,
    /// [How often](warmswap_transfer::ownership::OwnershipCell::servings) somebody had begun to serve by then. `None`: that
    /// cannot be compared any more.
    servings: Option<u32>,
}

/// See the crate's documentation.
#[derive(Debug)]
pub struct Service<S> {
    link: Option<Link>,
    listeners: Vec<Listener>,
    state: S,
    role: Role,
    connections: HashMap<u64, Known>,
    events: VecDeque<Event>,
    outbox: Outbox,
    /// A follower wants to hear of every change.
    follow: bool,
    /// What of the state is still to be done for that follower.
    preparation: Preparation,
    resend: VecDeque<u64>,
    opened: Vec<u64>,
    closed: Vec<u64>,
    caught_up: Option<(u64, Option<Commit>)>,
    quiescing: Option<(u64, Instant)>,
    serving_for: Option<u64>,
    yielded: Option<Yielded>,
    /// Since when the control word names this follower.
    named_since: Option<Instant>,
    /// As owner it was told that it may not write.
    silenced: Cell<bool>,
    /// Connections for which a follower may hold a carry of a handover that was given up.
    stale_carry: HashSet<u64>,
    /// Carries of which pieces are still to come.
    pieces: HashMap<u64, Vec<u8>>,
    state_broken: bool,
    /// It was told to end because its supervisor died.
    leaving: bool,
}

/// Takes part as the environment says: under a supervisor, or alone with the listeners of `LISTEN_FDS`.
///
/// # Errors
/// When the environment is damaged, or the supervisor does not answer.
pub fn join<S: State>(state: S) -> Result<Service<S>, SdkError> {
    let listeners = environment::listeners()?;
    match environment::control_fd()? {
        Some(fd) => Service::with_channel(state, listeners, ServiceChannel::from_fd(fd)?),
        None => Ok(Service::alone(state, listeners)),
    }
}

impl<S: State> Service<S> {
    /// Runs by itself, without a supervisor, on addresses of its own.
    ///
    /// # Errors
    /// When an address cannot be listened on.
    pub fn standalone(state: S, listen: &[(&str, SocketAddr)]) -> Result<Self, SdkError> {
        let listeners = listen.iter().map(|(name, address)| {
            let failed = |source| SdkError::Listen { address: *address, source };
            let fd = OwnedFd::from(TcpListener::bind(address).map_err(failed)?);
            environment::set_nonblocking(&fd)?;
            Ok(Listener::new((*name).to_owned(), fd))
        });
        Ok(Self::alone(state, listeners.collect::<Result<_, SdkError>>()?))
    }

    fn alone(state: S, listeners: Vec<Listener>) -> Self {
        let mut service = Self::assemble(state, listeners, None);
        service.own(0, None, None, false);
        service
    }

    /// Joins over a channel that the caller brings (tests, embedding).
    ///
    /// # Errors
    /// When the supervisor does not welcome this process.
    pub fn with_channel(state: S, listeners: Vec<Listener>, mut channel: ServiceChannel) -> Result<Self, SdkError> {
        let (schemas_read, schema_written) = state.schemas();
        let schemas_written_back = state.schemas_written_back();
        let sdk = env!("CARGO_PKG_VERSION").to_owned();
        let (protocol, state_kind) = (PROTOCOL_VERSION, state.kind());
        let hello = ToSupervisor::Hello {
            protocol,
            sdk,
            schemas_read,
            schema_written,
            schemas_written_back,
            state: state_kind,
        };
        channel.send(&hello, &[])?;
        let (welcome, fds) = channel.recv_timeout(WELCOME_TIME_MAX)?.ok_or(SdkError::NoWelcome)?;
        let ToService::Welcome { service: _, generation, owner } = welcome else {
            return Err(SdkError::Unexpected { got: welcome.name() });
        };
        let link = Link { channel, shared: Shared::new(fds)?, generation, lost: false };
        let mut service = Self::assemble(state, listeners, Some(link));
        if owner {
            service.own(0, None, None, false);
        }
        Ok(service)
    }

    fn assemble(state: S, listeners: Vec<Listener>, link: Option<Link>) -> Self {
        Self {
            link,
            listeners,
            state,
            role: Role::Follower,
            connections: HashMap::new(),
            events: VecDeque::new(),
            outbox: Outbox::default(),
            follow: false,
            preparation: Preparation::default(),
            resend: VecDeque::new(),
            opened: Vec::new(),
            closed: Vec::new(),
            caught_up: None,
            quiescing: None,
            serving_for: None,
            yielded: None,
            named_since: None,
            silenced: Cell::new(false),
            stale_carry: HashSet::new(),
            pieces: HashMap::new(),
            state_broken: false,
            leaving: false,
        }
    }

    #[must_use]
    pub fn listeners(&self) -> &[Listener] {
        &self.listeners
    }

    /// To watch for reading; `None` when there is no supervisor.
    #[must_use]
    pub fn control_fd(&self) -> Option<BorrowedFd<'_>> {
        self.link.as_ref().filter(|link| !link.lost).map(|link| link.channel.as_fd())
    }

    /// After [`Event::ControlLost`]: the descriptor that is not to be watched any more.
    #[must_use]
    pub fn lost_control_fd(&self) -> Option<BorrowedFd<'_>> {
        self.link.as_ref().filter(|link| link.lost).map(|link| link.channel.as_fd())
    }

    #[must_use]
    pub fn state(&self) -> &S {
        &self.state
    }

    #[must_use]
    pub fn state_mut(&mut self) -> &mut S {
        &mut self.state
    }

    #[must_use]
    pub fn is_owner(&self) -> bool {
        self.role == Role::Owner
    }

    /// This process's generation; 0 without a supervisor.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.link.as_ref().map_or(0, |link| link.generation)
    }

    /// To be asked before anything leaves that a client can see: one load of the control word.
    #[must_use]
    pub fn may_write(&self) -> bool {
        if self.role != Role::Owner {
            return false;
        }
        let named = self.link.as_ref().is_none_or(Link::is_named);
        if !named {
            self.silenced.set(true);
        }
        named
    }

    /// How long the loop may sleep before it calls [`Self::poll`] again, whatever happens to its descriptors.
    #[must_use]
    pub fn wake_within(&self) -> Option<Duration> {
        let link = self.link.as_ref().filter(|link| !link.lost)?;
        let _ = link;
        let resends = !self.resend.is_empty() && self.outbox.is_empty();
        if !self.events.is_empty() || resends || self.preparation.is_due() {
            Some(Duration::ZERO)
        } else if !self.outbox.is_empty() || self.preparation.waits() {
            Some(RETRY_INTERVAL)
        } else if self.role == Role::Follower && !self.state_broken {
            Some(FOLLOW_INTERVAL)
        } else {
            None
        }
    }

    /// Says that this process is initialised. Call once, before the loop.
    ///
    /// # Errors
    /// When the conversation broke.
    pub fn ready(&mut self) -> Result<(), SdkError> {
        self.tell(ToSupervisor::Ready, Vec::new())
    }

    /// After [`Event::BecomeOwner`]: this process serves.
    ///
    /// # Errors
    /// When the conversation broke.
    pub fn serving(&mut self) -> Result<(), SdkError> {
        let Some(handover) = self.serving_for.take() else { return Ok(()) };
        self.mark(MARK_SERVING, handover);
        self.tell(ToSupervisor::Owned { handover, connections: self.connections.len() as u64 }, Vec::new())
    }

    /// After [`Event::Retire`]: nothing is left to do, the process is about to exit.
    ///
    /// # Errors
    /// When the conversation broke.
    pub fn drained(&mut self) -> Result<(), SdkError> {
        self.release_ownership();
        self.tell(ToSupervisor::Drained, Vec::new())
    }

    /// A connection was accepted on listener `listener` (its place in [`Self::listeners`]). The service keeps the
    /// descriptor open until it calls [`Self::connection_closed`] with the cookie that this returns.
    ///
    /// # Errors
    /// When `fd` is no socket.
    pub fn connection_opened(&mut self, fd: BorrowedFd<'_>, listener: usize) -> Result<u64, SdkError> {
        let cookie = socket_cookie(fd).map_err(|source| SdkError::System { what: "identify a socket", source })?;
        let listener = self.listeners.get(listener).map_or_else(String::new, |listener| listener.name.clone());
        self.connections.insert(cookie, Known { fd: fd.as_raw_fd(), listener });
        if self.follow {
            self.opened.push(cookie);
        }
        Ok(cookie)
    }

    /// The service has closed its descriptor of this connection.
    pub fn connection_closed(&mut self, cookie: u64) {
        if self.connections.remove(&cookie).is_some() && self.follow {
            self.closed.push(cookie);
        }
    }

    /// How many connections this process holds.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// After [`Event::Quiesce`]: this process has stopped serving. `carry` holds, for each connection that needs it, the
    /// unparsed input, unsent output and whatever else the successor must know, in the service's own encoding.
    ///
    /// # Errors
    /// When the conversation broke. A successor that never comes is no error: [`Event::BecomeOwner`] will follow.
    pub fn yielded(&mut self, carry: Vec<(u64, Vec<u8>)>) -> Result<(), SdkError> {
        let Some((handover, deadline)) = self.quiescing.take() else { return Ok(()) };
        self.mark(MARK_STOPPED, handover);
        let state_problem = self.state.hand_over().err();
        let commit = self.commit()?;
        self.send_all_connections(deadline)?;
        let kept: HashMap<u64, Vec<u8>> =
            carry.into_iter().filter(|(cookie, _)| self.connections.contains_key(cookie)).collect();
        let outdated: Vec<u64> = self.stale_carry.drain().filter(|cookie| !kept.contains_key(cookie)).collect();
        let mut records = Vec::new();
        for cookie in outdated.into_iter().filter(|cookie| self.connections.contains_key(cookie)) {
            records.push(self.record(cookie, &[], false, false));
        }
        for (cookie, carry) in &kept {
            let pieces = carry.chunks(CARRY_LEN_MAX).collect::<Vec<_>>();
            for (at, piece) in pieces.iter().enumerate() {
                records.push(self.record(*cookie, piece, false, at + 1 < pieces.len()));
            }
        }
        self.push_records(&records, Vec::new());
        self.say_moved();
        self.state.become_follower();
        self.announce_all()?;
        self.role = Role::Follower;
        self.follow = false;
        self.preparation = Preparation::default();
        let servings = self.link.as_ref().map(|link| link.shared.ownership.servings());
        let word = self.link.as_ref().map_or_else(ControlWord::default, Link::word);
        self.yielded = Some(Yielded { handover, carry: kept, word, servings });
        self.release_ownership();
        let connections_open = self.connections.len() as u64;
        match state_problem {
            None => self.outbox.push(ToSupervisor::Yielded { handover, commit, connections_open }, Vec::new()),
            // The handover is called off, and this process is told to own again.
            Some(problem) => self.fail(describe(&problem)),
        }
        // Nobody is served now, so this may wait for a supervisor that reads slowly, within the budget.
        self.flush_until(deadline).map(drop)
    }

    /// The next thing to do. Never blocks; `None` when there is nothing (left) to do.
    ///
    /// # Errors
    /// When the supervisor broke the protocol. An owner may go on serving: no further event will come.
    pub fn poll(&mut self) -> Result<Option<Event>, SdkError> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            let Some(link) = self.link.as_mut().filter(|link| !link.lost) else { return Ok(None) };
            match link.channel.try_recv() {
                Ok(Some((message, fds))) => self.handle(message, fds)?,
                Ok(None) => {
                    self.work()?;
                    if self.events.is_empty() {
                        return Ok(None);
                    }
                }
                Err(ChannelError::Closed) => self.lose(),
                // Whoever sent it, it was one packet: the next one can be understood again. Should it have stood for
                // something, the handover does without and is called off.
                Err(error) if error.is_of_one_message() => self.fail(describe(&error)),
                Err(error) => {
                    self.lose();
                    return Err(error.into());
                }
            }
        }
    }

    /// What is to be done when no message waits.
    fn work(&mut self) -> Result<(), SdkError> {
        if self.role == Role::Follower {
            self.follow_log();
        }
        self.outlive_supervisor();
        if self.role == Role::Owner && !self.follow && self.state.let_followers_go() {
            self.announce_all()?;
        }
        self.prepare_state()?;
        // Each waits with a duplicate: what the supervisor does not read shall not use up this process's descriptors.
        if self.outbox.is_empty() {
            self.send_some_connections()?;
        }
        self.send_changes()?;
        self.answer_caught_up()?;
        self.flush()
    }

    fn handle(&mut self, message: ToService, fds: Vec<OwnedFd>) -> Result<(), SdkError> {
        match message {
            ToService::Welcome { .. } => {}
            ToService::NewSupervisor => {
                if let Some(link) = self.link.as_mut() {
                    let before = std::mem::replace(&mut link.shared, Shared::new(fds)?);
                    if let Some(yielded) = &mut self.yielded
                        && !link.shared.ownership.is_same_as(&before.ownership)
                    {
                        yielded.servings = None;
                    }
                    if self.role == Role::Owner {
                        // The same lock as before, unless nobody had kept it.
                        link.shared.ownership.try_acquire(link.generation);
                    }
                }
            }
            ToService::Segment { index } => {
                if self.role == Role::Follower
                    && let Some(fd) = fds.into_iter().next()
                {
                    match self.state.add_segment(index, fd) {
                        // A parked process hears of segments that it has, or made itself.
                        Ok(()) | Err(LogError::Duplicate { .. }) => {}
                        Err(error) => {
                            self.state_broken = true;
                            self.fail(describe(&error));
                        }
                    }
                }
            }
            ToService::SegmentRetired { index } => {
                if self.role == Role::Follower
                    && !self.state_broken
                    && let Err(error) = self.state.retire_segment(index)
                {
                    self.fail(describe(&error));
                }
            }
            ToService::Follow { on } => {
                self.follow = on && self.role == Role::Owner;
                self.opened.clear();
                self.closed.clear();
                self.resend = if self.follow { self.connections.keys().copied().collect() } else { VecDeque::new() };
                if self.role == Role::Owner {
                    self.state_followed(if on { Followed::ByNewcomer } else { Followed::ByNobody });
                }
            }
            ToService::Connections { records } => self.take_connections(records, fds),
            ToService::ConnectionsClosed { cookies } => {
                if self.role == Role::Follower {
                    for cookie in cookies {
                        self.drop_connection(cookie);
                    }
                }
            }
            ToService::CaughtUp { round, commit } => {
                self.caught_up = Some((round, commit));
                if self.role == Role::Follower {
                    self.follow_log();
                }
                self.answer_caught_up()?;
            }
            ToService::Yield { handover, budget_us } => {
                if self.role == Role::Owner {
                    let deadline = Instant::now() + Duration::from_micros(budget_us);
                    self.quiescing = Some((handover, deadline));
                    self.events.push_back(Event::Quiesce { handover, deadline });
                } else {
                    self.fail(format!("asked to yield for handover {handover}, but this process does not own"));
                }
            }
            ToService::Own { handover, commit, connections_open, follow } => {
                self.own(handover, commit, connections_open, follow);
            }
            ToService::Retire { drain_ms } => {
                let deadline = Instant::now() + Duration::from_millis(drain_ms);
                self.events.push_back(Event::Retire { deadline });
            }
        }
        Ok(())
    }

    fn fail(&mut self, what: String) {
        self.outbox.push(ToSupervisor::Failed { what }, Vec::new());
    }

    fn tell(&mut self, message: ToSupervisor, fds: Vec<OwnedFd>) -> Result<(), SdkError> {
        if self.link.is_none() {
            return Ok(());
        }
        self.outbox.push(message, fds);
        self.flush()
    }

    fn flush(&mut self) -> Result<(), SdkError> {
        let Some(link) = self.link.as_ref().filter(|link| !link.lost) else { return Ok(()) };
        let sent = self.outbox.flush(&link.channel);
        self.survive(sent.map(drop))
    }

    /// A closed channel is an event, not an error.
    fn survive(&mut self, result: Result<(), ChannelError>) -> Result<(), SdkError> {
        match result {
            Err(ChannelError::Closed) => {
                self.lose();
                Ok(())
            }
            other => other.map_err(SdkError::from),
        }
    }

    fn lose(&mut self) {
        let Some(link) = self.link.as_mut().filter(|link| !link.lost) else { return };
        link.lost = true;
        self.outbox = Outbox::default();
        self.follow = false;
        self.state_followed(Followed::ByNobody);
        self.events.push_back(Event::ControlLost);
        if self.role == Role::Follower {
            // It can never become owner.
            self.events.push_back(Event::Retire { deadline: Instant::now() });
        }
    }

    fn mark(&self, mark: libc::c_ulong, handover: u64) {
        let Some(link) = &self.link else { return };
        // SAFETY: an option that the kernel does not know: it looks at no argument and returns EINVAL. The probes see
        // the call.
        unsafe { libc::prctl(MARK_OPTION, mark, handover as libc::c_ulong, libc::c_ulong::from(link.generation), 0) };
    }
}

/// An error with its causes, on one line, for the supervisor's report.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
