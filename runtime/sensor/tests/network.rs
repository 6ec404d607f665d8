//! Connections, what they carry, and request latency of a cgroup of our own, over loopback.

#[macro_use]
mod support;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use support::{Cgroup, listen, port_from, window};

/// Serves one connection: answers each of `requests` requests of one byte after `delay`, then reads to the end.
fn serve_one(write: i32, requests: usize, delay: Duration, reset: bool) -> i32 {
    let (listener, port) = listen();
    let port = port.to_ne_bytes();
    let mut byte = [0u8; 64];
    // SAFETY: system calls on our own descriptors and stack.
    unsafe {
        libc::write(write, port.as_ptr().cast(), 2);
        let connection = libc::accept(listener, std::ptr::null_mut(), std::ptr::null_mut());
        for _ in 0..requests {
            if libc::read(connection, byte.as_mut_ptr().cast(), 1) != 1 {
                return 1;
            }
            let pause = libc::timespec { tv_sec: 0, tv_nsec: delay.as_nanos() as i64 };
            libc::nanosleep(&raw const pause, std::ptr::null_mut());
            if libc::write(connection, b"y".as_ptr().cast(), 1) != 1 {
                return 2;
            }
        }
        if reset {
            let linger = libc::linger { l_onoff: 1, l_linger: 0 };
            let length = size_of::<libc::linger>() as u32;
            libc::setsockopt(connection, libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), length);
        } else {
            while libc::read(connection, byte.as_mut_ptr().cast(), byte.len()) > 0 {}
        }
        libc::close(connection);
    }
    0
}

#[test]
fn latency_of_requests_is_measured_for_a_server_that_knows_nothing() {
    const TEST: &str = "latency_of_requests_is_measured_for_a_server_that_knows_nothing";
    let mut sensor = sensor_or_leave!("latency_of_requests_is_measured_for_a_server_that_knows_nothing");
    need_probe!(
        "latency_of_requests_is_measured_for_a_server_that_knows_nothing",
        sensor,
        "tcp-traffic",
        "request-latency"
    );
    let cgroup = Cgroup::new();
    sensor.watch(cgroup.id).expect("watch");
    let (read, write) = support::pipe();
    const REQUESTS: usize = 25;
    let child = cgroup.spawn(|| serve_one(write.as_raw_fd(), REQUESTS, Duration::from_millis(2), false));
    let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, port_from(&read))).expect(TEST);
    client.set_nodelay(true).expect("nodelay");
    let mut byte = [0];
    let mut seen_by_client_ms: Vec<f64> = Vec::new();
    for _ in 0..REQUESTS {
        let begin = Instant::now();
        client.write_all(b"x").expect("a request");
        client.read_exact(&mut byte).expect("an answer");
        seen_by_client_ms.push(begin.elapsed().as_secs_f64() * 1e3);
    }
    drop(client);
    assert_eq!(child.wait(), 0);
    let window = window(&mut sensor);
    let latency = &window.durations.request_latency;
    assert_eq!(latency.count(), REQUESTS as u64, "{latency:?}");
    // No less than the server sleeps, no more than the client waits (and a bucket is an eighth wide), for the fastest,
    // the middle and the slowest request, however late a busy host is.
    seen_by_client_ms.sort_by(f64::total_cmp);
    for (q, at) in [(0.0, 0), (0.5, REQUESTS.div_ceil(2) - 1), (1.0, REQUESTS - 1)] {
        let ms = latency.quantile_ns(q).expect("counted") as f64 / 1e6;
        let client_ms = seen_by_client_ms[at];
        assert!(ms >= 2.0 && ms <= client_ms * 1.13, "quantile {q}: {ms} ms, the client saw {client_ms} ms");
    }
    assert_eq!(window.counts.tcp_opened, 1, "{:?}", window.counts);
    assert_eq!(window.counts.accepts, 1, "{:?}", window.counts);
    assert_eq!((window.counts.tcp_resets, window.counts.tcp_resets_received), (0, 0));
    // One request follows the other no sooner than it was answered.
    let gap = &window.durations.request_gap;
    assert_eq!(gap.count(), REQUESTS as u64 - 1, "{gap:?}");
    assert!(gap.quantile_ns(0.0).is_some_and(|ns| ns >= 2_000_000), "{gap:?}");
    // What TCP itself says of the same connection; over loopback far less than the server sleeps, unless the host stood still.
    let round_trip = &window.durations.round_trip;
    assert_eq!(round_trip.count(), 1, "once a window for each connection: {round_trip:?}");
    assert!(round_trip.quantile_ns(0.5).is_some_and(|ns| ns > 0 && ns < 100_000_000), "{round_trip:?}");
    // The last acknowledgement may be handled a moment later.
    let mut closed = window.counts.tcp_closed;
    for _ in 0..200 {
        if closed > 0 {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
        closed += support::window(&mut sensor).counts.tcp_closed;
    }
    assert_eq!(closed, 1);
    assert_eq!((window.counts.rx_bytes, window.counts.tx_bytes), (REQUESTS as u64, REQUESTS as u64));
    assert!(window.counts.rx_packets > REQUESTS as u64);
}

#[test]
fn what_a_service_asks_of_others_is_no_request_to_it() {
    let mut sensor = sensor_or_leave!("what_a_service_asks_of_others_is_no_request_to_it");
    need_probe!("what_a_service_asks_of_others_is_no_request_to_it", sensor, "tcp-traffic", "request-latency");
    let cgroup = Cgroup::new();
    sensor.watch(cgroup.id).expect("watch");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a server outside");
    let port = listener.local_addr().expect("bound").port();
    let child = cgroup.spawn(move || {
        // SAFETY: system calls on our own stack.
        unsafe {
            let socket = libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
            let mut address: libc::sockaddr_in = std::mem::zeroed();
            address.sin_family = libc::AF_INET as u16;
            address.sin_port = port.to_be();
            address.sin_addr.s_addr = u32::from(Ipv4Addr::LOCALHOST).to_be();
            libc::connect(socket, (&raw const address).cast(), size_of::<libc::sockaddr_in>() as u32);
            let mut byte = 0u8;
            for _ in 0..5 {
                libc::write(socket, b"q".as_ptr().cast(), 1);
                libc::read(socket, (&raw mut byte).cast(), 1);
            }
        }
        0
    });
    let (mut connection, _) = listener.accept().expect("the child connects");
    let mut byte = [0];
    for _ in 0..5 {
        connection.read_exact(&mut byte).expect("a question");
        connection.write_all(b"a").expect("an answer");
    }
    drop(connection);
    assert_eq!(child.wait(), 0);
    let window = window(&mut sensor);
    let latency = &window.durations.request_latency;
    assert_eq!(latency.count(), 0, "{latency:?}");
    assert_eq!(window.counts.tcp_opened, 1);
    assert_eq!((window.counts.rx_bytes, window.counts.tx_bytes), (5, 5));
    assert!(window.counts.tx_packets >= 5);
}

/// As HTTP does without keep-alive: who has answered closes before anything comes back; or who has asked says that it is done.
#[test]
fn latency_is_measured_when_the_answer_is_the_last_that_is_said() {
    const TEST: &str = "latency_is_measured_when_the_answer_is_the_last_that_is_said";
    let mut sensor = sensor_or_leave!("latency_is_measured_when_the_answer_is_the_last_that_is_said");
    need_probe!("latency_is_measured_when_the_answer_is_the_last_that_is_said", sensor, "request-latency");
    const CONNECTIONS: usize = 20;
    let cgroup = Cgroup::new();
    sensor.watch(cgroup.id).expect("watch");
    let (read, write) = support::pipe();
    let child = cgroup.spawn(|| {
        let (listener, port) = listen();
        let mut bytes = [0u8; 64];
        // SAFETY: system calls on our own descriptors and stack.
        unsafe {
            libc::write(write.as_raw_fd(), port.to_ne_bytes().as_ptr().cast(), 2);
            for _ in 0..2 * CONNECTIONS {
                let connection = libc::accept(listener, std::ptr::null_mut(), std::ptr::null_mut());
                if libc::read(connection, bytes.as_mut_ptr().cast(), bytes.len()) != 1 {
                    return 1;
                }
                let pause = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };
                libc::nanosleep(&raw const pause, std::ptr::null_mut());
                if libc::write(connection, bytes.as_ptr().cast(), bytes.len()) != bytes.len() as isize {
                    return 2;
                }
                libc::close(connection);
            }
        }
        0
    });
    let port = port_from(&read);
    for number in 0..2 * CONNECTIONS {
        let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect(TEST);
        // So that the request does not overtake the end of the handshake.
        std::thread::sleep(Duration::from_millis(2));
        client.write_all(b"x").expect("a request");
        if number % 2 == 0 {
            client.shutdown(std::net::Shutdown::Write).expect("done");
        }
        assert_eq!(client.read_to_end(&mut Vec::new()).expect("an answer"), 64);
    }
    assert_eq!(child.wait(), 0);
    let latency = window(&mut sensor).durations.request_latency;
    assert_eq!(latency.count(), 2 * CONNECTIONS as u64, "{latency:?}");
    assert!(latency.quantile_ns(0.0).is_some_and(|ns| ns >= 1_000_000), "{latency:?}");
}

/// A port that was served is anybody's again.
#[test]
fn who_asks_from_a_port_that_was_served_is_a_client() {
    const TEST: &str = "who_asks_from_a_port_that_was_served_is_a_client";
    let mut sensor = sensor_or_leave!("who_asks_from_a_port_that_was_served_is_a_client");
    need_probe!("who_asks_from_a_port_that_was_served_is_a_client", sensor, "request-latency");
    let cgroup = Cgroup::new();
    sensor.watch(cgroup.id).expect("watch");
    let (read, write) = support::pipe();
    let child = cgroup.spawn(|| serve_one(write.as_raw_fd(), 3, Duration::ZERO, true));
    let port = port_from(&read);
    let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect(TEST);
    for _ in 0..3 {
        client.write_all(b"x").expect("a request");
        client.read_exact(&mut [0]).expect("an answer");
    }
    // The server resets, so that its port is free at once.
    assert_eq!(child.wait(), 0);
    assert!(client.read(&mut [0]).is_err());
    assert_eq!(window(&mut sensor).durations.request_latency.count(), 3);

    let listener = TcpListener::bind("127.0.0.1:0").expect("a server outside");
    let to = listener.local_addr().expect("bound").port();
    let child = cgroup.spawn(move || {
        // SAFETY: system calls on our own stack.
        unsafe {
            let socket = libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
            let address = |port: u16| {
                let mut address: libc::sockaddr_in = std::mem::zeroed();
                address.sin_family = libc::AF_INET as u16;
                address.sin_port = port.to_be();
                address.sin_addr.s_addr = u32::from(Ipv4Addr::LOCALHOST).to_be();
                address
            };
            let length = size_of::<libc::sockaddr_in>() as u32;
            let (ours, theirs) = (address(port), address(to));
            if libc::bind(socket, (&raw const ours).cast(), length) != 0
                || libc::connect(socket, (&raw const theirs).cast(), length) != 0
            {
                return 1;
            }
            let mut byte = 0u8;
            for _ in 0..5 {
                libc::write(socket, b"q".as_ptr().cast(), 1);
                libc::read(socket, (&raw mut byte).cast(), 1);
            }
        }
        0
    });
    let (mut connection, from) = listener.accept().expect("the child connects");
    assert_eq!(from.port(), port, "{TEST}");
    for _ in 0..5 {
        connection.read_exact(&mut [0]).expect("a question");
        connection.write_all(b"a").expect("an answer");
    }
    drop(connection);
    assert_eq!(child.wait(), 0);
    let durations = window(&mut sensor).durations;
    assert_eq!((durations.request_latency.count(), durations.request_gap.count()), (0, 0));
}

/// Of one that was there before, what it carries from then on, requests too.
#[test]
fn a_connection_that_was_there_before_counts_from_when_it_is_watched() {
    const TEST: &str = "a_connection_that_was_there_before_counts_from_when_it_is_watched";
    let mut sensor = sensor_or_leave!("a_connection_that_was_there_before_counts_from_when_it_is_watched");
    need_probe!(
        "a_connection_that_was_there_before_counts_from_when_it_is_watched",
        sensor,
        "tcp-traffic",
        "request-latency"
    );
    let cgroup = Cgroup::new();
    let (read, write) = support::pipe();
    let child = cgroup.spawn(|| serve_one(write.as_raw_fd(), 10, Duration::ZERO, false));
    let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, port_from(&read))).expect(TEST);
    client.set_nodelay(true).expect("nodelay");
    let mut ask = |times: usize| {
        for _ in 0..times {
            client.write_all(b"x").expect("a request");
            client.read_exact(&mut [0]).expect("an answer");
        }
    };
    ask(4);
    sensor.watch(cgroup.id).expect("watch");
    ask(6);
    drop(client);
    assert_eq!(child.wait(), 0);
    let window = window(&mut sensor);
    assert_eq!((window.counts.rx_bytes, window.counts.tx_bytes), (6, 6), "{:?}", window.counts);
    assert_eq!(window.durations.request_latency.count(), 6);
    assert_eq!((window.counts.tcp_opened, window.counts.accepts), (0, 0));
}

#[test]
fn resets_are_counted_on_the_side_that_sends_and_the_side_that_gets_them() {
    let mut sensor = sensor_or_leave!("resets_are_counted_on_the_side_that_sends_and_the_side_that_gets_them");
    need_probe!(
        "resets_are_counted_on_the_side_that_sends_and_the_side_that_gets_them",
        sensor,
        "tcp-state",
        "tcp-resets-sent",
        "tcp-resets-received"
    );
    let cgroup = Cgroup::new();
    sensor.watch(cgroup.id).expect("watch");

    let (read, write) = support::pipe();
    let child = cgroup.spawn(|| serve_one(write.as_raw_fd(), 1, Duration::ZERO, true));
    let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, port_from(&read))).expect("connects");
    client.write_all(b"x").expect("a request");
    client.read_exact(&mut [0]).expect("an answer");
    assert_eq!(child.wait(), 0);
    assert!(client.read(&mut [0]).is_err(), "the server resets");
    let counts = window(&mut sensor).counts;
    assert_eq!((counts.tcp_resets, counts.tcp_resets_received), (1, 0));

    let (read, write) = support::pipe();
    let child = cgroup.spawn(|| serve_one(write.as_raw_fd(), 1, Duration::ZERO, false));
    let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, port_from(&read))).expect("connects");
    client.write_all(b"x").expect("a request");
    client.read_exact(&mut [0]).expect("an answer");
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let length = size_of::<libc::linger>() as u32;
    // SAFETY: a live structure of the length given.
    unsafe {
        libc::setsockopt(client.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), length);
    }
    drop(client);
    assert_eq!(child.wait(), 0);
    let counts = window(&mut sensor).counts;
    assert_eq!((counts.tcp_resets, counts.tcp_resets_received), (0, 1));
}
