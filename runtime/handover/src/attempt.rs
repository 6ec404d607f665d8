//! The record of one handover while it happens: timings, what is to be undone, what is to be reported.

use std::time::Instant;

use warmswap_model::{
    Blackout, ConnectionCounts, Generation, Measurements, Phase, PhaseOutcome, PhaseTiming, Rung, StateMove,
};

use crate::journal::Version;
use crate::ports::Ports;

/// What must be put right, in reverse order, when a handover ends before PROMOTE. Undoing never fails for good: a step
/// that cannot be undone is logged and the next one runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Undo {
    ReleaseLease,
    /// End the shadow and remove its container.
    DestroyShadow(Generation),
    /// Nobody follows the owner any more.
    StopFollowing,
    /// The owner may have stopped: tell it to go on.
    ResumeOwner(Generation),
}

#[derive(Debug)]
pub(crate) struct Attempt {
    pub(crate) handover: u64,
    pub(crate) from: Generation,
    pub(crate) to: Generation,
    /// What `from` runs.
    pub(crate) replaced: Version,
    pub(crate) began: Instant,
    pub(crate) undo: Vec<Undo>,
    pub(crate) phases: Vec<PhaseTiming>,
    pub(crate) rung: Rung,
    /// Where the old generation listened by itself before the new one began.
    pub(crate) ports: Ports,
    pub(crate) blackouts: Vec<Blackout>,
    pub(crate) connections: ConnectionCounts,
    pub(crate) state: StateMove,
    pub(crate) state_bytes: u64,
    pub(crate) before: Option<Measurements>,
    pub(crate) after: Option<Measurements>,
    pub(crate) lost: Vec<String>,
    pub(crate) promoted: bool,
    /// The new owner said that it serves, and has answered since whatever it was asked: it can be asked to hand back.
    pub(crate) answers: bool,
    /// How often somebody had begun to serve when the old owner yielded.
    pub(crate) servings: u32,
    /// Since when nobody serves.
    pub(crate) stopped_at: Option<Instant>,
}

impl Attempt {
    pub(crate) fn new(handover: u64, from: Generation, to: Generation, replaced: Version) -> Self {
        Self {
            handover,
            from,
            to,
            replaced,
            began: Instant::now(),
            undo: Vec::new(),
            phases: Vec::with_capacity(Phase::ALL.len()),
            rung: Rung::None,
            ports: Ports::default(),
            blackouts: Vec::new(),
            connections: ConnectionCounts::default(),
            state: StateMove::None,
            state_bytes: 0,
            before: None,
            after: None,
            lost: Vec::new(),
            promoted: false,
            answers: false,
            servings: 0,
            stopped_at: None,
        }
    }

    /// Somebody serves again, who was not told by way of an ordinary switch.
    pub(crate) fn end_blackout(&mut self) {
        if let Some(began) = self.stopped_at.take() {
            self.blackouts.push(Blackout { us: began.elapsed().as_secs_f64() * 1e6, measured_in_kernel: false });
        }
    }

    /// The control word names the new generation: from here on the way back is another. `times`: when `Yield` was told, heard,
    /// found to be complete, and when PROMOTE ended with `outcome`.
    pub(crate) fn promote(&mut self, times: [Instant; 4], outcome: PhaseOutcome) {
        let [told, yielded, checked, ended] = times;
        self.promoted = true;
        self.undo.clear();
        self.record_until(Phase::Quiesce, told, yielded, PhaseOutcome::Done);
        self.record_until(Phase::Delta, yielded, checked, PhaseOutcome::Done);
        self.record_until(Phase::Promote, checked, ended, outcome);
    }

    pub(crate) fn record(&mut self, phase: Phase, began: Instant, outcome: PhaseOutcome) -> f64 {
        self.record_until(phase, began, Instant::now(), outcome)
    }

    pub(crate) fn record_until(&mut self, phase: Phase, began: Instant, end: Instant, outcome: PhaseOutcome) -> f64 {
        let duration_us = end.saturating_duration_since(began).as_secs_f64() * 1e6;
        let start_us = began.saturating_duration_since(self.began).as_secs_f64() * 1e6;
        self.phases.push(PhaseTiming { phase, start_us, duration_us, outcome });
        duration_us
    }
}
