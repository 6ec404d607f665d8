//! The BPF programs, one file per class of events. What is frequent is counted here, in the kernel, per watched
//! cgroup; what is rare is sent through one of two rings (see `warmswap-events`).
//!
//! Not here: any decision about what the numbers mean. No program changes what the kernel does, but for those in `ports`,
//! which are no probes.
//!
//! Rules of this crate: no helper and no map type newer than Linux 5.10; loops are bounded by small constants; struct
//! offsets come from [`maps::LAYOUT`], never from a compile-time header; a field that is missing on a kernel
//! switches off only what needs it.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(core_intrinsics), allow(internal_features))]

#[cfg(target_arch = "bpf")]
mod block;
#[cfg(target_arch = "bpf")]
mod cgroup;
#[cfg(target_arch = "bpf")]
mod datagrams;
#[cfg(target_arch = "bpf")]
mod emit;
#[cfg(target_arch = "bpf")]
mod input;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod mark;
#[cfg(target_arch = "bpf")]
mod memory;
#[cfg(target_arch = "bpf")]
mod network;
#[cfg(target_arch = "bpf")]
mod ports;
#[cfg(target_arch = "bpf")]
mod process;
#[cfg(target_arch = "bpf")]
mod read;
#[cfg(target_arch = "bpf")]
mod syscall;
#[cfg(target_arch = "bpf")]
mod tasks;
#[cfg(target_arch = "bpf")]
mod tcp;
#[cfg(target_arch = "bpf")]
mod trouble;

/// The helpers used are free to call from programs under any licence except those marked GPL-only
/// (`probe_read_kernel` and others), for which the kernel asks for this word; dual licensing is among those it accepts.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: there is no panicking operation in this crate, and a program with this endless loop in it would
    // be refused by the verifier.
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
