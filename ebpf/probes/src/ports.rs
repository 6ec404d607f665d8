//! Lets the generations of a service bind the same port, each by itself: `SO_REUSEPORT` is set on a TCP socket as a program
//! binds it. The kernel then spreads new connections over both, and hands what waits in the queue of one that closes to
//! the other (`net.ipv4.tcp_migrate_req`, which is set in the network namespace of a service).
//!
//! The only programs here that change what the kernel does. They are attached to the cgroups of services alone, never to
//! the root. What they cannot set stays unset, and the bind is as it was: it is never refused here.

use aya_ebpf::helpers::generated::bpf_setsockopt;
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use warmswap_events::{PORT_REFUSED, PORT_SHARED};

use crate::maps::{PORTS, add_atomic};

const GO_ON: i32 = 1;

const SOCK_STREAM: u32 = 1;
const SOL_SOCKET: i32 = 1;
const SO_REUSEPORT: i32 = 15;

#[cgroup_sock_addr(bind4)]
pub(crate) fn share_port_v4(ctx: SockAddrContext) -> i32 {
    share(&ctx)
}

#[cgroup_sock_addr(bind6)]
pub(crate) fn share_port_v6(ctx: SockAddrContext) -> i32 {
    share(&ctx)
}

#[inline(always)]
fn share(ctx: &SockAddrContext) -> i32 {
    // SAFETY: a field of the program's context.
    if unsafe { (*ctx.sock_addr).type_ } != SOCK_STREAM {
        return GO_ON;
    }
    let mut on = 1_u32;
    // SAFETY: the program's context, and an option of four bytes that lives through the call.
    let result = unsafe {
        bpf_setsockopt(ctx.sock_addr.cast(), SOL_SOCKET, SO_REUSEPORT, (&raw mut on).cast(), size_of::<u32>() as i32)
    };
    // Linux before 6.1 does not know this option here.
    if let Some(count) = PORTS.get_ptr_mut(if result == 0 { PORT_SHARED } else { PORT_REFUSED }) {
        add_atomic(count, 1);
    }
    GO_ON
}
