//! From counters that only grow to feature windows: the difference since the last look, per watched cgroup.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use warmswap_events::{BUCKETS, Counters, DISTRIBUTIONS, Distribution, bucket_upper_ns};
use warmswap_model::{CgroupId, Durations, FeatureWindow, LatencyHistogram, PerResource, ProbeCounts};

use crate::load::Loaded;
use crate::readers::Readers;

/// What was counted for one slot up to one moment, all CPUs together.
#[derive(Clone)]
struct Totals {
    counters: Counters,
    histograms: [[u64; BUCKETS]; DISTRIBUTIONS as usize],
}

/// One watched cgroup.
pub(crate) struct Watched {
    pub(crate) cgroup: CgroupId,
    pub(crate) slot: u32,
    /// Under which id block requests are charged; `None` while the folder for it does not exist.
    pub(crate) block: Option<u64>,
    pub(crate) readers: Readers,
    last: Box<Totals>,
    at: Instant,
}

/// Where the disk usage of a window comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskSource {
    /// Requests to block devices.
    Block,
    /// Bytes read and written through descriptors, because block requests cannot be seen here.
    Descriptors,
}

impl Watched {
    pub(crate) fn new(loaded: &Loaded, cgroup: CgroupId, slot: u32, block: Option<u64>) -> Self {
        Self {
            cgroup,
            slot,
            block,
            readers: Readers::unknown(),
            last: Box::new(Totals::read(loaded, slot)),
            at: Instant::now(),
        }
    }

    /// What happened since the last window, or since it is watched.
    pub(crate) fn window(&mut self, loaded: &Loaded, disk: DiskSource) -> FeatureWindow {
        let now = Instant::now();
        let totals = Totals::read(loaded, self.slot);
        let length = now - self.at;
        let counts = counts(&self.last.counters, &totals.counters);
        let histogram =
            |of: Distribution| histogram(&self.last.histograms[of as usize], &totals.histograms[of as usize]);
        let durations = Durations {
            request_latency: histogram(Distribution::RequestLatency),
            request_gap: histogram(Distribution::RequestGap),
            round_trip: histogram(Distribution::RoundTrip),
            block_latency: histogram(Distribution::BlockLatency),
        };
        *self.last = totals;
        self.at = now;

        let seconds = length.as_secs_f64().max(1e-6);
        let disk_bytes = match disk {
            DiskSource::Block => counts.block_bytes,
            DiskSource::Descriptors => counts.read_bytes + counts.write_bytes,
        };
        let usage = PerResource {
            cpu: counts.run_ns as f64 / 1e9 / seconds * 100.0,
            memory: 0.0,
            network: (counts.rx_bytes + counts.tx_bytes) as f64 * 8.0 / 1e6 / seconds,
            disk: disk_bytes as f64 / 1e6 / seconds,
        };
        let end = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        FeatureWindow {
            cgroup: self.cgroup,
            end_unix_ms: u64::try_from(end.as_millis()).unwrap_or(u64::MAX),
            length_ms: u32::try_from(length.as_millis()).unwrap_or(u32::MAX),
            usage,
            counts,
            durations,
        }
    }
}

impl Totals {
    fn read(loaded: &Loaded, slot: u32) -> Self {
        let mut sum = Counters::default();
        for cpu in 0..loaded.cpus {
            add(&mut sum, &loaded.counters.read(slot as usize * loaded.cpus + cpu).unwrap_or_default());
        }
        let histograms = Distribution::ALL.map(|distribution| {
            let index = slot as usize * DISTRIBUTIONS as usize + distribution as usize;
            loaded.histograms.read(index).map_or([0; BUCKETS], |histogram| histogram.buckets)
        });
        Self { counters: sum, histograms }
    }
}

macro_rules! each_counter {
    ($with:ident) => {
        $with!(
            reads,
            read_bytes,
            writes,
            write_bytes,
            tty_inputs,
            run_ns,
            page_faults,
            rx_packets,
            rx_bytes,
            tx_packets,
            tx_bytes,
            tcp_opened,
            tcp_closed,
            tcp_resets,
            tcp_resets_received,
            execs,
            forks,
            exits,
            oom_kills,
            block_requests,
            block_bytes,
            block_sequential,
            run_delay_ns,
            major_faults,
            tcp_retransmits,
            accepts,
            device_inputs,
            orientation_changes
        )
    };
}

fn add(sum: &mut Counters, counters: &Counters) {
    macro_rules! fields {
        ($($field:ident),*) => { $(sum.$field = sum.$field.wrapping_add(counters.$field);)* };
    }
    each_counter!(fields);
}

fn counts(before: &Counters, after: &Counters) -> ProbeCounts {
    macro_rules! fields {
        // Written out without `..`, so that a counter added to one side and forgotten on the other does not compile.
        ($($field:ident),*) => { ProbeCounts { $($field: after.$field.wrapping_sub(before.$field)),* } };
    }
    each_counter!(fields)
}

fn histogram(before: &[u64; BUCKETS], after: &[u64; BUCKETS]) -> LatencyHistogram {
    let buckets = before.iter().zip(after).enumerate().filter(|(_, (before, after))| before != after);
    LatencyHistogram {
        buckets: buckets
            .map(|(bucket, (before, after))| (bucket_upper_ns(bucket), after.wrapping_sub(*before)))
            .collect(),
    }
}
