//! Snapshots for `warmswap top`: one after each tick, for whoever listens. While nobody does, nothing is put together.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{Receiver, Sender, channel, error::TrySendError};
use warmswap_backend::ContainerId;
use warmswap_handover::Role;
use warmswap_model::{CgroupId, FeatureWindow, PerResource, ServiceName};
use warmswap_policy::Activity;
use warmswap_sensor::{RunStatistics, Runs, Sensor};

use crate::alarms::killed;
use crate::api::{EventAccount, KernelCost, Live, LiveContainer, News, NewsKind, ProbeCost, Tool};
use crate::clock::unix_ms;
use crate::lock;
use crate::observatory::{LiveCut, Work};
use crate::service::ServiceHandle;
use crate::shared::Shared;

/// Snapshots that may wait for a slow reader; it misses the next ones.
const WAITING_MAX: usize = 8;
/// News that a new listener is told of.
const NEWS_KEPT: usize = 64;

struct Listener {
    lines: Sender<Live>,
    /// Whether it wants to know what the probes cost in the kernel.
    cost: bool,
    /// The last news it was told.
    told: u64,
}

/// What the last snapshot's rates begin at.
#[derive(Default)]
struct Reading {
    at: Option<Instant>,
    accounts: Vec<EventAccount>,
    drain: Option<Duration>,
    runs: Option<Runs>,
}

#[derive(Default)]
struct Inner {
    listeners: Vec<Listener>,
    before: Reading,
    statistics: Option<RunStatistics>,
}

#[derive(Default)]
struct NewsLog {
    last: u64,
    kept: VecDeque<News>,
}

/// Who listens, and what there is to tell.
#[derive(Default)]
pub(crate) struct LiveHub {
    inner: Mutex<Inner>,
    news: Mutex<NewsLog>,
}

impl LiveHub {
    /// Something happened. Cheap, and done whether anybody listens or not: who comes later is told.
    pub(crate) fn tell(&self, kind: NewsKind, of: &str, text: String) {
        let mut log = lock(&self.news);
        log.last += 1;
        let news = News { id: log.last, unix_ms: unix_ms(), kind, of: of.to_owned(), text };
        if log.kept.len() == NEWS_KEPT {
            log.kept.pop_front();
        }
        log.kept.push_back(news);
    }

    /// Snapshots from the next tick on, until the receiver is dropped.
    pub(crate) fn listen(&self, shared: &Shared, cost: bool) -> Receiver<Live> {
        let (lines, received) = channel(WAITING_MAX);
        let mut inner = lock(&self.inner);
        if inner.listeners.is_empty() {
            shared.observatory.begin_live();
            inner.before = shared.observatory.with_sensor(|sensor| Reading::of(sensor)).unwrap_or_default();
        }
        inner.listeners.push(Listener { lines, cost, told: 0 });
        received
    }

    /// The agent ends: whoever listens is not to wait for more.
    pub(crate) fn close(&self) {
        lock(&self.inner).listeners.clear();
    }

    /// At the end of a tick, with its windows.
    pub(crate) fn publish(&self, shared: &Shared, windows: &[(ServiceName, FeatureWindow)]) {
        let mut inner = lock(&self.inner);
        inner.listeners.retain(|listener| !listener.lines.is_closed());
        if !inner.listeners.iter().any(|listener| listener.cost) {
            inner.statistics = None;
        }
        if inner.listeners.is_empty() {
            shared.observatory.end_live();
            return;
        }
        let Some(cut) = shared.observatory.cut_live() else { return };
        let probes = inner.probes(shared);
        let live = Live {
            unix_ms: unix_ms(),
            seconds: cut.seconds,
            cpus: shared.backend.capacity().map_or(0, |capacity| capacity.cpus),
            containers: containers(shared, windows, &cut),
            unwatched: cut.unwatched,
            probes,
            news: Vec::new(),
        };
        for other in live.containers.iter().filter(|row| row.tool != Tool::Warmswap && row.oom_kills > 0) {
            self.tell(NewsKind::OomKill, &other.name, killed(other.oom_kills));
        }
        let log = lock(&self.news);
        inner.listeners.retain_mut(|listener| {
            let news = log.kept.iter().filter(|news| news.id > listener.told).cloned().collect();
            match listener.lines.try_send(Live { news, ..live.clone() }) {
                Ok(()) => {
                    listener.told = log.last;
                    true
                }
                Err(TrySendError::Full(_)) => true,
                Err(TrySendError::Closed(_)) => false,
            }
        });
    }
}

impl Reading {
    fn of(sensor: &Sensor) -> Self {
        Self {
            at: Some(Instant::now()),
            accounts: crate::http::event_accounts(sensor),
            drain: sensor.drain_cpu_time(),
            runs: None,
        }
    }
}

impl Inner {
    fn probes(&mut self, shared: &Shared) -> ProbeCost {
        let wanted = self.listeners.iter().any(|listener| listener.cost);
        let read = shared.observatory.with_sensor(|sensor| {
            if wanted && self.statistics.is_none() {
                let begun = sensor.measure_runs();
                self.statistics =
                    begun.inspect_err(|error| tracing::warn!("{}", warmswap_model::with_causes(error))).ok();
            }
            let mut now = Reading::of(sensor);
            now.runs = self.statistics.is_some().then(|| sensor.runs());
            let attached = sensor.probes().iter().filter(|probe| probe.attached).count();
            (now, attached, sensor.probes().len() - attached)
        });
        let Some((now, attached, off)) = read else { return ProbeCost::default() };
        let mut cost = ProbeCost { attached, off, ..ProbeCost::default() };
        let before = std::mem::replace(&mut self.before, now);
        let now = &self.before;
        let Some(seconds) = now.at.zip(before.at).map(|(now, before)| now.duration_since(before).as_secs_f64()) else {
            return cost;
        };
        let seconds = seconds.max(1e-3);
        cost.account(&before.accounts, &now.accounts, seconds);
        let reading = now.drain.zip(before.drain).and_then(|(now, before)| now.checked_sub(before));
        cost.reading_cpu = reading.map(|time| time.as_secs_f64() * 100.0 / seconds);
        if let (Some(statistics), Some(before), Some(now)) = (&self.statistics, before.runs, now.runs) {
            let net = statistics.net(before, now);
            let count = now.count.saturating_sub(before.count) as f64;
            cost.kernel = Some(KernelCost {
                cpu: net.as_secs_f64() * 100.0 / seconds,
                runs_per_s: count / seconds,
                ns_per_run: if count > 0.0 { net.as_secs_f64() * 1e9 / count } else { 0.0 },
                empty_ns: statistics.empty_ns(),
            });
        }
        cost
    }
}

/// Generations of services, then what other tools started.
fn containers(shared: &Shared, windows: &[(ServiceName, FeatureWindow)], cut: &LiveCut) -> Vec<LiveContainer> {
    let windows: BTreeMap<&ServiceName, &FeatureWindow> = windows.iter().map(|(name, window)| (name, window)).collect();
    let mut all = Vec::new();
    for handle in shared.services() {
        all.extend(generations(shared, &handle, windows.get(&handle.name).copied(), cut));
    }
    let idle = Work::default();
    for shown in &cut.others {
        let work = cut.work.get(&shown.cgroup).unwrap_or(&idle);
        let memory = shared.containers.memory_mb(&shown.container);
        let row = row(shown.container.tool, shown.container.name.clone(), shown.cgroup, work, memory, cut);
        all.push(LiveContainer { path: Some(shown.container.path.clone()), ended: shown.ended, ..row });
    }
    all
}

fn generations(
    shared: &Shared,
    handle: &ServiceHandle,
    window: Option<&FeatureWindow>,
    cut: &LiveCut,
) -> Vec<LiveContainer> {
    let snapshot = lock(&handle.snapshot).clone();
    let activity = lock(&handle.state).activity;
    let doing = (activity != Activity::Serving).then(|| format!("{activity:?}").to_lowercase());
    let trouble = snapshot.trouble.is_some();
    let note = snapshot.trouble.or(doing);
    let demand = lock(&shared.forecaster).demand(&handle.name);
    let name = handle.name.to_string();
    let idle = Work::default();
    let mut rows: Vec<LiveContainer> = Vec::new();
    for member in &snapshot.members {
        let serves = member.role == Role::Owner;
        // The service's window has what its sockets did, too.
        let of_service = window.filter(|_| serves).map(|window| Work {
            counts: window.counts,
            latency: window.durations.request_latency.clone(),
            disk_mb: window.usage.disk * f64::from(window.length_ms) / 1e3,
            // Whoever begins to look in the middle of a second is shown all of it.
            seconds: Some(f64::from(window.length_ms) / 1e3),
        });
        let work = of_service.as_ref().or_else(|| cut.work.get(&member.cgroup)).unwrap_or(&idle);
        let id = ContainerId { service: handle.name.clone(), generation: member.generation };
        let memory = match window.filter(|_| serves) {
            Some(window) => Some(window.usage.memory),
            None => shared.backend.usage(&id).ok().map(|usage| usage.memory_bytes as f64 / f64::from(1 << 20)),
        };
        let row = row(Tool::Warmswap, name.clone(), member.cgroup, work, memory, cut);
        rows.push(LiveContainer {
            generation: Some(member.generation),
            role: Some(member.role),
            demand: demand.clone().filter(|_| serves),
            note: note.clone().filter(|_| serves),
            trouble: trouble && serves,
            ..row
        });
    }
    // Nobody serves: its trouble must be seen all the same.
    if !rows.iter().any(|row| row.role == Some(Role::Owner)) {
        let row = row(Tool::Warmswap, name, CgroupId(0), &idle, None, cut);
        rows.push(LiveContainer { note: note.or_else(|| Some("nobody serves".into())), trouble: true, ..row });
    }
    rows
}

fn row(tool: Tool, name: String, cgroup: CgroupId, work: &Work, memory: Option<f64>, cut: &LiveCut) -> LiveContainer {
    let seconds = work.seconds.unwrap_or(cut.seconds).max(1e-3);
    let used = crate::observatory::usage(&work.counts, work.disk_mb, 0.0, seconds);
    let counted = |value: f64| cut.counted.then_some(value);
    LiveContainer {
        tool,
        name,
        generation: None,
        role: None,
        path: None,
        cgroup,
        usage: PerResource { cpu: counted(used.cpu), memory, network: counted(used.network), disk: counted(used.disk) },
        launches_per_s: work.counts.execs as f64 / seconds,
        inputs_per_s: (work.counts.tty_inputs + work.counts.device_inputs) as f64 / seconds,
        requests_per_s: work.latency.count() as f64 / seconds,
        p99_us: work.latency.quantile_ns(0.99).map(|ns| ns as f64 / 1e3),
        oom_kills: work.counts.oom_kills,
        demand: None,
        note: None,
        trouble: false,
        ended: false,
    }
}
