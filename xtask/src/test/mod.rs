//! `test`: from a fresh clone to "everything passed, and this was left out because …".
//!
//! Everything is built once, in the release profile that the demo and the benchmark use as well. The test programs
//! are then run one after the other (several of them use the same kernel objects), each with a time limit, first
//! here and then, where it makes a difference, in a virtual machine with pure cgroup v2.
//!
//! A test that finds a kernel feature or a program missing prints `LEFT OUT: <test>: <reason>` and returns. Those
//! lines are collected; `--require-all` turns them into failures.

pub(crate) mod in_vm;
pub(crate) mod libtest;
pub(crate) mod programs;
mod summary;

use std::time::Instant;

use anyhow::Result;

use crate::{lint, run, setup, tidy};
use libtest::Outcome;
use summary::Summary;

#[derive(clap::Args, Default)]
pub(crate) struct Options {
    /// Fail when anything was left out
    #[arg(long)]
    require_all: bool,
    /// Run only the tests of this package (may be given more than once)
    #[arg(long, short)]
    package: Vec<String>,
    /// Do not run the part in the virtual machine
    #[arg(long)]
    no_vm: bool,
    /// Run only tests whose name contains this; leaves the virtual machine out
    filter: Option<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let started = Instant::now();
    setup::run()?;
    let mut summary = Summary::default();
    let everything = options.filter.is_none() && options.package.is_empty();

    if everything {
        summary.step("tidy", tidy::run());
        summary.step("format", lint::format());
    }
    let built = programs::build(&options.package)?;
    let wanted = |package: &str| options.package.is_empty() || options.package.iter().any(|p| p == package);
    for program in built.tests.iter().filter(|p| wanted(&p.package)) {
        summary.add(&program.package, libtest::run_program(program, options.filter.as_deref())?);
    }
    if everything {
        summary.add("documentation", cargo_test("documentation", &["--release", "--doc"], &[])?);
        summary.add("xtask", cargo_test("xtask", &["--package", "xtask"], &[])?);
        loom(&mut summary)?;
    }
    if options.no_vm || options.filter.is_some() {
        eprintln!("the virtual machine was not asked for");
    } else {
        in_vm::run(&built, &wanted, &mut summary)?;
    }
    summary.finish(started.elapsed(), options.require_all)
}

/// Models of the lock-free parts, run through every interleaving. Compiled apart, because `--cfg loom` changes what
/// atomics are.
fn loom(summary: &mut Summary) -> Result<()> {
    for package in programs::with_loom_models()? {
        let group = format!("{package} (loom)");
        let flags = [("RUSTFLAGS", "--cfg loom".to_owned()), ("LOOM_MAX_PREEMPTIONS", "3".to_owned())];
        let target = run::target().join("loom");
        let target = target.to_string_lossy();
        let arguments = ["--release", "--package", &package, "--test", "loom", "--target-dir", &target];
        summary.add(&group, cargo_test(&group, &arguments, &flags)?);
    }
    Ok(())
}

fn cargo_test(group: &str, arguments: &[&str], environment: &[(&str, String)]) -> Result<Outcome> {
    let mut cargo = run::cargo();
    cargo.arg("test").args(arguments).envs(environment.iter().cloned());
    cargo.args(["--", "--show-output"]);
    libtest::run_command(group, cargo)
}
