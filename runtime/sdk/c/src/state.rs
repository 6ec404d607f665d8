//! The state: collections of bytes in the store.

use std::ffi::{c_int, c_void};

use warmswap_sdk::transfer::message::LogPosition;

use crate::error::Error;
use crate::handle::{Inner, bytes, place, with, ws_service};

/// `ws_visit`: non-zero ends the walk.
pub(crate) type Visit = unsafe extern "C" fn(*mut c_void, *const c_void, usize, *const c_void, usize) -> c_int;
/// `ws_visit_counter`: non-zero ends the walk.
pub(crate) type VisitCounter = unsafe extern "C" fn(*mut c_void, *const c_void, usize, i64) -> c_int;

/// `ws_place`.
#[allow(non_camel_case_types, reason = "its name in C")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct ws_place {
    segment: u64,
    offset: u64,
}

/// `ws_stats`. Fields are only ever added at its end.
#[allow(non_camel_case_types, reason = "its name in C")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct ws_stats {
    records: u64,
    living_bytes: u64,
    segment_bytes: u64,
    segments: u64,
    copied_bytes: u64,
    segments_retired: u64,
}

/// Shows the caller bytes where they lie; 1 when there are any.
///
/// # Safety
/// Both places can be written to, or are NULL.
unsafe fn show(found: Option<&[u8]>, value: *mut *const c_void, len: *mut usize) -> Result<c_int, Error> {
    // SAFETY: the caller's promise.
    let (value, len) = unsafe { (place("the place for the value", value)?, place("the place for its length", len)?) };
    value.write(found.map_or(std::ptr::null(), |found| found.as_ptr().cast()));
    len.write(found.map_or(0, <[u8]>::len));
    Ok(c_int::from(found.is_some()))
}

impl Inner {
    /// The bytes of the caller as a value; give it back to `self.value` after use.
    fn value(&mut self, from: &[u8]) -> Vec<u8> {
        let mut value = std::mem::take(&mut self.value);
        value.clear();
        value.extend_from_slice(from);
        value
    }
}

/// Publishes what was changed.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_commit(service: *mut ws_service) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { with("ws_commit", service, |inner| Ok(inner.joined()?.commit().map(|_| 0)?)) }
}

/// A piece of compaction.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_maintain(service: *mut ws_service) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { with("ws_maintain", service, |inner| Ok(inner.store()?.maintain().map(|()| 0)?)) }
}

/// What the state holds.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_statistics(service: *const ws_service, stats: *mut ws_stats, size: usize) -> c_int {
    // SAFETY: the caller's promise: there is room for `size` bytes, and no more are written, whatever this library knows.
    unsafe {
        with("ws_statistics", service, |inner| {
            if stats.is_null() {
                return Err(Error::Null { what: "the place for the statistics" });
            }
            let statistics = inner.store()?.statistics();
            let known = ws_stats {
                records: statistics.records as u64,
                living_bytes: statistics.living_bytes,
                segment_bytes: statistics.segment_bytes,
                segments: statistics.segments as u64,
                copied_bytes: statistics.copied_bytes,
                segments_retired: statistics.segments_retired,
            };
            let stats = stats.cast::<u8>();
            stats.write_bytes(0, size);
            stats.copy_from_nonoverlapping((&raw const known).cast(), size.min(size_of::<ws_stats>()));
            Ok(0)
        })
    }
}

/// The value of a key, where it lies.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_map_get(
    service: *const ws_service,
    map: c_int,
    key: *const c_void,
    key_len: usize,
    value: *mut *const c_void,
    value_len: *mut usize,
) -> c_int {
    // SAFETY: the caller's promise, for all pointers.
    unsafe {
        with("ws_map_get", service, |inner| {
            let (map, key) = (inner.map(map)?, bytes("the key", key.cast(), key_len)?);
            show(map.get(inner.store()?, key).map(|value| value.as_slice()), value, value_len)
        })
    }
}

/// Sets the value of a key.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_map_put(
    service: *mut ws_service,
    map: c_int,
    key: *const c_void,
    key_len: usize,
    value: *const c_void,
    value_len: usize,
) -> c_int {
    // SAFETY: the caller's promise, for all pointers.
    unsafe {
        with("ws_map_put", service, |inner| {
            let (map, key) = (inner.map(map)?, bytes("the key", key.cast(), key_len)?);
            let value = inner.value(bytes("the value", value.cast(), value_len)?);
            let before = map.insert(inner.store()?, key, &value);
            inner.value = value;
            Ok(c_int::from(before?))
        })
    }
}

/// Removes a key.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_map_remove(
    service: *mut ws_service,
    map: c_int,
    key: *const c_void,
    key_len: usize,
) -> c_int {
    // SAFETY: the caller's promise, for both pointers.
    unsafe {
        with("ws_map_remove", service, |inner| {
            let (map, key) = (inner.map(map)?, bytes("the key", key.cast(), key_len)?);
            Ok(c_int::from(map.remove(inner.store()?, key)?))
        })
    }
}

/// How many keys a map has.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_map_count(service: *const ws_service, map: c_int) -> i64 {
    // SAFETY: the caller's promise.
    unsafe { with("ws_map_count", service, |inner| Ok(inner.map(map)?.len(inner.store()?) as i64)) }
}

/// Shows every key and value.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_map_each(
    service: *const ws_service,
    map: c_int,
    visit: Option<Visit>,
    context: *mut c_void,
) -> c_int {
    // SAFETY: the caller's promise, for the visitor too.
    unsafe {
        with("ws_map_each", service, |inner| {
            let (map, visit) = (inner.map(map)?, visit.ok_or(Error::Null { what: "the visitor" })?);
            let ended = map.iter(inner.store()?).any(|(key, value)| {
                visit(context, key.as_ptr().cast(), key.len(), value.as_ptr().cast(), value.len()) != 0
            });
            Ok(c_int::from(ended))
        })
    }
}

/// Shows the keys and values of a stretch of the log.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_map_walk(
    service: *const ws_service,
    map: c_int,
    from: *mut ws_place,
    budget: usize,
    visit: Option<Visit>,
    context: *mut c_void,
) -> c_int {
    // SAFETY: the caller's promise, for the place and the visitor too.
    unsafe {
        with("ws_map_walk", service, |inner| {
            let (map, visit) = (inner.map(map)?, visit.ok_or(Error::Null { what: "the visitor" })?);
            let from = from.as_mut().ok_or(Error::Null { what: "the place to go on from" })?;
            let position = LogPosition { segment: from.segment, offset: from.offset };
            let mut ended = false;
            let position = map.walk(inner.store()?, position, budget, |key, value| {
                ended |= visit(context, key.as_ptr().cast(), key.len(), value.as_ptr().cast(), value.len()) != 0;
            });
            *from = ws_place { segment: position.segment, offset: position.offset };
            Ok(c_int::from(ended))
        })
    }
}

/// The value of a counter.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_counter_get(
    service: *const ws_service,
    counters: c_int,
    name: *const c_void,
    name_len: usize,
    value: *mut i64,
) -> c_int {
    // SAFETY: the caller's promise, for all pointers.
    unsafe {
        with("ws_counter_get", service, |inner| {
            let (counters, name) = (inner.counters(counters)?, bytes("the name", name.cast(), name_len)?);
            place("the place for the value", value)?.write(counters.get(inner.store()?, name));
            Ok(0)
        })
    }
}

/// Adds to a counter. `value` may be NULL.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_counter_add(
    service: *mut ws_service,
    counters: c_int,
    name: *const c_void,
    name_len: usize,
    by: i64,
    value: *mut i64,
) -> c_int {
    // SAFETY: the caller's promise, for all pointers.
    unsafe {
        with("ws_counter_add", service, |inner| {
            let (counters, name) = (inner.counters(counters)?, bytes("the name", name.cast(), name_len)?);
            let new = counters.add(inner.store()?, name, by)?;
            if let Some(value) = value.as_mut() {
                *value = new;
            }
            Ok(0)
        })
    }
}

/// Sets a counter.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_counter_set(
    service: *mut ws_service,
    counters: c_int,
    name: *const c_void,
    name_len: usize,
    value: i64,
) -> c_int {
    // SAFETY: the caller's promise, for both pointers.
    unsafe {
        with("ws_counter_set", service, |inner| {
            let (counters, name) = (inner.counters(counters)?, bytes("the name", name.cast(), name_len)?);
            counters.set(inner.store()?, name, value)?;
            Ok(0)
        })
    }
}

/// Forgets a counter.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_counter_remove(
    service: *mut ws_service,
    counters: c_int,
    name: *const c_void,
    name_len: usize,
) -> c_int {
    // SAFETY: the caller's promise, for both pointers.
    unsafe {
        with("ws_counter_remove", service, |inner| {
            let (counters, name) = (inner.counters(counters)?, bytes("the name", name.cast(), name_len)?);
            Ok(c_int::from(counters.remove(inner.store()?, name)?))
        })
    }
}

/// How many counters there are.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_counter_count(service: *const ws_service, counters: c_int) -> i64 {
    // SAFETY: the caller's promise.
    unsafe { with("ws_counter_count", service, |inner| Ok(inner.counters(counters)?.len(inner.store()?) as i64)) }
}

/// Shows every counter.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_counter_each(
    service: *const ws_service,
    counters: c_int,
    visit: Option<VisitCounter>,
    context: *mut c_void,
) -> c_int {
    // SAFETY: the caller's promise, for the visitor too.
    unsafe {
        with("ws_counter_each", service, |inner| {
            let (counters, visit) = (inner.counters(counters)?, visit.ok_or(Error::Null { what: "the visitor" })?);
            let ended = counters
                .iter(inner.store()?)
                .any(|(name, value)| visit(context, name.as_ptr().cast(), name.len(), value) != 0);
            Ok(c_int::from(ended))
        })
    }
}

/// Appends to a log. `number` may be NULL.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_log_append(
    service: *mut ws_service,
    log: c_int,
    value: *const c_void,
    value_len: usize,
    number: *mut u64,
) -> c_int {
    // SAFETY: the caller's promise, for all pointers.
    unsafe {
        with("ws_log_append", service, |inner| {
            let log = inner.log(log)?;
            let value = inner.value(bytes("the value", value.cast(), value_len)?);
            let appended = log.append(inner.store()?, &value);
            inner.value = value;
            let appended = appended?;
            if let Some(number) = number.as_mut() {
                *number = appended;
            }
            Ok(0)
        })
    }
}

/// An entry of a log, where it lies.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_log_get(
    service: *const ws_service,
    log: c_int,
    number: u64,
    value: *mut *const c_void,
    value_len: *mut usize,
) -> c_int {
    // SAFETY: the caller's promise, for all pointers.
    unsafe {
        with("ws_log_get", service, |inner| {
            let log = inner.log(log)?;
            show(log.get(inner.store()?, number).map(|value| value.as_slice()), value, value_len)
        })
    }
}

/// Which entries a log has.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_log_range(
    service: *const ws_service,
    log: c_int,
    first: *mut u64,
    next: *mut u64,
) -> c_int {
    // SAFETY: the caller's promise, for all pointers.
    unsafe {
        with("ws_log_range", service, |inner| {
            let log = inner.log(log)?;
            let (first, next) = (place("the place for the first", first)?, place("the place for the next", next)?);
            first.write(log.first(inner.store()?));
            next.write(log.next(inner.store()?));
            Ok(0)
        })
    }
}

/// Drops the beginning of a log.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_log_trim(service: *mut ws_service, log: c_int, before: u64) -> c_int {
    // SAFETY: the caller's promise.
    unsafe {
        with("ws_log_trim", service, |inner| {
            let log = inner.log(log)?;
            Ok(log.trim_before(inner.store()?, before).map(|()| 0)?)
        })
    }
}

/// The single value, where it lies.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_record_get(
    service: *const ws_service,
    record: c_int,
    value: *mut *const c_void,
    value_len: *mut usize,
) -> c_int {
    // SAFETY: the caller's promise, for all pointers.
    unsafe {
        with("ws_record_get", service, |inner| {
            let record = inner.record(record)?;
            show(record.get(inner.store()?).map(|value| value.as_slice()), value, value_len)
        })
    }
}

/// Sets the single value.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_record_set(
    service: *mut ws_service,
    record: c_int,
    value: *const c_void,
    value_len: usize,
) -> c_int {
    // SAFETY: the caller's promise, for both pointers.
    unsafe {
        with("ws_record_set", service, |inner| {
            let record = inner.record(record)?;
            let value = inner.value(bytes("the value", value.cast(), value_len)?);
            let before = record.set(inner.store()?, &value);
            inner.value = value;
            Ok(c_int::from(before?))
        })
    }
}

/// Forgets the single value.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_record_clear(service: *mut ws_service, record: c_int) -> c_int {
    // SAFETY: the caller's promise.
    unsafe {
        with("ws_record_clear", service, |inner| {
            let record = inner.record(record)?;
            Ok(c_int::from(record.clear(inner.store()?)?))
        })
    }
}
