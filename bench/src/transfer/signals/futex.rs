//! The least that waking another process costs: two words in shared memory and the kernel's own wait and wake.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::{io, ptr};

use anyhow::{Context as _, Result, bail};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::ftruncate;
use warmswap_transfer::channel::{ServiceChannel, SupervisorChannel};
use warmswap_transfer::message::ToService;

use super::{begin, timed};
use crate::transfer::line::{Answer, Line, Signal, TIMEOUT};

const LEN: usize = 4096;
/// Not in one cache line, so that the two sides do not slow each other down.
const BACK_OFFSET: usize = 128;

/// Two words that both processes map.
struct Words(ptr::NonNull<libc::c_void>);

impl Words {
    fn map(fd: &OwnedFd) -> Result<Self> {
        let len = LEN.try_into().context("no length")?;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let map = unsafe { mmap(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, fd, 0) };
        Ok(Self(map.context("cannot map two words")?))
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: inside the mapping, aligned, alive as long as `self`; both processes access it atomically only.
        unsafe { &*self.0.as_ptr().cast::<u8>().add(offset).cast::<AtomicU32>() }
    }

    fn there(&self) -> &AtomicU32 {
        self.word(0)
    }

    fn back(&self) -> &AtomicU32 {
        self.word(BACK_OFFSET)
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: nothing borrows from the mapping any more.
        let _ = unsafe { munmap(self.0, LEN) };
    }
}

/// One system call on a word that lives in shared memory, so without FUTEX_PRIVATE_FLAG.
fn futex(word: &AtomicU32, operation: libc::c_int, value: u32, time: Option<&libc::timespec>) -> io::Result<()> {
    let time = time.map_or(ptr::null(), ptr::from_ref);
    // SAFETY: `word` and `time` live through the call; the kernel only reads them.
    let result = unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, value, time, 0, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn wake(word: &AtomicU32, round: u32) -> Result<()> {
    word.store(round, Ordering::Release);
    futex(word, libc::FUTEX_WAKE, 1, None).context("cannot wake")
}

fn sleep_until(word: &AtomicU32, round: u32) -> Result<()> {
    let limit = libc::timespec { tv_sec: TIMEOUT.as_secs() as libc::time_t, tv_nsec: 0 };
    loop {
        let seen = word.load(Ordering::Acquire);
        if seen == round {
            return Ok(());
        }
        match futex(word, libc::FUTEX_WAIT, seen, Some(&limit)) {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
            other => other.context("no signal came")?,
        }
    }
}

pub(super) fn ping(count: u32, channel: &mut SupervisorChannel, line: &mut Line) -> Result<Vec<f64>> {
    begin(Signal::Futex, count, line)?;
    let fd = memfd_create("warmswap-bench", MFdFlags::MFD_CLOEXEC)?;
    ftruncate(&fd, LEN as i64)?;
    let words = Words::map(&fd)?;
    channel.send(&ToService::Segment { index: 0 }, &[fd.as_fd()])?;
    line.expect_ready()?;
    timed(count, |round| {
        wake(words.there(), round)?;
        sleep_until(words.back(), round)
    })
}

pub(super) fn echo(count: u32, channel: &mut ServiceChannel, line: &mut Line) -> Result<()> {
    let (message, fds) = channel.recv_timeout(TIMEOUT)?.context("no words came")?;
    let Some(fd) = fds.first() else { bail!("{message:?} came instead of two words") };
    let words = Words::map(fd)?;
    line.tell(&Answer::Ready)?;
    for round in 1..=count {
        sleep_until(words.there(), round)?;
        wake(words.back(), round)?;
    }
    Ok(())
}
