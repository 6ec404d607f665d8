//! Handover marks: a `prctl` that no kernel knows, made by whoever stops or starts serving. Its time is the kernel's,
//! so a blackout is measured with one clock whoever took part. Marks are sent from every cgroup, watched or not.
//!
//! One of three programs sees them, the first that the kernel allows: a tracepoint for just such calls (Linux 6.13), a kprobe at
//! `prctl`, or [`crate::syscall`] at the end of every system call.

use aya_ebpf::EbpfContext;
use aya_ebpf::macros::{kprobe, raw_tracepoint};
use aya_ebpf::programs::{ProbeContext, RawTracePointContext};
use warmswap_events::{Class, LANE_OTHER, MARK_OPTION};

use crate::cgroup::{self, Owner};
use crate::emit::{Context, emit_urgent};
use crate::maps::{cpu, layout};
use crate::syscall::Registers;
use crate::trouble;

#[raw_tracepoint(tracepoint = "task_prctl_unknown")]
pub(crate) fn unknown_prctl(ctx: RawTracePointContext) -> i32 {
    if is_mark(ctx.arg(0)) {
        let owner = cgroup::of_current(cpu(), LANE_OTHER);
        send(&ctx, owner, ctx.arg(1), ctx.arg(2), ctx.arg(3));
    }
    0
}

/// The kernel's function has one argument, the caller's registers.
#[kprobe]
pub(crate) fn prctl(ctx: ProbeContext) -> u32 {
    if let Some(regs) = ctx.arg(0) {
        on_prctl(&ctx, Registers::Raw(regs), || cgroup::of_current(cpu(), LANE_OTHER));
    }
    0
}

#[inline(always)]
fn is_mark(option: u64) -> bool {
    // The kernel takes the option as an int.
    option & 0xffff_ffff == MARK_OPTION
}

/// `prctl(MARK_OPTION, mark, handover, generation, 0)`
#[inline(always)]
pub(crate) fn on_prctl(program: &impl EbpfContext, regs: Registers, owner: impl FnOnce() -> Owner) {
    if !regs.at(layout!(regs_arg[0])).is_some_and(is_mark) {
        return;
    }
    let owner = owner();
    let (Some(mark), Some(handover), Some(generation)) =
        (regs.at(layout!(regs_arg[1])), regs.at(layout!(regs_arg[2])), regs.at(layout!(regs_arg[3])))
    else {
        trouble::unread_mark(owner.cgroup);
        return;
    };
    send(program, owner, mark, handover, generation);
}

#[inline(always)]
fn send(program: &impl EbpfContext, owner: Owner, mark: u64, handover: u64, generation: u64) {
    let args = [(mark << 32) | (generation & 0xffff_ffff), handover];
    emit_urgent(program, Class::Mark, owner, Context::Process, args);
}
