//! System calls: how many, the bytes read and written through descriptors, and the connections accepted.
//!
//! One program on `sys_exit` does it all, because every program on that path costs 25 ns per call whatever it does.
//! The exit and not the entry, because only there the bytes are known, and because a seccomp filter that answers
//! instead of the kernel hides the entry. Calls that never return (`exit`, a successful `rt_sigreturn`) are missed
//! or counted without a number. Calls of 32-bit programs are counted but their numbers are not understood.

use aya_ebpf::macros::{btf_tracepoint, raw_tracepoint};
use aya_ebpf::programs::{BtfTracePointContext, RawTracePointContext};
use warmswap_events::{LANE_SYSCALL, OFFSET_MISSING, SYSCALL_TABLE, SyscallKind};

use crate::input::{self, Source};
use crate::maps::{SYSCALLS, add, counters, cpu, layout};
use crate::{cgroup, mark, read};

const READ: u8 = SyscallKind::Read as u8;
const WRITE: u8 = SyscallKind::Write as u8;
const READ_VECTOR: u8 = SyscallKind::ReadVector as u8;
const PRCTL: u8 = SyscallKind::Prctl as u8;
const ACCEPT: u8 = SyscallKind::Accept as u8;

/// The kernel's `struct pt_regs *`, and how to read it.
#[derive(Clone, Copy)]
pub(crate) enum Registers {
    /// A pointer whose type the verifier knows: read like any memory.
    Typed(u64),
    /// Any pointer: read by a helper.
    Raw(u64),
}

impl Registers {
    #[inline(always)]
    fn at(self, offset: u32) -> Option<u64> {
        match self {
            // SAFETY: the verifier has checked that this is inside a struct pt_regs.
            Self::Typed(regs) => {
                Some(unsafe { core::ptr::read_volatile(regs.wrapping_add(u64::from(offset)) as *const u64) })
            }
            Self::Raw(regs) => read::at(regs, offset),
        }
    }
}

/// Registers are read without a helper, which is half of what this program costs.
#[btf_tracepoint(function = "sys_exit")]
pub(crate) fn system_call_typed(ctx: BtfTracePointContext) -> i32 {
    handle(Registers::Typed(ctx.arg(0)), ctx.arg(1))
}

/// Where the kernel refuses the typed one.
#[raw_tracepoint(tracepoint = "sys_exit")]
pub(crate) fn system_call(ctx: RawTracePointContext) -> i32 {
    handle(Registers::Raw(ctx.arg(0)), ctx.arg(1))
}

#[inline(always)]
fn handle(regs: Registers, result: i64) -> i32 {
    let cpu = cpu();
    let owner = cgroup::of_current(cpu, LANE_SYSCALL);
    let kind = kind(regs);
    if kind == PRCTL {
        mark::on_prctl(regs, owner);
    }
    let Some(counters) = counters(owner.slot, cpu) else { return 0 };
    add!(counters, syscalls, 1);
    if result < 0 {
        return 0;
    }
    if kind == READ || kind == READ_VECTOR {
        add!(counters, reads, 1);
        add!(counters, read_bytes, result as u64);
        if result > 0 {
            match input::source(regs, result as u64, owner) {
                Some(Source::Terminal) => add!(counters, tty_inputs, 1),
                Some(Source::Device) => {
                    add!(counters, device_inputs, 1);
                    if kind == READ
                        && let Some(buffer) = argument(regs, layout!(regs_arg[1]))
                    {
                        let turns = input::turns(buffer, result as u64, owner.cgroup, owner.slot);
                        add!(counters, orientation_changes, turns);
                    }
                }
                None => {}
            }
        }
    } else if kind == ACCEPT {
        add!(counters, accepts, 1);
    } else if kind == WRITE {
        add!(counters, writes, 1);
        add!(counters, write_bytes, result as u64);
    }
    0
}

#[inline(always)]
fn kind(regs: Registers) -> u8 {
    if layout!(regs_syscall) == OFFSET_MISSING {
        return 0;
    }
    match regs.at(layout!(regs_syscall)) {
        // SAFETY: the index is inside the table; volatile because the loader fills it.
        Some(number) if number < SYSCALL_TABLE as u64 => unsafe {
            core::ptr::read_volatile((&raw const SYSCALLS).cast::<u8>().add(number as usize))
        },
        _ => 0,
    }
}

/// The argument at this offset of [`crate::maps::LAYOUT`], when the kernel's registers are known.
#[inline(always)]
pub(crate) fn argument(regs: Registers, offset: u32) -> Option<u64> {
    if offset == OFFSET_MISSING { None } else { regs.at(offset) }
}
