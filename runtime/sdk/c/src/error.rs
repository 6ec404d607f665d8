//! Why a function failed: a number for the program, and a text for whoever reads its log.

use std::cell::RefCell;
use std::error::Error as _;
use std::ffi::{CString, c_char, c_int};

use warmswap_sdk::SdkError;
use warmswap_sdk::transfer::log::LogError;
use warmswap_sdk::transfer::store::DeclareError;

/// What went wrong. [`Error::code`] is what C sees; keep it and `warmswap.h` alike.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{what} is NULL")]
    Null { what: &'static str },
    #[error("{what} of {len} bytes is longer than {max}")]
    TooLong { what: &'static str, len: usize, max: usize },
    #[error("{what} is no UTF-8")]
    NotText { what: &'static str },
    #[error("{text:?} is no address like 127.0.0.1:7000")]
    Address { text: String },
    #[error("the service has no collection {place}")]
    NoCollection { place: c_int },
    #[error("collection {place} is {is}, not {wanted}")]
    WrongCollection { place: c_int, is: &'static str, wanted: &'static str },
    #[error("the service has no listener {at}")]
    NoListener { at: c_int },
    #[error("{fd} is no descriptor")]
    Descriptor { fd: c_int },
    #[error("{what}: call ws_join first")]
    NotJoined { what: &'static str },
    #[error("{what}: call it before ws_join")]
    AlreadyJoined { what: &'static str },
    #[error("another service of this process has taken the descriptors that it was started with")]
    JoinedElsewhere,
    #[error("the service could not join: close it")]
    JoinFailed,
    #[error("nobody asked this process to yield: there is nothing to carry over")]
    NothingToCarry,
    #[error("the service is in use by another thread, or by the walk that called this visitor")]
    Busy,
    #[error("an earlier call met a mistake in warmswap: close the service")]
    Broken,
    #[error("a mistake in warmswap: {what}")]
    Panic { what: String },
    #[error(transparent)]
    Declare(#[from] DeclareError),
    #[error(transparent)]
    State(#[from] LogError),
    #[error(transparent)]
    Sdk(#[from] SdkError),
}

impl Error {
    /// One of `WS_ERROR_…`.
    pub(crate) fn code(&self) -> c_int {
        match self {
            Self::Null { .. }
            | Self::TooLong { .. }
            | Self::NotText { .. }
            | Self::Address { .. }
            | Self::NoCollection { .. }
            | Self::WrongCollection { .. }
            | Self::NoListener { .. }
            | Self::Descriptor { .. }
            | Self::Declare(DeclareError::Twice { .. } | DeclareError::Collision { .. })
            | Self::State(LogError::RecordTooLong { .. } | LogError::KeyTooLong { .. }) => -10,
            Self::NotJoined { .. }
            | Self::AlreadyJoined { .. }
            | Self::JoinedElsewhere
            | Self::JoinFailed
            | Self::NothingToCarry
            | Self::Declare(_) => -11,
            Self::Busy => -12,
            Self::State(LogError::NotOwner) => -13,
            Self::State(LogError::CounterOverflow) => -14,
            Self::State(_) | Self::Sdk(SdkError::State(_)) => -15,
            Self::Sdk(SdkError::Environment { .. } | SdkError::System { .. } | SdkError::Listen { .. }) => -16,
            Self::Sdk(_) => -17,
            Self::Broken | Self::Panic { .. } => -18,
        }
    }

    /// With its causes, on one line.
    fn text(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// Keeps the text for `ws_error`; `what` was tried.
pub(crate) fn remember(what: &'static str, error: &Error) {
    let text = format!("{what}: {}", error.text()).replace('\0', "\\0");
    // Without zeros it is a C string.
    let text = CString::new(text).unwrap_or_default();
    // Gone only while the thread ends.
    let _ = LAST.try_with(|last| last.replace(text));
}

/// The text of the last failure in this thread.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn ws_error() -> *const c_char {
    LAST.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}
