//! Trains the LSTM from history, in the background and at the lowest priority, and keeps what it learned.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use warmswap_forecast::{TrainConfig, TrainError, train};
use warmswap_history::BlobKind;
use warmswap_model::FeatureWindow;

use crate::clock::unix_ms;
use crate::lock;
use crate::shared::Shared;

/// The model file in the history: one model serves all services of this host.
const MODEL_KEY: &str = "seconds";
/// How far back one training looks.
const HISTORY: Duration = Duration::from_secs(3600);
/// Training takes at most this long at a time.
const TRAINING_MAX: Duration = Duration::from_secs(30);
/// Windows that make a first training worth while, and the growth that makes another one.
const WINDOWS_FIRST: usize = 95;
const GROWTH: f64 = 1.5;
/// A host that has been watched for long is trained again this often.
const PAUSE_MAX: Duration = Duration::from_secs(900);
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Takes up what an earlier agent learned.
pub(crate) fn restore(shared: &Shared) {
    match shared.history.get_blob(BlobKind::Model, MODEL_KEY) {
        Ok(Some(bytes)) => match lock(&shared.forecaster).import(&bytes) {
            Ok(()) => tracing::info!("forecast model of {} bytes taken up", bytes.len()),
            Err(error) => tracing::warn!("the saved forecast model is refused, the baselines serve: {error}"),
        },
        Ok(None) => {}
        Err(error) => tracing::warn!("the saved forecast model cannot be read, the baselines serve: {error}"),
    }
}

/// Runs until `stop`.
pub(crate) fn run(shared: &Arc<Shared>, stop: &AtomicBool) {
    lower_priority();
    // Builds its table here and not in the first handover.
    let _ = crate::memory_latency::measure();
    let mut trained_on = 0_usize;
    let mut trained_at = Instant::now();
    let mut seed = 1;
    while !stop.load(Ordering::Relaxed) {
        if stopped_within(stop, LOOK_EVERY) {
            break;
        }
        let slices = histories(shared);
        let windows: usize = slices.iter().map(Vec::len).sum();
        let grown = windows >= WINDOWS_FIRST && windows as f64 >= trained_on as f64 * GROWTH;
        let stale = trained_on > 0 && trained_at.elapsed() >= PAUSE_MAX;
        if !grown && !stale {
            continue;
        }
        (trained_on, trained_at) = (windows, Instant::now());
        seed += 1;
        train_once(shared, stop, &slices, seed);
    }
    keep(shared);
}

/// Sleeps in short steps, so that the agent ends when it is told to.
fn stopped_within(stop: &AtomicBool, length: Duration) -> bool {
    let until = Instant::now() + length;
    while !stop.load(Ordering::Relaxed) && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(50));
    }
    stop.load(Ordering::Relaxed)
}

fn histories(shared: &Shared) -> Vec<Vec<FeatureWindow>> {
    let now = unix_ms();
    let from = now.saturating_sub(HISTORY.as_millis() as u64);
    let services = shared.history.services().unwrap_or_default();
    services
        .iter()
        .filter_map(|service| {
            shared
                .history
                .windows(service, from..now)
                .inspect_err(|error| tracing::warn!("{service} is left out of the training: {error}"))
                .ok()
        })
        .filter(|windows| !windows.is_empty())
        .collect()
}

fn train_once(shared: &Shared, stop: &AtomicBool, slices: &[Vec<FeatureWindow>], seed: u64) {
    let (config, start) = {
        let forecaster = lock(&shared.forecaster);
        (forecaster.config().clone(), forecaster.weights().cloned())
    };
    let began = Instant::now();
    let result =
        train(slices, &config, &TrainConfig { seed, ..TrainConfig::default() }, start.as_ref(), &mut |_| match stop
            .load(Ordering::Relaxed)
            || began.elapsed() > TRAINING_MAX
        {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        });
    match result {
        Ok(weights) => {
            let steps = weights.steps;
            match lock(&shared.forecaster).install(weights) {
                Ok(()) => tracing::info!("trained: {steps} steps so far, {:.1} s", began.elapsed().as_secs_f64()),
                Err(error) => tracing::warn!("the trained model is not used: {error}"),
            }
            keep(shared);
        }
        Err(TrainError::TooLittleHistory { .. } | TrainError::Interrupted) => {}
        Err(error) => tracing::warn!("{error}"),
    }
}

fn keep(shared: &Shared) {
    let image = lock(&shared.forecaster).export();
    if let Err(error) = shared.history.put_blob(BlobKind::Model, MODEL_KEY, &image) {
        tracing::warn!("what was learned is not kept: {error}");
    }
}

/// SCHED_IDLE: only what nobody else wants. Failing is harmless, the thread is then merely as important as others.
fn lower_priority() {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: 0 is the calling thread; the struct lives through the call, which only reads it.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) };
}
