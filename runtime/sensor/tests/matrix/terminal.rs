//! Lines typed into a terminal.

use std::os::fd::AsRawFd;

use crate::report::Report;
use crate::stage::Stage;
use crate::support::{terminal, type_in};
use warmswap_sensor::{Class, Detail, Sensor};

const LINES: [&[u8]; 3] = [b"first\n", b"second\n", b"third line\n"];
/// Of the far ends of pseudo terminals.
const MAJOR: u32 = 136;

pub(crate) fn drive(sensor: &mut Sensor, report: &mut Report) {
    let mut stage = Stage::new(sensor);
    let (master, slave) = terminal();
    for line in LINES {
        type_in(&master, line);
    }
    let status = stage.cgroup.run(|| {
        let mut buffer = [0u8; 100];
        // SAFETY: our own descriptors and stack.
        unsafe {
            libc::dup2(slave.as_raw_fd(), 0);
            let wrong = LINES
                .iter()
                .filter(|line| libc::read(0, buffer.as_mut_ptr().cast(), buffer.len()) != line.len() as isize);
            wrong.count() as i32
        }
    });
    assert_eq!(status, 0, "the work itself failed");
    let counts = stage.counts();
    count!(report, "input", counts.tty_inputs == LINES.len() as u64);
    let lengths: Vec<(u32, u64)> = stage
        .events()
        .iter()
        .filter_map(|event| match event.detail {
            Detail::Input { device_major, bytes, .. } => Some((device_major, bytes)),
            _ => None,
        })
        .collect();
    report.events("input", Class::Input, LINES.map(|line| (MAJOR, line.len() as u64)).to_vec(), lengths);
}
