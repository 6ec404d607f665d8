//! Requests to block devices: how many, how large, sequential or not, and how long they take.
//!
//! A request is charged to the cgroup its bio carries: the one that caused it, also for write-back on v2 with the io
//! and memory controllers. Where that one is not watched, a request issued by a watched process is charged to that
//! process's cgroup. Write-back on a v1 or hybrid host belongs to nobody, and is not counted.

use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;
use warmswap_events::{Distribution, LANE_OTHER};

use crate::emit::now_ns;
use crate::maps::{BLOCK_ISSUED, BLOCK_NEXT, WATCHED_BLOCK, add_shared, counters, cpu, layout, record};
use crate::{cgroup, read, trouble};

const SECTOR_BYTES: u64 = 512;

/// Where the request is the only argument.
#[raw_tracepoint(tracepoint = "block_rq_issue")]
pub(crate) fn block_issue(ctx: RawTracePointContext) -> i32 {
    issue(ctx.arg(0))
}

/// Up to 5.10 the queue came first. A program of its own, because the kernel refuses to attach one that so much as
/// contains a read of an argument the tracepoint has not.
#[raw_tracepoint(tracepoint = "block_rq_issue")]
pub(crate) fn block_issue_queue_first(ctx: RawTracePointContext) -> i32 {
    issue(ctx.arg(1))
}

#[inline(always)]
fn issue(request: u64) -> i32 {
    let cpu = cpu();
    let charged = charged_to(request).unwrap_or(0);
    let slot = if charged == 0 { cgroup::of_current(cpu, LANE_OTHER).slot } else { charged };
    let Some(counters) = counters(slot, cpu) else { return 0 };
    let (Some(sector), Some(length), Some(queue)) = (
        read::at::<u64>(request, layout!(request_sector)),
        read::at::<u32>(request, layout!(request_length)),
        read::at::<u64>(request, layout!(request_queue)),
    ) else {
        trouble::unread_block(slot.into());
        return 0;
    };
    if charged == 0 {
        // Fails only for lack of memory; then its latency is nobody's.
        let _ = BLOCK_ISSUED.insert(&request, &slot, 0);
    }
    add_shared!(counters, block_requests, 1);
    add_shared!(counters, block_bytes, u64::from(length));
    if length == 0 {
        return 0; // a flush has no place
    }
    let key = [u64::from(slot), queue];
    // SAFETY: a u64 that is replaced whole.
    if unsafe { BLOCK_NEXT.get(&key) }.copied() == Some(sector) {
        add_shared!(counters, block_sequential, 1);
    }
    let next = sector.wrapping_add(u64::from(length) / SECTOR_BYTES);
    // Cannot fail but for memory; then the next request counts as random.
    if BLOCK_NEXT.insert(&key, &next, 0).is_err() {
        trouble::unordered_block(slot.into());
    }
    0
}

/// (request, error, bytes). A request may be completed in parts.
#[raw_tracepoint(tracepoint = "block_rq_complete")]
pub(crate) fn block_complete(ctx: RawTracePointContext) -> i32 {
    let request: u64 = ctx.arg(0);
    let left = read::at::<u32>(request, layout!(request_length)).unwrap_or(0);
    if ctx.arg::<u32>(2) < left {
        return 0;
    }
    let slot = charged_to(request).or_else(|| {
        // SAFETY: a u32 that is replaced whole.
        let slot = unsafe { BLOCK_ISSUED.get(&request) }.copied()?;
        let _ = BLOCK_ISSUED.remove(&request);
        Some(slot)
    });
    let Some(slot) = slot else { return 0 };
    // 0 where the kernel keeps no statistics of the device.
    if let Some(began) = read::at::<u64>(request, layout!(request_start))
        && began != 0
    {
        record(slot, Distribution::BlockLatency, now_ns().wrapping_sub(began));
    }
    0
}

#[inline(always)]
fn charged_to(request: u64) -> Option<u32> {
    let bio = read::pointer(request, layout!(request_bio))?;
    let blkg = read::pointer(bio, layout!(bio_blkg))?;
    let blkcg = read::pointer(blkg, layout!(blkg_blkcg))?;
    let charged = read::pointer(blkcg, layout!(blkcg_cgroup))?;
    let mut cgroup = charged;
    for _ in 0..4 {
        let id = cgroup::id_of(cgroup)?;
        // SAFETY: a u32 that user space replaces whole.
        if let Some(slot) = unsafe { WATCHED_BLOCK.get(&id) } {
            return Some(*slot);
        }
        cgroup = cgroup::parent(cgroup)?;
    }
    trouble::block_search_ended(charged, cgroup);
    None
}
