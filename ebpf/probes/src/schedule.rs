//! What the kernel counts for each task, taken over at switches: time on a CPU, the wait for it, reads and writes, page faults.
//! Who is watched pays once a switch for it, and nothing per call or fault.
//!
//! ```text
//!  task gets a CPU    its counters so far ─▶ RUNNING[cpu]
//!  task leaves it     its counters now − RUNNING[cpu] ─▶ COUNTERS
//!  sensor wants to know, while it runs:  as if it left and came back (`take_stock`)
//! ```
//!
//! Some hosts do not tell every switch. So what a task is charged up to is also kept by task, in `CHARGED`: whoever leaves a CPU
//! without having come to it is charged from there, and whoever has left it untold is charged by the next switch. Two tasks
//! may share a place there; then the turn is charged to nobody.

use aya_ebpf::helpers::generated::bpf_get_current_task;
use aya_ebpf::macros::{btf_tracepoint, raw_tracepoint};
use aya_ebpf::programs::{BtfTracePointContext, RawTracePointContext};
use warmswap_events::{CHARGED_TASKS, Charged, Counted, OFFSET_MISSING};

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

    /// Its counters now. Of some words the lower half, where that is all that is kept.
    #[inline(always)]
    fn counted(self) -> Counted {
        Counted {
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

/// Not attached anywhere: the sensor runs it on a CPU whose task it wants to know about, which it interrupts. The task is charged
/// where it belonged, and begins anew where it belongs now.
#[raw_tracepoint(tracepoint = "sched_switch")]
pub(crate) fn take_stock(_ctx: RawTracePointContext) -> i32 {
    // SAFETY: the helper has no preconditions. No switch comes in between.
    let current = Task::Raw(unsafe { bpf_get_current_task() });
    switched(current, current)
}

#[inline(always)]
fn switched(leaves: Task, gets: Task) -> i32 {
    let cpu = cpu();
    let Some(running) = RUNNING.get_ptr_mut(cpu) else { return 0 };
    // SAFETY: the lookup succeeded; only these programs on this CPU write here, and none interrupts another.
    let (task, ran) = unsafe { ((*running).task, (*running).slot) };
    if task != leaves.address() {
        // A switch was not told.
        charge_who_left(cpu);
        // SAFETY: as above.
        unsafe { core::ptr::write_volatile(&raw mut (*running).task, leaves.address()) };
        charge_who_came(cpu);
    } else if ran != 0 {
        let now = leaves.counted();
        // SAFETY: as above.
        add_since(cpu, ran, unsafe { &(*running).counted }, &now);
        // Its address as a number: the verifier lets nobody reckon with a pointer that it knows. Volatile, or the compiler takes
        // the pointer after all.
        // SAFETY: as above.
        note(unsafe { core::ptr::read_volatile(&raw const (*running).task) }, leaves.pid(), ran, &now);
    }
    let pid = gets.pid();
    let slot = if pid == 0 { 0 } else { gets.slot(cpu) };
    // SAFETY: as above.
    unsafe {
        (*running).task = gets.address();
        (*running).pid = pid;
        (*running).slot = slot;
        if slot != 0 {
            (*running).counted = gets.counted();
        }
    }
    0
}

/// Whoever leaves has come untold. His address comes from the map, as a number: the verifier lets nobody reckon with a pointer
/// that it knows.
#[inline(never)]
fn charge_who_came(cpu: u32) {
    let Some(running) = RUNNING.get_ptr(cpu) else { return };
    // SAFETY: the lookup succeeded; nobody writes meanwhile.
    let task = Task::Raw(unsafe { core::ptr::read_volatile(&raw const (*running).task) });
    let pid = task.pid();
    let slot = if pid == 0 { 0 } else { task.slot(cpu) };
    if slot != 0 {
        let now = task.counted();
        if let Some(before) = charged(task, slot) {
            add_since(cpu, slot, &before, &now);
        }
        note(task.address(), pid, slot, &now);
    }
}

/// Whoever ran here last has left untold. When it runs on another CPU now, it is charged there; it may have ended too, and
/// another task be where it was.
#[inline(never)]
fn charge_who_left(cpu: u32) {
    let Some(running) = RUNNING.get_ptr(cpu) else { return };
    // SAFETY: the lookup succeeded; nobody writes meanwhile.
    let running = unsafe { &*running };
    let task = Task::Raw(running.task);
    if running.slot == 0 || task.pid() != running.pid || task.at::<u32>(layout!(task_on_cpu)) != 0 {
        return;
    }
    let now = task.counted();
    match charged(task, running.slot) {
        // It has been elsewhere since, and is charged for that.
        Some(charged) if charged.run_ns > running.counted.run_ns => add_since(cpu, running.slot, &charged, &now),
        _ => add_since(cpu, running.slot, &running.counted, &now),
    }
    note(running.task, running.pid, running.slot, &now);
}

/// Up to what the task was charged to the slot, when that is known: another may have taken the place.
#[inline(always)]
fn charged(task: Task, slot: u32) -> Option<Counted> {
    let pid = task.pid();
    let place = CHARGED.get_ptr(pid % CHARGED_TASKS)?;
    // SAFETY: the lookup succeeded. Another CPU may write meanwhile, which the key tells.
    let found = unsafe { core::ptr::read_volatile(place) };
    let known =
        found.pid == pid && found.slot == slot && found.key == Charged::key(task.address(), pid, slot, &found.counted);
    if known { Some(found.counted) } else { None }
}

#[inline(always)]
fn note(task: u64, pid: u32, slot: u32, counted: &Counted) {
    if let Some(place) = CHARGED.get_ptr_mut(pid % CHARGED_TASKS) {
        // SAFETY: the lookup succeeded.
        unsafe {
            (*place).pid = pid;
            (*place).slot = slot;
            (*place).counted = *counted;
            core::ptr::write_volatile(&raw mut (*place).key, Charged::key(task, pid, slot, counted));
        }
    }
}

#[inline(always)]
fn add_since(cpu: u32, slot: u32, before: &Counted, now: &Counted) {
    let Some(counters) = counters(slot, cpu) else { return };
    add!(counters, run_ns, now.run_ns.saturating_sub(before.run_ns));
    add!(counters, run_delay_ns, now.run_delay_ns.saturating_sub(before.run_delay_ns));
    add!(counters, read_bytes, now.read_bytes.saturating_sub(before.read_bytes));
    add!(counters, write_bytes, now.write_bytes.saturating_sub(before.write_bytes));
    add!(counters, reads, lower_since(before.reads, now.reads));
    add!(counters, writes, lower_since(before.writes, now.writes));
    let minor = lower_since(before.minor_faults, now.minor_faults);
    let major = lower_since(before.major_faults, now.major_faults);
    add!(counters, page_faults, minor + major);
    add!(counters, major_faults, major);
}

/// Of counters of which the lower half is kept. Half of all it can be is no growth of one turn.
#[inline(always)]
fn lower_since(before: u32, now: u32) -> u64 {
    let grown = now.wrapping_sub(before);
    if grown >> 31 == 0 { u64::from(grown) } else { 0 }
}
