//! A watched cgroup with its events, for one piece of known work.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::support::{Cgroup, Child, window};
use warmswap_model::{FeatureWindow, ProbeCounts};
use warmswap_sensor::{Classes, Detail, Event, Events, Sensor, Subscription};

/// For what the kernel does by itself; 10 ms lie between two.
const LOOKS_MAX: usize = 500;

pub(crate) struct Stage<'a> {
    pub(crate) sensor: &'a mut Sensor,
    pub(crate) cgroup: Cgroup,
    events: Events,
}

impl<'a> Stage<'a> {
    pub(crate) fn new(sensor: &'a mut Sensor) -> Self {
        let wants = Subscription { classes: Classes::ALL, everywhere: false, capacity: 10_000 };
        let events = sensor.subscribe(wants).expect("starts");
        let cgroup = Cgroup::new();
        sensor.watch(cgroup.id).expect("watch");
        Self { sensor, cgroup, events }
    }

    pub(crate) fn window(&mut self) -> FeatureWindow {
        window(self.sensor)
    }

    /// Since the last call.
    pub(crate) fn counts(&mut self) -> ProbeCounts {
        self.window().counts
    }

    /// What has arrived by now.
    pub(crate) fn events(&mut self) -> Vec<Event> {
        self.sensor.flush().expect("runs");
        self.events.receiver().try_iter().filter(|event| event.cgroup == self.cgroup.id).collect()
    }

    /// For what the kernel finishes by itself, a moment later: until there are `number`, and a little longer, so that
    /// one too many is seen too.
    pub(crate) fn events_up_to(&mut self, number: usize, wanted: impl Fn(&Event) -> bool) -> Vec<Event> {
        let mut all = Vec::new();
        // Looks, not time: of a machine that is halted for a while all time is over at once, and nothing has been done in it.
        for _ in 0..LOOKS_MAX {
            if all.len() >= number {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
            all.extend(self.events().into_iter().filter(&wanted));
        }
        std::thread::sleep(Duration::from_millis(50));
        all.extend(self.events().into_iter().filter(&wanted));
        all
    }
}

impl Drop for Stage<'_> {
    fn drop(&mut self) {
        self.sensor.unwatch(self.cgroup.id);
    }
}

/// How many of each.
pub(crate) fn tally<'e, K: Ord>(
    events: impl IntoIterator<Item = &'e Event>,
    key: impl Fn(&Detail) -> Option<K>,
) -> BTreeMap<K, u64> {
    let mut tally = BTreeMap::new();
    for key in events.into_iter().filter_map(|event| key(&event.detail)) {
        *tally.entry(key).or_default() += 1;
    }
    tally
}

/// Until a child stands in a read: then it has done all that came before, and its counters stand still.
pub(crate) fn until_it_reads(child: &Child) {
    let in_read = format!("{} ", libc::SYS_read);
    while !std::fs::read_to_string(format!("/proc/{}/syscall", child.pid)).expect("procfs").starts_with(&in_read) {
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// One byte through a pipe: the way in which parent and child wait for one another.
pub(crate) fn give(fd: i32) {
    // SAFETY: one byte of a constant.
    unsafe { libc::write(fd, b"x".as_ptr().cast(), 1) };
}

/// True when it came.
pub(crate) fn take(fd: i32) -> bool {
    let mut byte = 0u8;
    // SAFETY: one byte of our own stack.
    unsafe { libc::read(fd, (&raw mut byte).cast(), 1) == 1 }
}
