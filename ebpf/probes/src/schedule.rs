//! Run time per cgroup, from switches. Who runs right now is left in `RUNNING`, so that user space can charge a
//! process that never gives up its CPU.

use aya_ebpf::macros::{btf_tracepoint, raw_tracepoint};
use aya_ebpf::programs::{BtfTracePointContext, RawTracePointContext};
use warmswap_events::LANE_SWITCH;

use crate::cgroup::{self, Owner};
use crate::emit::now_ns;
use crate::maps::{RUNNING, add, counters, cpu};

/// The next task's cgroup is read without helpers, which are most of what the other program costs.
#[btf_tracepoint(function = "sched_switch")]
pub(crate) fn switch_typed(ctx: BtfTracePointContext) -> i32 {
    let cpu = cpu();
    // (preempt, prev, next, …); where BTF says otherwise the sensor attaches neither program.
    switched(cpu, cgroup::of_typed_task(cpu, LANE_SWITCH, ctx.arg(2)))
}

/// Where the kernel refuses the typed one.
#[raw_tracepoint(tracepoint = "sched_switch")]
pub(crate) fn switch(ctx: RawTracePointContext) -> i32 {
    let cpu = cpu();
    switched(cpu, cgroup::of_task(cpu, LANE_SWITCH, ctx.arg(2)))
}

#[inline(always)]
fn switched(cpu: u32, next: Owner) -> i32 {
    let Some(running) = RUNNING.get_ptr_mut(cpu) else { return 0 };
    let now = now_ns();
    // SAFETY: the lookup succeeded; only this program on this CPU writes here, with interrupts off.
    let (since, slot) = unsafe { ((*running).since_ns, (*running).slot) };
    if let Some(counters) = counters(slot as u32, cpu) {
        add!(counters, run_ns, now.wrapping_sub(since));
    }
    // In the order that `Running` promises its reader.
    // SAFETY: as above.
    unsafe {
        core::ptr::write_volatile(&raw mut (*running).slot, 0);
        core::ptr::write_volatile(&raw mut (*running).since_ns, now);
        core::ptr::write_volatile(&raw mut (*running).slot, u64::from(next.slot));
    }
    0
}
