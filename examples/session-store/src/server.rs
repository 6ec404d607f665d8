//! The event loop: one thread, two sets of descriptors.
//!
//! `serving` holds the control channel, the listeners and every connection, `waiting` only the control channel. The owner
//! waits on the first, everybody else on the second. So a follower can have thousands of connections registered
//! and is neither woken nor led to touch one, and becoming owner is one assignment, whatever their number.
//!
//! One turn of the owner: read and execute whatever is ready, publish the state once, look at the control word, send the
//! replies. What was executed but not published is never answered.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use warmswap_sdk::transfer::message::LogPosition;
use warmswap_sdk::transfer::store::{Map, Store};
use warmswap_sdk::{Event, Service};

use crate::Edition;
use crate::commands::{self, About, After, Context};
use crate::connection::{Connection, OUTPUT_LEN_MAX, Outcome};
use crate::epoll::{Epoll, Ready};
use crate::record::Session;
use crate::resp;

const TOKEN_CONTROL: u64 = u64::MAX;
const TOKEN_SIGNAL: u64 = u64::MAX - 1;
/// Listener `n` has the token `TOKEN_LISTENER - n`; socket cookies count up from 1 and never come near.
const TOKEN_LISTENER: u64 = u64::MAX - 2;
/// Most clients; more are accepted and told so.
const CONNECTIONS_MAX: usize = 60_000;
/// Connections accepted per turn and listener.
const ACCEPT_PER_TURN: usize = 64;
/// A turn longer than this leaves the rest to the next one, so that a handover never waits for all clients.
const TURN_MAX: Duration = Duration::from_millis(1);
/// How often expired keys are looked for, and how many bytes of the log are walked each time.
const EXPIRY_INTERVAL: Duration = Duration::from_millis(100);
const EXPIRY_WALK_LEN: usize = 256 << 10;

pub(crate) struct Server {
    service: Service<Store>,
    sessions: Map<Session>,
    edition: Edition,
    serving: Epoll,
    waiting: Epoll,
    /// Kept open for as long as it is in the sets.
    _signal: OwnedFd,
    connections: HashMap<u64, Connection>,
    /// Connections with input or output that is not in the socket: what a handover has to carry.
    unsettled: HashSet<u64>,
    /// Connections with replies of this turn.
    replies: Vec<u64>,
    scratch: Vec<u8>,
    began: Instant,
    commands_processed: u64,
    expiry_at: Instant,
    expiry_cursor: LogPosition,
    leave_by: Option<Instant>,
}

impl Server {
    /// `signal` is from [`termination_signals`].
    pub(crate) fn new(
        service: Service<Store>,
        sessions: Map<Session>,
        edition: Edition,
        signal: OwnedFd,
    ) -> anyhow::Result<Self> {
        let (serving, waiting) = (Epoll::new()?, Epoll::new()?);
        for (at, listener) in service.listeners().iter().enumerate() {
            serving.add(listener.as_fd(), TOKEN_LISTENER - at as u64)?;
        }
        if let Some(control) = service.control_fd() {
            serving.add(control, TOKEN_CONTROL)?;
            waiting.add(control, TOKEN_CONTROL)?;
        }
        serving.add(signal.as_fd(), TOKEN_SIGNAL)?;
        waiting.add(signal.as_fd(), TOKEN_SIGNAL)?;
        Ok(Self {
            service,
            sessions,
            edition,
            serving,
            waiting,
            _signal: signal,
            connections: HashMap::new(),
            unsettled: HashSet::new(),
            replies: Vec::new(),
            scratch: Vec::new(),
            began: Instant::now(),
            commands_processed: 0,
            expiry_at: Instant::now(),
            expiry_cursor: LogPosition::default(),
            leave_by: None,
        })
    }

    pub(crate) fn run(mut self) -> anyhow::Result<()> {
        self.service.ready()?;
        let mut ready = Vec::new();
        loop {
            if self.converse()? || self.leave_by.is_some_and(|by| self.may_leave(by)) {
                self.service.drained()?;
                return Ok(());
            }
            let timeout = self.timeout();
            if self.service.is_owner() {
                self.serving.wait(timeout, &mut ready)?;
            } else {
                self.serving.settle()?;
                self.waiting.wait(timeout, &mut ready)?;
            }
            if ready.iter().any(|ready| ready.token == TOKEN_SIGNAL) {
                return Ok(());
            }
            if self.service.is_owner() {
                self.turn(&ready)?;
            }
        }
    }

    fn timeout(&self) -> Option<Duration> {
        let mine = if self.service.is_owner() {
            Some(self.expiry_at.saturating_duration_since(Instant::now()))
        } else {
            self.leave_by.map(|by| by.saturating_duration_since(Instant::now()))
        };
        match (mine, self.service.wake_within()) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// A process that retires while it owns waits until its clients have their replies; any other leaves at once.
    fn may_leave(&self, by: Instant) -> bool {
        !self.service.is_owner() || self.unsettled.is_empty() || Instant::now() >= by
    }

    /// Everything the supervisor wants. True when the process is to end.
    fn converse(&mut self) -> anyhow::Result<bool> {
        loop {
            let event = match self.service.poll() {
                Ok(Some(event)) => event,
                Ok(None) => return Ok(false),
                // The supervisor cannot be understood any more; the clients can. `ControlLost` comes next.
                Err(error) => {
                    eprintln!("session-store: {:#}", anyhow::Error::from(error));
                    continue;
                }
            };
            match event {
                Event::ConnectionArrived { cookie, fd, listener: _, carry } => {
                    self.serving.add(fd.as_fd(), cookie)?;
                    let mut connection = Connection::new(fd);
                    self.take_up(cookie, &mut connection, &carry);
                    self.connections.insert(cookie, connection);
                }
                Event::ConnectionCarry { cookie, carry } => {
                    if let Some(mut connection) = self.connections.remove(&cookie) {
                        self.take_up(cookie, &mut connection, &carry);
                        self.connections.insert(cookie, connection);
                    }
                }
                Event::ConnectionClosed { cookie } => self.forget(cookie),
                Event::BecomeOwner { .. } => {
                    self.service.serving()?;
                    self.resume()?;
                }
                Event::Quiesce { .. } => self.quiesce()?,
                Event::Retire { deadline } => {
                    if !self.service.is_owner() {
                        return Ok(true);
                    }
                    self.leave_by = Some(deadline);
                }
                Event::ControlLost => {
                    if let Some(control) = self.service.lost_control_fd() {
                        self.serving.remove(control)?;
                        self.waiting.remove(control)?;
                    }
                }
            }
        }
    }

    fn take_up(&mut self, cookie: u64, connection: &mut Connection, carry: &[u8]) {
        if !connection.put_carry(carry) {
            // Not from a program of this family: the client is better told by a closed connection than by a mix of
            // two replies.
            connection.closing = true;
        }
        if connection.is_settled() {
            self.unsettled.remove(&cookie);
        } else {
            self.unsettled.insert(cookie);
        }
    }

    /// Goes on with what was carried over, after this process became owner.
    fn resume(&mut self) -> anyhow::Result<()> {
        self.expiry_at = Instant::now() + EXPIRY_INTERVAL;
        let unsettled: Vec<u64> = self.unsettled.iter().copied().collect();
        for cookie in unsettled {
            self.execute(cookie);
        }
        self.reply()
    }

    /// One turn of the owner.
    fn turn(&mut self, ready: &[Ready]) -> anyhow::Result<()> {
        let turn_ends = Instant::now() + TURN_MAX;
        for (served, ready) in ready.iter().enumerate() {
            // What is not reached is still ready at the next turn; the supervisor gets a word in between.
            if served > 0 && Instant::now() >= turn_ends {
                break;
            }
            match ready.token {
                TOKEN_CONTROL | TOKEN_SIGNAL => {}
                token if token > TOKEN_LISTENER - self.service.listeners().len() as u64 => {
                    self.accept((TOKEN_LISTENER - token) as usize)?;
                }
                cookie => {
                    if ready.readable {
                        self.read(cookie);
                    }
                    if ready.writable {
                        self.execute(cookie);
                        self.replies.push(cookie);
                    }
                }
            }
        }
        if Instant::now() >= self.expiry_at {
            self.expire()?;
        }
        self.reply()?;
        // Fails only for lack of memory; the next write that needs some tells its client.
        let _ = self.service.state_mut().maintain();
        Ok(())
    }

    fn accept(&mut self, listener: usize) -> anyhow::Result<()> {
        for _ in 0..ACCEPT_PER_TURN {
            let Some(fd) = self.service.listeners().get(listener).and_then(|listener| accept(listener.as_fd())) else {
                return Ok(());
            };
            let cookie = self.service.connection_opened(fd.as_fd(), listener)?;
            self.serving.add(fd.as_fd(), cookie)?;
            let mut connection = Connection::new(fd);
            if self.connections.len() >= CONNECTIONS_MAX {
                resp::error(&mut connection.output, "ERR max number of clients reached");
                connection.closing = true;
                self.replies.push(cookie);
            }
            self.connections.insert(cookie, connection);
        }
        Ok(())
    }

    fn read(&mut self, cookie: u64) {
        let Some(connection) = self.connections.get_mut(&cookie) else { return };
        if !connection.wants_input() {
            return;
        }
        if connection.read(&mut self.scratch) == Outcome::Gone {
            connection.closing = true;
            // A client that closed its side only still gets what it asked for.
            connection.input.clear();
            self.replies.push(cookie);
            return;
        }
        self.execute(cookie);
    }

    /// Executes the whole requests in the input, as long as the client reads its replies.
    fn execute(&mut self, cookie: u64) {
        let Some(connection) = self.connections.get_mut(&cookie) else { return };
        let about = About {
            generation: self.service.generation(),
            connections: self.service.connections(),
            commands_processed: self.commands_processed,
            uptime_s: self.began.elapsed().as_secs(),
        };
        let (sessions, store) = (self.sessions, self.service.state_mut());
        let mut context = Context { store, sessions, edition: self.edition, now_ms: commands::now_ms(), about };
        let mut at = 0;
        while !connection.closing && connection.unsent() < OUTPUT_LEN_MAX {
            let input = &connection.input[at..];
            match resp::parse(input) {
                Ok(None) => break,
                Ok(Some(request)) => {
                    let arguments: Vec<&[u8]> = request.arguments.into_iter().map(|range| &input[range]).collect();
                    let after = commands::run(&mut context, &arguments, &mut connection.output);
                    connection.closing = after == After::Close;
                    at += request.len;
                    self.commands_processed += 1;
                }
                Err(error) => {
                    resp::error(&mut connection.output, &error.message());
                    connection.closing = true;
                }
            }
        }
        connection.throttled = connection.unsent() >= OUTPUT_LEN_MAX;
        connection.consume(at);
        if connection.closing {
            connection.input.clear();
        }
        self.replies.push(cookie);
    }

    /// Publishes the state, then sends what was answered.
    fn reply(&mut self) -> anyhow::Result<()> {
        if self.replies.is_empty() {
            return Ok(());
        }
        self.service.commit()?;
        if !self.service.may_write() {
            // Somebody else owns: whatever this process would say now may be untrue. The replies stay for a carry.
            self.unsettled.extend(self.replies.drain(..));
            return Ok(());
        }
        for cookie in std::mem::take(&mut self.replies) {
            self.flush(cookie)?;
        }
        Ok(())
    }

    fn flush(&mut self, cookie: u64) -> anyhow::Result<()> {
        let Some(connection) = self.connections.get_mut(&cookie) else { return Ok(()) };
        let gone = connection.flush() == Outcome::Gone;
        if gone || (connection.closing && connection.unsent() == 0) {
            self.forget(cookie);
            self.service.connection_closed(cookie);
            return Ok(());
        }
        let interest = (connection.wants_input(), connection.unsent() > 0 || connection.throttled);
        if interest != connection.interest {
            self.serving.change(connection.fd.as_fd(), cookie, interest.0, interest.1)?;
            connection.interest = interest;
        }
        if connection.is_settled() {
            self.unsettled.remove(&cookie);
        } else {
            self.unsettled.insert(cookie);
        }
        Ok(())
    }

    /// Closes our descriptor of a connection.
    fn forget(&mut self, cookie: u64) {
        self.unsettled.remove(&cookie);
        if let Some(connection) = self.connections.remove(&cookie) {
            // Fails only for a descriptor that is not in the set, which is what is wanted.
            let _ = self.serving.remove(connection.fd.as_fd());
        }
    }

    /// Everything executed is answered already; what clients have not taken, or not sent completely, is carried over.
    fn quiesce(&mut self) -> anyhow::Result<()> {
        let unsettled: Vec<u64> = self.unsettled.iter().copied().collect();
        self.replies.extend(&unsettled);
        self.reply()?;
        let unsettled: Vec<u64> = self.unsettled.drain().collect();
        let mut carry = Vec::with_capacity(unsettled.len());
        for cookie in unsettled {
            if let Some(connection) = self.connections.get_mut(&cookie) {
                carry.push((cookie, connection.take_carry()));
            }
        }
        self.service.yielded(carry)?;
        Ok(())
    }

    /// Removes expired keys, a stretch of the log at a time.
    fn expire(&mut self) -> anyhow::Result<()> {
        self.expiry_at = Instant::now() + EXPIRY_INTERVAL;
        let now_ms = commands::now_ms();
        let mut expired = Vec::new();
        let store = self.service.state_mut();
        self.expiry_cursor = self.sessions.walk(store, self.expiry_cursor, EXPIRY_WALK_LEN, |key, session| {
            if session.is_expired(now_ms) {
                expired.push(key.to_vec());
            }
        });
        for key in &expired {
            self.sessions.remove(store, key)?;
        }
        if !expired.is_empty() {
            self.service.commit()?;
        }
        Ok(())
    }
}

/// The next waiting connection, non-blocking and without Nagle's delay.
fn accept(listener: BorrowedFd<'_>) -> Option<OwnedFd> {
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: no address is asked for.
    let fd = unsafe { libc::accept4(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), flags) };
    // An error belongs to the one connection (it ended while it waited), or passes (no descriptors left).
    if fd < 0 {
        return None;
    }
    // SAFETY: just accepted, owned by nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let on: libc::c_int = 1;
    // SAFETY: the option's value is a live c_int. On a socket that is no TCP the call fails, and nothing is lost.
    unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_NODELAY,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        );
    }
    Some(fd)
}

/// SIGTERM and SIGINT as a descriptor: process 1 of a container would not see them otherwise. Call before any thread
/// is started: threads inherit the mask, and one without it would take the signal.
pub(crate) fn termination_signals() -> io::Result<OwnedFd> {
    // SAFETY: an all-zero sigset_t is valid storage for sigemptyset.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is live in all four calls.
    let fd = unsafe {
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        libc::sigaddset(&raw mut set, libc::SIGINT);
        if libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) == -1 {
            return Err(io::Error::last_os_error());
        }
        libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    if fd == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just created, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
