//! A shadow that takes part in its handover up to a place, which is its argument, and waits there:
//!
//! * `ready`: it has joined and does not say that it is ready;
//! * `round-N`: it does not say that it has caught up for the `N`th time;
//! * `own`: it is told to serve and takes up the state without end.
//!
//! It keeps the connections it is sent, and never serves.

use std::fs;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result};
use warmswap_sdk::Event;
use warmswap_sdk::transfer::log::LogError;
use warmswap_sdk::transfer::message::{Commit, LogPosition};
use warmswap_sdk::transfer::state::{SegmentNotice, State};
use warmswap_tests::hesitant::{GO_ON, HESITATES};

const STEP: Duration = Duration::from_millis(1);
/// What session-store writes.
const SCHEMA: u32 = 1;

fn main() -> Result<()> {
    let place = std::env::args().nth(1).context("say where to wait: `ready`, `round-N` or `own`")?;
    let round = place.strip_prefix("round-").map(str::parse).transpose().context("the N of `round-N` is no number")?;
    let mut service = warmswap_sdk::join(ReadsNothing { rounds_left: round, hangs_owning: place == "own" })?;
    if place == "ready" {
        hesitate();
    }
    service.ready()?;
    let mut held = Vec::new();
    loop {
        while let Some(event) = service.poll()? {
            match event {
                Event::Retire { .. } | Event::ControlLost => return Ok(()),
                event => held.push(event),
            }
        }
        sleep(STEP);
    }
}

fn hesitate() {
    if let Err(error) = fs::write(HESITATES, "") {
        eprintln!("cannot write {HESITATES}: {error}");
    }
    while !Path::new(GO_ON).exists() {
        sleep(STEP);
    }
}

/// State that claims to have been read.
struct ReadsNothing {
    rounds_left: Option<u32>,
    hangs_owning: bool,
}

impl State for ReadsNothing {
    fn schemas(&self) -> (Vec<u32>, u32) {
        (vec![SCHEMA], SCHEMA)
    }

    fn add_segment(&mut self, _index: u64, _fd: OwnedFd) -> Result<(), LogError> {
        Ok(())
    }

    fn retire_segment(&mut self, _index: u64) -> Result<(), LogError> {
        Ok(())
    }

    fn follow(&mut self) -> Result<u64, LogError> {
        Ok(0)
    }

    fn become_owner(&mut self, _commit: Option<Commit>) -> Result<(), LogError> {
        if self.hangs_owning {
            hesitate();
        }
        Ok(())
    }

    fn become_follower(&mut self) {}

    /// A follower is asked once for each time it has caught up.
    fn commit(&mut self) -> Option<Commit> {
        self.rounds_left = self.rounds_left.and_then(|left| left.checked_sub(1));
        if self.rounds_left == Some(0) {
            hesitate();
        }
        None
    }

    fn position(&self) -> Option<LogPosition> {
        Some(LogPosition { segment: u64::MAX, offset: u64::MAX })
    }

    fn take_notice(&mut self) -> Option<SegmentNotice> {
        None
    }

    fn segment_fd(&self, _index: u64) -> Option<BorrowedFd<'_>> {
        None
    }
}
