//! Latency of very many requests: of a share of them, as if it were all.

#[macro_use]
mod support;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use support::{Cgroup, window};
use warmswap_model::{FeatureWindow, LatencyHistogram};
use warmswap_sensor::{Sensor, SensorConfig};

/// A child of one test would inherit, and keep, what attaches the probes of another.
static ALONE: Mutex<()> = Mutex::new(());

/// Answers each request of one byte after a delay of its own, until nobody asks any more.
fn serve(listener: i32, delay: impl Fn(usize) -> Duration) -> i32 {
    let mut byte = 0u8;
    // SAFETY: system calls on our own descriptors and stack.
    unsafe {
        let connection = libc::accept(listener, std::ptr::null_mut(), std::ptr::null_mut());
        for number in 0.. {
            if libc::read(connection, (&raw mut byte).cast(), 1) != 1 {
                return 0;
            }
            let pause = libc::timespec { tv_sec: 0, tv_nsec: delay(number).as_nanos() as i64 };
            libc::nanosleep(&raw const pause, std::ptr::null_mut());
            if libc::write(connection, (&raw const byte).cast(), 1) != 1 {
                return 1;
            }
        }
    }
    2
}

/// A window, and what was known when it was taken.
struct Look {
    window: FeatureWindow,
    /// Requests that were asked so far, and for how long requests have been measured.
    asked: usize,
    measured: Duration,
    at: Instant,
}

/// The share of the time between two looks in which requests were measured.
fn share(from: &Look, to: &Look) -> f64 {
    (to.measured - from.measured).as_secs_f64() / (to.at - from.at).as_secs_f64()
}

/// Two windows a second of a server that is asked one thing after the other, until it is enough, or for half a minute.
fn looks(very_many: f64, delay: impl Fn(usize) -> Duration, enough: impl Fn(&[Look]) -> bool) -> Vec<Look> {
    const LOOKS_MAX: usize = 60;
    let cgroup = Cgroup::new();
    let (read, write) = support::pipe();
    // Before the probes are there, for the same reason.
    let child = cgroup.spawn(|| {
        let (listener, port) = support::listen();
        // SAFETY: two bytes of our own stack.
        unsafe { libc::write(write.as_raw_fd(), port.to_ne_bytes().as_ptr().cast(), 2) };
        serve(listener, delay)
    });
    let port = support::port_from(&read);
    let config = SensorConfig { sampled_above: very_many, ..SensorConfig::default() };
    let mut sensor = Sensor::load(config).expect("as it did before");
    sensor.watch(cgroup.id).expect("watch");
    let (asked, ends) = (AtomicUsize::new(0), AtomicBool::new(false));
    let looks = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("connects");
            client.set_nodelay(true).expect("nodelay");
            while !ends.load(Ordering::Relaxed) {
                client.write_all(b"x").expect("a request");
                client.read_exact(&mut [0]).expect("an answer");
                asked.fetch_add(1, Ordering::Relaxed);
            }
        });
        let mut looks = Vec::new();
        while looks.len() < LOOKS_MAX && !enough(&looks) {
            std::thread::sleep(Duration::from_millis(500));
            let window = window(&mut sensor);
            let (asked, measured) = (asked.load(Ordering::Relaxed), sensor.requests_measured());
            looks.push(Look { window, asked, measured, at: Instant::now() });
        }
        ends.store(true, Ordering::Relaxed);
        looks
    });
    assert_eq!(child.wait(), 0);
    looks
}

#[test]
fn of_very_many_requests_a_share_is_measured_and_it_is_like_all() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let sensor = sensor_or_leave!("of_very_many_requests_a_share_is_measured_and_it_is_like_all");
    need_probe!("of_very_many_requests_a_share_is_measured_and_it_is_like_all", sensor, "request-latency");
    drop(sensor);
    // Every twentieth is slow.
    let delay = |number: usize| Duration::from_millis(if number.is_multiple_of(20) { 30 } else { 1 });
    // A host that stands still for a moment has everything measured for ten seconds.
    let is_sampled = |looks: &[Look]| looks.windows(5).any(|looks| share(&looks[0], &looks[4]) < 0.5);
    let looks = looks(50.0, delay, |looks| looks.len() >= 20 && is_sampled(looks));
    assert!(is_sampled(&looks), "everything was measured");
    let mut latency = LatencyHistogram::default();
    looks[1..].iter().for_each(|look| latency.add(&look.window.durations.request_latency));
    let (told, asked) = (latency.count() as f64, (looks[looks.len() - 1].asked - looks[0].asked) as f64);
    assert!((0.7..1.4).contains(&(told / asked)), "{told} told, {asked} asked");
    let slow = latency.buckets.iter().filter(|(ns, _)| *ns > 20_000_000).map(|(_, count)| count).sum::<u64>() as f64;
    assert!((0.02..0.12).contains(&(slow / told)), "{slow} of {told} were slow");
    assert!(latency.quantile_ns(0.0).is_some_and(|ns| ns >= 1_000_000), "{latency:?}");
}

#[test]
fn requests_that_take_long_are_all_measured() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let sensor = sensor_or_leave!("requests_that_take_long_are_all_measured");
    need_probe!("requests_that_take_long_are_all_measured", sensor, "request-latency");
    drop(sensor);
    // After the first looks, which see everything anyway.
    const FROM: usize = 4;
    let all = |looks: &[Look]| {
        let mut stretches = looks.get(FROM..).unwrap_or_default().windows(8);
        stretches.position(|looks| share(&looks[0], &looks[7]) > 0.99).map(|at| FROM + at)
    };
    let looks = looks(1.0, |_| Duration::from_millis(150), |looks| all(looks).is_some());
    let from = all(&looks).expect("nothing was measured for long");
    let seen: u64 = looks[from + 1..from + 8].iter().map(|look| look.window.durations.request_latency.count()).sum();
    let asked = (looks[from + 7].asked - looks[from].asked) as u64;
    assert!(seen.abs_diff(asked) <= 2, "{seen} seen, {asked} asked");
}
