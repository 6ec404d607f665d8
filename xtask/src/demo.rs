//! `demo`: from a fresh clone to `warmswap demo` in one command.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::{build, run, setup};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Passed on to `warmswap demo`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    setup::run()?;
    build::run()?;
    let program = run::target().join("release/warmswap");
    let mut command = Command::new(&program);
    command.arg("demo").args(&options.arguments);
    run::clean_environment(&mut command);
    eprintln!("$ {}", run::shown(&command));
    // In our place: it gets the terminal's signals directly and its exit status is ours.
    Err(command.exec()).with_context(|| format!("cannot start {}", program.display()))
}
