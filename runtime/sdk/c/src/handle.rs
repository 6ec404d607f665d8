//! `ws_service`: what a pointer of the caller stands for, and how arguments are looked at before they are used.

use std::cell::UnsafeCell;
use std::ffi::{CStr, CString, c_char, c_int};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};

use warmswap_sdk::Service;
use warmswap_sdk::transfer::store::{Counters, Log, Map, Record, Store};

use crate::error::Error;
use crate::event::ShownEvent;
use crate::guard::{Returned, guard};

/// Longest buffer that is taken, bytes. Longer ones are refused before they are looked at; the state has lower limits.
pub(crate) const BYTES_MAX: usize = 64 << 20;
/// Longest name of a collection or listener, bytes.
const NAME_LEN_MAX: usize = 255;

/// One collection of bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Collection {
    Map(Map<Vec<u8>>),
    Counters(Counters),
    Log(Log<Vec<u8>>),
    Record(Record<Vec<u8>>),
}

impl Collection {
    fn kind(self) -> &'static str {
        match self {
            Self::Map(_) => "a map",
            Self::Counters(_) => "counters",
            Self::Log(_) => "a log",
            Self::Record(_) => "a record",
        }
    }
}

/// Where the service is on its way.
#[derive(Debug)]
pub(crate) enum Stage {
    Preparing {
        store: Box<Store>,
        listen: Vec<(String, SocketAddr)>,
    },
    Joined(Box<Service<Store>>),
    /// The store went into an attempt to join that failed.
    Failed,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) stage: Stage,
    pub(crate) collections: Vec<Collection>,
    pub(crate) listener_names: Vec<CString>,
    pub(crate) event: ShownEvent,
    /// For `ws_yielded`; `None` when nobody waits for that.
    pub(crate) carry: Option<Vec<(u64, Vec<u8>)>>,
    /// What is about to be appended.
    pub(crate) value: Vec<u8>,
}

impl Inner {
    pub(crate) fn new(store: Store) -> Self {
        Self {
            stage: Stage::Preparing { store: Box::new(store), listen: Vec::new() },
            collections: Vec::new(),
            listener_names: Vec::new(),
            event: ShownEvent::default(),
            carry: None,
            value: Vec::new(),
        }
    }

    pub(crate) fn joined(&mut self) -> Result<&mut Service<Store>, Error> {
        match &mut self.stage {
            Stage::Joined(service) => Ok(service),
            Stage::Preparing { .. } => Err(Error::NotJoined { what: "the service has not joined" }),
            Stage::Failed => Err(Error::JoinFailed),
        }
    }

    /// The state, whether or not the service has joined.
    pub(crate) fn store(&mut self) -> Result<&mut Store, Error> {
        match &mut self.stage {
            Stage::Preparing { store, .. } => Ok(store),
            Stage::Joined(service) => Ok(service.state_mut()),
            Stage::Failed => Err(Error::JoinFailed),
        }
    }

    fn collection(&self, place: c_int) -> Result<Collection, Error> {
        let found = usize::try_from(place).ok().and_then(|place| self.collections.get(place));
        found.copied().ok_or(Error::NoCollection { place })
    }

    pub(crate) fn map(&self, place: c_int) -> Result<Map<Vec<u8>>, Error> {
        match self.collection(place)? {
            Collection::Map(map) => Ok(map),
            other => Err(Error::WrongCollection { place, is: other.kind(), wanted: "a map" }),
        }
    }

    pub(crate) fn counters(&self, place: c_int) -> Result<Counters, Error> {
        match self.collection(place)? {
            Collection::Counters(counters) => Ok(counters),
            other => Err(Error::WrongCollection { place, is: other.kind(), wanted: "counters" }),
        }
    }

    pub(crate) fn log(&self, place: c_int) -> Result<Log<Vec<u8>>, Error> {
        match self.collection(place)? {
            Collection::Log(log) => Ok(log),
            other => Err(Error::WrongCollection { place, is: other.kind(), wanted: "a log" }),
        }
    }

    pub(crate) fn record(&self, place: c_int) -> Result<Record<Vec<u8>>, Error> {
        match self.collection(place)? {
            Collection::Record(record) => Ok(record),
            other => Err(Error::WrongCollection { place, is: other.kind(), wanted: "a record" }),
        }
    }
}

/// `ws_service`.
#[allow(non_camel_case_types, reason = "its name in C")]
#[derive(Debug)]
pub(crate) struct ws_service {
    /// Held by the call that uses `inner`.
    busy: AtomicBool,
    /// A panic left it half done.
    broken: AtomicBool,
    inner: UnsafeCell<Inner>,
}

impl ws_service {
    pub(crate) fn new(store: Store) -> Self {
        Self { busy: AtomicBool::new(false), broken: AtomicBool::new(false), inner: UnsafeCell::new(Inner::new(store)) }
    }

    fn with<R>(&self, body: impl FnOnce(&mut Inner) -> Result<R, Error>) -> Result<R, Error> {
        if self.busy.swap(true, Ordering::Acquire) {
            return Err(Error::Busy);
        }
        if self.broken.swap(true, Ordering::Relaxed) {
            self.busy.store(false, Ordering::Release);
            return Err(Error::Broken);
        }
        // Given back also when the body panics; `broken` then stays.
        let _turn = Turn(&self.busy);
        // SAFETY: `busy` was free and is held until the reference is gone, so this is the only one.
        let result = body(unsafe { &mut *self.inner.get() });
        self.broken.store(false, Ordering::Relaxed);
        result
    }

    /// True when no call uses it, which then none can any more.
    pub(crate) fn retire(&self) -> bool {
        !self.busy.swap(true, Ordering::Acquire)
    }
}

struct Turn<'a>(&'a AtomicBool);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Runs a function of the interface on a service.
///
/// # Safety
/// `service` is NULL or from `ws_new` and not closed.
pub(crate) unsafe fn with<R: Returned>(
    what: &'static str,
    service: *const ws_service,
    body: impl FnOnce(&mut Inner) -> Result<R, Error>,
) -> R {
    guard(what, || {
        // SAFETY: the caller's promise. Only shared references to it are ever made.
        let service = unsafe { service.as_ref() }.ok_or(Error::Null { what: "the service" })?;
        service.with(body)
    })
}

/// `len` bytes at `start`, which may be NULL when there are none.
///
/// # Safety
/// That many bytes can be read there and do not change before the reference is gone.
pub(crate) unsafe fn bytes<'a>(what: &'static str, start: *const u8, len: usize) -> Result<&'a [u8], Error> {
    if len == 0 {
        return Ok(&[]);
    }
    if start.is_null() {
        return Err(Error::Null { what });
    }
    if len > BYTES_MAX {
        return Err(Error::TooLong { what, len, max: BYTES_MAX });
    }
    // SAFETY: the caller's promise; not NULL and below half of the address space (checked).
    Ok(unsafe { std::slice::from_raw_parts(start, len) })
}

/// A text with its zero.
///
/// # Safety
/// NULL, or a string that ends in a zero and does not change before the reference is gone.
pub(crate) unsafe fn text<'a>(what: &'static str, start: *const c_char) -> Result<&'a str, Error> {
    if start.is_null() {
        return Err(Error::Null { what });
    }
    // SAFETY: the caller's promise.
    let text = unsafe { CStr::from_ptr(start) }.to_str().map_err(|_| Error::NotText { what })?;
    if text.len() > NAME_LEN_MAX {
        return Err(Error::TooLong { what, len: text.len(), max: NAME_LEN_MAX });
    }
    Ok(text)
}

/// Where a result goes: looked at before anything is done, so that a call with nowhere to put it changes nothing.
///
/// # Safety
/// NULL, or a place that a `T` can be written to (what is there is not looked at) before the reference is gone.
pub(crate) unsafe fn place<'a, T>(what: &'static str, place: *mut T) -> Result<&'a mut MaybeUninit<T>, Error> {
    // SAFETY: the caller's promise; a MaybeUninit may hold anything.
    unsafe { place.cast::<MaybeUninit<T>>().as_mut() }.ok_or(Error::Null { what })
}
