//! Reads of kernel memory at offsets from BTF: by a helper, or at once where the verifier knows the type of the struct.

use aya_ebpf::helpers::bpf_probe_read_kernel;
use warmswap_events::OFFSET_MISSING;

/// The value at `base + offset`; `None` when this kernel has no such field or the memory is not there. An offset of the
/// layout is a constant to the verifier, so asking whether it is missing costs nothing at run time.
#[inline(always)]
pub(crate) fn at<T: Copy>(base: u64, offset: u32) -> Option<T> {
    if offset == OFFSET_MISSING {
        return None;
    }
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

/// The value in a struct whose type the verifier knows, with an offset that is not missing.
#[inline(always)]
pub(crate) fn typed<T: Copy>(base: u64, offset: u32) -> T {
    // SAFETY: the verifier has checked that this lies inside the struct.
    unsafe { core::ptr::read_volatile(base.wrapping_add(u64::from(offset)) as *const T) }
}

/// The pointer there, unless it is null: the verifier knows which may be, and wants it looked at.
#[inline(always)]
pub(crate) fn typed_pointer(base: u64, offset: u32) -> Option<u64> {
    match typed(base, offset) {
        0 => None,
        found => Some(found),
    }
}
