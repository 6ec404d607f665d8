//! BPF programs that do nothing, where ours or others' do something: what the kernel itself takes for calling them.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use anyhow::{Context as _, Result};
use warmswap_sensor::CgroupMounts;

pub(super) const NAME: &str = "programs that do nothing";

/// `bpf(2)` and the first members of its argument, for the two things that are asked of it here.
const PROG_LOAD: libc::c_int = 5;
const PROG_GET_NEXT_ID: libc::c_int = 11;
const RAW_TRACEPOINT_OPEN: libc::c_int = 17;
const LINK_CREATE: libc::c_int = 28;
const RAW_TRACEPOINT: u32 = 17;
const CGROUP_PACKETS: u32 = 8;
const HOOK: &CStr = c"sys_exit";
/// Packets that arrive, and that leave.
const WAYS: [u32; 2] = [0, 1];

/// `r0 = 1; exit`: of a packet, that it may pass.
const PROGRAM: [u64; 2] = [0x1_0000_00b7, 0x95];

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
struct Link {
    program: u32,
    target: u32,
    way: u32,
    flags: u32,
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
    _links: Vec<OwnedFd>,
}

impl Floor {
    /// At the end of system calls.
    pub(super) fn at_exit() -> Result<Self> {
        let program = load(RAW_TRACEPOINT)?;
        let open = Open { name: HOOK.as_ptr() as u64, program: program.as_raw_fd() as u32, reserved: 0 };
        Ok(Self { _links: vec![bpf(RAW_TRACEPOINT_OPEN, &open).context("cannot attach to sys_exit")?] })
    }

    /// At every packet, as our probes are.
    pub(super) fn at_packets() -> Result<Self> {
        let root = CgroupMounts::of_host()?.v2.context("no cgroup v2 hierarchy is mounted")?;
        let root = File::open(&root).with_context(|| format!("cannot open {}", root.display()))?;
        let program = load(CGROUP_PACKETS)?;
        let link = |way| {
            let link = Link { program: program.as_raw_fd() as u32, target: root.as_raw_fd() as u32, way, flags: 0 };
            bpf(LINK_CREATE, &link).context("cannot attach to packets")
        };
        Ok(Self { _links: WAYS.into_iter().map(link).collect::<Result<_>>()? })
    }
}

fn load(kind: u32) -> Result<OwnedFd> {
    let program = Load {
        kind,
        instructions: PROGRAM.len() as u32,
        program: PROGRAM.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        rest: [0; 3],
    };
    bpf(PROG_LOAD, &program).context("cannot load a program that does nothing")
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
