//! Processes killed for want of memory.

use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;
use warmswap_events::{ARG_MISSING, Class, LANE_OTHER, UID_UNKNOWN};

use crate::cgroup;
use crate::emit::{Context, emit_urgent};
use crate::maps::{add_shared, counters, cpu, layout};
use crate::read;

#[raw_tracepoint(tracepoint = "mark_victim")]
pub(crate) fn out_of_memory(ctx: RawTracePointContext) -> i32 {
    let cpu = cpu();
    // Newer kernels give the victim; older ones only its pid, and then the kill is charged to whoever asked for
    // memory: the same cgroup when a limit of the cgroup was met.
    let (pid, owner, uid) = if layout!(arg_oom_task) == ARG_MISSING {
        (ctx.arg::<u32>(0), cgroup::of_current(cpu, LANE_OTHER), UID_UNKNOWN)
    } else {
        let task: u64 = ctx.arg(0);
        let pid = read::at(task, layout!(task_tgid)).unwrap_or(0);
        (pid, cgroup::of_task(cpu, LANE_OTHER, task), user_of(task).unwrap_or(UID_UNKNOWN))
    };
    if let Some(counters) = counters(owner.slot, cpu) {
        add_shared!(counters, oom_kills, 1);
    }
    emit_urgent(&ctx, Class::Oom, owner, Context::User(uid), [u64::from(pid), 0]);
    0
}

#[inline(always)]
fn user_of(task: u64) -> Option<u32> {
    read::at(read::pointer(task, layout!(task_cred))?, layout!(cred_uid))
}
