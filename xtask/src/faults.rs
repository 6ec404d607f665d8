//! `faults`: every fault at every step of a handover, see `warmswap_tests::faults`.

use anyhow::Result;

use crate::{build, run, setup};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Only every EVERYth point
    #[arg(long, default_value_t = 1)]
    every: usize,
    /// Begin with this point
    #[arg(long, default_value_t = 1)]
    first: usize,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    setup::run()?;
    build::run()?;
    run::become_program("faults", [options.every.to_string(), options.first.to_string()])
}
