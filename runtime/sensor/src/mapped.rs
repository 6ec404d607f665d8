//! A BPF array seen through a mapping: read and written without a system call.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};

/// Values that consist of words of 64 bits, so that each word can be read whole while the kernel writes it.
///
/// # Safety
/// The type must be `repr(C)`, without padding, and made of integers alone that fill whole words.
pub(crate) unsafe trait Words: Copy {}

// SAFETY: the word itself.
unsafe impl Words for u64 {}
// SAFETY: repr(C) of u64 only.
unsafe impl Words for warmswap_events::Counters {}
// SAFETY: as above.
unsafe impl Words for warmswap_events::Control {}
// SAFETY: as above.
unsafe impl Words for warmswap_events::ClassAccount {}
// SAFETY: as above.
unsafe impl Words for warmswap_events::Histogram {}
// SAFETY: repr(C) of u64 and of pairs of u32, without padding.
unsafe impl Words for warmswap_events::Places {}

/// `length` values of `T`, shared with the kernel.
#[derive(Debug)]
pub(crate) struct MappedArray<T> {
    map: MmapRaw,
    length: usize,
    _of: PhantomData<T>,
}

pub(crate) fn page_size() -> usize {
    // SAFETY: sysconf has no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}

impl<T: Words> MappedArray<T> {
    /// Maps an array map that was created with `BPF_F_MMAPABLE`.
    pub(crate) fn new(map: BorrowedFd<'_>, length: usize) -> io::Result<Self> {
        let page = page_size();
        let bytes = (length * size_of::<T>()).div_ceil(page) * page;
        let map = MmapOptions::new().len(bytes).map_raw(map.as_raw_fd())?;
        Ok(Self { map, length, _of: PhantomData })
    }

    /// The words of one value; empty when `index` is out of range.
    pub(crate) fn words(&self, index: usize) -> &[AtomicU64] {
        if index >= self.length {
            return &[];
        }
        // SAFETY: `index` is inside the mapping, which lives as long as `self`; values are u64 words (see `Words`) on a
        // page-aligned base, and the kernel and we only access them as whole words.
        unsafe {
            let first = self.map.as_mut_ptr().add(index * size_of::<T>()).cast::<AtomicU64>();
            std::slice::from_raw_parts(first, size_of::<T>() / 8)
        }
    }

    /// A copy, word by word: each word is whole, the words need not be of one moment. `None` when out of range.
    pub(crate) fn read(&self, index: usize) -> Option<T> {
        let words = self.words(index);
        if words.is_empty() {
            return None;
        }
        let mut value = std::mem::MaybeUninit::<T>::uninit();
        for (at, word) in words.iter().enumerate() {
            // SAFETY: `words` has exactly the words of a T. Relaxed: counters carry no order with other data.
            unsafe { value.as_mut_ptr().cast::<u64>().add(at).write(word.load(Ordering::Relaxed)) };
        }
        // SAFETY: every word was written.
        Some(unsafe { value.assume_init() })
    }
}
