//! What the probes say when something is abnormal: all messages, and what keeps them few.
//!
//! Off unless the sensor raised aya-log's level before loading: the verifier then takes every message out of the
//! programs, with the branch to it. On, a message comes the first time and then at every doubling, about each subject
//! by itself; never once per event. Each is a function of its own that is not inlined: what it builds its record from
//! would not fit the stack beside the caller's. None is `#[cold]`: that would move it to a section of its own, and aya
//! tells functions by their offset in a section, whichever it is.
//!
//! Not here: numbers. What is lost is counted where it is lost, whether anything is said or not.

use aya_ebpf::maps::HashMap;
use aya_log_ebpf::macro_support::{Level, level_enabled};
use aya_log_ebpf::warn;
use warmswap_events::Class;

use crate::cgroup::{LEVELS, id_of, parent};
use crate::maps::{SAID, WATCHED, WATCHED_BLOCK};

/// How far a watched cgroup is looked for, only to say that it is too far away to be found.
const LEVELS_TOLD: i32 = 32;

/// How often this has happened, when it is time to say so (again).
#[inline(always)]
fn due(message: u64, about: u64) -> Option<u64> {
    let key = [message, about];
    let times = if let Some(times) = SAID.get_ptr_mut(&key) {
        // SAFETY: the lookup succeeded. Not atomic: what two CPUs see at once may be counted once.
        unsafe {
            *times = (*times).wrapping_add(1);
            *times
        }
    } else {
        // Fails only when memory is short; then it is said once more.
        let _ = SAID.insert(&key, &1, 0);
        1
    };
    times.is_power_of_two().then_some(times)
}

/// Message numbers are keys of `SAID`; 0 is [`dropped`].
macro_rules! messages {
    ($($(#[$doc:meta])* $number:literal $name:ident($about:ident): $text:literal;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub(crate) fn $name($about: u64) {
            #[inline(never)]
            fn say(about: u64) {
                if let Some(times) = due($number, about) {
                    warn!(&(), target: "warmswap_probes", $text, about, times);
                }
            }
            if level_enabled(Level::Warn) {
                say($about);
            }
        }
    )*};
}

messages! {
    1 uncounted(cgroup): "cgroup {} is too far below a watched one: what it does is not counted ({} times so far)";
    2 uncounted_task(task):
        "too many tasks are watched: what process or thread {} does is counted when it has ended ({} times so far)";
    3 misplaced_block(cgroup):
        "cgroup {} is too far below a watched one: its block requests count for who issues them ({} times so far)";
    /// Before 5.16, where a socket has either.
    4 classified_socket(class):
        "a socket has the v1 network class {} instead of a cgroup: its TCP events are nobody's ({} times so far)";
    5 unmeasured_connection(slot):
        "too many connections are watched: what one of slot {} carries is not counted ({} times so far)";
    6 unordered_block(slot):
        "no entry for a disk of slot {}: a sequential request may count as random ({} times so far)";
    7 unread_mark(cgroup): "the arguments of a handover mark from cgroup {} cannot be read ({} times so far)";
    8 unread_fork(parent): "the child of process {} cannot be read: it is not counted ({} times so far)";
    9 unread_block(slot): "a block request of slot {} cannot be read: it is not counted ({} times so far)";
    10 unmeasured_request(slot): "no place for a request to slot {}: its latency is not measured ({} times so far)";
}

/// A record found its ring full.
#[inline(always)]
pub(crate) fn dropped(class: Class) {
    #[inline(never)]
    fn say<const CLASS: usize>() {
        if let Some(times) = due(0, CLASS as u64) {
            let name = const { Class::ALL[CLASS].name() };
            warn!(&(), target: "warmswap_probes", "no room in its ring: an event of class {} is lost ({} so far)", name, times);
        }
    }
    /// One function per class, because a name must have a length that the verifier knows.
    macro_rules! say {
        ($($class:ident),*) => { match class { $(Class::$class => say::<{ Class::$class as usize }>()),* } };
    }
    if level_enabled(Level::Warn) {
        say!(Exec, Fork, Exit, Tcp, TcpReset, Input, Oom, Mark, Orientation);
    }
}

/// Whether a watched cgroup lies further up than is searched.
#[inline(always)]
fn watched_above(map: &HashMap<u64, u32>, mut cgroup: u64) -> bool {
    for _ in LEVELS..LEVELS_TOLD {
        let Some(id) = id_of(cgroup) else { return false };
        // SAFETY: a u32 that user space replaces whole.
        if unsafe { map.get(&id) }.is_some() {
            return true;
        }
        let Some(parent) = parent(cgroup) else { return false };
        cgroup = parent;
    }
    false
}

/// The search for a watched cgroup around `cgroup` ended below `rest`.
#[inline(always)]
pub(crate) fn search_ended(cgroup: u64, rest: u64) {
    #[inline(never)]
    fn look(cgroup: u64, rest: u64) {
        if watched_above(&WATCHED, rest)
            && let Some(id) = id_of(cgroup)
        {
            uncounted(id);
        }
    }
    if level_enabled(Level::Warn) {
        look(cgroup, rest);
    }
}

/// The same for the cgroup that a block request is charged to.
#[inline(always)]
pub(crate) fn block_search_ended(cgroup: u64, rest: u64) {
    #[inline(never)]
    fn look(cgroup: u64, rest: u64) {
        if watched_above(&WATCHED_BLOCK, rest)
            && let Some(id) = id_of(cgroup)
        {
            misplaced_block(id);
        }
    }
    if level_enabled(Level::Warn) {
        look(cgroup, rest);
    }
}
