//! Maps and globals. Sizes marked "set at load" are placeholders that the sensor replaces.

use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerfEventArray, RingBuf};
use warmswap_events::{
    BUCKETS, CACHE_LANES, ClassAccount, Control, Counters, DISTRIBUTIONS, Distribution, Histogram, Layout, Places,
    REQUEST_ROWS, SYSCALL_TABLE, bucket_of_ns,
};

use crate::network::Connection;
use crate::tasks::Task;

/// The array's values can be mapped by user space, which then reads counters without a system call (Linux 5.5).
const MMAPABLE: u32 = 1 << 10;

/// What the kernel says to who would make an entry that is there.
pub(crate) const EXISTS: i32 = -17;

#[map]
pub(crate) static RING_URGENT: RingBuf = RingBuf::with_byte_size(64 * 1024, 0);
#[map]
pub(crate) static WAKERS: PerfEventArray<u64> = PerfEventArray::new(0); // one per CPU
#[map]
pub(crate) static RING_BULK: RingBuf = RingBuf::with_byte_size(1024 * 1024, 0); // set at load

#[map]
pub(crate) static COUNTERS: Array<Counters> = Array::with_max_entries(1, MMAPABLE); // set at load
#[map]
pub(crate) static HISTOGRAMS: Array<Histogram> = Array::with_max_entries(1, MMAPABLE); // set at load
#[map]
pub(crate) static SINCE: Array<u64> = Array::with_max_entries(1, MMAPABLE); // set at load
#[map]
pub(crate) static CACHE: Array<u64> = Array::with_max_entries(CACHE_LANES, 0); // set at load
#[map]
pub(crate) static CONTROL: Array<Control> = Array::with_max_entries(1, MMAPABLE);
#[map]
pub(crate) static ACCOUNT: Array<ClassAccount> = Array::with_max_entries(warmswap_events::CLASSES as u32, MMAPABLE);

#[map]
pub(crate) static WATCHED: HashMap<u64, u32> = HashMap::with_max_entries(256, 0); // set at load
#[map]
pub(crate) static WATCHED_BLOCK: HashMap<u64, u32> = HashMap::with_max_entries(256, 0); // set at load

/// What became of sockets in [`crate::ports`].
#[map]
pub(crate) static PORTS: Array<u64> = Array::with_max_entries(2, 0);

/// Task (the address of its struct) → what is known of it. About 4 MiB.
#[map]
pub(crate) static TASKS: HashMap<u64, Task> = HashMap::with_max_entries(1 << 15, 0);

/// TCP socket (the address of its struct) → what is known of its connection. About 6 MiB.
#[map]
pub(crate) static CONNECTIONS: HashMap<u64, Connection> = HashMap::with_max_entries(1 << 16, 0);

/// Local port → how many connections of `CONNECTIONS` are served there.
#[map]
pub(crate) static SERVED: Array<u64> = Array::with_max_entries(1 << 16, 0);

/// By the number of a socket → requests that wait for their answer. 1 MiB.
#[map]
pub(crate) static REQUESTS: Array<Places> = Array::with_max_entries(REQUEST_ROWS, MMAPABLE);

/// (slot, request queue) → the sector after the last request.
#[map]
pub(crate) static BLOCK_NEXT: LruHashMap<[u64; 2], u64> = LruHashMap::with_max_entries(4_096, 0);

/// Block request (the address of its struct) → the slot of the process that issued it, where its bio names no watched cgroup.
#[map]
pub(crate) static BLOCK_ISSUED: LruHashMap<u64, u32> = LruHashMap::with_max_entries(4_096, 0);

/// Slot → when the last request arrived, on any connection.
#[map]
pub(crate) static ASKED: Array<u64> = Array::with_max_entries(1, 0); // set at load

/// (message, subject) → how often it would have been said; see [`crate::trouble`].
#[map]
pub(crate) static SAID: LruHashMap<[u64; 2], u64> = LruHashMap::with_max_entries(1, 0); // set at load

#[unsafe(no_mangle)]
pub(crate) static LAYOUT: Layout = Layout::MISSING;
#[unsafe(no_mangle)]
pub(crate) static CPUS: u32 = 0;
#[unsafe(no_mangle)]
pub(crate) static OWN_TGID: u32 = 0;
#[unsafe(no_mangle)]
pub(crate) static BULK_RING_BYTES: u32 = 0;
#[unsafe(no_mangle)]
pub(crate) static SYSCALLS: [u8; SYSCALL_TABLE] = [0; SYSCALL_TABLE];

/// Reads a global as the sensor set it, not as it was compiled. The verifier knows its value, so a branch on a
/// missing offset costs nothing at run time.
macro_rules! global {
    ($place:expr) => {
        // SAFETY: a place inside a static; volatile because the loader replaces the bytes after compilation.
        unsafe { core::ptr::read_volatile(&raw const $place) }
    };
}
pub(crate) use global;

/// An offset or argument position of [`LAYOUT`].
macro_rules! layout {
    ($field:ident) => {
        crate::maps::global!(crate::maps::LAYOUT.$field)
    };
    ($field:ident [$index:literal]) => {
        crate::maps::global!(crate::maps::LAYOUT.$field[$index])
    };
}
pub(crate) use layout;

#[inline(always)]
pub(crate) fn cpu() -> u32 {
    // SAFETY: the helper has no preconditions.
    unsafe { aya_ebpf::helpers::generated::bpf_get_smp_processor_id() }
}

/// The counters of a slot on this CPU; `None` for slot 0, which is nobody's.
#[inline(always)]
pub(crate) fn counters(slot: u32, cpu: u32) -> Option<*mut Counters> {
    if slot == 0 {
        return None;
    }
    COUNTERS.get_ptr_mut(slot.wrapping_mul(global!(CPUS)).wrapping_add(cpu))
}

/// Adds to a counter that only one program on this CPU writes and that nothing which writes it can interrupt.
macro_rules! add {
    ($counters:expr, $field:ident, $n:expr) => {
        // SAFETY: the pointer comes from a map lookup that succeeded, and the field lies inside the value.
        unsafe { (*$counters).$field = (*$counters).$field.wrapping_add($n) }
    };
}
pub(crate) use add;

/// Adds to a counter that several contexts write: an interrupt, another CPU, a preempting task.
#[inline(always)]
pub(crate) fn add_atomic(counter: *mut u64, n: u64) {
    // SAFETY: the callers pass the address of an aligned u64 inside a map value whose lookup succeeded. The result is
    // not used, so this becomes the instruction that every kernel has (the fetching form is younger than 5.10).
    unsafe {
        core::intrinsics::atomic_xadd::<u64, u64, { core::intrinsics::AtomicOrdering::Relaxed }>(counter, n);
    }
}

/// [`add_atomic`] to a field of counters.
macro_rules! add_shared {
    ($counters:expr, $field:ident, $n:expr) => {
        // SAFETY: the pointer comes from a map lookup that succeeded, and the field lies inside the value.
        crate::maps::add_atomic(unsafe { &raw mut (*$counters).$field }, $n)
    };
}
pub(crate) use add_shared;

/// Takes a duration into a histogram of a slot.
#[inline(always)]
pub(crate) fn record(slot: u32, distribution: Distribution, ns: u64) {
    let index = slot.wrapping_mul(DISTRIBUTIONS).wrapping_add(distribution as u32);
    if let Some(histogram) = HISTOGRAMS.get_ptr_mut(index) {
        let bucket = bucket_of_ns(ns);
        // Volatile: from what it knows of the duration the compiler would conclude what the verifier cannot, and leave out the
        // check that it asks for.
        // SAFETY: our own stack.
        let bucket = unsafe { core::ptr::read_volatile(&raw const bucket) };
        if bucket < BUCKETS {
            // SAFETY: the lookup succeeded and the index was checked in the line above, for the verifier too.
            add_atomic(unsafe { (&raw mut (*histogram).buckets).cast::<u64>().add(bucket) }, 1);
        }
    }
}
