//! Containers made by this program itself: libcontainer in one shim process per container.
//!
//! The back end keeps nothing in memory that matters. What exists is in `<run_dir>`, in the shims and in the kernel, so
//! a new agent finds everything again, and a container whose shim was killed can still be listed and destroyed.

mod cleanup;
mod ground;
mod log;
mod oci;
mod rescue;
mod rootfs;
mod service;
mod shim;
mod sockets;
mod user;
mod wire;

use cleanup::remember_state_dir;
pub use cleanup::{leftovers, purge};
pub(crate) use ground::open_listener;
pub(crate) use oci::environment;
use service::remove_netns;
pub(crate) use sockets::remove_all as remove_sockets;
pub(crate) use user::identity;
pub(crate) use wire::bind_at;
#[cfg(fuzzing)]
pub use wire::fuzz_wire;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use warmswap_model::{CgroupId, Generation, ImageRef, Listen, ServiceName};

use crate::cgroup::{Group, Hierarchies, file_error, read_usage, write_limits};
use crate::contract::{Backend, Result};
use crate::layout::{Layout, NOTIFY_SOCKET};
use crate::{
    BackendError, ContainerId, ContainerSpec, ContainerState, ContainerUsage, FoundContainer, HostCapacity, Limits,
    NOTIFY, NamedFd, PreparedImage, ServiceGround,
};
use wire::{BootFds, Channel, FDS_MAX, Reply, Request, ShimRecord};

const SHIM_VERB: &str = "internal-shim";
const LISTENERS_VERB: &str = "internal-listeners";
/// How long a shim may take for anything but creating.
const SHIM_TIMEOUT: Duration = Duration::from_secs(10);
/// How long creating may take: a loaded host, a cold disk.
const CREATE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long freezing may take to be confirmed.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(5);
/// Logs of so many generations are kept.
const LOGS_MAX: u32 = 8;
/// A listener is kept under this and its name.
const LISTENER_PREFIX: &str = "listen-";

/// Where the embedded back end works.
#[derive(Debug, Clone)]
pub struct EmbeddedConfig {
    /// Gone after a reboot, like the containers: `/run/warmswap`.
    pub run_dir: PathBuf,
    /// Unpacked images, writable layers, logs: `/var/lib/warmswap`.
    pub state_dir: PathBuf,
    /// A program whose main calls [`internal_main`] first. `/proc/self/exe` is this program, even after its file was
    /// replaced by an update.
    pub shim_exe: PathBuf,
}

impl Default for EmbeddedConfig {
    fn default() -> Self {
        Self {
            run_dir: crate::layout::RUN_DIR.into(),
            state_dir: crate::layout::STATE_DIR.into(),
            shim_exe: "/proc/self/exe".into(),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct EmbeddedBackend {
    layout: Layout,
    shim_exe: PathBuf,
    hierarchies: Hierarchies,
    /// Shims this process has spawned: they are zombies of ours when they end.
    children: Mutex<BTreeMap<ContainerId, Child>>,
    /// Opening and closing a service are several steps that must not mix.
    ground: Mutex<()>,
}

/// Runs a helper process if this is one. Every program that embeds the back end calls it first in `main`, before any
/// thread exists; on `Some` it must return that code at once.
#[must_use]
pub fn internal_main() -> Option<ExitCode> {
    let args: Vec<OsString> = std::env::args_os().collect();
    let text = |index: usize| args.get(index).and_then(|arg| arg.to_str());
    let result = match text(1) {
        Some(LISTENERS_VERB) => ground::main(),
        Some(SHIM_VERB) => {
            let service = text(4).and_then(|name| ServiceName::new(name).ok());
            let generation = text(5).and_then(|number| number.parse().ok()).map(Generation);
            match (args.get(2), args.get(3), service, generation) {
                (Some(run), Some(state), Some(service), Some(generation)) => {
                    shim::main(run.into(), state.into(), service, generation)
                }
                _ => Err(format!("{SHIM_VERB} is only for warmswap itself")),
            }
        }
        _ => return None,
    };
    Some(match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("{problem}");
            ExitCode::FAILURE
        }
    })
}

impl EmbeddedBackend {
    /// Makes the folders. Fails where cgroup v2 is missing.
    pub fn new(config: EmbeddedConfig) -> Result<Self> {
        let layout = Layout::new(config.run_dir, config.state_dir);
        for folder in [&layout.containers_run(), &layout.netns_folder(), &layout.layers()] {
            fs::create_dir_all(folder).map_err(file_error("make the folder", folder))?;
        }
        remember_state_dir(&layout)?;
        Ok(Self {
            layout,
            shim_exe: config.shim_exe,
            hierarchies: Hierarchies::detect()?,
            children: Mutex::default(),
            ground: Mutex::default(),
        })
    }

    fn group(&self, id: &ContainerId) -> Group<'_> {
        Group::new(&self.hierarchies, self.layout.cgroup_container(id))
    }

    fn service_group(&self, service: &ServiceName) -> Group<'_> {
        Group::new(&self.hierarchies, self.layout.cgroup_service(service))
    }

    fn shim_group(&self, id: &ContainerId) -> Group<'_> {
        Group::new(&self.hierarchies, self.layout.cgroup_shim(id))
    }

    fn record(&self, id: &ContainerId) -> Option<ShimRecord> {
        read_json(&self.layout.container_run(id).join("state.json")).ok()
    }

    fn must_exist(&self, id: &ContainerId) -> Result<()> {
        if self.layout.container_run(id).is_dir() {
            Ok(())
        } else {
            Err(BackendError::NoSuchContainer { id: id.clone() })
        }
    }

    /// `None` when the shim is gone.
    fn connect(&self, id: &ContainerId) -> Result<Option<Channel>> {
        self.must_exist(id)?;
        match Channel::connect(&self.layout.container_run(id), SHIM_TIMEOUT) {
            Ok(channel) => Ok(Some(channel)),
            Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => {
                Ok(None)
            }
            Err(error) => Err(shim_error("reach the shim of", id)(error)),
        }
    }

    fn connect_or_fail(&self, action: &'static str, id: &ContainerId) -> Result<Channel> {
        self.connect(id)?.ok_or_else(|| BackendError::Runtime {
            action,
            id: id.clone(),
            problem: "its shim process has ended; destroy the container and create another".to_owned(),
        })
    }

    /// For requests that are answered by Done.
    fn ask(&self, action: &'static str, id: &ContainerId, request: &Request, fd: Option<&NamedFd>) -> Result<()> {
        let shim = self.connect_or_fail(action, id)?;
        let fds: Vec<_> = fd.iter().map(|named| named.fd.as_fd()).collect();
        shim.send(request, &fds).map_err(shim_error(action, id))?;
        match shim.expect().map_err(shim_error(action, id))?.0 {
            Reply::Done => Ok(()),
            Reply::Failed { problem } => Err(BackendError::Runtime { action, id: id.clone(), problem }),
            other => Err(unexpected(action, id, &other)),
        }
    }

    /// What can be said of a container whose shim is gone.
    fn state_without_shim(&self, id: &ContainerId) -> ContainerState {
        match self.record(id) {
            Some(ShimRecord { state: Some(state @ ContainerState::Exited { .. }), .. }) => state,
            Some(ShimRecord { state: Some(state), init: Some(init), .. }) if init.is_alive() => state,
            // The exit status went with the shim.
            _ => ContainerState::Exited { code: None, signal: None },
        }
    }

    fn spawn_helper(&self, arguments: &[&std::ffi::OsStr], stderr: Stdio) -> io::Result<(Channel, Child)> {
        let (ours, theirs) = Channel::pair()?;
        let child = Command::new(&self.shim_exe)
            .arg0("warmswap-shim")
            .args(arguments)
            .env_clear()
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()?;
        ours.set_timeout(CREATE_TIMEOUT)?;
        Ok((ours, child))
    }

    fn create_in(&self, spec: &ContainerSpec, fds: &[NamedFd], mut keep: Vec<NamedFd>) -> Result<CgroupId> {
        let id = &spec.id;
        let folder = self.layout.container_run(id);
        let failed = |error: io::Error| shim_error("create", id)(error);
        for folder in [folder.join("rootfs"), self.layout.container_state(id), self.layout.logs(&id.service)] {
            fs::create_dir_all(&folder).map_err(file_error("make the folder", &folder))?;
        }
        write_json(&folder.join("spec.json"), spec)?;
        self.remove_old_logs(id);
        for listener in fds.iter().filter(|named| ground::is_listener(named.fd.as_fd())) {
            let fd = listener.fd.try_clone().map_err(failed)?;
            keep.push(NamedFd { name: format!("{LISTENER_PREFIX}{}", listener.name), fd });
        }
        if let Some(notify) = keep.iter().find(|named| named.name == NOTIFY) {
            self.bind_notify(id, notify)?;
        }
        let log = folder.join("shim.log");
        let stderr = fs::File::create(&log).map_err(file_error("make", &log))?;
        self.shim_group(id).create_v2()?;
        let generation = id.generation.0.to_string();
        let (shim, child) = self
            .spawn_helper(
                &[
                    SHIM_VERB.as_ref(),
                    self.layout.run_dir.as_os_str(),
                    self.layout.state_dir.as_os_str(),
                    id.service.as_str().as_ref(),
                    generation.as_ref(),
                ],
                stderr.into(),
            )
            .map_err(failed)?;
        lock(&self.children).insert(id.clone(), child);
        // While the shim starts; it waits for the descriptors before it creates the container.
        let group = self.group(id);
        group.create()?;
        write_limits(&group, &spec.limits)?;
        send_boot_fds(&shim, fds, &keep).map_err(failed)?;
        match shim.expect().map_err(failed)?.0 {
            Reply::Created => group.id(),
            Reply::Failed { problem } => Err(BackendError::Runtime { action: "create", id: id.clone(), problem }),
            other => Err(unexpected("create", id, &other)),
        }
    }

    /// Whoever in the container may write to it; on the host only root gets to the folder.
    fn bind_notify(&self, id: &ContainerId, notify: &NamedFd) -> Result<()> {
        let folder = self.layout.notify_folder(id);
        fs::create_dir(&folder)
            .and_then(|()| fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)))
            .map_err(file_error("make the folder", &folder))?;
        let path = folder.join(NOTIFY_SOCKET);
        wire::bind_at(&folder, NOTIFY_SOCKET, notify.fd.as_fd())
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o666)))
            .map_err(file_error("make the socket", &path))
    }

    fn remove_old_logs(&self, id: &ContainerId) {
        let folder = self.layout.logs(&id.service);
        for name in crate::layout::folder_names(&folder) {
            let generation = name.strip_prefix('g').and_then(|n| n.split('.').next()?.parse::<u32>().ok());
            if generation.is_some_and(|number| number.saturating_add(LOGS_MAX) <= id.generation.0) {
                // A log that stays is no reason not to start a container.
                let _ = fs::remove_file(folder.join(name));
            }
        }
    }
}

impl Backend for EmbeddedBackend {
    fn name(&self) -> &'static str {
        "embedded"
    }

    fn capacity(&self) -> Result<HostCapacity> {
        crate::host::capacity()
    }

    fn prepare_image(&self, image: &ImageRef) -> Result<PreparedImage> {
        crate::image::prepare(image, &self.layout.layers())
    }

    fn open_service(&self, service: &ServiceName, listen: &BTreeMap<String, Listen>) -> Result<ServiceGround> {
        self.open_ground(service, listen)
    }

    fn close_service(&self, service: &ServiceName) -> Result<()> {
        self.close_ground(service)
    }

    fn create(&self, spec: &ContainerSpec, fds: Vec<NamedFd>, keep: Vec<NamedFd>) -> Result<CgroupId> {
        let folder = self.layout.container_run(&spec.id);
        if spec.command.as_ref().unwrap_or(&spec.image.entrypoint).is_empty() {
            let problem = "the image names no program to run: set command in the service file".to_owned();
            return Err(BackendError::Runtime { action: "create", id: spec.id.clone(), problem });
        }
        if let Some(parent) = folder.parent() {
            fs::create_dir_all(parent).map_err(file_error("make the folder", parent))?;
        }
        match fs::DirBuilder::new().mode(0o700).create(&folder) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(BackendError::ContainerExists { id: spec.id.clone() });
            }
            Err(error) => return Err(file_error("make the folder", &folder)(error)),
        }
        self.create_in(spec, &fds, keep).inspect_err(|_| {
            // The first error is the one that tells; what stays is found by `leftovers`.
            if let Err(error) = self.destroy(&spec.id) {
                tracing::warn!(id = %spec.id, %error, "cannot remove a container that could not be created");
            }
        })
    }

    fn start(&self, id: &ContainerId) -> Result<()> {
        self.ask("start", id, &Request::Start, None)
    }

    fn state(&self, id: &ContainerId) -> Result<ContainerState> {
        let Some(shim) = self.connect(id)? else { return Ok(self.state_without_shim(id)) };
        shim.send(&Request::State, &[]).map_err(shim_error("ask for the state of", id))?;
        match shim.expect().map_err(shim_error("ask for the state of", id))?.0 {
            Reply::State(state) => Ok(state),
            other => Err(unexpected("ask for the state of", id, &other)),
        }
    }

    fn wait(&self, id: &ContainerId, timeout: Duration) -> Result<ContainerState> {
        let deadline = Instant::now() + timeout;
        if let Some(shim) = self.connect(id)? {
            shim.send(&Request::Wait, &[]).map_err(shim_error("wait for", id))?;
            if crate::process::wait_readable(shim.as_fd(), deadline) {
                if let Ok((Reply::State(state), _)) = shim.expect() {
                    return Ok(state);
                }
                // The shim has ended while we waited.
            } else {
                return self.state(id);
            }
        }
        if let Some(init) = self.record(id).and_then(|record| record.init) {
            init.wait_end(deadline.saturating_duration_since(Instant::now()));
        }
        self.state(id)
    }

    fn signal(&self, id: &ContainerId, signal: i32) -> Result<()> {
        let asked = self.connect(id).and_then(|shim| match shim {
            Some(_) => self.ask("signal", id, &Request::Signal { signal }, None).map(|()| true),
            None => Ok(false),
        });
        match asked {
            Ok(true) => return Ok(()),
            Err(error @ BackendError::NoSuchContainer { .. }) => return Err(error),
            // A shim that hangs, or is gone, must not protect its container.
            Ok(false) | Err(_) => {}
        }
        let failed = |problem: String| BackendError::Runtime { action: "signal", id: id.clone(), problem };
        let init = self.record(id).and_then(|record| record.init);
        match init.map(|init| init.signal(signal)) {
            Some(Ok(true)) => Ok(()),
            Some(Err(error)) => Err(failed(error.to_string())),
            Some(Ok(false)) | None => Err(failed("it has ended".to_owned())),
        }
    }

    fn has_process(&self, id: &ContainerId, pid: i32) -> Result<bool> {
        self.must_exist(id)?;
        Ok(self.group(id).has_process(pid))
    }

    fn freeze(&self, id: &ContainerId) -> Result<()> {
        self.must_exist(id)?;
        self.group(id).set_frozen(true, FREEZE_TIMEOUT)
    }

    fn thaw(&self, id: &ContainerId) -> Result<()> {
        self.must_exist(id)?;
        self.group(id).set_frozen(false, FREEZE_TIMEOUT)
    }

    fn usage(&self, id: &ContainerId) -> Result<ContainerUsage> {
        self.must_exist(id)?;
        read_usage(&self.group(id))
    }

    fn set_limits(&self, id: &ContainerId, limits: &Limits) -> Result<()> {
        self.must_exist(id)?;
        write_limits(&self.group(id), limits)
    }

    fn destroy(&self, id: &ContainerId) -> Result<()> {
        let folder = self.layout.container_run(id);
        let record = self.record(id);
        // Politely first: the shim reaps its child. Whatever it does, the cgroups decide afterwards.
        if let Ok(shim) = Channel::connect(&folder, Duration::from_secs(2))
            && shim.send(&Request::Quit, &[]).is_ok()
        {
            let _ = shim.expect::<Reply>();
        }
        // By cgroup, not by pid: nothing that has left our groups is hit, nothing inside is missed.
        self.group(id).kill()?;
        self.shim_group(id).kill()?;
        match lock(&self.children).remove(id) {
            Some(mut child) => {
                child.wait().map_err(shim_error("reap the shim of", id))?;
            }
            // Created by another instance in this process, perhaps.
            None => {
                if let Some(record) = record {
                    record.shim.reap();
                }
            }
        }
        self.shim_group(id).remove()?;
        self.group(id).remove()?;
        remove_folder(&self.layout.container_state(id))?;
        remove_folder(&folder)
    }

    fn list(&self) -> Result<Vec<FoundContainer>> {
        let mut found = Vec::new();
        for id in self.layout.container_ids() {
            let path = self.layout.container_run(&id).join("spec.json");
            let spec: ContainerSpec = match read_json(&path) {
                Ok(spec) => spec,
                Err(error) => {
                    tracing::warn!(%id, %error, "a container folder without a readable spec: left by a crash");
                    continue;
                }
            };
            let state = match self.state(&id) {
                Ok(state) => state,
                // Destroyed since the folder was read.
                Err(BackendError::NoSuchContainer { .. }) => continue,
                // A shim that hangs, say. The container may live all the same.
                Err(error) => {
                    tracing::warn!(%id, %error, "judged by what its shim wrote down");
                    self.state_without_shim(&id)
                }
            };
            let cgroup = self.group(&id).id().unwrap_or(CgroupId(0));
            found.push(FoundContainer { spec, state, cgroup });
        }
        Ok(found)
    }

    fn log_path(&self, id: &ContainerId) -> PathBuf {
        self.layout.log(id)
    }

    fn keep_fd(&self, id: &ContainerId, fd: NamedFd) -> Result<()> {
        self.ask("keep a descriptor of", id, &Request::Keep { name: fd.name.clone() }, Some(&fd))
    }

    fn drop_kept_fd(&self, id: &ContainerId, name: &str) -> Result<()> {
        self.ask("drop a descriptor of", id, &Request::Drop { name: name.to_owned() }, None)
    }

    fn kept_fds(&self, id: &ContainerId) -> Result<Vec<NamedFd>> {
        self.must_exist(id)?;
        self.ask_kept_fds(id).or_else(|error| {
            tracing::warn!(%id, %error, "taken from the container itself");
            self.rescue_fds(id)
        })
    }
}

impl EmbeddedBackend {
    fn ask_kept_fds(&self, id: &ContainerId) -> Result<Vec<NamedFd>> {
        const ACTION: &str = "fetch the descriptors of";
        let shim = self.connect_or_fail(ACTION, id)?;
        shim.send(&Request::Kept, &[]).map_err(shim_error(ACTION, id))?;
        let mut kept = Vec::new();
        loop {
            match shim.expect().map_err(shim_error(ACTION, id))? {
                (Reply::Kept { names, last }, fds) => {
                    kept.extend(names.into_iter().zip(fds).map(|(name, fd)| NamedFd { name, fd }));
                    if last {
                        return Ok(kept);
                    }
                }
                (other, _) => return Err(unexpected(ACTION, id, &other)),
            }
        }
    }
}

/// Our own groups that hold nothing any more, up to `warmswap` itself.
fn remove_empty_cgroups(hierarchies: &Hierarchies, layout: &Layout) {
    let mut relative = layout.cgroup_shims();
    loop {
        Group::new(hierarchies, relative.clone()).remove_if_unused();
        if !relative.pop() || relative.as_os_str().is_empty() {
            return;
        }
    }
}

fn send_boot_fds(shim: &Channel, pass: &[NamedFd], keep: &[NamedFd]) -> io::Result<()> {
    let mut all = pass.iter().map(|named| (named, true)).chain(keep.iter().map(|named| (named, false))).peekable();
    loop {
        let mut message = BootFds { pass: Vec::new(), keep: Vec::new(), last: false };
        let mut fds = Vec::new();
        for (named, is_passed) in all.by_ref().take(FDS_MAX) {
            if is_passed { &mut message.pass } else { &mut message.keep }.push(named.name.clone());
            fds.push(named.fd.as_fd());
        }
        message.last = all.peek().is_none();
        shim.send(&message, &fds)?;
        if message.last {
            return Ok(());
        }
    }
}

fn remove_folder(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(file_error("remove", path)(error)),
        _ => Ok(()),
    }
}

fn shim_error(action: &'static str, id: &ContainerId) -> impl Fn(io::Error) -> BackendError {
    let id = id.clone();
    move |error| BackendError::Runtime { action, id: id.clone(), problem: format!("no answer from its shim: {error}") }
}

fn unexpected(action: &'static str, id: &ContainerId, reply: &Reply) -> BackendError {
    let problem = match reply {
        Reply::Failed { problem } => problem.clone(),
        other => format!("its shim answered {other:?}"),
    };
    BackendError::Runtime { action, id: id.clone(), problem }
}

/// Nothing behind these locks can be left half done by a panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read(path).map_err(file_error("read", path))?;
    serde_json::from_slice(&text).map_err(|error| file_error("read", path)(error.into()))
}

/// Replaces the file in one step: a reader, or a crash, sees the old or the new text.
fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let new = path.with_extension("new");
    serde_json::to_vec(value)
        .map_err(io::Error::from)
        .and_then(|text| fs::write(&new, text))
        .and_then(|()| fs::rename(&new, path))
        .map_err(file_error("write", path))
}
