//! What the probes themselves cost: the draining thread by its own clock, the programs by the kernel's statistics.
//!
//! Those statistics are off unless somebody asks: they lengthen every run of every BPF program on the host by some 46 ns
//! (two looks at the clock), which is more than most of ours take. What they report contains about half of that, so a
//! program that does nothing is measured beside ours and taken off.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use aya::Ebpf;
use aya::sys::{Stats, enable_stats};

use crate::error::SensorError;

/// How often the program that does nothing is run to learn what the kernel reports for it: in so many batches, of which
/// the fastest counts, because interruptions only add.
const EMPTY_BATCHES: usize = 10;
const EMPTY_RUNS: u32 = 2_000;

/// While one lives, the kernel measures the run time of every BPF program on the host.
#[derive(Debug)]
pub struct RunStatistics {
    empty_ns: f64,
    _on: OwnedFd,
}

/// How often the probes ran and for how long, since they were loaded and as far as the kernel measured it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Runs {
    pub count: u64,
    pub time: Duration,
}

impl RunStatistics {
    /// # Errors
    /// When the kernel has no such statistics (before Linux 5.8) or does not let us.
    pub(crate) fn begin() -> Result<Self, SensorError> {
        let failed = |source| SensorError::Statistics { source };
        let on = enable_stats(Stats::RunTime).map_err(|error| failed(error.io_error))?;
        // Without it the result is too high, which it then says.
        let empty_ns = empty_run().unwrap_or_else(|error| {
            tracing::warn!(%error, "what the kernel reports for an empty program is not known, and not taken off");
            0.0
        });
        Ok(Self { empty_ns, _on: on })
    }

    /// What the kernel reports for a run that does nothing, ns; 0 when that could not be measured.
    #[must_use]
    pub const fn empty_ns(&self) -> f64 {
        self.empty_ns
    }

    /// The time between two readings without the overhead of measuring it.
    #[must_use]
    pub fn net(&self, before: Runs, after: Runs) -> Duration {
        let runs = after.count.saturating_sub(before.count) as f64;
        let time = after.time.saturating_sub(before.time).as_secs_f64();
        Duration::try_from_secs_f64(time - runs * self.empty_ns / 1e9).unwrap_or_default()
    }
}

/// Over all programs.
pub(crate) fn runs(object: &Ebpf) -> Runs {
    // A program that is not loaded has no information.
    object.programs().filter_map(|(_, program)| program.info().ok()).fold(Runs::default(), |sum, info| Runs {
        count: sum.count.wrapping_add(info.run_count()),
        time: sum.time.saturating_add(info.run_time()),
    })
}

/// CPU time of a thread of ours, by its own clock.
pub(crate) fn cpu_time(thread: libc::pthread_t) -> Option<Duration> {
    let mut clock = 0;
    // SAFETY: the caller has not joined the thread, so its handle is good; the clock id is written to a live variable.
    if unsafe { libc::pthread_getcpuclockid(thread, &raw mut clock) } != 0 {
        return None;
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a live structure. A thread that has ended makes the call fail.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return None;
    }
    Some(Duration::new(u64::try_from(time.tv_sec).ok()?, u32::try_from(time.tv_nsec).ok()?))
}

/// What the kernel reports per run of a program that does nothing, ns.
fn empty_run() -> io::Result<f64> {
    const PROG_LOAD: libc::c_long = 5;
    const PROG_TEST_RUN: libc::c_long = 10;
    const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
    const SOCKET_FILTER: u32 = 1;
    /// `r0 = 0; exit`
    static EMPTY: [u64; 2] = [0xb7, 0x95];
    static LICENSE: [u8; 4] = *b"GPL\0";

    /// The beginning of `union bpf_attr` for a program to be loaded.
    #[repr(C)]
    struct Load {
        kind: u32,
        instructions: u32,
        code: u64,
        license: u64,
        log: [u64; 2],
    }
    /// The same for a test run.
    #[repr(C)]
    struct Run {
        fd: u32,
        answer: u32,
        data_in_bytes: u32,
        data_out_bytes: u32,
        data_in: u64,
        data_out: u64,
        repeat: u32,
        duration: u32,
    }
    /// The same for information.
    #[repr(C)]
    struct Ask {
        fd: u32,
        info_bytes: u32,
        info: u64,
    }

    let mut load = Load {
        kind: SOCKET_FILTER,
        instructions: 2,
        code: EMPTY.as_ptr() as u64,
        license: LICENSE.as_ptr() as u64,
        log: [0; 2],
    };
    let fd = bpf(PROG_LOAD, &mut load)?;
    // SAFETY: a descriptor the kernel just gave us, owned by nobody else.
    let program = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).map_err(io::Error::other)?) };
    let fd = program.as_raw_fd() as u32;
    let packet = [0u8; 64];
    let mut fastest = f64::INFINITY;
    let mut before = (0, 0);
    for _ in 0..EMPTY_BATCHES {
        let mut run = Run {
            fd,
            answer: 0,
            data_in_bytes: packet.len() as u32,
            data_out_bytes: 0,
            data_in: packet.as_ptr() as u64,
            data_out: 0,
            repeat: EMPTY_RUNS,
            duration: 0,
        };
        bpf(PROG_TEST_RUN, &mut run)?;
        // `struct bpf_prog_info` up to `run_time_ns` and `run_cnt`, which begin at these words.
        const RUN_TIME: usize = 24;
        const RUN_COUNT: usize = 25;
        let mut info = [0u64; RUN_COUNT + 1];
        let mut ask = Ask { fd, info_bytes: size_of_val(&info) as u32, info: info.as_mut_ptr() as u64 };
        bpf(OBJ_GET_INFO_BY_FD, &mut ask)?;
        let now = (info[RUN_TIME], info[RUN_COUNT]);
        if now.1 <= before.1 {
            return Err(io::Error::other("the kernel counted no run of a program that ran"));
        }
        fastest = fastest.min((now.0 - before.0) as f64 / (now.1 - before.1) as f64);
        before = now;
    }
    Ok(fastest)
}

/// `attributes` must be laid out as the kernel wants them for this command; pointers in them must be good.
fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: all callers are above: their structures have the kernel's layout and point at live memory of the size
    // they name; the kernel reads and writes no more than that.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_overhead_of_measuring_is_taken_off_and_never_more_than_there_is() {
        let on = OwnedFd::from(std::fs::File::open("/dev/null").expect("every Linux has it"));
        let statistics = RunStatistics { empty_ns: 27.0, _on: on };
        let runs = |count, ns| Runs { count, time: Duration::from_nanos(ns) };
        assert_eq!(statistics.net(runs(10, 500), runs(110, 4_500)), Duration::from_nanos(1_300));
        assert_eq!(statistics.net(runs(0, 0), runs(100, 2_000)), Duration::ZERO);
    }

    #[test]
    fn a_threads_clock_counts_its_work_only() {
        // SAFETY: takes nothing and cannot fail.
        let me = unsafe { libc::pthread_self() };
        let before = cpu_time(me).expect("a clock");
        std::thread::sleep(Duration::from_millis(30));
        let slept = cpu_time(me).expect("a clock") - before;
        assert!(slept < Duration::from_millis(15), "{slept:?}");
    }
}
