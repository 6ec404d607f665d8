//! What a report shows, as plain data.

use serde::{Deserialize, Serialize};
use warmswap_load::{LoadResult, Totals};
use warmswap_model::{HandoverReport, Phase, Resource, Verdict};

/// Stretch before and after a handover whose p99 is compared.
const COMPARED_NS: u64 = 5_000_000_000;
/// Width of one point of the latency chart.
const POINT_NS: u64 = 100_000_000;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReportInput {
    pub title: String,
    pub created_unix_ms: u64,
    pub machine: Machine,
    pub clients: Option<ClientLoad>,
    /// In the order in which they took place.
    pub handovers: Vec<HandoverView>,
    pub forecasts: Vec<ForecastSeries>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Machine {
    pub host: String,
    pub cpu: String,
    pub cpus: u32,
    pub memory_mb: u64,
    pub kernel: String,
    /// What is worth knowing besides: (name, value), such as ("warmswap", "0.1.0") or ("cgroups", "hybrid").
    pub versions: Vec<(String, String)>,
}

/// One handover with what the clients saw of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HandoverView {
    /// Such as `v1 → v2`.
    pub label: String,
    pub report: HandoverReport,
    pub clients: Option<ClientView>,
}

impl HandoverView {
    /// Labelled by the last part of the image paths.
    #[must_use]
    pub fn new(report: HandoverReport, clients: Option<ClientView>) -> Self {
        let name = |image: &str| {
            let last = image.trim_end_matches('/').rsplit('/').next().unwrap_or(image);
            last.strip_suffix(".tar").unwrap_or(last).to_owned()
        };
        let label = format!("{} → {}", name(&report.from_image), name(&report.to_image));
        Self { label, report, clients }
    }
}

/// One handover as the clients saw it.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct ClientView {
    /// Longest time without an answer to anybody, µs, and what is usual.
    pub longest_gap_us: f64,
    pub usual_gap_us: f64,
    /// From its begin until 5 s after its end, as is `lost`.
    pub failed: u64,
    /// Acknowledged writes lost or applied twice, and wrong reads.
    pub lost: u64,
    pub p99_before_us: Option<f64>,
    /// While the new generation served: at most 5 s from its promotion.
    pub p99_after_us: Option<f64>,
}

impl ClientView {
    /// Cuts the stretch of one handover out of a load that ran through it.
    #[must_use]
    pub fn new(load: &LoadResult, report: &HandoverReport) -> Self {
        let start = load.monotonic_of_unix_ms(report.started_unix_ms);
        let end = start + (report.duration_ms * 1e6).max(0.0) as u64;
        let after = match report.phases.iter().find(|timing| timing.phase == Phase::Verify) {
            Some(verify) => {
                let from = start + (verify.start_us * 1e3).max(0.0) as u64;
                let until = from + (verify.duration_us * 1e3).max(0.0) as u64;
                // A generation that was kept goes on serving after VERIFY; one that was not, does not.
                let until = if report.verdict == Verdict::Committed { from + COMPARED_NS } else { until };
                (from, until.min(from + COMPARED_NS))
            }
            None => (end, end + COMPARED_NS),
        };
        let gap = load.longest_gap(start, end);
        // A lost write shows when its key is used next, and a request that hangs when its time limit has passed.
        let faults = load.window(start, end + COMPARED_NS);
        Self {
            longest_gap_us: gap.longest_ns as f64 / 1e3,
            usual_gap_us: gap.usual_ns as f64 / 1e3,
            failed: faults.failed,
            lost: faults.wrong,
            p99_before_us: load.window(start.saturating_sub(COMPARED_NS), start).p99_us,
            p99_after_us: load.window(after.0, after.1).p99_us,
        }
    }
}

/// The whole run as the clients saw it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClientLoad {
    pub started_unix_ms: u64,
    pub seconds: f64,
    pub totals: Totals,
    pub connections: usize,
    /// Open from before the first request until after the last.
    pub connections_kept: usize,
    pub series: Vec<LatencyPoint>,
}

/// Latency of the requests that were due in one interval.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct LatencyPoint {
    /// Begin, seconds since the start of the load.
    pub at_s: f64,
    pub p50_us: Option<f64>,
    pub p99_us: Option<f64>,
    pub max_us: Option<f64>,
    pub failed: u64,
}

impl From<&LoadResult> for ClientLoad {
    fn from(load: &LoadResult) -> Self {
        let point = |p: warmswap_load::SeriesPoint| LatencyPoint {
            at_s: p.start_ns.saturating_sub(load.started_ns) as f64 / 1e9,
            p50_us: p.p50_us,
            p99_us: p.p99_us,
            max_us: p.max_us,
            failed: p.failed,
        };
        Self {
            started_unix_ms: load.started_unix_ms,
            seconds: load.ended_ns.saturating_sub(load.started_ns) as f64 / 1e9,
            totals: load.totals,
            connections: load.connections,
            connections_kept: load.connections_kept,
            series: load.series(POINT_NS).into_iter().map(point).collect(),
        }
    }
}

/// Forecast and actual demand of one resource of one service.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ForecastSeries {
    pub resource: Resource,
    /// Who made the forecast at the end, in words.
    pub champion: String,
    /// How the LSTM fares, in words.
    pub lstm: String,
    /// Ascending in time.
    pub points: Vec<ForecastPoint>,
}

/// One tick. The quantiles are those that had been forecast *for* this instant.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct ForecastPoint {
    pub unix_ms: u64,
    pub actual: Option<f64>,
    pub q05: Option<f64>,
    pub q50: Option<f64>,
    pub q95: Option<f64>,
    /// The LSTM's own, whoever served.
    pub lstm_q05: Option<f64>,
    pub lstm_q95: Option<f64>,
}

impl ForecastSeries {
    /// Share of the actual values that lay inside the band, and how many were compared.
    #[must_use]
    pub fn coverage(&self) -> Option<(f64, usize)> {
        self.share_within(|point| (point.q05, point.q95))
    }

    /// The same of the LSTM's own band.
    #[must_use]
    pub fn lstm_coverage(&self) -> Option<(f64, usize)> {
        self.share_within(|point| (point.lstm_q05, point.lstm_q95))
    }

    fn share_within(&self, band: impl Fn(&ForecastPoint) -> (Option<f64>, Option<f64>)) -> Option<(f64, usize)> {
        let within = |point: &ForecastPoint| {
            let (low, high) = band(point);
            Some((low?..=high?).contains(&point.actual?))
        };
        let compared: Vec<bool> = self.points.iter().filter_map(within).collect();
        let inside = compared.iter().filter(|inside| **inside).count();
        (!compared.is_empty()).then(|| (inside as f64 / compared.len() as f64, compared.len()))
    }
}
