//! One service: a thread that owns its supervisor, and the handle by which everybody else reaches it.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::mpsc::UnboundedSender;
use warmswap_backend::{ContainerId, ContainerUsage, PreparedImage};
use warmswap_handover::{MemberStatus, Plan, Role, Supervisor, Version};
use warmswap_model::{
    CgroupId, Generation, HandoverReport, ImageRef, PerResource, ServiceFile, ServiceName, Trigger, Verdict,
};
use warmswap_policy::{Activity, Event, Outcome, Rails, ServiceState, Tuner, TunerReport, reservation};

use crate::api::{Fault, NewsKind, UpdateLine};
use crate::observatory::Cgroups;
use crate::shared::{AgentError, Shared};
use crate::{lock, random};

/// How long the thread sleeps when nobody says anything.
const IDLE: Duration = Duration::from_millis(500);
/// p99 after this multiple of before counts as a dip for the tuner, though the handover was kept.
const DIP_RATIO: f64 = 1.2;

/// An accepted update on its way to the service's thread.
pub(crate) struct Update {
    pub(crate) image: ImageRef,
    pub(crate) file: Option<(ServiceFile, PathBuf)>,
    pub(crate) trigger: Trigger,
    pub(crate) fault: Option<Fault>,
    /// Who watches; nobody when a trigger asked.
    pub(crate) watcher: Option<UnboundedSender<UpdateLine>>,
}

enum Command {
    Update(Box<Update>),
    Stop,
}

/// What the thread last said about itself.
#[derive(Debug, Clone, Default)]
pub(crate) struct Snapshot {
    pub(crate) owner: Option<Generation>,
    pub(crate) image: ImageRef,
    pub(crate) previous: Option<Version>,
    pub(crate) members: Vec<MemberStatus>,
    pub(crate) trouble: Option<String>,
    pub(crate) handovers: u64,
    pub(crate) tuner: Vec<TunerReport>,
}

pub(crate) struct ServiceHandle {
    pub(crate) name: ServiceName,
    pub(crate) file: Mutex<(ServiceFile, PathBuf)>,
    pub(crate) state: Mutex<ServiceState>,
    pub(crate) snapshot: Mutex<Snapshot>,
    pub(crate) watcher: Mutex<Option<UnboundedSender<UpdateLine>>>,
    pub(crate) fault: Mutex<Option<Fault>>,
    commands: Mutex<Sender<Command>>,
    wake: EventFd,
    pub(crate) handovers: AtomicU64,
}

impl ServiceHandle {
    pub(crate) fn update(&self, update: Update) {
        self.send(Command::Update(Box::new(update)));
    }

    pub(crate) fn stop(&self) {
        self.send(Command::Stop);
    }

    fn send(&self, command: Command) {
        // Both fail only when the thread has ended, and then the service is stopped, which admission knows.
        let _ = lock(&self.commands).send(command);
        let _ = self.wake.write(1);
    }

    /// Which generations there are, for `status`.
    pub(crate) fn show(&self, members: &[MemberStatus]) {
        let owner = members.iter().find(|member| member.role == Role::Owner).map(|member| member.generation);
        let mut snapshot = lock(&self.snapshot);
        snapshot.owner = owner;
        snapshot.members = members.to_vec();
    }

    /// The shadow of the handover in progress.
    pub(crate) fn shadow(&self, shared: &Shared) -> Option<ContainerId> {
        let owner = lock(&self.snapshot).owner;
        let found = shared.backend.list().ok()?;
        let newest = found.into_iter().rfind(|container| container.spec.id.service == self.name)?;
        (Some(newest.spec.id.generation) != owner).then_some(newest.spec.id)
    }
}

/// Starts the thread of a service.
pub(crate) fn spawn(
    shared: &Arc<Shared>,
    supervisor: Supervisor,
    digest: String,
) -> Result<Arc<ServiceHandle>, AgentError> {
    let (commands, received) = std::sync::mpsc::channel();
    let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .map_err(|errno| AgentError::System { action: "make an eventfd", source: errno.into() })?;
    let record = supervisor.record();
    let handle = Arc::new(ServiceHandle {
        name: record.file.name.clone(),
        file: Mutex::new((record.file.clone(), record.folder.clone())),
        state: Mutex::new(ServiceState::serving(digest)),
        snapshot: Mutex::new(Snapshot::default()),
        watcher: Mutex::new(None),
        fault: Mutex::new(None),
        commands: Mutex::new(commands),
        wake,
        handovers: AtomicU64::new(0),
    });
    let mut actor = Actor {
        tuner: shared.tuner(&record.file),
        shared: Arc::clone(shared),
        handle: Arc::clone(&handle),
        supervisor,
    };
    actor.publish();
    std::thread::Builder::new()
        .name(format!("svc-{}", handle.name))
        .spawn(move || run_guarded(actor, &received))
        .map_err(|source| AgentError::System { action: "start a thread", source })?;
    Ok(handle)
}

/// A panic must not look like a service that is merely busy: whoever waits is let go and `status` says what happened.
fn run_guarded(actor: Actor, commands: &Receiver<Command>) {
    let handle = Arc::clone(&actor.handle);
    let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| actor.run(commands)));
    if ran.is_err() {
        tracing::error!("{}: its thread panicked; restart the agent, the service goes on meanwhile", handle.name);
        *lock(&handle.watcher) = None;
        lock(&handle.snapshot).trouble = Some("its supervisor panicked; restart the agent".into());
    }
}

struct Actor {
    shared: Arc<Shared>,
    handle: Arc<ServiceHandle>,
    supervisor: Supervisor,
    tuner: Tuner,
}

impl Actor {
    fn run(mut self, commands: &Receiver<Command>) {
        loop {
            self.supervisor.tick(IDLE, Some(self.handle.wake.as_fd()));
            let _ = self.handle.wake.read(); // empty it; EAGAIN when nobody woke us
            self.publish();
            while let Ok(command) = commands.try_recv() {
                if let Command::Update(update) = command {
                    self.update(*update);
                }
                self.publish();
                if lock(&self.handle.state).activity == Activity::Stopping {
                    self.stop();
                    return;
                }
            }
        }
    }

    fn stop(&mut self) {
        let journal = self.shared.journal_path(&self.handle.name);
        if let Err(error) = self.supervisor.stop(&journal) {
            tracing::error!("{}: {error}", self.handle.name);
        }
        self.shared.observatory.forget(&self.handle.name);
        self.shared.remove(&self.handle.name);
        self.shared.live.tell(NewsKind::Went, self.handle.name.as_str(), "service ended".into());
        lock(&self.handle.state).on(Event::Stopped);
        tracing::info!("{} ended", self.handle.name);
    }

    fn update(&mut self, update: Update) {
        let Update { image, file, trigger, fault, watcher } = update;
        *lock(&self.handle.watcher) = watcher.clone();
        *lock(&self.handle.fault) = fault;
        let stop_before_step = match fault {
            Some(Fault::StopAgent { before_step }) => Some(before_step),
            _ => None,
        };
        let verdict = match self.hand_over(image, file, trigger, stop_before_step) {
            Ok(report) => {
                if report.verdict != Verdict::Committed {
                    lock(&self.handle.state).on(Event::RollbackBegan); // what serves is still the old content
                }
                UpdateLine::Report(Box::new(report))
            }
            Err(error) => {
                tracing::error!("{}: {error}", self.handle.name);
                self.shared.live.tell(NewsKind::Refused, self.handle.name.as_str(), format!("no handover: {error}"));
                UpdateLine::Error(error.to_string())
            }
        };
        *lock(&self.handle.watcher) = None;
        *lock(&self.handle.fault) = None;
        lock(&self.handle.state).on(Event::HandoverEnded);
        // First, because whoever hears the verdict may ask for the status at once.
        self.publish();
        if let Some(watcher) = watcher {
            let _ = watcher.send(verdict); // the watcher may have gone
        }
    }

    fn hand_over(
        &mut self,
        image: ImageRef,
        file: Option<(ServiceFile, PathBuf)>,
        trigger: Trigger,
        stop_before_step: Option<usize>,
    ) -> Result<HandoverReport, AgentError> {
        if let Some((file, _)) = &file {
            self.supervisor.accepts(file)?;
        }
        let name = self.handle.name.clone();
        let settings = file.as_ref().map_or(&self.supervisor.record().file, |(file, _)| file);
        let rails = Rails::new(&settings.reserve, &settings.resources);
        let percent = self.tuner.choose(random::uniform());
        let forecast = lock(&self.shared.forecaster).demand(&name);
        // Without a forecast the ceiling is held: a shadow must not starve because nobody has watched for long enough.
        let base = forecast.as_ref().map(|demand| self.tuner.bases(demand, self.memory_mb()));
        let reserved = base.as_ref().map_or(
            PerResource { cpu: 0.0, memory: settings.resources.memory_mb_max, network: 0.0, disk: 0.0 },
            |base| reservation(base, &percent, &rails),
        );
        let plan = Plan {
            handover: self.shared.history.next_handover_id()?,
            trigger,
            image,
            file,
            forecast,
            reservation: reserved,
            shadow_cpus: self.shared.shadow_cpus(),
            stop_before_step,
        };
        let began = format!("handover {} begins", plan.handover);
        self.shared.live.tell(NewsKind::HandoverBegan, name.as_str(), began);
        let report = self.supervisor.update(&plan);
        self.shared.live.tell(news_kind(report.verdict), name.as_str(), told(&report));
        self.handle.handovers.fetch_add(1, Ordering::Relaxed);
        let record = self.supervisor.record();
        *lock(&self.handle.file) = (record.file.clone(), record.folder.clone());
        if let Some(base) = base {
            self.learn(&report, base, percent);
        }
        self.shared.history.append_report(&report)?;
        tracing::info!(
            "{name}: handover {} from {} to {}: {}{}",
            report.id,
            report.from,
            report.to,
            report.verdict,
            report.reason.as_deref().map(|reason| format!(": {reason}")).unwrap_or_default()
        );
        Ok(report)
    }

    /// What the owner holds now, MB.
    fn memory_mb(&self) -> f64 {
        self.usage().memory_bytes as f64 / f64::from(1 << 20)
    }

    /// Of the owner; nothing when that is not known.
    fn usage(&self) -> ContainerUsage {
        let owner =
            self.supervisor.owner().map(|generation| ContainerId { service: self.handle.name.clone(), generation });
        owner.and_then(|id| self.shared.backend.usage(&id).ok()).unwrap_or_default()
    }

    /// Predicted against actual, back into the percentages.
    fn learn(&mut self, report: &HandoverReport, base: PerResource<f64>, percent: PerResource<f64>) {
        let Some(after) = &report.after else { return };
        let p99 = |side: &Option<warmswap_model::Measurements>| side.as_ref().and_then(|side| side.p99_us);
        let dip = matches!((p99(&report.before), p99(&report.after)),
            (Some(before), Some(after)) if after > before * DIP_RATIO);
        let usage = self.usage();
        self.tuner.learn(&Outcome {
            percent,
            base,
            actual: after.usage,
            dip,
            throttled: report.verdict == Verdict::Committed && usage.throttled_ns > 0,
            oom: usage.oom_kills > 0,
        });
        self.shared.keep_tuner(&self.handle.name, &self.tuner);
    }

    /// Tells the handle and the observatory what is true now.
    fn publish(&mut self) {
        let members = self.supervisor.members();
        self.shared.observatory.watch(&self.handle.name, cgroups(self.supervisor.ground().cgroup, &members));
        let record = self.supervisor.record();
        *lock(&self.handle.snapshot) = Snapshot {
            owner: self.supervisor.owner(),
            image: record.image.clone(),
            previous: record.previous.clone(),
            members,
            trouble: self.supervisor.trouble().map(str::to_owned),
            handovers: self.handle.handovers.load(Ordering::Relaxed),
            tuner: self.tuner.explain(),
        };
    }
}

const fn news_kind(verdict: Verdict) -> NewsKind {
    match verdict {
        Verdict::Committed => NewsKind::Committed,
        Verdict::RolledBack | Verdict::Aborted => NewsKind::Refused,
    }
}

/// A handover in one line.
fn told(report: &HandoverReport) -> String {
    let blackouts: Vec<String> = report.blackouts.iter().map(|blackout| format!("{:.0} µs", blackout.us)).collect();
    let blackout = if blackouts.is_empty() { String::new() } else { format!(", blackout {}", blackouts.join(" and ")) };
    let reason = report.reason.as_deref().map(|reason| format!(": {reason}")).unwrap_or_default();
    let HandoverReport { id, from, to, verdict, .. } = report;
    format!("handover {id} from {from} to {to} {verdict}{blackout}{reason}")
}

pub(crate) fn cgroups(ground: CgroupId, members: &[MemberStatus]) -> Cgroups {
    Cgroups {
        ground: Some(ground),
        owner: members.iter().find(|member| member.role == Role::Owner).map(|member| member.cgroup),
        generations: members.iter().map(|member| (member.generation, member.cgroup)).collect(),
    }
}

/// What identifies the content of an image, without starting anything.
pub(crate) fn digest(shared: &Shared, image: &ImageRef) -> Result<PreparedImage, AgentError> {
    Ok(shared.backend.prepare_image(image)?)
}
