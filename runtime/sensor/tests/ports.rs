//! Programs of one cgroup bind the same port, and nobody else does.

#[macro_use]
mod support;

use std::mem::size_of;

use support::Cgroup;

/// Binds two sockets of this kind to one port; 0, or why the second could not. System calls only.
fn bind_twice(kind: libc::c_int) -> i32 {
    let mut address = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes([127, 0, 0, 1]) },
        sin_zero: [0; 8],
    };
    let mut length = size_of::<libc::sockaddr_in>() as libc::socklen_t;
    // SAFETY: sockets of our own and an address on the stack, of the length that is given.
    unsafe {
        let first = libc::socket(libc::AF_INET, kind, 0);
        let second = libc::socket(libc::AF_INET, kind, 0);
        let bound = libc::bind(first, (&raw const address).cast(), length) == 0
            && libc::getsockname(first, (&raw mut address).cast(), &raw mut length) == 0
            && (kind != libc::SOCK_STREAM || libc::listen(first, 1) == 0);
        if !bound {
            return -1;
        }
        match libc::bind(second, (&raw const address).cast(), length) {
            0 => 0,
            _ => *libc::__errno_location(),
        }
    }
}

#[test]
fn a_port_is_shared_within_a_cgroup_and_with_nobody_else() {
    let mut sensor = sensor_or_leave!("a_port_is_shared_within_a_cgroup_and_with_nobody_else");
    need_probe!("a_port_is_shared_within_a_cgroup_and_with_nobody_else", sensor, "ports-v4", "ports-v6");
    const TCP: libc::c_int = libc::SOCK_STREAM;
    let (ours, other) = (Cgroup::new(), Cgroup::new());
    let below = ours.child("g1");
    assert_eq!(below.run(|| bind_twice(TCP)), libc::EADDRINUSE);
    sensor.share_ports(ours.id).unwrap();
    sensor.share_ports(ours.id).unwrap();
    let shared = below.run(|| bind_twice(TCP));
    if sensor.ports_refused().unwrap() > 0 {
        assert_eq!(shared, libc::EADDRINUSE);
        println!("LEFT OUT: a_port_is_shared_within_a_cgroup_and_with_nobody_else: the kernel is older than 6.1");
        return;
    }
    assert_eq!(shared, 0);
    assert_eq!(below.run(|| bind_twice(libc::SOCK_DGRAM)), libc::EADDRINUSE);
    assert_eq!(other.run(|| bind_twice(TCP)), libc::EADDRINUSE);
    sensor.unshare_ports(ours.id);
    assert_eq!(below.run(|| bind_twice(TCP)), libc::EADDRINUSE);
    drop(below);
    drop(other);
    // One that is gone is an error with its reason.
    let gone = ours.id;
    drop(ours);
    let error = sensor.share_ports(gone).unwrap_err();
    assert!(error.to_string().contains("cannot share their ports"), "{error}");
}
