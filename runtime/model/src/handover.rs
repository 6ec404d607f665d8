//! A handover as a record: what was done, in which phases, with what result.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{DemandVector, Generation, PerResource, ServiceName};

/// The steps of a handover, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// A lease on CPU, memory, network and disk for the shadow.
    Reserve,
    /// The shadow is created and reports ready.
    Warm,
    /// State and duplicates of connections reach the shadow while the active serves.
    Sync,
    /// The active stops taking work and finishes what is in flight.
    Quiesce,
    /// What changed since SYNC reaches the shadow.
    Delta,
    /// The shadow becomes the owner.
    Promote,
    /// The new owner is compared with the values before.
    Verify,
    /// The old generation retires.
    Commit,
}

impl Phase {
    pub const ALL: [Self; 8] =
        [Self::Reserve, Self::Warm, Self::Sync, Self::Quiesce, Self::Delta, Self::Promote, Self::Verify, Self::Commit];
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Reserve => "RESERVE",
            Self::Warm => "WARM",
            Self::Sync => "SYNC",
            Self::Quiesce => "QUIESCE",
            Self::Delta => "DELTA",
            Self::Promote => "PROMOTE",
            Self::Verify => "VERIFY",
            Self::Commit => "COMMIT",
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PhaseOutcome {
    Done,
    Failed,
    Undone,
}

/// When a phase began, relative to the start of the handover, and how long it took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PhaseTiming {
    pub phase: Phase,
    pub start_us: f64,
    pub duration_us: f64,
    pub outcome: PhaseOutcome,
}

/// One thing that the supervisor did or heard during a handover, such as `tell g2 Own`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepTiming {
    /// Since the start of the handover.
    pub at_us: f64,
    pub what: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The new generation owns the service.
    Committed,
    /// The new generation served, was worse, and the old one owns the service again.
    RolledBack,
    /// The new generation never served.
    Aborted,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Committed => "committed",
            Self::RolledBack => "rolled back",
            Self::Aborted => "aborted",
        })
    }
}

/// How much the service took part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rung {
    /// Stop, then start: clients see it.
    None,
    /// The new generation binds the ports that the old one has bound; connections that wait there move, established ones
    /// drain in the old generation; state does not move.
    Ports,
    /// Listeners move; established connections drain in the old generation; state does not move.
    Listeners,
    /// Listeners and established connections move; state does not.
    Fds,
    /// Listeners, established connections and state move.
    Full,
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::None => "none",
            Self::Ports => "ports",
            Self::Listeners => "listeners",
            Self::Fds => "fds",
            Self::Full => "full",
        })
    }
}

/// How the state of a service gets from one generation to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StateMove {
    /// There is none, or it does not move.
    #[default]
    None,
    /// It lies in memory that both map.
    Resident,
    /// It is copied while the old generation serves, and every change after it.
    PreCopied,
    /// It is copied while nobody serves.
    Snapshot,
}

impl StateMove {
    /// As in "its state moves …".
    #[must_use]
    pub const fn how(self) -> &'static str {
        match self {
            Self::None => "not at all",
            Self::Resident => "in shared memory",
            Self::PreCopied => "pre-copied",
            Self::Snapshot => "as a snapshot",
        }
    }
}

impl fmt::Display for StateMove {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::None => "none",
            Self::Resident => "resident",
            Self::PreCopied => "pre-copied",
            Self::Snapshot => "snapshot",
        })
    }
}

/// Why a handover was started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Trigger {
    /// A person asked.
    Request,
    /// The service file's schedule said so.
    Schedule,
    /// The image the service file names has changed.
    ImageChanged,
    /// Memory will meet its limit in this many seconds.
    MemoryExhaustion { seconds_left: u64 },
}

/// The time in which no generation served.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Blackout {
    /// Between the marks of the old and the new owner, in the kernel's monotonic clock.
    pub us: f64,
    /// True when the two marks were seen by a BPF probe, false when by the supervisor's own clock.
    pub measured_in_kernel: bool,
}

/// Established connections by what became of them. Sent and received must be equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ConnectionCounts {
    pub sent: u64,
    pub received: u64,
    pub closed_meanwhile: u64,
}

/// The service over one stretch of time, for comparison.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Measurements {
    pub seconds: f64,
    pub requests: u64,
    pub p50_us: Option<f64>,
    pub p99_us: Option<f64>,
    pub requests_per_s: f64,
    pub tcp_resets: u64,
    pub usage: PerResource<f64>,
    /// Mean of a dependent load over memory that does not fit the caches, ns; `None` when not measured.
    pub memory_latency_ns: Option<f64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HandoverReport {
    /// Counts up over all handovers of the host.
    pub id: u64,
    pub service: ServiceName,
    pub from: Generation,
    pub to: Generation,
    pub from_image: String,
    pub to_image: String,
    pub trigger: Trigger,
    pub rung: Rung,
    pub verdict: Verdict,
    /// One sentence on why it was rolled back or aborted.
    pub reason: Option<String>,
    /// What was lost, in words; empty when nothing was.
    pub lost: Vec<String>,
    pub started_unix_ms: u64,
    pub duration_ms: f64,
    pub phases: Vec<PhaseTiming>,
    /// Everything the supervisor did and heard, in order.
    #[serde(default)]
    pub steps: Vec<StepTiming>,
    /// Each time in which nobody served: forward and, after a rollback, backward; one that ended with the old generation
    /// serving again as well. Empty when the old generation was never asked to stop.
    pub blackouts: Vec<Blackout>,
    pub connections: ConnectionCounts,
    #[serde(default)]
    pub state: StateMove,
    /// Bytes of state that moved: mapped when it is resident, copied otherwise.
    pub state_bytes: u64,
    pub before: Option<Measurements>,
    pub after: Option<Measurements>,
    pub forecast: Option<DemandVector>,
    /// What was held for the shadow.
    pub reservation: PerResource<f64>,
}
