//! `warmswap stop`: end a service, or everything.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use warmswap_agent::api::{LOCK_NAME, SOCKET_NAME};
use warmswap_model::ServiceName;

use super::Here;
use crate::client::{Client, lock_of_agent};
use crate::output::{say, say_json};

/// How long an agent may take to end after its services have.
const AGENT_END_MAX: Duration = Duration::from_secs(60);

pub(super) fn stop(here: &Here, service: Option<&ServiceName>) -> Result<ExitCode> {
    match service {
        Some(service) => {
            let client = Client::connect(&here.run_dir)?;
            client.stop(&format!("/v1/services/{service}/stop"))?;
            if here.json { say_json(&json!({ "stopped": service }))? } else { say(&format!("{service} ended")) }
        }
        None => stop_all(here)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// With an agent: it ends its services and itself. With or without: whatever is left of ours is removed.
fn stop_all(here: &Here) -> Result<()> {
    let began = Instant::now();
    // Held to the end: removing under the hands of an agent, also one that just starts, would make it start its services
    // again.
    let lock = loop {
        if let Ok(client) = Client::connect(&here.run_dir) {
            client.stop("/v1/stop")?;
            client.wait_until_gone();
        }
        match lock_of_agent(&here.run_dir) {
            Ok(lock) => break lock,
            Err(_) if began.elapsed() > AGENT_END_MAX => bail!("the agent has stopped its services but does not end"),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    };
    let (removed, left) = purge(&here.run_dir)?;
    if left.is_empty() && lock.is_some() {
        remove_run_dir(&here.run_dir);
    }
    if here.json {
        say_json(&json!({ "removed": removed, "left": left }))?;
    } else {
        removed.iter().for_each(|what| say(&format!("removed {what}")));
        say("everything has ended");
    }
    if !left.is_empty() {
        bail!("some things could not be removed: {}", left.join(", "));
    }
    Ok(())
}

/// Removes whatever an agent that was killed left behind; returns that, and what is still there.
pub(super) fn purge(run_dir: &Path) -> Result<(Vec<String>, Vec<String>)> {
    let mut removed = warmswap_backend::purge(run_dir)?;
    let socket = run_dir.join(SOCKET_NAME);
    // Somebody who still answers needs it.
    if socket.exists() && Client::connect(run_dir).is_err() {
        std::fs::remove_file(&socket).with_context(|| format!("cannot remove {}", socket.display()))?;
        removed.push(format!("socket {}", socket.display()));
    }
    for journal in std::fs::read_dir(run_dir.join("journal")).into_iter().flatten().flatten() {
        std::fs::remove_file(journal.path())?;
    }
    Ok((removed, warmswap_backend::leftovers(run_dir)))
}

/// Removes what is in the run folder of nobody: empty folders, the link to the state folder, the agent's lock, which the
/// caller holds. What somebody else put there stays.
fn remove_run_dir(run_dir: &Path) {
    for folder in ["journal", "containers", "netns"] {
        let _ = std::fs::remove_dir(run_dir.join(folder)); // fails when it is not empty, and then it is needed
    }
    if run_dir.join("state").is_symlink() {
        let _ = std::fs::remove_file(run_dir.join("state"));
    }
    let _ = std::fs::remove_file(run_dir.join(LOCK_NAME));
    let _ = std::fs::remove_dir(run_dir);
}
