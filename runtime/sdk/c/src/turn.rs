//! What a service calls in every turn of its loop: the conversation with the supervisor, its role, its connections.

use std::ffi::{c_int, c_void};
use std::os::fd::{AsRawFd, BorrowedFd};

use warmswap_sdk::Event;

use crate::error::Error;
use crate::event::ws_event;
use crate::handle::{Inner, bytes, place, with, ws_service};

/// In place of a descriptor or a time that there is not. No error has this code.
const NONE: c_int = -1;

/// What to watch for reading.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_control_fd(service: *const ws_service) -> c_int {
    // SAFETY: the caller's promise.
    unsafe {
        with("ws_control_fd", service, |inner| {
            Ok(inner.joined()?.control_fd().map_or(NONE, |control| control.as_raw_fd()))
        })
    }
}

/// How long the loop may sleep.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_wake_within_ms(service: *const ws_service) -> c_int {
    // SAFETY: the caller's promise.
    unsafe {
        with("ws_wake_within_ms", service, |inner| {
            // Rounded up: rounding down would make the loop spin for the last part of a millisecond.
            let up = |time: std::time::Duration| time.as_nanos().div_ceil(1_000_000);
            let within = inner.joined()?.wake_within().map(up);
            Ok(within.map_or(NONE, |within| c_int::try_from(within).unwrap_or(c_int::MAX)))
        })
    }
}

/// The next thing to do.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_poll(service: *mut ws_service, event: *mut *const ws_event) -> c_int {
    // SAFETY: the caller's promise, for both pointers.
    unsafe {
        with("ws_poll", service, |inner| {
            let place = place("the place for the event", event)?;
            place.write(std::ptr::null());
            let Some(event) = inner.joined()?.poll()? else { return Ok(0) };
            place.write(show(inner, event)?);
            Ok(1)
        })
    }
}

fn show(inner: &mut Inner, event: Event) -> Result<*const ws_event, Error> {
    match event {
        Event::Quiesce { .. } => inner.carry = Some(Vec::new()),
        // The handover was called off before this process yielded.
        Event::BecomeOwner { .. } => inner.carry = None,
        _ => {}
    }
    let Inner { stage: crate::handle::Stage::Joined(service), event: shown, .. } = inner else {
        return Err(Error::NotJoined { what: "the service has not joined" });
    };
    Ok(shown.show(event, service.lost_control_fd()))
}

/// This process is initialised.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_ready(service: *mut ws_service) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { with("ws_ready", service, |inner| Ok(inner.joined()?.ready().map(|()| 0)?)) }
}

/// This process serves.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_serving(service: *mut ws_service) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { with("ws_serving", service, |inner| Ok(inner.joined()?.serving().map(|()| 0)?)) }
}

/// Something for the successor.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_carry(
    service: *mut ws_service,
    cookie: u64,
    carry: *const c_void,
    len: usize,
) -> c_int {
    // SAFETY: the caller's promise, for both pointers.
    unsafe {
        with("ws_carry", service, |inner| {
            let carry = bytes("the carry", carry.cast(), len)?;
            inner.joined()?;
            inner.carry.as_mut().ok_or(Error::NothingToCarry)?.push((cookie, carry.to_vec()));
            Ok(0)
        })
    }
}

/// This process has stopped serving.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_yielded(service: *mut ws_service) -> c_int {
    // SAFETY: the caller's promise.
    unsafe {
        with("ws_yielded", service, |inner| {
            inner.joined()?;
            let carry = inner.carry.take().ok_or(Error::NothingToCarry)?;
            inner.joined()?.yielded(carry)?;
            Ok(0)
        })
    }
}

/// This process is about to exit.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_drained(service: *mut ws_service) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { with("ws_drained", service, |inner| Ok(inner.joined()?.drained().map(|()| 0)?)) }
}

/// Whether this process owns.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_is_owner(service: *const ws_service) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { with("ws_is_owner", service, |inner| Ok(c_int::from(inner.joined()?.is_owner()))) }
}

/// Whether anything may leave that a client can see.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_may_write(service: *const ws_service) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { with("ws_may_write", service, |inner| Ok(c_int::from(inner.joined()?.may_write()))) }
}

/// This process's generation.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_generation(service: *const ws_service) -> i64 {
    // SAFETY: the caller's promise.
    unsafe { with("ws_generation", service, |inner| Ok(inner.joined()?.generation().into())) }
}

/// A connection was accepted.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_connection_opened(
    service: *mut ws_service,
    fd: c_int,
    listener: c_int,
    cookie: *mut u64,
) -> c_int {
    // SAFETY: the caller's promise, for both pointers.
    unsafe {
        with("ws_connection_opened", service, |inner| {
            let place = place("the place for the cookie", cookie)?;
            let service = inner.joined()?;
            let at = usize::try_from(listener).ok().filter(|at| *at < service.listeners().len());
            let at = at.ok_or(Error::NoListener { at: listener })?;
            if fd < 0 {
                return Err(Error::Descriptor { fd });
            }
            // The number is not -1 (checked), and the kernel refuses one that is not open.
            place.write(service.connection_opened(BorrowedFd::borrow_raw(fd), at)?);
            Ok(0)
        })
    }
}

/// The service has closed a connection.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_connection_closed(service: *mut ws_service, cookie: u64) -> c_int {
    // SAFETY: the caller's promise.
    unsafe {
        with("ws_connection_closed", service, |inner| {
            inner.joined()?.connection_closed(cookie);
            Ok(0)
        })
    }
}

/// How many connections this process holds.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_connections(service: *const ws_service) -> i64 {
    // SAFETY: the caller's promise.
    unsafe { with("ws_connections", service, |inner| Ok(inner.joined()?.connections() as i64)) }
}
