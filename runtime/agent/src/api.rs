//! What travels between `warmswap` on the command line and the agent: HTTP with JSON over a unix socket that only
//! root can open. Long answers (an update, a trace) are one JSON document a line, as it happens.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/status` | [`AgentStatus`] |
//! | `POST /v1/services` [`RunRequest`] | [`ServiceStatus`] |
//! | `POST /v1/services/NAME/update` [`UpdateRequest`] | lines of [`UpdateLine`] |
//! | `POST /v1/services/NAME/rollback` | lines of [`UpdateLine`] |
//! | `POST /v1/services/NAME/stop` | `{}` |
//! | `POST /v1/stop` | `{}`, then the agent ends |
//! | `GET /v1/services/NAME/forecast` | [`ForecastAnswer`] |
//! | `GET /v1/services/NAME/history` | `[HandoverReport]`, oldest first |
//! | `GET /v1/services/NAME/windows?seconds=N` | `[FeatureWindow]`, oldest first |
//! | `GET /v1/trace?service=S&container=C&user=UID&class=A,B&seconds=N` | lines of [`TraceLine`] |
//! | `GET /v1/live?cost=true` | lines of [`Live`], one a second |
//! | `GET /metrics` | Prometheus text |
//!
//! Errors: a 4xx or 5xx status with [`ApiError`].

mod live;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
pub use warmswap_forecast::{ForecastReport, LstmState, ResourceReport};
pub use warmswap_handover::{MemberStatus, Progress, Role};
use warmswap_model::{
    Champion, DemandVector, FeatureWindow, Generation, HandoverReport, PerResource, Quantiles, ServiceName,
};
use warmswap_policy::TunerReport;

pub use live::{Container, Dropped, KernelCost, Live, LiveContainer, News, NewsKind, ProbeCost, Tool};

/// File in the run folder that an agent holds locked as long as it lives.
pub const LOCK_NAME: &str = "agent.lock";
/// File name of the API socket in the run folder.
pub const SOCKET_NAME: &str = "agent.sock";

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ApiError {
    pub error: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AgentStatus {
    pub version: String,
    pub pid: u32,
    pub uptime_s: f64,
    pub backend: String,
    pub services: Vec<ServiceStatus>,
    pub probes_attached: usize,
    /// Name and reason of every probe that is off.
    pub probes_off: Vec<(String, String)>,
    pub events: Vec<EventAccount>,
}

/// `emitted = consumed + discarded + dropped`, per class.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventAccount {
    pub class: String,
    pub emitted: u64,
    pub consumed: u64,
    pub discarded: u64,
    pub dropped: u64,
    /// Of those dropped: to leave room for classes of more value.
    #[serde(default)]
    pub shed: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ServiceStatus {
    pub name: ServiceName,
    pub owner: Option<Generation>,
    pub image: String,
    pub previous_image: Option<String>,
    pub generations: Vec<MemberStatus>,
    /// Name and address.
    pub listeners: Vec<(String, String)>,
    /// What it does now, if it is not just serving.
    pub activity: Option<String>,
    pub trouble: Option<String>,
    pub usage: PerResource<f64>,
    pub requests_per_s: f64,
    pub p99_us: Option<f64>,
    pub handovers: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunRequest {
    /// Where the service file lies, for errors and relative image paths.
    pub path: PathBuf,
    pub text: String,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct UpdateRequest {
    /// The new image; without it, the image the service runs now.
    pub image: Option<PathBuf>,
    /// A changed service file: its image and settings hold from this handover on.
    pub file: Option<RunRequest>,
    /// For demonstrations and tests: break something on purpose.
    pub fault: Option<Fault>,
}

/// A fault that is injected into a handover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// SIGKILL to the shadow as SYNC begins.
    KillShadowInSync,
    /// The agent stops itself (SIGSTOP) before the step with this number, from 1, of [`HandoverReport::steps`]. Whoever asked
    /// for it does there what it likes, and continues the agent, or ends it.
    StopAgent { before_step: usize },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UpdateLine {
    Progress(Progress),
    Report(Box<HandoverReport>),
    Error(String),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ForecastAnswer {
    pub service: ServiceName,
    pub demand: Option<DemandVector>,
    pub report: Option<ForecastReport>,
    /// The last minutes, oldest first, for a plot.
    pub recent: Vec<FeatureWindow>,
    /// What was forecast for the recent windows, by the time it was forecast for.
    pub bands: Vec<Band>,
    /// Over minutes; `None` before the first minute has closed.
    #[serde(default)]
    pub minutes: Option<MinutesForecast>,
    /// Why the reservation percentages are what they are.
    pub tuner: Vec<TunerReport>,
}

/// What a service is expected to need at some minutes from now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MinutesForecast {
    /// End of the newest minute that was seen; horizons count from it.
    pub until_unix_ms: u64,
    /// Optimiser steps of the network, those of the base that it began with included.
    pub trained_steps: u64,
    /// Rising horizons.
    pub resources: PerResource<Vec<HorizonForecast>>,
    /// The last hour, for a plot: when each minute ended, and what it came to.
    pub recent: Vec<(u64, PerResource<f64>)>,
}

/// One horizon of one resource, in its unit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct HorizonForecast {
    pub minutes: usize,
    pub band: Quantiles,
    /// Who says the median.
    pub champion: Champion,
    /// Share of recent values inside their interval from q05 to q95; `None` until there are enough.
    pub coverage90: Option<f64>,
}

/// A forecast whose time has come, beside what happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Band {
    pub unix_ms: u64,
    pub demand: DemandVector,
    /// The LSTM's own, whoever served.
    #[serde(default)]
    pub lstm: PerResource<Option<Quantiles>>,
    /// In the same terms as the forecast (see `DemandVector`).
    pub actual: PerResource<f64>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TraceLine {
    /// Known when the event belongs to a service.
    pub service: Option<ServiceName>,
    pub generation: Option<Generation>,
    /// Known when the event belongs to a container of another tool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<Container>,
    pub event: warmswap_sensor::Event,
}
