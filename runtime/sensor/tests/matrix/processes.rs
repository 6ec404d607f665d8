//! exec, fork, exit with codes and by signals, handover marks.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CStr;
use std::time::Duration;

use crate::report::Report;
use crate::stage::{Stage, tally};
use crate::support::fork_exec_as;
use warmswap_sensor::{Class, Detail, Sensor, make_mark};

const EXECS: u64 = 12;
const PROGRAM: &CStr = c"/bin/true";
/// The first argument, which need not be the path. Busybox, which may be behind it, goes by it but for the dash.
const NAME: &CStr = c"-true";
const CODED: u64 = 5;
const SIGNALLED: u64 = 4;
const CODE: u8 = 7;
const MARKS: u64 = 6;

pub(crate) fn drive(sensor: &mut Sensor, report: &mut Report) {
    let marks = sensor.marks().expect("starts");
    let mut stage = Stage::new(sensor);
    let handover = 0xfeed_0000_0000 + u64::from(std::process::id());
    let status = stage.cgroup.run(|| {
        let mut failed = 0;
        for _ in 0..EXECS {
            failed += fork_exec_as(PROGRAM, NAME);
        }
        for number in 0..CODED + SIGNALLED {
            failed += end_a_child(number < CODED);
        }
        for number in 0..MARKS {
            make_mark(1, handover, number as u32);
        }
        failed
    });
    assert_eq!(status, 0, "the work itself failed");

    const FORKS: u64 = EXECS + CODED + SIGNALLED;
    let counts = stage.counts();
    count!(report, "exec", counts.execs == EXECS);
    count!(report, "fork", counts.forks == FORKS);
    count!(report, "exit", counts.exits == FORKS + 1);

    let events = stage.events();
    let launched = |text: &CStr| BTreeMap::from([(text.to_str().expect("plain").to_owned(), EXECS)]);
    let paths = tally(&events, |detail| match detail {
        Detail::Exec { path, .. } => Some(path.clone()),
        _ => None,
    });
    report.events("exec", Class::Exec, launched(PROGRAM), paths);
    let names = tally(&events, |detail| match detail {
        Detail::Exec { name, .. } => Some(name.clone()),
        _ => None,
    });
    report.events("exec-name", Class::Exec, launched(NAME), names);
    let children: BTreeSet<u32> = events
        .iter()
        .filter_map(|event| match event.detail {
            Detail::Fork { child } => Some(child),
            _ => None,
        })
        .collect();
    report.events("fork", Class::Fork, FORKS, children.len() as u64);
    let ends = tally(&events, |detail| match detail {
        Detail::Exit { code, signal, .. } => Some((*code, *signal)),
        _ => None,
    });
    // Those that ran a program, and the one that did all this, end with 0.
    let expected = [((0, 0), EXECS + 1), ((CODE, 0), CODED), ((0, libc::SIGTERM as u8), SIGNALLED)];
    report.events("exit", Class::Exit, BTreeMap::from(expected), ends);

    // Marks come from the whole host.
    let id = stage.cgroup.id;
    let generations: Vec<u32> = std::iter::from_fn(|| marks.recv_timeout(Duration::from_millis(500)).ok())
        .filter(|mark| mark.handover == handover && mark.mark == 1 && mark.cgroup == id)
        .map(|mark| mark.generation)
        .collect();
    report.events("marks", Class::Mark, (0..MARKS as u32).collect::<Vec<_>>(), generations);
}

/// A child that leaves with [`CODE`], or waits to be ended by SIGTERM. System calls only.
fn end_a_child(by_code: bool) -> i32 {
    // SAFETY: the child pauses or leaves; our own child and stack.
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            if by_code {
                libc::_exit(i32::from(CODE));
            }
            loop {
                libc::pause();
            }
        }
        if !by_code {
            libc::kill(pid, libc::SIGTERM);
        }
        let mut status = 0;
        i32::from(libc::waitpid(pid, &raw mut status, 0) != pid)
    }
}
