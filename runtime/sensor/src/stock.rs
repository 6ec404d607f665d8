//! What tasks have counted that run right now: taken over before a window is read, so that nobody has to give up his CPU first.

use std::sync::atomic::Ordering;

use aya::programs::{Program, RawTracePointRunOptions, TestRun as _};

use crate::load::{Loaded, TAKE_STOCK};

/// Interrupts each CPU on which a watched task runs, for about a microsecond.
pub(crate) fn take(loaded: &Loaded) {
    take_of(loaded, |cpu| loaded.running.read(cpu).is_some_and(|running| running.slot != 0));
}

/// Interrupts every CPU, so that what runs there counts for whom it belongs to now.
pub(crate) fn take_everywhere(loaded: &Loaded) {
    take_of(loaded, |_| true);
}

fn take_of(loaded: &Loaded, wanted: impl Fn(usize) -> bool) {
    let Some(Program::RawTracePoint(program)) = loaded.object.program(TAKE_STOCK) else { return };
    for cpu in (0..loaded.cpus).filter(|cpu| wanted(*cpu)) {
        let options = RawTracePointRunOptions { cpu: Some(cpu as u32), ..RawTracePointRunOptions::new() };
        if let Err(error) = program.test_run(options) {
            // The CPU is not there, or the program was not loaded, which was said. Counted at the next switch then.
            tracing::debug!(cpu, %error, "no stock taken");
        }
    }
}

/// Nothing that was charged to this slot counts any more: it is about to be another cgroup's.
pub(crate) fn forget(loaded: &Loaded, slot: u32) {
    for place in 0..warmswap_events::CHARGED_TASKS as usize {
        let [key, pid_and_slot, ..] = loaded.charged.words(place) else { return };
        if pid_and_slot.load(Ordering::Relaxed) >> 32 == u64::from(slot) {
            key.store(0, Ordering::Relaxed);
        }
    }
}
