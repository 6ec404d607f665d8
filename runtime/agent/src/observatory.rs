//! What is known about the services right now: fine-grained measurements for VERIFY, one-second windows for the
//! forecast, handover marks for the blackout.
//!
//! The probes count; [`Observatory::poll`] reads the counts and cuts time at that instant. A tick is a cut like any other,
//! so a measurement can begin and end between ticks without taking anything from the windows.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crossbeam::channel::Receiver;
use warmswap_model::{
    Blackout, CgroupId, Durations, FeatureWindow, Generation, LatencyHistogram, Measurements, PerResource, ProbeCounts,
    ServiceName,
};
use warmswap_sensor::{Mark, Sensor};

use crate::api::Container;
use crate::clock::unix_ms;
use crate::containers::{Others, Shown, Whose};
use crate::lock;

/// Slices of a service are kept this long, for "before".
const SLICES_KEPT: Duration = Duration::from_secs(60);
/// One-second windows of a service kept at hand, for plots.
const WINDOWS_KEPT: usize = 900;
const MARKS_KEPT: usize = 1024;
/// How long a mark may take from the kernel to here.
const MARK_DELAY_MAX: Duration = Duration::from_millis(100);
/// A slice belongs to a measurement when it began at most this long before it.
const CUT_TOLERANCE: Duration = Duration::from_millis(5);

/// The marks of the SDK (see `warmswap-sdk`).
const MARK_STOPPED: u32 = 1;
const MARK_SERVING: u32 = 2;

/// Which cgroups make up a service.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Cgroups {
    /// Owns the sockets: network and request latency.
    pub(crate) ground: Option<CgroupId>,
    pub(crate) owner: Option<CgroupId>,
    pub(crate) generations: Vec<(Generation, CgroupId)>,
}

impl Cgroups {
    fn all(&self) -> impl Iterator<Item = CgroupId> + '_ {
        self.ground.into_iter().chain(self.generations.iter().map(|(_, cgroup)| *cgroup))
    }
}

/// What a service did between two cuts.
#[derive(Debug, Clone)]
struct Slice {
    from: Instant,
    to: Instant,
    counts: ProbeCounts,
    durations: Durations,
    disk_mb: f64,
}

#[derive(Debug, Default)]
struct Watched {
    cgroups: Cgroups,
    slices: VecDeque<Slice>,
    /// Since the last tick.
    pending: Vec<Slice>,
    windows: VecDeque<FeatureWindow>,
    memory_mb: f64,
    /// Why its programs cannot share the ports that they bind.
    ports_unshared: Option<String>,
}

/// What one cgroup did.
#[derive(Debug, Clone, Default)]
pub(crate) struct Work {
    pub(crate) counts: ProbeCounts,
    pub(crate) latency: LatencyHistogram,
    pub(crate) disk_mb: f64,
    /// Over how long, when that is not the length of the snapshot, s.
    pub(crate) seconds: Option<f64>,
}

impl Work {
    fn add(&mut self, window: &FeatureWindow) {
        add_all(&mut self.counts, &window.counts);
        self.latency.add(&window.durations.request_latency);
        self.disk_mb += window.usage.disk * f64::from(window.length_ms) / 1e3;
    }
}

/// What every cgroup did since the last snapshot.
struct LiveWork {
    since: Instant,
    work: BTreeMap<CgroupId, Work>,
}

/// One snapshot of it.
pub(crate) struct LiveCut {
    pub(crate) seconds: f64,
    /// Whether there are probes at all.
    pub(crate) counted: bool,
    pub(crate) work: BTreeMap<CgroupId, Work>,
    pub(crate) others: Vec<Shown>,
    /// Containers that have no place.
    pub(crate) unwatched: usize,
}

struct Inner {
    sensor: Option<Sensor>,
    last_cut: Instant,
    services: BTreeMap<ServiceName, Watched>,
    others: Others,
    /// While somebody looks.
    live: Option<LiveWork>,
}

pub(crate) struct Observatory {
    inner: Mutex<Inner>,
    /// From the sensor's own thread, which waits for nobody.
    marks_coming: Option<Receiver<Mark>>,
    /// The last of them.
    marks: Mutex<VecDeque<Mark>>,
}

impl Observatory {
    pub(crate) fn new(mut sensor: Option<Sensor>) -> Self {
        let marks_coming = sensor.as_mut().and_then(|sensor| {
            sensor.marks().inspect_err(|error| tracing::warn!("blackouts are not measured in the kernel: {error}")).ok()
        });
        let inner = Inner {
            sensor,
            last_cut: Instant::now(),
            services: BTreeMap::new(),
            others: Others::default(),
            live: None,
        };
        Self { inner: Mutex::new(inner), marks_coming, marks: Mutex::new(VecDeque::with_capacity(MARKS_KEPT)) }
    }

    pub(crate) fn with_sensor<T>(&self, read: impl FnOnce(&mut Sensor) -> T) -> Option<T> {
        lock(&self.inner).sensor.as_mut().map(read)
    }

    /// The last marks, those that came meanwhile among them.
    fn marks(&self) -> MutexGuard<'_, VecDeque<Mark>> {
        let mut marks = lock(&self.marks);
        for mark in self.marks_coming.iter().flat_map(Receiver::try_iter) {
            if marks.len() == MARKS_KEPT {
                marks.pop_front();
            }
            marks.push_back(mark);
        }
        marks
    }

    /// Which cgroups count for a service from now on.
    pub(crate) fn watch(&self, service: &ServiceName, cgroups: Cgroups) {
        let mut inner = lock(&self.inner);
        let Inner { sensor, services, others, live, .. } = &mut *inner;
        let watched = services.entry(service.clone()).or_default();
        if watched.cgroups == cgroups {
            return;
        }
        if let Some(sensor) = sensor {
            watched.cgroups.all().filter(|old| !cgroups.all().any(|new| new == *old)).for_each(|old| {
                sensor.unwatch(old);
                sensor.unshare_ports(old);
            });
            // Before the first program of the service starts.
            watched.ports_unshared =
                cgroups.ground.and_then(|ground| sensor.share_ports(ground).err()).map(|error| error.to_string());
            for new in cgroups.all() {
                if sensor.is_full() && !watched.cgroups.all().any(|old| old == new) {
                    note(live, others.make_room(sensor));
                }
                if let Err(error) = sensor.watch(new) {
                    tracing::warn!("{service} is not fully watched: {error}");
                }
            }
            others.settle(sensor);
        }
        watched.cgroups = cgroups;
    }

    pub(crate) fn forget(&self, service: &ServiceName) {
        let mut inner = lock(&self.inner);
        let Inner { sensor, services, others, .. } = &mut *inner;
        if let (Some(watched), Some(sensor)) = (services.remove(service), sensor) {
            watched.cgroups.all().for_each(|cgroup| {
                sensor.unwatch(cgroup);
                sensor.unshare_ports(cgroup);
            });
            others.settle(sensor);
        }
    }

    /// Whether programs of a service can share the ports that they bind, else why not.
    pub(crate) fn ports_shared(&self, service: &ServiceName) -> Result<(), String> {
        let inner = lock(&self.inner);
        let sensor = inner.sensor.as_ref().ok_or("there are no probes here")?;
        if let Some(reason) = inner.services.get(service).and_then(|watched| watched.ports_unshared.clone()) {
            return Err(reason);
        }
        match sensor.ports_refused() {
            Ok(0) => Ok(()),
            Ok(_) => Err("the kernel does not let a bound port be shared (Linux 6.1 is needed)".into()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// A container of another tool has come; it is watched when there is a place.
    pub(crate) fn come(&self, cgroup: CgroupId, container: Container) {
        let mut inner = lock(&self.inner);
        let Inner { sensor, others, .. } = &mut *inner;
        others.come(sensor.as_mut(), cgroup, container);
    }

    /// It has gone; what it did last is not lost. `None` when this cgroup was no container.
    pub(crate) fn leave(&self, cgroup: CgroupId) -> Option<Container> {
        let mut inner = lock(&self.inner);
        let Inner { sensor, others, live, .. } = &mut *inner;
        let container = others.find(cgroup).cloned()?;
        note(live, others.leave(sensor.as_mut(), cgroup, Instant::now()));
        Some(container)
    }

    /// Somebody looks: from now on it is kept what every cgroup does.
    pub(crate) fn begin_live(&self) {
        let mut inner = lock(&self.inner);
        Self::poll(&mut inner);
        Self::poll_others(&mut inner);
        inner.others.unseen();
        inner.live = Some(LiveWork { since: inner.last_cut, work: BTreeMap::new() });
    }

    pub(crate) fn end_live(&self) {
        lock(&self.inner).live = None;
    }

    /// Up to the last tick; `None` when nobody looks.
    pub(crate) fn cut_live(&self) -> Option<LiveCut> {
        let mut inner = lock(&self.inner);
        inner.live.as_ref()?;
        Self::poll_others(&mut inner);
        let Inner { sensor, others, live, last_cut, .. } = &mut *inner;
        let live = live.as_mut()?;
        let since = std::mem::replace(&mut live.since, *last_cut);
        let (shown, unwatched) = others.show();
        Some(LiveCut {
            seconds: last_cut.duration_since(since).as_secs_f64(),
            counted: sensor.is_some(),
            work: std::mem::take(&mut live.work),
            others: shown,
            unwatched,
        })
    }

    /// The service and generation, or the container, that this cgroup is the outermost of.
    pub(crate) fn whose(&self, cgroup: CgroupId) -> Option<Whose> {
        let inner = lock(&self.inner);
        let service = inner.services.iter().find_map(|(name, watched)| {
            let generation = watched.cgroups.generations.iter().find(|(_, of)| *of == cgroup);
            match generation {
                Some((generation, _)) => Some(Whose::Service(name.clone(), Some(*generation))),
                None if watched.cgroups.ground == Some(cgroup) => Some(Whose::Service(name.clone(), None)),
                None => None,
            }
        });
        service.or_else(|| inner.others.find(cgroup).cloned().map(Whose::Other))
    }

    /// Reads the counts and cuts time here.
    fn poll(inner: &mut Inner) {
        let now = Instant::now();
        let from = std::mem::replace(&mut inner.last_cut, now);
        let Inner { sensor, others, live, .. } = inner;
        // What other tools started is read when somebody looks, and only then.
        let ours = |sensor: &mut Sensor| sensor.windows_of(|cgroup| !others.has(cgroup));
        let windows = sensor.as_mut().map(ours).unwrap_or_default();
        if let Some(live) = live {
            windows.iter().for_each(|window| live.work.entry(window.cgroup).or_default().add(window));
        }
        let by_cgroup: BTreeMap<CgroupId, FeatureWindow> =
            windows.into_iter().map(|window| (window.cgroup, window)).collect();
        for watched in inner.services.values_mut() {
            let mut slice =
                Slice { from, to: now, counts: ProbeCounts::default(), durations: Durations::default(), disk_mb: 0.0 };
            if let Some(ground) = watched.cgroups.ground.and_then(|cgroup| by_cgroup.get(&cgroup)) {
                add_network(&mut slice.counts, &ground.counts);
                slice.durations.add(&ground.durations);
            }
            if let Some(owner) = watched.cgroups.owner.and_then(|cgroup| by_cgroup.get(&cgroup)) {
                add_all(&mut slice.counts, &owner.counts);
                slice.durations.add(&owner.durations);
                slice.disk_mb = owner.usage.disk * f64::from(owner.length_ms) / 1e3;
            }
            watched.slices.push_back(slice.clone());
            watched.pending.push(slice);
            while watched.slices.front().is_some_and(|first| now.duration_since(first.to) > SLICES_KEPT) {
                watched.slices.pop_front();
            }
        }
    }

    /// The same for what other tools started.
    fn poll_others(inner: &mut Inner) {
        let Inner { sensor, others, live, .. } = inner;
        let Some(sensor) = sensor else { return };
        for window in sensor.windows_of(|cgroup| others.has(cgroup)) {
            others.note(&window);
            if let Some(live) = live {
                live.work.entry(window.cgroup).or_default().add(&window);
            }
        }
    }

    /// What is counted from now on is apart from what was counted before.
    pub(crate) fn cut(&self) {
        Self::poll(&mut lock(&self.inner));
    }

    /// The service over the last `length`; `None` when it is not watched or there are no probes.
    pub(crate) fn measure(&self, service: &ServiceName, length: Duration) -> Option<Measurements> {
        let mut inner = lock(&self.inner);
        inner.sensor.as_ref()?;
        Self::poll(&mut inner);
        let watched = inner.services.get(service)?;
        let since = Instant::now().checked_sub(length + CUT_TOLERANCE)?;
        let slices: Vec<&Slice> = watched.slices.iter().filter(|slice| slice.from >= since).collect();
        let (first, last) = (slices.first()?, slices.last()?);
        let seconds = last.to.duration_since(first.from).as_secs_f64();
        if seconds <= 0.0 {
            return None;
        }
        let (counts, durations, disk_mb) = sum(slices.iter().copied());
        let latency = &durations.request_latency;
        let us = |q| latency.quantile_ns(q).map(|ns| ns as f64 / 1e3);
        Some(Measurements {
            seconds,
            requests: latency.count(),
            p50_us: us(0.5),
            p99_us: us(0.99),
            requests_per_s: latency.count() as f64 / seconds,
            tcp_resets: counts.tcp_resets,
            usage: usage(&counts, disk_mb, watched.memory_mb, seconds),
            memory_latency_ns: None,
        })
    }

    /// Ends the present one-second window of every service. `memory_mb` knows the memory of a service.
    pub(crate) fn tick(&self, memory_mb: impl Fn(&ServiceName) -> Option<f64>) -> Vec<(ServiceName, FeatureWindow)> {
        // Before there are more than can wait.
        drop(self.marks());
        let names: Vec<ServiceName> = lock(&self.inner).services.keys().cloned().collect();
        let memory: BTreeMap<ServiceName, Option<f64>> =
            names.into_iter().map(|name| (name.clone(), memory_mb(&name))).collect();
        let end_unix_ms = unix_ms();
        let mut inner = lock(&self.inner);
        Self::poll(&mut inner);
        let mut ended = Vec::with_capacity(inner.services.len());
        for (name, watched) in &mut inner.services {
            let slices = std::mem::take(&mut watched.pending);
            let (Some(first), Some(last)) = (slices.first(), slices.last()) else { continue };
            let seconds = last.to.duration_since(first.from).as_secs_f64();
            let Some(cgroup) = watched.cgroups.owner.or(watched.cgroups.ground).filter(|_| seconds > 0.0) else {
                continue;
            };
            watched.memory_mb = memory.get(name).copied().flatten().unwrap_or(watched.memory_mb);
            let (counts, durations, disk_mb) = sum(slices.iter());
            let window = FeatureWindow {
                cgroup,
                end_unix_ms,
                length_ms: (seconds * 1e3).round().clamp(1.0, f64::from(u32::MAX)) as u32,
                usage: usage(&counts, disk_mb, watched.memory_mb, seconds),
                counts,
                durations,
            };
            if watched.windows.len() == WINDOWS_KEPT {
                watched.windows.pop_front();
            }
            watched.windows.push_back(window.clone());
            ended.push((name.clone(), window));
        }
        ended
    }

    /// The newest windows of a service, oldest first.
    pub(crate) fn windows(&self, service: &ServiceName, most: usize) -> Vec<FeatureWindow> {
        let inner = lock(&self.inner);
        let Some(watched) = inner.services.get(service) else { return Vec::new() };
        let skip = watched.windows.len().saturating_sub(most);
        watched.windows.iter().skip(skip).cloned().collect()
    }

    /// From the stop mark of `from` to the serve mark of `to`. Marks count only from the cgroup of the generation they
    /// name, so that no service can speak for another.
    pub(crate) fn blackout(
        &self,
        service: &ServiceName,
        handover: u64,
        from: Generation,
        to: Generation,
    ) -> Option<Blackout> {
        let cgroup_of = |generation: Generation| {
            let inner = lock(&self.inner);
            let generations = &inner.services.get(service)?.cgroups.generations;
            generations.iter().find(|(of, _)| *of == generation).map(|(_, cgroup)| *cgroup)
        };
        let (from_cgroup, to_cgroup) = (cgroup_of(from), cgroup_of(to));
        lock(&self.inner).sensor.as_ref()?;
        let deadline = Instant::now() + MARK_DELAY_MAX;
        loop {
            {
                let marks = self.marks();
                let last = |kind: u32, generation: Generation, cgroup: Option<CgroupId>| {
                    marks.iter().rev().find(|mark| {
                        mark.mark == kind
                            && mark.handover == handover
                            && mark.generation == generation.0
                            && cgroup.is_none_or(|cgroup| mark.cgroup == cgroup)
                    })
                };
                if let (Some(stopped), Some(serving)) =
                    (last(MARK_STOPPED, from, from_cgroup), last(MARK_SERVING, to, to_cgroup))
                    && let Some(ns) = serving.time_ns.checked_sub(stopped.time_ns)
                {
                    return Some(Blackout { us: ns as f64 / 1e3, measured_in_kernel: true });
                }
            }
            if Instant::now() >= deadline {
                return None;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// A window that ended before its time.
fn note(live: &mut Option<LiveWork>, window: Option<FeatureWindow>) {
    if let (Some(live), Some(window)) = (live, window) {
        live.work.entry(window.cgroup).or_default().add(&window);
    }
}

fn sum<'a>(slices: impl Iterator<Item = &'a Slice>) -> (ProbeCounts, Durations, f64) {
    let mut counts = ProbeCounts::default();
    let mut durations = Durations::default();
    let mut disk_mb = 0.0;
    for slice in slices {
        add_all(&mut counts, &slice.counts);
        durations.add(&slice.durations);
        disk_mb += slice.disk_mb;
    }
    (counts, durations, disk_mb)
}

pub(crate) fn usage(counts: &ProbeCounts, disk_mb: f64, memory_mb: f64, seconds: f64) -> PerResource<f64> {
    PerResource {
        cpu: counts.run_ns as f64 / 1e7 / seconds,
        memory: memory_mb,
        network: (counts.rx_bytes + counts.tx_bytes) as f64 * 8.0 / 1e6 / seconds,
        disk: disk_mb / seconds,
    }
}

fn add_all(to: &mut ProbeCounts, from: &ProbeCounts) {
    add_work(to, from);
    add_network(to, from);
}

/// What is accounted to the cgroup that owns the socket.
fn add_network(to: &mut ProbeCounts, from: &ProbeCounts) {
    to.rx_packets += from.rx_packets;
    to.rx_bytes += from.rx_bytes;
    to.tx_packets += from.tx_packets;
    to.tx_bytes += from.tx_bytes;
    to.tcp_opened += from.tcp_opened;
    to.accepts += from.accepts;
    to.tcp_closed += from.tcp_closed;
    to.tcp_resets += from.tcp_resets;
    to.tcp_resets_received += from.tcp_resets_received;
    to.tcp_retransmits += from.tcp_retransmits;
}

/// What is accounted to the cgroup of the process that did it.
fn add_work(to: &mut ProbeCounts, from: &ProbeCounts) {
    to.execs += from.execs;
    to.forks += from.forks;
    to.exits += from.exits;
    to.oom_kills += from.oom_kills;
    to.reads += from.reads;
    to.read_bytes += from.read_bytes;
    to.writes += from.writes;
    to.write_bytes += from.write_bytes;
    to.block_requests += from.block_requests;
    to.block_bytes += from.block_bytes;
    to.block_sequential += from.block_sequential;
    to.tty_inputs += from.tty_inputs;
    to.device_inputs += from.device_inputs;
    to.orientation_changes += from.orientation_changes;
    to.run_ns += from.run_ns;
    to.run_delay_ns += from.run_delay_ns;
    to.page_faults += from.page_faults;
    to.major_faults += from.major_faults;
}
