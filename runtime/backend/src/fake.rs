//! Containers that are plain child processes in a changed root: for tests of what uses a back end, where faults must be
//! had on order and nobody wants to wait for namespaces.
//!
//! Not isolated, not limited (limits are only remembered), and not for anything but tests. Clones share everything, so
//! a clone is what a new agent would see; the containers end with the last clone.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use warmswap_model::{CgroupId, ImageRef, Listen, ServiceName};

use crate::cgroup::file_error;
use crate::contract::{Backend, NOTIFY, Result};
use crate::layout::NOTIFY_INSIDE;
use crate::process::ProcessId;
use crate::{
    BackendError, ContainerId, ContainerSpec, ContainerState, ContainerUsage, FoundContainer, HostCapacity, Limits,
    NamedFd, PreparedImage, ServiceGround,
};

/// A method of [`Backend`] that a fault can be ordered for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Call {
    PrepareImage,
    OpenService,
    CloseService,
    Create,
    Start,
    State,
    Wait,
    Signal,
    HasProcess,
    Freeze,
    Thaw,
    Usage,
    SetLimits,
    Destroy,
    List,
    KeepFd,
    DropKeptFd,
    KeptFds,
}

/// See the module.
#[derive(Clone)]
pub struct FakeBackend {
    inner: Arc<Mutex<Inner>>,
    folder: PathBuf,
}

#[derive(Default)]
struct Inner {
    containers: BTreeMap<ContainerId, Container>,
    services: BTreeMap<ServiceName, (CgroupId, Vec<NamedFd>)>,
    cgroups: u64,
    faults: BTreeMap<Call, u32>,
    delays: BTreeMap<Call, Duration>,
    calls: Vec<Call>,
}

struct Container {
    spec: ContainerSpec,
    process: ProcessId,
    /// Written to by start, closed by the end of a container that never started.
    go: Option<File>,
    state: ContainerState,
    limits: Limits,
    cgroup: CgroupId,
    kept: Vec<NamedFd>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        for container in self.containers.values_mut() {
            container.end();
        }
    }
}

impl FakeBackend {
    /// `folder` takes the logs.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        Self { inner: Arc::default(), folder: folder.to_owned() }
    }

    /// The next `times` calls fail.
    pub fn fail(&self, call: Call, times: u32) {
        self.lock().faults.insert(call, times);
    }

    /// Every call takes so much longer.
    pub fn delay(&self, call: Call, delay: Duration) {
        self.lock().delays.insert(call, delay);
    }

    /// Every call so far, in order.
    #[must_use]
    pub fn calls(&self) -> Vec<Call> {
        self.lock().calls.clone()
    }

    /// What [`Backend::create`] and [`Backend::set_limits`] have set, later values over earlier ones.
    #[must_use]
    pub fn limits(&self, id: &ContainerId) -> Option<Limits> {
        self.lock().containers.get(id).map(|c| c.limits.clone())
    }

    fn sockets(&self, service: &ServiceName) -> PathBuf {
        self.folder.join("sockets").join(format!("{service}.json"))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes the call and does what was ordered for it.
    fn enter(&self, call: Call) -> Result<MutexGuard<'_, Inner>> {
        let delay = self.lock().delays.get(&call).copied();
        if let Some(delay) = delay {
            std::thread::sleep(delay);
        }
        let mut inner = self.lock();
        inner.calls.push(call);
        match inner.faults.get_mut(&call) {
            Some(left) if *left > 0 => {
                *left -= 1;
                Err(BackendError::Unsupported { feature: "a call that a test made fail", remedy: "none" })
            }
            _ => Ok(inner),
        }
    }
}

impl Inner {
    fn get(&mut self, id: &ContainerId) -> Result<&mut Container> {
        let container = self.containers.get_mut(id).ok_or_else(|| BackendError::NoSuchContainer { id: id.clone() })?;
        container.look();
        Ok(container)
    }

    fn next_cgroup(&mut self) -> CgroupId {
        self.cgroups += 1;
        CgroupId(self.cgroups)
    }
}

impl Container {
    /// Collects the end of the process.
    fn look(&mut self) {
        use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
        if matches!(self.state, ContainerState::Exited { .. }) {
            return;
        }
        let (code, signal) = match waitpid(nix::unistd::Pid::from_raw(self.process.pid), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, code)) => (Some(code), None),
            Ok(WaitStatus::Signaled(_, signal, _)) => (None, Some(signal as i32)),
            Ok(_) => return,
            Err(_) => (None, None),
        };
        self.state = ContainerState::Exited { code, signal };
        self.signal_group(libc::SIGKILL);
    }

    /// Every process the container has started leads or belongs to the group of its first.
    fn signal_group(&self, signal: i32) {
        // SAFETY: two integers. The group exists as long as its leader is not reaped or a member lives.
        unsafe { libc::kill(-self.process.pid, signal) };
    }

    fn end(&mut self) {
        self.go = None;
        self.look();
        if !matches!(self.state, ContainerState::Exited { .. }) {
            self.signal_group(libc::SIGKILL);
            let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(self.process.pid), None);
            self.state = ContainerState::Exited { code: None, signal: Some(libc::SIGKILL) };
        }
    }

    /// Stops or continues, confirmed by the kernel.
    fn set_stopped(&self, stopped: bool) {
        self.signal_group(if stopped { libc::SIGSTOP } else { libc::SIGCONT });
        let deadline = Instant::now() + Duration::from_secs(5);
        while crate::Standstill::of(self.process.pid.unsigned_abs()).is_some() != stopped && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Backend for FakeBackend {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn capacity(&self) -> Result<HostCapacity> {
        crate::host::capacity()
    }

    fn prepare_image(&self, image: &ImageRef) -> Result<PreparedImage> {
        drop(self.enter(Call::PrepareImage)?);
        crate::image::prepare(image, &self.folder.join("layers"))
    }

    fn open_service(&self, service: &ServiceName, listen: &BTreeMap<String, Listen>) -> Result<ServiceGround> {
        let mut inner = self.enter(Call::OpenService)?;
        if !inner.services.contains_key(service) {
            let cgroup = inner.next_cgroup();
            inner.services.insert(service.clone(), (cgroup, Vec::new()));
        }
        let (cgroup, known) = inner.services.entry(service.clone()).or_insert((CgroupId(0), Vec::new()));
        let mut listeners = Vec::new();
        for (name, wanted) in listen {
            let failed = |source| {
                let (name, address) = (name.clone(), wanted.address.clone());
                BackendError::Listen { name, address, source }
            };
            if !known.iter().any(|named| named.name == *name) {
                let fd = crate::embedded::open_listener(wanted, &self.sockets(service)).map_err(failed)?;
                known.push(NamedFd { name: name.clone(), fd });
            }
            if let Some(named) = known.iter().find(|named| named.name == *name) {
                listeners.push(NamedFd { name: name.clone(), fd: named.fd.try_clone().map_err(failed)? });
            }
        }
        Ok(ServiceGround { cgroup: *cgroup, listeners })
    }

    fn close_service(&self, service: &ServiceName) -> Result<()> {
        let mut inner = self.enter(Call::CloseService)?;
        if inner.containers.keys().any(|id| id.service == *service) {
            let problem = "containers are left".to_owned();
            return Err(BackendError::Service { action: "close", service: service.clone(), problem });
        }
        inner.services.remove(service);
        crate::embedded::remove_sockets(&self.sockets(service))
    }

    fn create(&self, spec: &ContainerSpec, fds: Vec<NamedFd>, keep: Vec<NamedFd>) -> Result<CgroupId> {
        let mut inner = self.enter(Call::Create)?;
        if inner.containers.contains_key(&spec.id) {
            return Err(BackendError::ContainerExists { id: spec.id.clone() });
        }
        let failed = |problem: String| BackendError::Runtime { action: "create", id: spec.id.clone(), problem };
        let log = self.log_path(&spec.id);
        std::fs::create_dir_all(&self.folder).map_err(file_error("make the folder", &self.folder))?;
        let _ = std::fs::remove_file(&log);
        let log = File::options().append(true).create(true).open(&log).map_err(file_error("make", &log))?;
        let (go_reader, go) = io::pipe().map_err(|error| failed(error.to_string()))?;
        let notify = keep.iter().find(|named| named.name == NOTIFY);
        let notify = notify.map(|socket| bind_notify(spec, socket)).transpose().map_err(failed)?;
        let child = Child::plan(spec, fds, log, go_reader.into(), notify.as_deref()).map_err(failed)?;
        let pid = child.fork().map_err(|error| failed(error.to_string()))?;
        let process = ProcessId::of(pid).ok_or_else(|| failed("it ended at once".to_owned()))?;
        let cgroup = inner.next_cgroup();
        let go = Some(File::from(OwnedFd::from(go)));
        let state = ContainerState::Created { pid: pid.unsigned_abs() };
        let container =
            Container { spec: spec.clone(), process, go, state, limits: spec.limits.clone(), cgroup, kept: keep };
        inner.containers.insert(spec.id.clone(), container);
        Ok(cgroup)
    }

    fn start(&self, id: &ContainerId) -> Result<()> {
        let mut inner = self.enter(Call::Start)?;
        let container = inner.get(id)?;
        let failed = |problem: String| BackendError::Runtime { action: "start", id: id.clone(), problem };
        let mut go = container.go.take().ok_or_else(|| failed("it was started before".to_owned()))?;
        io::Write::write_all(&mut go, b"!").map_err(|error| failed(error.to_string()))?;
        if let ContainerState::Created { pid } = container.state {
            container.state = ContainerState::Running { pid };
        }
        Ok(())
    }

    fn state(&self, id: &ContainerId) -> Result<ContainerState> {
        Ok(self.enter(Call::State)?.get(id)?.state)
    }

    fn wait(&self, id: &ContainerId, timeout: Duration) -> Result<ContainerState> {
        let process = self.enter(Call::Wait)?.get(id)?.process;
        process.wait_end(timeout);
        Ok(self.lock().get(id)?.state)
    }

    fn signal(&self, id: &ContainerId, signal: i32) -> Result<()> {
        let mut inner = self.enter(Call::Signal)?;
        let container = inner.get(id)?;
        match container.process.signal(signal) {
            Ok(true) if !matches!(container.state, ContainerState::Exited { .. }) => Ok(()),
            result => {
                let problem = result.err().map_or("it has ended".to_owned(), |error| error.to_string());
                Err(BackendError::Runtime { action: "signal", id: id.clone(), problem })
            }
        }
    }

    fn has_process(&self, id: &ContainerId, pid: i32) -> Result<bool> {
        let leader = self.enter(Call::HasProcess)?.get(id)?.process.pid;
        // SAFETY: an integer, and no more than a number comes back.
        Ok(unsafe { libc::getpgid(pid) } == leader)
    }

    fn freeze(&self, id: &ContainerId) -> Result<()> {
        self.enter(Call::Freeze)?.get(id)?.set_stopped(true);
        Ok(())
    }

    fn thaw(&self, id: &ContainerId) -> Result<()> {
        self.enter(Call::Thaw)?.get(id)?.set_stopped(false);
        Ok(())
    }

    fn usage(&self, id: &ContainerId) -> Result<ContainerUsage> {
        let mut inner = self.enter(Call::Usage)?;
        let pid = inner.get(id)?.process.pid;
        // "run time in ns, wait time in ns, slices"
        let schedstat = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap_or_default();
        let cpu_ns = schedstat.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0);
        Ok(ContainerUsage { cpu_ns, ..ContainerUsage::default() })
    }

    fn set_limits(&self, id: &ContainerId, limits: &Limits) -> Result<()> {
        let mut inner = self.enter(Call::SetLimits)?;
        let known = &mut inner.get(id)?.limits;
        let new = limits.clone();
        *known = Limits {
            cpu_pct_max: new.cpu_pct_max.or(known.cpu_pct_max),
            cpu_weight: new.cpu_weight.or(known.cpu_weight),
            cpus: new.cpus.or(known.cpus.take()),
            memory_mb_max: new.memory_mb_max.or(known.memory_mb_max),
            memory_mb_reserved: new.memory_mb_reserved.or(known.memory_mb_reserved),
            disk_weight: new.disk_weight.or(known.disk_weight),
            processes_max: new.processes_max.or(known.processes_max),
        };
        Ok(())
    }

    fn destroy(&self, id: &ContainerId) -> Result<()> {
        if let Some(mut container) = self.enter(Call::Destroy)?.containers.remove(id) {
            container.end();
        }
        Ok(())
    }

    fn list(&self) -> Result<Vec<FoundContainer>> {
        let mut inner = self.enter(Call::List)?;
        Ok(inner
            .containers
            .values_mut()
            .map(|container| {
                container.look();
                FoundContainer { spec: container.spec.clone(), state: container.state, cgroup: container.cgroup }
            })
            .collect())
    }

    fn log_path(&self, id: &ContainerId) -> PathBuf {
        self.folder.join(format!("{}.{}.log", id.service, id.generation))
    }

    fn keep_fd(&self, id: &ContainerId, fd: NamedFd) -> Result<()> {
        let mut inner = self.enter(Call::KeepFd)?;
        let kept = &mut inner.get(id)?.kept;
        match kept.iter_mut().find(|old| old.name == fd.name) {
            Some(old) => *old = fd,
            None => kept.push(fd),
        }
        Ok(())
    }

    fn drop_kept_fd(&self, id: &ContainerId, name: &str) -> Result<()> {
        self.enter(Call::DropKeptFd)?.get(id)?.kept.retain(|named| named.name != name);
        Ok(())
    }

    fn kept_fds(&self, id: &ContainerId) -> Result<Vec<NamedFd>> {
        let mut inner = self.enter(Call::KeptFds)?;
        let kept = &inner.get(id)?.kept;
        kept.iter()
            .map(|named| Ok(NamedFd { name: named.name.clone(), fd: named.fd.try_clone()? }))
            .collect::<io::Result<_>>()
            .map_err(|error| {
                let problem = error.to_string();
                BackendError::Runtime { action: "fetch the descriptors of", id: id.clone(), problem }
            })
    }
}

/// Binds the socket below the root of the container, where others may run from the same folder; returns its path inside.
fn bind_notify(spec: &ContainerSpec, socket: &NamedFd) -> std::result::Result<String, String> {
    let root = spec.image.layers.last().ok_or("the image has no layers")?;
    let name = format!("{}.{}", spec.id.service, spec.id.generation);
    let folder = root.join(NOTIFY_INSIDE.trim_start_matches('/'));
    let _ = std::fs::remove_file(folder.join(&name));
    std::fs::create_dir_all(&folder)
        .and_then(|()| crate::embedded::bind_at(&folder, &name, socket.fd.as_fd()))
        .and_then(|()| std::fs::set_permissions(folder.join(&name), std::fs::Permissions::from_mode(0o666)))
        .map_err(|error| format!("cannot bind its notification socket: {error}"))?;
    Ok(format!("{NOTIFY_INSIDE}/{name}"))
}

/// Everything the child needs, allocated before the fork: after it only system calls are made, because other threads
/// of the test may have held any lock.
struct Child {
    root: CString,
    folder: CString,
    program: CString,
    args: Vec<CString>,
    env: Vec<CString>,
    uid: u32,
    gid: u32,
    gids: Vec<u32>,
    /// Above all targets.
    fds: Vec<OwnedFd>,
    log: OwnedFd,
    go: OwnedFd,
}

impl Child {
    fn plan(
        spec: &ContainerSpec,
        fds: Vec<NamedFd>,
        log: File,
        go: OwnedFd,
        notify: Option<&str>,
    ) -> std::result::Result<Self, String> {
        let c = |bytes: &[u8]| CString::new(bytes).map_err(|_| "a text with a NUL byte".to_owned());
        let root = spec.image.layers.last().ok_or("the image has no layers")?;
        let args = spec.command.as_ref().unwrap_or(&spec.image.entrypoint);
        let program = args.first().ok_or("there is no program to run: set command")?;
        if !root.join(program.trim_start_matches('/')).exists() {
            return Err(format!("executable '{program}' not found"));
        }
        let opened = File::open(root).map_err(|error| error.to_string())?;
        let identity = crate::embedded::identity(opened.as_fd(), &spec.image.user)?;
        let above = 3 + i32::try_from(fds.len()).map_err(|_| "too many descriptors")?;
        let lift = |fd: OwnedFd| -> std::result::Result<OwnedFd, String> {
            let new = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(above)).map_err(|e| e.to_string())?;
            // SAFETY: F_DUPFD_CLOEXEC has just made this descriptor; nobody else owns it.
            Ok(unsafe { OwnedFd::from_raw_fd(new) })
        };
        Ok(Self {
            root: c(root.as_os_str().as_bytes())?,
            folder: c(spec.image.working_dir.as_os_str().as_bytes())?,
            program: c(program.as_bytes())?,
            args: args.iter().map(|arg| c(arg.as_bytes())).collect::<std::result::Result<_, _>>()?,
            env: crate::embedded::environment(spec, notify)
                .iter()
                .map(|line| c(line.as_bytes()))
                .collect::<std::result::Result<_, _>>()?,
            uid: identity.uid,
            gid: identity.gid,
            gids: identity.additional_gids,
            fds: fds.into_iter().map(|named| lift(named.fd)).collect::<std::result::Result<_, _>>()?,
            log: lift(log.into())?,
            go: lift(go)?,
        })
    }

    fn fork(&self) -> io::Result<i32> {
        let pointers = |texts: &[CString]| -> Vec<*const libc::c_char> {
            texts.iter().map(|t| t.as_ptr()).chain([std::ptr::null()]).collect()
        };
        let (args, env) = (pointers(&self.args), pointers(&self.env));
        // SAFETY: the child calls only async-signal-safe functions (`run`) and then execs or exits.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            // SAFETY: in the child of a fork, as `run` wants it, with terminated arrays.
            0 => unsafe { self.run(&args, &env) },
            pid => {
                // The child does it too: whoever is first, the group exists before anybody signals it.
                // SAFETY: two integers.
                unsafe { libc::setpgid(pid, pid) };
                Ok(pid)
            }
        }
    }

    /// # Safety
    /// Only in a forked child; the arrays end with null.
    unsafe fn run(&self, args: &[*const libc::c_char], env: &[*const libc::c_char]) -> ! {
        let up_to = 3 + self.fds.len() as RawFd;
        // SAFETY: system calls on descriptors and texts that live as long as `self`.
        unsafe {
            libc::setpgid(0, 0);
            libc::dup2(self.log.as_raw_fd(), 1);
            libc::dup2(self.log.as_raw_fd(), 2);
            for (target, fd) in (3..).zip(&self.fds) {
                libc::dup2(fd.as_raw_fd(), target);
            }
            // Last, because another source may lie at this number.
            libc::dup2(self.go.as_raw_fd(), up_to);
            // Also the other end of `go`, of this and of other containers: the end of the test is to be noticed.
            libc::close_range(up_to.unsigned_abs() + 1, u32::MAX, 0);
            let mut byte = 0_u8;
            if libc::read(up_to, (&raw mut byte).cast(), 1) != 1 {
                libc::_exit(255);
            }
            libc::close(up_to);
            let prepared = libc::chroot(self.root.as_ptr()) == 0
                && libc::chdir(self.folder.as_ptr()) == 0
                && libc::setgroups(self.gids.len(), self.gids.as_ptr()) == 0
                && libc::setgid(self.gid) == 0
                && libc::setuid(self.uid) == 0
                && libc::signal(libc::SIGPIPE, libc::SIG_DFL) != libc::SIG_ERR;
            if prepared {
                libc::execve(self.program.as_ptr(), args.as_ptr(), env.as_ptr());
            }
            libc::_exit(127)
        }
    }
}
