//! `warmswap-bench probes`: what it costs to be watched, and to listen.
//!
//! ```text
//!  worker, in a watched cgroup, on the last CPU ──▶ probes ──▶ counters, rings ──▶ draining thread ──▶ subscriber
//!                                               ──▶ bpftrace, execsnoop, …        (the same work, in the same run)
//! ```
//!
//! Whoever looks on is attached for one block and detached again, with blocks between in which nobody does, so that what
//! happens to the host happens to all of them. `docs/benchmarks.md` says how each row is measured.

mod cgroup;
mod count;
mod cpus;
mod events;
mod floor;
mod jobs;
mod ours;
mod slowdown;
mod tools;
mod urgent;
pub(crate) mod worker;

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use serde_json::json;

use crate::suite::Outcome;
use cgroup::Cgroup;
use cpus::{Cpus, Place, Placed};
use worker::{Task, Worker};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) common: crate::Options,
    /// These parts and no others.
    #[arg(long, value_delimiter = ',')]
    pub(crate) only: Vec<Part>,
    /// Leave these probes off, by their names in `warmswap check`: what is left is what the others cost.
    #[arg(long, value_delimiter = ',')]
    pub(crate) without: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    Count,
    Events,
    Exec,
    Files,
    Redis,
    Urgent,
}

/// What all parts share. Removed when dropped.
struct Ground {
    cpus: Cpus,
    cgroup: Cgroup,
    /// Probes that are left off.
    without: Vec<String>,
    /// On a disk, unless the host has its temporary files in memory.
    folder: PathBuf,
}

impl Ground {
    fn new(without: &[String]) -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("warmswap-bench-{}", std::process::id()));
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(Self { cpus: Cpus::of_host()?, cgroup: Cgroup::new()?, without: without.to_vec(), folder })
    }

    /// Those who look on keep away from who works, until this is dropped.
    fn keep_off(&self) -> Result<Placed> {
        self.cpus.place(Place::Elsewhere)
    }

    /// One that works in the watched cgroup and on the CPU for it.
    fn worker(&self) -> Result<Worker> {
        let mut worker = Worker::start(&self.cgroup)?;
        worker.work(&Task::StayOn { cpu: self.cpus.work })?;
        Ok(worker)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.folder) {
            eprintln!("{} stays behind: {error}", self.folder.display());
        }
    }
}

pub(crate) fn run(options: &Options) -> Result<Outcome> {
    let ground = Ground::new(&options.without)?;
    let (only, quick) = (&options.only, options.common.quick);
    let mut outcome = Outcome::default();
    let others = floor::programs();
    if others > 0 {
        eprintln!(
            "{others} BPF programs of others are loaded: where they look on too, the kernel takes its price without ours, and figures are lower"
        );
    }
    ours::check(&ground)?;
    for part in Part::value_variants().iter().filter(|part| only.is_empty() || only.contains(part)) {
        outcome.rows.extend(match part {
            Part::Count => count::run(&ground, quick)?,
            Part::Events => events::run(&ground, quick)?,
            Part::Exec => slowdown::programs(&ground, quick)?,
            Part::Files => slowdown::files(&ground, quick)?,
            Part::Redis => slowdown::redis(&ground, quick)?,
            Part::Urgent => urgent::run(&ground, quick)?,
        });
    }
    if !ground.without.is_empty() {
        for row in &mut outcome.rows {
            row.conditions.insert("without".into(), json!(ground.without.join(",")));
        }
    }
    Ok(outcome)
}

/// An error in one line.
fn reason(error: &anyhow::Error) -> String {
    format!("{error:#}").split_whitespace().collect::<Vec<_>>().join(" ")
}
