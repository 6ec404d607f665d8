//! The handover protocol: one supervisor per service, phases with deadlines and undo, a journal, verify and rollback.
//!
//! Not here: how much to reserve and when to hand over (`policy`), what a container is (`backend`), and what moves
//! (`transfer`).

mod attempt;
mod conditions;
mod conversation;
mod errand;
mod error;
mod journal;
mod lifecycle;
mod listeners;
mod member;
mod moved;
mod notify;
mod ports;
mod priority;
mod protocol;
mod recovery;
mod standstill;
mod steps;
mod succession;
mod supervisor;
mod verify;
mod way_back;

pub use conditions::{Conditions, Judgement, Progress};
pub use error::{HandoverError, LogTail};
pub use journal::{Journal, JournalError, OpenHandover, Recovered, ServiceRecord, Version};
pub use member::{Greeting, MemberStatus, Role};
pub use protocol::Plan;
pub use supervisor::Supervisor;
