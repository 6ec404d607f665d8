//! `fuzz`: builds the targets of `fuzz/` with libFuzzer and AddressSanitizer, runs each for a while, and runs the tests of the
//! parsers under AddressSanitizer too. The one pinned toolchain does it, with `RUSTC_BOOTSTRAP=1` in place of a nightly.
//!
//! Apart from `test`, because everything is compiled once more.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use cargo_metadata::MetadataCommand;

use crate::run;

/// The sanitizers need a target that is named, so that build scripts go without.
const TARGET: &str = "x86_64-unknown-linux-gnu";
const SANITIZER: [&str; 2] = ["-Zsanitizer=address", "-Ccodegen-units=1"];
/// What cargo-fuzz gives.
const COVERAGE: [&str; 7] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "--cfg",
    "fuzzing",
];
/// Packages whose tests run under AddressSanitizer: those with `unsafe` code on what others send.
const TESTED: [&str; 2] = ["warmswap-transfer", "warmswap-model"];
/// Lines that are shown of a target that found something.
const LINES_SHOWN: usize = 40;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// How long each target runs
    #[arg(long, default_value_t = 30)]
    seconds: u32,
    /// Only this target, without the tests (may be given more than once)
    #[arg(long, short)]
    target: Vec<String>,
}

/// What libFuzzer said of one target.
#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    runs: u64,
    /// Places in the code that were reached.
    coverage: u64,
    /// What was found, in libFuzzer's or AddressSanitizer's words.
    finding: Option<String>,
}

impl Seen {
    fn line(&mut self, line: &str) {
        let number = |text: &str| text.split_whitespace().next().and_then(|word| word.parse().ok());
        if let Some(runs) = line.strip_prefix("stat::number_of_executed_units:").and_then(number) {
            self.runs = runs;
        } else if let Some(coverage) = line.split_once(" cov: ").and_then(|(_, rest)| number(rest)) {
            self.coverage = coverage;
        } else if self.finding.is_none() && (line.starts_with("SUMMARY: ") || line.contains("panicked at ")) {
            self.finding = Some(line.trim().to_owned());
        }
    }
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let names = targets()?;
    for wanted in &options.target {
        ensure!(names.contains(wanted), "there is no target {wanted}, only {}", names.join(", "));
    }
    let folder = run::target().join("fuzz");
    let programs = build(&folder)?;
    let corpora = folder.join("corpus");
    run::run(Command::new(programs.join("seeds")).arg(&corpora))?;
    let findings = folder.join("findings");
    fs::create_dir_all(&findings).with_context(|| format!("cannot create {}", findings.display()))?;

    let mut found = 0;
    let mut table = vec![format!("{:<16} {:>12} {:>9}  found", "target", "runs", "coverage")];
    for name in names.iter().filter(|name| options.target.is_empty() || options.target.contains(name)) {
        let seen = run_target(name, &programs.join(name), &corpora.join(name), &findings, options.seconds)?;
        found += usize::from(seen.finding.is_some());
        let what = seen.finding.as_deref().unwrap_or("nothing");
        table.push(format!("{name:<16} {:>12} {:>9}  {what}", seen.runs, seen.coverage));
    }
    let tested = if options.target.is_empty() { test(&run::target().join("asan")) } else { Ok(()) };
    println!();
    table.iter().for_each(|line| println!("{line}"));
    tested?;
    if found > 0 {
        bail!("{found} targets found something; the inputs are in {}", findings.display());
    }
    Ok(())
}

/// As `fuzz/Cargo.toml` has them.
fn targets() -> Result<Vec<String>> {
    let metadata = MetadataCommand::new()
        .manifest_path(run::workspace().join("fuzz/Cargo.toml"))
        .no_deps()
        .exec()
        .context("cannot read fuzz/Cargo.toml")?;
    let all = metadata.packages.iter().flat_map(|package| &package.targets);
    let fuzzed = all.filter(|target| target.is_bin() && target.src_path.as_str().contains("/fuzz_targets/"));
    let names: Vec<String> = fuzzed.map(|target| target.name.clone()).collect();
    ensure!(!names.is_empty(), "fuzz/Cargo.toml has no targets");
    Ok(names)
}

/// Formatting and clippy of that workspace, which nothing else compiles.
pub(crate) fn lint() -> Result<()> {
    let manifest = "--manifest-path=fuzz/Cargo.toml";
    run::run(run::cargo().args(["fmt", manifest, "--check"]))?;
    let mut cargo = run::cargo();
    cargo.env("RUSTC_BOOTSTRAP", "1").env("RUSTFLAGS", "--cfg fuzzing");
    cargo.args(["clippy", manifest, "--all-targets", "--locked", "--quiet", "--target-dir"]);
    run::run(cargo.arg(run::target().join("fuzz-lint")).args(["--", "-Dwarnings"]))
}

/// cargo with sanitizers. The caller's own flags would not fit these.
fn sanitized(flags: &[&str]) -> Command {
    let mut cargo = run::cargo();
    cargo.env_remove("CARGO_ENCODED_RUSTFLAGS").env_remove("CARGO_BUILD_TARGET");
    cargo.env("RUSTC_BOOTSTRAP", "1").env("RUSTFLAGS", [flags, &SANITIZER].concat().join(" "));
    cargo
}

/// Returns where the programs lie.
fn build(folder: &Path) -> Result<PathBuf> {
    let mut cargo = sanitized(&COVERAGE);
    cargo.args(["build", "--release", "--bins", "--locked", "--target", TARGET, "--manifest-path", "fuzz/Cargo.toml"]);
    run::run(cargo.arg("--target-dir").arg(folder))
        .context("the fuzz targets cannot be built; they need a C++ compiler")?;
    Ok(folder.join(TARGET).join("release"))
}

fn run_target(name: &str, program: &Path, corpus: &Path, findings: &Path, seconds: u32) -> Result<Seen> {
    let mut command = Command::new(program);
    command.arg(corpus).args([
        &format!("-max_total_time={seconds}"),
        &format!("-artifact_prefix={}/{name}-", findings.display()),
        "-print_final_stats=1",
        "-rss_limit_mb=2048",
        "-timeout=20",
    ]);
    eprintln!("$ {}", run::shown(&command));
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let stderr = child.stderr.take().context("it has no standard error")?;
    let mut seen = Seen::default();
    let mut lines = Vec::new();
    for line in BufReader::new(stderr).split(b'\n') {
        let line = String::from_utf8_lossy(&line.context("cannot read what it says")?).into_owned();
        seen.line(&line);
        lines.push(line);
        if lines.len() > 2 * LINES_SHOWN {
            lines.drain(..LINES_SHOWN);
        }
    }
    let status = child.wait().context("cannot wait for it")?;
    if status.success() {
        seen.finding = None; // what it said of panics that the target expects
    } else {
        seen.finding.get_or_insert_with(|| status.to_string());
        lines.iter().rev().take(LINES_SHOWN).rev().for_each(|line| eprintln!("    {line}"));
    }
    Ok(seen)
}

/// Their unit tests and integration tests, with optimisation, as they run elsewhere.
fn test(folder: &Path) -> Result<()> {
    let mut cargo = sanitized(&[]);
    cargo.args(["test", "--release", "--lib", "--tests", "--quiet", "--target", TARGET, "--target-dir"]).arg(folder);
    TESTED.iter().for_each(|package| {
        cargo.args(["--package", package]);
    });
    run::run(&mut cargo).context("tests under AddressSanitizer")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_libfuzzer_says_is_understood() {
        let mut seen = Seen::default();
        seen.line("#2\tINITED cov: 12 ft: 13 corp: 1/1b exec/s: 0 rss: 30Mb");
        seen.line("#524288\tpulse  cov: 345 ft: 600 corp: 40/1Kb lim: 4096 exec/s: 262144 rss: 400Mb");
        seen.line("stat::number_of_executed_units: 1234567");
        assert_eq!(seen, Seen { runs: 1_234_567, coverage: 345, finding: None });
        seen.line("SUMMARY: AddressSanitizer: heap-buffer-overflow segment.rs:1 in x");
        seen.line("SUMMARY: libFuzzer: deadly signal");
        assert_eq!(seen.finding.as_deref(), Some("SUMMARY: AddressSanitizer: heap-buffer-overflow segment.rs:1 in x"));
    }

    #[test]
    fn every_target_is_known() {
        let targets = targets().unwrap();
        let files = fs::read_dir(run::workspace().join("fuzz/fuzz_targets")).unwrap();
        for file in files.flatten() {
            let name = file.path().file_stem().unwrap().to_string_lossy().into_owned();
            assert!(targets.contains(&name), "{name} is missing in fuzz/Cargo.toml");
        }
    }
}
