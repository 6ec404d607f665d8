//! What connections carry, and the latency of requests.
//!
//! ```text
//!  sensor wants a window    sweep    every connection ┐
//!  a connection ends        ends          it          ┴ its counters now − CONNECTIONS[socket] ─▶ COUNTERS
//!  a segment arrives        segment       a request begins, or was answered ─▶ HISTOGRAMS
//!  a cgroup is watched      adopt    connections that are there already
//! ```
//!
//! What is counted is what the kernel counts for each connection anyway. Bytes are those that programs sent and received, without
//! headers; what is sent again counts again.
//!
//! Latency needs no knowledge of the protocol: on a connection that was accepted, the first segment with payload that
//! arrives starts a request, and the first with payload that leaves answers it. With pipelining this is the time to the first
//! answer of the batch. When the answer left the kernel has kept for itself; it is read when something arrives next, the
//! acknowledgement at the latest, or when the connection is closed. What a service asks of others is left out.
//!
//! A segment is looked at without calling anything, as far as that goes: of a host that guards its returns every call is dear. So
//! those of clients are told by their port, and requests wait in places by the number of their socket, four in a row.

use core::ffi::c_void;

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::generated::bpf_skc_to_tcp_sock;
use aya_ebpf::macros::{btf_tracepoint, raw_tracepoint};
use aya_ebpf::programs::{BtfTracePointContext, RawTracePointContext};
use warmswap_events::{Distribution, Places, REQUEST_ROWS, Request};

use crate::emit::now_ns;
use crate::maps::{
    ASKED, CONNECTIONS, CONTROL, EXISTS, REQUESTS, SERVED, add_atomic, add_shared, counters, cpu, layout, record,
};
use crate::tcp::{ESTABLISHED, PROTOCOL_TCP};
use crate::{cgroup, read, trouble};

/// No header of TCP is longer.
const HEADER_MAX: u32 = 60;

/// Of the flags of a socket the one that says that the other side has said that it is done.
const DONE: u64 = 1 << 1;

const FAMILY_V4: u16 = 2;
const FAMILY_V6: u16 = 10;
const MODE_KIND: u16 = 0o170_000;
const MODE_SOCKET: u16 = 0o140_000;

/// A TCP connection of a watched cgroup.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Connection {
    slot: u32,
    /// Its port, which is among those in `SERVED`; 0 for a client's. As it ends its socket has forgotten it.
    served: u32,
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
    if !is_served(read::typed(sock, layout!(sock_port_local))) {
        return 0;
    }
    let slot = cgroup::of_typed_sock(cpu(), sock);
    if slot != 0 {
        // SAFETY: a socket of a type that the verifier knows, and so is the result, when it is one.
        let tcp = unsafe { bpf_skc_to_tcp_sock(sock as *mut _) } as u64;
        if tcp != 0 {
            let hash = read::typed(sock, layout!(sock_hash));
            arrives(slot, sock, hash, Struct::Typed(tcp), Struct::Typed(ctx.arg(1)));
        }
    }
    0
}

/// Where the kernel refuses the typed one.
#[raw_tracepoint(tracepoint = "tcp_probe")]
pub(crate) fn segment(ctx: RawTracePointContext) -> i32 {
    let sock: u64 = ctx.arg(0);
    if !read::at(sock, layout!(sock_port_local)).is_some_and(is_served) {
        return 0;
    }
    let slot = cgroup::of_any_sock(cpu(), sock);
    if slot != 0 {
        let hash = read::at(sock, layout!(sock_hash)).unwrap_or_default();
        arrives(slot, sock, hash, Struct::Raw(sock), Struct::Raw(ctx.arg(1)));
    }
    0
}

/// Whether this is the port of a connection that somebody watched serves.
#[inline(always)]
fn is_served(port: u16) -> bool {
    // SAFETY: the lookup succeeded; one word.
    SERVED.get_ptr(u32::from(port)).is_some_and(|served| unsafe { core::ptr::read_volatile(served) } != 0)
}

/// By the number that the kernel finds the socket by.
#[inline(always)]
fn places(hash: u32) -> Option<*mut Places> {
    REQUESTS.get_ptr_mut(hash % REQUEST_ROWS)
}

/// A segment has arrived and is about to be looked at.
#[inline(always)]
fn arrives(slot: u32, sock: u64, hash: u32, tcp: Struct, skb: Struct) {
    let Some(places) = places(hash) else { return };
    // SAFETY: the lookup succeeded. A segment of a socket at a time: the kernel has locked it. Of two sockets in one row that are
    // asked at once on two CPUs the one may lose its place to the other.
    let places = unsafe { &mut (*places).0 };
    let next: u32 = tcp.at(layout!(tcp_sent_next));
    let mut free = None;
    for place in places {
        if place.sock == sock {
            if place.next == next {
                return;
            }
            answered(slot, place, tcp);
            place.sock = 0;
        }
        if place.sock == 0 && free.is_none() {
            free = Some(place);
        }
    }
    let measured = measured();
    if measured.closed {
        not_asked(slot);
        return;
    }
    let length: u32 = skb.at(layout!(skb_length));
    // Of what is longer than its usual header the rest may still be a longer header: of an acknowledgement of gaps.
    let usual = u32::from(tcp.at::<u16>(layout!(tcp_header_length)));
    if length > usual && (length > HEADER_MAX || length > header_length(skb)) {
        let since_ns = asked(slot, measured.since_ns);
        match free {
            Some(place) => *place = Request { sock, since_ns, next, slot, unused: 0 },
            None => trouble::unmeasured_request(u64::from(slot)),
        }
    }
}

/// Which requests are measured; see `sampling.rs` of the sensor.
struct Measured {
    since_ns: u64,
    closed: bool,
}

#[inline(always)]
fn measured() -> Measured {
    let Some(control) = CONTROL.get_ptr(0) else { return Measured { since_ns: u64::MAX, closed: true } };
    // SAFETY: the lookup succeeded; user space changes each word whole.
    unsafe {
        Measured {
            since_ns: core::ptr::read_volatile(&raw const (*control).requests_since),
            closed: core::ptr::read_volatile(&raw const (*control).requests_closed) != 0,
        }
    }
}

/// The request was answered since the last segment arrived.
#[inline(always)]
fn answered(slot: u32, request: &Request, tcp: Struct) {
    let since_ns = request.since_ns;
    if request.slot != slot || since_ns < measured().since_ns {
        return;
    }
    // When nothing else was on its way the kernel has noted, to the microsecond, when it sent the first of what now is.
    let first_us: u64 = tcp.at(layout!(tcp_first_sent));
    let left_ns = if first_us >= since_ns / 1000 { first_us * 1000 } else { now_ns() };
    record(slot, Distribution::RequestLatency, left_ns.saturating_sub(since_ns));
}

/// A request arrives now: the time, after the gap to the one before, if that is measured, was taken in. Of two that arrive at once on two CPUs one
/// gap may be the other's.
#[inline(always)]
fn asked(slot: u32, measured_since_ns: u64) -> u64 {
    let now = now_ns();
    if let Some(last) = ASKED.get_ptr_mut(slot) {
        // SAFETY: the lookup succeeded; one word.
        let before = unsafe { core::ptr::replace(last, now) };
        if before != 0 && before >= measured_since_ns {
            record(slot, Distribution::RequestGap, now.wrapping_sub(before));
        }
    }
    now
}

/// Perhaps a request that is not measured: the gap to the next one is not known.
#[inline(always)]
fn not_asked(slot: u32) {
    if let Some(last) = ASKED.get_ptr_mut(slot) {
        // SAFETY: the lookup succeeded; one word.
        unsafe { core::ptr::write_volatile(last, 0) };
    }
}

#[inline(always)]
fn header_length(skb: Struct) -> u32 {
    const DATA_OFFSET: u32 = 12;
    read::at::<u8>(skb.at(layout!(skb_data)), DATA_OFFSET).map_or(HEADER_MAX, |words| u32::from(words >> 4) * 4)
}

/// A connection is being made: by whom it is asked for, or with whoever asked.
#[inline(always)]
pub(crate) fn begins(sock: u64, slot: u32, as_client: bool) {
    // What is there is of one that ended unseen.
    forget(sock);
    let served = if as_client { 0 } else { local_port(sock) };
    begin(sock, &Connection { slot, served, charged: Carried::default() });
}

#[inline(always)]
fn local_port(sock: u64) -> u32 {
    read::at::<u16>(sock, layout!(sock_port_local)).unwrap_or_default().into()
}

/// Unless it is there.
#[inline(always)]
fn begin(sock: u64, connection: &Connection) {
    match CONNECTIONS.insert(&sock, connection, BPF_NOEXIST.into()) {
        Ok(()) => serve(connection.served, 1),
        Err(EXISTS) => {}
        Err(_) => trouble::unmeasured_connection(u64::from(connection.slot)),
    }
}

/// One more connection of a port is served, or one less.
#[inline(always)]
fn serve(port: u32, more: u64) {
    if port != 0
        && let Some(served) = SERVED.get_ptr_mut(port)
    {
        add_atomic(served, more);
    }
}

/// Nothing more will be sent on the connection: what was sent answers what was asked.
#[inline(always)]
pub(crate) fn closes(sock: u64, slot: u32) {
    let Some(places) = read::at(sock, layout!(sock_hash)).and_then(places) else { return };
    // SAFETY: the lookup succeeded; the kernel has locked the socket.
    for place in unsafe { &mut (*places).0 } {
        if place.sock == sock {
            if read::at(sock, layout!(tcp_sent_next)) != Some(place.next) {
                answered(slot, place, Struct::Raw(sock));
            }
            place.sock = 0;
            return;
        }
    }
}

/// The connection has ended; its socket still knows what it carried.
#[inline(always)]
pub(crate) fn ends(sock: u64, cpu: u32) {
    if let Some(connection) = CONNECTIONS.get_ptr_mut(&sock) {
        // SAFETY: the lookup succeeded.
        charge(unsafe { &mut *connection }, sock, cpu);
        forget(sock);
    }
}

#[inline(always)]
fn forget(sock: u64) {
    let Some(connection) = CONNECTIONS.get_ptr(&sock) else { return };
    // SAFETY: the lookup succeeded.
    let port = unsafe { (*connection).served };
    // Of two that forget it at once one is late.
    if CONNECTIONS.remove(&sock).is_ok() {
        serve(port, u64::MAX);
    }
}

/// What the kernel passes for each open file of each task, and once more with none at the end.
#[repr(C)]
pub(crate) struct EachFile {
    _meta: *mut c_void,
    _task: *mut c_void,
    _descriptor: u64,
    file: *mut c_void,
}

/// A connection that was there before anybody watched counts from now on. Who asked for it is not known: it is taken for served.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
pub(crate) extern "C" fn adopt(each: *mut EachFile) -> i32 {
    // SAFETY: the program's context.
    let file = unsafe { (*each).file } as u64;
    if file != 0
        && let Some(sock) = established(file)
    {
        let slot = cgroup::of_any_sock(cpu(), sock);
        if slot != 0 {
            begin(sock, &Connection { slot, served: local_port(sock), charged: Carried::of(sock) });
            if state(sock) != Some(ESTABLISHED) {
                // It has ended meanwhile, perhaps before there was anything to forget.
                forget(sock);
            }
        }
    }
    0
}

/// The socket of a file that is an established TCP connection.
#[inline(always)]
fn established(file: u64) -> Option<u64> {
    let mode = read::at::<u16>(read::pointer(file, layout!(file_inode))?, layout!(inode_mode))?;
    if mode & MODE_KIND != MODE_SOCKET {
        return None;
    }
    let sock = read::pointer(read::pointer(file, layout!(file_private))?, layout!(socket_sock))?;
    let is_tcp = read::at(sock, layout!(sock_protocol)) == Some(PROTOCOL_TCP)
        && read::at(sock, layout!(sock_family)).is_some_and(|family: u16| family == FAMILY_V4 || family == FAMILY_V6);
    (is_tcp && state(sock) == Some(ESTABLISHED)).then_some(sock)
}

#[inline(always)]
fn state(sock: u64) -> Option<u32> {
    read::at::<u8>(sock, layout!(sock_state)).map(u32::from)
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
    // SAFETY: an entry of the map that the program goes through.
    let (sock, connection) = unsafe { (*key, &mut *connection) };
    let cpu = cpu();
    charge(connection, sock, cpu);
    // Somebody else may be watched by now.
    let slot = cgroup::of_any_sock(cpu, sock);
    if slot == 0 {
        forget(sock);
    } else {
        connection.slot = slot;
    }
    0
}

/// Counts what the connection has carried since it was looked at last. A sweep and the end of a connection may do so at once,
/// and count a moment of it twice.
#[inline(always)]
fn charge(connection: &mut Connection, sock: u64, cpu: u32) {
    let now = Carried::of(sock);
    let before = connection.charged;
    if (now.segments_in.wrapping_sub(before.segments_in) as i32) < 0 {
        // Who looked later was faster.
        return;
    }
    connection.charged = now;
    let Some(counters) = counters(connection.slot, cpu) else { return };
    // The kernel keeps eight times the value.
    if now.segments_in != before.segments_in
        && let Some(round_trip_us) = read::at::<u32>(sock, layout!(tcp_round_trip))
        && round_trip_us != 0
    {
        record(connection.slot, Distribution::RoundTrip, u64::from(round_trip_us >> 3) * 1000);
    }
    add_shared!(counters, rx_bytes, now.bytes_received.saturating_sub(before.bytes_received));
    add_shared!(counters, tx_bytes, now.bytes_sent.saturating_sub(before.bytes_sent));
    add_shared!(counters, rx_packets, u64::from(now.segments_in.wrapping_sub(before.segments_in)));
    let sent = now.segments_out.wrapping_sub(before.segments_out);
    add_shared!(counters, tx_packets, if (sent as i32) < 0 { 0 } else { u64::from(sent) });
}
