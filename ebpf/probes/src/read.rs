//! Reads of kernel memory at offsets from BTF.

use aya_ebpf::helpers::bpf_probe_read_kernel;

/// The value at `base + offset`; `None` when the memory is not there.
#[inline(always)]
pub(crate) fn at<T: Copy>(base: u64, offset: u32) -> Option<T> {
    let address = base.wrapping_add(u64::from(offset)) as *const T;
    // SAFETY: the helper checks the address and fails on a bad one; `T` is plain data.
    unsafe { bpf_probe_read_kernel(address) }.ok()
}

/// The pointer at `base + offset`, unless it is null.
#[inline(always)]
pub(crate) fn pointer(base: u64, offset: u32) -> Option<u64> {
    match at::<u64>(base, offset) {
        Some(0) | None => None,
        found => found,
    }
}
