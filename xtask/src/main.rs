//! `cargo xtask VERB`: everything a developer does with this project, one file per verb.
//!
//! Not here: anything a user of warmswap does; that is `cli`. Kept small, because it is compiled before anything else.

mod build;
mod demo;
mod faults;
mod fuzz;
mod lint;
mod miri;
mod prepush;
mod run;
mod sdk;
mod setup;
mod test;
mod tidy;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "Set-up, build, test, fuzz, demo, virtual machines, tidy",
    disable_help_subcommand = true
)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Install what is missing to build and test, say what and why, ask nothing
    Setup,
    /// Build everything, optimised
    Build,
    /// Set up, build once and run every test; ends with a summary and what was left out
    Test(test::Options),
    /// Set up, build and run `warmswap demo`
    Demo(demo::Options),
    /// Set up, build, and kill, stop or deceive everybody at every step of a handover
    Faults(faults::Options),
    /// Run the fuzz targets, and the tests of the parsers, under AddressSanitizer
    Fuzz(fuzz::Options),
    /// Run the tests of the parsers under Miri (needs a nightly toolchain)
    Miri,
    /// Formatting, clippy without warnings, tidy
    Lint,
    /// Check the rules that hold across the workspace (dependency direction, manifests, files, links)
    Tidy,
    /// Run test programs, or a shell command, in a virtual machine with pure cgroup v2
    Vm(vm::Options),
    /// Build the SDK for C and Python and put it below a folder
    InstallSdk(sdk::Options),
    /// What must hold before a push: lint, then test
    Prepush,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().verb {
        Verb::Setup => setup::run(),
        Verb::Build => setup::run().and_then(|()| build::run()),
        Verb::Test(options) => test::run(&options),
        Verb::Demo(options) => demo::run(&options),
        Verb::Faults(options) => faults::run(&options),
        Verb::Fuzz(options) => fuzz::run(&options),
        Verb::Miri => miri::run(),
        Verb::Lint => lint::run(),
        Verb::Tidy => tidy::run(),
        Verb::Vm(options) => vm::run_verb(&options),
        Verb::InstallSdk(options) => sdk::install(&options),
        Verb::Prepush => prepush::run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
