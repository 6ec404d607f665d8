//! `warmswap agent`: the supervisor of this host, in the foreground.

use std::process::ExitCode;

use anyhow::Result;
use tracing_subscriber::EnvFilter;
use warmswap_agent::AgentConfig;

use super::Here;

pub(super) fn agent(here: &Here) -> Result<ExitCode> {
    let filter = EnvFilter::try_from_env("WARMSWAP_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    warmswap_agent::run(AgentConfig { run_dir: here.run_dir.clone(), state_dir: here.state_dir.clone() })?;
    Ok(ExitCode::SUCCESS)
}
