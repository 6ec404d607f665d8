//! `warmswap-bench SUITE [--quick] [--json FILE]`: every claim, measured.
//!
//! The result is a table for people and, with `--json`, `{"suite", "machine", "rows": [{"id", "value", "unit", …}]}`.
//! Everything runs under folders and an agent of its own; a running warmswap is not touched.

mod handover;
mod host;
mod rows;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(version, about = "Measures what warmswap claims", arg_required_else_help = true)]
struct Args {
    #[command(subcommand)]
    suite: Suite,
}

#[derive(Debug, Subcommand)]
enum Suite {
    /// Blackout of handovers under load, by size of state and number of connections; and that nothing is lost.
    Handover(Options),
}

#[derive(Debug, clap::Args)]
struct Options {
    /// Fewer cells and repetitions: under 45 s.
    #[arg(long)]
    quick: bool,
    /// Write the rows as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Folder of warmswap and session-store-v1. Default: beside this program.
    #[arg(long)]
    programs: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<()> {
    let Suite::Handover(options) = args.suite;
    let programs = match &options.programs {
        Some(folder) => folder.clone(),
        None => std::env::current_exe()?.parent().map(PathBuf::from).unwrap_or_default(),
    };
    let rows = handover::run(&programs, options.quick)?;
    print!("{}", rows::table(&rows));
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&rows::document("handover", &rows))?;
        std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
