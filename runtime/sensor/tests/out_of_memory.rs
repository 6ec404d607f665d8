//! A kill for want of memory is seen, with its victim and its cgroup.

#[macro_use]
mod support;

use std::fs;
use std::time::{Duration, Instant};

use support::{Cgroup, Limited, window};
use warmswap_sensor::{Class, Classes, Detail, Subscription};

const LIMIT_BYTES: usize = 16 << 20;

#[test]
fn a_victim_is_told_at_once_and_counted() {
    const TEST: &str = "a_victim_is_told_at_once_and_counted";
    let mut sensor = sensor_or_leave!("a_victim_is_told_at_once_and_counted");
    need_probe!("a_victim_is_told_at_once_and_counted", sensor, "out-of-memory");
    let cgroup = Cgroup::new();
    let limited = match Limited::new(&cgroup, LIMIT_BYTES) {
        Ok(limited) => limited,
        Err(reason) => {
            println!("LEFT OUT: {TEST}: {reason}");
            return;
        }
    };
    sensor.watch(cgroup.id).expect("watch");
    let wants = Subscription { classes: Classes::NONE.with(Class::Oom), everywhere: false, capacity: 16 };
    let events = sensor.subscribe(wants).expect("starts");
    let (read, write) = support::pipe();
    let child = cgroup.spawn(|| {
        use std::os::fd::AsRawFd;
        let mut byte = 0u8;
        let length = 4 * LIMIT_BYTES;
        // SAFETY: our own descriptors and stack; a new mapping, written inside its bounds.
        unsafe {
            libc::read(read.as_raw_fd(), (&raw mut byte).cast(), 1);
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let base = libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            for page in 0..length / 4096 {
                base.cast::<u8>().add(page * 4096).write_volatile(1);
            }
        }
        0
    });
    limited.join(&child);
    use std::io::Write;
    let pid = child.pid;
    let begin = Instant::now();
    fs::File::from(write).write_all(b"x").expect("lets the child go");
    let event = events.receiver().recv_timeout(Duration::from_secs(10)).expect("an event");
    assert!(matches!(event.detail, Detail::Oom { victim } if victim == pid as u32), "{event}");
    assert_eq!(event.cgroup, cgroup.id);
    assert!(begin.elapsed() < Duration::from_secs(10));
    assert_eq!(child.wait(), -libc::SIGKILL);
    assert_eq!(window(&mut sensor).counts.oom_kills, 1);
}
