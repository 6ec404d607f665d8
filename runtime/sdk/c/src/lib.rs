//! `libwarmswap`: the SDK for services that are not written in Rust, as functions of C.
//!
//! The contract of every function, for whoever calls it, is in `include/warmswap.h`; here is only how it is kept:
//!
//! * nothing unwinds into the caller: [`guard`] turns a panic into `WS_ERROR_BUG`, and the service into one that can only
//!   be closed;
//! * a failure is a negative number, and a text for the thread that met it ([`error`]);
//! * a service is used by one call at a time: [`handle`] refuses a second one, from another thread or from inside a visitor,
//!   instead of trusting that there is none.
//!
//! "The caller's promise" of a function is what `warmswap.h` asks for: pointers that are NULL or valid, and no use of a service
//! after it was closed.
//!
//! Not here: anything that the Rust SDK does not do, and other kinds of state than the store.

mod error;
mod event;
mod guard;
mod handle;
mod lifecycle;
mod state;
mod turn;

#[cfg(test)]
mod tests;
