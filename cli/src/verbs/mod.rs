//! One file per verb.

mod agent;
mod check;
mod completions;
mod demo;
mod forecast;
mod history;
mod run;
mod status;
mod stop;
mod top;
mod trace;
mod update;

use std::process::ExitCode;

use anyhow::{Result, ensure};

use crate::args::{Args, Verb};

/// The handover did not commit; the service runs as before.
pub(crate) const NOT_COMMITTED: u8 = 3;

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    let Args { json, run_dir, state_dir, verb } = args;
    let here = Here { json, run_dir, state_dir };
    let for_anybody = matches!(verb, Verb::Check | Verb::Completions { .. } | Verb::Man { .. });
    ensure!(
        for_anybody || is_root(),
        "warmswap creates containers and loads BPF programs, and only root may talk to its agent: run it as root"
    );
    match verb {
        Verb::Check => check::check(&here),
        Verb::Agent => agent::agent(&here),
        Verb::Run { file } => run::run(&here, &file),
        Verb::Update { service, image, file, stop_agent_before_step } => {
            update::update(&here, &service, image, file.as_deref(), stop_agent_before_step)
        }
        Verb::Rollback { service } => update::rollback(&here, &service),
        Verb::Status { service } => status::status(&here, service.as_ref()),
        Verb::Stop { service, all: _ } => stop::stop(&here, service.as_ref()),
        Verb::Top { cost, count, seconds } => top::top(&here, &top::Wishes { cost, count, seconds }),
        Verb::Trace { service, container, user, class, count, seconds } => {
            trace::trace(&here, &trace::Filter { service, container, user, class, count, seconds })
        }
        Verb::Forecast { service } => forecast::forecast(&here, &service),
        Verb::History { service, phases, steps } => history::history(&here, &service, phases, steps),
        Verb::Demo(demo) => demo::demo(&here, &demo),
        Verb::Completions { shell } => Ok(completions::completions(shell)),
        Verb::Man { folder } => completions::man(&folder),
    }
}

fn is_root() -> bool {
    // The owner of what we are is who we are.
    std::fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0)
}

/// What every verb needs to know.
pub(crate) struct Here {
    pub(crate) json: bool,
    pub(crate) run_dir: std::path::PathBuf,
    pub(crate) state_dir: std::path::PathBuf,
}
