//! Runs programs built with Rust's test harness and reads what they print.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::programs::TestProgram;
use crate::run;

/// Longer than the slowest scenario on a loaded machine with two cores, shorter than anybody's patience.
const PROGRAM_TIME_MAX: Duration = Duration::from_secs(20 * 60);
/// After this long every test is shown as it finishes, so that one sees what takes its time.
const QUIET_TIME: Duration = Duration::from_secs(3);
/// A process that a test left behind may hold our pipe open; it does not hold us.
const DRAIN_TIME: Duration = Duration::from_secs(2);

/// What one test program, or one call of `cargo test`, had to say.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) passed: usize,
    pub(crate) failed: Vec<String>,
    /// Test and reason.
    pub(crate) left_out: Vec<(String, String)>,
}

pub(super) fn run_program(program: &TestProgram, filter: Option<&str>) -> Result<Outcome> {
    let mut command = Command::new(&program.path);
    command.arg("--show-output").current_dir(&program.folder);
    if program.one_at_a_time {
        command.arg("--test-threads=1");
    }
    command.args(filter);
    run::clean_environment(&mut command);
    command.env("CARGO_MANIFEST_DIR", &program.folder).env("WARMSWAP_BIN_DIR", run::target().join("release"));
    // What setup made for us counts where the host has nothing of its own.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::split_paths(&path).chain([run::tools().join("bin")]);
    command.env("PATH", std::env::join_paths(path).context("a folder on PATH has a colon in its name")?);
    run_command(&program.label(), command)
}

/// Runs `command`, shows a line about `group` (and everything it printed when something failed).
pub(super) fn run_command(group: &str, mut command: Command) -> Result<Outcome> {
    let started = Instant::now();
    let shown = run::shown(&command);
    let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
    let also = writer.try_clone().context("cannot duplicate a pipe")?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(also)
        .spawn()
        .with_context(|| format!("cannot start `{shown}`"))?;
    // It holds our copies of the pipe's writing end.
    drop(command);

    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut reader = BufReader::new(reader);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                return;
            }
            line.clear();
        }
    });

    let mut transcript = Transcript::default();
    let mut lines = Vec::new();
    let mut ended = None;
    let mut killed = false;
    loop {
        match receiver.recv_timeout(Duration::from_millis(100)) {
            Ok(line) => {
                transcript.line(&line);
                if started.elapsed() > QUIET_TIME && line.starts_with("test ") && line.contains(" ... ") {
                    eprintln!("    {:6.1} s  {line}", started.elapsed().as_secs_f64());
                }
                lines.push(line);
                continue;
            }
            Err(RecvTimeoutError::Disconnected) if ended.is_some() => break,
            Err(RecvTimeoutError::Disconnected) => std::thread::sleep(Duration::from_millis(10)),
            Err(RecvTimeoutError::Timeout) => {}
        }
        match ended {
            None => ended = child.try_wait().context("cannot wait for a test program")?.map(|s| (s, Instant::now())),
            Some((_, when)) if when.elapsed() > DRAIN_TIME => break,
            Some(_) => {}
        }
        if ended.is_none() && !killed && started.elapsed() > PROGRAM_TIME_MAX {
            child.kill().context("cannot end a test program")?;
            killed = true;
        }
    }
    let success = ended.is_some_and(|(status, _)| status.success());
    let status = ended.map_or_else(|| "no status".to_owned(), |(status, _)| status.to_string());
    let why = if killed { format!("not done after {} minutes", PROGRAM_TIME_MAX.as_secs() / 60) } else { status };
    let outcome = transcript.finish(success, &why);
    report(group, &outcome, &lines, started.elapsed());
    Ok(outcome)
}

/// One line, and the whole output when something failed.
pub(crate) fn report(group: &str, outcome: &Outcome, lines: &[String], time: Duration) {
    if !outcome.failed.is_empty() {
        eprintln!("---- output of {group}");
        for line in lines {
            eprintln!("{line}");
        }
        eprintln!("---- end of the output of {group}");
    }
    if *outcome != Outcome::default() {
        eprintln!("  {group:<44} {} ({:.1} s)", outcome.counts(), time.as_secs_f64());
    }
}

impl Outcome {
    pub(super) fn counts(&self) -> String {
        let mut text = format!("{:>4} passed", self.passed);
        if !self.failed.is_empty() {
            text += &format!(", {} failed", self.failed.len());
        }
        if !self.left_out.is_empty() {
            text += &format!(", {} left out", self.left_out.len());
        }
        text
    }

    pub(super) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed.extend(other.failed);
        self.left_out.extend(other.left_out);
    }
}

/// Reads the harness's output line by line. Several programs may follow one another.
#[derive(Debug, Default)]
pub(crate) struct Transcript {
    outcome: Outcome,
    passed_by_line: usize,
    /// `running N tests` without its `test result:` yet.
    open: bool,
    last_started: Option<String>,
}

impl Transcript {
    pub(crate) fn line(&mut self, line: &str) {
        let line = line.trim_end();
        if let Some(rest) = line.strip_prefix("LEFT OUT: ") {
            let (test, reason) = rest.split_once(": ").unwrap_or((rest, "no reason given"));
            let entry = (test.to_owned(), reason.to_owned());
            if !self.outcome.left_out.contains(&entry) {
                self.outcome.left_out.push(entry);
            }
        } else if line.starts_with("running ") && (line.ends_with(" tests") || line.ends_with(" test")) {
            self.open = true;
        } else if line.starts_with("test result: ") {
            self.open = false;
        } else if let Some((test, result)) = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... ")) {
            // A test whose own output went past the harness, into the middle of the line.
            let result = result.trim();
            if result == "ok" || result.ends_with("ok") {
                self.passed_by_line += 1;
            } else if let Some(reason) = result.strip_prefix("ignored") {
                let reason = reason.trim_start_matches([',', ' ']);
                let reason = if reason.is_empty() { "ignored" } else { reason };
                self.outcome.left_out.push((test.to_owned(), reason.to_owned()));
                // It is not among those that passed.
                self.passed_by_line += 1;
            } else if result.ends_with("FAILED") || result.starts_with("FAILED") {
                self.outcome.failed.push(test.to_owned());
            } else {
                self.last_started = Some(test.to_owned());
            }
        }
    }

    /// `success`: the program's exit status. A program that failed without a failed test, or that ended in the middle
    /// (a crash, an `exit`), is a failure too.
    pub(crate) fn finish(mut self, success: bool, status: &str) -> Outcome {
        if self.open {
            let after = self.last_started.map_or_else(String::new, |t| format!(" in {t}"));
            self.outcome.failed.push(format!("the test program ended in the middle{after}: {status}"));
        } else if !success && self.outcome.failed.is_empty() {
            self.outcome.failed.push(format!("the test program failed: {status}"));
        }
        self.outcome.passed = self.passed_by_line.saturating_sub(self.outcome.left_out.len());
        self.outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(text: &str, success: bool) -> Outcome {
        let mut transcript = Transcript::default();
        text.lines().for_each(|line| transcript.line(line));
        transcript.finish(success, "exit status: 101")
    }

    #[test]
    fn a_left_out_test_is_not_counted_as_passed() {
        let text = "\nrunning 4 tests\ntest a ... ok\ntest b ... ok\ntest c ... ignored, slow\n\
                    test d - should panic ... ok\n\n\
                    successes:\n\n---- b stdout ----\nLEFT OUT: b: no /dev/input\n\n\
                    test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";
        let left_out = vec![("c".to_owned(), "slow".to_owned()), ("b".to_owned(), "no /dev/input".to_owned())];
        assert_eq!(outcome(text, true), Outcome { passed: 2, failed: vec![], left_out });
    }

    #[test]
    fn failed_tests_are_named() {
        let text = "running 2 tests\ntest a ... FAILED\ntest b ... ok\ntest result: FAILED. 1 passed; 1 failed;\n";
        assert_eq!(outcome(text, false), Outcome { passed: 1, failed: vec!["a".to_owned()], left_out: vec![] });
    }

    #[test]
    fn a_program_that_dies_is_a_failure() {
        let died = outcome("running 2 tests\ntest a ... ok\n", false);
        assert_eq!((died.passed, died.failed.len()), (1, 1));
        let exited = outcome("running 2 tests\ntest a ... ok\n", true);
        assert_eq!((exited.passed, exited.failed.len()), (1, 1));
        assert_eq!(outcome("cannot execute\n", false).failed.len(), 1);
        assert_eq!(outcome("", true), Outcome::default());
    }

    #[test]
    fn a_program_that_hangs_on_to_our_pipe_does_not_hold_us() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo 'running 1 test'; echo 'test a ... ok'; echo 'test result: ok.'; sleep 6 & exit 0"]);
        let started = Instant::now();
        let outcome = run_command("hangs on", command).unwrap();
        assert_eq!(outcome, Outcome { passed: 1, ..Outcome::default() });
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    }
}
