//! Trains the LSTMs from history, in the background and at the lowest priority, and keeps what they learned.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use warmswap_forecast::{TrainConfig, TrainError, train, train_outlook};
use warmswap_history::BlobKind;
use warmswap_model::FeatureWindow;

use crate::clock::unix_ms;
use crate::lock;
use crate::minutes::{LOOK_BACK_MS, series_of};
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
/// Minutes, over all services, that make a first training of the outlook worth while, and how often it is trained at most.
const MINUTES_FIRST: usize = 720;
const MINUTES_PAUSE: Duration = Duration::from_secs(6 * 3600);
const MINUTES_LOOK_EVERY: Duration = Duration::from_secs(60);
const MINUTES_TRAINING: TrainConfig =
    TrainConfig { seed: 1, steps_max: 2000, learning_rate: 1e-3, patience_steps: 600, look_every_steps: 100 };
/// What was learned over minutes is kept this often; the minutes since are in the history.
const MINUTES_KEPT_EVERY: Duration = Duration::from_secs(900);

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
    match lock(&shared.minutes).restore(&shared.history) {
        Ok(Some(bytes)) => tracing::info!("forecasts over minutes of {bytes} bytes taken up"),
        Ok(None) => {}
        Err(error) => {
            tracing::warn!(
                "what was learned over minutes is not taken up, they are read again from the history: {error}"
            );
        }
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
    let mut minutes_next = Instant::now() + MINUTES_LOOK_EVERY;
    let mut minutes_kept = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        if stopped_within(stop, LOOK_EVERY) {
            break;
        }
        if Instant::now() >= minutes_next {
            let trained = train_minutes(shared, stop);
            minutes_next = Instant::now() + if trained { MINUTES_PAUSE } else { MINUTES_LOOK_EVERY };
        }
        if minutes_kept.elapsed() >= MINUTES_KEPT_EVERY {
            minutes_kept = Instant::now();
            keep_minutes(shared);
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
    keep_minutes(shared);
}

/// Trains the outlook, if there is enough to learn from; whether there was.
fn train_minutes(shared: &Shared, stop: &AtomicBool) -> bool {
    let now = unix_ms();
    let of = |service| shared.history.minutes(service, now.saturating_sub(LOOK_BACK_MS)..now).unwrap_or_default();
    let services = shared.history.services().unwrap_or_default();
    let windows: Vec<Vec<FeatureWindow>> = services.iter().map(of).collect();
    if windows.iter().map(Vec::len).sum::<usize>() < MINUTES_FIRST {
        return false;
    }
    let series: Vec<_> = windows.iter().flat_map(|windows| series_of(windows)).collect();
    let (config, start) = {
        let mut minutes = lock(&shared.minutes);
        (minutes.outlook().config().clone(), minutes.outlook().weights().cloned())
    };
    let began = Instant::now();
    let trained = train_outlook(&series, &config, &MINUTES_TRAINING, start.as_ref(), &mut |_| {
        let over = stop.load(Ordering::Relaxed) || began.elapsed() > TRAINING_MAX;
        if over { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    match trained {
        Ok(weights) => {
            let steps = weights.steps;
            match lock(&shared.minutes).outlook().install(weights) {
                Ok(()) => tracing::info!("trained over minutes: {steps} steps, {:.1} s", began.elapsed().as_secs_f64()),
                Err(error) => tracing::warn!("the model over minutes is not used: {error}"),
            }
            keep_minutes(shared);
        }
        Err(TrainError::TooLittleHistory { .. } | TrainError::Interrupted) => {}
        Err(error) => tracing::warn!("over minutes: {error}"),
    }
    true
}

fn keep_minutes(shared: &Shared) {
    if let Err(error) = lock(&shared.minutes).keep(&shared.history) {
        tracing::warn!("what was learned over minutes is not kept: {error}");
    }
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
