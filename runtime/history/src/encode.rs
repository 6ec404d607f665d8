//! How values stand in the store: one version byte, then the value.
//!
//! Windows are many, so they are postcard: integers take as few bytes as they need, most counts of a second one or
//! two, and a quiet window is about 60 bytes. Postcard knows fields only by position, so the stored form is a type of
//! its own whose conversion names every field: a field added to the model stops this file from compiling until its
//! version is raised. Reports are few and read by people: JSON, which names its fields.

use serde::{Deserialize, Serialize};
use warmswap_model::{CgroupId, Durations, FeatureWindow, HandoverReport, LatencyHistogram, PerResource, ProbeCounts};

const WINDOW_VERSION: u8 = 2;
const REPORT_VERSION: u8 = 1;

/// Fields of `ProbeCounts`, in the order of the list below.
const COUNTS: usize = 28;
/// What is stored: with a place for system calls, which were counted once.
const STORED: usize = COUNTS + 1;
const SYSTEM_CALLS: usize = 4;
/// Of these the first so many were there in version 1.
const STORED_1: usize = 23;
type Counts = [u64; COUNTS];

#[derive(Serialize, Deserialize)]
struct StoredWindow {
    cgroup: u64,
    end_unix_ms: u64,
    length_ms: u32,
    usage: [f64; 4],
    counts: [u64; STORED],
    /// Request latency, request gap, round-trip time, block latency.
    histograms: [StoredHistogram; 4],
}

/// Version 1, which is read and not written any more.
#[derive(Deserialize)]
struct StoredWindow1 {
    cgroup: u64,
    end_unix_ms: u64,
    length_ms: u32,
    usage: [f64; 4],
    counts: [u64; STORED_1],
    latency: StoredHistogram,
}

impl From<StoredWindow1> for StoredWindow {
    fn from(old: StoredWindow1) -> Self {
        let StoredWindow1 { cgroup, end_unix_ms, length_ms, usage, counts: old_counts, latency } = old;
        let mut counts = [0; STORED];
        counts[..STORED_1].copy_from_slice(&old_counts);
        let none = StoredHistogram::default;
        Self { cgroup, end_unix_ms, length_ms, usage, counts, histograms: [latency, none(), none(), none()] }
    }
}

/// Differences between neighbouring bounds, which are shorter than the bounds, and counts.
#[derive(Default, Serialize, Deserialize)]
struct StoredHistogram(Vec<(u64, u64)>);

impl From<&LatencyHistogram> for StoredHistogram {
    fn from(histogram: &LatencyHistogram) -> Self {
        let mut below = 0u64;
        let steps = histogram.buckets.iter().map(|&(bound, count)| {
            let step = bound.wrapping_sub(below);
            below = bound;
            (step, count)
        });
        Self(steps.collect())
    }
}

impl From<StoredHistogram> for LatencyHistogram {
    fn from(StoredHistogram(steps): StoredHistogram) -> Self {
        let mut bound = 0u64;
        let buckets = steps.into_iter().map(|(step, count)| {
            bound = bound.wrapping_add(step);
            (bound, count)
        });
        Self { buckets: buckets.collect() }
    }
}

pub(crate) fn window_to_bytes(window: &FeatureWindow) -> Result<Vec<u8>, postcard::Error> {
    let FeatureWindow { cgroup, end_unix_ms, length_ms, usage, counts, durations } = window;
    let Durations { request_latency, request_gap, round_trip, block_latency } = durations;
    let PerResource { cpu, memory, network, disk } = *usage;
    let stored = StoredWindow {
        cgroup: cgroup.0,
        end_unix_ms: *end_unix_ms,
        length_ms: *length_ms,
        usage: [cpu, memory, network, disk],
        counts: with_system_calls(counts_to_array(counts)),
        histograms: [request_latency, request_gap, round_trip, block_latency].map(StoredHistogram::from),
    };
    let mut bytes = vec![WINDOW_VERSION];
    bytes = postcard::to_extend(&stored, bytes)?;
    Ok(bytes)
}

pub(crate) fn window_from_bytes(bytes: &[u8]) -> Result<FeatureWindow, String> {
    let parsed = match bytes.split_first() {
        Some((1, body)) => postcard::from_bytes::<StoredWindow1>(body).map(StoredWindow::from),
        _ => postcard::from_bytes(after_version(bytes, WINDOW_VERSION, "window")?),
    };
    let stored = parsed.map_err(|error| format!("a window does not parse: {error}"))?;
    let [cpu, memory, network, disk] = stored.usage;
    let [request_latency, request_gap, round_trip, block_latency] = stored.histograms.map(LatencyHistogram::from);
    Ok(FeatureWindow {
        cgroup: CgroupId(stored.cgroup),
        end_unix_ms: stored.end_unix_ms,
        length_ms: stored.length_ms,
        usage: PerResource { cpu, memory, network, disk },
        counts: counts_from_array(without_system_calls(stored.counts)),
        durations: Durations { request_latency, request_gap, round_trip, block_latency },
    })
}

pub(crate) fn report_to_bytes(report: &HandoverReport) -> Result<Vec<u8>, serde_json::Error> {
    let mut bytes = vec![REPORT_VERSION];
    serde_json::to_writer(&mut bytes, report)?;
    Ok(bytes)
}

pub(crate) fn report_from_bytes(bytes: &[u8]) -> Result<HandoverReport, String> {
    let body = after_version(bytes, REPORT_VERSION, "handover report")?;
    serde_json::from_slice(body).map_err(|error| format!("a handover report does not parse: {error}"))
}

fn after_version<'a>(bytes: &'a [u8], known: u8, what: &str) -> Result<&'a [u8], String> {
    match bytes.split_first() {
        Some((version, body)) if *version == known => Ok(body),
        Some((version, _)) => Err(format!("a {what} of version {version}, this warmswap knows {known}")),
        None => Err(format!("an empty {what}")),
    }
}

/// Both directions from one list. A field that the model has and the list has not fails to compile: add it at the
/// end, raise `COUNTS` and `WINDOW_VERSION`, and keep reading the version before.
macro_rules! counts {
    ($($field:ident),+ $(,)?) => {
        fn counts_to_array(counts: &ProbeCounts) -> Counts {
            let ProbeCounts { $($field),+ } = *counts;
            [$($field),+]
        }

        fn counts_from_array([$($field),+]: Counts) -> ProbeCounts {
            ProbeCounts { $($field),+ }
        }
    };
}

counts! {
    execs, forks, exits, oom_kills, reads, read_bytes, writes, write_bytes, block_requests, block_bytes,
    block_sequential, rx_packets, rx_bytes, tx_packets, tx_bytes, tcp_opened, tcp_closed, tcp_resets, tty_inputs,
    run_ns, page_faults, tcp_resets_received, tcp_retransmits, accepts, device_inputs, orientation_changes,
    run_delay_ns, major_faults,
}

fn with_system_calls(counts: Counts) -> [u64; STORED] {
    std::array::from_fn(|at| match at {
        SYSTEM_CALLS => 0,
        before if before < SYSTEM_CALLS => counts[before],
        after => counts[after - 1],
    })
}

fn without_system_calls(stored: [u64; STORED]) -> Counts {
    std::array::from_fn(|at| stored[if at < SYSTEM_CALLS { at } else { at + 1 }])
}

/// One window from the windows of a minute: rates are means over time, memory is the highest, counts add up.
/// `None` for no windows.
pub(crate) fn aggregate(windows: &[FeatureWindow], end_unix_ms: u64) -> Option<FeatureWindow> {
    let last = windows.last()?;
    let mut sum = FeatureWindow {
        cgroup: last.cgroup,
        end_unix_ms,
        length_ms: 0,
        usage: PerResource::default(),
        counts: ProbeCounts::default(),
        durations: Durations::default(),
    };
    let mut counts: Counts = [0; COUNTS];
    let mut seconds = 0.0;
    for window in windows {
        let weight = f64::from(window.length_ms.max(1)) / 1e3;
        seconds += weight;
        sum.length_ms = sum.length_ms.saturating_add(window.length_ms);
        sum.usage.cpu += window.usage.cpu * weight;
        sum.usage.network += window.usage.network * weight;
        sum.usage.disk += window.usage.disk * weight;
        sum.usage.memory = sum.usage.memory.max(window.usage.memory);
        for (total, count) in counts.iter_mut().zip(counts_to_array(&window.counts)) {
            *total = total.saturating_add(count);
        }
        sum.durations.add(&window.durations);
    }
    sum.usage.cpu /= seconds;
    sum.usage.network /= seconds;
    sum.usage.disk /= seconds;
    sum.counts = counts_from_array(counts);
    Some(sum)
}
