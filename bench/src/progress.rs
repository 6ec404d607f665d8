//! What is going on, for whoever waits: on stderr, not too often.

use std::fmt::Display;
use std::time::{Duration, Instant};

const PAUSE: Duration = Duration::from_secs(5);

pub(crate) struct Progress {
    began: Instant,
    said: Instant,
}

impl Progress {
    /// Says what begins.
    pub(crate) fn begin(what: impl Display) -> Self {
        eprintln!("{what}");
        Self { began: Instant::now(), said: Instant::now() }
    }

    /// Says how far it is, unless something was said just before.
    pub(crate) fn at(&mut self, how_far: impl Display) {
        if self.said.elapsed() >= PAUSE {
            self.said = Instant::now();
            eprintln!("  {how_far}, {:.0} s", self.began.elapsed().as_secs_f64());
        }
    }
}
