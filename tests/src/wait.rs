//! Waiting for something to become true, with a limit.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const STEP: Duration = Duration::from_millis(20);

/// Asks every 20 ms until `ask` has an answer, at most `limit`.
pub fn within<T>(limit: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let started = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return Some(answer);
        }
        if started.elapsed() > limit {
            return None;
        }
        std::thread::sleep(STEP);
    }
}

/// Like [`within`], but panics, saying `what` did not happen.
///
/// # Panics
/// When `limit` has passed.
#[track_caller]
pub fn eventually(what: &str, limit: Duration, mut ask: impl FnMut() -> bool) {
    assert!(within(limit, || ask().then_some(())).is_some(), "not within {limit:?}: {what}");
}

/// Tells threads of a scope to end, also when the test panics: the scope would wait for them for ever.
#[derive(Debug)]
pub struct SetOnDrop<'a>(pub &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}
