//! Known work in cgroups of our own, on the real kernel.
#![allow(dead_code, unreachable_pub)] // each test binary uses a part

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use warmswap_model::{CgroupId, FeatureWindow};
use warmswap_sensor::{CgroupMounts, Sensor, SensorConfig, cgroup_id};

/// Loads a sensor, or says why the test is left out and ends it.
macro_rules! sensor_or_leave {
    ($test:literal) => {
        sensor_or_leave!($test, warmswap_sensor::SensorConfig::default())
    };
    ($test:literal, $config:expr) => {
        match support::sensor($config) {
            Ok(sensor) => sensor,
            Err(reason) => {
                println!("LEFT OUT: {}: {reason}", $test);
                return;
            }
        }
    };
}

/// Ends the test when a probe is off on this kernel.
#[allow(unused_macros)]
macro_rules! need_probe {
    ($test:literal, $sensor:expr, $($probe:literal),+) => {
        for name in [$($probe),+] {
            let probe = $sensor.probes().iter().find(|probe| probe.name == name).expect("a probe of this name");
            if let Some(reason) = &probe.reason {
                println!("LEFT OUT: {}: probe {name}: {reason}", $test);
                return;
            }
        }
    };
}

pub fn sensor(config: SensorConfig) -> Result<Sensor, String> {
    // SAFETY: no arguments.
    if unsafe { libc::geteuid() } != 0 {
        return Err("BPF needs root".to_owned());
    }
    if CgroupMounts::of_host().ok().and_then(|mounts| mounts.v2).is_none() {
        return Err("no cgroup v2 hierarchy is mounted".to_owned());
    }
    // As root with a v2 hierarchy a sensor that does not load is a failure, not a missing feature.
    Ok(Sensor::load(config).expect("the sensor loads"))
}

/// A v2 cgroup that is removed again, whatever the test does.
pub struct Cgroup {
    pub path: PathBuf,
    pub id: CgroupId,
}

impl Cgroup {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let root = CgroupMounts::of_host().expect("mountinfo").v2.expect("checked by sensor()");
        let name = format!("warmswap-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        Self::at(root.join(name))
    }

    pub fn at(path: PathBuf) -> Self {
        fs::create_dir(&path).expect("a cgroup of our own");
        let id = cgroup_id(&path).expect("just made");
        Self { path, id }
    }

    pub fn child(&self, name: &str) -> Self {
        Self::at(self.path.join(name))
    }

    /// Runs `work` in a new process inside this cgroup and waits for it. The process stops at a pipe until it is in
    /// the cgroup; that read, of one byte, is the first thing it does there. `work` runs after fork in a program with
    /// threads: system calls only, no allocation.
    pub fn run(&self, work: impl FnOnce() -> i32) -> i32 {
        self.spawn(work).wait()
    }

    pub fn spawn(&self, work: impl FnOnce() -> i32) -> Child {
        let (read, write) = pipe();
        // SAFETY: the child only makes system calls until it leaves by _exit.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0, "fork: {}", io::Error::last_os_error());
        if pid == 0 {
            let mut byte = 0u8;
            // SAFETY: system calls on our own descriptors and stack.
            unsafe {
                if libc::read(read.as_raw_fd(), (&raw mut byte).cast(), 1) != 1 {
                    libc::_exit(99);
                }
                libc::_exit(work());
            }
        }
        let child = Child { pid, done: false };
        // Right after fork the C library makes calls of its own; wait until the child stands in its read.
        let in_read = format!("{} ", libc::SYS_read);
        while !fs::read_to_string(format!("/proc/{pid}/syscall")).expect("procfs").starts_with(&in_read) {
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
        fs::write(self.path.join("cgroup.procs"), pid.to_string()).expect("the child joins the cgroup");
        // SAFETY: one byte from the stack.
        assert_eq!(unsafe { libc::write(write.as_raw_fd(), b"x".as_ptr().cast(), 1) }, 1);
        child
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Children are waited for before; the kernel may need a moment to let go of the last one.
        for _ in 0..100 {
            match fs::remove_dir(&self.path) {
                Ok(()) => return,
                Err(_) => std::thread::sleep(std::time::Duration::from_millis(10)),
            }
        }
        eprintln!("left behind: {}", self.path.display());
    }
}

/// A process of ours, ended at the latest when dropped.
pub struct Child {
    pub pid: i32,
    done: bool,
}

impl Child {
    pub fn wait(mut self) -> i32 {
        self.reap()
    }

    /// Its exit status, when it has ended.
    pub fn try_wait(&self) -> Option<i32> {
        // SAFETY: zeroed integers.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        // SAFETY: our own child, which stays to be reaped; the kernel fills the structure, which is zero before.
        unsafe {
            libc::waitid(libc::P_PID, self.pid as libc::id_t, &raw mut info, flags);
            (info.si_pid() == self.pid).then(|| info.si_status())
        }
    }

    fn reap(&mut self) -> i32 {
        let mut status = 0;
        // SAFETY: our own child.
        let pid = unsafe { libc::waitpid(self.pid, &raw mut status, 0) };
        assert_eq!(pid, self.pid);
        self.done = true;
        if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { -libc::WTERMSIG(status) }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.done {
            // SAFETY: our own child, not yet waited for.
            unsafe { libc::kill(self.pid, libc::SIGKILL) };
            self.reap();
        }
    }
}

/// A folder in which the memory of its members is limited: the v2 cgroup itself where it has the controller, else one
/// in the v1 hierarchy.
pub struct Limited {
    procs: PathBuf,
    own: Option<PathBuf>,
}

impl Limited {
    pub fn new(cgroup: &Cgroup, bytes: usize) -> Result<Self, String> {
        if cgroup.path.join("memory.max").exists() {
            fs::write(cgroup.path.join("memory.max"), bytes.to_string()).map_err(|e| e.to_string())?;
            let _ = fs::write(cgroup.path.join("memory.swap.max"), "0");
            return Ok(Self { procs: cgroup.path.join("cgroup.procs"), own: None });
        }
        let folder = PathBuf::from("/sys/fs/cgroup/memory").join(cgroup.path.file_name().expect("a name"));
        fs::create_dir(&folder).map_err(|e| format!("no memory controller: {}: {e}", folder.display()))?;
        let limited = Self { procs: folder.join("cgroup.procs"), own: Some(folder.clone()) };
        fs::write(folder.join("memory.limit_in_bytes"), bytes.to_string()).map_err(|e| e.to_string())?;
        Ok(limited)
    }

    pub fn join(&self, child: &Child) {
        fs::write(&self.procs, child.pid.to_string()).expect("joins the limited group");
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        if let Some(folder) = &self.own {
            for _ in 0..100 {
                if fs::remove_dir(folder).is_ok() {
                    return;
                }
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            eprintln!("left behind: {}", folder.display());
        }
    }
}

pub fn pipe() -> (OwnedFd, OwnedFd) {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors.
    assert_eq!(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
    // SAFETY: new descriptors owned by nobody else.
    unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) }
}

/// A pseudo terminal: the side that types and the side that programs read from.
pub fn terminal() -> (OwnedFd, OwnedFd) {
    let (mut master, mut slave) = (0, 0);
    let null = std::ptr::null_mut();
    // SAFETY: room for two descriptors, no names or settings.
    let result = unsafe { libc::openpty(&raw mut master, &raw mut slave, null, null.cast(), null.cast()) };
    assert_eq!(result, 0, "a terminal");
    // SAFETY: new descriptors owned by nobody else.
    unsafe { (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) }
}

pub fn type_in(terminal: &OwnedFd, text: &[u8]) {
    // SAFETY: a live buffer.
    let written = unsafe { libc::write(terminal.as_raw_fd(), text.as_ptr().cast(), text.len()) };
    assert_eq!(written, text.len() as isize);
}

/// The only window of a sensor that watches one cgroup.
pub fn window(sensor: &mut Sensor) -> FeatureWindow {
    let mut windows = sensor.windows();
    assert_eq!(windows.len(), 1);
    windows.remove(0)
}

/// Runs a program from inside a child: fork, exec, wait, all by system calls. Returns its exit status.
pub fn fork_exec(path: &'static std::ffi::CStr) -> i32 {
    fork_exec_as(path, path)
}

/// The same, with another first argument than its path.
pub fn fork_exec_as(path: &'static std::ffi::CStr, name: &'static std::ffi::CStr) -> i32 {
    // SAFETY: constant strings and our own stack; the child execs or leaves.
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            let argv = [name.as_ptr(), std::ptr::null()];
            let envp = [std::ptr::null()];
            libc::execve(path.as_ptr(), argv.as_ptr(), envp.as_ptr());
            libc::_exit(127);
        }
        let mut status = 0;
        libc::waitpid(pid, &raw mut status, 0);
        libc::WEXITSTATUS(status)
    }
}

/// Where temporary files of a test may be on a real disk.
pub fn scratch() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).to_owned()
}

/// A socket remembers the cgroup it was made in, so a listener is made by a child in the cgroup and passed out. Here
/// it is simpler to let a child make it, say its port through a pipe ([`port_from`]) and serve.
pub fn listen() -> (i32, u16) {
    // SAFETY: system calls on our own stack only.
    unsafe {
        let listener = libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
        let mut address: libc::sockaddr_in = std::mem::zeroed();
        address.sin_family = libc::AF_INET as u16;
        address.sin_addr.s_addr = u32::from(Ipv4Addr::LOCALHOST).to_be();
        let length = size_of::<libc::sockaddr_in>() as u32;
        libc::bind(listener, (&raw const address).cast(), length);
        libc::listen(listener, 16);
        let mut length = length;
        libc::getsockname(listener, (&raw mut address).cast(), &raw mut length);
        (listener, u16::from_be(address.sin_port))
    }
}

pub fn port_from(read: &OwnedFd) -> u16 {
    let mut port = [0u8; 2];
    // SAFETY: two bytes of our own stack.
    assert_eq!(unsafe { libc::read(read.as_raw_fd(), port.as_mut_ptr().cast(), 2) }, 2);
    u16::from_ne_bytes(port)
}
