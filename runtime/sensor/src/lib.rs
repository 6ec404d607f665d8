//! Loads the probes and turns their rings and counters into one-second feature windows.
//!
//! ```text
//! probes ──counters, mapped──▶ windows()
//!        ──urgent ring──▶ a thread of each CPU ──▶ marks()
//!        ──bulk ring────▶ draining thread ───────▶ subscribe()
//! ```
//!
//! A *watched* cgroup has a slot in the counters and yields windows; what happens in cgroups below it belongs to it,
//! unless they are watched themselves: the deepest watched one wins. Sockets belong to the cgroup they were created
//! in (accepted ones to their listener's), everything else to the cgroup of the process.
//!
//! Not here: what the numbers mean, memory in use (the back end knows), or any influence on what is watched.

mod account;
mod at_exit;
mod bpf;
mod btf;
mod catalog;
mod check;
mod cost;
mod drain;
mod error;
mod event;
mod host;
mod layout;
mod load;
mod mapped;
mod ports;
mod probe_log;
mod readers;
mod ring;
mod sampling;
mod urgent;
mod walk;
mod windows;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, TrySendError, bounded};
use warmswap_events::{SLOTS_MAX, map};
use warmswap_model::{CgroupId, FeatureWindow};

pub use account::{Accounting, ClassTotals};
pub use btf::BtfError;
pub use catalog::ProbeStatus;
pub use check::{Finding, FindingState, check};
pub use cost::{RunStatistics, Runs};
pub use drain::{Events, Subscription, Taken};
pub use error::SensorError;
pub use event::{Classes, Detail, Event, Mark, Turn, UnknownClass, make_mark};
pub use host::{CgroupMounts, cgroup_id, cgroup_path};
pub use warmswap_events::Class;
pub use windows::DiskSource;

use account::{Losses, Tally};
use drain::{Drain, Sources};
use load::Loaded;
use ports::Ports;
use readers::Lookout;
use walk::Walk;
use windows::Watched;

pub type Result<T> = std::result::Result<T, SensorError>;

/// The `tracing` target of what the probes say; see [`SensorConfig::probe_log`].
pub const PROBE_LOG_TARGET: &str = "warmswap_probes";

/// Marks that may wait to be read, per taker. A handover makes two.
const MARKS_MAX: usize = 4096;

#[derive(Debug, Clone)]
pub struct SensorConfig {
    /// How many cgroups can be watched at once, 1 to 4,094. Each costs 256 bytes per CPU and 9 KiB.
    pub watched_max: u32,
    /// Room for events that wait for the timer: a power of two, a page or more.
    pub bulk_ring_bytes: u32,
    /// How often the bulk ring is read.
    pub drain_interval: Duration,
    /// SCHED_FIFO priority (1 to 99) of the threads that read events; `None` for ordinary priority.
    pub realtime_priority: Option<i32>,
    /// Names of probes to leave off, as [`Sensor::probes`] lists them.
    pub disabled: Vec<String>,
    /// Whether the probes say what is abnormal: what they lose, and which fallback they take. The draining thread
    /// passes it on to `tracing` as warnings under [`PROBE_LOG_TARGET`]. Off, it costs no time, a ring of one page, and
    /// some 160 KiB of kernel memory: the kernel removes the messages but keeps the pages they came in.
    pub probe_log: bool,
    /// Requests a second of one service above which latencies and gaps are measured of a share of all requests, and counted for all
    /// of them. Measuring each of so many takes some 0.5 % of a CPU.
    pub sampled_above: f64,
    /// Whether the variants of probes are tried that cost less, and that not every kernel has: those that read typed arguments, and
    /// marks by other ways than system calls. They count the same; without them the others can be seen to work.
    pub typed: bool,
}

impl Default for SensorConfig {
    fn default() -> Self {
        Self {
            watched_max: 256,
            // Between two looks: some 900,000 events a second before the first class gives way.
            bulk_ring_bytes: 4 << 20,
            drain_interval: Duration::from_millis(50),
            realtime_priority: Some(10),
            disabled: Vec::new(),
            probe_log: false,
            sampled_above: 20_000.0,
            typed: true,
        }
    }
}

impl SensorConfig {
    fn validate(&self) -> Result<()> {
        let refuse = |what, value: u64, range| Err(SensorError::Config { what, value, range });
        if !(1..=SLOTS_MAX - 2).contains(&self.watched_max) {
            return refuse("watched_max", self.watched_max.into(), "1 to 4094");
        }
        let page = mapped::page_size() as u64;
        if !self.bulk_ring_bytes.is_power_of_two() || u64::from(self.bulk_ring_bytes) < page {
            return refuse("bulk_ring_bytes", self.bulk_ring_bytes.into(), "a power of two, at least a page");
        }
        if let Some(priority) = self.realtime_priority
            && !(1..=99).contains(&priority)
        {
            return refuse("realtime_priority", priority as u64, "1 to 99");
        }
        if self.sampled_above.is_nan() || self.sampled_above <= 0.0 {
            return refuse("sampled_above", self.sampled_above as u64, "more than nothing");
        }
        Ok(())
    }
}

/// The probes, attached as long as this lives.
pub struct Sensor {
    // Stopped first: it reads the rings of `loaded`.
    drain: Option<Drain>,
    config: SensorConfig,
    mounts: CgroupMounts,
    loaded: Loaded,
    ports: Ports,
    watched: Vec<Watched>,
    /// Slots nobody has, the longest unused first: a probe that looked a slot up before it was given back is long
    /// done when it is given out again.
    free: VecDeque<u32>,
    tally: Arc<Tally>,
    losses: Losses,
    /// `None` when it could not be had, which was said.
    lookout: Option<Lookout>,
    /// Whether it was said that input cannot be counted.
    input_refused: bool,
    /// Whether it was said that the kernel goes through no tasks or connections.
    walk_failed: bool,
}

impl Sensor {
    /// Loads the BPF object and attaches what this kernel allows; [`Self::probes`] says what it did not.
    ///
    /// # Errors
    /// When nothing can work: no BTF, no right to load BPF, no programs in the binary.
    pub fn load(config: SensorConfig) -> Result<Self> {
        config.validate()?;
        let mounts = CgroupMounts::of_host().unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot read /proc/self/mountinfo; input is counted only while somebody traces it");
            CgroupMounts::default()
        });
        let loaded = load::load(&config)?;
        let free = (1..=config.watched_max).collect();
        Ok(Self {
            drain: None,
            config,
            mounts,
            loaded,
            ports: Ports::default(),
            watched: Vec::new(),
            free,
            tally: Arc::default(),
            losses: Losses::default(),
            lookout: Lookout::start()
                .inspect_err(|error| tracing::warn!(%error, "input is counted only while somebody traces it"))
                .ok(),
            input_refused: false,
            walk_failed: false,
        })
    }

    /// Every probe, and why it is off when it is.
    #[must_use]
    pub fn probes(&self) -> &[ProbeStatus] {
        &self.loaded.probes
    }

    /// Starts the draining thread; does nothing the second time. Without it counters work, events wait in the rings.
    ///
    /// # Errors
    /// When the thread or its descriptors cannot be had.
    pub fn start(&mut self) -> Result<()> {
        let Loaded { urgent, wakers, bulk, log, cpus, .. } = &mut self.loaded;
        let (Some(urgent), Some(wakers), Some(bulk)) = (urgent.take(), wakers.take(), bulk.take()) else {
            return Ok(());
        };
        let sources = Sources { urgent, wakers, cpus: *cpus, bulk, log: log.take() };
        let control = Arc::clone(&self.loaded.control);
        let tally = Arc::clone(&self.tally);
        let config = &self.config;
        self.drain = Some(Drain::start(sources, control, tally, config.drain_interval, config.realtime_priority)?);
        Ok(())
    }

    /// The real-time priority of the draining thread, or why it has none; `None` before it has run.
    #[must_use]
    pub fn realtime(&self) -> Option<std::result::Result<i32, String>> {
        self.drain.as_ref()?.realtime()
    }

    /// Events from now on. Needs [`Self::start`]: starts the thread when it does not run.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn subscribe(&mut self, wants: Subscription) -> Result<Events> {
        let events = self.drain()?.subscribe(wants);
        self.attach_at_exit();
        Ok(events)
    }

    /// Handover marks from now on, of all cgroups, as soon as they are here: `taker` is called in a thread of the CPU where the mark
    /// was made, at the draining thread's priority, and must not wait for anything. Every taker gets all of them.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn on_marks(&mut self, taker: impl FnMut(Mark) -> Taken + Send + 'static) -> Result<()> {
        self.drain()?.on_marks(Box::new(taker));
        Ok(())
    }

    /// The same through a queue, in which up to 4,096 may wait.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn marks(&mut self) -> Result<Receiver<Mark>> {
        let (sender, receiver) = bounded(MARKS_MAX);
        self.on_marks(move |mark| match sender.try_send(mark) {
            Ok(()) => Taken::Yes,
            Err(TrySendError::Full(_)) => {
                tracing::warn!(?mark, "a taker of marks does not read them; this one is lost to it");
                Taken::No
            }
            Err(TrySendError::Disconnected(_)) => Taken::NoMore,
        })?;
        Ok(receiver)
    }

    /// Waits until everything the probes sent before has reached its queue.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn flush(&mut self) -> Result<()> {
        self.drain()?.flush();
        Ok(())
    }

    fn drain(&mut self) -> Result<&Drain> {
        self.start()?;
        // `start` leaves a thread behind or fails; the rings are taken once, so a failed start stays failed.
        self.drain.as_ref().ok_or_else(|| SensorError::Thread { source: std::io::ErrorKind::NotConnected.into() })
    }

    /// Counts what happens in this cgroup from now on. Does nothing when it is watched already.
    ///
    /// # Errors
    /// When all places are taken, or the kernel refuses the entry.
    pub fn watch(&mut self, cgroup: CgroupId) -> Result<()> {
        if self.watched.iter().any(|watched| watched.cgroup == cgroup) {
            return Ok(());
        }
        let watched_max = self.config.watched_max;
        let slot = self.free.pop_front().ok_or(SensorError::TooManyWatched { cgroup, watched_max })?;
        // What is measured of its last owner is not added any more.
        if let [since] = self.loaded.since.words(slot as usize) {
            since.store(drain::monotonic_ns(), Ordering::Relaxed);
        }
        // The counters are read before the kernel knows the slot: whatever its last owner left is not ours.
        let mut watched = Watched::new(&self.loaded, cgroup, slot, None);
        if let Err(source) = self.loaded.watched.insert(cgroup.0, slot, 0) {
            self.free.push_front(slot);
            return Err(SensorError::MapUpdate { name: map::WATCHED, source });
        }
        // Or the first request would follow the last one of whoever had the slot before. Cannot fail: the place exists.
        let _ = self.loaded.asked.set(slot, 0, 0);
        link_block(&mut self.loaded, &self.mounts, &mut watched);
        self.watched.push(watched);
        self.raise_epoch();
        // What is there already counts from now on.
        self.go(|loaded| loaded.adopt.as_slice());
        self.walk();
        self.look_for_readers();
        Ok(())
    }

    /// Stops counting, and returns the window that ends here. `None` when it is not watched.
    pub fn unwatch(&mut self, cgroup: CgroupId) -> Option<FeatureWindow> {
        let at = self.watched.iter().position(|watched| watched.cgroup == cgroup)?;
        let mut watched = self.watched.remove(at);
        // Fails only when the entry is not there, which is what we want.
        let _ = self.loaded.watched.remove(&cgroup.0);
        if let Some(block) = watched.block {
            let _ = self.loaded.watched_block.remove(&block);
        }
        self.raise_epoch();
        self.walk();
        let last = watched.window(&self.loaded, self.disk_source());
        self.free.push_back(watched.slot);
        Some(last)
    }

    /// Has what tasks and connections have counted taken over.
    fn walk(&mut self) {
        self.go(|loaded| &loaded.walks);
    }

    fn go(&mut self, walks: impl Fn(&Loaded) -> &[Walk]) {
        for walk in walks(&self.loaded) {
            if let Err(error) = walk.go()
                && !std::mem::replace(&mut self.walk_failed, true)
            {
                tracing::warn!(%error, "the kernel does not go through tasks or connections: they are counted as they end");
            }
        }
    }

    /// Whether all places are taken, so that [`Self::watch`] would refuse another cgroup.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    #[must_use]
    pub fn watched(&self) -> Vec<CgroupId> {
        self.watched.iter().map(|watched| watched.cgroup).collect()
    }

    /// After every change of `WATCHED`: what probes have cached is looked up again.
    fn raise_epoch(&self) {
        if let [epoch, ..] = self.loaded.control.words(0) {
            // Release: after the change of the map, though the system call that made it orders it anyway.
            epoch.fetch_add(1, Ordering::Release);
        }
    }

    /// One window per watched cgroup, about the time since the last call (or since it is watched). `usage.memory` is 0;
    /// `usage.disk` comes from [`Self::disk_source`].
    pub fn windows(&mut self) -> Vec<FeatureWindow> {
        self.windows_of(|_| true)
    }

    /// The same of some only: what was counted for the others waits for their next window.
    pub fn windows_of(&mut self, wanted: impl Fn(CgroupId) -> bool) -> Vec<FeatureWindow> {
        self.losses.tell(&self.tally.totals(&self.loaded.account));
        self.walk();
        let disk = self.disk_source();
        let mut windows = Vec::with_capacity(self.watched.len());
        for watched in self.watched.iter_mut().filter(|watched| wanted(watched.cgroup)) {
            if watched.block.is_none() {
                // The v1 folder may have come after `watch`.
                link_block(&mut self.loaded, &self.mounts, watched);
            }
            let window = watched.window(&self.loaded, disk);
            if window.counts.execs > 0 {
                watched.readers.expect(Instant::now());
            }
            windows.push(window);
        }
        self.look_for_readers();
        windows
    }

    /// For how long requests have begun whose latency is measured: all of the time, or a share of it while there are very many
    /// ([`SensorConfig::sampled_above`]). Zero when latencies are not measured.
    #[must_use]
    pub fn requests_measured(&self) -> Duration {
        self.loaded.requests_measured()
    }

    /// Whether what looks for input is attached: it is while a process of a watched cgroup can read any, which [`Self::windows`]
    /// notices within seconds, or somebody has subscribed to it.
    #[must_use]
    pub fn input_is_counted(&self) -> bool {
        self.loaded.at_exit.as_ref().is_some_and(at_exit::AtExit::is_attached)
    }

    /// Has those looked at whose time it is, and attaches what is needed for what was found before.
    fn look_for_readers(&mut self) {
        if let (Some(at_exit), Some(root), Some(lookout)) = (&self.loaded.at_exit, &self.mounts.v2, &self.lookout)
            && !at_exit.is_kept()
        {
            let now = Instant::now();
            for watched in self.watched.iter_mut().filter(|one| one.readers.is_time(now)) {
                // A cgroup that is gone has no readers.
                let folder = host::cgroup_path(root, watched.cgroup).unwrap_or_default();
                lookout.look(&mut watched.readers, folder, now);
            }
        }
        self.attach_at_exit();
    }

    /// Attaches what looks at the end of system calls, or detaches it.
    fn attach_at_exit(&mut self) {
        let Loaded { at_exit: Some(at_exit), object, control, .. } = &mut self.loaded else { return };
        let [_epoch, classes, ..] = control.words(0) else { return };
        let input = Class::Input.bit() | Class::Orientation.bit();
        let wanted = classes.load(Ordering::Relaxed) & input != 0;
        let needed = wanted || self.watched.iter().any(|watched| watched.readers.any());
        if let Err(reason) = at_exit.need(object, needed)
            && !self.input_refused
        {
            self.input_refused = true;
            tracing::warn!(reason, "input is not counted");
        }
    }

    /// Where `usage.disk` comes from. With [`DiskSource::Block`] on a host whose io controller is not on v2, writes
    /// that the kernel makes later on its own (write-back) are nobody's.
    #[must_use]
    pub fn disk_source(&self) -> DiskSource {
        let on = self.probes().iter().any(|probe| probe.name == "block-io" && probe.attached);
        if on { DiskSource::Block } else { DiskSource::Descriptors }
    }

    /// CPU time of the draining thread so far; `None` before [`Self::start`].
    #[must_use]
    pub fn drain_cpu_time(&self) -> Option<Duration> {
        self.drain.as_ref()?.cpu_time()
    }

    /// Lets the kernel measure the run time of BPF programs, all of the host's, which costs each run some 46 ns more.
    ///
    /// # Errors
    /// When the kernel cannot or may not.
    pub fn measure_runs(&self) -> Result<RunStatistics> {
        RunStatistics::begin()
    }

    /// Runs of the probes as far as they were measured; see [`Self::measure_runs`].
    #[must_use]
    pub fn runs(&self) -> Runs {
        cost::runs(&self.loaded.object)
    }

    /// What became of every record since [`Self::load`], per class.
    #[must_use]
    pub fn accounting(&self) -> Accounting {
        self.tally.totals(&self.loaded.account)
    }
}

/// Lets block requests find the slot, once it is known under which id they are charged.
fn link_block(loaded: &mut Loaded, mounts: &CgroupMounts, watched: &mut Watched) {
    let Some(block) = host::block_id(mounts, watched.cgroup) else { return };
    match loaded.watched_block.insert(block, watched.slot, 0) {
        Ok(()) => watched.block = Some(block),
        Err(error) => tracing::warn!(cgroup = %watched.cgroup, %error, "block requests of this cgroup are not counted"),
    }
}
