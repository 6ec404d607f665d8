//! `warmswap run`: start a service.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use warmswap_agent::api::{RunRequest, ServiceStatus};

use super::Here;
use super::status::print_service;
use crate::client::Client;
use crate::output::say_json;

pub(super) fn run(here: &Here, file: &Path) -> Result<ExitCode> {
    let request = read_service_file(file)?;
    let client = Client::connect_or_start(&here.run_dir, &here.state_dir)?;
    let status: ServiceStatus = client.post("/v1/services", &request)?;
    if here.json {
        say_json(&status)?;
    } else {
        print_service(&status);
    }
    Ok(ExitCode::SUCCESS)
}

/// Reads the file and parses it here too, so that a mistake is reported before an agent is started.
pub(super) fn read_service_file(file: &Path) -> Result<RunRequest> {
    let path = std::fs::canonicalize(file).with_context(|| format!("cannot read service file {}", file.display()))?;
    let text =
        std::fs::read_to_string(&path).with_context(|| format!("cannot read service file {}", file.display()))?;
    warmswap_model::ServiceFile::parse(&file.display().to_string(), &text)?;
    Ok(RunRequest { path, text })
}
