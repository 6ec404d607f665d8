//! Ports that programs of a service bind: shared where the kernel lets us, counted where it does not.

use std::mem::size_of;

use crate::report::{Report, kernel_is};
use crate::stage::Stage;
use warmswap_sensor::Sensor;

const BINDS: u64 = 4;

pub(crate) fn drive(sensor: &mut Sensor, report: &mut Report) {
    let stage = Stage::new(sensor);
    if !(report.on("ports-v4") && report.on("ports-v6")) {
        return;
    }
    for (probe, family) in [("ports-v4", libc::AF_INET), ("ports-v6", libc::AF_INET6)] {
        if let Err(error) = stage.sensor.share_ports(stage.cgroup.id) {
            return report.undriven(probe, &[], &error.to_string());
        }
        let refused_before = stage.sensor.ports_refused().expect("reads");
        let shared = stage.cgroup.run(|| bind_some(family)) as u64;
        let refused = stage.sensor.ports_refused().expect("reads") - refused_before;
        // Since 6.1 this option too may be set from where our programs are.
        let expected = if kernel_is([6, 1]) { (BINDS, 0) } else { (0, BINDS) };
        report.exact(probe, "sockets that share their port, and that may not", expected, (shared, refused));
    }
    stage.sensor.unshare_ports(stage.cgroup.id);
}

/// How many of the sockets share their port. System calls only.
fn bind_some(family: i32) -> i32 {
    let mut shared = 0;
    for _ in 0..BINDS {
        let mut address = [0u8; size_of::<libc::sockaddr_in6>()];
        address[..2].copy_from_slice(&(family as u16).to_ne_bytes());
        let length = if family == libc::AF_INET { size_of::<libc::sockaddr_in>() } else { address.len() };
        let (mut on, mut size) = (0i32, size_of::<i32>() as u32);
        // SAFETY: our own descriptors and stack; an address and an option of the lengths given.
        unsafe {
            let socket = libc::socket(family, libc::SOCK_STREAM, 0);
            if libc::bind(socket, address.as_ptr().cast(), length as u32) == 0 {
                libc::getsockopt(socket, libc::SOL_SOCKET, libc::SO_REUSEPORT, (&raw mut on).cast(), &raw mut size);
            }
        }
        shared += i32::from(on != 0);
    }
    shared
}
