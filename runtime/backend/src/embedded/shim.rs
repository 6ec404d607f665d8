//! One process per container: its parent, its reaper and the keeper of its descriptors.
//!
//! Runs single-threaded in a re-executed copy of this program, because libcontainer clones from the calling process.
//! Survives the agent. Knows nothing of services, handovers or limits: it creates, starts, reports and keeps.
//!
//! ```text
//! agent ──spawn──▶ shim: own session, cgroup, mount namespace ──libcontainer──▶ init (waits) ──Start──▶ program
//!   │  BootFds ────▶        descriptors 3, 4, … arranged, clone
//!   │  ◀──── Created
//!   └─ shim.sock ──▶ Start, State, Wait, Signal, Keep, Drop, Kept, Quit
//! ```

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use libcontainer::container::Container;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::socket::{SockFlag, accept4};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use warmswap_model::{Generation, ServiceName, with_causes};

use super::wire::{BootFds, Channel, FDS_MAX, FDS_PER_CONTAINER_MAX, Reply, Request, ShimRecord, listen_at};
use super::{oci, rootfs, user};
use crate::cgroup::{Group, Hierarchies, attach};
use crate::layout::Layout;
use crate::process::{ProcessId, poll_timeout};
use crate::{ContainerId, ContainerSpec, ContainerState, NamedFd};

/// A log that grows beyond this is moved to `<log>.1` and begun anew; looked at every [`LOG_CHECK`].
const LOG_BYTES_MAX: u64 = 8 << 20;
const LOG_CHECK: Duration = Duration::from_secs(1);
/// Limit on open files a container gets, where the host allows it.
const FILES_MAX: u64 = 1 << 20;

/// Entry of the helper process: `<run_dir> <state_dir> <service> <generation>`.
pub(crate) fn main(
    run_dir: PathBuf,
    state_dir: PathBuf,
    service: ServiceName,
    generation: Generation,
) -> Result<(), String> {
    let layout = Layout::new(run_dir, state_dir);
    let id = ContainerId { service, generation };
    let files_max = become_shim().map_err(|error| format!("cannot prepare the process: {error}"))?;
    let boot = take_boot_channel().map_err(|error| format!("cannot take the boot channel: {error}"))?;
    // libcontainer keeps the reasons of its errors out of them and logs them instead. Nobody else can have set one.
    let _ = tracing::subscriber::set_global_default(super::log::ErrorLog);
    match create(&layout, &id, &boot, files_max) {
        Ok(mut shim) => {
            // The agent may have died meanwhile; the container is created all the same and will be found.
            let _ = boot.send(&Reply::Created, &[]);
            drop(boot);
            shim.serve();
            Ok(())
        }
        Err(problem) => {
            let _ = boot.send(&Reply::Failed { problem: problem.clone() }, &[]);
            Err(problem)
        }
    }
}

/// Undoes what a process inherits from a busy agent: session, signals, scheduling, file limit. Returns the limit on open
/// files for the container.
fn become_shim() -> io::Result<u64> {
    // An error means that we lead a session already.
    let _ = nix::unistd::setsid();
    nix::sys::prctl::set_child_subreaper(true)?;
    nix::sys::prctl::set_name(c"warmswap-shim")?;
    std::env::set_current_dir("/")?;
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    for number in Signal::iterator() {
        if number != Signal::SIGKILL && number != Signal::SIGSTOP {
            // SAFETY: the default action is no handler, so nothing of ours runs in signal context. The container would
            // inherit ignored signals (Rust itself ignores SIGPIPE).
            unsafe { signal(number, SigHandler::SigDfl) }?;
        }
    }
    nix::sys::signal::SigSet::all().thread_unblock()?;
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: a valid, fully initialised parameter struct; 0 means this process.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_OTHER, &raw const parameters) };
    // SAFETY: takes integers only. A failure leaves the inherited niceness, which harms nobody.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 0) };
    let mut cpus = nix::sched::CpuSet::new();
    for cpu in 0..nix::sched::CpuSet::count() {
        cpus.set(cpu)?;
    }
    nix::sched::sched_setaffinity(Pid::from_raw(0), &cpus)?;
    let (_, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)?;
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard.min(FILES_MAX))
}

/// The channel to the agent comes as standard input.
pub(crate) fn take_boot_channel() -> io::Result<Channel> {
    let boot = nix::fcntl::fcntl(io::stdin(), nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(3))?;
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    // SAFETY: F_DUPFD_CLOEXEC has just made this descriptor; nobody else owns it.
    Ok(Channel::from_fd(unsafe { std::os::fd::FromRawFd::from_raw_fd(boot) }))
}

fn create(layout: &Layout, id: &ContainerId, boot: &Channel, files_max: u64) -> Result<Shim, String> {
    let folder = layout.container_run(id);
    let hierarchies = Hierarchies::detect().map_err(|error| with_causes(&error))?;
    let own_procs = hierarchies.v2.join(layout.cgroup_shim(id)).join("cgroup.procs");
    let own_procs = OpenOptions::new()
        .write(true)
        .open(&own_procs)
        .map_err(|error| format!("cannot open {}: {error}", own_procs.display()))?;
    let join = || attach(std::slice::from_ref(&own_procs), 0);
    join().map_err(|error| format!("cannot join the shim's cgroup: {error}"))?;
    let spec: ContainerSpec = super::read_json(&folder.join("spec.json")).map_err(|error| with_causes(&error))?;
    let listener = listen_at(&folder).map_err(|error| format!("cannot open the shim's socket: {error}"))?;
    let mut shim = Shim {
        record: ShimRecord {
            id: id.clone(),
            shim: ProcessId::own().ok_or("/proc is not mounted")?,
            init: None,
            state: None,
            passed: Vec::new(),
        },
        folder: folder.clone(),
        log: layout.log(id),
        listener,
        connections: Vec::new(),
        kept: Vec::new(),
        container: None,
        init_pidfd: None,
    };
    shim.write_record()?;

    // The agent sends them when it has made the cgroups.
    let passed = receive_fds(boot, &mut shim.kept)?;
    shim.record.passed = passed.iter().map(|named| named.name.clone()).collect();
    let root = folder.join("rootfs");
    let cgroup = layout.cgroup_container(id);
    let procs = Group::new(&hierarchies, cgroup.clone()).open_procs().map_err(|error| with_causes(&error))?;
    rootfs::private_mounts().map_err(|error| format!("cannot make a mount namespace: {error}"))?;
    rootfs::mount_overlay(&spec.image.layers, &[layout.container_state(id), folder.join("overlay")], &root)?;
    let root_fd = File::open(&root).map_err(|error| format!("cannot open {}: {error}", root.display()))?;
    let identity = user::identity(root_fd.as_fd(), &spec.image.user)?;
    crate::inside::make_folder_inside(root_fd.as_fd(), &spec.image.working_dir)
        .map_err(|error| format!("cannot make the working folder {}: {error}", spec.image.working_dir.display()))?;
    drop(root_fd);
    let notify = Some(layout.notify_folder(id)).filter(|folder| folder.is_dir());
    let netns = layout.netns(&id.service);
    let config = oci::config(&spec, &identity, &netns, &cgroup, files_max, notify.as_deref());
    super::write_json(&folder.join("config.json"), &config).map_err(|error| with_causes(&error))?;
    let log = open_log(&shim.log).map_err(|error| format!("cannot open the log {}: {error}", shim.log.display()))?;

    // Moving a process between cgroups waits for an RCU grace period (10 ms and more), but not within one grace period of
    // the last move. This one moves nothing; it makes the container's own moves, a few ms from now, free.
    join().map_err(|error| format!("cannot join the shim's cgroup: {error}"))?;
    let container = run_libcontainer(&folder, &passed, &log).map_err(|problem| with_log(problem, &shim.log))?;
    drop(passed);
    let pid = container.pid().ok_or("libcontainer created no process")?.as_raw();
    // The program waits for Start, so no event of it is missed. On a pure v2 host libcontainer has put it there.
    if !hierarchies.v1.is_empty() {
        attach(&procs, pid).map_err(|error| format!("cannot put the container into its cgroups: {error}"))?;
    }
    drop(procs);
    shim.container = Some(container);
    let init = ProcessId::of(pid).ok_or("the container's first process has ended")?;
    shim.init_pidfd = Some(init.pidfd().ok_or("the container's first process has ended")?);
    shim.record.init = Some(init);
    shim.record.state = Some(ContainerState::Created { pid: pid.unsigned_abs() });
    shim.write_record()?;
    // The container has 0 already; its keeper goes later than it.
    let _ = fs::write("/proc/self/oom_score_adj", "-500");
    for number in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: ignoring is no handler. Only after the container exists, which would inherit it.
        let _ = unsafe { signal(number, SigHandler::SigIgn) };
    }
    Ok(shim)
}

/// Everything the container is given, in order. What is only kept goes to `kept`.
fn receive_fds(boot: &Channel, kept: &mut Vec<NamedFd>) -> Result<Vec<NamedFd>, String> {
    let mut passed = Vec::new();
    loop {
        let (message, fds): (BootFds, _) = boot.expect().map_err(|error| format!("no word from the agent: {error}"))?;
        if fds.len() != message.pass.len() + message.keep.len() {
            return Err("descriptors were lost on the way from the agent".to_owned());
        }
        let names = message.pass.iter().map(|n| (n, true)).chain(message.keep.iter().map(|n| (n, false)));
        for ((name, pass), fd) in names.zip(fds) {
            let named = NamedFd { name: name.clone(), fd };
            if pass {
                passed.push(named);
            } else {
                keep(kept, named);
            }
        }
        if passed.len() + kept.len() > FDS_PER_CONTAINER_MAX {
            return Err(format!("more than {FDS_PER_CONTAINER_MAX} descriptors"));
        }
        if message.last {
            return Ok(passed);
        }
    }
}

fn keep(kept: &mut Vec<NamedFd>, new: NamedFd) {
    match kept.iter_mut().find(|old| old.name == new.name) {
        Some(old) => *old = new,
        None => kept.push(new),
    }
}

/// Before the program runs, only what went wrong on the way to it is in the log.
fn with_log(problem: String, log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    match text.lines().next().filter(|line| !line.is_empty()) {
        Some(first) => format!("{problem} ({first})"),
        None => problem,
    }
}

fn open_log(path: &Path) -> io::Result<File> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    // Of a container that had the same id before.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    OpenOptions::new().append(true).create_new(true).mode(0o600).open(path)
}

/// Puts the descriptors to 3, 4, …, where libcontainer leaves them for the program, and clones the container.
fn run_libcontainer(folder: &Path, passed: &[NamedFd], log: &File) -> Result<Container, String> {
    let count = i32::try_from(passed.len()).map_err(|_| "too many descriptors".to_owned())?;
    let above = 3 + count;
    let arranged = Arranged::new(passed, above).map_err(|error| format!("cannot arrange descriptors: {error}"))?;
    let output = || duplicate_from(log.as_fd(), above).map_err(|error| format!("cannot duplicate the log: {error}"));
    let container = build(folder, count, output()?, output()?);
    drop(arranged);
    container
}

/// While it lives, 3 to `above - 1` are what the container gets; before and after, they are whatever they were.
struct Arranged {
    above: RawFd,
    /// What lay at these numbers, each with its number.
    parked: Vec<(RawFd, OwnedFd)>,
}

impl Arranged {
    fn new(passed: &[NamedFd], above: RawFd) -> Result<Self, Errno> {
        let mut arranged = Self { above, parked: Vec::new() };
        let sources =
            passed.iter().map(|named| duplicate_from(named.fd.as_fd(), above)).collect::<Result<Vec<_>, _>>()?;
        for fd in 3..above {
            // SAFETY: F_DUPFD_CLOEXEC on a number that is not open fails with EBADF and does nothing.
            let new = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, above) };
            if new >= 0 {
                // SAFETY: just made by the call above; nobody else owns it.
                arranged.parked.push((fd, unsafe { std::os::fd::FromRawFd::from_raw_fd(new) }));
            } else if Errno::last() != Errno::EBADF {
                return Err(Errno::last());
            }
        }
        for (target, source) in (3..).zip(&sources) {
            // SAFETY: what lay at `target` is parked and comes back in `drop`, so its owner never notices. dup2 clears
            // close-on-exec, which is the point.
            if unsafe { libc::dup2(source.as_raw_fd(), target) } < 0 {
                return Err(Errno::last());
            }
        }
        Ok(arranged)
    }
}

impl Drop for Arranged {
    fn drop(&mut self) {
        for fd in 3..self.above {
            match self.parked.iter().find(|(number, _)| *number == fd) {
                // SAFETY: puts back what its owner believes to be at this number.
                Some((_, parked)) => unsafe { libc::dup3(parked.as_raw_fd(), fd, libc::O_CLOEXEC) },
                // SAFETY: nothing lay here before `new`, so only the container's copy can be closed.
                None => unsafe { libc::close(fd) },
            };
        }
    }
}

fn duplicate_from(fd: BorrowedFd<'_>, lowest: RawFd) -> Result<OwnedFd, Errno> {
    let new = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(lowest))?;
    // SAFETY: F_DUPFD_CLOEXEC has just made this descriptor; nobody else owns it.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(new) })
}

fn build(folder: &Path, preserved: i32, stdout: OwnedFd, stderr: OwnedFd) -> Result<Container, String> {
    let state = folder.join("oci");
    fs::create_dir_all(&state).map_err(|error| format!("cannot make {}: {error}", state.display()))?;
    ContainerBuilder::new("init".to_owned(), SyscallType::default())
        .with_root_path(&state)
        .map_err(|error| with_causes(&error))?
        .with_preserved_fds(preserved)
        .with_stdout(stdout)
        .with_stderr(stderr)
        .as_init(folder)
        .with_systemd(false)
        .with_detach(true)
        // In an initramfs only: a root of the container can then get at it by leaving its chroot.
        .with_no_pivot(!rootfs::can_pivot())
        .build()
        .map_err(|error| with_causes(&error))
}

struct Shim {
    record: ShimRecord,
    folder: PathBuf,
    log: PathBuf,
    listener: OwnedFd,
    connections: Vec<Connection>,
    kept: Vec<NamedFd>,
    container: Option<Container>,
    /// `None` once the container was reaped.
    init_pidfd: Option<OwnedFd>,
}

struct Connection {
    channel: Channel,
    /// Wants to hear of the end.
    waits: bool,
}

impl Shim {
    fn write_record(&self) -> Result<(), String> {
        super::write_json(&self.folder.join("state.json"), &self.record).map_err(|error| with_causes(&error))
    }

    fn state(&self) -> ContainerState {
        self.record.state.unwrap_or(ContainerState::Exited { code: None, signal: None })
    }

    /// Until asked to quit.
    fn serve(&mut self) {
        loop {
            let (listener, ended, readable) = self.poll();
            if ended {
                self.reap();
            }
            // Backwards, so that removing one does not move those still to come.
            for index in readable.into_iter().rev() {
                match self.connections[index].channel.receive::<Request>() {
                    Ok(Some((Request::Quit, _))) => {
                        self.quit();
                        let _ = self.connections[index].channel.send(&Reply::Done, &[]);
                        return;
                    }
                    Ok(Some((request, fds))) => {
                        if self.answer(index, request, fds).is_err() {
                            self.connections.remove(index);
                        }
                    }
                    Ok(None) | Err(_) => {
                        self.connections.remove(index);
                    }
                }
            }
            if listener {
                self.accept();
            }
            self.cap_log();
        }
    }

    /// Whether somebody connects, whether the container has ended, and which connections can be read.
    fn poll(&self) -> (bool, bool, Vec<usize>) {
        let mut fds = vec![PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        fds.extend(self.connections.iter().map(|c| PollFd::new(c.channel.as_fd(), PollFlags::POLLIN)));
        fds.extend(self.init_pidfd.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
        // Nothing writes to the log of a container that has ended.
        let timeout = match self.init_pidfd {
            Some(_) => poll_timeout(LOG_CHECK),
            None => nix::poll::PollTimeout::NONE,
        };
        if poll(&mut fds, timeout).is_err() {
            return (false, false, Vec::new());
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        let connections = self.connections.len();
        let readable = (0..connections).filter(|index| ready[1 + index]).collect();
        (ready[0], ready.get(1 + connections).copied().unwrap_or(false), readable)
    }

    fn accept(&mut self) {
        let Ok(fd) = accept4(self.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) else { return };
        // SAFETY: accept4 has just made this descriptor; nobody else owns it.
        let channel = Channel::from_fd(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) });
        // A client that does not read its answers must not stop the others.
        if channel.peer_is_root() && channel.set_timeout(Duration::from_secs(2)).is_ok() {
            self.connections.push(Connection { channel, waits: false });
        }
    }

    fn answer(&mut self, index: usize, request: Request, fds: Vec<OwnedFd>) -> io::Result<()> {
        let result = match request {
            Request::State => return self.connections[index].channel.send(&Reply::State(self.state()), &[]),
            Request::Wait => {
                self.reap();
                if let state @ ContainerState::Exited { .. } = self.state() {
                    return self.connections[index].channel.send(&Reply::State(state), &[]);
                }
                self.connections[index].waits = true;
                return Ok(());
            }
            Request::Kept => return self.send_kept(index),
            Request::Start => self.start(),
            Request::Signal { signal } => self.signal(signal),
            Request::Keep { name } => match fds.into_iter().next() {
                Some(_) if self.kept.len() >= FDS_PER_CONTAINER_MAX => {
                    Err(format!("{FDS_PER_CONTAINER_MAX} descriptors are kept already"))
                }
                Some(fd) => {
                    keep(&mut self.kept, NamedFd { name, fd });
                    Ok(())
                }
                None => Err("no descriptor came with the request".to_owned()),
            },
            Request::Drop { name } => {
                self.kept.retain(|named| named.name != name);
                Ok(())
            }
            Request::Quit => Ok(()),
        };
        let reply = match result {
            Ok(()) => Reply::Done,
            Err(problem) => Reply::Failed { problem },
        };
        self.connections[index].channel.send(&reply, &[])
    }

    fn send_kept(&self, index: usize) -> io::Result<()> {
        let mut chunks = self.kept.chunks(FDS_MAX).peekable();
        loop {
            let chunk = chunks.next().unwrap_or_default();
            let last = chunks.peek().is_none();
            let reply = Reply::Kept { names: chunk.iter().map(|named| named.name.clone()).collect(), last };
            let fds: Vec<_> = chunk.iter().map(|named| named.fd.as_fd()).collect();
            self.connections[index].channel.send(&reply, &fds)?;
            if last {
                return Ok(());
            }
        }
    }

    fn start(&mut self) -> Result<(), String> {
        let ContainerState::Created { pid } = self.state() else {
            return Err("it was started before".to_owned());
        };
        let container = self.container.as_mut().ok_or("it was not created")?;
        container.start().map_err(|error| with_causes(&error))?;
        self.record.state = Some(ContainerState::Running { pid });
        self.write_record()
    }

    /// The init is our child: until we reap it, its pid belongs to nobody else.
    fn signal(&mut self, number: i32) -> Result<(), String> {
        self.reap();
        let (Some(init), Some(_)) = (self.record.init, &self.init_pidfd) else {
            return Err("it has ended".to_owned());
        };
        match init.signal(number) {
            Ok(true) => Ok(()),
            Ok(false) => Err("it has ended".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Collects the container's end if it has ended, writes it down and tells those who wait.
    fn reap(&mut self) {
        let Some(init) = self.record.init.filter(|_| self.init_pidfd.is_some()) else { return };
        let (code, signal) = match waitpid(Pid::from_raw(init.pid), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, code)) => (Some(code), None),
            Ok(WaitStatus::Signaled(_, signal, _)) => (None, Some(signal as i32)),
            Ok(_) | Err(Errno::EINTR) => return,
            Err(_) => (None, None),
        };
        self.init_pidfd = None;
        let state = ContainerState::Exited { code, signal };
        self.record.state = Some(state);
        if let Err(problem) = self.write_record() {
            eprintln!("cannot write the record: {problem}");
        }
        for connection in &mut self.connections {
            if std::mem::take(&mut connection.waits) {
                // A waiter that has gone is found out by the next poll.
                let _ = connection.channel.send(&Reply::State(state), &[]);
            }
        }
    }

    fn quit(&mut self) {
        if let Some(init) = self.record.init.filter(|_| self.init_pidfd.is_some()) {
            let _ = init.signal(libc::SIGKILL);
            let _ = waitpid(Pid::from_raw(init.pid), None);
            self.init_pidfd = None;
        }
    }

    /// The container writes to the file itself, so that neither a slow nor a dead shim can stop it; lines written
    /// between the copy and the cut are lost. It can also make the file as long as it likes, without writing any of it: of
    /// a longer one the end is what counts.
    fn cap_log(&self) {
        if self.init_pidfd.is_none() || !fs::metadata(&self.log).is_ok_and(|m| m.len() > LOG_BYTES_MAX) {
            return;
        }
        let mut older = self.log.clone().into_os_string();
        older.push(".1");
        let moved = || -> io::Result<()> {
            let mut log = OpenOptions::new().read(true).write(true).open(&self.log)?;
            let begin = log.metadata()?.len().saturating_sub(2 * LOG_BYTES_MAX);
            io::Seek::seek(&mut log, io::SeekFrom::Start(begin))?;
            io::copy(&mut io::Read::take(&log, 2 * LOG_BYTES_MAX), &mut File::create(&older)?)?;
            log.set_len(0)
        };
        if let Err(error) = moved() {
            eprintln!("cannot cut the log: {error}");
        }
    }
}
