//! Thin wrappers over the system calls of this crate, so that `unsafe` and errno live in few places.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use memmap2::{Advice, MmapOptions, MmapRaw};

/// Faulted in at a time, bytes.
const POPULATE_LEN: usize = 256 << 10;

/// `-1` becomes the last OS error.
pub(crate) fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// An anonymous file of `len` bytes that can be sealed.
pub(crate) fn memfd(name: &std::ffi::CStr, len: u64) -> io::Result<OwnedFd> {
    // SAFETY: `name` is a valid C string; the result is checked before use.
    let fd = check(unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) })?;
    // SAFETY: the descriptor was just created and nobody else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let len = libc::off_t::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: plain system call on an owned descriptor.
    check(unsafe { libc::ftruncate(fd.as_raw_fd(), len) })?;
    Ok(fd)
}

pub(crate) fn add_seals(fd: BorrowedFd<'_>, seals: libc::c_int) -> io::Result<()> {
    // SAFETY: plain system call on a borrowed descriptor.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) }).map(drop)
}

pub(crate) fn seals(fd: BorrowedFd<'_>) -> io::Result<libc::c_int> {
    // SAFETY: plain system call on a borrowed descriptor.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) })
}

/// An ordinary memory file, or another file of such a file system.
pub(crate) fn is_tmpfs(fd: BorrowedFd<'_>) -> io::Result<bool> {
    // SAFETY: an all-zero statfs is a valid value of this plain C struct.
    let mut found: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `found` outlives the call.
    check(unsafe { libc::fstatfs(fd.as_raw_fd(), &raw mut found) })?;
    Ok(found.f_type == libc::TMPFS_MAGIC)
}

fn stat(fd: BorrowedFd<'_>) -> io::Result<libc::stat> {
    // SAFETY: an all-zero stat is a valid value of this plain C struct.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` outlives the call.
    check(unsafe { libc::fstat(fd.as_raw_fd(), &raw mut stat) })?;
    Ok(stat)
}

/// Size in bytes as `fstat` says.
pub(crate) fn len(fd: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(u64::try_from(stat(fd)?.st_size).unwrap_or(0))
}

/// Device and inode: the same for every descriptor of one file.
pub(crate) fn identity(fd: BorrowedFd<'_>) -> io::Result<(u64, u64)> {
    stat(fd).map(|stat| (stat.st_dev, stat.st_ino))
}

/// A shared mapping of the first `len` bytes of a file, unmapped on drop.
///
/// Whoever makes one has checked that the file is at least `len` long and sealed against shrinking: otherwise an
/// access could raise SIGBUS.
#[derive(Debug)]
pub(crate) struct Mapping(MmapRaw);

impl Mapping {
    pub(crate) fn new(fd: BorrowedFd<'_>, len: usize, writable: bool) -> io::Result<Self> {
        let mut options = MmapOptions::new();
        options.len(len);
        let map = if writable { options.map_raw(fd.as_raw_fd()) } else { options.map_raw_read_only(fd.as_raw_fd()) };
        map.map(Self)
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.0.as_mut_ptr()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Faults every page in for reading. Best effort: what is not mapped now is when it is read.
    pub(crate) fn touch(&self) {
        if self.0.advise(Advice::PopulateRead).is_err() {
            // Before Linux 5.14: read a byte of every page instead.
            for at in (0..self.len()).step_by(4096) {
                // SAFETY: inside the mapping, of a file that cannot shrink; the value is not used, so it may be torn.
                unsafe { self.as_ptr().add(at).read_volatile() };
            }
        }
    }

    /// Faults every page in for writing, so that no later access waits for the kernel. A piece at a time: the kernel keeps
    /// the whole address space locked meanwhile, and other threads of a service want memory too.
    pub(crate) fn populate(&self) -> io::Result<()> {
        for from in (0..self.len()).step_by(POPULATE_LEN) {
            let len = POPULATE_LEN.min(self.len() - from);
            match self.0.advise_range(Advice::PopulateWrite, from, len) {
                // Before Linux 5.14: touch a byte of every page instead.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                    for at in (from..from + len).step_by(4096) {
                        // SAFETY: inside our own writable mapping; written before anybody else has the descriptor.
                        unsafe { self.as_ptr().add(at).write_volatile(0) };
                    }
                }
                other => other?,
            }
        }
        Ok(())
    }
}

/// Waits until one of `events` (or an error) is there or `timeout` is over; an interruption counts as a wake-up.
pub(crate) fn poll(fd: BorrowedFd<'_>, events: libc::c_short, timeout: std::time::Duration) -> io::Result<()> {
    let mut entry = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    // An all-zero timespec first: on some targets it has padding fields, and its first type is being renamed.
    // SAFETY: zero is a valid value of this plain C struct.
    let mut limit: libc::timespec = unsafe { std::mem::zeroed() };
    // Longer than a day is as good as a day: callers look again.
    limit.tv_sec = timeout.as_secs().min(86_400) as _;
    limit.tv_nsec = timeout.subsec_nanos() as _;
    // SAFETY: one entry and one timespec, both live.
    match check(unsafe { libc::ppoll(&raw mut entry, 1, &raw const limit, std::ptr::null()) }) {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(()),
    }
}

/// How many files this process may have open (the soft limit).
pub fn files_max() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a live struct of the type that the call fills. It cannot fail for this resource; if it did, 0 would be said.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    limit.rlim_cur
}
