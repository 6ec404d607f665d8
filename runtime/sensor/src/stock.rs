//! What tasks have counted that run right now: taken over before a window is read, so that nobody has to give up his CPU first.

use std::sync::atomic::Ordering;

use aya::programs::{Program, RawTracePointRunOptions, TestRun as _};

use crate::load::{Loaded, TAKE_STOCK};

/// Interrupts each CPU on which a watched task runs, for less than a microsecond.
pub(crate) fn take(loaded: &Loaded) {
    let Some(Program::RawTracePoint(program)) = loaded.object.program(TAKE_STOCK) else { return };
    for cpu in 0..loaded.cpus {
        if loaded.running.read(cpu).is_some_and(|running| running.slot != 0) {
            let options = RawTracePointRunOptions { cpu: Some(cpu as u32), ..RawTracePointRunOptions::new() };
            if let Err(error) = program.test_run(options) {
                // The CPU has just gone, or the program was not loaded, which was said. Counted at the next switch then.
                tracing::debug!(cpu, %error, "no stock taken");
            }
        }
    }
}

/// Nothing that was charged to this slot counts any more: it is about to be another cgroup's.
pub(crate) fn forget(loaded: &Loaded, slot: u32) {
    for place in 0..warmswap_events::CHARGED_TASKS as usize {
        let [task, pid_and_slot, ..] = loaded.charged.words(place) else { return };
        if pid_and_slot.load(Ordering::Relaxed) >> 32 == u64::from(slot) {
            task.store(0, Ordering::Relaxed);
        }
    }
}
