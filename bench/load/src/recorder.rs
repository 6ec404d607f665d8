//! Counts what the engine sees, in memory of its own; hands a snapshot to others ten times a second, so that nobody who
//! looks at a running load can delay it.

use std::collections::VecDeque;
use std::sync::Mutex;

use warmswap_model::LatencyHistogram;

use crate::result::{BUCKET_NS, Bucket, Fault, FaultKind, Totals, record};

/// Faults kept with their details; the totals count all of them.
const FAULTS_MAX: usize = 1000;
/// How often a snapshot is published.
pub(crate) const PUBLISH_NS: u64 = 100_000_000;
/// How many published periods make the "last second" of a snapshot.
const PERIODS: usize = 10;
/// Longest run that gets a time line: ten hours. After that only totals go on.
const BUCKETS_MAX: usize = 10 * 3600 * 100;

/// What [`crate::RunningLoad::snapshot`] shows, at most 100 ms old.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Snapshot {
    pub elapsed_s: f64,
    pub totals: Totals,
    pub connections_open: usize,
    /// Requests that are due or sent, and not answered yet.
    pub outstanding: u64,
    /// Answers per second, and latencies, over the last second.
    pub requests_per_s: f64,
    pub p50_us: Option<f64>,
    pub p99_us: Option<f64>,
    pub max_us: Option<f64>,
}

/// What the engine publishes.
#[derive(Debug, Default)]
pub(crate) struct Published {
    snapshot: Snapshot,
    periods: VecDeque<(LatencyHistogram, u64)>,
}

impl Published {
    /// Merges the last second; the work is the reader's.
    pub(crate) fn read(shared: &Mutex<Self>) -> Snapshot {
        let (mut snapshot, periods) = {
            let published = shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            (published.snapshot.clone(), published.periods.clone())
        };
        let mut latency = LatencyHistogram::default();
        let mut max_ns = 0;
        for (period, period_max_ns) in &periods {
            latency.add(period);
            max_ns = max_ns.max(*period_max_ns);
        }
        let requests = latency.count();
        let quantile = |q| latency.quantile_ns(q).map(|ns| ns.min(max_ns) as f64 / 1e3);
        snapshot.requests_per_s = requests as f64 / (periods.len().max(1) as f64 * PUBLISH_NS as f64 / 1e9);
        snapshot.p50_us = quantile(0.50);
        snapshot.p99_us = quantile(0.99);
        snapshot.max_us = (requests > 0).then_some(max_ns as f64 / 1e3);
        snapshot
    }
}

#[derive(Debug)]
pub(crate) struct Recorder {
    pub(crate) started_ns: u64,
    pub(crate) totals: Totals,
    pub(crate) latency: LatencyHistogram,
    pub(crate) newcomer_latency: LatencyHistogram,
    pub(crate) generator_lag: LatencyHistogram,
    pub(crate) buckets: Vec<Bucket>,
    pub(crate) faults: Vec<Fault>,
    pub(crate) last_completion_ns: u64,
    period: LatencyHistogram,
    period_max_ns: u64,
    publish_at_ns: u64,
}

impl Recorder {
    pub(crate) fn new(started_ns: u64) -> Self {
        Self {
            started_ns,
            totals: Totals::default(),
            latency: LatencyHistogram::default(),
            newcomer_latency: LatencyHistogram::default(),
            generator_lag: LatencyHistogram::default(),
            buckets: Vec::new(),
            faults: Vec::new(),
            last_completion_ns: started_ns,
            period: LatencyHistogram::default(),
            period_max_ns: 0,
            publish_at_ns: started_ns + PUBLISH_NS,
        }
    }

    fn bucket(&mut self, at_ns: u64) -> Option<&mut Bucket> {
        let index = (at_ns.saturating_sub(self.started_ns) / BUCKET_NS) as usize;
        if index >= BUCKETS_MAX {
            return None;
        }
        if index >= self.buckets.len() {
            self.buckets.resize_with(index + 1, Bucket::default);
        }
        Some(&mut self.buckets[index])
    }

    pub(crate) fn sent(&mut self, due_ns: u64, now_ns: u64) {
        self.totals.sent += 1;
        record(&mut self.generator_lag, now_ns.saturating_sub(due_ns));
    }

    /// A request that was due at `due_ns` was answered at `now_ns`.
    pub(crate) fn completed(&mut self, due_ns: u64, now_ns: u64) {
        let latency_ns = now_ns.saturating_sub(due_ns);
        self.totals.completed += 1;
        record(&mut self.latency, latency_ns);
        record(&mut self.period, latency_ns);
        self.period_max_ns = self.period_max_ns.max(latency_ns);
        if let Some(bucket) = self.bucket(due_ns) {
            record(&mut bucket.latency, latency_ns);
            bucket.latency_max_ns = bucket.latency_max_ns.max(latency_ns);
        }
        let gap_ns = now_ns.saturating_sub(self.last_completion_ns);
        self.last_completion_ns = now_ns;
        if let Some(bucket) = self.bucket(now_ns) {
            bucket.completed += 1;
            bucket.first_completion_ns.get_or_insert(now_ns);
            bucket.last_completion_ns = Some(now_ns);
            if gap_ns > bucket.gap_ns {
                bucket.gap_ns = gap_ns;
                bucket.gap_end_ns = now_ns;
            }
        }
    }

    pub(crate) fn failed(&mut self, requests: u64, now_ns: u64) {
        self.totals.failed_requests += requests;
        if let Some(bucket) = self.bucket(now_ns) {
            bucket.failed += requests;
        }
    }

    pub(crate) fn wrong(&mut self, kind: FaultKind, count: u64, now_ns: u64) {
        match kind {
            FaultKind::LostWrite => self.totals.lost_writes += count,
            FaultKind::DuplicatedWrite => self.totals.duplicated_writes += count,
            _ => self.totals.wrong_reads += count,
        }
        if let Some(bucket) = self.bucket(now_ns) {
            bucket.wrong += count;
        }
    }

    pub(crate) fn fault(&mut self, at_ns: u64, connection: usize, kind: FaultKind, detail: impl Into<String>) {
        if self.faults.len() < FAULTS_MAX {
            self.faults.push(Fault { at_ns, connection, kind, detail: detail.into() });
        }
    }

    pub(crate) fn publish_due(&self, now_ns: u64) -> bool {
        now_ns >= self.publish_at_ns
    }

    pub(crate) fn publish(&mut self, now_ns: u64, connections_open: usize, outstanding: u64, to: &Mutex<Published>) {
        self.publish_at_ns = now_ns + PUBLISH_NS;
        let period = (std::mem::take(&mut self.period), std::mem::take(&mut self.period_max_ns));
        let mut published = to.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if published.periods.len() == PERIODS {
            published.periods.pop_front();
        }
        published.periods.push_back(period);
        published.snapshot = Snapshot {
            elapsed_s: now_ns.saturating_sub(self.started_ns) as f64 / 1e9,
            totals: self.totals,
            connections_open,
            outstanding,
            ..Snapshot::default()
        };
    }
}
