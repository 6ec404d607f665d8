//! From `ws_new` over declarations and `ws_join` to `ws_close`, and the listeners.

use std::ffi::{CString, c_char, c_int};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use warmswap_sdk::transfer::log::LogConfig;
use warmswap_sdk::transfer::store::{DeclareError, Store};
use warmswap_sdk::{Service, is_supervised};

use crate::error::Error;
use crate::guard::guard;
use crate::handle::{Collection, Inner, Stage, text, with, ws_service};

/// The version of the library.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn ws_version() -> *const c_char {
    const { concat!(env!("CARGO_PKG_VERSION"), "\0") }.as_ptr().cast()
}

/// Whether a supervisor started this process.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn ws_is_supervised() -> c_int {
    guard("ws_is_supervised", || Ok(c_int::from(is_supervised())))
}

/// A service that has not joined yet.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn ws_new(schema: u32) -> *mut ws_service {
    guard("ws_new", || Ok(Box::into_raw(Box::new(ws_service::new(Store::new(LogConfig::new(schema))?)))))
}

/// Ends the service and sets the pointer to NULL.
///
/// # Safety
/// `service` is NULL, or points to NULL or to a service from [`ws_new`] that is not closed.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_close(service: *mut *mut ws_service) -> c_int {
    guard("ws_close", || {
        // SAFETY: the caller's promise.
        let place = unsafe { service.as_mut() }.ok_or(Error::Null { what: "the pointer to the service" })?;
        // SAFETY: the caller's promise; shared references are all there is until it is retired.
        let Some(service) = (unsafe { place.as_ref() }) else { return Ok(0) };
        if !service.retire() {
            return Err(Error::Busy);
        }
        let service = std::mem::replace(place, std::ptr::null_mut());
        // SAFETY: from `Box::into_raw` in `ws_new`; no call uses it (retired), and none will (the caller's promise).
        drop(unsafe { Box::from_raw(service) });
        Ok(0)
    })
}

type Declare = fn(&mut Store, &str) -> Result<Collection, DeclareError>;

unsafe fn declare(what: &'static str, service: *mut ws_service, name: *const c_char, make: Declare) -> c_int {
    // SAFETY: as the caller promised, for both pointers.
    unsafe {
        with(what, service, |inner| {
            let name = text("the name", name)?;
            let Stage::Preparing { store, .. } = &mut inner.stage else {
                return Err(Error::AlreadyJoined { what: "collections are declared before the state arrives" });
            };
            let collection = make(store, name)?;
            let place = inner.collections.len() as c_int;
            inner.collections.push(collection);
            Ok(place)
        })
    }
}

/// Declares a map.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_map(service: *mut ws_service, name: *const c_char) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { declare("ws_map", service, name, |store, name| store.map(name).map(Collection::Map)) }
}

/// Declares counters.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_counters(service: *mut ws_service, name: *const c_char) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { declare("ws_counters", service, name, |store, name| store.counters(name).map(Collection::Counters)) }
}

/// Declares a log.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_log(service: *mut ws_service, name: *const c_char) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { declare("ws_log", service, name, |store, name| store.log(name).map(Collection::Log)) }
}

/// Declares a single value.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_record(service: *mut ws_service, name: *const c_char) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { declare("ws_record", service, name, |store, name| store.record(name).map(Collection::Record)) }
}

/// An address for when nobody passes listeners.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_listen(
    service: *mut ws_service,
    name: *const c_char,
    address: *const c_char,
) -> c_int {
    // SAFETY: the caller's promise, for all three pointers.
    unsafe {
        with("ws_listen", service, |inner| {
            let (name, address) = (text("the name", name)?, text("the address", address)?);
            let address: SocketAddr = address.parse().map_err(|_| Error::Address { text: address.to_owned() })?;
            let Stage::Preparing { listen, .. } = &mut inner.stage else {
                return Err(Error::AlreadyJoined { what: "the listeners are settled" });
            };
            listen.push((name.to_owned(), address));
            Ok(0)
        })
    }
}

/// Takes part.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_join(service: *mut ws_service) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { with("ws_join", service, |inner| join(inner).map(|()| 0)) }
}

fn join(inner: &mut Inner) -> Result<(), Error> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if matches!(inner.stage, Stage::Joined(_)) {
        return Err(Error::AlreadyJoined { what: "the service has joined" });
    }
    let passed = is_supervised() || has_listeners();
    if passed && TAKEN.swap(true, Ordering::Relaxed) {
        return Err(Error::JoinedElsewhere);
    }
    let Stage::Preparing { store, listen } = std::mem::replace(&mut inner.stage, Stage::Failed) else {
        return Err(Error::JoinFailed);
    };
    let service = if passed {
        warmswap_sdk::join(*store)?
    } else {
        let listen: Vec<(&str, SocketAddr)> = listen.iter().map(|(name, address)| (name.as_str(), *address)).collect();
        Service::standalone(*store, &listen)?
    };
    let name = |name: &str| CString::new(name).unwrap_or_default();
    inner.listener_names = service.listeners().iter().map(|listener| name(&listener.name)).collect();
    inner.stage = Stage::Joined(Box::new(service));
    Ok(())
}

/// Whether `LISTEN_FDS` is meant for this process.
fn has_listeners() -> bool {
    let for_us = std::env::var("LISTEN_PID").map_or(true, |pid| pid == std::process::id().to_string());
    std::env::var_os("LISTEN_FDS").is_some() && for_us
}

/// How many listeners there are.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_listeners(service: *const ws_service) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { with("ws_listeners", service, |inner| Ok(inner.joined()?.listeners().len() as c_int)) }
}

/// The descriptor of a listener.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_listener_fd(service: *const ws_service, at: c_int) -> c_int {
    // SAFETY: the caller's promise.
    unsafe {
        with("ws_listener_fd", service, |inner| {
            let service = inner.joined()?;
            let listener = usize::try_from(at).ok().and_then(|at| service.listeners().get(at));
            Ok(listener.ok_or(Error::NoListener { at })?.as_fd().as_raw_fd())
        })
    }
}

/// The name of a listener.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ws_listener_name(service: *const ws_service, at: c_int) -> *const c_char {
    // SAFETY: the caller's promise.
    unsafe {
        with("ws_listener_name", service, |inner| {
            inner.joined()?;
            let name = usize::try_from(at).ok().and_then(|at| inner.listener_names.get(at));
            Ok(name.ok_or(Error::NoListener { at })?.as_ptr())
        })
    }
}
