//! What was right, what was not, and what could not be driven: as lines for whoever makes a table of many kernels, and as
//! the verdict of the test.

use std::collections::BTreeSet;
use std::fmt::Debug;

use serde_json::json;
use warmswap_model::{Durations, ProbeCounts};
use warmswap_sensor::{Class, ProbeStatus, Sensor};

/// What older kernels cannot do, and since when they can: set an option of a socket that is being bound.
const NOT_BEFORE: [(&str, [u32; 2]); 2] = [("ports-v4", [5, 12]), ("ports-v6", [5, 12])];

/// What some hosts' kernels refuse to anybody, and machines of ours do not: programs at functions.
const NOT_EVERYWHERE: [&str; 3] = ["udp-in", "udp-out-v4", "udp-out-v6"];

/// Whether this kernel is at least of this line.
pub(crate) fn kernel_is(line: [u32; 2]) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("procfs");
    let number = |part: &str| part.parse().unwrap_or(0);
    release.split(['.', '-', '+']).take(2).map(number).collect::<Vec<u32>>() >= line.to_vec()
}

/// In machines of our own everything is there: what is off or cannot be driven there is a failure.
pub(crate) fn all_is_here() -> bool {
    super::keyboard::line().is_some()
}

pub(crate) struct Report {
    test: &'static str,
    /// Added to the names of probes in the table.
    variant: &'static str,
    /// Those that this is about.
    probes: Vec<ProbeStatus>,
    /// Counters, histograms, classes and probes that had their turn, by name.
    covered: BTreeSet<String>,
    wrong: Vec<String>,
}

impl Report {
    pub(crate) fn new(test: &'static str, sensor: &Sensor) -> Self {
        Self::of(test, "", sensor.probes().to_vec())
    }

    /// About these probes only, under another name.
    pub(crate) fn variant(test: &'static str, variant: &'static str, sensor: &Sensor, probes: &[&str]) -> Self {
        let probes = sensor.probes().iter().filter(|status| probes.contains(&status.name)).cloned().collect();
        Self::of(test, variant, probes)
    }

    fn of(test: &'static str, variant: &'static str, probes: Vec<ProbeStatus>) -> Self {
        let mut wrong = Vec::new();
        for probe in &probes {
            println!("MATRIX: {}", json!({"probe": format!("{}{variant}", probe.name), "off": probe.reason}));
            let Some(reason) = &probe.reason else { continue };
            let expected = NOT_BEFORE.iter().any(|(name, line)| *name == probe.name && !kernel_is(*line));
            if expected {
                continue;
            }
            if all_is_here() {
                wrong.push(format!("probe {} is off: {reason}", probe.name));
            } else if NOT_EVERYWHERE.contains(&probe.name) {
                println!("not driven here, but in the virtual machine: {}: {reason}", probe.name);
            } else {
                println!("LEFT OUT: {test}: probe {}: {reason}", probe.name);
            }
        }
        Self { test, variant, probes, covered: BTreeSet::new(), wrong }
    }

    /// These probes read typed arguments.
    pub(crate) fn typed(&mut self, sensor: &Sensor, probes: &[&str]) {
        for probe in sensor.probes().iter().filter(|probe| probes.contains(&probe.name) && probe.attached) {
            if !probe.hook.ends_with(", typed") {
                self.wrong.push(format!("{}: the kernel refused the typed variant; it is {}", probe.name, probe.hook));
            }
        }
    }

    pub(crate) fn on(&self, probe: &str) -> bool {
        self.status(probe).is_some_and(|status| status.attached)
    }

    /// `None` for one that this report is not about.
    fn status(&self, probe: &str) -> Option<&ProbeStatus> {
        let found = self.probes.iter().find(|status| status.name == probe);
        assert!(found.is_some() || !self.variant.is_empty(), "no probe is called {probe}");
        found
    }

    /// Of a probe that is off nothing is expected.
    #[expect(clippy::needless_pass_by_value, reason = "most are numbers, and all are done with")]
    pub(crate) fn exact<T: Debug + PartialEq>(&mut self, probe: &str, what: &str, expected: T, seen: T) {
        self.compared(probe, what, seen == expected, &format!("{expected:?}"), &format!("{seen:?}"));
    }

    /// Events of one class, counted and looked at.
    pub(crate) fn events<T: Debug + PartialEq>(&mut self, probe: &str, class: Class, expected: T, seen: T) {
        self.exact(probe, class.name(), expected, seen);
    }

    fn compared(&mut self, probe: &str, what: &str, right: bool, expected: &str, seen: &str) {
        self.covered.extend([what.to_owned(), probe.to_owned()]);
        if !self.on(probe) {
            return;
        }
        let named = self.named(probe);
        let line = json!({"count": what, "probe": named, "expected": expected, "seen": seen, "right": right});
        println!("MATRIX: {line}");
        if !right {
            self.wrong.push(format!("{probe}, {what}: expected {expected}, seen {seen}"));
        }
    }

    /// For the table: what else could not be done on this kernel, and need not be.
    pub(crate) fn note(&self, probe: &str, reason: &str) {
        if self.status(probe).is_some() {
            println!("MATRIX: {}", json!({"undriven": reason, "probe": self.named(probe)}));
        }
    }

    fn named(&self, probe: &str) -> String {
        format!("{probe}{}", self.variant)
    }

    /// `covers`: the counters, histograms, classes and other probes that this would have shown.
    pub(crate) fn undriven(&mut self, probe: &str, covers: &[&str], reason: &str) {
        self.missed(probe, covers, reason);
        if all_is_here() {
            self.wrong.push(format!("{probe} could not be driven: {reason}"));
        } else {
            println!("LEFT OUT: {}: {probe}: {reason}", self.test);
        }
    }

    /// The same for what only machines of our own have; there it is driven in every run of the tests, so here it is not
    /// counted as left out.
    pub(crate) fn elsewhere(&mut self, probe: &str, covers: &[&str], reason: &str) {
        if all_is_here() {
            return self.undriven(probe, covers, reason);
        }
        self.missed(probe, covers, reason);
        println!("not driven here, but in the virtual machine: {probe}: {reason}");
    }

    fn missed(&mut self, probe: &str, covers: &[&str], reason: &str) {
        for name in covers.iter().chain([&probe]) {
            self.covered.insert((*name).to_owned());
            if self.probes.iter().any(|status| status.name == *name) {
                self.note(name, reason);
            }
        }
    }

    /// Every record is accounted for, and none was lost.
    pub(crate) fn accounts(&mut self, sensor: &mut Sensor) {
        for _ in 0..200 {
            sensor.flush().expect("runs");
            if sensor.accounting().classes.iter().all(|(_, totals)| totals.pending() == 0) {
                break;
            }
        }
        let accounting = sensor.accounting();
        for (class, t) in &accounting.classes {
            if t.emitted != t.consumed + t.discarded + t.dropped || t.dropped != 0 {
                self.wrong.push(format!("events of class {class}: {t:?}"));
            }
        }
        if accounting.malformed != 0 {
            self.wrong.push(format!("{} malformed records", accounting.malformed));
        }
    }

    /// Everything was right, and nothing was forgotten.
    pub(crate) fn finish(mut self) {
        let fields = |value: serde_json::Value| -> Vec<String> {
            value.as_object().expect("a structure").keys().cloned().collect()
        };
        let counters = fields(serde_json::to_value(ProbeCounts::default()).expect("plain data"));
        let histograms = fields(serde_json::to_value(Durations::default()).expect("plain data"));
        let classes = Class::ALL.map(|class| class.name().to_owned());
        let probes = self.probes.iter().filter(|status| status.attached).map(|status| status.name.to_owned());
        let all: Vec<String> = counters.into_iter().chain(histograms).chain(classes).chain(probes).collect();
        for name in all.iter().filter(|name| !self.covered.contains(*name)) {
            self.wrong.push(format!("nothing here makes {name} grow: add a line for it"));
        }
        assert!(self.wrong.is_empty(), "{} wrong:\n  {}", self.wrong.len(), self.wrong.join("\n  "));
    }
}
