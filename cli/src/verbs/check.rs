//! `warmswap check`: what this host can and cannot do.

use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;
use warmswap_sensor::FindingState;

use super::Here;
use crate::output::{Style, paint, print_table, say, say_json, table};

#[derive(Serialize)]
struct Finding {
    area: &'static str,
    name: String,
    ok: bool,
    detail: String,
    /// What to do about it; empty when nothing is wrong.
    remedy: String,
}

pub(super) fn check(here: &Here) -> Result<ExitCode> {
    let mut findings: Vec<Finding> = warmswap_backend::check()
        .into_iter()
        .map(|f| Finding { area: "containers", name: f.name, ok: f.ok, detail: f.detail, remedy: f.remedy })
        .collect();
    findings.extend(warmswap_sensor::check().into_iter().map(|f| Finding {
        area: "probes",
        name: f.name,
        ok: f.state == FindingState::Ok,
        detail: f.detail,
        remedy: f.advice,
    }));
    let others = warmswap_agent::check_other_containers();
    findings.push(Finding {
        area: "containers",
        name: "containers of other tools".into(),
        ok: others.ok,
        detail: others.detail,
        remedy: others.remedy,
    });
    if here.json {
        say_json(&findings)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = table(["", "area", "what", "found", "what to do"], &[]);
    for finding in &findings {
        let mark = if finding.ok { paint(Style::Good, "✓") } else { paint(Style::Bad, "✗") };
        rows.add_row([mark, finding.area.into(), finding.name.clone(), finding.detail.clone(), finding.remedy.clone()]);
    }
    print_table(&rows);
    let missing = findings.iter().filter(|finding| !finding.ok).count();
    say(&match missing {
        0 => "this host can do everything".to_owned(),
        n => format!("{n} of {} are missing; warmswap goes on without them", findings.len()),
    });
    Ok(ExitCode::SUCCESS)
}
