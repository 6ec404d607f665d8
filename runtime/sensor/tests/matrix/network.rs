//! Datagrams of both families packet by packet; connections accepted and made, with every change of state; resets sent
//! and received; latency of requests.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::mem::size_of;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};

use crate::report::Report;
use crate::stage::{Stage, give, take, tally};
use crate::support::{pipe, port_from};
use warmswap_sensor::{Class, Detail, Event, Sensor};

/// Out and in, per family.
const OUT: u64 = 10;
const IN: u64 = 3;
const OUT_BYTES: usize = 100;
const IN_BYTES: usize = 50;
const FAMILIES: [(&str, &str); 2] = [("127.0.0.1:0", "udp-out-v4"), ("[::1]:0", "udp-out-v6")];

const ACCEPTED: u64 = 5;
const REQUESTS: u64 = 4;
const MADE: u64 = 3;
const RESETS_SENT: u64 = 3;
const RESETS_RECEIVED: u64 = 2;

pub(crate) fn drive(sensor: &mut Sensor, report: &mut Report) {
    datagrams(sensor, report);
    accepted(sensor, report);
    made(sensor, report);
    resets(sensor, report);
}

fn datagrams(sensor: &mut Sensor, report: &mut Report) {
    for (address, out) in FAMILIES {
        let mut stage = Stage::new(sensor);
        let Ok(outside) = UdpSocket::bind(address) else {
            report.undriven(out, &[], "no such addresses here");
            continue;
        };
        let to = Address::of(outside.local_addr().expect("bound"));
        let child = stage.cgroup.spawn(|| send_and_receive(&to));
        let mut buffer = [0; 2 * OUT_BYTES];
        for number in 0..OUT {
            let (length, from) = outside.recv_from(&mut buffer).expect("a datagram");
            assert_eq!(length, OUT_BYTES);
            if number < IN {
                outside.send_to(&buffer[..IN_BYTES], from).expect("an answer");
            }
        }
        assert_eq!(child.wait(), 0, "the work itself failed");
        let counts = stage.counts();
        report.exact(out, "tx_packets", OUT, counts.tx_packets);
        report.exact(out, "tx_bytes", OUT * OUT_BYTES as u64, counts.tx_bytes);
        count!(report, "udp-in", counts.rx_packets == IN);
        count!(report, "udp-in", counts.rx_bytes == IN * IN_BYTES as u64);
    }
}

/// As a server: whoever asks closes first.
fn accepted(sensor: &mut Sensor, report: &mut Report) {
    let mut stage = Stage::new(sensor);
    let (told, tell) = pipe();
    let child = stage.cgroup.spawn(|| serve(tell.as_raw_fd(), ACCEPTED, End::Orderly));
    let port = port_from(&told);
    for _ in 0..ACCEPTED {
        ask(port, &told, REQUESTS);
    }
    let [segments_in, segments_out] = segments_from(&told);
    assert_eq!(child.wait(), 0, "the work itself failed");
    let changes = stage.events_up_to(5 * ACCEPTED as usize + 2, is_tcp);
    let window = stage.window();
    let counts = window.counts;
    count!(report, "tcp-traffic", counts.rx_bytes == ACCEPTED * REQUESTS);
    count!(report, "tcp-traffic", counts.tx_bytes == ACCEPTED * REQUESTS);
    count!(report, "tcp-traffic", counts.rx_packets == segments_in);
    count!(report, "tcp-traffic", counts.tx_packets == segments_out);
    count!(report, "accepts", counts.accepts == ACCEPTED);
    count!(report, "tcp-state", counts.tcp_opened == ACCEPTED);
    count!(report, "tcp-state", counts.tcp_closed == ACCEPTED);
    let durations = window.durations;
    values!(report, "request-latency", durations.request_latency == ACCEPTED * REQUESTS);
    values!(report, "request-latency", durations.request_gap == ACCEPTED * REQUESTS - 1);
    values!(report, "tcp-traffic", durations.round_trip == ACCEPTED);
    let expected = [
        ("close → listen", 1),
        ("listen → syn-recv", ACCEPTED),
        ("syn-recv → established", ACCEPTED),
        ("established → close-wait", ACCEPTED),
        ("close-wait → last-ack", ACCEPTED),
        ("last-ack → close", ACCEPTED),
        ("listen → close", 1),
    ];
    report.events("tcp-state", Class::Tcp, named(&expected), transitions(&changes));
}

/// As a client, which closes first.
fn made(sensor: &mut Sensor, report: &mut Report) {
    let mut stage = Stage::new(sensor);
    let listener = TcpListener::bind("127.0.0.1:0").expect("listens");
    let address = listener.local_addr().expect("bound");
    let to = Address::of(address);
    let child = stage.cgroup.spawn(|| connect_and_close(&to));
    for _ in 0..MADE {
        let (mut connection, _) = listener.accept().expect("the child connects");
        let mut rest = Vec::new();
        connection.read_to_end(&mut rest).expect("the child closes");
    }
    assert_eq!(child.wait(), 0, "the work itself failed");
    let changes = stage.events_up_to(5 * MADE as usize, is_tcp);
    if changes.len() < 5 * MADE as usize {
        println!("as the kernel has it: {:?}; {} runs missed", sockets_at(address.port()), runs_missed());
    }
    let counts = stage.counts();
    count!(report, "tcp-state", counts.tcp_opened == MADE);
    count!(report, "tcp-state", counts.tcp_closed == MADE);
    let expected = [
        ("close → syn-sent", MADE),
        ("syn-sent → established", MADE),
        ("established → fin-wait-1", MADE),
        ("fin-wait-1 → fin-wait-2", MADE),
        ("fin-wait-2 → close", MADE),
    ];
    report.events("tcp-state", Class::Tcp, named(&expected), transitions(&changes));
}

fn resets(sensor: &mut Sensor, report: &mut Report) {
    let mut stage = Stage::new(sensor);
    let (told, tell) = pipe();
    let child = stage.cgroup.spawn(|| serve(tell.as_raw_fd(), RESETS_SENT, End::Reset));
    let port = port_from(&told);
    for _ in 0..RESETS_SENT {
        let mut client = ask(port, &told, 1);
        assert!(client.read(&mut [0]).is_err(), "the server resets");
    }
    assert_eq!(child.wait(), 0, "the work itself failed");
    let (told, tell) = pipe();
    let child = stage.cgroup.spawn(|| serve(tell.as_raw_fd(), RESETS_RECEIVED, End::Orderly));
    let port = port_from(&told);
    for _ in 0..RESETS_RECEIVED {
        reset_on_close(ask(port, &told, 1).as_raw_fd());
    }
    assert_eq!(child.wait(), 0, "the work itself failed");

    let all = (RESETS_SENT + RESETS_RECEIVED) as usize;
    let events = stage.events_up_to(all, |event| event.detail.class() == Class::TcpReset);
    let counts = stage.counts();
    count!(report, "tcp-resets-sent", counts.tcp_resets == RESETS_SENT);
    count!(report, "tcp-resets-received", counts.tcp_resets_received == RESETS_RECEIVED);
    let ways = tally(&events, |detail| match detail {
        Detail::TcpReset { sent, .. } => Some(*sent),
        _ => None,
    });
    let of = |sent: bool| ways.get(&sent).copied().unwrap_or(0);
    report.events("tcp-resets-sent", Class::TcpReset, RESETS_SENT, of(true));
    report.events("tcp-resets-received", Class::TcpReset, RESETS_RECEIVED, of(false));
}

/// Addresses and states of the sockets there or connected to it.
fn sockets_at(port: u16) -> Vec<String> {
    let all = std::fs::read_to_string("/proc/net/tcp").expect("procfs");
    let port = format!(":{port:04X}");
    let ours = all.lines().filter(|line| line.contains(&port));
    ours.map(|line| line.split_whitespace().take(4).collect::<Vec<_>>().join(" ")).collect()
}

/// Of all programs this process has loaded, because they interrupted themselves; told from 5.12 on.
fn runs_missed() -> u64 {
    let descriptors = std::fs::read_dir("/proc/self/fdinfo").expect("procfs").flatten();
    let infos = descriptors.filter_map(|entry| std::fs::read_to_string(entry.path()).ok());
    infos
        .filter_map(|info| {
            info.lines().find_map(|line| line.strip_prefix("recursion_misses:")?.trim().parse::<u64>().ok())
        })
        .sum()
}

fn is_tcp(event: &Event) -> bool {
    event.detail.class() == Class::Tcp
}

fn transitions(events: &[Event]) -> BTreeMap<String, u64> {
    tally(events, |detail| match detail {
        Detail::Tcp { old, new, .. } => Some(format!("{old} → {new}")),
        _ => None,
    })
}

fn named(expected: &[(&str, u64)]) -> BTreeMap<String, u64> {
    expected.iter().map(|(name, number)| ((*name).to_owned(), *number)).collect()
}

/// Of all connections of [`serve`], in and out, by the kernel's own count.
fn segments_from(told: &OwnedFd) -> [u64; 2] {
    let mut segments = [0u64; 2];
    let length = size_of_val(&segments);
    // SAFETY: as many bytes of our own stack.
    let read = unsafe { libc::read(told.as_raw_fd(), segments.as_mut_ptr().cast(), length) };
    assert_eq!(read, length as isize, "the child has served them all");
    segments
}

/// A client outside: so many requests of one byte, each answered before the next. The first waits until the connection was
/// accepted: a packet that overtakes the end of the handshake on another CPU makes the kernel make the socket twice.
fn ask(port: u16, told: &OwnedFd, requests: u64) -> TcpStream {
    let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("connects");
    assert!(take(told.as_raw_fd()), "the child accepts");
    client.set_nodelay(true).expect("nodelay");
    for _ in 0..requests {
        client.write_all(b"x").expect("a request");
        client.read_exact(&mut [0]).expect("an answer");
    }
    client
}

// From here on: what children do, by system calls only.

#[derive(Clone, Copy, PartialEq)]
enum End {
    /// Reads to the end, then closes.
    Orderly,
    /// After one request, without waiting.
    Reset,
}

/// A socket address as the kernel takes it.
struct Address {
    bytes: [u8; size_of::<libc::sockaddr_in6>()],
    length: u32,
    family: i32,
}

impl Address {
    fn of(address: SocketAddr) -> Self {
        let mut bytes = [0; size_of::<libc::sockaddr_in6>()];
        let (length, family) = match address {
            SocketAddr::V4(v4) => {
                bytes[4..8].copy_from_slice(&v4.ip().octets());
                (size_of::<libc::sockaddr_in>(), libc::AF_INET)
            }
            SocketAddr::V6(v6) => {
                bytes[8..24].copy_from_slice(&v6.ip().octets());
                (size_of::<libc::sockaddr_in6>(), libc::AF_INET6)
            }
        };
        bytes[..2].copy_from_slice(&(family as u16).to_ne_bytes());
        bytes[2..4].copy_from_slice(&address.port().to_be_bytes());
        Self { bytes, length: length as u32, family }
    }

    /// A socket that is connected there; negative when it cannot be.
    fn connected(&self, kind: i32) -> i32 {
        // SAFETY: an address of the length given.
        unsafe {
            let socket = libc::socket(self.family, kind, 0);
            if libc::connect(socket, self.bytes.as_ptr().cast(), self.length) == 0 { socket } else { -1 }
        }
    }
}

fn send_and_receive(to: &Address) -> i32 {
    let mut buffer = [0u8; OUT_BYTES];
    let socket = to.connected(libc::SOCK_DGRAM);
    // SAFETY: our own descriptor and stack.
    unsafe {
        for _ in 0..OUT {
            if libc::send(socket, buffer.as_ptr().cast(), OUT_BYTES, 0) != OUT_BYTES as isize {
                return 1;
            }
        }
        for _ in 0..IN {
            if libc::recv(socket, buffer.as_mut_ptr().cast(), OUT_BYTES, 0) != IN_BYTES as isize {
                return 2;
            }
        }
    }
    0
}

fn connect_and_close(to: &Address) -> i32 {
    for _ in 0..MADE {
        let socket = to.connected(libc::SOCK_STREAM);
        // SAFETY: our own descriptor.
        if socket < 0 || unsafe { libc::close(socket) } != 0 {
            return 1;
        }
    }
    0
}

/// Tells its port, then serves so many connections one after the other, each told when it is accepted: a byte for a byte; and
/// at the end how many segments they took.
fn serve(tell: i32, connections: u64, end: End) -> i32 {
    // SAFETY: our own descriptors and stack; addresses of the length given.
    unsafe {
        let listener = libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
        let mut address: libc::sockaddr_in = std::mem::zeroed();
        address.sin_family = libc::AF_INET as u16;
        address.sin_addr.s_addr = u32::from(Ipv4Addr::LOCALHOST).to_be();
        let mut length = size_of::<libc::sockaddr_in>() as u32;
        let listens = libc::bind(listener, (&raw const address).cast(), length) == 0
            && libc::listen(listener, 16) == 0
            && libc::getsockname(listener, (&raw mut address).cast(), &raw mut length) == 0;
        if !listens {
            return 1;
        }
        let port = u16::from_be(address.sin_port).to_ne_bytes();
        libc::write(tell, port.as_ptr().cast(), 2);
        let mut segments = [0u64; 2];
        for _ in 0..connections {
            let connection = libc::accept(listener, std::ptr::null_mut(), std::ptr::null_mut());
            give(tell);
            let mut byte = 0u8;
            while libc::read(connection, (&raw mut byte).cast(), 1) == 1 {
                if libc::write(connection, (&raw const byte).cast(), 1) != 1 {
                    return 2;
                }
                if end == End::Reset {
                    until_acknowledged(connection);
                    reset_on_close(connection);
                    break;
                }
            }
            // Our FIN, and its acknowledgement, are to come.
            for (sum, one) in segments.iter_mut().zip(segments_of(connection)) {
                *sum += u64::from(one) + 1;
            }
            libc::close(connection);
        }
        libc::write(tell, segments.as_ptr().cast(), size_of_val(&segments));
        libc::close(listener);
    }
    0
}

/// In and out; near the end of `struct tcp_info`, which is longer than libc knows.
fn segments_of(connection: i32) -> [u32; 2] {
    const OUT: usize = 136 / size_of::<u32>();
    let mut info = [0u32; 64];
    let mut length = size_of_val(&info) as u32;
    // SAFETY: our own descriptor, and a buffer of the length given.
    unsafe {
        libc::getsockopt(connection, libc::SOL_TCP, libc::TCP_INFO, info.as_mut_ptr().cast(), &raw mut length);
    }
    [info[OUT + 1], info[OUT]]
}

/// An acknowledgement that comes while a socket is being closed is answered with one more reset.
fn until_acknowledged(socket: i32) {
    let mut waiting = 1i32;
    let pause = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };
    // SAFETY: our own descriptor and stack.
    unsafe {
        while libc::ioctl(socket, libc::TIOCOUTQ, &raw mut waiting) == 0 && waiting > 0 {
            libc::nanosleep(&raw const pause, std::ptr::null_mut());
        }
    }
}

fn reset_on_close(socket: i32) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    // SAFETY: a live structure of the length given.
    unsafe {
        let length = size_of::<libc::linger>() as u32;
        libc::setsockopt(socket, libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), length);
    }
}
