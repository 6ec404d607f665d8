//! The control page: one word of shared memory that says which generation owns a service.
//!
//! Only the supervisor can write it; services map it read-only and look at it before every externally visible write,
//! which costs one load. Not for waking anybody: a process learns that it became owner by a message; the word is
//! what makes a stale owner harmless. It is also what holds when the supervisor dies between any two steps: the
//! process that it names goes on by itself, and the next supervisor begins with it.
//!
//! ```text
//!  byte 0         8                                            16                 4096
//!  ┌──────────────┬────────────────────────────────────────────┬──────────────────┐
//!  │ magic        │ epoch:32 (high) | orderly:1 | owner:31     │ zero             │   memfd, 4096 bytes,
//!  └──────────────┴────────────────────────────────────────────┴──────────────────┘   sealed FUTURE_WRITE|SHRINK|GROW|SEAL
//! ```

use crate::sync::{AtomicU64, Ordering};

/// Who owns the service. `epoch` counts every change of owner, so that a word can never be mistaken for an older one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ControlWord {
    pub epoch: u32,
    /// Generation number of the owner, 0 for nobody.
    pub owner: u32,
    /// The owner before yielded, and everything it had reached this one: connections may go on. Not so when an owner
    /// died, or was ended, with whatever it had read and not answered.
    pub orderly: bool,
}

const OWNER_MAX: u32 = u32::MAX >> 1;

impl ControlWord {
    #[must_use]
    pub const fn to_bits(self) -> u64 {
        (self.epoch as u64) << 32 | (self.orderly as u64) << 31 | (self.owner & OWNER_MAX) as u64
    }

    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        Self { epoch: (bits >> 32) as u32, owner: bits as u32 & OWNER_MAX, orderly: bits as u32 > OWNER_MAX }
    }
}

/// The word itself, apart from the page so that loom can run it.
#[repr(transparent)]
#[derive(Debug)]
pub struct ControlCell(AtomicU64);

impl ControlCell {
    #[cfg(loom)]
    #[must_use]
    pub fn new(word: ControlWord) -> Self {
        Self(AtomicU64::new(word.to_bits()))
    }

    /// Release: whatever the supervisor did before (all of DELTA) is visible to the process that reads this word.
    pub fn store(&self, word: ControlWord) {
        self.0.store(word.to_bits(), Ordering::Release);
    }

    /// Acquire: the other side of [`Self::store`].
    #[must_use]
    pub fn load(&self) -> ControlWord {
        ControlWord::from_bits(self.0.load(Ordering::Acquire))
    }
}

#[cfg(not(loom))]
pub use page::{ControlError, ControlPage, ControlView};

#[cfg(not(loom))]
mod page {
    use std::io;
    use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

    use super::{ControlCell, ControlWord};
    use crate::sys::{self, Mapping};

    const PAGE_LEN: usize = 4096;
    const MAGIC: u64 = u64::from_le_bytes(*b"WSWPCTL1");
    const WORD_OFFSET: usize = 8;
    const SEALS: libc::c_int = libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;

    /// Why there is no control page.
    #[derive(Debug, thiserror::Error)]
    pub enum ControlError {
        #[error("cannot {what} the control page")]
        System {
            what: &'static str,
            #[source]
            source: io::Error,
        },
        #[error("the descriptor is no control page: {why}")]
        Foreign { why: &'static str },
    }

    fn system(what: &'static str) -> impl FnOnce(io::Error) -> ControlError {
        move |source| ControlError::System { what, source }
    }

    fn cell(map: &Mapping) -> &ControlCell {
        debug_assert_eq!(map.len(), PAGE_LEN);
        // SAFETY: the mapping is PAGE_LEN long and page-aligned, so the cell lies inside it, aligned; it lives as
        // long as the borrow of `map`; all access by any process is atomic.
        unsafe { &*map.as_ptr().add(WORD_OFFSET).cast::<ControlCell>() }
    }

    /// The supervisor's side. After a restart of the supervisor the old page cannot be made writable again: create a new
    /// one with the same word, to the epoch, and send it with `ToService::ControlPage`.
    #[derive(Debug)]
    pub struct ControlPage {
        fd: OwnedFd,
        map: Mapping,
    }

    impl ControlPage {
        /// A page whose word is `ControlWord::default()`: nobody owns.
        ///
        /// # Errors
        /// When the kernel refuses the memfd, the mapping or the seals (`F_SEAL_FUTURE_WRITE` needs Linux 5.1).
        pub fn create() -> Result<Self, ControlError> {
            let fd = sys::memfd(c"warmswap-control", PAGE_LEN as u64).map_err(system("create"))?;
            let map = Mapping::new(fd.as_fd(), PAGE_LEN, true).map_err(system("map"))?;
            // SAFETY: the first 8 bytes of a writable page-aligned mapping that nobody else has yet.
            unsafe { map.as_ptr().cast::<u64>().write(MAGIC) };
            sys::add_seals(fd.as_fd(), SEALS).map_err(system("seal"))?;
            Ok(Self { fd, map })
        }

        pub fn store(&self, word: ControlWord) {
            cell(&self.map).store(word);
        }

        #[must_use]
        pub fn load(&self) -> ControlWord {
            cell(&self.map).load()
        }
    }

    /// The descriptor to send: its holders can only read.
    impl AsFd for ControlPage {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.fd.as_fd()
        }
    }

    /// A service's side.
    #[derive(Debug)]
    pub struct ControlView {
        map: Mapping,
        /// Held for a supervisor that has lost every other (see `WARMSWAP_RESCUE_FD`).
        _fd: OwnedFd,
    }

    impl ControlView {
        /// # Errors
        /// [`ControlError::Foreign`] when size, seals or magic are not those of a control page.
        pub fn map(fd: BorrowedFd<'_>) -> Result<Self, ControlError> {
            let seals = sys::seals(fd).map_err(|_| ControlError::Foreign { why: "it cannot be sealed" })?;
            if seals & SEALS != SEALS {
                return Err(ControlError::Foreign { why: "seals are missing" });
            }
            if sys::len(fd).map_err(system("measure"))? != PAGE_LEN as u64 {
                return Err(ControlError::Foreign { why: "it is not one page long" });
            }
            let map = Mapping::new(fd, PAGE_LEN, false).map_err(system("map"))?;
            // SAFETY: the first 8 bytes of a page-aligned mapping that is sealed at this length.
            if unsafe { map.as_ptr().cast::<u64>().read_volatile() } != MAGIC {
                return Err(ControlError::Foreign { why: "the magic differs" });
            }
            Ok(Self { map, _fd: fd.try_clone_to_owned().map_err(system("duplicate"))? })
        }

        #[must_use]
        pub fn load(&self) -> ControlWord {
            cell(&self.map).load()
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_view_sees_what_the_page_stores_and_nobody_else_can_write() {
            let page = ControlPage::create().unwrap();
            let view = ControlView::map(page.as_fd()).unwrap();
            assert_eq!(view.load(), ControlWord::default());
            for orderly in [false, true] {
                let word = ControlWord { epoch: u32::MAX, owner: u32::MAX >> 1, orderly };
                page.store(word);
                assert_eq!(view.load(), word);
            }
            let writable = Mapping::new(page.as_fd(), PAGE_LEN, true).expect_err("a second writable mapping");
            assert_eq!(writable.raw_os_error(), Some(libc::EPERM));
        }

        #[test]
        fn anything_else_is_refused() {
            let unsealed = sys::memfd(c"x", PAGE_LEN as u64).unwrap();
            assert!(matches!(ControlView::map(unsealed.as_fd()), Err(ControlError::Foreign { .. })));
            let long = sys::memfd(c"x", 2 * PAGE_LEN as u64).unwrap();
            sys::add_seals(long.as_fd(), SEALS).unwrap();
            assert!(matches!(ControlView::map(long.as_fd()), Err(ControlError::Foreign { .. })));
            let blank = sys::memfd(c"x", PAGE_LEN as u64).unwrap();
            sys::add_seals(blank.as_fd(), SEALS).unwrap();
            assert!(matches!(ControlView::map(blank.as_fd()), Err(ControlError::Foreign { .. })));
            let null = std::fs::File::open("/dev/null").unwrap();
            assert!(matches!(ControlView::map(null.as_fd()), Err(ControlError::Foreign { .. })));
        }
    }
}
