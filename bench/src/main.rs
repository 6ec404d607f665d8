//! `warmswap-bench SUITE [--quick] [--json FILE]`: every claim, measured.
//!
//! The result is a table for people and, with `--json`, `{"suite", "machine", "rows": [{"id", "value", "unit", …}]}`.
//! Everything runs under folders and an agent of its own; a running warmswap is not touched. What was made is removed at the
//! end, after an error and after Ctrl-C too.
//!
//! Exit codes: 0 measured; 1 something that must never be was seen, or it failed; 2 wrong arguments; 130 interrupted.

mod forecast;
mod gaps;
mod handover;
mod hogs;
mod host;
mod infer;
mod interrupt;
mod line;
mod peers;
mod probes;
mod process;
mod progress;
mod rows;
mod stats;
mod suite;
mod transfer;
mod tuner;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use suite::Outcome;

#[derive(Debug, Parser)]
#[command(version, about = "Measures what warmswap claims", arg_required_else_help = true)]
struct Args {
    #[command(subcommand)]
    suite: Suite,
}

#[derive(Debug, Subcommand)]
enum Suite {
    /// Handovers under load, by size of state, connections and neighbours: blackout, gaps, losses; and what people do today.
    Handover(Options),
    /// State and signals to another process, beside copying them and beside iceoryx2.
    Transfer(Options),
    /// What the probes cost whom they watch and who listens to them, and what they lose, beside bpftrace and libbpf-tools.
    Probes(probes::Options),
    /// Forecasts on real traces, beside the baselines with the same calibration.
    Forecast(forecast::data::Options),
    /// How much to reserve, on real traces: the tuner beside what autoscalers do.
    Tuner(forecast::data::Options),
    /// What a forecast costs: the step beside ONNX Runtime, a tick of 1,000 profiles, the memory of 10,000.
    Infer(Options),
    /// The other process of `transfer`.
    #[command(name = transfer::receiver::COMMAND, hide = true)]
    Receive,
    /// The process that is watched in `probes`.
    #[command(name = probes::worker::COMMAND, hide = true)]
    Work,
    /// A process that burns CPU, for the suites' own use.
    /// Train the base of forecasts over minutes on made-up loads, and write it; takes some minutes.
    #[command(hide = true)]
    Base { file: PathBuf },
    #[command(name = hogs::COMMAND, hide = true)]
    Burn,
}

#[derive(Debug, clap::Args)]
struct Options {
    /// Fewer repetitions: under 45 s.
    #[arg(long)]
    quick: bool,
    /// Write the rows as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Folder of warmswap and session-store-v1. Default: beside this program.
    #[arg(long)]
    programs: Option<PathBuf>,
}

const INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            if error.is::<interrupt::Interrupted>() { INTERRUPTED.into() } else { ExitCode::FAILURE }
        }
    }
}

fn run(args: Args) -> Result<ExitCode> {
    match args.suite {
        Suite::Handover(options) => measure("handover", &options, handover::run),
        Suite::Transfer(options) => measure("transfer", &options, transfer::run),
        Suite::Probes(options) => measure("probes", &options.common, |_, _| probes::run(&options)),
        Suite::Forecast(options) => measure("forecast", &options.common, |_, _| forecast::run(&options)),
        Suite::Infer(options) => measure("infer", &options, infer::run),
        Suite::Work => probes::worker::run().map(|()| ExitCode::SUCCESS),
        Suite::Receive => transfer::receiver::run().map(|()| ExitCode::SUCCESS),
        Suite::Tuner(options) => measure("tuner", &options.common, |_, _| tuner::run(&options)),
        Suite::Base { file } => forecast::make_base(&file).map(|()| ExitCode::SUCCESS),
        Suite::Burn => match hogs::burn()? {},
    }
}

fn measure(suite: &str, options: &Options, run: impl FnOnce(&Path, bool) -> Result<Outcome>) -> Result<ExitCode> {
    interrupt::install()?;
    let programs = match &options.programs {
        Some(folder) => folder.clone(),
        None => std::env::current_exe()?.parent().map(PathBuf::from).unwrap_or_default(),
    };
    let outcome = run(&programs, options.quick)?;
    print!("{}", rows::table(&outcome.rows));
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&rows::document(suite, &outcome.rows))?;
        std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    for violation in &outcome.violations {
        eprintln!("error: {violation}");
    }
    Ok(if outcome.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
