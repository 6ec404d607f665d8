//! `warmswap status`: the agent and its services.

use std::process::ExitCode;

use anyhow::{Result, bail};
use warmswap_agent::api::{AgentStatus, Role, ServiceStatus};
use warmswap_model::{Resource, ServiceName};

use super::Here;
use crate::client::Client;
use crate::output::{Style, duration_or_dash, paint, print_table, say, say_json, table};

pub(super) fn status(here: &Here, only: Option<&ServiceName>) -> Result<ExitCode> {
    let client = Client::connect(&here.run_dir)?;
    let mut status: AgentStatus = client.get("/v1/status")?;
    if let Some(only) = only {
        status.services.retain(|service| &service.name == only);
        if status.services.is_empty() {
            bail!("there is no service {only}; `warmswap status` lists them");
        }
    }
    if here.json {
        say_json(&status)?;
        return Ok(ExitCode::SUCCESS);
    }
    if only.is_none() {
        print_agent(&status);
    }
    let mut rows = table(
        ["service", "owner", "image", "CPU %", "MB", "Mbps", "MB/s", "req/s", "p99", "handovers", ""],
        &[3, 4, 5, 6, 7, 8, 9],
    );
    for service in &status.services {
        let usage = |resource: Resource| format!("{:.1}", service.usage[resource]);
        let note = match (&service.trouble, &service.activity) {
            (Some(trouble), _) => paint(Style::Bad, trouble),
            (None, Some(activity)) => paint(Style::Warn, activity),
            (None, None) => String::new(),
        };
        rows.add_row([
            service.name.to_string(),
            service.owner.map_or_else(|| "–".into(), |owner| owner.to_string()),
            service.image.clone(),
            usage(Resource::Cpu),
            usage(Resource::Memory),
            usage(Resource::Network),
            usage(Resource::Disk),
            format!("{:.0}", service.requests_per_s),
            duration_or_dash(service.p99_us),
            service.handovers.to_string(),
            note,
        ]);
    }
    if status.services.is_empty() {
        say("no services; start one with `warmswap run FILE`");
    } else {
        print_table(&rows);
    }
    if only.is_some() {
        status.services.iter().for_each(print_service);
    }
    Ok(ExitCode::SUCCESS)
}

fn print_agent(status: &AgentStatus) {
    let up = std::time::Duration::from_secs(status.uptime_s as u64);
    say(&format!(
        "agent {} (pid {}) up {}s, back end {}, {} probes attached{}",
        status.version,
        status.pid,
        up.as_secs(),
        status.backend,
        status.probes_attached,
        if status.probes_off.is_empty() { String::new() } else { format!(", {} off", status.probes_off.len()) },
    ));
    for (name, reason) in &status.probes_off {
        say(&paint(Style::Warn, &format!("  {name} is off: {reason}")));
    }
    let dropped: u64 = status.events.iter().map(|class| class.dropped).sum();
    if dropped > 0 {
        say(&paint(Style::Warn, &format!("  {dropped} events dropped")));
    }
}

pub(super) fn print_service(service: &ServiceStatus) {
    let listeners: Vec<String> = service.listeners.iter().map(|(name, address)| format!("{name} {address}")).collect();
    let at = if listeners.is_empty() { String::new() } else { format!(", listens on {}", listeners.join(", ")) };
    for member in &service.generations {
        let role = match member.role {
            Role::Owner => paint(Style::Good, "serves"),
            Role::Shadow => "shadow".into(),
            Role::Parked => "parked".into(),
            Role::Draining => "drains".into(),
        };
        let rung = if member.cooperates { "" } else { " (without the SDK)" };
        let says = member.says.as_ref().map_or_else(String::new, |words| format!(", says {words:?}"));
        say(&format!("{} {} {role}{rung}: {}{at}{says}", service.name, member.generation, member.image));
    }
    if let Some(trouble) = &service.trouble {
        say(&paint(Style::Bad, trouble));
    }
}
