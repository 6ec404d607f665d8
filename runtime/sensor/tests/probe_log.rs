//! What the probes say reaches `tracing` when it was asked for, is said seldom, and is not said otherwise.

#[macro_use]
mod support;

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use support::{Cgroup, fork_exec, window};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};
use warmswap_sensor::{Class, Classes, PROBE_LOG_TARGET, Sensor, SensorConfig, Subscription};

static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Keeps what is said under the probes' target.
struct Keep;

impl Subscriber for Keep {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == PROBE_LOG_TARGET
    }
    fn event(&self, event: &Event<'_>) {
        struct Message;
        impl Visit for Message {
            fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
                assert_eq!(field.name(), "message");
                SAID.lock().expect("no panic").push(format!("{value:?}"));
            }
        }
        assert_eq!(*event.metadata().level(), Level::WARN);
        event.record(&mut Message);
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// One test at a time: what happens in one is seen by the sensor of any other.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    // Fails when an earlier test has done it.
    let _ = tracing::subscriber::set_global_default(Keep);
    SAID.lock().expect("no panic").clear();
    alone
}

/// Messages that contain this text, each with its number of times.
fn said(sensor: &mut Sensor, text: &str) -> Vec<(String, u64)> {
    sensor.flush().expect("runs");
    let number = |message: &str| {
        let (_, rest) = message.rsplit_once('(').expect("a number of times");
        rest.split(' ').next().and_then(|times| times.parse().ok()).expect("a number")
    };
    let said = SAID.lock().expect("no panic");
    said.iter().filter(|message| message.contains(text)).map(|message| (message.clone(), number(message))).collect()
}

const PAGE: u32 = 4096;
const SMALL_RING: u32 = 2 * PAGE;

/// Room for some hundred events, read only when we say so.
fn small_ring(probe_log: bool) -> SensorConfig {
    let drain_interval = Duration::from_secs(3600);
    SensorConfig { bulk_ring_bytes: SMALL_RING, drain_interval, probe_log, ..SensorConfig::default() }
}

/// More forks than that ring holds. Returns how many were lost.
fn overload(sensor: &mut Sensor) -> u64 {
    let cgroup = Cgroup::new();
    sensor.watch(cgroup.id).expect("watch");
    let wants = Subscription { classes: Classes::NONE.with(Class::Fork), everywhere: false, capacity: 10_000 };
    let events = sensor.subscribe(wants).expect("starts");
    cgroup.run(|| (0..200).map(|_| fork_exec(c"/bin/true")).sum());
    sensor.flush().expect("runs");
    drop(events);
    sensor.accounting().of(Class::Fork).dropped
}

/// A watched cgroup with one ten levels below it, further than probes look.
fn deep() -> (Cgroup, Vec<Cgroup>) {
    let outer = Cgroup::new();
    let mut below = vec![outer.child("d")];
    while below.len() < 10 {
        let next = below[below.len() - 1].child("d");
        below.push(next);
    }
    (outer, below)
}

/// From the bottom up, as the kernel wants it.
fn remove(mut below: Vec<Cgroup>) {
    while below.pop().is_some() {}
}

/// Sizes of the ring buffers that this process holds.
fn ring_bytes() -> BTreeSet<u64> {
    let entries = std::fs::read_dir("/proc/self/fdinfo").expect("procfs").flatten();
    let texts = entries.filter_map(|entry| std::fs::read_to_string(entry.path()).ok());
    let rings = texts.filter(|text| text.lines().any(|line| line == "map_type:\t27"));
    rings
        .map(|text| {
            let bytes = text.lines().find_map(|line| line.strip_prefix("max_entries:")).expect("a size");
            bytes.trim().parse().expect("a number")
        })
        .collect()
}

#[test]
fn the_kernel_takes_the_same_probes_with_messages_as_without() {
    let _alone = alone();
    let with = SensorConfig { probe_log: true, ..SensorConfig::default() };
    let with = sensor_or_leave!("the_kernel_takes_the_same_probes_with_messages_as_without", with);
    let without = sensor_or_leave!("the_kernel_takes_the_same_probes_with_messages_as_without");
    assert_eq!(with.probes(), without.probes());
    // Programs at functions some hosts refuse to anybody; machines of ours do not, which the matrix asks for.
    let others = with.probes().iter().filter(|probe| !probe.hook.starts_with("fentry "));
    let reasons = others.filter_map(|probe| probe.reason.as_deref());
    assert_eq!(reasons.filter(|reason| reason.contains("refused")).collect::<Vec<_>>(), [""; 0]);
}

#[test]
fn events_that_find_no_room_are_told_at_every_doubling() {
    let _alone = alone();
    let mut sensor = sensor_or_leave!("events_that_find_no_room_are_told_at_every_doubling", small_ring(true));
    need_probe!("events_that_find_no_room_are_told_at_every_doubling", sensor, "fork");
    let dropped = overload(&mut sensor);
    assert!(dropped > 4, "{dropped}");
    let said = said(&mut sensor, "an event of class fork is lost");
    let times: Vec<u64> = said.iter().map(|(_, times)| *times).collect();
    let doublings: Vec<u64> = (0..).map(|bit| 1 << bit).take_while(|times| *times <= dropped).collect();
    assert_eq!(times, doublings, "of {dropped} lost: {said:?}");
}

#[test]
fn a_cgroup_too_far_below_a_watched_one_is_told_and_named() {
    let _alone = alone();
    let config = SensorConfig { probe_log: true, ..SensorConfig::default() };
    let mut sensor = sensor_or_leave!("a_cgroup_too_far_below_a_watched_one_is_told_and_named", config);
    need_probe!("a_cgroup_too_far_below_a_watched_one_is_told_and_named", sensor, "run-time");
    let (outer, below) = deep();
    sensor.watch(outer.id).expect("watch");
    sensor.start().expect("starts");
    let deepest = &below[below.len() - 1];
    deepest.run(|| 0);
    assert_eq!(window(&mut sensor).counts, Default::default(), "it is not counted");
    let told = said(&mut sensor, &format!("cgroup {} is too far below a watched one", deepest.id));
    assert_eq!(told.first().map(|(_, times)| *times), Some(1), "{told:?}");
    assert!(told.iter().all(|(_, times)| times.is_power_of_two()), "{told:?}");
    // The one eight levels up the tree is found, and nothing is said about it.
    below[6].run(|| 0);
    assert!(window(&mut sensor).counts.reads > 0);
    assert_eq!(said(&mut sensor, &format!("cgroup {} ", below[6].id)), []);
    remove(below);
}

#[test]
fn without_being_asked_probes_say_nothing_and_keep_no_room_for_it() {
    let _alone = alone();
    let mut sensor =
        sensor_or_leave!("without_being_asked_probes_say_nothing_and_keep_no_room_for_it", small_ring(false));
    need_probe!("without_being_asked_probes_say_nothing_and_keep_no_room_for_it", sensor, "fork");
    let urgent_ring = 64 * 1024;
    assert_eq!(ring_bytes(), [PAGE, SMALL_RING, urgent_ring].map(u64::from).into(), "one page for what is never said");
    let (outer, below) = deep();
    sensor.watch(outer.id).expect("watch");
    below[below.len() - 1].run(|| 0);
    assert!(overload(&mut sensor) > 4);
    assert_eq!(said(&mut sensor, ""), []);
    remove(below);
}
