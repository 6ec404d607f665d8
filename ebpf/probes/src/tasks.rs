//! What the kernel counts for each task anyway, taken over: time on a CPU, the wait for it, reads and writes, page faults.
//! Nothing is paid per call, fault or switch.
//!
//! ```text
//!  sensor wants a window    walk    every task ┐
//!  a task moves             moved        it    ├ its counters now − TASKS[task] ─▶ COUNTERS
//!  a task begins to end     ends         it    │
//!  a task is gone           gone         it    ┘ the time that it ran meanwhile
//! ```
//!
//! A task that is not in `TASKS` was born since the last walk, with counters of zero; or it was somewhere else before, or there
//! before anybody watched: then it counts from now on. One that is born and ends between two walks is never in it. Tasks are told
//! apart by their address: a thread that starts a program takes the number and the birthday of its process.

use core::ffi::c_void;

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::macros::btf_tracepoint;
use aya_ebpf::programs::BtfTracePointContext;
use warmswap_events::OFFSET_MISSING;

use crate::maps::{EXISTS, SINCE, TASKS, add_shared, counters, cpu, layout};
use crate::read::{typed, typed_pointer};
use crate::{cgroup, trouble};

/// What a task has counted. Of some the lower half, where that is all that is kept.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Counted {
    run_ns: u64,
    run_delay_ns: u64,
    read_bytes: u64,
    write_bytes: u64,
    reads: u32,
    writes: u32,
    minor_faults: u32,
    major_faults: u32,
}

/// A task of a watched cgroup.
#[repr(C)]
pub(crate) struct Task {
    /// When it came from another cgroup, 0 when it did not.
    moved_ns: u64,
    /// Whose it was, as what it had counted was charged, and since when that one is watched.
    slot: u64,
    since_ns: u64,
    charged: Counted,
}

/// Most of what a task may have done it has not. Two that look at once may be out of order: then nothing was added.
macro_rules! add_since {
    ($counters:expr, $field:ident, $before:expr, $now:expr, $signed:ty) => {
        let more = $now.wrapping_sub($before);
        if more as $signed > 0 {
            add_shared!($counters, $field, u64::from(more));
        }
    };
}

/// Why a task is looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Occasion {
    Walk,
    /// It has come to where it is.
    Moved,
    /// No walk will look at it any more.
    Ends,
}

/// What the kernel passes for each task, and once more with none at the end.
#[repr(C)]
pub(crate) struct EachTask {
    _meta: *mut c_void,
    task: *mut c_void,
}

/// Of the flags of a task the one that says that it has begun to end.
const ENDING: u32 = 0x4;

#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task")]
pub(crate) extern "C" fn walk(each: *mut EachTask) -> i32 {
    // SAFETY: the program's context.
    let task = unsafe { (*each).task } as u64;
    // Who is about to end looks at itself.
    if task != 0 && typed::<u32>(task, layout!(task_flags)) & ENDING == 0 {
        look_at(task, Occasion::Walk);
    }
    0
}

/// After it has moved; of a process with several threads the kernel names one.
#[btf_tracepoint(function = "cgroup_attach_task")]
pub(crate) fn task_moved(ctx: BtfTracePointContext) -> i32 {
    look_at(ctx.arg(2), Occasion::Moved);
    0
}

/// So that who waits for it finds counted what it did.
#[btf_tracepoint(function = "sched_process_exit")]
pub(crate) fn task_ends(ctx: BtfTracePointContext) -> i32 {
    look_at(ctx.arg(0), Occasion::Ends);
    0
}

/// A grace period after it was waited for.
#[btf_tracepoint(function = "sched_process_free")]
pub(crate) fn task_gone(ctx: BtfTracePointContext) -> i32 {
    let task: u64 = ctx.arg(0);
    let cpu = cpu();
    let key = task;
    let (slot, run_ns, run_delay_ns) = if let Some(known) = TASKS.get_ptr(&key) {
        // SAFETY: the lookup succeeded.
        let known = unsafe { &*known };
        let slot = known.slot as u32;
        let slot = if known.since_ns == since(slot) { slot } else { 0 };
        let before = (slot, known.charged.run_ns, known.charged.run_delay_ns);
        // Fails only when it is not there.
        let _ = TASKS.remove(&key);
        before
    } else {
        let slot = cgroup::of_any_task(cpu, task);
        (if slot != 0 && born_here(task, slot) { slot } else { 0 }, 0, 0)
    };
    if let Some(counters) = counters(slot, cpu) {
        add_since!(counters, run_ns, run_ns, count(task, layout!(task_run_time)), i64);
        add_since!(counters, run_delay_ns, run_delay_ns, count(task, layout!(task_run_delay)), i64);
    }
    0
}

#[inline(always)]
fn look_at(task: u64, occasion: Occasion) {
    let cpu = cpu();
    let slot = cgroup::of_any_task(cpu, task);
    // A copy: to the verifier a pointer that lies where a helper has read is a number from then on.
    let key = task;
    let known = TASKS.get_ptr_mut(&key);
    if slot == 0 && known.is_none() {
        return;
    }
    let now = counted(task);
    if let Some(known) = known {
        // SAFETY: the lookup succeeded. Two that look at one task at once, as it moves or ends, may charge a moment of it twice.
        let (whose, since_ns, before) = unsafe {
            let before = ((*known).slot as u32, (*known).since_ns, (*known).charged);
            if (now.run_ns.wrapping_sub(before.2.run_ns) as i64) < 0 {
                // Somebody who looked later was faster.
                return;
            }
            (*known).charged = now;
            (*known).slot = u64::from(slot);
            (*known).since_ns = since(slot);
            if occasion == Occasion::Moved && before.0 != slot {
                (*known).moved_ns = bpf_ktime_get_ns();
            }
            before
        };
        // The slot may be another one's by now.
        if since(whose) == since_ns {
            charge(whose, cpu, &before, &now);
        }
        if slot == 0 {
            // Fails only when it is not there.
            let _ = TASKS.remove(&key);
        }
        return;
    }
    let born_here = occasion != Occasion::Moved && born_here(task, slot);
    if occasion == Occasion::Ends {
        if born_here {
            // How long it ran is known when it is gone.
            let before = Counted { run_ns: now.run_ns, run_delay_ns: now.run_delay_ns, ..Counted::default() };
            charge(slot, cpu, &before, &now);
        }
        return;
    }
    // SAFETY: the helper has no preconditions.
    let moved_ns = if occasion == Occasion::Moved { unsafe { bpf_ktime_get_ns() } } else { 0 };
    let entry = Task { moved_ns, slot: u64::from(slot), since_ns: since(slot), charged: now };
    // Of two that look at it at once for the first time one is late.
    match TASKS.insert(&key, &entry, BPF_NOEXIST.into()) {
        Ok(()) if born_here => charge(slot, cpu, &Counted::default(), &now),
        Ok(()) | Err(EXISTS) => {}
        Err(_) => trouble::uncounted_task(typed::<u32>(task, layout!(task_pid)).into()),
    }
}

/// Since when the slot is somebody's.
#[inline(always)]
fn since(slot: u32) -> u64 {
    // SAFETY: the lookup succeeded; user space writes the word before it names the slot.
    SINCE.get_ptr(slot).map_or(u64::MAX, |since| unsafe { core::ptr::read_volatile(since) })
}

/// Whether all that a task has counted was counted while it belonged to the slot.
#[inline(always)]
fn born_here(task: u64, slot: u32) -> bool {
    let born_ns: u64 = typed(task, layout!(task_start_time));
    if born_ns < since(slot) {
        return false;
    }
    // Or its process has moved, with it: of which threads the kernel does not say.
    let Some(process) = typed_pointer(task, layout!(task_leader)) else { return true };
    // SAFETY: the lookup succeeded.
    TASKS.get_ptr(&process).is_none_or(|process| unsafe { (*process).moved_ns } < born_ns)
}

#[inline(always)]
fn counted(task: u64) -> Counted {
    Counted {
        run_ns: count(task, layout!(task_run_time)),
        run_delay_ns: count(task, layout!(task_run_delay)),
        read_bytes: count(task, layout!(task_read_bytes)),
        write_bytes: count(task, layout!(task_write_bytes)),
        reads: count(task, layout!(task_reads)) as u32,
        writes: count(task, layout!(task_writes)) as u32,
        minor_faults: count(task, layout!(task_minor_faults)) as u32,
        major_faults: count(task, layout!(task_major_faults)) as u32,
    }
}

/// 0 stands for what this kernel does not count.
#[inline(always)]
fn count(task: u64, offset: u32) -> u64 {
    if offset == OFFSET_MISSING { 0 } else { typed(task, offset) }
}

#[inline(always)]
fn charge(slot: u32, cpu: u32, before: &Counted, now: &Counted) {
    let Some(counters) = counters(slot, cpu) else { return };
    add_since!(counters, run_ns, before.run_ns, now.run_ns, i64);
    add_since!(counters, run_delay_ns, before.run_delay_ns, now.run_delay_ns, i64);
    add_since!(counters, read_bytes, before.read_bytes, now.read_bytes, i64);
    add_since!(counters, write_bytes, before.write_bytes, now.write_bytes, i64);
    add_since!(counters, reads, before.reads, now.reads, i32);
    add_since!(counters, writes, before.writes, now.writes, i32);
    add_since!(counters, page_faults, before.minor_faults, now.minor_faults, i32);
    add_since!(counters, page_faults, before.major_faults, now.major_faults, i32);
    add_since!(counters, major_faults, before.major_faults, now.major_faults, i32);
}
