//! What connections carry, and the latency of requests.
//!
//! ```text
//!  sensor wants a window    sweep    every connection ┐
//!  a connection ends        ends          it          ┴ its counters now − CONNECTIONS[socket] ─▶ COUNTERS
//!  a segment arrives        segment       a request begins, or was answered ─▶ HISTOGRAMS
//! ```
//!
//! What is counted is what the kernel counts for each connection anyway. Bytes are those that programs sent and received, without
//! headers; what is sent again counts again.
//!
//! Latency needs no knowledge of the protocol: on a connection that was accepted, the first segment with payload that
//! arrives starts a request, and the first with payload that leaves answers it. With pipelining this is the time to the first
//! answer of the batch. When the answer left the kernel has kept for itself; whatever arrives next, the acknowledgement at the
//! latest, is when it is read. What a service asks of others is left out. The round-trip time is what TCP itself reckons with,
//! looked at as a request is answered.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::bpf_skc_to_tcp_sock;
use aya_ebpf::macros::{btf_tracepoint, raw_tracepoint};
use aya_ebpf::programs::{BtfTracePointContext, RawTracePointContext};
use warmswap_events::Distribution;

use crate::emit::now_ns;
use crate::maps::{ASKED, CONNECTIONS, add_shared, counters, cpu, layout, record};
use crate::{cgroup, read, trouble};

/// Request state of a connection: nothing asked; a client's; else the time the pending request arrived.
const IDLE: u64 = 0;
const CLIENT: u64 = u64::MAX;

/// No header of TCP is longer.
const HEADER_MAX: u32 = 60;

/// Of the flags of a socket the one that says that the other side has said that it is done.
const DONE: u64 = 1 << 1;

/// A TCP connection of a watched cgroup.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Connection {
    request: u64,
    /// The next to be sent as the pending request arrived, in sequence numbers.
    next: u32,
    slot: u32,
    charged: Carried,
}

/// What a connection has carried.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Carried {
    bytes_received: u64,
    bytes_sent: u64,
    segments_in: u32,
    segments_out: u32,
}

impl Carried {
    #[inline(always)]
    fn of(sock: u64) -> Self {
        let done = read::at::<u64>(sock, layout!(sock_flags)).is_some_and(|flags| flags & DONE != 0);
        let received: u64 = read::at(sock, layout!(tcp_bytes_received)).unwrap_or_default();
        Self {
            // The kernel takes that for a byte.
            bytes_received: received.wrapping_sub(u64::from(done)),
            bytes_sent: read::at(sock, layout!(tcp_bytes_sent)).unwrap_or_default(),
            segments_in: read::at(sock, layout!(tcp_segments_in)).unwrap_or_default(),
            segments_out: read::at(sock, layout!(tcp_segments_out)).unwrap_or_default(),
        }
    }
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
            Self::Typed(base) => read::typed(base, offset),
            Self::Raw(base) => read::at(base, offset).unwrap_or_default(),
        }
    }
}

/// Fields are read without helpers, which are most of what the other program costs.
#[btf_tracepoint(function = "tcp_probe")]
pub(crate) fn segment_typed(ctx: BtfTracePointContext) -> i32 {
    // (sock, skb); where BTF says otherwise the sensor attaches neither program.
    let sock: u64 = ctx.arg(0);
    if let Some(connection) = served(sock) {
        // SAFETY: a socket of a type that the verifier knows, and so is the result, when it is one.
        let tcp = unsafe { bpf_skc_to_tcp_sock(sock as *mut _) } as u64;
        if tcp != 0 {
            arrives(connection, Struct::Typed(tcp), Struct::Typed(ctx.arg(1)));
        }
    }
    0
}

/// Where the kernel refuses the typed one.
#[raw_tracepoint(tracepoint = "tcp_probe")]
pub(crate) fn segment(ctx: RawTracePointContext) -> i32 {
    let sock: u64 = ctx.arg(0);
    if let Some(connection) = served(sock) {
        arrives(connection, Struct::Raw(sock), Struct::Raw(ctx.arg(1)));
    }
    0
}

/// A connection of somebody watched that is not a client's.
#[inline(always)]
fn served(sock: u64) -> Option<*mut Connection> {
    let connection = match CONNECTIONS.get_ptr_mut(&sock) {
        Some(connection) => connection,
        None => begin_before(sock)?,
    };
    // SAFETY: the lookup succeeded; one word.
    if unsafe { (*connection).request } == CLIENT { None } else { Some(connection) }
}

/// A segment has arrived and is about to be looked at.
#[inline(always)]
fn arrives(connection: *mut Connection, tcp: Struct, skb: Struct) {
    // SAFETY: the lookup succeeded. A segment at a time: the kernel has locked the socket.
    let connection = unsafe { &mut *connection };
    let next: u32 = tcp.at(layout!(tcp_sent_next));
    if connection.request != IDLE {
        if next == connection.next {
            return;
        }
        answered(connection.slot, connection.request, tcp);
        connection.request = IDLE;
    }
    let length: u32 = skb.at(layout!(skb_length));
    // Of what is longer than its usual header the rest may still be a longer header: of an acknowledgement of gaps.
    let usual = u32::from(tcp.at::<u16>(layout!(tcp_header_length)));
    if length > usual && (length > HEADER_MAX || length > header_length(skb)) {
        connection.request = asked(connection.slot);
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

/// A connection that was there before anybody watched counts from now on. Who asked for it is not known.
#[inline(always)]
fn begin_before(sock: u64) -> Option<*mut Connection> {
    let slot = cgroup::of_any_sock(cpu(), sock);
    if slot == 0 {
        return None;
    }
    let mut charged = Carried::of(sock);
    // The one that arrives is counted by the kernel already, what it brings is not.
    charged.segments_in = charged.segments_in.wrapping_sub(1);
    begin(sock, &Connection { request: IDLE, next: 0, slot, charged });
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
    begin(sock, &Connection { request, next: 0, slot, charged: Carried::default() });
}

/// The connection has ended; its socket still knows what it carried.
#[inline(always)]
pub(crate) fn ends(sock: u64, cpu: u32) {
    if let Some(connection) = CONNECTIONS.get_ptr_mut(&sock) {
        // SAFETY: the lookup succeeded.
        charge(unsafe { &mut *connection }, sock, cpu);
        // Fails only when it is not there.
        let _ = CONNECTIONS.remove(&sock);
    }
}

/// What the kernel passes for each entry of a map, and once more with none at the end.
#[repr(C)]
pub(crate) struct EachEntry {
    _meta: *mut c_void,
    _map: *mut c_void,
    key: *mut u64,
    value: *mut Connection,
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/bpf_map_elem")]
pub(crate) extern "C" fn sweep(each: *mut EachEntry) -> i32 {
    // SAFETY: the program's context.
    let (key, connection) = unsafe { ((*each).key, (*each).value) };
    if key.is_null() || connection.is_null() {
        return 0;
    }
    // SAFETY: an entry of the map that the program goes through. A segment may arrive meanwhile: it writes other words.
    let (sock, connection) = unsafe { (*key, &mut *connection) };
    let cpu = cpu();
    charge(connection, sock, cpu);
    // Somebody else may be watched by now.
    let slot = cgroup::of_any_sock(cpu, sock);
    if slot == 0 {
        // Fails only when it is not there.
        let _ = CONNECTIONS.remove(&sock);
    } else if slot != connection.slot {
        connection.slot = slot;
        // What was asked while it was somebody else's is answered in no time that counts.
        if connection.request != CLIENT {
            connection.request = IDLE;
        }
    }
    0
}

/// Counts what the connection has carried since it was looked at last. A sweep and the end of a connection may do so at once,
/// and count a moment of it twice.
#[inline(always)]
fn charge(connection: &mut Connection, sock: u64, cpu: u32) {
    let now = Carried::of(sock);
    let before = core::mem::replace(&mut connection.charged, now);
    let Some(counters) = counters(connection.slot, cpu) else { return };
    add_shared!(counters, rx_bytes, now.bytes_received.saturating_sub(before.bytes_received));
    add_shared!(counters, tx_bytes, now.bytes_sent.saturating_sub(before.bytes_sent));
    add_shared!(counters, rx_packets, u64::from(now.segments_in.wrapping_sub(before.segments_in)));
    add_shared!(counters, tx_packets, u64::from(now.segments_out.wrapping_sub(before.segments_out)));
}
