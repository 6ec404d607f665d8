//! Clients that arrive while the load runs: connect, PING, go. The long-lived connections say nothing about a listener
//! that was closed for a moment; these do.
//!
//! They work on a thread of their own with blocking calls, one after the other, so a stalled service delays the next one
//! (their number then falls short; the latency of the one that waited says for how long).

use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::clock::monotonic_ns;
use crate::resp::{Client, Reply};

#[derive(Debug)]
pub(crate) struct Newcomer {
    /// When it began to connect.
    pub(crate) at_ns: u64,
    /// Until it was answered, ns; or why it was not.
    pub(crate) result: Result<u64, String>,
}

#[derive(Debug)]
pub(crate) struct Newcomers {
    arrived: Receiver<Newcomer>,
    /// Dropping it ends the thread.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Newcomers {
    pub(crate) fn start(address: SocketAddr, timeout: Duration, rate_per_s: f64) -> std::io::Result<Self> {
        let (report, arrived) = channel();
        let (stop, stopped) = channel();
        let mut newcomers = Self { arrived, stop: Some(stop), thread: None };
        if rate_per_s > 0.0 {
            let interval = Duration::from_secs_f64((1.0 / rate_per_s).min(3600.0));
            let body = move || keep_arriving(address, timeout, interval, &report, &stopped);
            newcomers.thread = Some(std::thread::Builder::new().name("load-newcomers".into()).spawn(body)?);
        }
        Ok(newcomers)
    }

    /// Those who are through by now.
    pub(crate) fn take(&self) -> Vec<Newcomer> {
        self.arrived.try_iter().collect()
    }

    /// Nobody arrives after this has returned; the last one is waited for.
    pub(crate) fn stop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Newcomers {
    fn drop(&mut self) {
        self.stop();
    }
}

fn keep_arriving(
    address: SocketAddr,
    timeout: Duration,
    interval: Duration,
    report: &Sender<Newcomer>,
    stopped: &Receiver<()>,
) {
    let begun = Instant::now();
    for number in 1_u32.. {
        let wait = (begun + interval.saturating_mul(number)).saturating_duration_since(Instant::now());
        if stopped.recv_timeout(wait) != Err(RecvTimeoutError::Timeout) {
            return;
        }
        let at_ns = monotonic_ns();
        let result = arrive(address, timeout).map(|()| monotonic_ns().saturating_sub(at_ns));
        if report.send(Newcomer { at_ns, result }).is_err() {
            return;
        }
    }
}

fn arrive(address: SocketAddr, timeout: Duration) -> Result<(), String> {
    let answer = Client::connect(address, timeout).and_then(|mut client| client.command(&["PING"]));
    match answer {
        Ok(Reply::Simple(text)) if text == "PONG" => Ok(()),
        Ok(other) => Err(format!("a new client's PING was answered with {other}")),
        Err(error) => {
            // The cause is in the source; a fault is one line.
            let cause = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
            Err(format!("a new client: {error}{cause}"))
        }
    }
}
