//! session-store as a service of warmswap, to be updated again and again.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use warmswap_load::resp::{Client, Reply};
use warmswap_load::{Load, LoadConfig, LoadResult, RunningLoad};

use crate::host::{Host, PROGRAM, Timed, free_port};
use crate::interrupt;

/// Of each service. High enough that a gap is known to a millisecond, low enough that the load is not what is measured.
const RATE_PER_S: f64 = 1000.0;
/// Slow is not failed: how slow is what gaps and quantiles say.
const TIMEOUT: Duration = Duration::from_secs(10);
const FILL_VALUE_BYTES: usize = 4096;
const FILL_PIPELINE: usize = 64;
/// Room beside the state for the process, its index and the load's own keys.
const MEMORY_MB_BESIDE: u64 = 256;
/// Of what went wrong, so many are shown: the first ones say what the others follow from.
const FAULTS_SHOWN: usize = 12;

/// What a service gets by default to stop serving; more than this would have undone the handover.
pub(super) const QUIESCE_MS_DEFAULT: f64 = 10.0;

pub(super) struct Subject {
    pub(super) name: String,
    pub(super) address: SocketAddr,
    pub(super) state_mib: u64,
    image: usize,
}

impl Subject {
    /// Starts the service and fills its state.
    pub(super) fn start(host: &Host, name: &str, state_mib: u64) -> Result<Self> {
        let address = free_port()?;
        let file = host.state_dir.join(format!("{name}.toml"));
        std::fs::write(&file, service_file(name, address, state_mib))?;
        host.ask(&["run", &file.display().to_string()], false)?;
        fill(address, state_mib)?;
        Ok(Self { name: name.to_owned(), address, state_mib, image: 0 })
    }

    /// Hands over to the other image.
    pub(super) fn update(&mut self, host: &Host) -> Result<Timed> {
        self.image += 1;
        host.update(&self.name, &host.image(self.image))
    }
}

/// VERIFY is short and accepts whatever it sees, and QUIESCE may take long: handovers are to be measured, the slow ones too,
/// not judged.
fn service_file(name: &str, address: SocketAddr, state_mib: u64) -> String {
    let memory_mb = 2 * state_mib + MEMORY_MB_BESIDE;
    format!(
        "name = \"{name}\"\nimage = \"images/a\"\ncommand = [\"/bin/{PROGRAM}\"]\n[listen.resp]\naddress = \"{address}\"\n\
         [resources]\nmemory_mb_max = {memory_mb}\ncpu_pct_max = 200\n[reserve]\ntune = false\n\
         [handover]\nquiesce_ms_max = 1000\nverify_s_min = 0.05\nverify_requests_min = 20\np99_ratio_max = 1e6\n\
         cpu_ratio_max = 1e6\nmemory_latency_ratio_max = 1e6\nthroughput_ratio_min = 0\n"
    )
}

/// Writes `mib` MiB of values.
fn fill(address: SocketAddr, mib: u64) -> Result<()> {
    let mut client = Client::connect(address, TIMEOUT)?;
    let value = "x".repeat(FILL_VALUE_BYTES);
    let values = mib * (1 << 20) / FILL_VALUE_BYTES as u64;
    let keys: Vec<String> = (0..values).map(|key| format!("fill:{key}")).collect();
    for chunk in keys.chunks(FILL_PIPELINE) {
        interrupt::check()?;
        let commands: Vec<[&str; 3]> = chunk.iter().map(|key| ["SET", key.as_str(), value.as_str()]).collect();
        for reply in client.pipeline(&commands)? {
            ensure!(!matches!(reply, Reply::Error(_)), "filling the state failed: {reply:?}");
        }
    }
    Ok(())
}

/// Clients at a constant rate that check every acknowledged write.
pub(super) fn load(address: SocketAddr, connections: usize) -> Result<RunningLoad> {
    let config = LoadConfig { connections, rate_per_s: RATE_PER_S, timeout: TIMEOUT, ..LoadConfig::new(address) };
    Ok(Load::start(config)?)
}

/// Says what went wrong for clients, and in which handover.
pub(super) fn show_faults(who: &str, result: &LoadResult, handovers: &[Timed]) {
    for fault in result.faults.iter().take(FAULTS_SHOWN) {
        let handover = handovers.iter().rfind(|timed| timed.span.start_ns <= fault.at_ns);
        let after = handover.map_or_else(String::new, |Timed { report, span, .. }| {
            let ms = (fault.at_ns - span.start_ns) as f64 / 1e6;
            format!(", {ms:.1} ms after the begin of handover {} to {}", report.id, report.to)
        });
        eprintln!("  {who}: {:?} on connection {}{after}: {}", fault.kind, fault.connection, fault.detail);
    }
}

#[cfg(test)]
mod tests {
    use warmswap_model::ServiceFile;

    use super::*;

    #[test]
    fn the_service_file_is_one() {
        let file = ServiceFile::parse("x.toml", &service_file("bench", "127.0.0.1:1".parse().unwrap(), 1024)).unwrap();
        assert_eq!(file.resources.memory_mb_max, 2304.0);
        assert_eq!(warmswap_model::Handover::default().quiesce_ms_max, QUIESCE_MS_DEFAULT);
    }
}
