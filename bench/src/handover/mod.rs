//! `warmswap-bench handover`: session-store is handed over again and again, between two images with the same program, while
//! clients at a constant rate check every acknowledged write; then the same beside what people do today.
//!
//! ```text
//!  groups: connections × hogs                                    restarts
//!  ┌──────┬─────────────────────────────────────────┬──────┐     ┌────────────────────────────────────────────────────┐
//!  │ calm │ small ones … the largest … small ones   │ calm │     │ warmswap … runc … docker … criu …                  │
//!  │      │ × rounds                                │      │     │ × rounds                                           │
//!  └──────┴─────────────────────────────────────────┴──────┘     └────────────────────────────────────────────────────┘
//!   services of all sizes run and are loaded side by side         after each turn nothing happens for some seconds
//! ```
//!
//! `docs/benchmarks.md` says how each row is measured.

mod group;
mod plan;
mod restart;
mod results;
mod subject;

use std::path::Path;
use std::time::Instant;

use anyhow::Result;

use crate::host::{self, Host};
use crate::progress::Progress;
use crate::rows::Row;
use crate::suite::Outcome;
use subject::Subject;

/// Memory that must be available, in multiples of a state: itself, what is leased for a shadow, and room to breathe.
const MEMORY_PER_STATE: u64 = 3;

pub(crate) fn run(programs: &Path, quick: bool) -> Result<Outcome> {
    host::raise_descriptor_limit()?;
    let began = Instant::now();
    let plan = if quick { &plan::QUICK } else { &plan::WHOLE };
    let mut outcome = Outcome::default();
    Progress::begin("starting an agent and services");
    let host = Host::start(programs)?;
    host.make_images(programs)?;

    let mut subjects = Vec::new();
    for state_mib in plan::SIZES_MIB {
        let available = host::memory_available_mib()?;
        if available < MEMORY_PER_STATE * state_mib {
            let conditions = results::conditions(state_mib, 0, 0);
            let reason =
                format!("{available} MiB of memory are available, {} are needed", MEMORY_PER_STATE * state_mib);
            outcome.rows.push(Row::unmeasured("handover.blackout_p50_us", "µs", &reason, &conditions));
            continue;
        }
        subjects.push(Subject::start(&host, &format!("bench-{state_mib}"), state_mib)?);
    }
    let mut groups = Vec::new();
    for group in plan.groups {
        if began.elapsed() > plan.groups_time_max {
            let reason = "the run was out of time: this host is slower than the suite was made for";
            for subject in &subjects {
                let conditions = results::conditions(subject.state_mib, group.connections, group.hogs);
                outcome.rows.push(Row::unmeasured("handover.blackout_p50_us", "µs", reason, &conditions));
            }
            continue;
        }
        let measured = group::measure(&host, &mut subjects, *group, plan)?;
        outcome.rows.extend(results::rows(&measured));
        let violations = results::violations(&measured.cells);
        let condition = format!("{} connections, {} hogs", group.connections, group.hogs);
        outcome.violations.extend(violations.into_iter().map(|violation| format!("{condition}, {violation}")));
        groups.push(measured);
    }
    outcome.rows.extend(results::overall_flatness(&groups));
    for subject in subjects {
        host.ask(&["stop", &subject.name], false)?;
    }
    outcome.add(restart::run(&host, programs, plan)?);
    Ok(outcome)
}
