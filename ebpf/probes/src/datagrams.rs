//! UDP: datagrams and their bytes, without headers, at functions of the kernel that TCP does not pass.

use aya_ebpf::macros::fentry;
use aya_ebpf::programs::FEntryContext;

use crate::maps::{add_shared, counters, cpu, layout};
use crate::{cgroup, read};

const PROTOCOL_UDP: u16 = 17;
const HEADERS_V4: u32 = 20 + 8;
const HEADERS_V6: u32 = 40 + 8;

/// `__udp_enqueue_schedule_skb(sock, skb)`: without headers already.
#[fentry(function = "__udp_enqueue_schedule_skb")]
pub(crate) fn datagram_in(ctx: FEntryContext) -> i32 {
    let (sock, skb): (u64, u64) = (ctx.arg(0), ctx.arg(1));
    let cpu = cpu();
    if let Some(counters) = counters(cgroup::of_any_sock(cpu, sock), cpu) {
        add_shared!(counters, rx_packets, datagrams(skb));
        add_shared!(counters, rx_bytes, u64::from(length(skb)));
    }
    0
}

/// `ip_send_skb(net, skb)`
#[fentry(function = "ip_send_skb")]
pub(crate) fn datagram_out_v4(ctx: FEntryContext) -> i32 {
    leaves(ctx.arg(1), HEADERS_V4);
    0
}

/// `ip6_send_skb(skb)`
#[fentry(function = "ip6_send_skb")]
pub(crate) fn datagram_out_v6(ctx: FEntryContext) -> i32 {
    leaves(ctx.arg(0), HEADERS_V6);
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
        add_shared!(counters, tx_packets, datagrams(skb));
        // Many in one buffer have one header.
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
        let end = read::at::<u32>(skb, layout!(skb_end))?;
        let shared = read::pointer(skb, layout!(skb_head))?.wrapping_add(u64::from(end));
        read::at::<u16>(shared, layout!(shared_segments))
    };
    segments().map_or(1, |segments| u64::from(segments.max(1)))
}
