//! What one container did in one window (1 s by default).

use serde::{Deserialize, Serialize};

use crate::{CgroupId, LatencyHistogram, PerResource};

/// Events and bytes of one cgroup in one window, as the probes counted them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ProbeCounts {
    /// Processes that called exec (application launches).
    pub execs: u64,
    pub forks: u64,
    pub exits: u64,
    pub oom_kills: u64,
    /// Reads of files, pipes, terminals and the like, and bytes they returned, as in `/proc/PID/io`: sockets only by calls that are
    /// for files too.
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub write_bytes: u64,
    /// Requests to block devices.
    pub block_requests: u64,
    pub block_bytes: u64,
    /// Block requests that began where the one before ended.
    pub block_sequential: u64,
    pub rx_packets: u64,
    pub rx_bytes: u64,
    pub tx_packets: u64,
    pub tx_bytes: u64,
    /// TCP connections that reached ESTABLISHED, and that closed.
    pub tcp_opened: u64,
    pub tcp_closed: u64,
    /// TCP resets sent.
    pub tcp_resets: u64,
    pub tcp_resets_received: u64,
    /// TCP segments sent again.
    pub tcp_retransmits: u64,
    /// Connections that TCP listeners took.
    pub accepts: u64,
    /// Reads from terminals (input frequency).
    pub tty_inputs: u64,
    /// Reads from input devices (evdev): keys, pointers, switches.
    pub device_inputs: u64,
    /// Rotate keys pressed, tablet-mode and rotate-lock switches moved.
    pub orientation_changes: u64,
    /// CPU time, ns.
    pub run_ns: u64,
    /// Time that tasks were ready to run and waited for a CPU, ns.
    pub run_delay_ns: u64,
    /// Page faults that found or made the page, and those of them that had to wait for a disk.
    pub page_faults: u64,
    pub major_faults: u64,
}

/// One feature window of one cgroup.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FeatureWindow {
    pub cgroup: CgroupId,
    /// Wall clock at the end of the window, Unix ms.
    pub end_unix_ms: u64,
    pub length_ms: u32,
    pub usage: PerResource<f64>,
    pub counts: ProbeCounts,
    #[serde(flatten)]
    pub durations: Durations,
}

/// How long things took in one cgroup in one window.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Durations {
    /// From the arrival of a request's first segment to the first segment of its answer.
    pub request_latency: LatencyHistogram,
    /// From the arrival of a request to that of the next one, over all connections.
    pub request_gap: LatencyHistogram,
    /// TCP's smoothed round-trip time, one value per connection that has carried something, and one as it ends.
    pub round_trip: LatencyHistogram,
    /// From the making of a block request to its completion.
    pub block_latency: LatencyHistogram,
}

impl Durations {
    pub fn add(&mut self, other: &Self) {
        let Self { request_latency, request_gap, round_trip, block_latency } = other;
        self.request_latency.add(request_latency);
        self.request_gap.add(request_gap);
        self.round_trip.add(round_trip);
        self.block_latency.add(block_latency);
    }
}
