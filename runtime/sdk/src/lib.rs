//! What a service links to take part in a handover: its listeners, its role, its connections and its state, whoever
//! started it. No runtime of its own: the service's event loop watches one descriptor more and asks [`Service::poll`]
//! what to do.
//!
//! ```text
//!  loop {
//!      wait: Service::control_fd(), at most Service::wake_within(); the owner also on listeners and connections
//!      while let Some(event) = service.poll()? {
//!          ConnectionArrived  → keep the socket, read nothing yet
//!          ConnectionCarry    → remember, for BecomeOwner
//!          ConnectionClosed   → close ours
//!          BecomeOwner        → take up what was carried over, serve; service.serving()
//!          Quiesce            → finish and flush what is possible by the deadline, then service.yielded(carry)
//!          Retire             → leave
//!          ControlLost        → stop watching control_fd()
//!      }
//!      owner: accept (datagrams: receive), read, change service.state_mut(), service.commit(), service.may_write(), reply
//!  }
//! ```
//!
//! What the SDK answers by itself: greeting, segments, following the log, sending connections to a follower, catching
//! up. It never blocks on the control socket: what does not fit waits in a bounded queue ([`OUTBOX_LEN_MAX`]).
//!
//! Not here: an event loop, a protocol, threads (apart from the one that makes memory ready), tokio.

mod environment;
mod outbox;
mod service;

pub use environment::{Listener, ListenerKind, is_supervised};
pub use outbox::OUTBOX_LEN_MAX;
pub use service::{Event, SdkError, Service, join};
pub use warmswap_transfer as transfer;
