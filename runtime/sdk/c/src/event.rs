//! `ws_event`: what the service's loop has to do, laid out for C.

use std::ffi::{CString, c_char, c_int, c_void};
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd};
use std::ptr;
use std::time::Instant;

use warmswap_sdk::Event;

/// `ws_event`. Fields are only ever added at its end: callers hold a pointer to it, never one of their own.
#[allow(non_camel_case_types, reason = "its name in C")]
#[repr(C)]
#[derive(Debug)]
pub(crate) struct ws_event {
    pub(crate) kind: c_int,
    pub(crate) fd: c_int,
    pub(crate) cookie: u64,
    pub(crate) handover: u64,
    pub(crate) within_us: u64,
    pub(crate) listener: *const c_char,
    pub(crate) carry: *const c_void,
    pub(crate) carry_len: usize,
}

/// The event that was shown last, with what it points to.
#[derive(Debug)]
pub(crate) struct ShownEvent {
    shown: ws_event,
    listener: CString,
    carry: Vec<u8>,
}

impl Default for ShownEvent {
    fn default() -> Self {
        Self { shown: nothing(), listener: CString::default(), carry: Vec::new() }
    }
}

fn nothing() -> ws_event {
    ws_event {
        kind: 0,
        fd: -1,
        cookie: 0,
        handover: 0,
        within_us: 0,
        listener: ptr::null(),
        carry: ptr::null(),
        carry_len: 0,
    }
}

impl ShownEvent {
    /// Takes the place of the one before. `lost`: the descriptor of a conversation that is over.
    pub(crate) fn show(&mut self, event: Event, lost: Option<BorrowedFd<'_>>) -> *const ws_event {
        (self.listener, self.carry) = (CString::default(), Vec::new());
        self.shown = match event {
            Event::ConnectionArrived { cookie, fd, listener, carry } => {
                self.carry = carry;
                // A name with a zero in it cannot come from a service file; the socket is worth more than its name.
                self.listener = CString::new(listener).unwrap_or_default();
                ws_event { kind: 1, cookie, fd: fd.into_raw_fd(), ..nothing() }
            }
            Event::ConnectionCarry { cookie, carry } => {
                self.carry = carry;
                ws_event { kind: 2, cookie, ..nothing() }
            }
            Event::ConnectionClosed { cookie } => ws_event { kind: 3, cookie, ..nothing() },
            Event::BecomeOwner { handover } => ws_event { kind: 4, handover, ..nothing() },
            Event::Quiesce { handover, deadline } => {
                ws_event { kind: 5, handover, within_us: within_us(deadline), ..nothing() }
            }
            Event::Retire { deadline } => ws_event { kind: 6, within_us: within_us(deadline), ..nothing() },
            Event::ControlLost => ws_event { kind: 7, fd: lost.map_or(-1, |lost| lost.as_raw_fd()), ..nothing() },
        };
        self.shown.listener = self.listener.as_ptr();
        self.shown.carry = self.carry.as_ptr().cast();
        self.shown.carry_len = self.carry.len();
        &raw const self.shown
    }
}

fn within_us(deadline: Instant) -> u64 {
    u64::try_from(deadline.saturating_duration_since(Instant::now()).as_micros()).unwrap_or(u64::MAX)
}
