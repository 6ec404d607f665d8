//! The part of the tests that is run once more in a virtual machine: whatever touches cgroups, namespaces and BPF.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::libtest::{Outcome, Transcript, report};
use super::programs::{Built, TestProgram};
use super::summary::Summary;
use crate::{run, vm};

/// Packages whose tests depend on the kernel and on how cgroups are mounted.
pub(crate) const PACKAGES: [&str; 5] =
    ["warmswap-backend", "warmswap-sdk", "warmswap-sensor", "warmswap-tests", "warmswap-transfer"];

/// Programs of tests that run on the host only. What they are about is the same however cgroups are mounted, and emulated they
/// would take the better part of an hour: faults, hostile containers and connections by the thousand, updates under load
/// of programs of Debian and of other languages (which are not in the virtual machine), and models that touch nothing but
/// memory of their own.
const HERE_ONLY: [&str; 12] = [
    "connections",
    "endurance",
    "faults",
    "foreign",
    "heap",
    "hostile",
    "notify",
    "precopy_model",
    "programs",
    "schema",
    "snapshot",
    "store_model",
];

/// A test of a program of tests that do run there: what it needs is not in the virtual machine.
const HERE_ONLY_TEST: &str = "a_container_that_runc_runs_is_seen_with_its_memory";

const KERNEL: &str = "6.1";

/// For all programs together: emulated, everything takes about ten times as long.
const TIME_MAX: Duration = Duration::from_secs(25 * 60);

/// Programs of this host that tests use, and where they go. redis-server is another name of redis-check-rdb.
const HOST_PROGRAMS: [(&str, &str); 4] = [
    ("/usr/bin/redis-cli", "/usr/bin/redis-cli"),
    ("/usr/bin/redis-benchmark", "/usr/bin/redis-benchmark"),
    ("/usr/bin/redis-check-rdb", "/usr/bin/redis-server"),
    ("/usr/sbin/ip", "/usr/sbin/ip"),
];

pub(super) fn run(built: &Built, wanted: &dyn Fn(&str) -> bool, summary: &mut Summary) -> Result<()> {
    let here = |p: &&TestProgram| {
        PACKAGES.contains(&p.package.as_str()) && !HERE_ONLY.contains(&p.name.as_str()) && wanted(&p.package)
    };
    let tests: Vec<_> = built.tests.iter().filter(here).cloned().collect();
    if tests.is_empty() {
        return Ok(());
    }
    run_kernel(KERNEL, &tests, &built.programs, None, summary)
}

/// For `cargo xtask vm`.
pub(crate) fn run_alone(kernel: &str, built: &Built, filter: Option<&str>) -> Result<()> {
    let started = Instant::now();
    let mut summary = Summary::default();
    run_kernel(kernel, &built.tests, &built.programs, filter, &mut summary)?;
    summary.finish(started.elapsed(), false)
}

fn run_kernel(
    kernel: &str,
    tests: &[TestProgram],
    programs: &[PathBuf],
    filter: Option<&str>,
    summary: &mut Summary,
) -> Result<()> {
    let group = format!("in a VM, {kernel}");
    // No network and no kernel fetched before: not a fault of what is tested, but said.
    if let Err(error) = vm::kernel::fetch(kernel) {
        let reason = format!("cannot fetch the kernel: {error:#}");
        summary.add(&group, Outcome { left_out: vec![("everything".to_owned(), reason)], ..Outcome::default() });
        return Ok(());
    }
    let files = files(tests, programs);
    let commands: Vec<String> = tests.iter().map(|program| command(program, filter)).collect();
    let job = vm::Job { kernel, files: &files, commands: &commands, time_max: TIME_MAX };
    let started = Instant::now();
    let outcome = vm::boot(&job, &mut |number, line| {
        if line.starts_with("test ") && line.contains(" ... ") {
            eprintln!("    {:6.1} s  vm {}: {line}", started.elapsed().as_secs_f64(), tests[number].label());
        }
    })?;
    eprintln!("vm: {}, up after {:.1} s", outcome.release, outcome.boot.as_secs_f64());
    for (program, command) in tests.iter().zip(&outcome.commands) {
        let mut transcript = Transcript::default();
        command.lines.iter().for_each(|line| transcript.line(line));
        let status = command.status.map_or_else(|| "it did not end".to_owned(), |s| format!("exit status {s}"));
        let result = transcript.finish(command.status == Some(0), &status);
        report(&format!("{group}: {}", program.label()), &result, &command.lines, command.time);
        summary.add(&format!("{group}: {}", program.package), result);
    }
    if let Some(trouble) = outcome.trouble {
        summary.add(&group, Outcome { failed: vec![trouble], ..Outcome::default() });
    }
    Ok(())
}

/// Everything lies where it lies on the host: test programs know the paths of the programs they start.
pub(crate) fn files(tests: &[TestProgram], programs: &[PathBuf]) -> Vec<(PathBuf, PathBuf)> {
    let same = |path: PathBuf| (path.clone(), path);
    let own = tests.iter().map(|p| p.path.clone()).chain(programs.iter().cloned()).map(same);
    let hosts = HOST_PROGRAMS.map(|(host, guest)| (PathBuf::from(host), PathBuf::from(guest)));
    own.chain(hosts.into_iter().filter(|(host, _)| host.is_file())).collect()
}

pub(crate) fn command(test: &TestProgram, filter: Option<&str>) -> String {
    let filter = filter.map_or_else(String::new, |f| format!(" {}", quoted(f)));
    let programs = run::target().join("release");
    format!(
        "cd /tmp && WARMSWAP_BIN_DIR={} {} --show-output --test-threads=1 --skip {HERE_ONLY_TEST}{filter}",
        quoted(&programs.to_string_lossy()),
        quoted(&test.path.to_string_lossy())
    )
}

/// For the shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}
