//! What connections carry, and the latency of requests, segment by segment as they arrive.
//!
//! What is counted is what the kernel counts for each connection anyway, taken over at every segment that arrives, and when it
//! ends: what was sent since is in the next window. Bytes are those that programs sent and received, without headers; what is
//! sent again counts again.
//!
//! Latency needs no knowledge of the protocol: on a connection that was accepted, the first segment with payload that
//! arrives starts a request, and the first with payload that leaves answers it. With pipelining this is the time to the first
//! answer of the batch. When the answer left the kernel has kept for itself; whatever arrives next, the acknowledgement at the
//! latest, is when it is read. What a service asks of others is left out. The round-trip time is what TCP itself reckons with,
//! looked at as a request is answered.

use aya_ebpf::helpers::generated::bpf_skc_to_tcp_sock;
use aya_ebpf::macros::{btf_tracepoint, raw_tracepoint};
use aya_ebpf::programs::{BtfTracePointContext, RawTracePointContext};
use warmswap_events::{Counters, Distribution};

use crate::emit::now_ns;
use crate::maps::{ASKED, CONNECTIONS, add_shared, counters, cpu, layout, record};
use crate::{cgroup, read, trouble};

/// Request state of a connection: nothing asked; a client's; else the time the pending request arrived.
const IDLE: u64 = 0;
const CLIENT: u64 = u64::MAX;

/// No header of TCP is longer.
const HEADER_MAX: u32 = 60;

/// An established TCP connection of a watched cgroup.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Connection {
    request: u64,
    /// Up to what is counted.
    bytes_received: u64,
    bytes_sent: u64,
    segments_in: u32,
    segments_out: u32,
    /// The next to be sent as the pending request arrived, in sequence numbers.
    next: u32,
    /// Whose it was then.
    slot: u32,
}

/// A struct of the kernel, and how to read it.
#[derive(Clone, Copy)]
enum Struct {
    /// The verifier knows its type: read like any memory.
    Typed(u64),
    /// Read by a helper.
    Raw(u64),
}

impl Struct {
    #[inline(always)]
    fn at<T: Copy + Default>(self, offset: u32) -> T {
        match self {
            // SAFETY: the verifier has checked that this lies inside the struct.
            Self::Typed(base) => unsafe { core::ptr::read_volatile(base.wrapping_add(u64::from(offset)) as *const T) },
            Self::Raw(base) => read::at(base, offset).unwrap_or_default(),
        }
    }
}

/// Fields are read without helpers, which are most of what the other program costs.
#[btf_tracepoint(function = "tcp_probe")]
pub(crate) fn segment_typed(ctx: BtfTracePointContext) -> i32 {
    // (sock, skb); where BTF says otherwise the sensor attaches neither program.
    let sock: u64 = ctx.arg(0);
    let cpu = cpu();
    let slot = cgroup::of_typed_sock(cpu, sock);
    if slot != 0 {
        // SAFETY: a socket of a type that the verifier knows, and so is the result, when it is one.
        let tcp = unsafe { bpf_skc_to_tcp_sock(sock as *mut _) } as u64;
        if tcp != 0 {
            arrives(cpu, slot, sock, Struct::Typed(tcp), Struct::Typed(ctx.arg(1)));
        }
    }
    0
}

/// Where the kernel refuses the typed one.
#[raw_tracepoint(tracepoint = "tcp_probe")]
pub(crate) fn segment(ctx: RawTracePointContext) -> i32 {
    let sock: u64 = ctx.arg(0);
    let cpu = cpu();
    let slot = cgroup::of_any_sock(cpu, sock);
    if slot != 0 {
        arrives(cpu, slot, sock, Struct::Raw(sock), Struct::Raw(ctx.arg(1)));
    }
    0
}

/// A segment has arrived and is about to be looked at. That it has is counted by the kernel already, what it brings is not.
#[inline(always)]
fn arrives(cpu: u32, slot: u32, sock: u64, tcp: Struct, skb: Struct) {
    let Some(counters) = counters(slot, cpu) else { return };
    let length: u32 = skb.at(layout!(skb_length));
    let brings = length.saturating_sub(u32::from(tcp.at::<u16>(layout!(tcp_header_length))));
    let connection = match CONNECTIONS.get_ptr_mut(&sock) {
        Some(connection) => connection,
        None => match begin_before(slot, sock, tcp) {
            Some(connection) => connection,
            None => return,
        },
    };
    // SAFETY: the lookup succeeded. A segment at a time: the kernel has locked the socket.
    let connection = unsafe { &mut *connection };
    take_over(connection, counters, tcp, u64::from(brings));
    if connection.request == CLIENT {
        return;
    }
    if connection.slot != slot {
        // What was asked while it was somebody else's is answered in no time that counts.
        connection.slot = slot;
        connection.request = IDLE;
    }
    let next: u32 = tcp.at(layout!(tcp_sent_next));
    if connection.request != IDLE && next != connection.next {
        answered(slot, connection.request, tcp);
        connection.request = IDLE;
    }
    // Of what is longer than its usual header the rest may still be a longer header: of an acknowledgement of gaps.
    if connection.request == IDLE && brings != 0 && (length > HEADER_MAX || length > header_length(skb)) {
        connection.request = asked(slot);
        connection.next = next;
    }
}

/// The request was answered since the last segment arrived.
#[inline(always)]
fn answered(slot: u32, since_ns: u64, tcp: Struct) {
    // When nothing else was on its way the kernel has noted, to the microsecond, when it sent the first of what now is.
    let first_us: u64 = tcp.at(layout!(tcp_first_sent));
    let left_ns = if first_us >= since_ns / 1000 { first_us * 1000 } else { now_ns() };
    record(slot, Distribution::RequestLatency, left_ns.saturating_sub(since_ns));
    // The kernel keeps eight times the value.
    let round_trip_us = tcp.at::<u32>(layout!(tcp_round_trip)) >> 3;
    record(slot, Distribution::RoundTrip, u64::from(round_trip_us) * 1000);
}

/// A request arrives now: the time, after the gap to the one before was taken in. Of two that arrive at once on two CPUs one
/// gap may be the other's.
#[inline(always)]
fn asked(slot: u32) -> u64 {
    let now = now_ns();
    if let Some(last) = ASKED.get_ptr_mut(slot) {
        // SAFETY: the lookup succeeded; one word.
        let before = unsafe { core::ptr::replace(last, now) };
        if before != 0 {
            record(slot, Distribution::RequestGap, now.wrapping_sub(before));
        }
    }
    now
}

#[inline(always)]
fn header_length(skb: Struct) -> u32 {
    const DATA_OFFSET: u32 = 12;
    read::at::<u8>(skb.at(layout!(skb_data)), DATA_OFFSET).map_or(HEADER_MAX, |words| u32::from(words >> 4) * 4)
}

/// Counts what the connection has carried since it was looked at last. `brings` is to be added to what was received.
#[inline(always)]
fn take_over(connection: &mut Connection, counters: *mut Counters, tcp: Struct, brings: u64) {
    let received = tcp.at::<u64>(layout!(tcp_bytes_received)).wrapping_add(brings);
    // What came twice, or was a longer header, is seen the next time.
    if received > connection.bytes_received {
        add_shared!(counters, rx_bytes, received - connection.bytes_received);
        connection.bytes_received = received;
    }
    let sent: u64 = tcp.at(layout!(tcp_bytes_sent));
    if sent != connection.bytes_sent {
        add_shared!(counters, tx_bytes, sent.wrapping_sub(connection.bytes_sent));
        connection.bytes_sent = sent;
    }
    let (segments_in, segments_out): (u32, u32) =
        (tcp.at(layout!(tcp_segments_in)), tcp.at(layout!(tcp_segments_out)));
    add_shared!(counters, rx_packets, u64::from(segments_in.wrapping_sub(connection.segments_in)));
    connection.segments_in = segments_in;
    if segments_out != connection.segments_out {
        add_shared!(counters, tx_packets, u64::from(segments_out.wrapping_sub(connection.segments_out)));
        connection.segments_out = segments_out;
    }
}

/// A connection that was there before anybody watched counts from now on. Who asked for it is not known.
#[inline(always)]
fn begin_before(slot: u32, sock: u64, tcp: Struct) -> Option<*mut Connection> {
    let connection = Connection {
        request: IDLE,
        bytes_received: tcp.at(layout!(tcp_bytes_received)),
        bytes_sent: tcp.at(layout!(tcp_bytes_sent)),
        segments_in: tcp.at::<u32>(layout!(tcp_segments_in)).wrapping_sub(1),
        segments_out: tcp.at(layout!(tcp_segments_out)),
        next: 0,
        slot,
    };
    begin(sock, &connection);
    CONNECTIONS.get_ptr_mut(&sock)
}

#[inline(always)]
fn begin(sock: u64, connection: &Connection) {
    if CONNECTIONS.insert(&sock, connection, 0).is_err() {
        trouble::unmeasured_connection(u64::from(connection.slot));
    }
}

/// A connection is being made: by whom it is asked for, or with whoever asked.
#[inline(always)]
pub(crate) fn begins(sock: u64, slot: u32, as_client: bool) {
    let request = if as_client { CLIENT } else { IDLE };
    let (bytes_received, bytes_sent, segments_in, segments_out) = (0, 0, 0, 0);
    begin(sock, &Connection { request, bytes_received, bytes_sent, segments_in, segments_out, next: 0, slot });
}

/// Of the flags of a socket the one that says that the other side has said that it is done.
const DONE: u64 = 1 << 1;

/// The connection has ended; its socket still knows what it carried.
#[inline(always)]
pub(crate) fn ends(sock: u64, slot: u32, cpu: u32) {
    if let Some(connection) = CONNECTIONS.get_ptr_mut(&sock) {
        if let Some(counters) = counters(slot, cpu) {
            let done = read::at::<u64>(sock, layout!(sock_flags)).is_some_and(|flags| flags & DONE != 0);
            // The kernel takes that for a byte.
            let brings = if done { u64::MAX } else { 0 };
            // SAFETY: the lookup succeeded; the kernel has locked the socket.
            take_over(unsafe { &mut *connection }, counters, Struct::Raw(sock), brings);
        }
        // Fails only when it is not there.
        let _ = CONNECTIONS.remove(&sock);
    }
}
