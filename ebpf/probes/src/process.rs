//! Processes: exec, fork, exit. Threads are neither counted nor sent.

use aya_ebpf::helpers::generated::{bpf_get_current_pid_tgid, bpf_get_current_task};
use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;
use warmswap_events::{Class, LANE_OTHER};

use crate::cgroup;
use crate::emit::{Context, emit, emit_exec, now_ns, wanted};
use crate::maps::{add_shared, counters, cpu, layout};
use crate::{read, trouble};

#[raw_tracepoint(tracepoint = "sched_process_exec")]
pub(crate) fn process_exec(ctx: RawTracePointContext) -> i32 {
    let cpu = cpu();
    let owner = cgroup::of_current(cpu, LANE_OTHER);
    if let Some(counters) = counters(owner.slot, cpu) {
        add_shared!(counters, execs, 1);
    }
    if wanted(Class::Exec, owner, Context::Process) {
        // The third argument on every kernel so far; the sensor says so after looking at BTF.
        let path =
            if layout!(arg_exec_binprm) == 2 { read::pointer(ctx.arg(2), layout!(binprm_filename)) } else { None };
        emit_exec(owner, path, first_argument());
    }
    0
}

/// Where the first argument of the running process is, in its own memory. The kernel has just put it there.
#[inline(always)]
fn first_argument() -> Option<u64> {
    // SAFETY: the helper has no preconditions.
    let memory = read::pointer(unsafe { bpf_get_current_task() }, layout!(task_mm))?;
    read::pointer(memory, layout!(mm_arg_start))
}

#[raw_tracepoint(tracepoint = "sched_process_fork")]
pub(crate) fn process_fork(ctx: RawTracePointContext) -> i32 {
    // (parent, child); charged to the parent's cgroup, where it happened.
    let child: u64 = ctx.arg(1);
    let (Some(pid), Some(tgid)) =
        (read::at::<u32>(child, layout!(task_pid)), read::at::<u32>(child, layout!(task_tgid)))
    else {
        // SAFETY: the helper has no preconditions.
        trouble::unread_fork(unsafe { bpf_get_current_pid_tgid() } >> 32);
        return 0;
    };
    if pid != tgid {
        return 0;
    }
    let cpu = cpu();
    let owner = cgroup::of_current(cpu, LANE_OTHER);
    if let Some(counters) = counters(owner.slot, cpu) {
        add_shared!(counters, forks, 1);
    }
    if wanted(Class::Fork, owner, Context::Process) {
        emit(Class::Fork, owner, Context::Process, [u64::from(pid), 0]);
    }
    0
}

#[raw_tracepoint(tracepoint = "sched_process_exit")]
pub(crate) fn process_exit(_ctx: RawTracePointContext) -> i32 {
    // SAFETY: the helper has no preconditions.
    let pid_tgid = unsafe { bpf_get_current_pid_tgid() };
    if pid_tgid as u32 != (pid_tgid >> 32) as u32 {
        return 0;
    }
    let cpu = cpu();
    let owner = cgroup::of_current(cpu, LANE_OTHER);
    if let Some(counters) = counters(owner.slot, cpu) {
        add_shared!(counters, exits, 1);
    }
    if wanted(Class::Exit, owner, Context::Process) {
        // SAFETY: the helper has no preconditions.
        let task = unsafe { bpf_get_current_task() };
        let code = read::at::<u32>(task, layout!(task_exit_code)).unwrap_or(0);
        let age_ns = read::at::<u64>(task, layout!(task_start_time)).map_or(0, |began| now_ns().wrapping_sub(began));
        emit(Class::Exit, owner, Context::Process, [u64::from(code), age_ns]);
    }
    0
}
