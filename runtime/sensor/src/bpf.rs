//! `bpf(2)`, for what aya does not ask of it.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const RAW_TRACEPOINT_OPEN: libc::c_int = 17;
const LINK_CREATE: libc::c_int = 28;
const ITER_CREATE: libc::c_int = 33;
const TRACE_ITER: u32 = 28;

// Where a structure would end within eight bytes: older kernels want nothing there.

#[repr(C)]
struct RawTracepointOpen {
    name: u64,
    program: u32,
    nothing: u32,
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    kind: u32,
    flags: u32,
    /// What to go through, where the program does not say it.
    over: u64,
    over_bytes: u32,
    nothing: u32,
}

#[repr(C)]
struct IterCreate {
    link: u32,
    flags: u32,
}

/// Attaches a program at a tracepoint until the descriptor is closed. A typed program knows which one.
pub(crate) fn attach_tracepoint(program: BorrowedFd<'_>, name: Option<&CStr>) -> io::Result<OwnedFd> {
    let name = name.map_or(0, |name| name.as_ptr() as u64);
    call(RAW_TRACEPOINT_OPEN, &RawTracepointOpen { name, program: program.as_raw_fd() as u32, nothing: 0 })
}

/// Attaches an iterator until the descriptor is closed: over what it is for, or over the entries of a map.
pub(crate) fn attach_iterator(program: BorrowedFd<'_>, map: Option<BorrowedFd<'_>>) -> io::Result<OwnedFd> {
    let map = map.map(|map| map.as_raw_fd() as u32);
    let (over, over_bytes) = map.as_ref().map_or((0, 0), |map| (std::ptr::from_ref(map) as u64, size_of_val(map)));
    let program = program.as_raw_fd() as u32;
    let over_bytes = over_bytes as u32;
    call(LINK_CREATE, &LinkCreate { program, target: 0, kind: TRACE_ITER, flags: 0, over, over_bytes, nothing: 0 })
}

/// Reading this to its end lets an iterator go over everything once.
pub(crate) fn iterate(link: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    call(ITER_CREATE, &IterCreate { link: link.as_raw_fd() as u32, flags: 0 })
}

fn call<T>(command: libc::c_int, argument: &T) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads this many bytes of a live structure, and what it points to, which lives as long.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(argument), size_of::<T>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor the kernel just gave us, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
