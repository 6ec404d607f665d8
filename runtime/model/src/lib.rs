//! Plain data that every room of warmswap shares: ids, resources, demand, windows, handover reports and the
//! service file. No I/O, no clock, no randomness: whatever is here can be recorded and replayed.
//!
//! Not here: how any of it is measured (`sensor`), decided (`policy`, `forecast`) or done (`handover`, `backend`).

mod causes;
mod demand;
mod handover;
mod id;
mod latency;
mod listen;
mod resource;
mod service_file;
mod signal;
mod window;

pub use causes::with_causes;
pub use demand::{Champion, DemandVector, Quantiles};
pub use handover::{
    Blackout, ConnectionCounts, HandoverReport, Measurements, Phase, PhaseOutcome, PhaseTiming, Rung, StateMove,
    StepTiming, Trigger, Verdict,
};
pub use id::{CgroupId, Generation, InvalidServiceName, ServiceName};
pub use latency::LatencyHistogram;
pub use listen::{InvalidListenAddress, Listen, ListenAddress, Network, Transport};
pub use resource::{PerResource, Resource};
pub use service_file::{Handover, ImageRef, Readiness, Reserve, Resources, Schedule, ServiceFile, ServiceFileError};
pub use signal::{InvalidSignal, Signal};
pub use window::{Durations, FeatureWindow, ProbeCounts};
