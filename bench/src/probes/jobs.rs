//! What the watched process does, and what that takes it.

use std::fs::OpenOptions;
use std::io::{Read as _, Write as _};
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::prctl;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::Signal;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrIn, sockopt};
use nix::sys::time::TimeValLike as _;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

use super::worker::Took;
use crate::process;
use crate::stats::median;

pub(super) const CALLS_PER_BATCH: u32 = 1000;
/// There and back again.
pub(super) const SWITCHES_PER_BATCH: u32 = 400;

/// Pieces that are written to and read from a file between opening and closing it.
pub(super) const PIECES: usize = 4;
pub(super) const PIECE_BYTES: usize = 4096;

/// Handover that the marks are of: no real one has this number.
pub(super) const HANDOVER: u64 = 0xbe6c;

const TICK: Duration = Duration::from_millis(1);

pub(super) fn clock_ns(clock: ClockId) -> Result<f64> {
    let time = clock_gettime(clock).context("cannot read a CPU clock")?;
    Ok(time.tv_sec() as f64 * 1e9 + time.tv_nsec() as f64)
}

/// CPU time of another process, ns.
pub(super) fn cpu_of_ns(process: u32) -> Result<f64> {
    let clock = ClockId::pid_cpu_clock_id(Pid::from_raw(i32::try_from(process)?))
        .with_context(|| format!("process {process} has no CPU clock"))?;
    clock_ns(clock)
}

/// Of this process, of its children that have ended, and of a server.
fn cpu_ns(server: Option<&Server>) -> Result<f64> {
    let mut sum = clock_ns(ClockId::CLOCK_PROCESS_CPUTIME_ID)?;
    let ended = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    sum += (ended.user_time() + ended.system_time()).num_microseconds() as f64 * 1e3;
    if let Some(server) = server {
        sum += cpu_of_ns(server.0.id())?;
    }
    Ok(sum)
}

pub(super) fn timed(server: Option<&Server>, job: impl FnOnce() -> Result<()>) -> Result<Took> {
    let (began, before) = (Instant::now(), cpu_ns(server)?);
    job()?;
    let (wall_ns, after) = (began.elapsed().as_nanos() as f64, cpu_ns(server)?);
    Ok(Took { wall_ns, cpu_ns: after - before, each_ns: 0.0 })
}

/// Reads of a byte.
pub(super) fn system_calls(batches: u32) -> Result<Took> {
    let zeros = std::fs::File::open("/dev/zero")?;
    in_batches(batches, CALLS_PER_BATCH, || {
        let mut byte = [1];
        for _ in 0..CALLS_PER_BATCH {
            (&zeros).read_exact(&mut byte)?;
        }
        Ok(())
    })
}

/// Two threads that hand a byte back and forth; the CPU is the same for both.
pub(super) fn switches(batches: u32) -> Result<Took> {
    let ((mut from, mut back), (mut here, mut there)) = (std::io::pipe()?, std::io::pipe()?);
    let other = std::thread::spawn(move || -> std::io::Result<()> {
        let mut byte = [0];
        while here.read(&mut byte)? != 0 {
            back.write_all(&byte)?;
        }
        Ok(())
    });
    let took = in_batches(batches, SWITCHES_PER_BATCH, || {
        let mut byte = [1];
        for _ in 0..SWITCHES_PER_BATCH / 2 {
            there.write_all(&byte)?;
            from.read_exact(&mut byte)?;
        }
        Ok(())
    });
    drop(there);
    other.join().map_err(|_| anyhow::anyhow!("the other thread panicked"))??;
    took
}

fn in_batches(batches: u32, each: u32, mut batch: impl FnMut() -> Result<()>) -> Result<Took> {
    let mut took_ns = Vec::with_capacity(batches as usize);
    let took = timed(None, || {
        for _ in 0..batches {
            let began = Instant::now();
            batch()?;
            took_ns.push(began.elapsed().as_nanos() as f64 / f64::from(each));
        }
        Ok(())
    })?;
    Ok(Took { each_ns: median(&took_ns).unwrap_or(0.0), ..took })
}

pub(super) fn programs(program: &Path, count: u32) -> Result<()> {
    for _ in 0..count {
        let status = std::process::Command::new(program).arg("true").stdin(Stdio::null()).status();
        let status = status.with_context(|| format!("cannot start {}", program.display()))?;
        ensure!(status.success(), "{} ended with {status}", program.display());
    }
    Ok(())
}

pub(super) fn files(folder: &Path, rounds: u32) -> Result<()> {
    let path = folder.join(format!("warmswap-bench-{}", std::process::id()));
    let mut piece = [7; PIECE_BYTES];
    let result = (0..rounds).try_for_each(|_| {
        let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&path)?;
        for at in 0..PIECES {
            file.write_all_at(&piece, (at * PIECE_BYTES) as u64)?;
        }
        for at in 0..PIECES {
            file.read_exact_at(&mut piece, (at * PIECE_BYTES) as u64)?;
        }
        std::io::Result::Ok(())
    });
    std::fs::remove_file(&path)?;
    result.with_context(|| format!("cannot work in {}", folder.display()))
}

/// A socket that begins and ends to listen changes its state each time, and does little else.
pub(super) fn states(count: u32, per_s: Option<u32>) -> Result<Took> {
    let socket = socket::socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let bind = |port| {
        socket::bind(socket.as_raw_fd(), &SockaddrIn::from(std::net::SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)))
    };
    // One that the socket keeps when it no longer listens, so that none is looked for each time.
    socket::setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    bind(crate::host::free_port()?.port()).context("cannot bind a socket")?;
    let burst = per_s.map_or(count, |per_s| per_s / 1000).max(2) & !1;
    let (began, mut done, mut cpu_ns) = (Instant::now(), 0, 0.0);
    let mut due = began;
    while done < count {
        let before = clock_ns(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
        for _ in 0..burst / 2 {
            socket::listen(&socket, socket::Backlog::new(1)?)?;
            stop_to_listen(socket.as_raw_fd())?;
        }
        cpu_ns += clock_ns(ClockId::CLOCK_THREAD_CPUTIME_ID)? - before;
        done += burst;
        due += TICK;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    Ok(Took { wall_ns: began.elapsed().as_nanos() as f64, cpu_ns, each_ns: 0.0 })
}

/// `connect` to an address of no family.
fn stop_to_listen(socket: i32) -> Result<()> {
    let nowhere = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    // SAFETY: the kernel reads an address of this size, which lives through the call.
    let result = unsafe { libc::connect(socket, &raw const nowhere, size_of_val(&nowhere) as libc::socklen_t) };
    ensure!(result == 0, "a socket does not stop to listen: {}", std::io::Error::last_os_error());
    Ok(())
}

pub(super) fn marks(count: u32, pause: Duration) -> Result<()> {
    for number in 0..count {
        std::thread::sleep(pause);
        warmswap_sensor::make_mark(1, HANDOVER, number);
    }
    Ok(())
}

/// Ended when dropped, and with this process whatever ends that.
pub(super) struct Server(Child);

impl Server {
    pub(super) fn start(program: &Path, name: &str, arguments: &[String]) -> Result<Self> {
        let mut command = process::command(program);
        command.arg0(name).args(arguments).stdout(Stdio::null()).stderr(Stdio::null());
        // SAFETY: between fork and exec, one system call.
        unsafe { command.pre_exec(|| Ok(prctl::set_pdeathsig(Signal::SIGKILL)?)) };
        Ok(Self(command.spawn().with_context(|| format!("cannot start {name}"))?))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Fails when it has ended, which is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(super) fn ask(program: &Path, arguments: &[String]) -> Result<()> {
    process::run(process::command(program).args(arguments)).map(drop)
}
