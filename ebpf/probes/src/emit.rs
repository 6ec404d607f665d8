//! Sending records, with accounting: every record a probe wants to send is counted as emitted, and as dropped too when
//! the ring had no room. As the bulk ring fills, one class after the other is no longer sent, the least valuable first.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::BPF_F_CURRENT_CPU;
use aya_ebpf::helpers::generated::{
    bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_get_current_uid_gid, bpf_ktime_get_ns, bpf_perf_event_output,
    bpf_probe_read_kernel_str, bpf_probe_read_user_str,
};
use aya_ebpf::maps::ring_buf::RingBufEntry;
use warmswap_events::{Class, ExecRecord, PATH_LENGTH, Record, UID_UNKNOWN};

use crate::cgroup::Owner;
use crate::maps::{ACCOUNT, BULK_RING_BYTES, CONTROL, OWN_TGID, RING_BULK, RING_URGENT, WAKERS, add_atomic, global};
use crate::trouble;

/// The reader of the bulk ring comes on a timer, so waking it would be wasted.
const NO_WAKEUP: u64 = 1;
const FORCE_WAKEUP: u64 = 2;

/// Asks a ring how many bytes wait to be read.
const BPF_RB_AVAIL_DATA: u64 = 0;

/// In whose name an event happened.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Context {
    /// The running process did it.
    Process,
    /// It may have interrupted any process; the user that it is about.
    User(u32),
}

impl Context {
    pub(crate) const NOBODY: Self = Self::User(UID_UNKNOWN);
}

/// Whether anybody wants events of this class from anywhere.
#[inline(always)]
pub(crate) fn subscribed(class: Class) -> bool {
    // SAFETY: the lookup succeeded; user space changes the word whole.
    CONTROL
        .get_ptr(0)
        .is_some_and(|control| unsafe { core::ptr::read_volatile(&raw const (*control).classes) & class.bit() != 0 })
}

/// Whether anybody wants events of this class, which is not urgent, from this cgroup. The sensor's own process is left out.
#[inline(always)]
pub(crate) fn wanted(class: Class, owner: Owner, context: Context) -> bool {
    // SAFETY: as in `subscribed`.
    let everywhere = || {
        CONTROL
            .get_ptr(0)
            .is_some_and(|control| unsafe { core::ptr::read_volatile(&raw const (*control).everywhere) } != 0)
    };
    subscribed(class)
        && (owner.slot != 0 || everywhere())
        && (context != Context::Process || tgid() != global!(OWN_TGID))
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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Sent,
    /// The ring is full.
    Refused,
    /// The ring is too full for this class.
    Shed,
}

#[inline(always)]
fn account(class: Class, fate: Fate) {
    if let Some(account) = ACCOUNT.get_ptr_mut(class as u32) {
        // SAFETY: the lookup succeeded, the fields lie inside the value.
        let (emitted, dropped, shed) =
            unsafe { (&raw mut (*account).emitted, &raw mut (*account).dropped, &raw mut (*account).shed) };
        add_atomic(emitted, 1);
        if fate != Fate::Sent {
            add_atomic(dropped, 1);
            if fate == Fate::Shed {
                add_atomic(shed, 1);
            }
            trouble::dropped(class);
        }
    }
}

/// Room for a record, and the record accounted for.
#[inline(always)]
fn reserve<T: 'static>(class: Class) -> Option<RingBufEntry<T>> {
    let ring = if class.urgent() { &RING_URGENT } else { &RING_BULK };
    if class.sheds_above_percent() < 100 {
        let above = u64::from(global!(BULK_RING_BYTES)) / 100 * class.sheds_above_percent();
        if ring.query(BPF_RB_AVAIL_DATA) > above {
            account(class, Fate::Shed);
            return None;
        }
    }
    let entry = ring.reserve::<T>(0);
    account(class, if entry.is_some() { Fate::Sent } else { Fate::Refused });
    entry
}

#[inline(always)]
fn fill(record: *mut Record, class: Class, owner: Owner, context: Context, args: [u64; 2]) {
    // SAFETY: `record` points into ring memory of sufficient size that the caller reserved; the helpers have no
    // preconditions but a writable destination.
    unsafe {
        let (pid_tgid, uid) = match context {
            Context::Process => (bpf_get_current_pid_tgid(), bpf_get_current_uid_gid() as u32),
            Context::User(uid) => (0, uid),
        };
        (*record).time_ns = bpf_ktime_get_ns();
        (*record).cgroup = owner.cgroup;
        (*record).class = class as u16;
        (*record).slot = owner.slot as u16;
        (*record).pid = (pid_tgid >> 32) as u32;
        (*record).tid = pid_tgid as u32;
        (*record).uid = uid;
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
    if let Some(mut entry) = reserve::<Record>(class) {
        fill(entry.as_mut_ptr(), class, owner, context, args);
        entry.submit(NO_WAKEUP);
    }
}

/// The same of an urgent class, which nobody has to want, and wakes who waits for it on this CPU; where nobody does, who waits for the ring. `program`: its
/// context.
#[inline(always)]
pub(crate) fn emit_urgent(program: &impl EbpfContext, class: Class, owner: Owner, context: Context, args: [u64; 2]) {
    emit(class, owner, context, args);
    let map = (&raw const WAKERS).cast_mut().cast();
    let mut nothing = 0u64;
    let length = size_of_val(&nothing) as u64;
    // SAFETY: the program's context, a map of the type asked for, and our own stack.
    let woken =
        unsafe { bpf_perf_event_output(program.as_ptr(), map, BPF_F_CURRENT_CPU, (&raw mut nothing).cast(), length) };
    if woken != 0
        && let Some(entry) = RING_URGENT.reserve::<u64>(0)
    {
        entry.discard(FORCE_WAKEUP);
    }
}

/// Sends an exec with the path of the program, a kernel string, and its first argument, a string of the process.
#[inline(always)]
pub(crate) fn emit_exec(owner: Owner, path: Option<u64>, name: Option<u64>) {
    if let Some(mut entry) = reserve::<ExecRecord>(Class::Exec) {
        let exec = entry.as_mut_ptr();
        // SAFETY: reserved ring memory of the size of an ExecRecord.
        let (head, path_text, name_text) =
            unsafe { (&raw mut (*exec).record, &raw mut (*exec).path, &raw mut (*exec).name) };
        fill(head, Class::Exec, owner, Context::Process, [0; 2]);
        // SAFETY: as above; the helpers check the source address and end the text with a zero.
        unsafe {
            path_text.cast::<u8>().write(0);
            name_text.cast::<u8>().write(0);
            if let Some(path) = path {
                bpf_probe_read_kernel_str(path_text.cast(), PATH_LENGTH as u32, path as *const _);
            }
            if let Some(name) = name {
                bpf_probe_read_user_str(name_text.cast(), PATH_LENGTH as u32, name as *const _);
            }
        }
        entry.submit(NO_WAKEUP);
    }
}
