//! From a context to the slot of the deepest watched cgroup around it.
//!
//! A container may make cgroups of its own below the one we gave it, so the cgroup itself is tried first, then its
//! ancestors. The result, "none" included, is cached per CPU in one word (see `CacheWord`), so that the common case
//! is one helper call and one comparison.

use aya_ebpf::helpers::generated::{bpf_get_current_cgroup_id, bpf_get_current_task};
use warmswap_events::{CACHE_LANES, CacheWord, LANE_BY_ID, LANE_OTHER, LANES_BY_ID};

use crate::maps::{CACHE, CONTROL, WATCHED, layout};
use crate::read::{self, typed, typed_pointer};
use crate::trouble;

/// How far up ancestors are looked for.
pub(crate) const LEVELS: i32 = 8;

#[derive(Clone, Copy)]
pub(crate) struct Owner {
    pub(crate) cgroup: u64,
    /// 0 when not watched.
    pub(crate) slot: u32,
}

#[inline(always)]
pub(crate) fn watched(cgroup: u64) -> u32 {
    // SAFETY: the value is a u32 that user space replaces whole.
    unsafe { WATCHED.get(&cgroup) }.copied().unwrap_or(0)
}

/// Which change of `WATCHED` is the last. To be read before a search: one that overlaps a change is cached under the old epoch
/// and so not believed afterwards.
#[inline(always)]
pub(crate) fn epoch() -> u64 {
    // SAFETY: the lookup succeeded; user space changes the word whole.
    CONTROL.get_ptr(0).map_or(0, |control| unsafe { core::ptr::read_volatile(&raw const (*control).epoch) })
}

#[inline(always)]
fn cached(cpu: u32, lane: u32, cgroup: u64, find: impl FnOnce() -> u32) -> u32 {
    let key = CacheWord::key(cgroup, epoch());
    let Some(word) = CACHE.get_ptr_mut(cpu.wrapping_mul(CACHE_LANES).wrapping_add(lane)) else { return 0 };
    // SAFETY: the lookup succeeded.
    let found = CacheWord(unsafe { core::ptr::read_volatile(word) });
    if found.matches(key) {
        return found.slot();
    }
    let slot = find();
    if cgroup < CacheWord::CGROUP_LIMIT {
        // SAFETY: as above; one store of one word.
        unsafe { core::ptr::write_volatile(word, key | u64::from(slot)) };
    }
    slot
}

/// The deepest watched cgroup from `cgroup` (a `struct cgroup *`) upward.
#[inline(never)]
fn search(cgroup: u64) -> u32 {
    let mut next = cgroup;
    for _ in 0..LEVELS {
        let Some(id) = id_of(next) else { return 0 };
        let slot = watched(id);
        if slot != 0 {
            return slot;
        }
        let Some(parent) = parent(next) else { return 0 };
        next = parent;
    }
    trouble::search_ended(cgroup, next);
    0
}

/// From a `struct cgroup *` to that of its parent; `None` at the root.
#[inline(always)]
pub(crate) fn parent(cgroup: u64) -> Option<u64> {
    read::pointer(read::pointer(cgroup, layout!(cgroup_parent_css))?, layout!(css_cgroup))
}

/// The id of a `struct cgroup *`.
#[inline(always)]
pub(crate) fn id_of(cgroup: u64) -> Option<u64> {
    read::at(read::pointer(cgroup, layout!(cgroup_kn))?, layout!(kernfs_id))
}

#[inline(always)]
fn cgroup_of_task(task: u64) -> Option<u64> {
    read::pointer(read::pointer(task, layout!(task_cgroups))?, layout!(css_set_dfl_cgrp))
}

/// Of the running task.
#[inline(always)]
pub(crate) fn of_current(cpu: u32, lane: u32) -> Owner {
    // SAFETY: the helper has no preconditions.
    let cgroup = unsafe { bpf_get_current_cgroup_id() };
    let slot = cached(cpu, lane, cgroup, || {
        let slot = watched(cgroup);
        if slot != 0 {
            return slot;
        }
        // SAFETY: the helper has no preconditions.
        cgroup_of_task(unsafe { bpf_get_current_task() }).map_or(0, search)
    });
    Owner { cgroup, slot }
}

/// Of any task.
#[inline(always)]
pub(crate) fn of_task(cpu: u32, lane: u32, task: u64) -> Owner {
    match cgroup_of_task(task) {
        Some(cgroup) => of_pointer(cpu, lane, cgroup),
        None => Owner { cgroup: 0, slot: 0 },
    }
}

/// By id: each lane is for some cgroups, so that going back and forth between two finds both.
#[inline(always)]
fn by_id(cpu: u32, id: u64, cgroup: u64) -> u32 {
    cached(cpu, LANE_BY_ID + id as u32 % LANES_BY_ID, id, || search(cgroup))
}

/// The slot of one of many tasks, whose type the verifier knows.
#[inline(always)]
pub(crate) fn of_any_task(cpu: u32, task: u64) -> u32 {
    let find = || typed_pointer(typed_pointer(task, layout!(task_cgroups))?, layout!(css_set_dfl_cgrp));
    find().map_or(0, |cgroup| of_typed(cpu, cgroup))
}

/// The slot of one of many sockets, whose type the verifier knows; from 5.16 on.
#[inline(always)]
pub(crate) fn of_typed_sock(cpu: u32, sock: u64) -> u32 {
    typed_pointer(sock, layout!(sock_cgroup)).map_or(0, |cgroup| of_typed(cpu, cgroup))
}

/// Of a `struct cgroup *` whose type the verifier knows.
#[inline(always)]
fn of_typed(cpu: u32, cgroup: u64) -> u32 {
    typed_pointer(cgroup, layout!(cgroup_kn)).map_or(0, |node| by_id(cpu, typed(node, layout!(kernfs_id)), cgroup))
}

/// The slot of one of many sockets.
#[inline(always)]
pub(crate) fn of_any_sock(cpu: u32, sock: u64) -> u32 {
    let Some(cgroup) = cgroup_of_sock(sock) else { return 0 };
    let Some(id) = id_of(cgroup) else { return 0 };
    by_id(cpu, id, cgroup)
}

/// Of a `struct cgroup *`.
#[inline(always)]
pub(crate) fn of_pointer(cpu: u32, lane: u32, cgroup: u64) -> Owner {
    let Some(id) = id_of(cgroup) else { return Owner { cgroup: 0, slot: 0 } };
    Owner { cgroup: id, slot: cached(cpu, lane, id, || search(cgroup)) }
}

/// Of a full `struct sock *`, by the cgroup that it was created in.
#[inline(always)]
pub(crate) fn of_sock(cpu: u32, sock: u64) -> Owner {
    match cgroup_of_sock(sock) {
        Some(cgroup) => of_pointer(cpu, LANE_OTHER, cgroup),
        None => Owner { cgroup: 0, slot: 0 },
    }
}

#[inline(always)]
fn cgroup_of_sock(sock: u64) -> Option<u64> {
    // Before 5.16 the lowest bit says that the word holds a v1 class, not a cgroup, and the next one is a flag.
    match read::at::<u64>(sock, layout!(sock_cgroup)) {
        Some(word) if word & 1 == 0 && word & !3 != 0 => Some(word & !3),
        Some(word) if word & 1 != 0 => {
            trouble::classified_socket(word >> 32);
            None
        }
        _ => None,
    }
}
