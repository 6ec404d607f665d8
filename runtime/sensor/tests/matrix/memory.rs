//! Page faults, and processes that the kernel kills for want of memory.

use std::os::fd::AsRawFd;

use crate::report::Report;
use crate::stage::{Stage, give, take, until_it_reads};
use crate::support::{Limited, pipe};
use warmswap_sensor::{Class, Detail, Sensor};

const PAGES: usize = 300;
const PAGE: usize = 4096;
const VICTIMS: u64 = 2;
const LIMIT_BYTES: usize = 16 << 20;

pub(crate) fn drive(sensor: &mut Sensor, report: &mut Report) {
    faults(sensor, report);
    kills(sensor, report);
}

/// Between two moments at which the child stands in a read nothing happens but its writes to fresh pages.
fn faults(sensor: &mut Sensor, report: &mut Report) {
    let mut stage = Stage::new(sensor);
    let ((go, let_go), (told, tell)) = (pipe(), pipe());
    let child = stage.cgroup.spawn(|| {
        let base = fresh(2 * PAGES * PAGE);
        // Once for nothing: afterwards its code and stack are in memory.
        for half in 0..2 {
            touch(base, half * PAGES..(half + 1) * PAGES);
            give(tell.as_raw_fd());
            if !take(go.as_raw_fd()) {
                return 1;
            }
        }
        0
    });
    let next = |stage: &mut Stage<'_>| {
        assert!(take(told.as_raw_fd()), "the child is gone");
        until_it_reads(&child);
        let counts = stage.counts();
        give(let_go.as_raw_fd());
        counts
    };
    next(&mut stage);
    let counts = next(&mut stage);
    assert_eq!(child.wait(), 0, "the work itself failed");
    count!(report, "page-faults", counts.page_faults == PAGES as u64);
}

fn kills(sensor: &mut Sensor, report: &mut Report) {
    let mut stage = Stage::new(sensor);
    let limited = match Limited::new(&stage.cgroup, LIMIT_BYTES) {
        Ok(limited) => limited,
        Err(reason) => return report.undriven("out-of-memory", &["oom_kills", Class::Oom.name()], &reason),
    };
    let mut expected = Vec::new();
    for _ in 0..VICTIMS {
        let (go, let_go) = pipe();
        let child = stage.cgroup.spawn(|| {
            if !take(go.as_raw_fd()) {
                return 1;
            }
            touch(fresh(4 * LIMIT_BYTES), 0..4 * LIMIT_BYTES / PAGE);
            0
        });
        expected.push(child.pid as u32);
        limited.join(&child);
        give(let_go.as_raw_fd());
        assert_eq!(child.wait(), -libc::SIGKILL, "the kernel kills whoever exceeds the limit");
    }
    let counts = stage.counts();
    count!(report, "out-of-memory", counts.oom_kills == VICTIMS);
    let victims = stage.events().into_iter().filter_map(|event| match event.detail {
        Detail::Oom { victim } => Some(victim),
        _ => None,
    });
    report.events("out-of-memory", Class::Oom, expected, victims.collect());
}

/// Memory that nobody has touched, in pages of the smallest size.
fn fresh(bytes: usize) -> *mut u8 {
    let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping.
    unsafe {
        let base = libc::mmap(std::ptr::null_mut(), bytes, access, kind, -1, 0);
        libc::madvise(base, bytes, libc::MADV_NOHUGEPAGE);
        base.cast()
    }
}

fn touch(base: *mut u8, pages: std::ops::Range<usize>) {
    for page in pages {
        // SAFETY: the callers stay inside the mapping that they made.
        unsafe { base.add(page * PAGE).write_volatile(1) };
    }
}
