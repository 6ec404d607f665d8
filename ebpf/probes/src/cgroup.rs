//! From a context to the slot of the deepest watched cgroup around it.
//!
//! A container may make cgroups of its own below the one we gave it, so the cgroup itself is tried first, then its
//! ancestors. The result, "none" included, is cached per CPU in one word (see `CacheWord`), so that the common case
//! is one helper call and one comparison.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::{
    bpf_get_current_cgroup_id, bpf_get_current_task, bpf_skb_ancestor_cgroup_id, bpf_skb_cgroup_id,
};
use warmswap_events::{CACHE_LANES, CacheWord, LANE_OTHER, LANE_SWITCH, LANES_SWITCH};

use crate::maps::{CACHE, CONTROL, WATCHED, layout};
use crate::{read, trouble};

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

/// The slot of a task at a switch. Each lane is for some cgroups, so that a switch back and forth finds both.
#[inline(always)]
fn at_switch(cpu: u32, id: u64, cgroup: u64) -> u32 {
    cached(cpu, LANE_SWITCH + id as u32 % LANES_SWITCH, id, || search(cgroup))
}

/// The slot of a task that leaves or gets a CPU.
#[inline(always)]
pub(crate) fn of_switched_task(cpu: u32, task: u64) -> u32 {
    let Some(cgroup) = cgroup_of_task(task) else { return 0 };
    let Some(id) = id_of(cgroup) else { return 0 };
    at_switch(cpu, id, cgroup)
}

/// The same of a task whose type the verifier knows.
#[inline(always)]
pub(crate) fn of_typed_task(cpu: u32, task: u64) -> u32 {
    /// A word at a typed pointer; the checks for null are for the verifier, which knows which may be.
    #[inline(always)]
    fn word(base: u64, offset: u32) -> Option<u64> {
        // SAFETY: the verifier has checked that this lies inside the struct.
        match unsafe { core::ptr::read_volatile(base.wrapping_add(u64::from(offset)) as *const u64) } {
            0 => None,
            value => Some(value),
        }
    }
    let find = || {
        let cgroup = word(word(task, layout!(task_cgroups))?, layout!(css_set_dfl_cgrp))?;
        let id = word(word(cgroup, layout!(cgroup_kn))?, layout!(kernfs_id))?;
        Some((id, cgroup))
    };
    match find() {
        Some((id, cgroup)) => at_switch(cpu, id, cgroup),
        None => 0,
    }
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
    // Before 5.16 the lowest bit says that the word holds a v1 class, not a cgroup, and the next one is a flag.
    match read::at::<u64>(sock, layout!(sock_cgroup)) {
        Some(word) if word & 1 == 0 && word & !3 != 0 => return of_pointer(cpu, LANE_OTHER, word & !3),
        Some(word) if word & 1 != 0 => trouble::classified_socket(word >> 32),
        _ => {}
    }
    Owner { cgroup: 0, slot: 0 }
}

/// Of a packet, by its socket.
#[inline(always)]
pub(crate) fn of_skb(cpu: u32, lane: u32, skb: *mut __sk_buff) -> u32 {
    // SAFETY: `skb` is the context of a cgroup_skb program.
    let cgroup = unsafe { bpf_skb_cgroup_id(skb) };
    if cgroup == 0 {
        return 0;
    }
    cached(cpu, lane, cgroup, || {
        let mut slot = watched(cgroup);
        if slot == 0 {
            for level in 1..=LEVELS {
                // SAFETY: as above.
                let ancestor = unsafe { bpf_skb_ancestor_cgroup_id(skb, level) };
                if ancestor == 0 {
                    return slot;
                }
                let found = watched(ancestor);
                if found != 0 {
                    slot = found; // the deepest wins
                }
            }
            trouble::packet_search_ended(skb);
        }
        slot
    })
}
