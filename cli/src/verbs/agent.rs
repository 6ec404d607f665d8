//! `warmswap agent`: the supervisor of this host, in the foreground.

use std::process::ExitCode;

use anyhow::Result;
use tracing_subscriber::EnvFilter;
use warmswap_agent::AgentConfig;

use super::Here;

/// What the agent says unless WARMSWAP_LOG has another filter. The probes are silent: their messages are for finding out
/// why numbers are missing, and `WARMSWAP_LOG=info` brings them.
const FILTER: &str = "info,warmswap_probes=off";

pub(super) fn agent(here: &Here) -> Result<ExitCode> {
    let filter = EnvFilter::try_from_env("WARMSWAP_LOG").unwrap_or_else(|_| EnvFilter::new(FILTER));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    warmswap_agent::run(AgentConfig { run_dir: here.run_dir.clone(), state_dir: here.state_dir.clone() })?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn probes_are_silent_unless_the_filter_lets_them_speak() {
        let speak = |filter: &str| {
            let subscriber = tracing_subscriber::fmt().with_env_filter(EnvFilter::new(filter)).finish();
            tracing::subscriber::with_default(subscriber, || tracing::enabled!(target: "warmswap_probes", Level::WARN))
        };
        assert!(!speak(FILTER));
        assert!(speak("info") && speak("off,warmswap_probes=warn"));
        assert!(!speak("error"));
    }
}
