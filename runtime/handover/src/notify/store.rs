//! Descriptors that a program gave us to keep (`FDSTORE=1`): they survive it, and the next generation is given them.
//!
//! Every generation has a store of its own, which begins as a copy of its predecessor's. So what a shadow stores is gone
//! with it when it is given up, and what an owner stores while a shadow starts does not reach that shadow.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::stat::{SFlag, fstat};
use warmswap_backend::NamedFd;

/// Begins the names of stored descriptors among those that a shim keeps: `stored-<number>:<name>`.
const KEPT_STORED: &str = "stored-";
/// Most descriptors that one generation may store.
const STORED_MAX: usize = 512;
/// What systemd calls those that have no name.
const UNNAMED: &str = "stored";

#[derive(Debug)]
pub(crate) struct Stored {
    /// Tells those with the same name apart. Never used twice, so that a descendant can be compared with its ancestor.
    number: u32,
    pub(crate) name: String,
    pub(crate) fd: OwnedFd,
}

#[derive(Debug, Default)]
pub(crate) struct FdStore {
    stored: Vec<Stored>,
    next: u32,
}

/// Why a descriptor is not stored.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("it is neither a socket nor a memory file")]
    Kind,
    #[error("{STORED_MAX} are stored already")]
    Count,
    #[error("the stored memory files would hold {bytes} bytes, more than the {bytes_max} that memory_mb_max allows")]
    Size { bytes: u64, bytes_max: u64 },
    #[error("it cannot be looked at: {0}")]
    Stat(nix::errno::Errno),
}

impl Stored {
    /// The name under which the shim keeps it.
    pub(crate) fn kept_name(&self) -> String {
        format!("{KEPT_STORED}{}:{}", self.number, self.name)
    }

    pub(crate) fn duplicate(&self) -> io::Result<NamedFd> {
        Ok(NamedFd { name: self.kept_name(), fd: self.fd.try_clone()? })
    }
}

impl FdStore {
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Stored> {
        self.stored.iter()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.stored.is_empty()
    }

    /// Of memory files.
    pub(crate) fn bytes(&self) -> u64 {
        self.stored.iter().map(|stored| memory_bytes(stored.fd.as_fd())).sum()
    }

    /// `None` when that very file is stored under this name already.
    pub(crate) fn add(&mut self, name: Option<&str>, fd: OwnedFd, bytes_max: u64) -> Result<Option<&Stored>, Refusal> {
        let name = name.unwrap_or(UNNAMED);
        let identity = identity(fd.as_fd())?;
        let known = |stored: &Stored| stored.name == name && self::identity(stored.fd.as_fd()).ok() == Some(identity);
        if self.stored.iter().any(known) {
            return Ok(None);
        }
        if self.stored.len() >= STORED_MAX {
            return Err(Refusal::Count);
        }
        let bytes = self.bytes().saturating_add(memory_bytes(fd.as_fd()));
        if bytes > bytes_max {
            return Err(Refusal::Size { bytes, bytes_max });
        }
        self.stored.push(Stored { number: self.next, name: name.to_owned(), fd });
        self.next += 1;
        Ok(self.stored.last())
    }

    /// Returns the names under which they were kept.
    pub(crate) fn remove(&mut self, name: &str) -> Vec<String> {
        let (removed, left) = std::mem::take(&mut self.stored).into_iter().partition(|stored| stored.name == name);
        self.stored = left;
        let removed: Vec<Stored> = removed;
        removed.iter().map(Stored::kept_name).collect()
    }

    /// For a successor.
    pub(crate) fn duplicate(&self) -> io::Result<Self> {
        let copy = |stored: &Stored| {
            let fd = stored.fd.try_clone()?;
            Ok(Stored { number: stored.number, name: stored.name.clone(), fd })
        };
        Ok(Self { stored: self.stored.iter().map(copy).collect::<io::Result<_>>()?, next: self.next })
    }

    /// How many of these a generation that began as a copy of an earlier state of this store does not have.
    pub(crate) fn unknown_to(&self, descendant: &Self) -> usize {
        let unknown = |stored: &&Stored| {
            let number = stored.number;
            // What the descendant has stored itself may bear the same number.
            let identity = identity(stored.fd.as_fd()).ok();
            !descendant.iter().any(|other| other.number == number && self::identity(other.fd.as_fd()).ok() == identity)
        };
        self.stored.iter().filter(unknown).count()
    }

    /// Takes back what a shim kept; gives back what is something else.
    pub(crate) fn take_kept(&mut self, kept: NamedFd) -> Option<NamedFd> {
        let parts = kept.name.strip_prefix(KEPT_STORED).and_then(|rest| rest.split_once(':'));
        let Some((number, name)) = parts.and_then(|(number, name)| Some((number.parse::<u32>().ok()?, name))) else {
            return Some(kept);
        };
        if let Some(next) = number.checked_add(1)
            && self.stored.iter().all(|stored| stored.number != number)
        {
            self.next = self.next.max(next);
            self.stored.push(Stored { number, name: name.to_owned(), fd: kept.fd });
        }
        None
    }
}

impl fmt::Display for FdStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.stored.len() {
            1 => f.write_str("1 stored descriptor"),
            count => write!(f, "{count} stored descriptors"),
        }
    }
}

/// Which file it is, and that it is one that may be stored: a socket or a memory file. Anything else could hold on to a
/// mount or a device of the host for as long as the service lives.
fn identity(fd: BorrowedFd<'_>) -> Result<(u64, u64), Refusal> {
    let stat = fstat(fd).map_err(Refusal::Stat)?;
    let kind = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
    if kind == SFlag::S_IFSOCK || is_memory_file(fd, stat.st_nlink) {
        return Ok((stat.st_dev, stat.st_ino));
    }
    Err(Refusal::Kind)
}

/// Only files of shared memory have seals, and only those without a name are memory files.
fn is_memory_file(fd: BorrowedFd<'_>, links: u64) -> bool {
    links == 0 && fcntl(fd, FcntlArg::F_GET_SEALS).is_ok()
}

/// What it holds; 0 for a socket.
fn memory_bytes(fd: BorrowedFd<'_>) -> u64 {
    fstat(fd).map_or(0, |stat| u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixDatagram;

    fn memory(bytes: &[u8]) -> OwnedFd {
        let fd = nix::sys::memfd::memfd_create(c"test", nix::sys::memfd::MFdFlags::MFD_ALLOW_SEALING).unwrap();
        io::Write::write_all(&mut std::fs::File::from(fd.try_clone().unwrap()), bytes).unwrap();
        fd
    }

    fn names(store: &FdStore) -> Vec<&str> {
        store.iter().map(|stored| stored.name.as_str()).collect()
    }

    #[test]
    fn sockets_and_memory_files_are_stored_and_nothing_else() {
        let mut store = FdStore::default();
        store.add(Some("socket"), UnixDatagram::unbound().unwrap().into(), 0).unwrap().unwrap();
        store.add(None, memory(b""), 0).unwrap().unwrap();
        let file = tempfile::tempfile().unwrap();
        for refused in [std::fs::File::open("/").unwrap(), std::fs::File::open("/dev/null").unwrap(), file] {
            assert!(matches!(store.add(Some("x"), refused.into(), u64::MAX), Err(Refusal::Kind)));
        }
        assert_eq!(names(&store), ["socket", UNNAMED]);
    }

    #[test]
    fn what_is_stored_has_limits_and_no_file_is_stored_twice() {
        let mut store = FdStore::default();
        let first = memory(&[1; 8192]);
        store.add(Some("a"), first.try_clone().unwrap(), 8192).unwrap().unwrap();
        assert!(store.add(Some("a"), first.try_clone().unwrap(), 8192).unwrap().is_none(), "it is the same file");
        assert!(matches!(store.add(Some("a"), memory(&[1; 1]), 8192), Err(Refusal::Size { bytes_max: 8192, .. })));
        for _ in 1..STORED_MAX {
            store.add(Some("s"), UnixDatagram::unbound().unwrap().into(), 8192).unwrap().unwrap();
        }
        assert!(matches!(store.add(Some("s"), memory(b""), 8192), Err(Refusal::Count)));
        assert_eq!(store.remove("s").len(), STORED_MAX - 1);
        assert_eq!(names(&store), ["a"]);
        assert!(store.remove("s").is_empty());
    }

    #[test]
    fn a_successor_has_what_was_stored_before_it_began() {
        let mut old = FdStore::default();
        old.add(Some("a"), memory(b"a"), u64::MAX).unwrap();
        let mut new = old.duplicate().unwrap();
        assert_eq!(old.unknown_to(&new), 0);
        new.add(Some("theirs"), memory(b"b"), u64::MAX).unwrap();
        assert_eq!(old.unknown_to(&new), 0);
        old.add(Some("late"), memory(b"c"), u64::MAX).unwrap();
        assert_eq!(old.unknown_to(&new), 1, "though both have the same number");
        assert_eq!(names(&new), ["a", "theirs"]);
    }

    #[test]
    fn what_a_shim_kept_is_found_again() {
        let mut store = FdStore::default();
        store.add(Some("a"), memory(b"a"), u64::MAX).unwrap();
        store.add(Some("b"), memory(b"b"), u64::MAX).unwrap();
        store.remove("a");
        let mut found = FdStore::default();
        for stored in store.iter() {
            assert!(found.take_kept(stored.duplicate().unwrap()).is_none());
        }
        let other = NamedFd { name: "control".into(), fd: memory(b"") };
        assert!(found.take_kept(other).is_some());
        assert_eq!((names(&found), found.next), (vec!["b"], 2));
        assert_eq!(store.unknown_to(&found), 0);
    }
}
