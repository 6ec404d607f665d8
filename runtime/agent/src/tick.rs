//! Once a second: counts become windows, windows go to history and the forecast, and triggers are looked at.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use warmswap_backend::ContainerId;
use warmswap_history::{BlobKind, Retention};
use warmswap_model::{DemandVector, FeatureWindow, PerResource, Quantiles, Resource, ServiceName, Trigger};
use warmswap_policy::{Admission, Request, TriggerInput, TriggerState, triggers};

use crate::alarms::Alarms;
use crate::api::Band;
use crate::clock::unix_ms;
use crate::lock;
use crate::service::{self, ServiceHandle, Update};
use crate::shared::Shared;

const TICK: Duration = Duration::from_secs(1);
/// Bands kept per service, for plots and the report.
const BANDS_KEPT: usize = 900;
/// An image is looked at this often; a folder is walked for it.
const IMAGE_CHECK_EVERY: u64 = 10;
const RETENTION_EVERY: u64 = 600;
/// Windows that the memory trend sees.
const TREND_WINDOWS: usize = 300;

/// A forecast whose horizon has not passed.
struct Due {
    at_unix_ms: u64,
    demand: DemandVector,
    lstm: PerResource<Option<Quantiles>>,
}

/// Runs until `stop`.
pub(crate) fn run(shared: &Arc<Shared>, stop: &AtomicBool) {
    let mut due: BTreeMap<ServiceName, Vec<Due>> = BTreeMap::new();
    let mut states: BTreeMap<ServiceName, TriggerState> = BTreeMap::new();
    let mut alarms = Alarms::default();
    let mut next = Instant::now() + TICK;
    for count in 1_u64.. {
        while let Some(left) = next.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            std::thread::sleep(left.min(Duration::from_millis(100)));
        }
        // A tick that was missed is not made up for: the next window is longer, and says so.
        next = (next + TICK).max(Instant::now());
        let windows = shared.observatory.tick(|service| memory_mb(shared, service));
        observe(shared, &windows, &mut due);
        alarms.look(shared, &windows);
        shared.live.publish(shared, &windows);
        for handle in shared.services() {
            if let Err(error) = lock(&shared.minutes).feed(&shared.history, &handle.name, unix_ms()) {
                tracing::warn!("the last minutes of {} are not forecast from: {error}", handle.name);
            }
            let state = states.entry(handle.name.clone()).or_insert_with(|| recall_triggers(shared, &handle.name));
            let before = state.clone();
            let fired = look_at_triggers(shared, &handle, state, count);
            if *state != before {
                remember_triggers(shared, &handle.name, state); // before acting, so that nothing fires twice
            }
            if let Some(trigger) = fired {
                hand_over(shared, &handle, trigger);
            }
        }
        if count.is_multiple_of(RETENTION_EVERY)
            && let Err(error) = shared.history.enforce_retention(unix_ms(), &Retention::default())
        {
            tracing::warn!("{error}");
        }
    }
}

/// Memory of the owner, MB.
fn memory_mb(shared: &Shared, service: &ServiceName) -> Option<f64> {
    let handle = shared.service(service).ok()?;
    let generation = lock(&handle.snapshot).owner?;
    let usage = shared.backend.usage(&ContainerId { service: service.clone(), generation }).ok()?;
    Some(usage.memory_bytes as f64 / f64::from(1 << 20))
}

fn observe(shared: &Shared, windows: &[(ServiceName, FeatureWindow)], due: &mut BTreeMap<ServiceName, Vec<Due>>) {
    if windows.is_empty() {
        return;
    }
    if let Err(error) = shared.history.append_windows(windows) {
        tracing::warn!("the windows of this second are not kept: {error}");
    }
    let now = unix_ms();
    let borrowed: Vec<(ServiceName, &FeatureWindow)> =
        windows.iter().map(|(name, window)| (name.clone(), window)).collect();
    let mut forecaster = lock(&shared.forecaster);
    forecaster.observe(now, &borrowed);
    let mut bands = lock(&shared.bands);
    for (name, _) in windows {
        let waiting = due.entry(name.clone()).or_default();
        let passed = waiting.iter().take_while(|forecast| forecast.at_unix_ms <= now).count();
        let kept = bands.entry(name.clone()).or_default();
        for Due { at_unix_ms, demand, lstm } in waiting.drain(..passed) {
            let steps = (demand.horizon_s.round() as usize).max(1);
            let actual = actual_demand(&shared.observatory.windows(name, steps));
            kept.push(Band { unix_ms: at_unix_ms, demand, lstm, actual });
        }
        let surplus = kept.len().saturating_sub(BANDS_KEPT);
        kept.drain(..surplus);
        if let Some(demand) = forecaster.demand(name) {
            let at_unix_ms = now + (demand.horizon_s * 1e3) as u64;
            waiting.push(Due { at_unix_ms, demand, lstm: forecaster.lstm(name) });
        }
    }
}

/// What came, in the terms of a demand vector: the highest memory, the mean of the rates.
fn actual_demand(windows: &[FeatureWindow]) -> PerResource<f64> {
    PerResource::from_fn(|resource| {
        let values = windows.iter().map(|window| window.usage[resource]);
        match resource {
            Resource::Memory => values.fold(0.0, f64::max),
            _ => values.sum::<f64>() / windows.len().max(1) as f64,
        }
    })
}

fn recall_triggers(shared: &Shared, service: &ServiceName) -> TriggerState {
    match shared.history.get_blob(BlobKind::Triggers, service.as_str()) {
        Ok(saved) => saved.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default(),
        Err(error) => {
            tracing::warn!("which triggers of {service} have fired is not known: {error}");
            TriggerState::default()
        }
    }
}

fn remember_triggers(shared: &Shared, service: &ServiceName, state: &TriggerState) {
    let kept = serde_json::to_vec(state).map_err(|error| error.to_string()).and_then(|bytes| {
        let kept = shared.history.put_blob(BlobKind::Triggers, service.as_str(), &bytes);
        kept.map_err(|error| error.to_string())
    });
    if let Err(problem) = kept {
        tracing::warn!("which triggers of {service} have fired is not kept: {problem}");
    }
}

fn look_at_triggers(shared: &Shared, handle: &ServiceHandle, state: &mut TriggerState, count: u64) -> Option<Trigger> {
    let (file, folder) = lock(&handle.file).clone();
    // What runs, which is not what the file says after `update --image`.
    let running = lock(&handle.snapshot).image.clone();
    let running_digest = lock(&handle.state).digest.clone();
    let present = (file.schedule.watch_image && count.is_multiple_of(IMAGE_CHECK_EVERY))
        .then(|| shared.backend.prepare_image(&running.resolved(&folder)).ok())
        .flatten();
    let memory: Vec<(f64, f64)> = match file.schedule.before_memory_exhaustion_s {
        None => Vec::new(),
        Some(_) => shared
            .observatory
            .windows(&handle.name, TREND_WINDOWS)
            .iter()
            .map(|window| (window.end_unix_ms as f64 / 1e3, window.usage.memory))
            .collect(),
    };
    let input = TriggerInput {
        now_unix_s: unix_ms() / 1000,
        schedule: &file.schedule,
        running_digest: &running_digest,
        image_digest: present.as_ref().map(|image| image.digest.as_str()),
        memory: &memory,
        memory_limit_mb: file.resources.memory_mb_max,
    };
    triggers(state, &input)
}

/// A predicted handover: to the image that runs, as it is now.
fn hand_over(shared: &Shared, handle: &ServiceHandle, trigger: Trigger) {
    let folder = lock(&handle.file).1.clone();
    let image = lock(&handle.snapshot).image.clone();
    let digest = match service::digest(shared, &image.resolved(&folder)) {
        Ok(prepared) => prepared.digest,
        Err(error) => {
            tracing::warn!("{}: predicted a handover ({trigger:?}), but {error}", handle.name);
            return;
        }
    };
    tracing::info!("{}: handover predicted: {trigger:?}", handle.name);
    if lock(&handle.state).accept(&Request::PredictedUpdate { digest }) == Admission::Accept {
        handle.update(Update { image, file: None, trigger, fault: None, watcher: None });
    }
}
