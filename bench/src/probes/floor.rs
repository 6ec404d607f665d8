//! BPF programs that do nothing, where ours or others' do something: what the kernel itself takes for calling them.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use anyhow::{Context as _, Result};

pub(super) const NAME: &str = "programs that do nothing";

/// `bpf(2)` and the first members of its argument, for the two things that are asked of it here.
const PROG_LOAD: libc::c_int = 5;
const PROG_GET_NEXT_ID: libc::c_int = 11;
const RAW_TRACEPOINT_OPEN: libc::c_int = 17;
const RAW_TRACEPOINT: u32 = 17;

/// `r0 = 0; exit`
const PROGRAM: [u64; 2] = [0xb7, 0x95];

#[repr(C)]
struct Load {
    kind: u32,
    instructions: u32,
    program: u64,
    license: u64,
    /// Log and flags: none; where it attaches is said when it does.
    rest: [u64; 3],
}

#[repr(C)]
struct Open {
    name: u64,
    program: u32,
    reserved: u32,
}

#[repr(C)]
struct Next {
    after: u32,
    found: u32,
    flags: u32,
}

/// How many BPF programs are loaded. A program of somebody else's at the same places takes its price whether ours are there
/// or not.
pub(super) fn programs() -> usize {
    let mut next = Next { after: 0, found: 0, flags: 0 };
    let mut count = 0;
    // SAFETY: the kernel reads and writes this many bytes of a live structure. It fails after the last one.
    while unsafe { libc::syscall(libc::SYS_bpf, PROG_GET_NEXT_ID, &raw mut next, size_of::<Next>()) } == 0 {
        next.after = next.found;
        count += 1;
    }
    count
}

/// Detached when dropped.
pub(super) struct Floor {
    _link: OwnedFd,
}

impl Floor {
    /// At the end of system calls.
    pub(super) fn at_exit() -> Result<Self> {
        Self::at(c"sys_exit")
    }

    /// At every segment that arrives, as our probe is.
    pub(super) fn at_segments() -> Result<Self> {
        Self::at(c"tcp_probe")
    }

    fn at(tracepoint: &CStr) -> Result<Self> {
        let load = Load {
            kind: RAW_TRACEPOINT,
            instructions: PROGRAM.len() as u32,
            program: PROGRAM.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
            rest: [0; 3],
        };
        let program = bpf(PROG_LOAD, &load).context("cannot load a program that does nothing")?;
        let open = Open { name: tracepoint.as_ptr() as u64, program: program.as_raw_fd() as u32, reserved: 0 };
        let attached = bpf(RAW_TRACEPOINT_OPEN, &open);
        Ok(Self { _link: attached.with_context(|| format!("cannot attach to {}", tracepoint.to_string_lossy()))? })
    }
}

fn bpf<T>(command: libc::c_int, argument: &T) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads this many bytes of the argument, and the constants that it points to.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(argument), size_of::<T>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor the kernel just gave us, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
