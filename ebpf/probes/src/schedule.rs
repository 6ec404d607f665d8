//! Run time per cgroup, from switches. Who runs right now is left in `RUNNING`, so that user space can charge a
//! process that never gives up its CPU.
//!
//! And what the kernel itself keeps per task: how long it waited for a CPU, and its major faults. Each is read as the task
//! gets a CPU and as it leaves it; the difference is this turn's. The kernel adds the wait for a turn after the first reading.
//! What a task waited on one CPU before it was moved to another is in the first reading already, and counts for nobody.

use aya_ebpf::macros::{btf_tracepoint, raw_tracepoint};
use aya_ebpf::programs::{BtfTracePointContext, RawTracePointContext};
use warmswap_events::{LANE_SWITCH, OFFSET_MISSING};

use crate::cgroup::{self, Owner};
use crate::emit::now_ns;
use crate::maps::{RUNNING, add, counters, cpu, layout};
use crate::read;

/// What the kernel has counted in all of a task's life.
#[derive(Clone, Copy)]
struct Life {
    run_delay_ns: u64,
    major_faults: u64,
}

impl Life {
    /// 0 stands for what this kernel does not count.
    #[inline(always)]
    fn of(word: impl Fn(u32) -> u64) -> Self {
        let word = |offset| if offset == OFFSET_MISSING { 0 } else { word(offset) };
        Self { run_delay_ns: word(layout!(task_run_delay)), major_faults: word(layout!(task_major_faults)) }
    }

    #[inline(always)]
    fn of_typed_task(task: u64) -> Self {
        // SAFETY: the verifier has checked that this lies inside the task.
        Self::of(|offset| unsafe { core::ptr::read_volatile(task.wrapping_add(u64::from(offset)) as *const u64) })
    }

    #[inline(always)]
    fn of_task(task: u64) -> Self {
        Self::of(|offset| read::at(task, offset).unwrap_or(0))
    }
}

/// The next task's cgroup is read without helpers, which are most of what the other program costs.
#[btf_tracepoint(function = "sched_switch")]
pub(crate) fn switch_typed(ctx: BtfTracePointContext) -> i32 {
    let cpu = cpu();
    // (preempt, prev, next, …); where BTF says otherwise the sensor attaches neither program.
    let (previous, next) = (ctx.arg(1), ctx.arg(2));
    let lives = (Life::of_typed_task(previous), Life::of_typed_task(next));
    switched(cpu, cgroup::of_typed_task(cpu, LANE_SWITCH, next), lives)
}

/// Where the kernel refuses the typed one.
#[raw_tracepoint(tracepoint = "sched_switch")]
pub(crate) fn switch(ctx: RawTracePointContext) -> i32 {
    let cpu = cpu();
    let (previous, next) = (ctx.arg(1), ctx.arg(2));
    switched(cpu, cgroup::of_task(cpu, LANE_SWITCH, next), (Life::of_task(previous), Life::of_task(next)))
}

#[inline(always)]
fn switched(cpu: u32, next: Owner, (left, gets): (Life, Life)) -> i32 {
    let Some(running) = RUNNING.get_ptr_mut(cpu) else { return 0 };
    let now = now_ns();
    // SAFETY: the lookup succeeded; only this program on this CPU writes here, with interrupts off.
    let (since, slot, before) = unsafe {
        let before = Life { run_delay_ns: (*running).run_delay_ns, major_faults: (*running).major_faults };
        ((*running).since_ns, (*running).slot, before)
    };
    if let Some(counters) = counters(slot as u32, cpu) {
        add!(counters, run_ns, now.wrapping_sub(since));
        add!(counters, run_delay_ns, left.run_delay_ns.saturating_sub(before.run_delay_ns));
        add!(counters, major_faults, left.major_faults.saturating_sub(before.major_faults));
    }
    // In the order that `Running` promises its reader.
    // SAFETY: as above.
    unsafe {
        core::ptr::write_volatile(&raw mut (*running).slot, 0);
        core::ptr::write_volatile(&raw mut (*running).since_ns, now);
        (*running).run_delay_ns = gets.run_delay_ns;
        (*running).major_faults = gets.major_faults;
        core::ptr::write_volatile(&raw mut (*running).slot, u64::from(next.slot));
    }
    0
}
