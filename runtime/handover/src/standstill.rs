//! Generations that are stopped, by a signal or a debugger: they answer nobody until somebody else continues them, if ever.
//!
//! One look does not tell: whoever traces a process stops it at every system call. So two are taken, and between them the
//! process must not have been given a processor.

use std::time::{Duration, Instant};

use warmswap_backend::{ContainerState, Standstill};
use warmswap_model::Generation;

use crate::supervisor::Supervisor;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(100);
/// The same where somebody waits to be served.
const SHORT_LOOK: Duration = Duration::from_millis(10);

/// Looks at generations now and then, for whoever waits for them.
#[derive(Debug)]
pub(crate) struct Looks {
    last: Instant,
    seen: Vec<(Generation, Standstill)>,
}

impl Looks {
    pub(crate) fn begin() -> Self {
        Self { last: Instant::now(), seen: Vec::new() }
    }

    /// When to look again.
    pub(crate) fn due_in(&self) -> Duration {
        LOOK.saturating_sub(self.last.elapsed())
    }

    /// One of `generations` that has not moved since the last look; none when a look is not due.
    pub(crate) fn look(&mut self, supervisor: &Supervisor, generations: &[Generation]) -> Option<Generation> {
        if !self.due_in().is_zero() {
            return None;
        }
        let found =
            generations.iter().filter_map(|generation| Some((*generation, supervisor.standstill(*generation)?)));
        let found = found.collect::<Vec<_>>();
        let still = found.iter().find(|found| self.seen.contains(found)).map(|(generation, _)| *generation);
        (self.last, self.seen) = (Instant::now(), found);
        still
    }
}

impl Supervisor {
    fn standstill(&self, generation: Generation) -> Option<Standstill> {
        match self.backend.state(&self.container(generation)) {
            Ok(ContainerState::Running { pid }) => Standstill::of(pid),
            _ => None,
        }
    }

    pub(crate) fn is_stopped(&self, generation: Generation) -> bool {
        let Some(first) = self.standstill(generation) else { return false };
        std::thread::sleep(SHORT_LOOK);
        self.standstill(generation) == Some(first)
    }
}
