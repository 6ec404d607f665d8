//! Many events for long: none is lost, and memory stays as it is.

#[macro_use]
mod support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use support::Cgroup;
use warmswap_sensor::{Class, Classes, Detail, Subscription};

/// How many events when nobody asks for more: a day of a service with 12 events a second. `WARMSWAP_ENDURANCE_EVENTS=8640000` is a
/// day with a hundred.
const EVENTS: u64 = 1_000_000;
const EVENTS_PER_S: u64 = 100_000;
/// Sent at once, then a pause.
const BURST: u64 = 1_000;
/// By how much the process may grow after the first second, bytes. Whatever grows with the number of events, even by one bit
/// each, is more.
const GROWTH_MAX: u64 = 1 << 20;
const WARM_UP: Duration = Duration::from_secs(2);

/// Memory of this process, bytes.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").expect("procfs");
    let pages: u64 = text.split(' ').nth(1).and_then(|word| word.parse().ok()).expect("numbers");
    pages * 4096
}

/// Types so many bytes into a terminal and reads each, at [`EVENTS_PER_S`]; system calls only.
fn type_and_read(events: u64) -> i32 {
    // SAFETY: system calls on our own descriptors and stack.
    unsafe {
        let (mut master, mut slave) = (0, 0);
        let null = std::ptr::null_mut();
        if libc::openpty(&raw mut master, &raw mut slave, null, null.cast(), null.cast()) != 0 {
            return 1;
        }
        let mut settings: libc::termios = std::mem::zeroed();
        libc::tcgetattr(slave, &raw mut settings);
        libc::cfmakeraw(&raw mut settings);
        libc::tcsetattr(slave, libc::TCSANOW, &raw const settings);
        libc::dup2(slave, 0);
        let mut at: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut at);
        let mut byte = 0u8;
        for event in 0..events {
            if libc::write(master, b"k".as_ptr().cast(), 1) != 1 || libc::read(0, (&raw mut byte).cast(), 1) != 1 {
                return 2;
            }
            if (event + 1) % BURST == 0 {
                at.tv_nsec += (1_000_000_000 / EVENTS_PER_S * BURST) as i64;
                if at.tv_nsec >= 1_000_000_000 {
                    (at.tv_sec, at.tv_nsec) = (at.tv_sec + 1, at.tv_nsec - 1_000_000_000);
                }
                libc::clock_nanosleep(libc::CLOCK_MONOTONIC, libc::TIMER_ABSTIME, &raw const at, null.cast());
            }
        }
    }
    0
}

#[test]
fn a_day_of_events_is_lost_nowhere_and_memory_stays_flat() {
    let mut sensor = sensor_or_leave!("a_day_of_events_is_lost_nowhere_and_memory_stays_flat");
    need_probe!("a_day_of_events_is_lost_nowhere_and_memory_stays_flat", sensor, "input");
    let wanted = std::env::var("WARMSWAP_ENDURANCE_EVENTS").ok().map(|text| text.parse().expect("a number of events"));
    let events_sent: u64 = wanted.unwrap_or(EVENTS);
    let cgroup = Cgroup::new();
    sensor.watch(cgroup.id).expect("watch");
    let wants = Subscription { classes: Classes::NONE.with(Class::Input), everywhere: false, capacity: 16_384 };
    let events = sensor.subscribe(wants).expect("starts");
    let (read, over) = (AtomicU64::new(0), AtomicBool::new(false));
    let mut counted = 0;
    let mut first = None;
    let began = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                if let Ok(event) = events.receiver().recv_timeout(Duration::from_millis(50)) {
                    assert!(matches!(event.detail, Detail::Input { bytes: 1, .. }), "{event:?}");
                    read.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let child = cgroup.spawn(|| type_and_read(events_sent));
        let mut status = None;
        while status.is_none() {
            std::thread::sleep(Duration::from_millis(250));
            counted += sensor.windows()[0].counts.tty_inputs;
            if began.elapsed() > WARM_UP {
                first.get_or_insert_with(resident);
            }
            status = child.try_wait();
        }
        assert_eq!(status, Some(0));
        sensor.flush().expect("runs");
        let deadline = Instant::now() + Duration::from_secs(5);
        while read.load(Ordering::Relaxed) + events.lost() < events_sent && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        over.store(true, Ordering::Release);
    });
    let last = resident();
    counted += sensor.windows()[0].counts.tty_inputs;
    let totals = sensor.accounting().of(Class::Input);
    let seconds = began.elapsed().as_secs_f64();
    let rate = events_sent as f64 / seconds;
    let grown = last.saturating_sub(first.expect("longer than the warm-up"));
    println!("{events_sent} events in {seconds:.1} s ({rate:.0} a second), {grown} bytes grown, {totals:?}");
    assert_eq!(counted, events_sent, "windows");
    assert_eq!((totals.emitted, totals.dropped, totals.discarded), (events_sent, 0, 0), "{totals:?}");
    assert_eq!(read.load(Ordering::Relaxed), events_sent, "every event reached the subscriber");
    assert!(grown <= GROWTH_MAX, "memory has grown by {grown} bytes, from {first:?} to {last}");
}
