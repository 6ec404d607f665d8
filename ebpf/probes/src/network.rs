//! Packets and bytes per cgroup, and the latency of requests, from `cgroup_skb` at the root of the v2 hierarchy.
//!
//! Latency needs no knowledge of the protocol: on a connection that was accepted, the first packet with payload that
//! arrives starts a request, and the first packet with payload that leaves answers it. With pipelining this is the
//! time to the first answer of the batch. What a service asks of others is left out: its own SYN marks the
//! connection as a client's. Bytes are those of the IP layer. The round-trip time is what TCP itself reckons with,
//! looked at as a request is answered.
//!
//! What is known of a connection, whose it is among it, is kept with its socket: finding it there takes a few loads.

use aya_ebpf::bindings::{__sk_buff, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock};
use aya_ebpf::helpers::generated::{
    bpf_sk_fullsock, bpf_sk_storage_get, bpf_skb_cgroup_id, bpf_skb_load_bytes, bpf_tcp_sock,
};
use aya_ebpf::macros::cgroup_skb;
use aya_ebpf::programs::SkBuffContext;
use warmswap_events::{Distribution, LANE_EGRESS, LANE_INGRESS, SLOTS_MAX};

use crate::emit::now_ns;
use crate::maps::{ASKED, CONNECTIONS, add_shared, counters, cpu, record};
use crate::{cgroup, trouble};

const PASS: i32 = 1;

const PROTOCOL_TCP: u32 = 6;
const STATE_LISTEN: u32 = 10;
const FLAG_SYN: u8 = 0x02;
const FLAG_ACK: u8 = 0x10;

/// Request state of a connection: nothing asked; a client's; else the time the pending request arrived.
const IDLE: u64 = 0;
const CLIENT: u64 = u64::MAX;

const SLOT_BITS: u32 = SLOTS_MAX.trailing_zeros();
const SLOT_MASK: u64 = SLOTS_MAX as u64 - 1;

/// What is kept with a TCP socket.
#[repr(C)]
pub(crate) struct Connection {
    /// The slot, and above it the epoch of which it is, all of it: a connection may be silent for long.
    owner: u64,
    request: u64,
}

#[cgroup_skb]
pub(crate) fn net_ingress(ctx: SkBuffContext) -> i32 {
    let skb = ctx.skb.skb;
    let cpu = cpu();
    let (slot, connection, _) = whose(skb, cpu, LANE_INGRESS);
    let Some(counters) = counters(slot, cpu) else { return PASS };
    add_shared!(counters, rx_packets, packets(skb));
    add_shared!(counters, rx_bytes, u64::from(length(skb)));
    if let Some(connection) = connection
        && let Some(tcp) = Tcp::of(skb)
        && tcp.payload
    {
        // SAFETY: `whose` found it; one word.
        unsafe {
            if (*connection).request == IDLE {
                (*connection).request = asked(slot);
            }
        }
    }
    PASS
}

#[cgroup_skb]
pub(crate) fn net_egress(ctx: SkBuffContext) -> i32 {
    let skb = ctx.skb.skb;
    let cpu = cpu();
    let (slot, connection, socket) = whose(skb, cpu, LANE_EGRESS);
    let Some(counters) = counters(slot, cpu) else { return PASS };
    add_shared!(counters, tx_packets, packets(skb));
    add_shared!(counters, tx_bytes, u64::from(length(skb)));
    let (Some(connection), Some(tcp)) = (connection, Tcp::of(skb)) else { return PASS };
    // SAFETY: `whose` found it; one word.
    let since = unsafe { (*connection).request };
    if tcp.payload {
        if since != IDLE && since != CLIENT {
            // SAFETY: as above.
            unsafe { (*connection).request = IDLE };
            record(slot, Distribution::RequestLatency, now_ns().wrapping_sub(since));
            if let Some(us) = round_trip_us(socket) {
                record(slot, Distribution::RoundTrip, u64::from(us) * 1000);
            }
        }
    } else if tcp.flags & (FLAG_SYN | FLAG_ACK) == FLAG_SYN {
        // SAFETY: as above.
        unsafe { (*connection).request = CLIENT };
    }
    PASS
}

/// The slot of the packet's socket, what is kept of its connection, and the socket, null where there is none. What is kept
/// begins with the first packet of a watched connection; a listening socket is none.
#[inline(always)]
fn whose(skb: *mut __sk_buff, cpu: u32, lane: u32) -> (u32, Option<*mut Connection>, *mut bpf_sock) {
    let socket = full_socket(skb);
    // SAFETY: looked at for null first; the fields are the program's to read.
    let connects =
        unsafe { !socket.is_null() && (*socket).protocol == PROTOCOL_TCP && (*socket).state != STATE_LISTEN };
    if !connects {
        return (cgroup::of_skb(cpu, lane, skb), None, socket);
    }
    let epoch = cgroup::epoch() << SLOT_BITS;
    let connection = kept(socket, core::ptr::null_mut());
    if connection.is_null() {
        let slot = cgroup::of_skb(cpu, lane, skb);
        return (slot, if slot == 0 { None } else { begin(skb, socket, epoch | u64::from(slot)) }, socket);
    }
    // SAFETY: the lookup succeeded; one word.
    let owner = unsafe { (*connection).owner };
    if owner & !SLOT_MASK == epoch {
        return ((owner & SLOT_MASK) as u32, Some(connection), socket);
    }
    let slot = cgroup::of_skb(cpu, lane, skb);
    // SAFETY: as above.
    unsafe {
        (*connection).owner = epoch | u64::from(slot);
        // What was asked while it was somebody else's, or nobody's, is answered in no time that counts.
        if owner & SLOT_MASK != u64::from(slot) && (*connection).request != CLIENT {
            (*connection).request = IDLE;
        }
    }
    (slot, Some(connection), socket)
}

/// `None` when memory is short: then a request is not measured, or a client's connection taken for a server's.
#[inline(always)]
fn begin(skb: *mut __sk_buff, socket: *mut bpf_sock, owner: u64) -> Option<*mut Connection> {
    let mut first = Connection { owner, request: IDLE };
    let connection = kept(socket, &raw mut first);
    if connection.is_null() {
        // SAFETY: `skb` is the program's context.
        trouble::unmeasured_request(unsafe { bpf_skb_cgroup_id(skb) });
        return None;
    }
    Some(connection)
}

/// What is kept with the socket; null when nothing is and there is nothing to begin with, or no memory for it.
#[inline(always)]
fn kept(socket: *mut bpf_sock, first: *mut Connection) -> *mut Connection {
    let flags = if first.is_null() { 0 } else { u64::from(BPF_SK_STORAGE_GET_F_CREATE) };
    let map = (&raw const CONNECTIONS).cast_mut().cast();
    // SAFETY: a full socket, and a value to copy or none.
    unsafe { bpf_sk_storage_get(map, socket.cast(), first.cast(), flags) }.cast()
}

#[inline(always)]
fn full_socket(skb: *mut __sk_buff) -> *mut bpf_sock {
    // SAFETY: the program's context; the verifier makes sure that the pointer is looked at before it is used.
    unsafe {
        let any = (*skb).__bindgen_anon_2.sk;
        if any.is_null() { any } else { bpf_sk_fullsock(any) }
    }
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
fn round_trip_us(socket: *mut bpf_sock) -> Option<u32> {
    // SAFETY: a full socket; the verifier makes sure that the result is looked at before it is used.
    unsafe {
        let tcp = bpf_tcp_sock(socket);
        // The kernel keeps eight times the value.
        if tcp.is_null() { None } else { Some((*tcp).srtt_us >> 3) }
    }
}

#[inline(always)]
fn length(skb: *mut __sk_buff) -> u32 {
    // SAFETY: the program's context.
    unsafe { (*skb).len }
}

/// Packets on the wire: a large buffer is cut into segments later, or was joined from them before.
#[inline(always)]
fn packets(skb: *mut __sk_buff) -> u64 {
    // SAFETY: the program's context.
    let segments = unsafe { (*skb).gso_segs };
    if segments == 0 { 1 } else { u64::from(segments) }
}

struct Tcp {
    payload: bool,
    flags: u8,
}

impl Tcp {
    /// `None` for anything but TCP directly inside IPv4 or IPv6.
    #[inline(always)]
    fn of(skb: *mut __sk_buff) -> Option<Self> {
        // Enough for the version, the header length and the protocol of both.
        let ip: [u8; 12] = load(skb, 0)?;
        let header: u32 = match ip[0] >> 4 {
            4 if u32::from(ip[9]) == PROTOCOL_TCP => u32::from(ip[0] & 0x0f) * 4,
            6 if u32::from(ip[6]) == PROTOCOL_TCP => 40,
            _ => return None,
        };
        // Data offset and flags.
        let tcp: [u8; 2] = load(skb, header + 12)?;
        let headers = header + u32::from(tcp[0] >> 4) * 4;
        Some(Self { payload: length(skb) > headers, flags: tcp[1] })
    }
}

/// From the packet itself where its beginning lies in one piece, as that of nearly all does; else by a helper.
#[inline(always)]
fn load<const N: usize>(skb: *mut __sk_buff, offset: u32) -> Option<[u8; N]> {
    // SAFETY: the program's context. What is read lies before the packet's end, which the verifier asks for too.
    unsafe {
        let (begin, end) = ((*skb).data as usize, (*skb).data_end as usize);
        let at = begin + offset as usize;
        if at + N <= end {
            return Some(core::ptr::read_unaligned(at as *const [u8; N]));
        }
    }
    let mut bytes = [0u8; N];
    // SAFETY: the destination is N bytes long; the helper checks the offset.
    let result = unsafe { bpf_skb_load_bytes(skb.cast(), offset, bytes.as_mut_ptr().cast(), N as u32) };
    if result == 0 { Some(bytes) } else { None }
}
