//! Open-loop load for a service that speaks the Redis protocol, with clients that check their own acknowledged writes.
//!
//! It answers the questions a handover has to be asked: did any request fail, was any acknowledged write lost or applied
//! twice, was any connection lost, for how long did nobody get an answer, and what latency did clients see at a
//! *constant* rate (counted from the instant a request was due, not from when it could be sent).
//!
//! ```text
//!  schedule ──due──▶ connection ──INCR/SET/GET──▶ service
//!   k / rate           │  ▲                          │
//!                  ledger └────────── answer ◀───────┘     at the end: GET of every key, compared with the ledger
//!                      ▼
//!                  recorder ──▶ snapshots, LoadResult
//! ```
//!
//! Not here: maximum throughput (a closed-loop tool such as `redis-benchmark` does that), other protocols.

mod clock;
mod connection;
mod engine;
mod ledger;
mod newcomers;
mod recorder;
pub mod resp;
mod result;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::connection::{Connection, Identity};
use crate::engine::{Engine, Outcome, Shared};
use crate::ledger::Ledger;
use crate::recorder::Published;

pub use clock::{monotonic_ns, unix_ms};
pub use recorder::Snapshot;
pub use result::{
    BUCKET_NS, Bucket, Fault, FaultKind, Gap, LoadResult, Mark, SeriesPoint, Totals, WindowStats, record,
};

#[derive(Debug, Clone, PartialEq)]
pub struct LoadConfig {
    pub address: SocketAddr,
    /// Opened before the first request and kept to the end.
    pub connections: usize,
    /// Over all connections.
    pub rate_per_s: f64,
    /// Size of the values that SET writes; a little more when the key needs it.
    pub value_bytes: usize,
    /// Keys are `<prefix>:<connection>:c<n>` (counters) and `…:v<n>` (values). Nobody else may write them. Existing
    /// ones are deleted at the start.
    pub key_prefix: String,
    /// Share of requests that read, 0 to 1.
    pub read_share: f64,
    /// Keys of each kind per connection.
    pub counters: usize,
    pub values: usize,
    /// Requests that may be outstanding on one connection; what is due beyond that waits, and its waiting counts.
    pub pipeline_max: usize,
    /// A request that is not answered in this time has failed, and its connection is given up.
    pub timeout: Duration,
    /// The same seed gives the same requests.
    pub seed: u64,
    /// Besides, so many clients a second connect anew, send one PING and go: what becomes of those who arrive in the
    /// middle of a handover. 0 for none. A connection that is refused or not answered is a failed request.
    pub new_connections_per_s: f64,
}

impl LoadConfig {
    #[must_use]
    pub fn new(address: SocketAddr) -> Self {
        Self {
            address,
            connections: 50,
            rate_per_s: 2000.0,
            value_bytes: 64,
            key_prefix: "load".into(),
            read_share: 0.3,
            counters: 4,
            values: 4,
            pipeline_max: 8,
            timeout: Duration::from_secs(2),
            seed: 1,
            new_connections_per_s: 20.0,
        }
    }

    fn check(&self) -> Result<(), LoadError> {
        let bad = |field, problem: String| Err(LoadError::Config { field, problem });
        if self.connections == 0 {
            return bad("connections", "0 connections cannot send anything".into());
        }
        if !(self.rate_per_s.is_finite() && self.rate_per_s > 0.0) {
            return bad("rate_per_s", format!("{} is not a number above 0", self.rate_per_s));
        }
        if !(0.0..=1.0).contains(&self.read_share) {
            return bad("read_share", format!("{} is not within 0 to 1", self.read_share));
        }
        if !(self.new_connections_per_s.is_finite() && self.new_connections_per_s >= 0.0) {
            return bad("new_connections_per_s", format!("{} is no number from 0", self.new_connections_per_s));
        }
        if self.counters + self.values == 0 {
            return bad("counters", "no counters and no values: there is nothing to write".into());
        }
        if self.pipeline_max == 0 {
            return bad("pipeline_max", "0 outstanding requests cannot send anything".into());
        }
        Ok(())
    }
}

#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("load setting {field}: {problem}")]
    Config { field: &'static str, problem: String },
    #[error(
        "cannot open connection {number} of {total} to {address}; is the service running, and are enough descriptors \
         allowed (ulimit -n)?"
    )]
    Connect {
        number: usize,
        total: usize,
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot delete old keys {prefix}:* on {address}")]
    Prepare {
        prefix: String,
        address: SocketAddr,
        #[source]
        source: resp::ClientError,
    },
    #[error("{address} answered {reply} to a DEL of old keys; does it speak the Redis protocol with DEL?")]
    PrepareRefused { address: SocketAddr, reply: String },
    #[error("cannot set up the load's own {what}")]
    System {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("the load's thread ended by a panic; its counts are lost")]
    Panicked,
}

/// Entry point.
#[derive(Debug)]
pub struct Load;

impl Load {
    /// Opens all connections, deletes old keys, and begins to send.
    pub fn start(config: LoadConfig) -> Result<RunningLoad, LoadError> {
        config.check()?;
        let LoadConfig { address, connections: total, timeout, .. } = config;
        delete_old_keys(&config)?;
        let mut connections = Vec::with_capacity(total);
        for index in 0..total {
            let failed = |source| LoadError::Connect { number: index + 1, total, address, source };
            let ledger = ledger(&config, index);
            let stream = engine::connect(address, timeout).map_err(failed)?;
            let mut connection = Connection::new(ledger);
            connection.original = Some(Identity::of(&stream).map_err(failed)?);
            connection.open(stream);
            connections.push(connection);
        }
        let system = |what| move |errno: nix::errno::Errno| LoadError::System { what, source: errno.into() };
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(system("eventfd"))?;
        let shared =
            Arc::new(Shared { stop: AtomicBool::new(false), wake, published: Mutex::new(Published::default()) });
        let started_unix_ms = unix_ms();
        let engine = Engine::new(config, Arc::clone(&shared), connections).map_err(system("epoll and timer"))?;
        let started_ns = engine.started_ns();
        let thread = std::thread::Builder::new()
            .name("load".into())
            .spawn(move || engine.run())
            .map_err(|source| LoadError::System { what: "thread", source })?;
        Ok(RunningLoad {
            shared,
            thread: Some(thread),
            marks: Mutex::new(Vec::new()),
            connections: total,
            started_ns,
            started_unix_ms,
        })
    }
}

fn ledger(config: &LoadConfig, index: usize) -> Ledger {
    Ledger::new(&config.key_prefix, index, config.counters, config.values, config.value_bytes)
}

fn delete_old_keys(config: &LoadConfig) -> Result<(), LoadError> {
    let address = config.address;
    let failed = |source| LoadError::Prepare { prefix: config.key_prefix.clone(), address, source };
    let mut client = resp::Client::connect(address, config.timeout).map_err(failed)?;
    let keys: Vec<[String; 2]> = (0..config.connections)
        .flat_map(|index| {
            let ledger = ledger(config, index);
            let keys: Vec<_> = ledger.read_back().into_iter().map(|o| ["DEL".to_owned(), ledger.key(o)]).collect();
            keys
        })
        .collect();
    for batch in keys.chunks(256) {
        for reply in client.pipeline(batch).map_err(failed)? {
            if !matches!(reply, resp::Reply::Integer(_)) {
                return Err(LoadError::PrepareRefused { address, reply: reply.to_string() });
            }
        }
    }
    Ok(())
}

/// A load that goes on until it is stopped or dropped.
#[derive(Debug)]
pub struct RunningLoad {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<nix::Result<Outcome>>>,
    marks: Mutex<Vec<Mark>>,
    connections: usize,
    started_ns: u64,
    started_unix_ms: u64,
}

impl RunningLoad {
    /// How it goes, at most 100 ms old. Cheap, and without any effect on the load.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        Published::read(&self.shared.published)
    }

    /// Names this instant; returns it (CLOCK_MONOTONIC, ns).
    pub fn mark(&self, label: impl Into<String>) -> u64 {
        let at_ns = monotonic_ns();
        self.marks.lock().unwrap_or_else(PoisonError::into_inner).push(Mark { at_ns, label: label.into() });
        at_ns
    }

    /// When the first request was due, CLOCK_MONOTONIC, ns.
    #[must_use]
    pub const fn started_ns(&self) -> u64 {
        self.started_ns
    }

    /// Stops sending, waits for what is outstanding (at most the configured time limit), reads every key back.
    pub fn stop(mut self) -> Result<LoadResult, LoadError> {
        let outcome = self.end().ok_or(LoadError::Panicked)?;
        let Outcome { recorder, ended_ns, connections_kept } =
            outcome.map_err(|errno| LoadError::System { what: "event loop", source: errno.into() })?;
        let marks = std::mem::take(&mut *self.marks.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(LoadResult {
            started_ns: self.started_ns,
            started_unix_ms: self.started_unix_ms,
            ended_ns,
            totals: recorder.totals,
            connections: self.connections,
            connections_kept,
            latency: recorder.latency,
            newcomer_latency: recorder.newcomer_latency,
            generator_lag: recorder.generator_lag,
            buckets: recorder.buckets,
            marks,
            faults: recorder.faults,
        })
    }

    /// `None` when the thread panicked or was joined before.
    fn end(&mut self) -> Option<nix::Result<Outcome>> {
        let thread = self.thread.take()?;
        // Release pairs with the Acquire in `Engine::run`; nothing else travels with it.
        self.shared.stop.store(true, Ordering::Release);
        // Fails only when the counter is full, and then the thread wakes anyway.
        let _ = self.shared.wake.write(1);
        thread.join().ok()
    }
}

impl Drop for RunningLoad {
    fn drop(&mut self) {
        let _ = self.end();
    }
}
