//! Programs that the kernel runs for each of many things, when it is asked to: tasks, and entries of a map. So what they have
//! counted is taken over before a window is read.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `bpf(2)`: what is asked of it here, which aya does not ask for maps.
const LINK_CREATE: libc::c_int = 28;
const ITER_CREATE: libc::c_int = 33;
const TRACE_ITER: u32 = 28;

#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    kind: u32,
    flags: u32,
    /// What to go through, where the program does not say it.
    over: u64,
    over_bytes: u32,
    /// Older kernels want nothing behind it.
    nothing: u32,
}

#[repr(C)]
struct IterCreate {
    link: u32,
    flags: u32,
}

/// Detached when dropped.
#[derive(Debug)]
pub(crate) struct Walk {
    link: OwnedFd,
}

impl Walk {
    /// With a program that is loaded, over what it is for; over the entries of a map when that is given.
    pub(crate) fn attach(program: BorrowedFd<'_>, map: Option<BorrowedFd<'_>>) -> io::Result<Self> {
        let map = map.map(|map| map.as_raw_fd() as u32);
        let (over, over_bytes) = map.as_ref().map_or((0, 0), |map| (std::ptr::from_ref(map) as u64, size_of_val(map)));
        let program = program.as_raw_fd() as u32;
        let create = LinkCreate {
            program,
            target: 0,
            kind: TRACE_ITER,
            flags: 0,
            over,
            over_bytes: over_bytes as u32,
            nothing: 0,
        };
        bpf(LINK_CREATE, &create).map(|link| Self { link })
    }

    /// Over all of them, once.
    pub(crate) fn go(&self) -> io::Result<()> {
        let mut all = File::from(bpf(ITER_CREATE, &IterCreate { link: self.link.as_raw_fd() as u32, flags: 0 })?);
        // It says nothing; reading it to its end is what makes it go.
        let mut nothing = [0; 64];
        loop {
            match all.read(&mut nothing) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                // After a million of them the kernel wants to be asked again.
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

fn bpf<T>(command: libc::c_int, argument: &T) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads this many bytes of a live structure, and what it points to.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(argument), size_of::<T>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor the kernel just gave us, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
