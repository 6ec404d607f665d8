//! The ownership lock: which generation serves *now*.
//!
//! The control word says who should serve, and only the supervisor can write it. But a supervisor can be late: stopped by a
//! signal, a debugger, a starved host, between "the old one has stopped" and "the new one may start". Then somebody
//! has to serve all the same, and it must be one, also when the supervisor goes on a second later. So a generation
//! takes this lock when it becomes owner and gives it back when it yields. Whoever the word names and who hears nothing for
//! [`CLAIM_AFTER`] tries to take it; of two that try one succeeds.
//!
//! ```text
//!        try_acquire(g)                    release(g)
//!  free ───────────────▶ held by g ───────────────────▶ free
//!                            │   release(g) by the supervisor, once g is confirmed dead
//!                            └─────────────────────────────────────────────────▶ free
//! ```
//!
//! The holder says [when it begins to serve](OwnershipCell::begin_serving), and the page counts that. One that yielded and
//! is told to own again thereby knows whether anybody has served since: if not, nobody has read a byte of its connections.
//!
//! Not for: a hostile generation of the same service, which can write the page as it can write the log. The word
//! (unsigned): servings (32 high bits), holder (32).

use std::time::Duration;

use crate::sync::{AtomicU64, Ordering};

/// How long a generation that could serve waits for the supervisor's word before it helps itself. Far longer than the
/// microseconds between `Yielded` and `Own`, short for a client.
pub const CLAIM_AFTER: Duration = Duration::from_millis(500);

/// The lock itself, apart from its page so that loom can run it.
#[repr(transparent)]
#[derive(Debug)]
pub struct OwnershipCell(AtomicU64);

const fn word(servings: u32, holder: u32) -> u64 {
    (servings as u64) << 32 | holder as u64
}

const fn holder(word: u64) -> u32 {
    word as u32
}

const fn servings(word: u64) -> u32 {
    (word >> 32) as u32
}

impl OwnershipCell {
    #[cfg(loom)]
    #[must_use]
    #[expect(clippy::new_without_default, reason = "only models make one; elsewhere it lies in a page")]
    pub fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// The generation that serves, 0 for none.
    #[must_use]
    pub fn holder(&self) -> u32 {
        // Acquire: whoever sees the lock free sees what its last holder published.
        holder(self.0.load(Ordering::Acquire))
    }

    /// How often a generation has begun to serve, wrapping.
    #[must_use]
    pub fn servings(&self) -> u32 {
        servings(self.0.load(Ordering::Acquire))
    }

    /// The holder serves from now on, and says so before it reads the first byte of a client.
    pub fn begin_serving(&self) {
        // Whoever takes the lock from it acquires what this released.
        self.0.fetch_add(word(1, 0), Ordering::Release);
    }

    /// Takes the lock for `generation`; true when it holds it now, also when it did before.
    pub fn try_acquire(&self, generation: u32) -> bool {
        debug_assert!(generation != 0, "0 is nobody");
        let mut seen = self.0.load(Ordering::Relaxed);
        loop {
            if holder(seen) == generation {
                return true;
            }
            if holder(seen) != 0 {
                return false;
            }
            let taken = word(servings(seen), generation);
            // Acquire pairs with the release of the last holder: everything it published is visible before this one serves.
            match self.0.compare_exchange_weak(seen, taken, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(now) => seen = now,
            }
        }
    }

    /// Gives the lock back for `generation`: by itself as it yields, or by the supervisor when it is confirmed dead. True
    /// when it was held by that generation; a lock that somebody else holds stays as it is.
    pub fn release(&self, generation: u32) -> bool {
        let mut seen = self.0.load(Ordering::Relaxed);
        while holder(seen) == generation && generation != 0 {
            // Release: the other side of `try_acquire`.
            match self.0.compare_exchange_weak(seen, word(servings(seen), 0), Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(now) => seen = now,
            }
        }
        false
    }
}

#[cfg(not(loom))]
pub use mapped::OwnershipLock;

#[cfg(not(loom))]
mod mapped {
    use std::ops::Deref;
    use std::os::fd::{AsFd, BorrowedFd};

    use super::OwnershipCell;
    use crate::page::{Kind, Page, PageError};

    const OWNERSHIP_PAGE: Kind = Kind {
        name: "ownership page",
        file: c"warmswap-ownership",
        magic: *b"WSWPOWN1",
        seals: libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL,
    };

    /// The lock in shared memory. Supervisor and generations have the same view of it.
    #[derive(Debug)]
    pub struct OwnershipLock(Page);

    impl OwnershipLock {
        /// A lock that nobody holds.
        ///
        /// # Errors
        /// When the kernel refuses the memfd, the mapping or the seals.
        pub fn create() -> Result<Self, PageError> {
            Page::create(&OWNERSHIP_PAGE).map(Self)
        }

        /// # Errors
        /// [`PageError::Foreign`] when size, seals or magic are not those of an ownership page.
        pub fn map(fd: BorrowedFd<'_>) -> Result<Self, PageError> {
            Page::open(fd, &OWNERSHIP_PAGE, true).map(Self)
        }

        /// Whether both are views of one page.
        #[must_use]
        pub fn is_same_as(&self, other: &Self) -> bool {
            self.0.is_same_as(&other.0)
        }
    }

    impl Deref for OwnershipLock {
        type Target = OwnershipCell;

        fn deref(&self) -> &OwnershipCell {
            self.0.word()
        }
    }

    impl AsFd for OwnershipLock {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.0.as_fd()
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn one_generation_at_a_time_holds_the_lock_and_only_it_is_released() {
            let supervisor = OwnershipLock::create().unwrap();
            let service = OwnershipLock::map(supervisor.as_fd()).unwrap();
            assert_eq!(service.holder(), 0);
            assert!(service.try_acquire(1) && service.try_acquire(1));
            assert!(!service.try_acquire(2));
            assert!(!supervisor.release(2) && !supervisor.release(0));
            assert_eq!(supervisor.holder(), 1);
            assert!(supervisor.release(1));
            assert!(service.try_acquire(2));
            assert_eq!(supervisor.holder(), 2);
        }

        #[test]
        fn servings_are_counted_and_acquisitions_are_not() {
            let lock = OwnershipLock::create().unwrap();
            assert!(lock.try_acquire(1));
            assert_eq!(lock.servings(), 0);
            lock.begin_serving();
            assert_eq!((lock.servings(), lock.holder()), (1, 1));
            assert!(lock.release(1) && lock.try_acquire(2) && lock.release(2));
            assert_eq!((lock.servings(), lock.holder()), (1, 0), "2 held it and did not serve");
        }
    }
}
