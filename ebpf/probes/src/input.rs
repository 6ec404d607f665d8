//! Input: reads that returned data from a terminal or an input device, told by device number.
//!
//! Not here: what was typed. Only the device and the number of bytes are looked at.

use aya_ebpf::helpers::generated::bpf_get_current_task;
use warmswap_events::{Class, OFFSET_MISSING};

use crate::cgroup::Owner;
use crate::emit::{Context, emit, wanted};
use crate::maps::layout;
use crate::read;
use crate::syscall::{Registers, argument};

/// `struct input_event` on 64-bit kernels; evdev returns whole ones.
const INPUT_EVENT_BYTES: u64 = 24;

/// Whether this read was input; sends the event. Finding the device of a descriptor takes six reads of kernel
/// memory, so reads that cannot be input are told apart first: terminals are standard descriptors or belong to a
/// process with a controlling terminal, and evdev returns multiples of 24 bytes.
#[inline(always)]
pub(crate) fn maybe(regs: Registers, bytes: u64, owner: Owner) -> bool {
    if layout!(inode_rdev) == OFFSET_MISSING || layout!(signal_tty) == OFFSET_MISSING {
        return false;
    }
    let Some(fd) = argument(regs, layout!(regs_arg[0])) else { return false };
    // SAFETY: the helper has no preconditions.
    let task = unsafe { bpf_get_current_task() };
    if fd > 2 && bytes % INPUT_EVENT_BYTES != 0 && !has_terminal(task) {
        return false;
    }
    let Some(device) = character_device(task, fd as u32) else { return false };
    if !is_input(device) {
        return false;
    }
    if wanted(Class::Input, owner, Context::Process) {
        emit(Class::Input, owner, Context::Process, [u64::from(device), bytes]);
    }
    true
}

#[inline(always)]
fn has_terminal(task: u64) -> bool {
    read::pointer(task, layout!(task_signal)).is_some_and(|signal| read::pointer(signal, layout!(signal_tty)).is_some())
}

/// The device number behind a descriptor, when it is a character device.
#[inline(always)]
fn character_device(task: u64, fd: u32) -> Option<u32> {
    let files = read::pointer(task, layout!(task_files))?;
    let table = read::pointer(files, layout!(files_fdt))?;
    if fd >= read::at::<u32>(table, layout!(fdtable_max_fds))? {
        return None;
    }
    let array = read::pointer(table, layout!(fdtable_fd))?;
    let file = read::pointer(array.wrapping_add(u64::from(fd) * 8), 0)?;
    let inode = read::pointer(file, layout!(file_inode))?;
    const S_IFMT: u16 = 0o170_000;
    const S_IFCHR: u16 = 0o020_000;
    if read::at::<u16>(inode, layout!(inode_mode))? & S_IFMT != S_IFCHR {
        return None;
    }
    read::at(inode, layout!(inode_rdev))
}

/// Terminals that a person or a supervisor types into, and evdev. Not `/dev/ptmx` (5:2): what is read there is the
/// output of the program on the other side.
#[inline(always)]
fn is_input(device: u32) -> bool {
    const TTY: u32 = 4;
    const TTY_AUXILIARY: u32 = 5;
    const PTMX_MINOR: u32 = 2;
    const INPUT: u32 = 13;
    const PTY_FIRST: u32 = 136;
    const PTY_LAST: u32 = 143;
    const SERIAL_LOW_DENSITY: u32 = 204;
    const HYPERVISOR_CONSOLE: u32 = 229;
    let (major, minor) = (device >> 20, device & 0xf_ffff);
    major == TTY
        || (major == TTY_AUXILIARY && minor != PTMX_MINOR)
        || major == INPUT
        || (major >= PTY_FIRST && major <= PTY_LAST)
        || major == SERIAL_LOW_DENSITY
        || major == HYPERVISOR_CONSOLE
}
