//! TCP: connections opened, accepted and closed, every change of state, resets sent and received, segments sent again.

use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;
use warmswap_events::{Class, UID_UNKNOWN};

use crate::emit::{Context, emit, subscribed, wanted};
use crate::maps::{add_shared, counters, cpu, layout};
use crate::{cgroup, network, read};

pub(crate) const PROTOCOL_TCP: u16 = 6;

pub(crate) const ESTABLISHED: u32 = 1;
const SYN_SENT: u32 = 2;
const SYN_RECV: u32 = 3;
const FIN_WAIT_1: u32 = 4;
const TIME_WAIT: u32 = 6;
const CLOSE: u32 = 7;
const CLOSE_WAIT: u32 = 8;
const LAST_ACK: u32 = 9;
const LISTEN: u32 = 10;
const NEW_SYN_RECV: u32 = 12;

#[raw_tracepoint(tracepoint = "inet_sock_set_state")]
pub(crate) fn tcp_state(ctx: RawTracePointContext) -> i32 {
    let (old, new) = (ctx.arg::<u32>(1), ctx.arg::<u32>(2));
    // Other states are only told.
    if !matches!(new, ESTABLISHED | SYN_SENT | FIN_WAIT_1 | LAST_ACK | CLOSE) && !subscribed(Class::Tcp) {
        return 0;
    }
    let sock: u64 = ctx.arg(0);
    if read::at::<u16>(sock, layout!(sock_protocol)).is_some_and(|protocol| protocol != PROTOCOL_TCP) {
        return 0;
    }
    let cpu = cpu();
    let owner = cgroup::of_sock(cpu, sock);
    // Before the end of what is sent takes a number of its own.
    if matches!((old, new), (_, FIN_WAIT_1 | LAST_ACK) | (ESTABLISHED | CLOSE_WAIT, CLOSE)) {
        network::closes(sock, owner.slot);
    }
    if new == CLOSE && old != LISTEN {
        network::ends(sock, cpu);
    }
    if let Some(counters) = counters(owner.slot, cpu) {
        if new == ESTABLISHED {
            add_shared!(counters, tcp_opened, 1);
            if old == SYN_RECV {
                add_shared!(counters, accepts, 1);
                network::begins(sock, owner.slot, false);
            }
        } else if new == SYN_SENT {
            network::begins(sock, owner.slot, true);
        } else if new == CLOSE
            && old != CLOSE
            && old != LISTEN
            && old != SYN_SENT
            && old != SYN_RECV
            && old != NEW_SYN_RECV
        {
            add_shared!(counters, tcp_closed, 1);
        }
    }
    if wanted(Class::Tcp, owner, Context::NOBODY) {
        emit(Class::Tcp, owner, user_of(sock), [u64::from((old << 8) | (new & 0xff)), ports(sock)]);
    }
    0
}

#[raw_tracepoint(tracepoint = "tcp_send_reset")]
pub(crate) fn tcp_reset_sent(ctx: RawTracePointContext) -> i32 {
    // Null when the reset answers a packet that belongs to no socket.
    reset(ctx.arg(0), true)
}

#[raw_tracepoint(tracepoint = "tcp_receive_reset")]
pub(crate) fn tcp_reset_received(ctx: RawTracePointContext) -> i32 {
    reset(ctx.arg(0), false)
}

#[inline(always)]
fn reset(sock: u64, sent: bool) -> i32 {
    if sock == 0 || !is_full(sock) {
        return 0;
    }
    let cpu = cpu();
    let owner = cgroup::of_sock(cpu, sock);
    if let Some(counters) = counters(owner.slot, cpu) {
        if sent {
            add_shared!(counters, tcp_resets, 1);
        } else {
            add_shared!(counters, tcp_resets_received, 1);
        }
    }
    if wanted(Class::TcpReset, owner, Context::NOBODY) {
        emit(Class::TcpReset, owner, user_of(sock), [if sent { 1 } else { 2 }, ports(sock)]);
    }
    0
}

#[raw_tracepoint(tracepoint = "tcp_retransmit_skb")]
pub(crate) fn tcp_retransmitted(ctx: RawTracePointContext) -> i32 {
    let sock: u64 = ctx.arg(0);
    if !is_full(sock) {
        return 0;
    }
    let cpu = cpu();
    if let Some(counters) = counters(cgroup::of_sock(cpu, sock).slot, cpu) {
        add_shared!(counters, tcp_retransmits, 1);
    }
    0
}

/// Sockets in these two states are smaller objects without a cgroup.
#[inline(always)]
fn is_full(sock: u64) -> bool {
    !matches!(read::at::<u8>(sock, layout!(sock_state)).map(u32::from), None | Some(TIME_WAIT | NEW_SYN_RECV))
}

/// Whoever made the socket, or the one that listened for it.
#[inline(always)]
fn user_of(sock: u64) -> Context {
    Context::User(read::at(sock, layout!(sock_uid)).unwrap_or(UID_UNKNOWN))
}

/// local << 16 | remote
#[inline(always)]
fn ports(sock: u64) -> u64 {
    let local = read::at::<u16>(sock, layout!(sock_port_local)).unwrap_or(0);
    let remote = read::at::<u16>(sock, layout!(sock_port_remote)).unwrap_or(0);
    (u64::from(local) << 16) | u64::from(u16::from_be(remote))
}
