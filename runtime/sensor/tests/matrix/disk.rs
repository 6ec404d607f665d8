//! Requests to a disk of which nobody else knows: no file system, no cache, so that a call is a request.

use std::ffi::CString;
use std::fs;

use crate::report::Report;
use crate::stage::Stage;
use warmswap_sensor::Sensor;

/// The serial number by which a disk says that it may be overwritten. Only `cargo xtask vm` makes such disks.
const SERIAL: &str = "warmswap-scratch";

const BLOCK: usize = 4096;
const SEQUENTIAL: u64 = 32;
const SCATTERED: u64 = 16;
const READ_BACK: u64 = 8;

pub(crate) fn drive(sensor: &mut Sensor, report: &mut Report) {
    let mut stage = Stage::new(sensor);
    let Some(disk) = scratch_disk() else {
        let covers =
            ["block_requests", "block_bytes", "block_sequential", "block_latency", "block-io-owner", "block-latency"];
        return report.elsewhere("block-io", &covers, &format!("no disk with the serial number {SERIAL}"));
    };
    let status = stage.cgroup.run(|| transfer(&disk));
    assert_eq!(status, 0, "the work itself failed");
    const REQUESTS: u64 = SEQUENTIAL + SCATTERED + READ_BACK;
    let window = stage.window();
    let counts = window.counts;
    count!(report, "block-io", counts.block_requests == REQUESTS);
    count!(report, "block-io", counts.block_bytes == REQUESTS * BLOCK as u64);
    // The first of a row begins somewhere else.
    count!(report, "block-io", counts.block_sequential == SEQUENTIAL - 1 + READ_BACK - 1);
    // Kernel threads issue some of them: those had no other way to find their cgroup than by the request.
    report.exact("block-io-owner", "block_requests", REQUESTS, counts.block_requests);
    let durations = window.durations;
    values!(report, "block-latency", durations.block_latency == REQUESTS);
}

pub(crate) fn scratch_disk() -> Option<CString> {
    let disks = fs::read_dir("/sys/block").ok()?;
    let name = disks.filter_map(|disk| disk.ok()?.file_name().into_string().ok()).find(|name| {
        fs::read_to_string(format!("/sys/block/{name}/serial")).is_ok_and(|serial| serial.trim() == SERIAL)
    })?;
    CString::new(format!("/dev/{name}")).ok()
}

fn transfer(disk: &CString) -> i32 {
    #[repr(align(4096))]
    struct Block([u8; BLOCK]);
    let mut block = Block([2; BLOCK]);
    let mut failed = 0;
    // SAFETY: our own path, descriptor and stack.
    unsafe {
        let fd = libc::open(disk.as_ptr(), libc::O_RDWR | libc::O_DIRECT);
        if fd < 0 {
            return 1;
        }
        let at = |number: u64| (number * BLOCK as u64) as i64;
        let mut write = |number| {
            failed += i32::from(libc::pwrite(fd, block.0.as_ptr().cast(), BLOCK, at(number)) != BLOCK as isize);
        };
        (100..100 + SEQUENTIAL).for_each(&mut write);
        // Downwards and apart: none begins where another ended.
        (0..SCATTERED).rev().for_each(|number| write(200 + 3 * number));
        for number in 100..100 + READ_BACK {
            failed += i32::from(libc::pread(fd, block.0.as_mut_ptr().cast(), BLOCK, at(number)) != BLOCK as isize);
        }
    }
    failed
}
