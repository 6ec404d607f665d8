//! What a run of the load found: totals, faults with their instants, and latency over time.

use serde::{Deserialize, Serialize};
use warmswap_model::LatencyHistogram;

/// Width of a [`Bucket`], ns.
pub const BUCKET_NS: u64 = 10_000_000;

/// Sub-buckets per power of two: a latency is known to 1/32 (3 %).
const SUB_BUCKET_BITS: u32 = 5;

/// Adds a latency to a histogram with log-linear buckets of 1/32 relative width.
///
/// Own code and not `hdrhistogram`, because every 10 ms of a run gets a histogram of its own: sparse, mergeable, a few
/// hundred bytes, and the same type that the probes fill.
pub fn record(histogram: &mut LatencyHistogram, latency_ns: u64) {
    let upper = bucket_upper_ns(latency_ns);
    match histogram.buckets.binary_search_by_key(&upper, |(u, _)| *u) {
        Ok(at) => histogram.buckets[at].1 += 1,
        Err(at) => histogram.buckets.insert(at, (upper, 1)),
    }
}

/// Largest value of the bucket that `ns` falls into.
fn bucket_upper_ns(ns: u64) -> u64 {
    let shift = (u64::BITS - ns.leading_zeros()).saturating_sub(SUB_BUCKET_BITS + 1);
    ns | ((1 << shift) - 1)
}

/// Everything counted over a run. [`Totals::is_clean`] is the one question most callers have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Totals {
    /// Requests that were due by the schedule.
    pub scheduled: u64,
    pub sent: u64,
    /// Requests with a right answer, or an answer that was counted as lost, duplicated or wrong.
    pub completed: u64,
    pub writes_acknowledged: u64,
    /// Requests without an answer or with an error. A connection that the server ended while nothing was outstanding
    /// counts as one, because the next request would have failed.
    pub failed_requests: u64,
    pub lost_writes: u64,
    pub duplicated_writes: u64,
    pub wrong_reads: u64,
    /// Writes that were sent and not acknowledged: applied or not, both are allowed.
    pub uncertain_writes: u64,
    /// Connections ended by the server with a TCP reset, and orderly.
    pub resets: u64,
    pub closed_by_server: u64,
    pub reconnects: u64,
    /// Attempts to connect (again) that failed.
    pub connects_failed: u64,
    /// Clients that connected anew and were answered. Those that were not are failed requests.
    pub newcomers: u64,
    /// Keys compared at the end, and keys that could not be read any more.
    pub keys_verified: u64,
    pub keys_unverified: u64,
}

impl Totals {
    /// Every request was answered, every acknowledged write is there exactly once, no connection was lost, and all
    /// of that was checked.
    #[must_use]
    pub const fn is_clean(&self) -> bool {
        self.failed_requests == 0
            && self.wrong() == 0
            && self.resets == 0
            && self.closed_by_server == 0
            && self.reconnects == 0
            && self.connects_failed == 0
            && self.keys_unverified == 0
    }

    #[must_use]
    pub const fn wrong(&self) -> u64 {
        self.lost_writes + self.duplicated_writes + self.wrong_reads
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    /// No answer within the time limit.
    Timeout,
    ErrorReply,
    /// The server reset the connection.
    Reset,
    /// The server closed the connection.
    Closed,
    /// Bytes that are no RESP, an answer of an impossible type, or one that nobody asked for.
    Protocol,
    ConnectFailed,
    /// A client that connected anew was refused or not answered.
    Newcomer,
    LostWrite,
    DuplicatedWrite,
    WrongRead,
}

/// One thing that went wrong, and when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// CLOCK_MONOTONIC, ns.
    pub at_ns: u64,
    /// Counts from 0; the number of connections for a newcomer, which is none of them.
    pub connection: usize,
    pub kind: FaultKind,
    pub detail: String,
}

/// An instant that the caller named.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// CLOCK_MONOTONIC, ns.
    pub at_ns: u64,
    pub label: String,
}

/// 10 ms of a run. Latencies stand in the bucket in which their request was *due*, completions in the bucket in which
/// the answer came.
#[derive(Debug, Clone, Default)]
pub struct Bucket {
    pub latency: LatencyHistogram,
    /// Exact, ns.
    pub latency_max_ns: u64,
    pub failed: u64,
    /// Lost, duplicated and wrongly read.
    pub wrong: u64,
    pub completed: u64,
    /// When the first and the last answer in this bucket came.
    pub first_completion_ns: Option<u64>,
    pub last_completion_ns: Option<u64>,
    /// Longest time without any answer that ended in this bucket, and when it ended.
    pub gap_ns: u64,
    pub gap_end_ns: u64,
}

/// The longest time in which no client got any answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Gap {
    /// When it began, CLOCK_MONOTONIC, ns.
    pub start_ns: u64,
    pub longest_ns: u64,
    /// What the longest gap of an ordinary 10 ms of this run is (median).
    pub usual_ns: u64,
}

impl Gap {
    /// How much longer than usual.
    #[must_use]
    pub const fn excess_ns(&self) -> u64 {
        self.longest_ns.saturating_sub(self.usual_ns)
    }
}

/// A stretch of a run.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct WindowStats {
    pub seconds: f64,
    /// Requests that were due in it and were answered.
    pub requests: u64,
    pub failed: u64,
    pub wrong: u64,
    pub p50_us: Option<f64>,
    pub p99_us: Option<f64>,
    pub max_us: Option<f64>,
    pub gap: Gap,
}

/// One point of a curve.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct SeriesPoint {
    /// Begin of the interval, CLOCK_MONOTONIC, ns.
    pub start_ns: u64,
    pub requests: u64,
    pub failed: u64,
    pub wrong: u64,
    /// `None` when no request that was due in the interval was answered.
    pub p50_us: Option<f64>,
    pub p99_us: Option<f64>,
    pub max_us: Option<f64>,
}

#[derive(Debug, Clone)]
pub struct LoadResult {
    /// CLOCK_MONOTONIC, ns, and the wall clock at the same instant.
    pub started_ns: u64,
    pub started_unix_ms: u64,
    /// When the last request was due.
    pub ended_ns: u64,
    pub totals: Totals,
    pub connections: usize,
    /// Connections that are the very sockets opened at the start (same cookie, same ports, never closed) and over
    /// which all keys were read back at the end.
    pub connections_kept: usize,
    pub latency: LatencyHistogram,
    /// From connecting to the answer, of clients that connected anew.
    pub newcomer_latency: LatencyHistogram,
    /// How late this load itself sent requests: the part of every latency that is not the server's.
    pub generator_lag: LatencyHistogram,
    pub buckets: Vec<Bucket>,
    pub marks: Vec<Mark>,
    /// The first of them; the totals count all.
    pub faults: Vec<Fault>,
}

impl LoadResult {
    /// Requests that were due in `[from_ns, to_ns)`; both are rounded outwards to 10 ms.
    #[must_use]
    pub fn window(&self, from_ns: u64, to_ns: u64) -> WindowStats {
        let (first, end) = self.range(from_ns, to_ns);
        let point = self.merge(first, end);
        WindowStats {
            seconds: to_ns.saturating_sub(from_ns) as f64 / 1e9,
            requests: point.requests,
            failed: point.failed,
            wrong: point.wrong,
            p50_us: point.p50_us,
            p99_us: point.p99_us,
            max_us: point.max_us,
            gap: self.longest_gap(from_ns, to_ns),
        }
    }

    /// The longest time between two consecutive answers (of any connection) within the window; what lies outside it
    /// of a gap that crosses its edge does not count.
    #[must_use]
    pub fn longest_gap(&self, from_ns: u64, to_ns: u64) -> Gap {
        let (first, end) = self.range(from_ns, to_ns);
        let clip = |start: u64, stop: u64| {
            let (start, stop) = (start.max(from_ns), stop.min(to_ns));
            (stop.saturating_sub(start), start)
        };
        let inside = self.buckets[first..end].iter().map(|b| clip(b.gap_end_ns.saturating_sub(b.gap_ns), b.gap_end_ns));
        // The gap that is open at the window's end; it ends later, or never.
        let open_since = self.buckets[..end].iter().rev().find_map(|b| b.last_completion_ns).unwrap_or(self.started_ns);
        let open_until = self.buckets[end..].iter().find_map(|b| b.first_completion_ns).unwrap_or(self.ended_ns);
        let crossing = clip(open_since, open_until);
        let (longest_ns, start_ns) = inside.chain([crossing]).max().unwrap_or((0, from_ns));
        Gap { start_ns, longest_ns, usual_ns: self.usual_gap_ns() }
    }

    fn usual_gap_ns(&self) -> u64 {
        let mut gaps: Vec<u64> = self.buckets.iter().filter(|b| b.completed > 0).map(|b| b.gap_ns).collect();
        gaps.sort_unstable();
        gaps.get(gaps.len() / 2).copied().unwrap_or(0)
    }

    /// Latency over time in intervals of about `width_ns` (a multiple of 10 ms).
    #[must_use]
    pub fn series(&self, width_ns: u64) -> Vec<SeriesPoint> {
        let step = (width_ns / BUCKET_NS).max(1) as usize;
        (0..self.buckets.len())
            .step_by(step)
            .map(|first| self.merge(first, (first + step).min(self.buckets.len())))
            .collect()
    }

    /// The instant of the first mark with this label.
    #[must_use]
    pub fn mark(&self, label: &str) -> Option<u64> {
        self.marks.iter().find(|mark| mark.label == label).map(|mark| mark.at_ns)
    }

    /// Wall clock (Unix ms) to CLOCK_MONOTONIC, ns, as the two stood at the start.
    #[must_use]
    pub fn monotonic_of_unix_ms(&self, unix_ms: u64) -> u64 {
        (self.started_ns + unix_ms.saturating_sub(self.started_unix_ms) * 1_000_000)
            .saturating_sub(self.started_unix_ms.saturating_sub(unix_ms) * 1_000_000)
    }

    fn range(&self, from_ns: u64, to_ns: u64) -> (usize, usize) {
        let index = |ns: u64| (ns.saturating_sub(self.started_ns) / BUCKET_NS) as usize;
        let end = index(to_ns.saturating_add(BUCKET_NS - 1)).min(self.buckets.len());
        (index(from_ns).min(end), end)
    }

    fn merge(&self, first: usize, end: usize) -> SeriesPoint {
        let mut latency = LatencyHistogram::default();
        let mut point = SeriesPoint { start_ns: self.started_ns + first as u64 * BUCKET_NS, ..SeriesPoint::default() };
        let mut max_ns = 0;
        for bucket in &self.buckets[first..end] {
            latency.add(&bucket.latency);
            max_ns = max_ns.max(bucket.latency_max_ns);
            point.failed += bucket.failed;
            point.wrong += bucket.wrong;
        }
        point.requests = latency.count();
        // A bucket's upper bound can lie above the largest value in it.
        let quantile = |q| latency.quantile_ns(q).map(|ns| ns.min(max_ns) as f64 / 1e3);
        point.p50_us = quantile(0.50);
        point.p99_us = quantile(0.99);
        point.max_us = (point.requests > 0).then_some(max_ns as f64 / 1e3);
        point
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: u64 = 1_000_000;

    fn run(completions_ms: &[u64], length_ms: u64) -> LoadResult {
        let mut buckets = vec![Bucket::default(); (length_ms * MS).div_ceil(BUCKET_NS) as usize];
        let mut last = 0;
        for ms in completions_ms {
            let (at, bucket) = (ms * MS, &mut buckets[(ms * MS / BUCKET_NS) as usize]);
            bucket.completed += 1;
            bucket.first_completion_ns.get_or_insert(at);
            bucket.last_completion_ns = Some(at);
            if at - last > bucket.gap_ns {
                (bucket.gap_ns, bucket.gap_end_ns) = (at - last, at);
            }
            last = at;
            record(&mut bucket.latency, MS);
            bucket.latency_max_ns = MS;
        }
        LoadResult {
            started_ns: 0,
            started_unix_ms: 1000,
            ended_ns: length_ms * MS,
            totals: Totals::default(),
            connections: 1,
            connections_kept: 1,
            latency: LatencyHistogram::default(),
            newcomer_latency: LatencyHistogram::default(),
            generator_lag: LatencyHistogram::default(),
            buckets,
            marks: Vec::new(),
            faults: Vec::new(),
        }
    }

    #[test]
    fn the_longest_gap_is_found_wherever_it_lies_in_the_window() {
        let every_ms: Vec<u64> = (1..100).chain(163..300).collect();
        let result = run(&every_ms, 300);
        let whole = result.longest_gap(0, 300 * MS);
        assert_eq!((whole.longest_ns, whole.start_ns, whole.usual_ns), (64 * MS, 99 * MS, MS));
        assert_eq!(whole.excess_ns(), 63 * MS);
        assert_eq!(result.longest_gap(50 * MS, 120 * MS).longest_ns, 21 * MS, "clipped at its end");
        assert_eq!(result.longest_gap(120 * MS, 200 * MS).longest_ns, 43 * MS, "clipped at its begin");
        assert_eq!(result.longest_gap(110 * MS, 140 * MS).longest_ns, 30 * MS, "covers the window");
        assert_eq!(result.longest_gap(200 * MS, 280 * MS).longest_ns, MS);
    }

    #[test]
    fn a_server_that_never_answers_again_shows_as_a_gap() {
        let result = run(&(1..100).collect::<Vec<_>>(), 300);
        assert!(result.longest_gap(0, 300 * MS).longest_ns >= 190 * MS);
    }

    #[test]
    fn a_series_keeps_every_request() {
        let result = run(&(1..300).collect::<Vec<_>>(), 300);
        let series = result.series(100 * MS);
        assert_eq!(series.len(), 3);
        assert_eq!(series.iter().map(|p| p.requests).sum::<u64>(), 299);
        assert_eq!(series[0].max_us, Some(1000.0));
        assert_eq!(result.window(100 * MS, 200 * MS).requests, 100);
        assert_eq!(result.monotonic_of_unix_ms(1250), 250 * MS);
    }

    proptest! {
        #[test]
        fn a_bucket_holds_its_value_within_one_thirty_second(ns in 0_u64..1 << 50) {
            let upper = bucket_upper_ns(ns);
            prop_assert!(upper >= ns && upper - ns <= ns / 32);
            prop_assert_eq!(bucket_upper_ns(upper), upper);
        }
    }
}
