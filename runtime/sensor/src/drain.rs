//! The draining thread: from the rings to whoever subscribed.
//!
//! ```text
//! urgent ring ──▶ crate::urgent ──wakes──▶ ┐                       ┌▶ subscribers (bounded queues; a full one loses, and
//! bulk ring ─────────────────────timer───▶ ├ one thread, batches ──┤             counts it)
//! log ring ──────────────────────wakes───▶ ┘                       └▶ tracing
//! ```
//!
//! It runs with a low real-time priority where that is allowed, so that a busy host does not delay it; what it does
//! per wake-up is bounded and followed by a pause, so that a flood of events cannot take the CPU from everybody else.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::thread::JoinHandleExt as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use aya::maps::{MapData, PerfEventArray};
use crossbeam::channel::{Receiver, Sender, TrySendError, bounded};
use warmswap_events::{Class, Control, Record};

use crate::account::Tally;
use crate::error::SensorError;
use crate::event::{Classes, Event, Mark, decode};
use crate::mapped::MappedArray;
use crate::probe_log::ProbeLog;
use crate::ring::Ring;
use crate::urgent::{Passed, Post, Urgent, Watchmen, lock};

/// Records per batch, and so between two looks at the urgent ring.
pub(crate) const BATCH_RECORDS: usize = 4096;
/// Urgent records that may wait for the draining thread after others have read them.
const PASSED_MAX: usize = 4096;
/// After a full batch of the bulk ring everybody else gets this long.
const PAUSE: Duration = Duration::from_micros(100);

/// What a subscriber wants.
#[derive(Debug, Clone, Copy)]
pub struct Subscription {
    pub classes: Classes,
    /// Events of all cgroups, not only of watched ones.
    pub everywhere: bool,
    /// Events that may wait to be read; what comes beyond is lost and counted.
    pub capacity: usize,
}

/// Events as they come. Dropping it ends the subscription.
#[derive(Debug)]
pub struct Events {
    receiver: Receiver<Event>,
    lost: Arc<AtomicU64>,
}

impl Events {
    /// For `recv_timeout`, `try_iter` and `select!`.
    #[must_use]
    pub fn receiver(&self) -> &Receiver<Event> {
        &self.receiver
    }

    /// How many events found the queue full.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

struct Subscriber {
    wants: Subscription,
    sender: Sender<Event>,
    lost: Arc<AtomicU64>,
}

/// What became of a mark that was given to a taker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    Yes,
    /// It had no room for it.
    No,
    /// It wants no more of them.
    NoMore,
}

pub(crate) type MarkTaker = Box<dyn FnMut(Mark) -> Taken + Send>;

enum Command {
    Subscribe(Subscriber),
    Marks(MarkTaker),
    /// Read until both rings are empty, then answer.
    Flush(Sender<()>),
    Stop,
}

/// The thread, seen from outside.
pub(crate) struct Drain {
    /// `None` once they are stopped.
    watchmen: Option<Watchmen>,
    commands: Sender<Command>,
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    realtime: Arc<OnceLock<Result<i32, String>>>,
}

/// What the thread reads.
pub(crate) struct Sources {
    pub(crate) urgent: Ring,
    /// By which the probes wake who waits on their CPU.
    pub(crate) wakers: PerfEventArray<MapData>,
    pub(crate) cpus: usize,
    pub(crate) bulk: Ring,
    pub(crate) log: Option<ProbeLog>,
}

struct Worker {
    urgent: Arc<Mutex<Urgent>>,
    /// Records of the urgent ring that were read by others.
    passed: Receiver<Passed>,
    bulk: Ring,
    log: Option<ProbeLog>,
    commands: Receiver<Command>,
    wake: Arc<OwnedFd>,
    epoll: OwnedFd,
    control: Arc<MappedArray<Control>>,
    interval: Duration,
    router: Router,
}

/// Who gets what.
struct Router {
    subscribers: Vec<Subscriber>,
    tally: Arc<Tally>,
    unix_minus_monotonic_ns: u64,
}

impl Drain {
    pub(crate) fn start(
        sources: Sources,
        control: Arc<MappedArray<Control>>,
        tally: Arc<Tally>,
        interval: Duration,
        realtime_priority: Option<i32>,
    ) -> Result<Self, SensorError> {
        let failed = |source| SensorError::Thread { source };
        let wake = Arc::new(event_fd().map_err(failed)?);
        let Sources { urgent, wakers, cpus, bulk, log } = sources;
        let urgent = Urgent::new(urgent, Arc::clone(&tally));
        let mut wake_us = vec![urgent.raw_fd(), wake.as_raw_fd()];
        wake_us.extend(log.as_ref().map(ProbeLog::raw_fd));
        let epoll = epoll_on(&wake_us).map_err(failed)?;
        let (commands, receiver) = bounded(64);
        let (pass, passed) = bounded(PASSED_MAX);
        let urgent = Arc::new(Mutex::new(urgent));
        let post = Post { urgent: Arc::clone(&urgent), passed: pass, wake: Arc::clone(&wake), realtime_priority };
        let watchmen = Watchmen::start(wakers, cpus, &post).map_err(failed)?;
        let worker = Worker {
            urgent,
            passed,
            bulk,
            log,
            commands: receiver,
            wake: Arc::clone(&wake),
            epoll,
            control,
            interval,
            router: Router { subscribers: Vec::new(), tally, unix_minus_monotonic_ns: unix_minus_monotonic_ns() },
        };
        let realtime = Arc::new(OnceLock::new());
        let outcome = Arc::clone(&realtime);
        let thread = std::thread::Builder::new()
            .name("warmswap-sensor".to_owned())
            .spawn(move || {
                // First and last writer, so the cell is empty.
                let _ = outcome.set(realtime_priority.map_or_else(
                    || Err("not asked for".to_owned()),
                    |priority| become_realtime(priority).map(|()| priority),
                ));
                worker.run();
            })
            .map_err(failed)?;
        Ok(Self { watchmen: Some(watchmen), commands, wake, thread: Some(thread), realtime })
    }

    /// The priority the thread got, or why it has none; `None` until it has run.
    pub(crate) fn realtime(&self) -> Option<Result<i32, String>> {
        self.realtime.get().cloned()
    }

    pub(crate) fn cpu_time(&self) -> Option<Duration> {
        let thread = crate::cost::cpu_time(self.thread.as_ref()?.as_pthread_t())?;
        Some(thread + self.watchmen.as_ref()?.cpu_time())
    }

    fn tell(&self, command: Command) {
        // Fails only when the thread is gone; then there is nothing to tell.
        if self.commands.send(command).is_ok() {
            tell(&self.wake);
        }
    }

    pub(crate) fn subscribe(&self, wants: Subscription) -> Events {
        let (sender, receiver) = bounded(wants.capacity.max(1));
        let lost = Arc::new(AtomicU64::new(0));
        self.tell(Command::Subscribe(Subscriber { wants, sender, lost: Arc::clone(&lost) }));
        // The probes send as soon as the thread has taken the subscription; wait for that, so that what the caller does
        // next is seen.
        self.flush();
        Events { receiver, lost }
    }

    pub(crate) fn on_marks(&self, taker: MarkTaker) {
        self.tell(Command::Marks(taker));
        self.flush();
    }

    /// Waits until everything emitted before has been read.
    pub(crate) fn flush(&self) {
        let (done, wait) = bounded(1);
        self.tell(Command::Flush(done));
        // An error means that the thread is gone.
        let _ = wait.recv();
    }
}

impl Drop for Drain {
    fn drop(&mut self) {
        // First: what they pass on the thread still takes.
        self.watchmen = None;
        self.tell(Command::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the sensor's draining thread had panicked");
        }
    }
}

impl Worker {
    fn run(mut self) {
        let mut bulk_at = Instant::now();
        loop {
            let timeout = self.bulk_wanted().then(|| self.interval.saturating_sub(bulk_at.elapsed()));
            self.wait(timeout);
            self.drain_urgent();
            if bulk_at.elapsed() >= self.interval {
                if self.router.forget_who_left() {
                    self.publish_wants();
                }
                self.drain_bulk();
                bulk_at = Instant::now();
                self.router.unix_minus_monotonic_ns = unix_minus_monotonic_ns();
            }
            self.pass_on_log();
            if !self.obey() {
                return;
            }
        }
    }

    fn pass_on_log(&mut self) {
        if let Some(log) = &mut self.log {
            log.flush();
        }
    }

    /// Whether the kernel sends anything that only the timer picks up.
    fn bulk_wanted(&self) -> bool {
        !self.router.subscribers.is_empty()
    }

    fn wait(&self, timeout: Option<Duration>) {
        let timeout_ms = timeout.map_or(-1, |t| i32::try_from(t.as_millis().max(1)).unwrap_or(i32::MAX));
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 3];
        // SAFETY: the buffer holds the three events asked for. An interruption by a signal only makes a round early.
        unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), events.as_mut_ptr(), 3, timeout_ms) };
        let mut count = [0u8; 8];
        // SAFETY: reads 8 bytes into a live buffer from our own non-blocking event descriptor.
        unsafe { libc::read(self.wake.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
    }

    /// What others have read of it, and what nobody has.
    fn drain_urgent(&mut self) {
        let router = &mut self.router;
        lock(&self.urgent).drain(|(record, taken)| router.route_record(&record, &[], taken));
        // After that: who had read something has passed it on before we had the ring.
        for (record, taken) in self.passed.try_iter().take(PASSED_MAX) {
            router.route_record(&record, &[], taken);
        }
    }

    /// Empties the bulk ring, with pauses and without making the urgent one wait.
    fn drain_bulk(&mut self) {
        // A ring refilled faster than it is read would hold us here; the next round comes soon enough.
        for _ in 0..64 {
            let records = self.bulk.drain(BATCH_RECORDS, |bytes| self.router.route(bytes));
            self.drain_urgent();
            if records < BATCH_RECORDS {
                return;
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// False when it is time to stop.
    fn obey(&mut self) -> bool {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Subscribe(subscriber) => {
                    self.router.subscribers.push(subscriber);
                    self.publish_wants();
                }
                Command::Marks(taker) => lock(&self.urgent).add(taker),
                Command::Flush(done) => {
                    self.drain_urgent();
                    self.drain_bulk();
                    self.pass_on_log();
                    // The asker may have gone.
                    let _ = done.send(());
                }
                Command::Stop => return false,
            }
        }
        true
    }

    /// Tells the probes which classes anybody wants.
    fn publish_wants(&self) {
        let classes = self.router.subscribers.iter().fold(0, |bits, s| bits | s.wants.classes.bits());
        let everywhere = self.router.subscribers.iter().any(|s| s.wants.everywhere);
        let [_epoch, classes_word, everywhere_word, ..] = self.control.words(0) else { return };
        // Relaxed: the probes read each word by itself and need no order between them.
        classes_word.store(classes, Ordering::Relaxed);
        everywhere_word.store(u64::from(everywhere), Ordering::Relaxed);
    }
}

impl Router {
    fn route(&mut self, bytes: &[u8]) {
        let Some((record, path)) = decode(bytes) else {
            self.tally.count_malformed();
            return;
        };
        self.route_record(&record, path, false);
    }

    /// `taken`: by somebody else already.
    fn route_record(&mut self, record: &Record, path: &[u8], taken: bool) {
        let Some(class) = Class::from_number(record.class) else { return };
        let seen = self.give_event(class, record, path);
        self.tally.count(class, taken || seen);
    }

    /// Whether anybody has. Not told by an event that cannot be given: where events are rare that would be late.
    fn forget_who_left(&mut self) -> bool {
        let before = self.subscribers.len();
        self.subscribers.retain(|subscriber| Arc::strong_count(&subscriber.lost) > 1);
        self.subscribers.len() < before
    }

    fn give_event(&mut self, class: Class, record: &Record, path: &[u8]) -> bool {
        let wants = |s: &Subscriber| s.wants.classes.contains(class) && (s.wants.everywhere || record.slot != 0);
        if !self.subscribers.iter().any(wants) {
            return false;
        }
        let Some(event) = Event::of(record, path, self.unix_minus_monotonic_ns) else { return false };
        let mut given = false;
        for subscriber in self.subscribers.iter().filter(|subscriber| wants(subscriber)) {
            match subscriber.sender.try_send(event.clone()) {
                Ok(()) => given = true,
                Err(TrySendError::Full(_)) => {
                    subscriber.lost.fetch_add(1, Ordering::Relaxed);
                }
                // It has left, which is noticed in the next round.
                Err(TrySendError::Disconnected(_)) => {}
            }
        }
        given
    }
}

pub(crate) fn event_fd() -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the result is checked and then owned by nobody else.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor the kernel just gave us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Wakes who waits for an event descriptor.
pub(crate) fn tell(event: &OwnedFd) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: writes 8 bytes from a live buffer to our own event descriptor.
    unsafe { libc::write(event.as_raw_fd(), one.as_ptr().cast(), one.len()) };
}

/// Waits for an event, or to be stopped, and says which it was. Neither after a signal.
pub(crate) fn wait_for(event: i32, stop: i32) -> [bool; 2] {
    let fds = [event, stop];
    let mut polled = fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    // SAFETY: a live array of the length given.
    unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, -1) };
    let [first, second] = polled;
    // What is broken can be waited for no more.
    let broken = (first.revents | second.revents) & !libc::POLLIN != 0;
    [first.revents & libc::POLLIN != 0, second.revents != 0 || broken]
}

fn epoll_on(fds: &[i32]) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor the kernel just gave us.
    let epoll = unsafe { OwnedFd::from_raw_fd(fd) };
    for fd in fds {
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: *fd as u64 };
        // SAFETY: a live event structure; the kernel copies it.
        if unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, *fd, &raw mut event) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(epoll)
}

/// Puts the calling thread under SCHED_FIFO, threads and processes it starts not.
pub(crate) fn become_realtime(priority: i32) -> Result<(), String> {
    let parameters = libc::sched_param { sched_priority: priority };
    // SAFETY: a live structure; 0 is the calling thread.
    let result =
        unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, &raw const parameters) };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    Err(if error.raw_os_error() == Some(libc::EPERM) {
        "the kernel refused real-time priority: no CAP_SYS_NICE, or a cpu cgroup with cpu.rt_runtime_us = 0".to_owned()
    } else {
        format!("the kernel refused real-time priority: {error}")
    })
}

fn clock_ns(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a live structure and a clock that exists on every Linux.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    (time.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(time.tv_nsec as u64)
}

pub(crate) fn monotonic_ns() -> u64 {
    clock_ns(libc::CLOCK_MONOTONIC)
}

fn unix_minus_monotonic_ns() -> u64 {
    clock_ns(libc::CLOCK_REALTIME).wrapping_sub(monotonic_ns())
}
