//! What surrounds a supervisor in the test: images, the back end `fake` with faults on order, conditions that judge and
//! interfere as they are told, and a client that never stops writing.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use warmswap_backend::{Backend as _, ContainerId, ContainerState, FakeBackend};
use warmswap_handover::{Conditions, Judgement, MemberStatus, Progress};
use warmswap_model::{
    Blackout, CgroupId, Generation, Handover, ImageRef, Measurements, PerResource, Phase, ServiceName,
};

use super::service::Behaviour;

const ANSWER_TIME_MAX: Duration = Duration::from_secs(10);

/// One image per behaviour, each with this test program.
pub(crate) fn images(folder: &Path) -> HashMap<Behaviour, PathBuf> {
    let program = std::env::current_exe().unwrap();
    let image = |behaviour: Behaviour| {
        let image = folder.join(behaviour.name());
        warmswap_rootfs::pack_rootfs_as(&program, &image, Some("service")).unwrap();
        fs::write(image.join("etc/behaviour"), behaviour.name()).unwrap();
        (behaviour, image)
    };
    Behaviour::ALL.into_iter().map(image).collect()
}

pub(crate) fn image_ref(images: &HashMap<Behaviour, PathBuf>, behaviour: Behaviour) -> ImageRef {
    ImageRef(images[&behaviour].clone())
}

/// What happens when a phase begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Deed {
    /// SIGKILL to the generation that served when the update began.
    KillOld,
    /// SIGKILL to the one that is to serve.
    KillNew,
    /// The supervisor dies.
    Crash,
    /// Somebody does not want it any more.
    Cancel,
}

/// How the new generation turns out to be worse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Worse {
    /// At once, beyond doubt.
    Certain,
    /// As VERIFY would end, and in doubt: so few requests are there to judge by.
    Late,
}

#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Orders {
    pub(crate) worse: Option<Worse>,
    pub(crate) deed: Option<(Phase, Deed)>,
}

#[derive(Default)]
struct Standing {
    orders: Orders,
    between: Option<(Generation, Generation)>,
    cancelled: bool,
}

/// See the module.
pub(crate) struct Director {
    backend: FakeBackend,
    standing: Mutex<Standing>,
}

impl Director {
    pub(crate) fn new(backend: FakeBackend) -> Self {
        Self { backend, standing: Mutex::default() }
    }

    /// For the next update.
    pub(crate) fn order(&self, orders: Orders) {
        *self.standing.lock().unwrap() = Standing { orders, ..Standing::default() };
    }
}

impl Conditions for Director {
    fn measure(&self, _service: &ServiceName, length: Duration) -> Option<Measurements> {
        Some(Measurements { seconds: length.as_secs_f64(), ..Measurements::default() })
    }

    fn judge(&self, _: Option<&Measurements>, after: Option<&Measurements>, limits: &Handover) -> Judgement {
        let worse = |certain| Judgement::Worse { reason: "it was ordered".into(), certain };
        match self.standing.lock().unwrap().orders.worse {
            None => Judgement::Accept,
            Some(Worse::Certain) => worse(true),
            Some(Worse::Late) if after.is_some_and(|after| after.seconds >= 10.0 * limits.verify_s_min) => worse(false),
            Some(Worse::Late) => Judgement::Continue,
        }
    }

    fn kernel_blackout(&self, _: &ServiceName, _: u64, _: Generation, _: Generation) -> Option<Blackout> {
        None
    }

    fn cancelled(&self, _service: &ServiceName) -> Option<String> {
        self.standing.lock().unwrap().cancelled.then(|| "nobody wants it".to_owned())
    }

    fn watch(&self, _service: &ServiceName, _ground: CgroupId, _members: &[MemberStatus]) {}

    fn lease(&self, _service: &ServiceName, _reservation: &PerResource<f64>) -> Result<(), String> {
        Ok(())
    }

    fn release(&self, _service: &ServiceName) {}

    fn progress(&self, service: &ServiceName, progress: &Progress) {
        let mut standing = self.standing.lock().unwrap();
        let phase = match progress {
            Progress::Begun { from, to, .. } => {
                standing.between = Some((*from, *to));
                return;
            }
            Progress::PhaseBegun { phase } => *phase,
            Progress::PhaseEnded { .. } => return,
        };
        let Some((_, deed)) = standing.orders.deed.filter(|(at, _)| *at == phase) else { return };
        standing.orders.deed = None;
        let kill = |generation: Generation| {
            kill(&self.backend, &ContainerId { service: service.clone(), generation });
        };
        match (deed, standing.between) {
            (Deed::KillOld, Some((old, _))) => kill(old),
            (Deed::KillNew, Some((_, new))) => kill(new),
            (Deed::Cancel, _) => standing.cancelled = true,
            (Deed::Crash, _) => {
                drop(standing);
                // As a panic, without its message.
                std::panic::resume_unwind(Box::new("the supervisor dies on order"));
            }
            _ => {}
        }
    }
}

/// Kills and waits until it is dead, without a call for which a fault may be ordered. Nothing happens to one that is not there.
pub(crate) fn kill(backend: &FakeBackend, id: &ContainerId) {
    let pid = || {
        let found = backend.list().unwrap().into_iter().find(|container| container.spec.id == *id)?;
        match found.state {
            ContainerState::Created { pid } | ContainerState::Running { pid } => Some(pid),
            ContainerState::Exited { .. } => None,
        }
    };
    while let Some(pid) = pid() {
        // SAFETY: two integers; the back end has not reaped the process, so the number is still its own.
        unsafe { libc::kill(pid.cast_signed(), libc::SIGKILL) };
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// One connection, one request at a time.
pub(crate) struct Client(BufReader<TcpStream>);

impl Client {
    pub(crate) fn connect(address: SocketAddr) -> std::io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, ANSWER_TIME_MAX)?;
        stream.set_read_timeout(Some(ANSWER_TIME_MAX))?;
        stream.set_nodelay(true)?;
        Ok(Self(BufReader::new(stream)))
    }

    /// What is answered, and which generation says so.
    pub(crate) fn ask(&mut self, request: &str) -> std::io::Result<(String, u32)> {
        self.0.get_mut().write_all(format!("{request}\n").as_bytes())?;
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        let invalid = || std::io::Error::other(format!("{request} was answered {line:?}"));
        let (answer, generation) = line.trim_end().rsplit_once(' ').ok_or_else(invalid)?;
        Ok((answer.to_owned(), generation.parse().map_err(|_| invalid())?))
    }
}

/// Writes 0, 1, 2, … and each only after the one before was acknowledged.
pub(crate) struct Writer {
    acknowledged: Arc<AtomicU64>,
    broken: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    pub(crate) fn start(address: SocketAddr) -> Self {
        let (acknowledged, broken) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let stop = Arc::<AtomicBool>::default();
        let (acks, breaks, end) = (Arc::clone(&acknowledged), Arc::clone(&broken), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let mut client = None;
            while !end.load(Ordering::Acquire) {
                let number = acks.load(Ordering::Acquire);
                let written = match client.as_mut() {
                    None => Client::connect(address).map(|new| client = Some(new)),
                    Some(client) => client.ask(&format!("PUT {number}")).map(|(answer, _)| {
                        if answer == "OK" {
                            acks.store(number + 1, Ordering::Release);
                        }
                    }),
                };
                if written.is_err() {
                    client = None;
                    breaks.fetch_add(1, Ordering::AcqRel);
                }
                std::thread::sleep(Duration::from_micros(300));
            }
        });
        Self { acknowledged, broken, stop, thread: Some(thread) }
    }

    pub(crate) fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Acquire)
    }

    /// How often its connection ended.
    pub(crate) fn broken(&self) -> u64 {
        self.broken.load(Ordering::Acquire)
    }

    /// Whether anything more is acknowledged.
    pub(crate) fn goes_on(&self) -> bool {
        let (before, began) = (self.acknowledged(), Instant::now());
        while self.acknowledged() == before && began.elapsed() < ANSWER_TIME_MAX {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.acknowledged() > before
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
