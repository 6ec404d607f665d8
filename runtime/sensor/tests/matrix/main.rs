//! One known number of everything that can be counted or told, and exactly that number must arrive. `cargo xtask vm
//! --kernel 5.10,6.1,…` runs this on every kernel and puts what it prints into one table; on the host it is a test like
//! any other and says what it cannot drive here.
//!
//! A new counter is one line: `count!(report, "the-probe", counts.the_counter == what_was_done);` beside the work that
//! makes it grow. A counter, a histogram, a class of events, or a probe, for which there is no such line fails the test.

#[macro_use]
#[path = "../support/mod.rs"]
mod support;

/// A counter of a window, by name, and what it must be.
macro_rules! count {
    ($report:expr, $probe:literal, $counts:ident.$counter:ident == $expected:expr) => {
        $report.exact($probe, stringify!($counter), $expected, $counts.$counter)
    };
}

/// The same for a histogram of a window: how many values are in it.
macro_rules! values {
    ($report:expr, $probe:literal, $durations:ident.$histogram:ident == $expected:expr) => {
        $report.exact($probe, stringify!($histogram), $expected, $durations.$histogram.count())
    };
}

mod calls;
mod disk;
mod keyboard;
mod memory;
mod network;
mod ports;
mod processes;
mod report;
mod stage;
mod tablet;
mod terminal;
mod waits;

use report::Report;
use warmswap_sensor::{Sensor, SensorConfig};

/// Probes that have a cheaper variant, which reads typed arguments or has a hook that not every kernel has, and their parts.
const TYPED: [&str; 4] = ["request-latency", "marks", "input", "orientation"];

#[test]
fn every_class_and_every_counter_is_exact() {
    let mut sensor = sensor_or_leave!("every_class_and_every_counter_is_exact");
    let mut report = Report::new("every_class_and_every_counter_is_exact", &sensor);
    // One that is refused would only cost more, which no count shows. The cgroup of a socket has a type from 5.16 on.
    report.typed(&sensor, if report::kernel_is([5, 16]) { &["request-latency", "input"] } else { &["input"] });
    drive(&mut sensor, report);
}

/// Kernels that have both take the other one, so nobody would notice.
#[test]
fn what_reads_no_typed_arguments_is_as_exact() {
    let config = SensorConfig { typed: false, ..SensorConfig::default() };
    let mut sensor = sensor_or_leave!("what_reads_no_typed_arguments_is_as_exact", config);
    let report = Report::variant("what_reads_no_typed_arguments_is_as_exact", ", untyped", &sensor, &TYPED);
    drive(&mut sensor, report);
}

fn drive(sensor: &mut Sensor, mut report: Report) {
    processes::drive(sensor, &mut report);
    calls::drive(sensor, &mut report);
    memory::drive(sensor, &mut report);
    disk::drive(sensor, &mut report);
    network::drive(sensor, &mut report);
    terminal::drive(sensor, &mut report);
    keyboard::drive(sensor, &mut report);
    waits::drive(sensor, &mut report);
    ports::drive(sensor, &mut report);
    report.accounts(sensor);
    report.finish();
}
