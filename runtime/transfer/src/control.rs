//! The control page: one word of shared memory that says which generation owns a service.
//!
//! Only the supervisor can write it; services map it read-only and look at it before every externally visible write,
//! which costs one load. Not for waking anybody: a process learns that it became owner by a message; the word is
//! what makes a stale owner harmless. It is also what holds when the supervisor dies between any two steps: the
//! process that it names goes on by itself, and the next supervisor begins with it.
//!
//! The word, most significant bits first: epoch (32), orderly (1), owner (31). Not here: who serves *now*, which
//! [`crate::ownership`] says.

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
pub use mapped::{ControlPage, ControlView};

#[cfg(not(loom))]
mod mapped {
    use std::os::fd::{AsFd, BorrowedFd};

    use super::{ControlCell, ControlWord};
    use crate::page::{Kind, Page, PageError};

    const CONTROL_PAGE: Kind = Kind {
        name: "control page",
        file: c"warmswap-control",
        magic: *b"WSWPCTL1",
        seals: libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL,
    };

    /// The supervisor's side. After a restart of the supervisor the old page cannot be made writable again: create a new
    /// one with the same word, to the epoch, and send it with `ToService::NewSupervisor`.
    #[derive(Debug)]
    pub struct ControlPage(Page);

    impl ControlPage {
        /// A page whose word is `ControlWord::default()`: nobody owns.
        ///
        /// # Errors
        /// When the kernel refuses the memfd, the mapping or the seals (`F_SEAL_FUTURE_WRITE` needs Linux 5.1).
        pub fn create() -> Result<Self, PageError> {
            Page::create(&CONTROL_PAGE).map(Self)
        }

        pub fn store(&self, word: ControlWord) {
            self.0.word::<ControlCell>().store(word);
        }

        #[must_use]
        pub fn load(&self) -> ControlWord {
            self.0.word::<ControlCell>().load()
        }
    }

    /// The descriptor to send: its holders can only read.
    impl AsFd for ControlPage {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.0.as_fd()
        }
    }

    /// A service's side. Its descriptor is held for a supervisor that has lost every other (see `WARMSWAP_RESCUE_FD`).
    #[derive(Debug)]
    pub struct ControlView(Page);

    impl ControlView {
        /// # Errors
        /// [`PageError::Foreign`] when size, seals or magic are not those of a control page.
        pub fn map(fd: BorrowedFd<'_>) -> Result<Self, PageError> {
            Page::open(fd, &CONTROL_PAGE, false).map(Self)
        }

        #[must_use]
        pub fn load(&self) -> ControlWord {
            self.0.word::<ControlCell>().load()
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
            let writable = Page::open(page.as_fd(), &CONTROL_PAGE, true).expect_err("a second writable mapping");
            assert!(
                matches!(&writable, PageError::System { source, .. }
                if source.raw_os_error() == Some(libc::EPERM)),
                "{writable}"
            );
        }
    }
}
