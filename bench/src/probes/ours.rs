//! Warmswap's own probes, as the agent has them.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use warmswap_model::{CgroupId, FeatureWindow};
use warmswap_sensor::{ProbeStatus, Sensor, SensorConfig};

use super::Ground;

/// Attached, with the draining thread, watching one cgroup or none.
pub(super) fn attach(ground: &Ground, watched: bool) -> Result<Sensor> {
    start(
        SensorConfig { disabled: ground.without.clone(), ..SensorConfig::default() },
        watched.then_some(ground.cgroup.id),
    )
}

/// A window, and for how long requests had been measured until then.
pub(super) struct Look {
    pub(super) window: FeatureWindow,
    pub(super) measured: Duration,
}

/// A window is taken every second. Dropping it detaches the probes.
pub(super) struct Watching {
    taken: Vec<Look>,
    looks: Receiver<Look>,
    /// Until it is gone.
    on: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watching {
    pub(super) fn begin(mut sensor: Sensor) -> Self {
        let (taken, looks) = mpsc::channel();
        let (on, off) = mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            loop {
                let goes_on = off.recv_timeout(Duration::from_secs(1)) == Err(RecvTimeoutError::Timeout);
                let (windows, measured) = (sensor.windows(), sensor.requests_measured());
                for window in windows {
                    // Nobody may want it any more.
                    let _ = taken.send(Look { window, measured });
                }
                if !goes_on {
                    return;
                }
            }
        });
        Self { taken: Vec::new(), looks, on: Some(on), thread: Some(thread) }
    }

    /// All windows until now.
    pub(super) fn so_far(&mut self) -> &[Look] {
        self.taken.extend(self.looks.try_iter());
        &self.taken
    }

    /// All windows, the last one up to now; the probes are detached.
    pub(super) fn until_the_end(&mut self) -> Result<&[Look]> {
        drop(self.on.take());
        if let Some(thread) = self.thread.take() {
            ensure!(thread.join().is_ok(), "the thread that takes windows panicked");
        }
        Ok(self.so_far())
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        // What it has to say was said when it panicked.
        let _ = self.until_the_end();
    }
}

/// One probe alone.
pub(super) fn attach_only(probe: &str, ground: &Ground) -> Result<Sensor> {
    let all = Sensor::load(SensorConfig::default()).context("the sensor does not load")?;
    let others = all.probes().iter().map(|other| other.name).filter(|other| *other != probe);
    let disabled = others.map(str::to_owned).collect();
    drop(all);
    let sensor = start(SensorConfig { disabled, ..SensorConfig::default() }, Some(ground.cgroup.id))?;
    ensure!(sensor.probes().iter().any(|status| status.attached), "the probe {probe} is off on this kernel");
    Ok(sensor)
}

fn start(config: SensorConfig, watched: Option<CgroupId>) -> Result<Sensor> {
    let mut sensor = Sensor::load(config).context("the sensor does not load")?;
    // The agent takes marks and nothing else, until somebody asks for a trace.
    drop(sensor.marks()?);
    if let Some(cgroup) = watched {
        sensor.watch(cgroup)?;
    }
    Ok(sensor)
}

/// Says which probes are off, and refuses to leave off what is no probe.
pub(super) fn check(ground: &Ground) -> Result<()> {
    let sensor = attach(ground, false)?;
    let (on, off): (Vec<_>, Vec<_>) = sensor.probes().iter().partition(|probe| probe.attached);
    let names = |probes: &[&ProbeStatus]| probes.iter().map(|probe| probe.name).collect::<Vec<_>>().join(", ");
    for name in &ground.without {
        ensure!(off.iter().any(|probe| probe.name == name), "{name:?} is no probe; on are: {}", names(&on));
    }
    if !off.is_empty() {
        eprintln!("probes that are off: {}", names(&off));
    }
    Ok(())
}
