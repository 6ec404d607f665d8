//! One page of shared memory that holds a single word: the control word or the ownership lock.
//!
//! ```text
//!  byte 0         8        64                             4096
//!  ┌──────────────┬────────┬──────────────┬───────────────┐
//!  │ magic        │ 0      │ word         │ 0             │   memfd, sealed at this length
//!  └──────────────┴────────┴──────────────┴───────────────┘
//! ```

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::sys::{self, Mapping};

const PAGE_LEN: usize = 4096;
/// Alone in its cache line.
const WORD_OFFSET: usize = 64;

/// Why there is no such page.
#[derive(Debug, thiserror::Error)]
pub enum PageError {
    #[error("cannot {what} the {page}")]
    System {
        what: &'static str,
        page: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the descriptor is no {page}: {why}")]
    Foreign { page: &'static str, why: &'static str },
}

/// What tells one kind of page from the others.
#[derive(Debug)]
pub(crate) struct Kind {
    /// For errors.
    pub(crate) name: &'static str,
    pub(crate) file: &'static CStr,
    pub(crate) magic: [u8; 8],
    pub(crate) seals: libc::c_int,
}

#[derive(Debug)]
pub(crate) struct Page {
    fd: OwnedFd,
    map: Mapping,
}

impl Page {
    /// A page whose word is 0, mapped writable and sealed.
    pub(crate) fn create(kind: &Kind) -> Result<Self, PageError> {
        let system = |what| move |source| PageError::System { what, page: kind.name, source };
        let fd = sys::memfd(kind.file, PAGE_LEN as u64).map_err(system("create"))?;
        let map = Mapping::new(fd.as_fd(), PAGE_LEN, true).map_err(system("map"))?;
        // SAFETY: the first 8 bytes of a writable page-aligned mapping that nobody else has yet.
        unsafe { map.as_ptr().cast::<[u8; 8]>().write(kind.magic) };
        sys::add_seals(fd.as_fd(), kind.seals).map_err(system("seal"))?;
        Ok(Self { fd, map })
    }

    /// Maps what came from another process, after checking seals, size and magic.
    pub(crate) fn open(fd: BorrowedFd<'_>, kind: &Kind, writable: bool) -> Result<Self, PageError> {
        let system = |what| move |source| PageError::System { what, page: kind.name, source };
        let foreign = |why| PageError::Foreign { page: kind.name, why };
        let seals = sys::seals(fd).map_err(|_| foreign("it cannot be sealed"))?;
        if seals & kind.seals != kind.seals {
            return Err(foreign("seals are missing"));
        }
        if sys::len(fd).map_err(system("measure"))? != PAGE_LEN as u64 {
            return Err(foreign("it is not one page long"));
        }
        let map = Mapping::new(fd, PAGE_LEN, writable).map_err(system("map"))?;
        // SAFETY: the first 8 bytes of a page-aligned mapping that is sealed at this length.
        if unsafe { map.as_ptr().cast::<[u8; 8]>().read_volatile() } != kind.magic {
            return Err(foreign("the magic differs"));
        }
        Ok(Self { fd: fd.try_clone_to_owned().map_err(system("duplicate"))?, map })
    }

    /// Whether both are views of one file.
    pub(crate) fn is_same_as(&self, other: &Self) -> bool {
        let file = |page: &Self| sys::identity(page.fd.as_fd()).ok();
        file(self).is_some_and(|of| Some(of) == file(other))
    }

    /// The word as `C`, which must be a transparent wrapper of an atomic u64.
    pub(crate) fn word<C>(&self) -> &C {
        const { assert!(size_of::<C>() == 8 && align_of::<C>() == 8) };
        debug_assert_eq!(self.map.len(), PAGE_LEN);
        // SAFETY: the mapping is PAGE_LEN long and page-aligned, so the word lies inside it, aligned; it lives as long as
        // the borrow of `self`; every process accesses it atomically only, as the types of both callers do.
        unsafe { &*self.map.as_ptr().add(WORD_OFFSET).cast::<C>() }
    }
}

impl AsFd for Page {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: Kind = Kind { name: "test page", file: c"x", magic: *b"WSWPTST1", seals: libc::F_SEAL_SHRINK };

    #[test]
    fn anything_else_is_refused() {
        let refused = |fd: BorrowedFd<'_>| matches!(Page::open(fd, &KIND, false), Err(PageError::Foreign { .. }));
        let page = Page::create(&KIND).unwrap();
        let view = Page::open(page.as_fd(), &KIND, true).unwrap();
        assert!(view.is_same_as(&page) && !Page::create(&KIND).unwrap().is_same_as(&page));
        let unsealed = sys::memfd(c"x", PAGE_LEN as u64).unwrap();
        assert!(refused(unsealed.as_fd()));
        let long = sys::memfd(c"x", 2 * PAGE_LEN as u64).unwrap();
        sys::add_seals(long.as_fd(), KIND.seals).unwrap();
        assert!(refused(long.as_fd()));
        let blank = sys::memfd(c"x", PAGE_LEN as u64).unwrap();
        sys::add_seals(blank.as_fd(), KIND.seals).unwrap();
        assert!(refused(blank.as_fd()));
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(refused(null.as_fd()));
    }
}
