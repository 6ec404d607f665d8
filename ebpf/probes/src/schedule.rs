//! What the kernel counts for each task, taken over at switches: time on a CPU, the wait for it, reads and writes, page faults.
//! Who is watched pays once a switch for it, and nothing per call or fault.
//!
//! ```text
//!  task gets a CPU    its counters so far ─▶ CHARGED, unless they are there
//!  task leaves it     its counters now − CHARGED ─▶ COUNTERS; now ─▶ CHARGED
//!  sensor wants to know, while it runs:  the same as when it leaves (`take_stock`)
//! ```
//!
//! `CHARGED` is by task and not by CPU, so a task that is moved to another CPU, or a switch that was not told, loses nothing.
//! Two tasks may share a place; then whoever comes back to it begins anew, and the turn in between is charged to nobody.

use aya_ebpf::helpers::generated::bpf_get_current_task;
use aya_ebpf::macros::{btf_tracepoint, raw_tracepoint};
use aya_ebpf::programs::{BtfTracePointContext, RawTracePointContext};
use warmswap_events::{CHARGED_TASKS, Charged, OFFSET_MISSING};

use crate::cgroup;
use crate::maps::{CHARGED, RUNNING, add, counters, cpu, layout};
use crate::read;

/// A `struct task_struct *`, and how to read it.
#[derive(Clone, Copy)]
enum Task {
    /// The verifier knows its type: read like any memory.
    Typed(u64),
    /// Read by a helper.
    Raw(u64),
}

impl Task {
    #[inline(always)]
    const fn address(self) -> u64 {
        match self {
            Self::Typed(task) | Self::Raw(task) => task,
        }
    }

    /// 0 stands for what this kernel does not count.
    #[inline(always)]
    fn at<T: Copy + Default>(self, offset: u32) -> T {
        if offset == OFFSET_MISSING {
            return T::default();
        }
        match self {
            // SAFETY: the verifier has checked that this lies inside the task.
            Self::Typed(task) => unsafe { core::ptr::read_volatile(task.wrapping_add(u64::from(offset)) as *const T) },
            Self::Raw(task) => read::at(task, offset).unwrap_or_default(),
        }
    }

    /// 0 for the one that runs when nobody wants to.
    #[inline(always)]
    fn pid(self) -> u32 {
        self.at(layout!(task_pid))
    }

    #[inline(always)]
    fn slot(self, cpu: u32) -> u32 {
        match self {
            Self::Typed(task) => cgroup::of_typed_task(cpu, task),
            Self::Raw(task) => cgroup::of_switched_task(cpu, task),
        }
    }

    /// Its counters now. Of the words the lower half, where that is all that is kept.
    #[inline(always)]
    fn counted(self, pid: u32, slot: u32) -> Charged {
        Charged {
            task: self.address(),
            pid,
            slot,
            run_ns: self.at(layout!(task_run_time)),
            run_delay_ns: self.at(layout!(task_run_delay)),
            read_bytes: self.at(layout!(task_read_bytes)),
            write_bytes: self.at(layout!(task_write_bytes)),
            reads: self.at::<u64>(layout!(task_reads)) as u32,
            writes: self.at::<u64>(layout!(task_writes)) as u32,
            minor_faults: self.at::<u64>(layout!(task_minor_faults)) as u32,
            major_faults: self.at::<u64>(layout!(task_major_faults)) as u32,
        }
    }
}

/// Fields are read without helpers, which are most of what the other program costs.
#[btf_tracepoint(function = "sched_switch")]
pub(crate) fn switch_typed(ctx: BtfTracePointContext) -> i32 {
    // (preempt, prev, next, …); where BTF says otherwise the sensor attaches neither program.
    switched(Task::Typed(ctx.arg(1)), Task::Typed(ctx.arg(2)))
}

/// Where the kernel refuses the typed one.
#[raw_tracepoint(tracepoint = "sched_switch")]
pub(crate) fn switch(ctx: RawTracePointContext) -> i32 {
    switched(Task::Raw(ctx.arg(1)), Task::Raw(ctx.arg(2)))
}

/// Not attached anywhere: the sensor runs it on a CPU whose task it wants to know about, which it interrupts.
#[raw_tracepoint(tracepoint = "sched_switch")]
pub(crate) fn take_stock(_ctx: RawTracePointContext) -> i32 {
    let cpu = cpu();
    let Some(running) = RUNNING.get_ptr(cpu) else { return 0 };
    // SAFETY: the helper has no preconditions; the lookup succeeded, and no switch comes in between.
    let (current, task, slot) = unsafe { (bpf_get_current_task(), (*running).task, (*running).slot as u32) };
    if current == task {
        charge_known(cpu, task, slot);
    } else {
        charge_untold(cpu, task, slot);
    }
    0
}

#[inline(always)]
fn switched(leaves: Task, gets: Task) -> i32 {
    let cpu = cpu();
    let Some(running) = RUNNING.get_ptr_mut(cpu) else { return 0 };
    // SAFETY: the lookup succeeded; only this program on this CPU writes here, with interrupts off.
    let (ran, task) = unsafe { ((*running).slot as u32, (*running).task) };
    let pid = leaves.pid();
    if pid != 0 {
        let slot = if task == leaves.address() {
            ran
        } else {
            charge_untold(cpu, task, ran);
            leaves.slot(cpu)
        };
        if slot != 0 {
            charge(cpu, leaves, pid, slot);
        }
    }
    let pid = gets.pid();
    let slot = if pid == 0 { 0 } else { gets.slot(cpu) };
    if slot != 0 {
        begin(gets, pid, slot);
    }
    // SAFETY: as above.
    unsafe {
        (*running).task = gets.address();
        (*running).slot = u64::from(slot);
    }
    0
}

#[inline(always)]
fn place(pid: u32) -> Option<*mut Charged> {
    CHARGED.get_ptr_mut(pid % CHARGED_TASKS)
}

/// Whether the place is about this task in this slot.
#[inline(always)]
fn is_of(place: *const Charged, task: Task, pid: u32, slot: u32) -> bool {
    // SAFETY: the callers' lookup succeeded; whole words.
    unsafe {
        core::ptr::read_volatile(&raw const (*place).task) == task.address()
            && (*place).pid == pid
            && (*place).slot == slot
    }
}

/// What the task has counted up to here is nobody's, unless it was charged before.
#[inline(always)]
fn begin(task: Task, pid: u32, slot: u32) {
    if let Some(place) = place(pid)
        && !is_of(place, task, pid, slot)
    {
        note(place, &task.counted(pid, slot));
    }
}

/// Charges the slot with what the task has counted since it was charged last.
#[inline(always)]
fn charge(cpu: u32, task: Task, pid: u32, slot: u32) {
    let (Some(counters), Some(place)) = (counters(slot, cpu), place(pid)) else { return };
    let now = task.counted(pid, slot);
    if is_of(place, task, pid, slot) {
        // SAFETY: the lookup succeeded. Another task that shares the place may write to it from another CPU; whether it has
        // begun to is asked afterwards.
        let before = unsafe { core::ptr::read_volatile(place) };
        if is_of(place, task, pid, slot) {
            // At once when nothing was counted, as in most turns of most tasks.
            if now.reads != before.reads || now.writes != before.writes {
                let since = |now: u32, before: u32| u64::from(now.saturating_sub(before));
                add!(counters, reads, since(now.reads, before.reads));
                add!(counters, writes, since(now.writes, before.writes));
                add!(counters, read_bytes, now.read_bytes.saturating_sub(before.read_bytes));
                add!(counters, write_bytes, now.write_bytes.saturating_sub(before.write_bytes));
            }
            let minor = u64::from(now.minor_faults.saturating_sub(before.minor_faults));
            let major = u64::from(now.major_faults.saturating_sub(before.major_faults));
            add!(counters, page_faults, minor + major);
            add!(counters, major_faults, major);
            add!(counters, run_ns, now.run_ns.saturating_sub(before.run_ns));
            add!(counters, run_delay_ns, now.run_delay_ns.saturating_sub(before.run_delay_ns));
        }
    }
    note(place, &now);
}

/// Some hosts do not tell every switch: then whoever ran last has left this CPU, and may have ended. When he runs on another one
/// now, he is charged there.
#[inline(never)]
fn charge_untold(cpu: u32, task: u64, slot: u32) {
    if read::at::<u32>(task, layout!(task_on_cpu)) == Some(0) {
        charge_known(cpu, task, slot);
    }
}

/// Only what the place is about: another task may be where this one was.
#[inline(always)]
fn charge_known(cpu: u32, task: u64, slot: u32) {
    let task = Task::Raw(task);
    let pid = task.pid();
    if slot != 0 && place(pid).is_some_and(|place| is_of(place, task, pid, slot)) {
        charge(cpu, task, pid, slot);
    }
}

#[inline(always)]
fn note(place: *mut Charged, now: &Charged) {
    // SAFETY: the callers' lookup succeeded. In the order that `Charged` promises.
    unsafe {
        core::ptr::write_volatile(&raw mut (*place).task, 0);
        (*place).pid = now.pid;
        (*place).slot = now.slot;
        (*place).run_ns = now.run_ns;
        (*place).run_delay_ns = now.run_delay_ns;
        (*place).read_bytes = now.read_bytes;
        (*place).write_bytes = now.write_bytes;
        (*place).reads = now.reads;
        (*place).writes = now.writes;
        (*place).minor_faults = now.minor_faults;
        (*place).major_faults = now.major_faults;
        core::ptr::write_volatile(&raw mut (*place).task, now.task);
    }
}
