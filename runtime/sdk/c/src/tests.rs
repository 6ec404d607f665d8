//! What only a test from the inside can bring about: a mistake of our own.

use std::ffi::{CStr, c_int};

use crate::error::{Error, ws_error};
use crate::handle::with;
use crate::lifecycle::{ws_close, ws_new};

fn last_error() -> String {
    // SAFETY: valid until the next failure in this thread.
    unsafe { CStr::from_ptr(ws_error()) }.to_str().unwrap().to_owned()
}

extern "C" fn panics(service: *const crate::handle::ws_service) -> c_int {
    // SAFETY: from `ws_new`, not closed.
    unsafe { with("panics", service, |_| -> Result<c_int, Error> { panic!("{} is wrong", "something") }) }
}

#[test]
fn a_panic_becomes_an_error_and_the_service_can_only_be_closed() {
    let mut service = ws_new(1);
    assert!(!service.is_null());
    assert_eq!(panics(service), -18);
    assert_eq!(last_error(), "panics: a mistake in warmswap: something is wrong");
    // SAFETY: from `ws_new`, not closed.
    assert_eq!(unsafe { with("next", service, |_| Ok(0)) }, -18);
    assert_eq!(last_error(), "next: an earlier call met a mistake in warmswap: close the service");
    // SAFETY: as above; not used afterwards.
    assert_eq!(unsafe { ws_close(&raw mut service) }, 0);
    assert!(service.is_null());
}
