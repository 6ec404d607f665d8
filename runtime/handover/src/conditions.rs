//! What a handover asks of its surroundings: measurements, judgement and an audience. The agent answers from the
//! sensor and `policy`; tests answer as they like.

use std::time::Duration;

use warmswap_model::{
    Blackout, CgroupId, Generation, Handover, Measurements, PerResource, Phase, PhaseOutcome, ServiceName,
};

use crate::member::MemberStatus;

/// What to do about an owner under VERIFY.
#[derive(Debug, Clone, PartialEq)]
pub enum Judgement {
    /// Not enough seen yet.
    Continue,
    /// As good as before, or better.
    Accept,
    /// Worse, with the reason in words. Unless it is `certain`, the same must be found in a second stretch, because a
    /// tail that rises once may be the host and not the service.
    Worse { reason: String, certain: bool },
}

pub trait Conditions: Send + Sync {
    /// The service over the last `length`.
    fn measure(&self, service: &ServiceName, length: Duration) -> Option<Measurements>;

    /// A stretch begins that will be measured: what was before is not to be part of it.
    fn begin_measuring(&self) {}

    /// `after` covers the time since promotion.
    fn judge(&self, before: Option<&Measurements>, after: Option<&Measurements>, limits: &Handover) -> Judgement;

    /// Time between the stop mark of `from` and the serve mark of `to`, when a probe saw both.
    fn kernel_blackout(
        &self,
        service: &ServiceName,
        handover: u64,
        from: Generation,
        to: Generation,
    ) -> Option<Blackout>;

    /// Asked before each phase that can be undone, and throughout VERIFY: why the handover should not go on.
    fn cancelled(&self, service: &ServiceName) -> Option<String>;

    /// The generations of a service, or their roles, have changed. `ground` is the cgroup that owns the sockets.
    fn watch(&self, service: &ServiceName, ground: CgroupId, members: &[MemberStatus]);

    /// Whether a port that a program of the service binds by itself can be bound by its successor too, and no connection
    /// that waits there is lost when one of them closes; else why not. Unless somebody sees to it, it cannot.
    fn ports_shared(&self, _service: &ServiceName) -> Result<(), String> {
        Err("nobody lets two programs share a port here".into())
    }

    /// The shadow's reservation is promised (RESERVE) or refused with the reason in words.
    fn lease(&self, service: &ServiceName, reservation: &PerResource<f64>) -> Result<(), String>;

    fn release(&self, service: &ServiceName);

    /// A phase began or ended, for whoever watches.
    fn progress(&self, service: &ServiceName, progress: &Progress);
}

#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case", tag = "progress")]
pub enum Progress {
    Begun { handover: u64, from: Generation, to: Generation },
    PhaseBegun { phase: Phase },
    PhaseEnded { phase: Phase, outcome: PhaseOutcome, duration_us: f64, detail: String },
}
