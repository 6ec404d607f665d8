//! The supervisor of a host: wires probes, history, forecast, policy and handovers, and serves the API.
//!
//! ```text
//!  svc-NAME   one thread per service: owns its supervisor, runs its handovers      (service, conditions)
//!  tick       once a second: windows, history, forecasts, triggers, snapshots      (tick, minutes, observatory, live)
//!  train      SCHED_IDLE: trains the LSTMs from history                            (trainer)
//!  cgroups    containers of other tools as they come and go                        (containers)
//!  marks      handover marks from the sensor's urgent ring                         (observatory)
//!  tokio      the API on a unix socket                                             (http, api, metrics)
//! ```
//!
//! Not here: how a handover goes (`handover`), what is decided (`policy`), what a container is (`backend`).

mod alarms;
pub mod api;
mod clock;
mod conditions;
mod containers;
mod http;
mod live;
mod memory_latency;
mod metrics;
mod minutes;
mod observatory;
mod random;
mod service;
mod shared;
mod start;
mod tick;
mod trainer;

pub use containers::{OtherContainers, check_other_containers};
pub use shared::{AgentConfig, AgentError};
pub use start::run;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks; a panic elsewhere while it was held does not stop the agent: all our data stays consistent between lines.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
