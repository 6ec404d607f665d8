//! Everything that the supervisor does to others and hears from them during one handover, in order and with its time.
//!
//! For two uses: a report shows where the time of a handover went, and a test can have the supervisor stop (SIGSTOP to its
//! own process) before the n-th step, to kill, stop or deceive anybody exactly there. So that no step is forgotten there is
//! one place for each kind: `Supervisor::tell`, `Supervisor::route`, and whoever calls [`Steps::take`] beside a journal
//! record, the control word or a call of the back end.
//!
//! Called in the blackout: taking a step allocates nothing and asks the kernel for nothing but the time.

use std::cell::RefCell;
use std::time::Instant;

use warmswap_model::{Generation, StepTiming};

/// Steps beyond these are not recorded. A handover has some fifty, and a few for each thousand connections.
const STEPS_MAX: usize = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Tell(Generation, &'static str),
    Hear(Generation, &'static str),
    Journal(&'static str),
    /// The control word is about to name a generation.
    Word(Generation),
    /// A call of the back end about a generation.
    Backend(&'static str, Generation),
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tell(to, message) => write!(f, "tell {to} {message}"),
            Self::Hear(from, message) => write!(f, "hear {message} from {from}"),
            Self::Journal(record) => write!(f, "journal: {record}"),
            Self::Word(owner) => write!(f, "control word names {owner}"),
            Self::Backend(call, of) => write!(f, "{call} {of}"),
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Steps(RefCell<Option<Taken>>);

#[derive(Debug)]
struct Taken {
    began: Instant,
    steps: Vec<(Instant, Step)>,
    /// From 1.
    stop_before: Option<usize>,
}

impl Steps {
    /// A handover begins.
    pub(crate) fn begin(&self, stop_before: Option<usize>) {
        let steps = Vec::with_capacity(STEPS_MAX);
        *self.0.borrow_mut() = Some(Taken { began: Instant::now(), steps, stop_before });
    }

    /// The next step is about to be taken. Does nothing outside a handover.
    pub(crate) fn take(&self, step: Step) {
        let mut taken = self.0.borrow_mut();
        let Some(taken) = taken.as_mut() else { return };
        if taken.steps.len() < STEPS_MAX {
            taken.steps.push((Instant::now(), step));
        }
        if taken.stop_before == Some(taken.steps.len()) {
            taken.stop_before = None;
            tracing::warn!("stops before step {} on request: {step}", taken.steps.len());
            // SAFETY: takes no memory. The whole process stands still in here until somebody continues it.
            unsafe { libc::raise(libc::SIGSTOP) };
        }
    }

    /// The handover has ended: what was done.
    pub(crate) fn end(&self) -> Vec<StepTiming> {
        let Some(taken) = self.0.borrow_mut().take() else { return Vec::new() };
        let timing = |(at, step): (Instant, Step)| StepTiming {
            at_us: at.duration_since(taken.began).as_secs_f64() * 1e6,
            what: step.to_string(),
        };
        taken.steps.into_iter().map(timing).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_recorded_between_begin_and_end_only() {
        let steps = Steps::default();
        steps.take(Step::Journal("begin"));
        steps.begin(None);
        for number in 0..2 * STEPS_MAX as u32 {
            steps.take(Step::Tell(Generation(number), "Own"));
        }
        let taken = steps.end();
        assert_eq!(taken.len(), STEPS_MAX);
        assert_eq!(taken[3].what, "tell g3 Own");
        assert!(taken.is_sorted_by(|a, b| a.at_us <= b.at_us));
        steps.take(Step::Word(Generation(1)));
        assert!(steps.end().is_empty());
    }
}
