//! Start, take over what an earlier agent left running, serve, end.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use warmswap_backend::{Backend, EmbeddedBackend, EmbeddedConfig};
use warmswap_forecast::{ForecastConfig, Forecaster};
use warmswap_handover::Supervisor;
use warmswap_history::History;
use warmswap_model::HandoverReport;
use warmswap_sensor::{PROBE_LOG_TARGET, Sensor, SensorConfig};

use crate::api::{LOCK_NAME, NewsKind, SOCKET_NAME};
use crate::clock::unix_ms;
use crate::conditions::AgentConditions;
use crate::http::{self, Server};
use crate::observatory::Observatory;
use crate::service;
use crate::shared::{AgentConfig, AgentError, Shared};
use crate::{containers, tick, trainer};

/// How long an ending agent waits for those who read its answers.
const LAST_ANSWERS_TIME_MAX: std::time::Duration = std::time::Duration::from_secs(2);

/// Runs the agent until it is told to stop (SIGTERM, SIGINT or the API). Services go on without it, unless the API
/// said to stop them.
///
/// # Errors
/// When another agent serves in the same run folder, or the host lacks what nothing works without.
pub fn run(config: AgentConfig) -> Result<(), AgentError> {
    let make =
        |folder: &Path| std::fs::create_dir_all(folder).map_err(|source| file_error("make the folder", folder, source));
    make(&config.run_dir)?;
    make(&config.state_dir)?;
    let _only_one = lock_run_dir(&config.run_dir)?;
    // What `warmswap stop --all` removes is made under the lock.
    make(&config.run_dir.join("journal"))?;
    raise_file_limit();
    let backend: Arc<dyn Backend> = Arc::new(EmbeddedBackend::new(EmbeddedConfig {
        run_dir: config.run_dir.clone(),
        state_dir: config.state_dir.clone(),
        ..EmbeddedConfig::default()
    })?);
    let history = History::open(config.state_dir.join("history"))?;
    let shared = Arc::new(Shared::new(
        config,
        backend,
        history,
        Observatory::new(load_sensor()),
        Forecaster::new(ForecastConfig::default()),
    ));
    trainer::restore(&shared);
    take_over(&shared);

    let stop = Arc::new(AtomicBool::new(false));
    let mut threads = Vec::new();
    let mut spawn = |name: &str, work: Box<dyn FnOnce() + Send>| -> Result<(), AgentError> {
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(work);
        threads.push(thread.map_err(|source| AgentError::System { action: "start a thread", source })?);
        Ok(())
    };
    let (ticking, ticks_until) = (Arc::clone(&shared), Arc::clone(&stop));
    spawn("tick", Box::new(move || tick::run(&ticking, &ticks_until)))?;
    let (training, trains_until) = (Arc::clone(&shared), Arc::clone(&stop));
    spawn("train", Box::new(move || trainer::run(&training, &trains_until)))?;
    let (following, follows_until) = (Arc::clone(&shared), Arc::clone(&stop));
    spawn("cgroups", Box::new(move || containers::run(&following, &follows_until)))?;

    let served = serve(&shared);
    stop.store(true, Ordering::Relaxed);
    shared.containers.wake();
    for thread in threads {
        let _ = thread.join(); // a thread that panicked has said so
    }
    served
}

/// A segment of state is a descriptor, and so is a connection on its way.
fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(errno) = raised {
        tracing::warn!("the limit on open files stays as it is: {errno}");
    }
}

fn load_sensor() -> Option<Sensor> {
    // Whoever set up tracing decides whether the probes speak: loaded silent, they cannot be asked to later.
    let probe_log = tracing::enabled!(target: PROBE_LOG_TARGET, tracing::Level::WARN);
    let loaded = Sensor::load(SensorConfig { probe_log, ..SensorConfig::default() })
        .and_then(|mut sensor| sensor.start().map(|()| sensor));
    match loaded {
        Ok(sensor) => Some(sensor),
        Err(error) => {
            tracing::warn!("no probes, so no measurements, forecasts and kernel-measured blackouts: {error}");
            None
        }
    }
}

/// Services whose journals an earlier agent left.
fn take_over(shared: &Arc<Shared>) {
    let journals = std::fs::read_dir(shared.journal_folder()).into_iter().flatten().flatten();
    for path in journals.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "jsonl")) {
        let conditions = Arc::new(AgentConditions { shared: Arc::clone(shared) });
        let recovered = Supervisor::recover(Arc::clone(&shared.backend), conditions, &path);
        let handle = match recovered {
            Ok(None) => continue,
            Ok(Some((supervisor, report))) => {
                if let Some(report) = report.map(|report| HandoverReport { started_unix_ms: unix_ms(), ..report })
                    && let Err(error) = shared.history.append_report(&report)
                {
                    tracing::warn!("{error}");
                }
                let record = supervisor.record();
                let image = record.image.resolved(&record.folder);
                let digest = service::digest(shared, &image).map(|image| image.digest).unwrap_or_default();
                service::spawn(shared, supervisor, digest)
            }
            Err(error) => Err(error.into()),
        };
        match handle {
            Ok(handle) => {
                tracing::info!("took over {}", handle.name);
                shared.live.tell(
                    NewsKind::Came,
                    handle.name.as_str(),
                    "service taken over from an earlier agent".into(),
                );
                shared.add(handle);
            }
            Err(error) => tracing::error!("cannot take over the service of {}: {error}", path.display()),
        }
    }
}

fn serve(shared: &Arc<Shared>) -> Result<(), AgentError> {
    let system = |action| move |source| AgentError::System { action, source };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(system("start the API"))?;
    let socket = shared.config.run_dir.join(SOCKET_NAME);
    let result = runtime.block_on(async {
        remove_stale(&socket)?;
        let listener =
            tokio::net::UnixListener::bind(&socket).map_err(|source| file_error("listen on", &socket, source))?;
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))
            .map_err(|source| file_error("protect", &socket, source))?;
        let stop = Arc::new(tokio::sync::Notify::new());
        let router = http::router(Server { shared: Arc::clone(shared), stop: Arc::clone(&stop) });
        tracing::info!("serving on {}", socket.display());
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
            .map_err(system("watch for SIGTERM"))?;
        let (ending, mut ends) = tokio::sync::watch::channel(false);
        let watched = Arc::clone(shared);
        let ended = async move {
            tokio::select! {
                () = stop.notified() => {}
                _ = terminate.recv() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
            watched.live.close();
            let _ = ending.send(true); // the other end lives as long as this block
        };
        // Answers that are on their way arrive; a trace that somebody reads would never end.
        let patience = async move {
            let _ = ends.wait_for(|ends| *ends).await;
            tokio::time::sleep(LAST_ANSWERS_TIME_MAX).await;
        };
        tokio::select! {
            served = axum::serve(listener, router).with_graceful_shutdown(ended) => served.map_err(system("serve the API")),
            () = patience => Ok(()),
        }
    });
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    remove_stale(&socket)?;
    result
}

fn remove_stale(socket: &Path) -> Result<(), AgentError> {
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(file_error("remove", socket, error)),
        _ => Ok(()),
    }
}

fn file_error(action: &'static str, path: &Path, source: std::io::Error) -> AgentError {
    AgentError::File { action, path: path.to_owned(), source }
}

/// Held as long as this agent lives; the kernel lets go of it when the agent is killed.
fn lock_run_dir(run_dir: &Path) -> Result<std::fs::File, AgentError> {
    let path = run_dir.join(LOCK_NAME);
    loop {
        let file = std::fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|source| file_error("open", &path, source))?;
        match file.try_lock() {
            // `warmswap stop --all` removes the file while it holds it: then this is the lock of nothing.
            Ok(()) if is_at(&file, &path) => return Ok(file),
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => {
                let problem = format!("another agent serves {}; `warmswap status` asks it", run_dir.display());
                return Err(AgentError::Refused(problem));
            }
            Err(std::fs::TryLockError::Error(source)) => return Err(file_error("lock", &path, source)),
        }
    }
}

fn is_at(file: &std::fs::File, path: &Path) -> bool {
    let found = std::fs::metadata(path).and_then(|at| Ok((at, file.metadata()?)));
    found.is_ok_and(|(at, ours)| (at.dev(), at.ino()) == (ours.dev(), ours.ino()))
}
