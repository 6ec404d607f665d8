//! What the kernel counts for each task anyway, taken over: time on a CPU, the wait for it, reads and writes, page faults.
//! Nothing is paid per call, fault or switch.
//!
//! ```text
//!  sensor wants a window      walk     every task ┐
//!  a task moves               moved          it   ├ its counters now − TASKS[pid] ─▶ COUNTERS
//!  a task ends, and is gone   ends, gone     it   ┘
//! ```
//!
//! A task that is not in `TASKS` was born since the last walk, with counters of zero; or it was somewhere else before, or there
//! before anybody watched: then it counts from now on.

use core::ffi::c_void;

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::helpers::generated::{bpf_get_current_task, bpf_ktime_get_ns};
use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;

use crate::maps::{SINCE, TASKS, add_shared, counters, cpu, layout};
use crate::{cgroup, read, trouble};

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
    /// Tells it from another one with its number.
    born_ns: u64,
    /// When it came from another cgroup, 0 when it did not.
    moved_ns: u64,
    /// Whose it was, as what it had counted was charged, and since when that one is watched.
    slot: u64,
    since_ns: u64,
    charged: Counted,
}

/// Why a task is looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Occasion {
    Walk,
    /// It has come to where it is.
    Moved,
    /// It will not be seen again.
    Gone,
}

/// What the kernel passes for each task, and once more with none at the end.
#[repr(C)]
pub(crate) struct EachTask {
    _meta: *mut c_void,
    task: *mut c_void,
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task")]
pub(crate) extern "C" fn walk(each: *mut EachTask) -> i32 {
    // SAFETY: the program's context.
    let task = unsafe { (*each).task } as u64;
    // Whoever has been waited for is gone in a moment, and charged there.
    if task != 0 && read::at::<u32>(task, layout!(task_exit_state)) != Some(EXIT_DEAD) {
        look_at(task, Occasion::Walk);
    }
    0
}

const EXIT_DEAD: u32 = 0x10;
/// What the kernel says of an entry that is there.
const EXISTS: i32 = -17;

/// After it has moved; of a process with several threads the kernel names one.
#[raw_tracepoint(tracepoint = "cgroup_attach_task")]
pub(crate) fn task_moved(ctx: RawTracePointContext) -> i32 {
    look_at(ctx.arg(2), Occasion::Moved);
    0
}

/// So that who waits for it finds it counted, nearly all of it.
#[raw_tracepoint(tracepoint = "sched_process_exit")]
pub(crate) fn task_ends(_ctx: RawTracePointContext) -> i32 {
    // SAFETY: the helper has no preconditions.
    look_at(unsafe { bpf_get_current_task() }, Occasion::Walk);
    0
}

/// A grace period after it was waited for: no walk looks at it any more.
#[raw_tracepoint(tracepoint = "sched_process_free")]
pub(crate) fn task_gone(ctx: RawTracePointContext) -> i32 {
    look_at(ctx.arg(0), Occasion::Gone);
    0
}

#[inline(never)]
fn look_at(task: u64, occasion: Occasion) {
    let Some(pid) = read::at::<u32>(task, layout!(task_pid)) else { return };
    let cpu = cpu();
    let slot = cgroup::of_any_task(cpu, task);
    let known = TASKS.get_ptr_mut(&pid);
    if slot == 0 && known.is_none() {
        return;
    }
    let born_ns = read::at::<u64>(task, layout!(task_start_time)).unwrap_or_default();
    let now = counted(task);
    if let Some(known) = known
        // SAFETY: the lookup succeeded.
        && unsafe { (*known).born_ns } == born_ns
    {
        // SAFETY: as above. Two that look at one task at once, as it moves, may charge a moment of it twice.
        unsafe {
            let (whose, since_ns) = ((*known).slot as u32, (*known).since_ns);
            let before = (*known).charged;
            (*known).charged = now;
            (*known).slot = u64::from(slot);
            (*known).since_ns = since(slot);
            if occasion == Occasion::Moved && whose != slot {
                (*known).moved_ns = bpf_ktime_get_ns();
            }
            // The slot may be another one's by now.
            if since(whose) == since_ns {
                charge(whose, cpu, &before, &now);
            }
        }
        if slot == 0 || occasion == Occasion::Gone {
            // Fails only when it is not there.
            let _ = TASKS.remove(&pid);
        }
        return;
    }
    let all_ours = occasion != Occasion::Moved && born_here(task, pid, slot, born_ns);
    if occasion != Occasion::Gone {
        // SAFETY: the helper has no preconditions.
        let moved_ns = if occasion == Occasion::Moved { unsafe { bpf_ktime_get_ns() } } else { 0 };
        let task = Task { born_ns, moved_ns, slot: u64::from(slot), since_ns: since(slot), charged: now };
        // Of two that look at it at once for the first time one is late.
        match TASKS.insert(&pid, &task, if known.is_some() { BPF_ANY } else { BPF_NOEXIST }.into()) {
            Ok(()) => {}
            Err(EXISTS) => return,
            // Charged when it is gone.
            Err(_) => return trouble::uncounted_task(u64::from(pid)),
        }
    }
    if all_ours {
        charge(slot, cpu, &Counted::default(), &now);
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
fn born_here(task: u64, pid: u32, slot: u32, born_ns: u64) -> bool {
    if born_ns < since(slot) {
        return false;
    }
    // Or its process has moved, with it: of which threads the kernel does not say.
    let process = read::at::<u32>(task, layout!(task_tgid)).unwrap_or(pid);
    // SAFETY: the lookup succeeded.
    process == pid || TASKS.get_ptr(&process).is_none_or(|process| unsafe { (*process).moved_ns } < born_ns)
}

#[inline(always)]
fn counted(task: u64) -> Counted {
    /// 0 stands for what this kernel does not count.
    #[inline(always)]
    fn word(task: u64, offset: u32) -> u64 {
        read::at(task, offset).unwrap_or_default()
    }
    Counted {
        run_ns: word(task, layout!(task_run_time)),
        run_delay_ns: word(task, layout!(task_run_delay)),
        read_bytes: word(task, layout!(task_read_bytes)),
        write_bytes: word(task, layout!(task_write_bytes)),
        reads: word(task, layout!(task_reads)) as u32,
        writes: word(task, layout!(task_writes)) as u32,
        minor_faults: word(task, layout!(task_minor_faults)) as u32,
        major_faults: word(task, layout!(task_major_faults)) as u32,
    }
}

#[inline(always)]
fn charge(slot: u32, cpu: u32, before: &Counted, now: &Counted) {
    let Some(counters) = counters(slot, cpu) else { return };
    add_shared!(counters, run_ns, now.run_ns.saturating_sub(before.run_ns));
    add_shared!(counters, run_delay_ns, now.run_delay_ns.saturating_sub(before.run_delay_ns));
    add_shared!(counters, read_bytes, now.read_bytes.saturating_sub(before.read_bytes));
    add_shared!(counters, write_bytes, now.write_bytes.saturating_sub(before.write_bytes));
    add_shared!(counters, reads, u64::from(now.reads.wrapping_sub(before.reads)));
    add_shared!(counters, writes, u64::from(now.writes.wrapping_sub(before.writes)));
    let minor = u64::from(now.minor_faults.wrapping_sub(before.minor_faults));
    let major = u64::from(now.major_faults.wrapping_sub(before.major_faults));
    add_shared!(counters, page_faults, minor + major);
    add_shared!(counters, major_faults, major);
}
