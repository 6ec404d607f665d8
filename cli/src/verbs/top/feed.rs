//! What `top` hears: snapshots from the agent, as long as there is one, and signals.

use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use anyhow::{Context as _, Result};
use hyper::Method;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use warmswap_agent::api::Live;

use crate::client::Client;

/// How soon an agent that is gone is looked for again.
const AGAIN: Duration = Duration::from_secs(1);

pub(super) enum Told {
    Second(Box<Live>),
    /// There is no agent, or no longer; why.
    Gone(String),
    /// Bytes from the terminal.
    Pressed(Vec<u8>),
    Resized,
    /// A signal that ends programs, by its number.
    Signal(u8),
}

/// Listens until the receiver is dropped. The sender is for others who have something to tell.
///
/// # Errors
/// When threads or signal handlers cannot be had.
pub(super) fn listen(run_dir: &Path, cost: bool) -> Result<(Sender<Told>, Receiver<Told>)> {
    let (sender, received) = channel();
    let (snapshots, signalled, run_dir) = (sender.clone(), sender.clone(), run_dir.to_owned());
    let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
        std::thread::Builder::new().name(name.to_owned()).spawn(work).context("cannot start a thread")
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let signals = {
        let _context = runtime.enter();
        let kinds = [
            SignalKind::window_change(),
            SignalKind::terminate(),
            SignalKind::hangup(),
            SignalKind::interrupt(),
            SignalKind::quit(),
        ];
        kinds.map(|kind| (kind, signal(kind)))
    };
    let mut watched = Vec::new();
    for (kind, signal) in signals {
        watched.push((kind, signal.context("cannot watch for signals")?));
    }
    spawn("signals", Box::new(move || runtime.block_on(pass_on(watched, &signalled))))?;
    spawn("snapshots", Box::new(move || follow(&run_dir, cost, &snapshots)))?;
    Ok((sender, received))
}

async fn pass_on(watched: Vec<(SignalKind, tokio::signal::unix::Signal)>, sender: &Sender<Told>) {
    let mut waiting = tokio::task::JoinSet::new();
    for (kind, mut signal) in watched {
        let sender = sender.clone();
        waiting.spawn(async move {
            let number = u8::try_from(kind.as_raw_value()).unwrap_or_default();
            let mut asked = false;
            while signal.recv().await.is_some() {
                let resized = kind == SignalKind::window_change();
                // Asked twice: it hangs in a terminal that takes nothing.
                if asked {
                    std::process::exit(128 + i32::from(number));
                }
                asked = !resized;
                if sender.send(if resized { Told::Resized } else { Told::Signal(number) }).is_err() {
                    return;
                }
            }
        });
    }
    while waiting.join_next().await.is_some() {}
}

fn follow(run_dir: &Path, cost: bool, sender: &Sender<Told>) {
    loop {
        let ended = match snapshots(run_dir, cost, |live| sender.send(Told::Second(Box::new(live))).is_ok()) {
            Ok(()) => "it ended".to_owned(),
            Err(error) => format!("{error:#}"),
        };
        if sender.send(Told::Gone(ended)).is_err() {
            return;
        }
        std::thread::sleep(AGAIN);
    }
}

/// Calls `each` with every snapshot until it returns false or the agent has ended.
///
/// # Errors
/// When there is no agent, or it goes away in the middle.
pub(super) fn snapshots(run_dir: &Path, cost: bool, mut each: impl FnMut(Live) -> bool) -> Result<()> {
    let client = Client::connect(run_dir)?;
    client.lines(Method::GET, &format!("/v1/live?cost={cost}"), &json!({}), |live: Live| Ok(each(live)))
}
