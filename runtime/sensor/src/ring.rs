//! Reader of a BPF ring buffer that publishes its position once per batch.
//!
//! aya's reader publishes after every record; each of those stores makes the kernel's next reservation miss the cache.
//!
//! ```text
//! page 0: consumer position (ours)   page 1: producer position (kernel's)   then the data, mapped twice in a row,
//!                                                                           so that no record is ever split
//! record: length:30 | discarded:1 | busy:1, page offset, payload, padding to 8
//! ```

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::mapped::page_size;

const BUSY: u32 = 1 << 31;
const DISCARDED: u32 = 1 << 30;
const HEADER: usize = 8;

#[derive(Debug)]
pub(crate) struct Ring {
    fd: OwnedFd,
    consumer: NonNull<u8>,
    producer: NonNull<u8>,
    page: usize,
    size: usize,
    /// Where we have read to; published at the end of a batch.
    position: u64,
}

// SAFETY: the mappings are owned and stay where they are; there is one reader because reading takes `&mut self`.
unsafe impl Send for Ring {}

impl Ring {
    /// `size` is the map's, in bytes.
    pub(crate) fn new(map: BorrowedFd<'_>, size: usize) -> io::Result<Self> {
        let page = page_size();
        let fd = map.try_clone_to_owned()?;
        let map = |length: usize, protection: i32, offset: usize| {
            // SAFETY: a new shared mapping at an address of the kernel's choice.
            let base = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    length,
                    protection,
                    libc::MAP_SHARED,
                    fd.as_raw_fd(),
                    offset as libc::off_t,
                )
            };
            if base == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            NonNull::new(base.cast::<u8>()).ok_or_else(|| io::Error::from(io::ErrorKind::AddrNotAvailable))
        };
        let consumer = map(page, libc::PROT_READ | libc::PROT_WRITE, 0)?;
        let producer = match map(page + 2 * size, libc::PROT_READ, page) {
            Ok(base) => base,
            Err(error) => {
                // SAFETY: the mapping made above.
                unsafe { libc::munmap(consumer.as_ptr().cast(), page) };
                return Err(error);
            }
        };
        let mut ring = Self { fd, consumer, producer, page, size, position: 0 };
        // Relaxed: our own last store, or the kernel's zero.
        ring.position = ring.consumer_position().load(Ordering::Relaxed);
        Ok(ring)
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.fd.as_fd()
    }

    fn consumer_position(&self) -> &AtomicU64 {
        // SAFETY: the first word of the consumer page, mapped as long as self lives.
        unsafe { self.consumer.cast::<AtomicU64>().as_ref() }
    }

    fn producer_position(&self) -> &AtomicU64 {
        // SAFETY: the first word of the producer page, mapped as long as self lives.
        unsafe { self.producer.cast::<AtomicU64>().as_ref() }
    }

    /// Hands up to `records_max` records to `each`, then publishes the position. Returns how many there were; fewer
    /// than `records_max` means that the ring was empty, or that its next record is still being written.
    pub(crate) fn drain(&mut self, records_max: usize, mut each: impl FnMut(&[u8])) -> usize {
        let mut records = 0;
        // Acquire: pairs with the kernel's store-release of the producer position in `bpf_ringbuf_reserve`; headers
        // up to there are then visible.
        let end = self.producer_position().load(Ordering::Acquire);
        while records < records_max && self.position < end {
            let at = (self.position as usize) & (self.size - 1);
            // SAFETY: positions are multiples of 8 and `at` is inside the data, whose second mapping follows the
            // first; the record of a valid header therefore lies inside the mapping whole.
            let header = unsafe { self.producer.add(self.page + at).cast::<AtomicU32>().as_ref() };
            // Acquire: pairs with the kernel's `xchg` of the header in `bpf_ringbuf_commit`; the payload is then visible.
            let header = header.load(Ordering::Acquire);
            if header & BUSY != 0 {
                break;
            }
            let length = (header & !(BUSY | DISCARDED)) as usize;
            if length > self.size - HEADER {
                debug_assert!(false, "a record longer than the ring");
                break;
            }
            if header & DISCARDED == 0 {
                // SAFETY: as above; the kernel does not write here again before the position is published.
                let payload =
                    unsafe { std::slice::from_raw_parts(self.producer.as_ptr().add(self.page + at + HEADER), length) };
                each(payload);
                records += 1;
            }
            self.position += (length + HEADER).next_multiple_of(8) as u64;
        }
        // Release: pairs with the kernel's load-acquire of the consumer position before it reuses the space; our reads
        // of the records come first.
        self.consumer_position().store(self.position, Ordering::Release);
        records
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mappings made in `new`, of these sizes; nothing borrowed from them outlives self.
        unsafe {
            libc::munmap(self.consumer.as_ptr().cast(), self.page);
            libc::munmap(self.producer.as_ptr().cast(), self.page + 2 * self.size);
        }
    }
}
