//! Pure decisions: how much to reserve, when to hand over, whether the new generation is worse, and which request is
//! let through.
//!
//! Nothing here performs I/O, reads a clock or draws randomness: time, measurements and random numbers are arguments, so
//! every decision can be replayed from a recording. Acting on a decision is for `handover` and `agent`.
//!
//! ```text
//!  demand ──reservation──▶ lease wanted ──fits──▶ promised            (reservation)
//!    ▲          ▲ percentages
//!  forecast   tuner ◀── outcome of each handover                      (tuner)
//!  schedule, image, memory ──triggers──▶ handover ──judge──▶ keep or roll back   (trigger, trend, verdict)
//!  person, trigger ──admit──▶ accepted, ignored or denied             (admission)
//! ```

mod admission;
mod reservation;
mod trend;
mod trigger;
mod tuner;
mod verdict;

pub use admission::{Activity, Admission, Event, Request, ServiceState, admit};
pub use reservation::{Capacity, Rails, Shortage, fits, reservation};
pub use trend::{MemoryForecast, memory_exhaustion};
pub use trigger::{TriggerInput, TriggerState, triggers};
pub use tuner::{ArmReport, Outcome, Tuner, TunerReport};
pub use verdict::{Judgement, Progress, enough, judge};
