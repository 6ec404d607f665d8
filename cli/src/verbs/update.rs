//! `warmswap update` and `warmswap rollback`: a handover, phase by phase, then one line of verdict.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use hyper::Method;
use indicatif::{ProgressBar, ProgressStyle};
use warmswap_agent::api::{Fault, Progress, UpdateLine, UpdateRequest};
use warmswap_model::{HandoverReport, Phase, PhaseOutcome, ServiceName, Verdict};

use super::run::read_service_file;
use super::{Here, NOT_COMMITTED};
use crate::client::Client;
use crate::output::{self, Style, duration_us, paint, say, say_json};

pub(super) fn update(
    here: &Here,
    service: &ServiceName,
    image: Option<PathBuf>,
    file: Option<&Path>,
    stop_agent_before_step: Option<usize>,
) -> Result<ExitCode> {
    let image = image.map(std::path::absolute).transpose()?;
    let file = file.map(read_service_file).transpose()?;
    let fault = stop_agent_before_step.map(|before_step| Fault::StopAgent { before_step });
    let request = UpdateRequest { image, file, fault };
    let client = Client::connect(&here.run_dir)?;
    follow(here, &client, &format!("/v1/services/{service}/update"), &request)
}

pub(super) fn rollback(here: &Here, service: &ServiceName) -> Result<ExitCode> {
    let client = Client::connect(&here.run_dir)?;
    follow(here, &client, &format!("/v1/services/{service}/rollback"), &UpdateRequest::default())
}

/// Shows a handover as it happens.
fn follow(here: &Here, client: &Client, path: &str, request: &UpdateRequest) -> Result<ExitCode> {
    let mut waiting = Waiting::default();
    let report = hand_over(client, path, request, |line| {
        if here.json {
            return say_json(line);
        }
        waiting.show(line);
        show(line);
        Ok(())
    })?;
    Ok(exit_code(&report))
}

/// On a terminal: the phase that is under way and for how long.
#[derive(Default)]
struct Waiting(Option<ProgressBar>);

impl Waiting {
    fn show(&mut self, line: &UpdateLine) {
        if let Some(bar) = self.0.take() {
            bar.finish_and_clear();
        }
        // Nothing is drawn in the blackout, which is over before anybody could read it.
        if let UpdateLine::Progress(Progress::PhaseBegun { phase }) = line
            && *phase != Phase::Quiesce
        {
            let style = ProgressStyle::with_template("  {spinner} {msg:<8} {elapsed:>9}");
            let bar = ProgressBar::new_spinner().with_message(phase.to_string());
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
            bar.enable_steady_tick(Duration::from_millis(200));
            self.0 = Some(bar);
        }
    }
}

fn exit_code(report: &HandoverReport) -> ExitCode {
    match report.verdict {
        Verdict::Committed => ExitCode::SUCCESS,
        Verdict::RolledBack | Verdict::Aborted => ExitCode::from(NOT_COMMITTED),
    }
}

/// Follows one handover to its report.
pub(super) fn hand_over(
    client: &Client,
    path: &str,
    request: &UpdateRequest,
    mut each: impl FnMut(&UpdateLine) -> Result<()>,
) -> Result<HandoverReport> {
    let mut report = None;
    client.lines(Method::POST, path, request, |line: UpdateLine| {
        each(&line)?;
        match line {
            UpdateLine::Report(finished) => report = Some(*finished),
            UpdateLine::Error(error) => bail!(error),
            UpdateLine::Progress(_) => {}
        }
        Ok(true)
    })?;
    report.ok_or_else(|| anyhow!("the agent went away during the handover; `warmswap status` shows who serves"))
}

fn show(line: &UpdateLine) {
    match line {
        UpdateLine::Progress(progress) => show_progress(progress),
        UpdateLine::Report(report) => say(&verdict_line(report)),
        UpdateLine::Error(_) => {} // becomes the error of the command
    }
}

pub(super) fn show_progress(progress: &Progress) {
    match progress {
        Progress::Begun { handover, from, to } => {
            say(&paint(Style::Bold, &format!("handover {handover}: {from} → {to}")));
        }
        Progress::PhaseBegun { .. } => {}
        Progress::PhaseEnded { phase, outcome, duration_us: us, detail } => {
            let mark = match outcome {
                PhaseOutcome::Done => paint(Style::Good, "✓"),
                PhaseOutcome::Failed => paint(Style::Bad, "✗"),
                PhaseOutcome::Undone => paint(Style::Warn, "↩"),
            };
            say(format!("  {mark} {phase:<8} {:>9}  {detail}", duration_us(*us)).trim_end());
        }
    }
}

pub(super) fn verdict_line(report: &HandoverReport) -> String {
    let mut line = format!("{} {} → {}: {}", report.service, report.from, report.to, output::verdict(report.verdict));
    if let Some(blackout) = report.blackouts.first() {
        line.push_str(&format!(", blackout {}", duration_us(blackout.us)));
    }
    line.push_str(&format!(", rung {}", report.rung));
    if let Some(reason) = &report.reason {
        line.push_str(&format!(": {reason}"));
    }
    for lost in &report.lost {
        line.push_str(&format!("; {lost}"));
    }
    line
}
