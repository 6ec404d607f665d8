//! Warmswap's own probes, as the agent has them.

use anyhow::{Context as _, Result, ensure};
use warmswap_model::CgroupId;
use warmswap_sensor::{ProbeStatus, Sensor, SensorConfig};

use super::Ground;

/// Attached, with the draining thread, watching one cgroup or none.
pub(super) fn attach(ground: &Ground, watched: bool) -> Result<Sensor> {
    start(
        SensorConfig { disabled: ground.without.clone(), ..SensorConfig::default() },
        watched.then_some(ground.cgroup.id),
    )
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
