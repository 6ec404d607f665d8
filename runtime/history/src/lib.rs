//! What every service did, kept on disk: feature windows, handover reports, and the blobs of models and tuners.
//!
//! One embedded database file (redb) under one folder, written by one agent. Every call is one transaction: after a
//! kill or a power cut the file holds everything up to the last transaction that returned. One-second windows are
//! kept for a day at most by default and summed up to minutes, which are kept longer; a service that rarely runs keeps
//! both for a shorter time; [`History::enforce_retention`] deletes
//! what is older, and more when the store outgrows its limit in bytes.
//!
//! Not here: what the windows mean (`forecast`), where they come from (`sensor`), when to append or delete (`agent`:
//! no clock is read in this room, times are arguments).

mod encode;
mod error;
mod retention;
mod store;

pub use error::HistoryError;
pub use retention::{DaysRun, LOOK_BACK_DAYS, Removed, Retention};
pub use store::{BlobKind, History, STEPS_KEPT};
