//! The thread that drives all connections.
//!
//! *Open loop*: request `k` is due at `start + k / rate`, whatever became of the requests before it, and its latency
//! counts from that instant. A server that stands still for 50 ms therefore shows up in every request that was due in
//! those 50 ms, and not only in the ones that happened to be on their way (no coordinated omission).
//!
//! One thread is enough for well over 100,000 requests a second and sees all answers in one order, which is what the
//! longest gap is measured on.

use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::LoadConfig;
use crate::clock::monotonic_ns;
use crate::connection::{Connection, Ended, Identity, Pending};
use crate::ledger::{Finding, Operation};
use crate::newcomers::Newcomers;
use crate::recorder::{Published, Recorder};
use crate::resp::{Client, Reply};
use crate::result::{FaultKind, record};

const TIMER: u64 = u64::MAX;
const WAKE: u64 = u64::MAX - 1;
/// How often time limits are looked at.
const CHECK_NS: u64 = 10_000_000;
/// Longest catching up after the end, in time limits of one request.
const CATCH_UP_TIMEOUTS_MAX: u64 = 30;
/// Pause between two attempts to reconnect.
const RECONNECT_PAUSE: Duration = Duration::from_millis(20);
/// Keys per pipelined read-back.
const READ_BACK_BATCH: usize = 64;

/// Shared with [`crate::RunningLoad`].
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) stop: AtomicBool,
    pub(crate) wake: EventFd,
    pub(crate) published: Mutex<Published>,
}

/// What the thread gives back when it ends.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) recorder: Recorder,
    pub(crate) ended_ns: u64,
    pub(crate) connections_kept: usize,
}

pub(crate) struct Engine {
    config: LoadConfig,
    shared: Arc<Shared>,
    epoll: Epoll,
    timer: TimerFd,
    connections: Vec<Connection>,
    recorder: Recorder,
    random: u64,
    chunk: Vec<u8>,
    reconnect: Sender<usize>,
    reconnected: Receiver<(usize, std::io::Result<TcpStream>)>,
    newcomers: Newcomers,
    stopping: bool,
}

impl Engine {
    /// `connections` are open; they become non-blocking here.
    pub(crate) fn new(config: LoadConfig, shared: Arc<Shared>, connections: Vec<Connection>) -> nix::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        // The clock in the timer is the one of the schedule, so a due time can be set as it is.
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)?;
        epoll.add(timer.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, TIMER))?;
        epoll.add(shared.wake.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, WAKE))?;
        for (index, connection) in connections.iter().enumerate() {
            if let Some(fd) = connection.fd() {
                epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, index as u64))?;
            }
        }
        let (reconnect, wanted) = std::sync::mpsc::channel();
        let (done, reconnected) = std::sync::mpsc::channel();
        let (address, timeout, wake) = (config.address, config.timeout, Arc::clone(&shared));
        // Ends when the engine drops its end of the channel.
        std::thread::Builder::new()
            .name("load-reconnect".into())
            .spawn(move || reconnect_lost(address, timeout, &wanted, &done, &wake))
            .map_err(|_| nix::errno::Errno::EAGAIN)?;
        let newcomers = Newcomers::start(config.address, config.timeout, config.new_connections_per_s)
            .map_err(|_| nix::errno::Errno::EAGAIN)?;
        let random = config.seed ^ 0x9e37_79b9_7f4a_7c15;
        Ok(Self {
            recorder: Recorder::new(monotonic_ns()),
            config,
            shared,
            epoll,
            timer,
            connections,
            random,
            chunk: vec![0; 64 << 10],
            reconnect,
            reconnected,
            newcomers,
            stopping: false,
        })
    }

    pub(crate) fn started_ns(&self) -> u64 {
        self.recorder.started_ns
    }

    pub(crate) fn run(mut self) -> nix::Result<Outcome> {
        // The kernel may otherwise fire the timer 50 µs late, which would count as latency of the server.
        // Best effort: without it the lag shows in `generator_lag`.
        let _ = nix::sys::prctl::set_timerslack(1);
        let interval_ns = 1e9 / self.config.rate_per_s;
        let started_ns = self.recorder.started_ns;
        let due_at = |request: u64| started_ns + (request as f64 * interval_ns) as u64;
        let mut request = 0_u64;
        let mut ended_ns = None;
        let mut check_at_ns = started_ns + CHECK_NS;
        let mut events = vec![EpollEvent::empty(); 256];
        loop {
            let now = monotonic_ns();
            if ended_ns.is_none() && self.shared.stop.load(Ordering::Acquire) {
                ended_ns = Some(now);
            }
            while !self.stopping && due_at(request) <= now {
                let index = (request % self.connections.len() as u64) as usize;
                self.recorder.totals.scheduled += 1;
                self.connections[index].due.push_back(due_at(request));
                self.advance(index, now);
                request += 1;
            }
            // Only now, so that everything that was due before the end is sent.
            self.stopping = ended_ns.is_some();
            if now >= check_at_ns {
                self.check_time_limits(now);
                self.take_newcomers();
                check_at_ns = now + CHECK_NS;
            }
            if self.recorder.publish_due(now) {
                self.publish(now);
            }
            if let Some(ended_ns) = ended_ns
                && (self.outstanding() == 0 || self.gave_up(ended_ns, now))
            {
                return Ok(self.finish(ended_ns));
            }
            // Requests were due while the others were being sent: no need to sleep.
            let wake_at = if self.stopping { check_at_ns } else { due_at(request).min(check_at_ns) };
            if wake_at <= monotonic_ns() {
                continue;
            }
            let at = TimeSpec::from_duration(Duration::from_nanos(wake_at));
            self.timer.set(Expiration::OneShot(at), TimerSetTimeFlags::TFD_TIMER_ABSTIME)?;
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(nix::errno::Errno::EINTR) => 0,
                Err(error) => return Err(error),
            };
            for event in &events[..count] {
                match event.data() {
                    // Level-triggered: setting it anew or reading it are both fine, and setting happens anyway.
                    TIMER => {}
                    WAKE => {
                        let _ = self.shared.wake.read();
                        self.take_reconnected();
                    }
                    index => self.ready(index as usize),
                }
            }
        }
    }

    /// Sends what is due on a connection, as far as the pipeline limit allows.
    fn advance(&mut self, index: usize, now: u64) {
        let pipeline_max = self.config.pipeline_max;
        while self.connections[index].is_open() && self.connections[index].pending.len() < pipeline_max {
            let Some(due_ns) = self.connections[index].due.pop_front() else { break };
            let operation = self.choose(index);
            self.connections[index].request(operation, due_ns, now);
            self.recorder.sent(due_ns, now);
        }
        let flushed = self.connections[index].flush();
        match flushed {
            Ok(all) => self.want_write(index, !all),
            Err(ended) => self.lose(index, &ended, now),
        }
    }

    fn choose(&mut self, index: usize) -> Operation {
        let reads = self.draw() < self.config.read_share;
        let ledger = &mut self.connections[index].ledger;
        let (counters, values) = (ledger.counters(), ledger.values());
        // splitmix64 again, inlined because `ledger` is borrowed.
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let pick = (mix(self.random) % (counters + values) as u64) as usize;
        match (reads, pick < counters) {
            (true, true) => Operation::GetCounter { key: pick },
            (true, false) => Operation::GetValue { key: pick - counters },
            (false, true) => Operation::Increment { key: pick },
            (false, false) => ledger.next_set(pick - counters),
        }
    }

    /// Uniform in 0 to 1.
    fn draw(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        (mix(self.random) >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn want_write(&mut self, index: usize, wanted: bool) {
        let connection = &mut self.connections[index];
        if connection.wants_write == wanted {
            return;
        }
        connection.wants_write = wanted;
        let mut flags = EpollFlags::EPOLLIN;
        flags.set(EpollFlags::EPOLLOUT, wanted);
        if let Some(fd) = connection.fd() {
            // Fails only for a descriptor that is not in the set, and then the time limit reports the connection.
            let _ = self.epoll.modify(fd, &mut EpollEvent::new(flags, index as u64));
        }
    }

    fn ready(&mut self, index: usize) {
        let ended = self.connections[index].receive(&mut self.chunk);
        // One reading of the clock for all that arrived together, taken as close to the arrival as possible.
        let now = monotonic_ns();
        loop {
            match self.connections[index].next_reply() {
                Ok(Some(reply)) => {
                    let Some(pending) = self.connections[index].pending.pop_front() else {
                        let detail = format!("an answer to no request: {reply}");
                        self.drop_connection(index, FaultKind::Protocol, &detail, now);
                        return;
                    };
                    if !self.answered(index, pending, &reply, now) {
                        return;
                    }
                }
                Ok(None) => break,
                Err(ended) => {
                    self.lose(index, &ended, now);
                    return;
                }
            }
        }
        match ended {
            Some(ended) => self.lose(index, &ended, now),
            None => self.advance(index, now),
        }
    }

    /// Counts one answer. False when the connection had to be given up.
    fn answered(&mut self, index: usize, pending: Pending, reply: &Reply, now: u64) -> bool {
        let finding = self.connections[index].ledger.answer(pending.operation, reply);
        match finding {
            Finding::Mismatch(detail) => {
                // Counted as outstanding again, so that it fails with the others of this connection.
                self.connections[index].pending.push_front(pending);
                self.drop_connection(index, FaultKind::Protocol, &detail, now);
                return false;
            }
            Finding::Refused(text) => {
                let key = self.connections[index].ledger.key(pending.operation);
                self.recorder.failed(1, now);
                self.recorder.totals.uncertain_writes += u64::from(pending.operation.is_write());
                self.recorder.fault(now, index, FaultKind::ErrorReply, format!("{key}: {text}"));
            }
            finding => {
                self.recorder.completed(pending.due_ns, now);
                self.recorder.totals.writes_acknowledged += u64::from(pending.operation.is_write());
                self.note(index, pending.operation, finding, now);
            }
        }
        true
    }

    /// Counts a lost, doubled or wrong value.
    fn note(&mut self, index: usize, operation: Operation, finding: Finding, now: u64) {
        let (kind, count, detail) = match finding {
            Finding::Lost(count) => (FaultKind::LostWrite, count, format!("{count} acknowledged writes are gone")),
            Finding::Duplicated(count) => (FaultKind::DuplicatedWrite, count, format!("{count} writes too many")),
            Finding::WrongRead(detail) => (FaultKind::WrongRead, 1, detail),
            Finding::Right | Finding::Refused(_) | Finding::Mismatch(_) => return,
        };
        let key = self.connections[index].ledger.key(operation);
        self.recorder.wrong(kind, count, now);
        self.recorder.fault(now, index, kind, format!("{key}: {detail}"));
    }

    fn lose(&mut self, index: usize, ended: &Ended, now: u64) {
        match ended {
            Ended::ByPeer => {
                self.recorder.totals.closed_by_server += 1;
                self.drop_connection(index, FaultKind::Closed, "closed by the server", now);
            }
            Ended::Broken(error) => {
                self.recorder.totals.resets += 1;
                self.drop_connection(index, FaultKind::Reset, &error.to_string(), now);
            }
            Ended::Protocol(error) => self.drop_connection(index, FaultKind::Protocol, &error.to_string(), now),
        }
    }

    /// Gives up a connection and everything on its way over it, and asks for a new one.
    fn drop_connection(&mut self, index: usize, kind: FaultKind, detail: &str, now: u64) {
        let connection = &mut self.connections[index];
        let outstanding = connection.pending.len() as u64;
        let mut uncertain = 0;
        for pending in std::mem::take(&mut connection.pending) {
            connection.ledger.give_up(pending.operation);
            uncertain += u64::from(pending.operation.is_write());
        }
        if let Some(stream) = connection.close(now) {
            let _ = self.epoll.delete(stream.as_fd());
        }
        self.recorder.totals.uncertain_writes += uncertain;
        self.recorder.failed(outstanding.max(1), now);
        self.recorder.fault(now, index, kind, format!("{detail}; {outstanding} requests were outstanding"));
        // Fails only when the other thread is gone; then requests keep failing, which is what should be seen.
        let _ = self.reconnect.send(index);
    }

    fn take_reconnected(&mut self) {
        while let Ok((index, result)) = self.reconnected.try_recv() {
            let now = monotonic_ns();
            let opened = result.and_then(|stream| {
                self.epoll.add(stream.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, index as u64))?;
                Ok(stream)
            });
            match opened {
                Ok(stream) => {
                    self.recorder.totals.reconnects += 1;
                    self.connections[index].open(stream);
                    self.advance(index, now);
                }
                Err(error) => {
                    self.recorder.totals.connects_failed += 1;
                    self.recorder.fault(now, index, FaultKind::ConnectFailed, error.to_string());
                    let _ = self.reconnect.send(index);
                }
            }
        }
    }

    fn check_time_limits(&mut self, now: u64) {
        let limit_ns = self.config.timeout.as_nanos() as u64;
        for index in 0..self.connections.len() {
            let connection = &mut self.connections[index];
            if connection.pending.front().is_some_and(|first| now > first.sent_ns + limit_ns) {
                let detail = format!("no answer within {:?}", self.config.timeout);
                self.drop_connection(index, FaultKind::Timeout, &detail, now);
                continue;
            }
            if connection.is_open() {
                continue;
            }
            // Without a connection for long, requests fail unsent; otherwise they would pile up. What waited behind a
            // request that hung gets its chance on the next connection.
            let lost_ns = connection.lost_ns;
            let mut unsent = 0;
            while connection.due.front().is_some_and(|due_ns| now > lost_ns.max(*due_ns) + limit_ns) {
                connection.due.pop_front();
                unsent += 1;
            }
            if unsent > 0 {
                self.recorder.failed(unsent, now);
                let detail = format!("{unsent} requests could not be sent: no connection");
                self.recorder.fault(now, index, FaultKind::Timeout, detail);
            }
        }
    }

    fn take_newcomers(&mut self) {
        for newcomer in self.newcomers.take() {
            match newcomer.result {
                Ok(latency_ns) => {
                    self.recorder.totals.newcomers += 1;
                    record(&mut self.recorder.newcomer_latency, latency_ns);
                }
                Err(detail) => {
                    self.recorder.failed(1, newcomer.at_ns);
                    let index = self.connections.len();
                    self.recorder.fault(newcomer.at_ns, index, FaultKind::Newcomer, detail);
                }
            }
        }
    }

    /// After the end of the run: whether to wait no longer for what is outstanding. A service that is behind but goes on
    /// answering gets the time to catch up.
    fn gave_up(&self, ended_ns: u64, now: u64) -> bool {
        let timeout_ns = self.config.timeout.as_nanos() as u64;
        now > self.recorder.last_completion_ns.max(ended_ns) + timeout_ns
            || now > ended_ns + CATCH_UP_TIMEOUTS_MAX * timeout_ns
    }

    fn outstanding(&self) -> u64 {
        self.connections.iter().map(|c| (c.pending.len() + c.due.len()) as u64).sum()
    }

    fn publish(&mut self, now: u64) {
        let open = self.connections.iter().filter(|c| c.is_open()).count();
        let outstanding = self.outstanding();
        self.recorder.publish(now, open, outstanding, &self.shared.published);
    }

    /// Gives up what is still unanswered, then reads every key back and compares.
    fn finish(mut self, ended_ns: u64) -> Outcome {
        self.newcomers.stop();
        self.take_newcomers();
        let now = monotonic_ns();
        let mut kept = 0;
        for index in 0..self.connections.len() {
            let unsent = self.connections[index].due.drain(..).count() as u64;
            self.recorder.failed(unsent, now);
            if !self.connections[index].pending.is_empty() {
                self.drop_connection(index, FaultKind::Timeout, "no answer until the end of the run", now);
            }
            kept += usize::from(self.read_back(index));
        }
        self.publish(monotonic_ns());
        Outcome { recorder: self.recorder, ended_ns, connections_kept: kept }
    }

    /// True when all keys were read over the very connection that was opened at the start.
    fn read_back(&mut self, index: usize) -> bool {
        let original = self.connections[index].original;
        if let Some(stream) = self.connections[index].take_stream() {
            let _ = self.epoll.delete(stream.as_fd());
            let same = original.is_some() && Identity::of(&stream).ok() == original;
            let client = Client::from_stream(stream, self.config.timeout);
            match client.and_then(|mut client| self.compare(index, &mut client)) {
                Ok(()) => return same,
                Err(error) => {
                    let now = monotonic_ns();
                    self.recorder.failed(1, now);
                    self.recorder.totals.closed_by_server += 1;
                    self.recorder.fault(now, index, FaultKind::Closed, format!("in the final read: {error}"));
                }
            }
        }
        let again = Client::connect(self.config.address, self.config.timeout);
        if let Err(error) = again.and_then(|mut client| self.compare(index, &mut client)) {
            self.recorder.totals.keys_unverified += self.connections[index].ledger.read_back().len() as u64;
            let detail = format!("keys could not be read back: {error}");
            self.recorder.fault(monotonic_ns(), index, FaultKind::ConnectFailed, detail);
        }
        false
    }

    fn compare(&mut self, index: usize, client: &mut Client) -> Result<(), crate::resp::ClientError> {
        let operations = self.connections[index].ledger.read_back();
        let mut answers = Vec::with_capacity(operations.len());
        for batch in operations.chunks(READ_BACK_BATCH) {
            let key = |operation: &Operation| self.connections[index].ledger.key(*operation);
            let commands: Vec<[String; 2]> = batch.iter().map(|o| ["GET".to_owned(), key(o)]).collect();
            answers.extend(client.pipeline(&commands)?);
        }
        let now = monotonic_ns();
        for (operation, reply) in operations.into_iter().zip(&answers) {
            self.recorder.totals.keys_verified += 1;
            match self.connections[index].ledger.answer(operation, reply) {
                Finding::Refused(detail) | Finding::Mismatch(detail) => {
                    self.recorder.failed(1, now);
                    self.recorder.fault(now, index, FaultKind::ErrorReply, format!("in the final read: {detail}"));
                }
                finding => self.note(index, operation, finding, now),
            }
        }
        Ok(())
    }
}

/// The output function of splitmix64.
const fn mix(state: u64) -> u64 {
    let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

pub(crate) fn connect(address: SocketAddr, timeout: Duration) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, timeout)?;
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}

/// Connects lost connections again, on a thread of its own because connecting can block.
fn reconnect_lost(
    address: SocketAddr,
    timeout: Duration,
    wanted: &Receiver<usize>,
    done: &Sender<(usize, std::io::Result<TcpStream>)>,
    shared: &Shared,
) {
    while let Ok(first) = wanted.recv() {
        let mut any_failed = false;
        for index in std::iter::once(first).chain(wanted.try_iter()) {
            let result = connect(address, timeout);
            any_failed |= result.is_err();
            if done.send((index, result)).is_err() {
                return;
            }
        }
        let _ = shared.wake.write(1);
        if any_failed {
            std::thread::sleep(RECONNECT_PAUSE);
        }
    }
}
