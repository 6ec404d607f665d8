//! The end of system calls: reads of terminals and input devices, and handover marks where the kernel shows them nowhere
//! else.
//!
//! A program here costs every call of the host some 100 ns, most of them the kernel's own for leaving its fast path; so it is
//! attached only while somebody watched can read input, or for marks. The exit and not the entry, because only there the
//! bytes are known. The numbers of 32-bit programs' calls are not understood.

use aya_ebpf::EbpfContext;
use aya_ebpf::macros::{btf_tracepoint, raw_tracepoint};
use aya_ebpf::programs::{BtfTracePointContext, RawTracePointContext};
use warmswap_events::{InputDevice, LANE_SYSCALL, OFFSET_MISSING, SYSCALL_TABLE, SyscallKind};

use crate::input;
use crate::maps::{CONTROL, SYSCALLS, add, counters, cpu, layout};
use crate::{cgroup, mark, read};

const READ: u8 = SyscallKind::Read as u8;
const READ_VECTOR: u8 = SyscallKind::ReadVector as u8;
const PRCTL: u8 = SyscallKind::Prctl as u8;

/// The kernel's `struct pt_regs *`, and how to read it.
#[derive(Clone, Copy)]
pub(crate) enum Registers {
    /// A pointer whose type the verifier knows: read like any memory.
    Typed(u64),
    /// Any pointer: read by a helper.
    Raw(u64),
}

impl Registers {
    /// The word at an offset of [`crate::maps::LAYOUT`]; `None` where the kernel's registers are not known.
    #[inline(always)]
    pub(crate) fn at(self, offset: u32) -> Option<u64> {
        match self {
            Self::Typed(_) if offset == OFFSET_MISSING => None,
            Self::Typed(regs) => Some(read::typed(regs, offset)),
            Self::Raw(regs) => read::at(regs, offset),
        }
    }
}

/// Registers are read without a helper, which is half of what this program costs.
#[btf_tracepoint(function = "sys_exit")]
pub(crate) fn system_call_typed(ctx: BtfTracePointContext) -> i32 {
    handle(&ctx, Registers::Typed(ctx.arg(0)), ctx.arg(1))
}

/// Where the kernel refuses the typed one.
#[raw_tracepoint(tracepoint = "sys_exit")]
pub(crate) fn system_call(ctx: RawTracePointContext) -> i32 {
    handle(&ctx, Registers::Raw(ctx.arg(0)), ctx.arg(1))
}

#[inline(always)]
fn handle(program: &impl EbpfContext, regs: Registers, result: i64) -> i32 {
    let kind = kind(regs);
    let reads = kind == READ || kind == READ_VECTOR;
    if !reads && kind != PRCTL {
        return 0;
    }
    let cpu = cpu();
    let owner = cgroup::of_current(cpu, LANE_SYSCALL);
    if kind == PRCTL {
        if marks_are_seen_here() {
            mark::on_prctl(program, regs, || owner);
        }
        return 0;
    }
    if result <= 0 {
        return 0;
    }
    let Some(counters) = counters(owner.slot, cpu) else { return 0 };
    match input::source(regs, result as u64, owner) {
        Some(InputDevice::Terminal) => add!(counters, tty_inputs, 1),
        Some(InputDevice::Device) => {
            add!(counters, device_inputs, 1);
            if kind == READ
                && let Some(buffer) = regs.at(layout!(regs_arg[1]))
            {
                let turns = input::turns(buffer, result as u64, owner.cgroup, owner.slot);
                add!(counters, orientation_changes, turns);
            }
        }
        None => {}
    }
    0
}

#[inline(always)]
fn marks_are_seen_here() -> bool {
    // SAFETY: the lookup succeeded; the sensor changes the word whole.
    CONTROL
        .get_ptr(0)
        .is_some_and(|control| unsafe { core::ptr::read_volatile(&raw const (*control).marks_at_exit) } != 0)
}

#[inline(always)]
fn kind(regs: Registers) -> u8 {
    match regs.at(layout!(regs_syscall)) {
        // SAFETY: the index is inside the table; volatile because the loader fills it.
        Some(number) if number < SYSCALL_TABLE as u64 => unsafe {
            core::ptr::read_volatile((&raw const SYSCALLS).cast::<u8>().add(number as usize))
        },
        _ => 0,
    }
}
