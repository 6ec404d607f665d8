//! What a process waits for: a CPU, a disk, a peer that does not answer.

use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::disk::scratch_disk;
use crate::report::Report;
use crate::stage::Stage;
use crate::support::{Cgroup, Child, pipe, scratch};
use warmswap_sensor::Sensor;

pub(crate) fn drive(sensor: &mut Sensor, report: &mut Report) {
    for_a_cpu(sensor, report);
    for_a_disk(sensor, report);
    for_a_peer(sensor, report);
}

/// Keeps the calling process on one CPU.
fn pin(cpu: usize) {
    // SAFETY: a zeroed set of CPUs is empty; our own stack.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
    }
}

/// Spins for so much wall-clock time; system calls only.
fn spin(length: Duration) {
    let begin = Instant::now();
    while begin.elapsed() < length {
        std::hint::spin_loop();
    }
}

/// How long the task has run, and waited for a CPU, ns.
fn schedstat(pid: i32) -> [u64; 2] {
    let text = fs::read_to_string(format!("/proc/{pid}/schedstat")).expect("procfs");
    let mut numbers = text.split(' ').map_while(|word| word.parse().ok());
    std::array::from_fn(|_| numbers.next().expect("three numbers"))
}

/// Waits until a child has stopped itself.
fn stopped(child: &Child) {
    let mut status = 0;
    // SAFETY: our own child; it is not reaped, only seen to stop.
    unsafe { libc::waitpid(child.pid, &raw mut status, libc::WUNTRACED) };
    assert!(libc::WIFSTOPPED(status), "{status}");
}

fn go_on(child: &Child) {
    // SAFETY: our own child.
    unsafe { libc::kill(child.pid, libc::SIGCONT) };
}

fn stop_myself() {
    // SAFETY: a signal to ourselves.
    unsafe { libc::raise(libc::SIGSTOP) };
}

/// As much as the kernel says in `schedstat`.
fn for_a_cpu(sensor: &mut Sensor, report: &mut Report) {
    let mut stage = Stage::new(sensor);
    let rival = Cgroup::new();
    let busy = || {
        pin(0);
        stop_myself();
        spin(Duration::from_millis(300));
        stop_myself();
        0
    };
    let (ours, other) = (stage.cgroup.spawn(busy), rival.spawn(busy));
    [&ours, &other].into_iter().for_each(stopped);
    // From here on it stays on its CPU and in its cgroup.
    let (before, _) = (schedstat(ours.pid), stage.counts());
    [&ours, &other].into_iter().for_each(go_on);
    [&ours, &other].into_iter().for_each(stopped);
    let after = schedstat(ours.pid);
    let [ran, waited] = [after[0] - before[0], after[1] - before[1]];
    let counts = stage.counts();
    for child in [ours, other] {
        go_on(&child);
        assert_eq!(child.wait(), 0);
    }
    assert!(waited > 20_000_000, "two on one CPU for 300 ms wait, not {waited} ns");
    report.exact("run-time", "run_ns", ran, counts.run_ns);
    report.exact("run-delay", "run_delay_ns", waited, counts.run_delay_ns);
}

/// Something on a disk that is not in memory: the whole disk where there is one to spare, else a file.
fn on_a_disk(bytes: usize) -> fs::File {
    let file = if let Some(disk) = scratch_disk() {
        fs::File::open(disk.to_str().expect("a plain path")).expect("a disk")
    } else {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = scratch().join(format!("warmswap-major-{}-{number}", std::process::id()));
        fs::write(&path, vec![1u8; bytes]).expect("a scratch file");
        let file = fs::File::open(&path).expect("just written");
        file.sync_all().expect("on the disk");
        fs::remove_file(&path).expect("removed");
        file
    };
    // SAFETY: integers; the pages are clean, so that the kernel may forget them.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    file
}

/// As many as the kernel says in `getrusage`.
fn for_a_disk(sensor: &mut Sensor, report: &mut Report) {
    const PAGES: usize = 64;
    let mut stage = Stage::new(sensor);
    let file = on_a_disk(PAGES * 4096);
    let (read, write) = pipe();
    let (fd, to) = (file.as_raw_fd(), write.as_raw_fd());
    let status = stage.cgroup.run(move || {
        // SAFETY: a new mapping, read inside its bounds; our own stack.
        unsafe {
            let length = PAGES * 4096;
            let base = libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ, libc::MAP_PRIVATE, fd, 0);
            libc::madvise(base, length, libc::MADV_RANDOM);
            for page in 0..PAGES {
                base.cast::<u8>().add(page * 4096).read_volatile();
            }
            let mut usage: libc::rusage = std::mem::zeroed();
            libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
            libc::write(to, (&raw const usage.ru_majflt).cast(), 8);
        }
        0
    });
    assert_eq!(status, 0);
    let mut kernel = [0u8; 8];
    // SAFETY: eight bytes of our own stack.
    assert_eq!(unsafe { libc::read(read.as_raw_fd(), kernel.as_mut_ptr().cast(), 8) }, 8);
    let kernel = u64::from_ne_bytes(kernel);
    if kernel == 0 {
        return report.undriven(
            "major-faults",
            &["major_faults"],
            "the file system of the target folder lies in memory",
        );
    }
    let counts = stage.counts();
    report.exact("major-faults", "major_faults", kernel, counts.major_faults);
}

/// A network namespace with loopback up, for the calling thread alone.
fn own_network() -> OwnedFd {
    // SAFETY: integers, a structure that the kernel fills, and descriptors that are ours.
    unsafe {
        assert_eq!(libc::unshare(libc::CLONE_NEWNET), 0, "a network namespace");
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        let socket = OwnedFd::from_raw_fd(socket);
        set_loopback(&socket, true);
        socket
    }
}

fn set_loopback(socket: &OwnedFd, up: bool) {
    // SAFETY: a zeroed request with a short name; the kernel reads and writes inside it.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[0] = b'l' as libc::c_char;
        request.ifr_name[1] = b'o' as libc::c_char;
        request.ifr_ifru.ifru_flags = if up { libc::IFF_UP as i16 } else { 0 };
        assert_eq!(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request), 0, "loopback");
    }
}

/// `RetransSegs` of the calling thread's network namespace.
fn retransmitted() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/net/snmp").expect("procfs");
    let mut tcp = text.lines().filter(|line| line.starts_with("Tcp:")).map(|line| line.split(' '));
    let (names, values) = (tcp.next().expect("names"), tcp.next().expect("values"));
    let found = names.zip(values).find(|(name, _)| *name == "RetransSegs").expect("known since ever");
    found.1.parse().expect("a number")
}

/// As many as the kernel says in `RetransSegs` of a network of our own.
fn for_a_peer(sensor: &mut Sensor, report: &mut Report) {
    let mut stage = Stage::new(sensor);
    let cgroup = &stage.cgroup;
    // A thread of its own, because it leaves the host's network.
    let kernel = std::thread::scope(|scope| {
        let silence = || {
            let network = own_network();
            let child = cgroup.spawn(|| {
                // SAFETY: system calls on our own stack and descriptors.
                unsafe {
                    let (listener, client) = (
                        libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0),
                        libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0),
                    );
                    let mut address: libc::sockaddr_in = std::mem::zeroed();
                    address.sin_family = libc::AF_INET as u16;
                    address.sin_addr.s_addr = u32::from(std::net::Ipv4Addr::LOCALHOST).to_be();
                    let mut length = size_of::<libc::sockaddr_in>() as u32;
                    libc::bind(listener, (&raw const address).cast(), length);
                    libc::listen(listener, 1);
                    libc::getsockname(listener, (&raw mut address).cast(), &raw mut length);
                    if libc::connect(client, (&raw const address).cast(), length) != 0 {
                        return 1;
                    }
                    // So that nothing of it is left, and sent again, when it ends.
                    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
                    let size = size_of::<libc::linger>() as u32;
                    libc::setsockopt(client, libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), size);
                    stop_myself();
                    libc::write(client, b"x".as_ptr().cast(), 1);
                    stop_myself();
                }
                0
            });
            stopped(&child);
            set_loopback(&network, false);
            go_on(&child);
            stopped(&child);
            let begin = Instant::now();
            while retransmitted() < 2 && begin.elapsed() < Duration::from_secs(20) {
                std::thread::sleep(Duration::from_millis(20));
            }
            // SAFETY: our own child.
            unsafe { libc::kill(child.pid, libc::SIGKILL) };
            child.wait();
            retransmitted()
        };
        scope.spawn(silence).join().expect("it does not panic")
    });
    assert!(kernel >= 2, "nobody answers, and it is not tried again");
    let counts = stage.counts();
    count!(report, "tcp-retransmits", counts.tcp_retransmits == kernel);
}
