//! `warmswap history`: the handovers of a service.

use std::process::ExitCode;

use anyhow::Result;
use warmswap_model::{HandoverReport, ServiceName};
use warmswap_report::utc;

use super::Here;
use crate::client::Client;
use crate::output::{duration_or_dash, duration_us, print_table, say, say_json, table, verdict};

pub(super) fn history(here: &Here, service: &ServiceName, phases: bool, steps: bool) -> Result<ExitCode> {
    let client = Client::connect(&here.run_dir)?;
    let reports: Vec<HandoverReport> = client.get(&format!("/v1/services/{service}/history"))?;
    if here.json {
        say_json(&reports)?;
        return Ok(ExitCode::SUCCESS);
    }
    if reports.is_empty() {
        say(&format!("{service} has had no handover"));
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = table(
        [
            "id",
            "when (UTC)",
            "handover",
            "verdict",
            "rung",
            "blackout",
            "connections",
            "state",
            "p99 before → after",
            "reason",
        ],
        &[0, 5, 6, 7],
    );
    for report in &reports {
        let p99 = |side: Option<warmswap_model::Measurements>| duration_or_dash(side.and_then(|side| side.p99_us));
        rows.add_row([
            report.id.to_string(),
            utc(report.started_unix_ms),
            format!("{} → {}", report.from, report.to),
            verdict(report.verdict),
            report.rung.to_string(),
            duration_or_dash(report.blackouts.first().map(|blackout| blackout.us)),
            report.connections.received.to_string(),
            format!("{:.0} MiB {}", report.state_bytes as f64 / f64::from(1 << 20), report.state),
            format!("{} → {}", p99(report.before), p99(report.after)),
            report.reason.clone().unwrap_or_default(),
        ]);
    }
    print_table(&rows);
    for report in reports.iter().filter(|_| phases || steps) {
        say(&format!("\nhandover {}", report.id));
        if phases {
            print_phases(report);
        }
        if steps {
            print_steps(report);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn print_phases(report: &HandoverReport) {
    let mut rows = table(["phase", "began after", "took", "outcome"], &[1, 2]);
    for timing in &report.phases {
        rows.add_row([
            timing.phase.to_string(),
            duration_us(timing.start_us),
            duration_us(timing.duration_us),
            format!("{:?}", timing.outcome).to_lowercase(),
        ]);
    }
    print_table(&rows);
}

fn print_steps(report: &HandoverReport) {
    if report.steps.is_empty() {
        say("its steps are not kept any more; those of the latest handovers are");
        return;
    }
    let mut rows = table(["step", "after", "until the next", "what"], &[0, 1, 2]);
    for (number, step) in report.steps.iter().enumerate() {
        let next = report.steps.get(number + 1).map(|next| next.at_us - step.at_us);
        rows.add_row([(number + 1).to_string(), duration_us(step.at_us), duration_or_dash(next), step.what.clone()]);
    }
    print_table(&rows);
}
