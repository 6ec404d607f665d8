//! What a handover learns of its surroundings: measurements from the observatory, judgement from policy, leases
//! against what the host has, and whoever watches.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use warmswap_handover::{Conditions, Judgement, Progress};
use warmswap_model::{Blackout, Generation, Handover, Measurements, PerResource, Phase, Resource, ServiceName};
use warmswap_policy::{Capacity, Event, enough, fits, judge};

use crate::api::{Fault, UpdateLine};
use crate::memory_latency;
use crate::shared::Shared;
use crate::{lock, service::ServiceHandle};

pub(crate) struct AgentConditions {
    pub(crate) shared: Arc<Shared>,
}

impl AgentConditions {
    fn handle(&self, service: &ServiceName) -> Option<Arc<ServiceHandle>> {
        self.shared.service(service).ok()
    }

    fn follow(&self, handle: &ServiceHandle, progress: &Progress) {
        let mut state = lock(&handle.state);
        match progress {
            Progress::PhaseBegun { phase: Phase::Quiesce } => {
                state.on(Event::QuiesceBegan);
            }
            Progress::PhaseBegun { phase: Phase::Verify } => {
                state.on(Event::QuiesceBegan); // without the SDK there is no QUIESCE
                state.on(Event::Promoted);
            }
            _ => {}
        }
    }

    fn inject(&self, handle: &ServiceHandle, progress: &Progress) {
        let fault = *lock(&handle.fault);
        if fault == Some(Fault::KillShadowInSync)
            && matches!(progress, Progress::PhaseBegun { phase: Phase::Sync })
            && let Some(shadow) = handle.shadow(&self.shared)
        {
            tracing::warn!("fault on request: SIGKILL to {shadow}");
            if let Err(error) = self.shared.backend.signal(&shadow, libc::SIGKILL) {
                tracing::error!("the fault was not injected: {error}");
            }
        }
    }
}

impl Conditions for AgentConditions {
    fn measure(&self, service: &ServiceName, length: Duration) -> Option<Measurements> {
        let mut measured = self.shared.observatory.measure(service, length)?;
        measured.memory_latency_ns = memory_latency::measure();
        Some(measured)
    }

    fn begin_measuring(&self) {
        self.shared.observatory.cut();
    }

    fn judge(&self, before: Option<&Measurements>, after: Option<&Measurements>, limits: &Handover) -> Judgement {
        let after = match after {
            Some(after) => after,
            None => return Judgement::Continue,
        };
        let before = before.copied().unwrap_or_default();
        let certain = match enough(&before, after, limits) {
            warmswap_policy::Progress::Continue => return Judgement::Continue,
            warmswap_policy::Progress::Enough => false,
            warmswap_policy::Progress::ClearlyWorse => true,
        };
        match judge(&before, after, limits) {
            warmswap_policy::Judgement::Ok => Judgement::Accept,
            warmswap_policy::Judgement::Worse { reason } => Judgement::Worse { reason, certain },
        }
    }

    fn cancelled(&self, service: &ServiceName) -> Option<String> {
        let handle = self.handle(service)?;
        let state = lock(&handle.state);
        if state.stop_wanted {
            return Some("the service is to be stopped".into());
        }
        state.rollback_wanted.then(|| "a rollback was asked for".into())
    }

    fn kernel_blackout(
        &self,
        service: &ServiceName,
        handover: u64,
        from: Generation,
        to: Generation,
    ) -> Option<Blackout> {
        self.shared.observatory.blackout(service, handover, from, to)
    }

    fn watch(
        &self,
        service: &ServiceName,
        ground: warmswap_model::CgroupId,
        members: &[warmswap_handover::MemberStatus],
    ) {
        self.shared.observatory.watch(service, crate::service::cgroups(ground, members));
        // The service's own thread says so only between handovers.
        if let Some(handle) = self.handle(service) {
            handle.show(members);
        }
    }

    fn ports_shared(&self, service: &ServiceName) -> Result<(), String> {
        // Without it the kernel resets what waits in the queue of a listener that closes (Linux 5.14).
        if !std::path::Path::new("/proc/sys/net/ipv4/tcp_migrate_req").exists() {
            return Err(
                "the kernel loses what waits at a port when one of two listeners closes (Linux 5.14 is needed)".into(),
            );
        }
        self.shared.observatory.ports_shared(service)
    }

    fn lease(&self, service: &ServiceName, reservation: &PerResource<f64>) -> Result<(), String> {
        let host = self.shared.backend.capacity().map_err(|error| error.to_string())?;
        let capacity = Capacity::of_host(host.cpus, host.memory_mb_available, host.memory_mb_total);
        let mut leases = lock(&self.shared.leases);
        fits(reservation, &capacity, &held(&leases)).map_err(|shortage| shortage.to_string())?;
        leases.insert(service.clone(), *reservation);
        Ok(())
    }

    fn release(&self, service: &ServiceName) {
        lock(&self.shared.leases).remove(service);
    }

    fn progress(&self, service: &ServiceName, progress: &Progress) {
        let Some(handle) = self.handle(service) else { return };
        self.follow(&handle, progress);
        self.inject(&handle, progress);
        if let Some(watcher) = &*lock(&handle.watcher) {
            let _ = watcher.send(UpdateLine::Progress(progress.clone())); // the watcher may have gone
        }
    }
}

fn held(leases: &BTreeMap<ServiceName, PerResource<f64>>) -> PerResource<f64> {
    PerResource::from_fn(|resource: Resource| leases.values().map(|lease| lease[resource]).sum())
}
