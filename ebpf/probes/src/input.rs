//! Input: reads that returned data from a terminal or an input device, told by device number; and of input devices what
//! says that the screen turns.
//!
//! Not here: what was typed. Of terminals only the device and the number of bytes are looked at, of input devices each
//! event's type and code for the few that are [`turns`].

use aya_ebpf::helpers::bpf_probe_read_user;
use aya_ebpf::helpers::generated::bpf_get_current_task;
use warmswap_events::{Class, InputDevice};

use crate::cgroup::Owner;
use crate::emit::{Context, emit, wanted};
use crate::maps::layout;
use crate::read;
use crate::syscall::Registers;

/// `struct input_event` on 64-bit kernels; evdev returns whole ones.
const INPUT_EVENT_BYTES: u64 = 24;
/// Its type, code and value, after the time.
const INPUT_EVENT_TYPE: u64 = 16;
/// Events looked at of one read; a device's queue holds as many, and readers ask for fewer.
const EVENTS_READ_MAX: u64 = 64;

/// What was read, if it was input; sends the event. Finding the device of a descriptor takes six reads of kernel
/// memory, so reads that cannot be input are told apart first: terminals are standard descriptors or belong to a
/// process with a controlling terminal, and evdev returns multiples of 24 bytes.
#[inline(always)]
pub(crate) fn source(regs: Registers, bytes: u64, owner: Owner) -> Option<InputDevice> {
    let fd = regs.at(layout!(regs_arg[0]))?;
    // SAFETY: the helper has no preconditions.
    let task = unsafe { bpf_get_current_task() };
    if fd > 2 && bytes % INPUT_EVENT_BYTES != 0 && !has_terminal(task) {
        return None;
    }
    let device = character_device(task, fd as u32)?;
    let source = InputDevice::of(device >> 20, device & 0xf_ffff)?;
    if wanted(Class::Input, owner, Context::Process) {
        emit(Class::Input, owner, Context::Process, [u64::from(device), bytes]);
    }
    Some(source)
}

/// How many of the events in the buffer of a `read` turn the screen; sends the last of them, with their number. Not each as it
/// is found: the verifier goes through everything inside a loop anew for each of its rounds.
#[inline(never)]
pub(crate) fn turns(buffer: u64, bytes: u64, cgroup: u64, slot: u32) -> u64 {
    let (mut turns, mut last) = (0_u64, [0_u32; 2]);
    for at in 0..EVENTS_READ_MAX {
        if (at + 1) * INPUT_EVENT_BYTES > bytes {
            break;
        }
        let event = buffer.wrapping_add(at * INPUT_EVENT_BYTES + INPUT_EVENT_TYPE);
        // SAFETY: the helper checks the address; plain integers.
        let Ok([kind_and_code, value]) = (unsafe { bpf_probe_read_user(event as *const [u32; 2]) }) else { break };
        if is_turn(kind_and_code & 0xffff, kind_and_code >> 16, value) {
            turns += 1;
            last = [kind_and_code, value];
        }
    }
    let [kind_and_code, value] = last;
    let owner = Owner { cgroup, slot };
    // No turn has type and code 0.
    if kind_and_code != 0 && wanted(Class::Orientation, owner, Context::Process) {
        let what = u64::from(((kind_and_code & 0xffff) << 16) | (kind_and_code >> 16));
        emit(Class::Orientation, owner, Context::Process, [(turns << 32) | what, u64::from(value)]);
    }
    turns
}

/// A tablet is folded, its rotation is locked, or a key is pressed (not let go, not repeated) that turns the screen.
#[inline(always)]
fn is_turn(kind: u32, code: u32, value: u32) -> bool {
    const KEY: u32 = 1;
    const SWITCH: u32 = 5;
    const SWITCH_TABLET_MODE: u32 = 0x01;
    const SWITCH_ROTATE_LOCK: u32 = 0x0c;
    const KEY_ROTATE_DISPLAY: u32 = 0x99;
    const KEY_ROTATE_LOCK_TOGGLE: u32 = 0x231;
    (kind == SWITCH && (code == SWITCH_TABLET_MODE || code == SWITCH_ROTATE_LOCK))
        || (kind == KEY && value == 1 && (code == KEY_ROTATE_DISPLAY || code == KEY_ROTATE_LOCK_TOGGLE))
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
