//! What moves between the generations of a service: state in shared memory ([`log`], [`store`]), descriptors and
//! messages over a socket ([`channel`], [`message`]), and the two words that say who is to own the service ([`control`]) and who
//! does ([`ownership`]).
//!
//! Not here: who may own and when (`handover`), and what a service's event loop does about it (`sdk`).
//!
//! Everything that arrives from another process is checked once, where it arrives: messages by [`channel`], segments
//! by [`log`]. Code behind those two may trust what it is given.

#[cfg(not(loom))]
pub mod channel;
pub mod control;
#[cfg(not(loom))]
pub mod log;
#[cfg(not(loom))]
pub mod message;
pub mod ownership;
#[cfg(not(loom))]
pub mod page;
#[cfg(not(loom))]
mod pool;
pub mod publication;
#[cfg(not(loom))]
pub mod record;
#[cfg(not(loom))]
pub mod segment;
#[cfg(not(loom))]
pub mod state;
#[cfg(not(loom))]
pub mod store;
#[cfg(not(loom))]
mod sys;

/// Atomics, exchanged for loom's when the crate is built with `--cfg loom`.
pub(crate) mod sync {
    #[cfg(loom)]
    pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};
    #[cfg(not(loom))]
    pub(crate) use std::sync::atomic::{AtomicU64, Ordering};
}
