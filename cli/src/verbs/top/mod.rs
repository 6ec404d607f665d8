//! `warmswap top`: containers, forecasts and what happens, live.
//!
//! ```text
//!  snapshots, signals ──▶ feed ─┐
//!  bytes ────────────────▶ keys ┴▶ one loop, state ──▶ draw, charts ──▶ screen
//! ```

mod charts;
mod draw;
mod feed;
mod keys;
mod screen;
mod state;
#[cfg(test)]
mod tests;
mod text;

use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use ratatui::Terminal;

use super::Here;
use crate::client::Client;
use crate::output::say_json;
use feed::Told;
use keys::ESC_TIME;
use screen::{Screen, Taken};
use state::State;

/// Without anything new the screen is drawn this often, for what it says of time.
const DRAW_EVERY: Duration = Duration::from_secs(1);

pub(super) struct Wishes {
    /// Whether the kernel is to measure the probes.
    pub(super) cost: bool,
    pub(super) count: Option<u64>,
    pub(super) seconds: Option<f64>,
}

pub(super) fn top(here: &Here, wishes: &Wishes) -> Result<ExitCode> {
    let length = wishes.seconds.map(Duration::try_from_secs_f64).transpose().context("--seconds")?;
    let until = length.and_then(|length| Instant::now().checked_add(length));
    if here.json || !std::io::stdout().is_terminal() {
        return print(here, wishes, until);
    }
    let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb" || term.is_empty());
    ensure!(!dumb, "this terminal cannot be drawn on (TERM is not set, or dumb); use `warmswap top --json`");
    // Whoever mistyped the folder learns it before the screen is taken.
    drop(Client::connect(&here.run_dir)?);
    let (sender, received) = feed::listen(&here.run_dir, wishes.cost)?;
    let colour = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let _taken = Taken::take().context("cannot take the terminal; use `warmswap top --json`")?;
    keys::listen(sender)?;
    watch(&received, wishes, until, Screen::new(colour))
}

fn print(here: &Here, wishes: &Wishes, until: Option<Instant>) -> Result<ExitCode> {
    let mut seen = 0;
    let mut failed = None;
    let late = || until.is_some_and(|until| Instant::now() >= until);
    let mut enough = false;
    feed::snapshots(&here.run_dir, wishes.cost, |live| {
        enough = late();
        if !enough {
            failed = say_json(&live).err();
            seen += 1;
            enough = failed.is_some() || wishes.count.is_some_and(|count| seen >= count) || late();
        }
        !enough
    })?;
    match failed {
        Some(error) => Err(error),
        None if enough => Ok(ExitCode::SUCCESS),
        None => bail!("the agent ended; services go on without it"),
    }
}

/// Until somebody leaves, or it is time.
fn watch(received: &Receiver<Told>, wishes: &Wishes, until: Option<Instant>, screen: Screen) -> Result<ExitCode> {
    let mut terminal = Terminal::new(screen)?;
    let mut state = State::new();
    let (mut heard, mut seen, mut pending) = (Instant::now(), 0, Vec::new());
    loop {
        terminal.draw(|frame| draw::draw(frame, &state, heard.elapsed()))?;
        let enough = wishes.count.is_some_and(|count| seen >= count);
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        if enough || left == Some(Duration::ZERO) {
            return Ok(ExitCode::SUCCESS);
        }
        let patience = if pending.is_empty() { DRAW_EVERY } else { ESC_TIME };
        let mut told = received.recv_timeout(patience.min(left.unwrap_or(patience)));
        let over = matches!(told, Err(RecvTimeoutError::Timeout));
        // All that waits, before anything is drawn.
        loop {
            match told {
                Ok(Told::Second(live)) => {
                    state.take(*live);
                    seen += 1;
                    heard = Instant::now();
                }
                Ok(Told::Gone(why)) => {
                    state.gone = Some(why);
                    heard = Instant::now();
                }
                Ok(Told::Pressed(bytes)) => pending.extend(bytes),
                Ok(Told::Resized) => {}
                // As the shell reports whoever a signal ended.
                Ok(Told::Signal(number)) => return Ok(ExitCode::from(128 + number)),
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => bail!("what listens to the agent has failed"),
            }
            told = received.recv_timeout(Duration::ZERO);
        }
        for command in keys::commands(&mut pending, over) {
            if !state.obey(command) {
                return Ok(ExitCode::SUCCESS);
            }
        }
    }
}
