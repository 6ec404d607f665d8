//! `demo`: from a fresh clone to `warmswap demo` in one command.

use anyhow::Result;

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
    let arguments = std::iter::once("demo").chain(options.arguments.iter().map(String::as_str));
    run::become_program("warmswap", arguments)
}
