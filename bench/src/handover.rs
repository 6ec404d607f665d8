//! `warmswap-bench handover`: session-store is handed over again and again, between two images with the same program, while
//! clients at a constant rate check every acknowledged write.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, json};
use warmswap_load::resp::{Client, Reply};
use warmswap_load::{Load, LoadConfig};
use warmswap_model::{HandoverReport, Verdict};

use crate::host::Host;
use crate::rows::{Row, quantile};

/// One condition under which handovers are measured.
#[derive(Debug, Clone, Copy)]
struct Cell {
    state_mib: u64,
    connections: usize,
    handovers: usize,
}

const QUICK: &[Cell] = &[
    Cell { state_mib: 1, connections: 1, handovers: 5 },
    Cell { state_mib: 1, connections: 1000, handovers: 5 },
    Cell { state_mib: 64, connections: 100, handovers: 5 },
    Cell { state_mib: 64, connections: 1000, handovers: 5 },
];
const WHOLE: &[Cell] = &[
    Cell { state_mib: 1, connections: 1, handovers: 100 },
    Cell { state_mib: 1, connections: 100, handovers: 50 },
    Cell { state_mib: 1, connections: 1000, handovers: 50 },
    Cell { state_mib: 64, connections: 100, handovers: 50 },
    Cell { state_mib: 64, connections: 1000, handovers: 50 },
    Cell { state_mib: 1024, connections: 1000, handovers: 30 },
];

/// Of what went wrong, so many are shown: the first ones say what the others follow from.
const FAULTS_SHOWN: usize = 12;
const RATE_PER_S: f64 = 1000.0;
const FILL_VALUE_BYTES: usize = 4096;
const FILL_PIPELINE: u64 = 64;
/// Room beside the state for the process, its index and the load's own keys.
const MEMORY_MB_BESIDE: u64 = 256;

pub(crate) fn run(programs: &Path, quick: bool) -> Result<Vec<Row>> {
    let host = Host::start(programs)?;
    let program = programs.join("session-store-v1");
    for image in ["a", "b"] {
        warmswap_rootfs::pack_rootfs_as(&program, &host.state_dir.join("images").join(image), Some("session-store"))
            .with_context(|| format!("cannot make an image of {}", program.display()))?;
    }
    let mut rows = Vec::new();
    for cell in if quick { QUICK } else { WHOLE } {
        eprintln!("{} MiB, {} connections: {} handovers", cell.state_mib, cell.connections, cell.handovers);
        rows.extend(measure(&host, *cell)?);
    }
    Ok(rows)
}

fn measure(host: &Host, cell: Cell) -> Result<Vec<Row>> {
    let address = free_port()?;
    let name = format!("bench-{}-{}", cell.state_mib, cell.connections);
    let file = host.state_dir.join(format!("{name}.toml"));
    let text = format!(
        "name = \"{name}\"\nimage = \"images/a\"\ncommand = [\"/bin/session-store\"]\n[listen.resp]\naddress = \"{address}\"\n\
         [resources]\nmemory_mb_max = {}\ncpu_pct_max = 200\n[reserve]\ntune = false\n\
         [handover]\nverify_s_min = 0.3\nverify_requests_min = 100\n",
        2 * cell.state_mib + MEMORY_MB_BESIDE
    );
    std::fs::write(&file, text)?;
    host.ask(&["run", &file.display().to_string()], false)?;
    fill(address, cell.state_mib)?;
    let load = Load::start(LoadConfig {
        connections: cell.connections,
        rate_per_s: RATE_PER_S,
        key_prefix: "load".into(),
        ..LoadConfig::new(address)
    })?;
    std::thread::sleep(Duration::from_millis(1500));
    let mut reports = Vec::with_capacity(cell.handovers);
    for turn in 0..cell.handovers {
        let image = host.state_dir.join("images").join(if turn % 2 == 0 { "b" } else { "a" });
        reports.push(update(host, &name, &image)?);
    }
    std::thread::sleep(Duration::from_millis(500));
    let result = load.stop()?;
    host.ask(&["stop", &name], false)?;

    let mut conditions = Map::new();
    conditions.insert("state_mib".into(), json!(cell.state_mib));
    conditions.insert("connections".into(), json!(cell.connections));
    let blackouts: Vec<f64> =
        reports.iter().filter_map(|report| report.blackouts.first()).map(|blackout| blackout.us).collect();
    let in_kernel =
        reports.iter().flat_map(|report| &report.blackouts).filter(|blackout| blackout.measured_in_kernel).count();
    let committed = reports.iter().filter(|report| report.verdict == Verdict::Committed).count();
    let gaps: Vec<f64> = reports
        .iter()
        .map(|report| {
            let start = result.monotonic_of_unix_ms(report.started_unix_ms);
            let gap = result.longest_gap(start, start + (report.duration_ms * 1e6) as u64);
            gap.excess_ns() as f64 / 1e3
        })
        .collect();
    let totals = result.totals;
    for fault in result.faults.iter().take(FAULTS_SHOWN) {
        let handover =
            reports.iter().rfind(|report| result.monotonic_of_unix_ms(report.started_unix_ms) <= fault.at_ns);
        let after = handover.map_or_else(String::new, |report| {
            let ns = fault.at_ns - result.monotonic_of_unix_ms(report.started_unix_ms);
            format!(", {:.1} ms after the begin of handover {} to {}", ns as f64 / 1e6, report.id, report.to)
        });
        eprintln!("  {:?} on connection {}{after}: {}", fault.kind, fault.connection, fault.detail);
    }
    let n = reports.len();
    let row = |id: &str, value: f64, unit: &'static str, n: usize| Row::new(id, value, unit, n, &conditions);
    Ok(vec![
        row("handover.blackout_p50_us", quantile(&blackouts, 0.50), "µs", blackouts.len()),
        row("handover.blackout_p99_us", quantile(&blackouts, 0.99), "µs", blackouts.len()),
        row("handover.blackout_max_us", quantile(&blackouts, 1.0), "µs", blackouts.len()),
        row("handover.measured_in_kernel", in_kernel as f64, "", n),
        row("handover.committed", committed as f64, "", n),
        row("handover.peak_gap_us", quantile(&gaps, 0.50), "µs", n),
        row("handover.failed_requests", totals.failed_requests as f64, "", totals.completed as usize),
        row(
            "handover.lost_writes",
            (totals.lost_writes + totals.duplicated_writes + totals.wrong_reads) as f64,
            "",
            totals.writes_acknowledged as usize,
        ),
        row("handover.resets", (totals.resets + totals.reconnects) as f64, "", result.connections),
        row("handover.connections_kept", result.connections_kept as f64, "", result.connections),
    ])
}

fn update(host: &Host, name: &str, image: &Path) -> Result<HandoverReport> {
    let line = host.ask(&["update", name, "--image", &image.display().to_string()], true)?;
    let Some(report) = line.get("report") else { bail!("the update of {name} ended with {line}") };
    let report: HandoverReport = serde_json::from_value(report.clone())?;
    if let Some(reason) = &report.reason {
        eprintln!("  {} {}: {reason}", report.to, report.verdict);
    }
    Ok(report)
}

/// Writes `mib` MiB of values.
fn fill(address: SocketAddr, mib: u64) -> Result<()> {
    let mut client = Client::connect(address, Duration::from_secs(10))?;
    let value = "x".repeat(FILL_VALUE_BYTES);
    let values = mib * (1 << 20) / FILL_VALUE_BYTES as u64;
    let keys: Vec<String> = (0..values).map(|key| format!("fill:{key}")).collect();
    for chunk in keys.chunks(FILL_PIPELINE as usize) {
        let commands: Vec<[&str; 3]> = chunk.iter().map(|key| ["SET", key.as_str(), value.as_str()]).collect();
        for reply in client.pipeline(&commands)? {
            ensure!(!matches!(reply, Reply::Error(_)), "filling the state failed: {reply:?}");
        }
    }
    Ok(())
}

fn free_port() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}
