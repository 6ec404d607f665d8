//! The edge to C: results become numbers, and nothing unwinds across.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{Error, remember};

/// What a function returns to C.
pub(crate) trait Returned: Sized {
    /// In place of a value, after a failure with this code.
    fn failed(code: i32) -> Self;
}

impl Returned for i32 {
    fn failed(code: i32) -> Self {
        code
    }
}

impl Returned for i64 {
    fn failed(code: i32) -> Self {
        code.into()
    }
}

impl<T> Returned for *const T {
    fn failed(_: i32) -> Self {
        std::ptr::null()
    }
}

impl<T> Returned for *mut T {
    fn failed(_: i32) -> Self {
        std::ptr::null_mut()
    }
}

/// Runs one function of the interface, `what`.
pub(crate) fn guard<R: Returned>(what: &'static str, body: impl FnOnce() -> Result<R, Error>) -> R {
    // Whatever a panic left half done is never looked at again: the handle stays broken.
    let result = catch_unwind(AssertUnwindSafe(body));
    let error = match result {
        Ok(Ok(value)) => return value,
        Ok(Err(error)) => error,
        Err(panic) => Error::Panic { what: said(panic.as_ref()) },
    };
    remember(what, &error);
    R::failed(error.code())
}

fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no more is known").to_owned()
}
