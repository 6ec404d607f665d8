//! UDP: datagrams and their bytes, without headers, at functions of the kernel that TCP does not pass.

use aya_ebpf::macros::kprobe;
use aya_ebpf::programs::ProbeContext;

use crate::maps::{add_shared, counters, cpu, layout};
use crate::{cgroup, read};

const PROTOCOL_UDP: u16 = 17;
const HEADERS_V4: u32 = 20 + 8;
const HEADERS_V6: u32 = 40 + 8;

/// `__udp_enqueue_schedule_skb(sock, skb)`: without headers already.
#[kprobe]
pub(crate) fn datagram_in(ctx: ProbeContext) -> u32 {
    if let (Some(sock), Some(skb)) = (ctx.arg(0), ctx.arg(1)) {
        let cpu = cpu();
        if let Some(counters) = counters(cgroup::of_any_sock(cpu, sock), cpu) {
            add_shared!(counters, rx_packets, datagrams(skb));
            add_shared!(counters, rx_bytes, u64::from(length(skb)));
        }
    }
    0
}

/// `ip_send_skb(net, skb)`
#[kprobe]
pub(crate) fn datagram_out_v4(ctx: ProbeContext) -> u32 {
    if let Some(skb) = ctx.arg(1) {
        leaves(skb, HEADERS_V4);
    }
    0
}

/// `ip6_send_skb(skb)`
#[kprobe]
pub(crate) fn datagram_out_v6(ctx: ProbeContext) -> u32 {
    if let Some(skb) = ctx.arg(0) {
        leaves(skb, HEADERS_V6);
    }
    0
}

#[inline(always)]
fn leaves(skb: u64, headers: u32) {
    let Some(sock) = read::pointer(skb, layout!(skb_sock)) else { return };
    if read::at(sock, layout!(sock_protocol)) != Some(PROTOCOL_UDP) {
        return;
    }
    let cpu = cpu();
    if let Some(counters) = counters(cgroup::of_any_sock(cpu, sock), cpu) {
        let datagrams = datagrams(skb);
        add_shared!(counters, tx_packets, datagrams);
        // Of many in one buffer there is one header.
        add_shared!(counters, tx_bytes, u64::from(length(skb).saturating_sub(headers)));
    }
}

#[inline(always)]
fn length(skb: u64) -> u32 {
    read::at(skb, layout!(skb_length)).unwrap_or_default()
}

/// In this buffer: it is cut later, or was joined before.
#[inline(always)]
fn datagrams(skb: u64) -> u64 {
    let segments = || {
        let shared = read::pointer(skb, layout!(skb_head))?.wrapping_add(u64::from(read::at::<u32>(skb, layout!(skb_end))?));
        read::at::<u16>(shared, layout!(shared_segments))
    };
    segments().map_or(1, |segments| u64::from(segments.max(1)))
}
