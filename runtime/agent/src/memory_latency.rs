//! Memory access latency of this host: a dependent walk over more memory than the caches hold.

use std::sync::{Mutex, OnceLock};

use crate::lock;

/// 32 MiB of u32: beyond the private caches of any CPU this runs on.
const ENTRIES: usize = 8 << 20;
/// Loads of one measurement; about a quarter of a millisecond. It is done in the middle of handovers, on CPUs that others need.
const STEPS: usize = 2_048;
/// Measurements of which the median counts.
const REPEATS: usize = 5;

struct Ring {
    next: Vec<u32>,
    at: u32,
}

/// Mean time of one dependent load, ns. The first call takes a fraction of a second to build the ring.
pub(crate) fn measure() -> Option<f64> {
    static RING: OnceLock<Mutex<Ring>> = OnceLock::new();
    let mut ring = lock(RING.get_or_init(|| Mutex::new(Ring { next: one_cycle(), at: 0 })));
    let mut means: Vec<f64> = (0..REPEATS)
        .map(|_| {
            let began = thread_cpu_ns();
            for _ in 0..STEPS {
                ring.at = ring.next[ring.at as usize];
            }
            (thread_cpu_ns() - began) as f64 / STEPS as f64
        })
        .collect();
    std::hint::black_box(ring.at);
    means.sort_by(f64::total_cmp);
    means.get(REPEATS / 2).copied()
}

/// CPU time of this thread: another process that takes the CPU in between does not count.
fn thread_cpu_ns() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID)
        .map_or(0, |time| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}

/// A random permutation that is one cycle (Sattolo), so that the walk visits everything and cannot be prefetched.
fn one_cycle() -> Vec<u32> {
    let mut random = crate::random::uniform();
    let mut next: Vec<u32> = (0..ENTRIES as u32).collect();
    for last in (1..ENTRIES).rev() {
        let other = (random() * last as f64) as usize;
        next.swap(last, other.min(last - 1));
    }
    next
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_measurement_is_a_plausible_number_of_nanoseconds() {
        let ns = super::measure().unwrap();
        assert!((0.5..5_000.0).contains(&ns), "{ns}");
    }
}
