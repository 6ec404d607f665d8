//! Sending records, with accounting: every record a probe wants to send is counted as emitted, and as dropped too when
//! the ring had no room.

use aya_ebpf::helpers::generated::{bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_ktime_get_ns};
use warmswap_events::{Class, ExecRecord, Record};

use crate::cgroup::Owner;
use crate::maps::{ACCOUNT, CONTROL, OWN_TGID, RING_BULK, RING_URGENT, add_atomic, global};
use crate::trouble;

/// The reader of the bulk ring comes on a timer, so waking it would be wasted.
const NO_WAKEUP: u64 = 1;

/// In whose name an event happened.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Context {
    /// The running process did it.
    Process,
    /// It may have interrupted any process.
    Any,
}

/// Whether anybody wants events of this class from this cgroup. The sensor's own process is left out.
#[inline(always)]
pub(crate) fn wanted(class: Class, owner: Owner, context: Context) -> bool {
    if !class.urgent() {
        let Some(control) = CONTROL.get_ptr(0) else { return false };
        // SAFETY: the lookup succeeded; user space changes these words whole.
        let (classes, everywhere) = unsafe {
            (
                core::ptr::read_volatile(&raw const (*control).classes),
                core::ptr::read_volatile(&raw const (*control).everywhere),
            )
        };
        if classes & class.bit() == 0 || (owner.slot == 0 && everywhere == 0) {
            return false;
        }
    }
    context == Context::Any || tgid() != global!(OWN_TGID)
}

#[inline(always)]
fn tgid() -> u32 {
    // SAFETY: the helper has no preconditions.
    (unsafe { bpf_get_current_pid_tgid() } >> 32) as u32
}

#[inline(always)]
pub(crate) fn now_ns() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_ktime_get_ns() }
}

#[inline(always)]
fn account(class: Class, dropped: bool) {
    if let Some(account) = ACCOUNT.get_ptr_mut(class as u32) {
        // SAFETY: the lookup succeeded, the fields lie inside the value.
        let (emitted_count, dropped_count) = unsafe { (&raw mut (*account).emitted, &raw mut (*account).dropped) };
        add_atomic(emitted_count, 1);
        if dropped {
            add_atomic(dropped_count, 1);
            trouble::dropped(class);
        }
    }
}

#[inline(always)]
fn fill(record: *mut Record, class: Class, owner: Owner, context: Context, args: [u64; 2]) {
    // SAFETY: `record` points into ring memory of sufficient size that the caller reserved; the helpers have no
    // preconditions but a writable destination.
    unsafe {
        let pid_tgid = if context == Context::Process { bpf_get_current_pid_tgid() } else { 0 };
        (*record).time_ns = bpf_ktime_get_ns();
        (*record).cgroup = owner.cgroup;
        (*record).class = class as u32;
        (*record).pid = (pid_tgid >> 32) as u32;
        (*record).tid = pid_tgid as u32;
        (*record).slot = owner.slot;
        (*record).args = args;
        let comm = &raw mut (*record).comm;
        if context == Context::Process {
            bpf_get_current_comm(comm.cast(), 16);
        } else {
            comm.cast::<[u64; 2]>().write([0; 2]);
        }
    }
}

/// Sends one record. The caller asked [`wanted`] before.
#[inline(always)]
pub(crate) fn emit(class: Class, owner: Owner, context: Context, args: [u64; 2]) {
    let (ring, flags) = if class.urgent() { (&RING_URGENT, 0) } else { (&RING_BULK, NO_WAKEUP) };
    let entry = ring.reserve::<Record>(0);
    account(class, entry.is_none());
    if let Some(mut entry) = entry {
        fill(entry.as_mut_ptr(), class, owner, context, args);
        entry.submit(flags);
    }
}

/// Sends an exec with the path of the program, a kernel string.
#[inline(always)]
pub(crate) fn emit_exec(owner: Owner, path: Option<u64>) {
    let entry = RING_BULK.reserve::<ExecRecord>(0);
    account(Class::Exec, entry.is_none());
    if let Some(mut entry) = entry {
        let record = entry.as_mut_ptr();
        // SAFETY: reserved ring memory of the size of an ExecRecord.
        let (head, text) = unsafe { (&raw mut (*record).record, &raw mut (*record).path) };
        fill(head, Class::Exec, owner, Context::Process, [0; 2]);
        // SAFETY: as above; the helper checks the source address and ends the text with a zero.
        unsafe {
            text.cast::<u8>().write(0);
            if let Some(path) = path {
                aya_ebpf::helpers::generated::bpf_probe_read_kernel_str(
                    text.cast(),
                    warmswap_events::PATH_LENGTH as u32,
                    path as *const _,
                );
            }
        }
        entry.submit(NO_WAKEUP);
    }
}
