//! The kernel matrix: the same test programs on every kernel, and a table of what each probe saw there.
//!
//! The programs are the sensor's `matrix` (known work, exact counts) and `verifier` (what the kernel's verifier needed).
//! They print a line of JSON for whatever belongs into the table, see `Said`; what is right or wrong they decide, here
//! it is only put side by side.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::{Job, boot, kernel};
use crate::run;
use crate::test::programs::{self, TestProgram};
use crate::test::{in_vm, libtest};

/// This machine as it is, as one more kernel of the matrix.
pub(super) const HOST: &str = "host";

const PACKAGE: &str = "warmswap-sensor";
const PROGRAMS: [&str; 2] = ["matrix", "verifier"];
/// What the verifier may need, by program and kernel line; kept beside the test that reads it.
const LIMITS: &str = "runtime/sensor/tests/verifier/limits.txt";

/// Per kernel. Emulated and on a busy host a run takes a minute.
const TIME_MAX: Duration = Duration::from_secs(300);

/// A line of a test program that begins with this is one `Said`.
const SAID: &str = "MATRIX: ";

/// One thing a test program has to say about one kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Said {
    /// `{"probe": name, "off": reason or null}`, for all probes first, in the order of the table.
    Probe { probe: String, off: Option<String> },
    /// `{"count": what, "probe": name, "expected": text, "seen": text, "right": bool}`
    Count { probe: String, right: bool, text: String },
    /// `{"undriven": reason, "probe": name}`
    Undriven { probe: String, reason: String },
    /// `{"program": name, "kernel": line, "instructions": number, "stack": bytes}`
    Program { program: String, kernel: String, instructions: u64, stack: u64 },
}

impl Said {
    /// `None` for a line that is not for us.
    fn of(line: &str) -> Option<Result<Self>> {
        let text = line.strip_prefix(SAID)?;
        Some(Self::parse(text).with_context(|| format!("a test program says {text:?}")))
    }

    fn parse(text: &str) -> Result<Self> {
        let value: serde_json::Value = serde_json::from_str(text)?;
        let word = |name: &str| value[name].as_str().map(str::to_owned).with_context(|| format!("no text {name}"));
        let number = |name: &str| value[name].as_u64().with_context(|| format!("no number {name}"));
        Ok(if value.get("count").is_some() {
            let text = format!("{} expected {}, seen {}", word("count")?, word("expected")?, word("seen")?);
            Self::Count { probe: word("probe")?, right: value["right"].as_bool().context("no verdict")?, text }
        } else if value.get("undriven").is_some() {
            Self::Undriven { probe: word("probe")?, reason: word("undriven")? }
        } else if value.get("program").is_some() {
            let (program, kernel) = (word("program")?, word("kernel")?);
            Self::Program { program, kernel, instructions: number("instructions")?, stack: number("stack")? }
        } else {
            Self::Probe { probe: word("probe")?, off: value["off"].as_str().map(str::to_owned) }
        })
    }
}

/// One kernel.
#[derive(Debug, Default)]
struct Column {
    /// `uname -r`, or what was asked for when it did not come up.
    release: String,
    said: Vec<Said>,
    /// Why the column is not to be believed.
    failed: Vec<String>,
}

pub(super) fn run(kernels: &[String], record: bool) -> Result<()> {
    let started = Instant::now();
    let built = programs::build(&[PACKAGE.to_owned()])?;
    let named = |name: &str| built.tests.iter().find(|p| p.package == PACKAGE && p.name == name).cloned();
    let tests: Option<Vec<TestProgram>> = PROGRAMS.iter().map(|name| named(name)).collect();
    let tests = tests.with_context(|| format!("{PACKAGE} has no test programs {}", PROGRAMS.join(" and ")))?;

    let mut columns = Vec::new();
    for name in kernels {
        let began = Instant::now();
        let column = if name == HOST { here(&tests) } else { emulated(name, &tests) };
        let column = column.unwrap_or_else(|error| Column {
            release: name.clone(),
            failed: vec![format!("{error:#}")],
            ..Column::default()
        });
        eprintln!("vm: {} took {:.0} s", column.release, began.elapsed().as_secs_f64());
        columns.push(column);
    }
    println!("{}", table(&columns));
    if record {
        keep_limits(&columns)?;
    }
    let failed: Vec<String> =
        columns.iter().flat_map(|c| c.failed.iter().map(|why| format!("{}: {why}", c.release))).collect();
    eprintln!("vm: {} kernels in {:.0} s", columns.len(), started.elapsed().as_secs_f64());
    if !failed.is_empty() {
        bail!("the matrix has gaps:\n  {}", failed.join("\n  "));
    }
    Ok(())
}

fn emulated(name: &str, tests: &[TestProgram]) -> Result<Column> {
    kernel::fetch(name).context("cannot fetch the kernel")?;
    let files = in_vm::files(tests, &[]);
    let commands: Vec<String> = tests.iter().map(|program| in_vm::command(program, None)).collect();
    let job = Job { kernel: name, files: &files, commands: &commands, time_max: TIME_MAX };
    let outcome = boot(&job, &mut |_, _| {})?;
    eprintln!("vm: {}, up after {:.1} s", outcome.release, outcome.boot.as_secs_f64());
    let release = if outcome.boot.is_zero() { name.to_owned() } else { outcome.release };
    let mut column = Column { release, ..Column::default() };
    for (program, command) in tests.iter().zip(&outcome.commands) {
        column.hear(program, &command.lines, command.status, command.time);
    }
    column.failed.extend(outcome.trouble);
    Ok(column)
}

fn here(tests: &[TestProgram]) -> Result<Column> {
    let release = run::output(std::process::Command::new("uname").arg("-r"))?;
    let number = release.trim().split('-').next().unwrap_or_default();
    let mut column = Column { release: format!("{number} ({HOST})"), ..Column::default() };
    for program in tests {
        let began = Instant::now();
        let mut command = std::process::Command::new(&program.path);
        command.args(["--show-output", "--test-threads=1"]).current_dir(&program.folder);
        run::clean_environment(&mut command);
        let output = command.output().with_context(|| format!("cannot start {}", program.path.display()))?;
        let text = [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        column.hear(program, &lines, output.status.code(), began.elapsed());
    }
    Ok(column)
}

impl Column {
    fn hear(&mut self, program: &TestProgram, lines: &[String], status: Option<i32>, time: Duration) {
        let before = self.said.len();
        for said in lines.iter().filter_map(|line| Said::of(line)) {
            match said {
                Ok(said) => self.said.push(said),
                Err(error) => self.failed.push(format!("{error:#}")),
            }
        }
        let label = program.label();
        let mut transcript = libtest::Transcript::default();
        lines.iter().for_each(|line| transcript.line(line));
        let how = status.map_or_else(|| "it did not end".to_owned(), |s| format!("exit status {s}"));
        let outcome = transcript.finish(status == Some(0), &how);
        libtest::report(&label, &outcome, lines, time);
        self.failed.extend(outcome.failed.iter().map(|test| format!("{label}: {test}")));
        if self.said.len() == before && outcome.failed.is_empty() {
            let why = outcome.left_out.first().map_or("it says nothing", |(_, reason)| reason);
            self.failed.push(format!("{label}: nothing for the table: {why}"));
        }
    }

    /// What became of a probe, in a word or two; long reasons go through `note`, which gives their number.
    fn cell(&self, name: &str, note: &mut dyn FnMut(&str) -> usize) -> String {
        let off = self.said.iter().find_map(|said| match said {
            Said::Probe { probe, off } if probe == name => Some(off.clone()),
            _ => None,
        });
        let Some(off) = off else { return "–".to_owned() };
        if let Some(reason) = off {
            return format!("off ({})", note(&reason));
        }
        let (mut right, mut wrong, mut undriven) = (0, Vec::new(), None);
        for said in &self.said {
            match said {
                Said::Count { probe, right: true, .. } if probe == name => right += 1,
                Said::Count { probe, text, .. } if probe == name => wrong.push(text.clone()),
                Said::Undriven { probe, reason } if probe == name => undriven = Some(reason),
                _ => {}
            }
        }
        if !wrong.is_empty() {
            return format!("wrong ({})", note(&wrong.join("; ")));
        }
        match (right, undriven) {
            (0, None) => "on".to_owned(),
            (0, Some(reason)) => format!("on ({})", note(reason)),
            (right, None) => format!("{right} right"),
            (right, Some(reason)) => format!("{right} right ({})", note(reason)),
        }
    }
}

/// Markdown: a row per probe, a column per kernel, below it the reasons.
fn table(columns: &[Column]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for said in columns.iter().flat_map(|column| &column.said) {
        if let Said::Probe { probe, .. } = said
            && !names.contains(&probe.as_str())
        {
            names.push(probe);
        }
    }
    let mut notes: Vec<String> = Vec::new();
    let mut note = |reason: &str| {
        let at = notes.iter().position(|known| known == reason).unwrap_or_else(|| {
            notes.push(reason.to_owned());
            notes.len() - 1
        });
        at + 1
    };
    let mut text =
        format!("| probe | {} |\n", columns.iter().map(|c| c.release.as_str()).collect::<Vec<_>>().join(" | "));
    text += &format!("|---|{}\n", "---|".repeat(columns.len()));
    for name in names {
        let cells: Vec<String> = columns.iter().map(|column| column.cell(name, &mut note)).collect();
        text += &format!("| {name} | {} |\n", cells.join(" | "));
    }
    for (number, note) in notes.iter().enumerate() {
        text += &format!("\n({}) {note}", number + 1);
    }
    text
}

/// Replaces what is recorded of the kernels that were run.
fn keep_limits(columns: &[Column]) -> Result<()> {
    let path = run::workspace().join(LIMITS);
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let text = with_limits(&text, columns);
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    eprintln!("vm: recorded in {LIMITS}");
    Ok(())
}

/// Lines are `program kernel instructions stack`; what begins with # is kept where it is, at the top.
fn with_limits(text: &str, columns: &[Column]) -> String {
    let mut lines: BTreeMap<(String, String), String> = BTreeMap::new();
    let comments: Vec<&str> = text.lines().filter(|line| line.starts_with('#')).collect();
    let new: Vec<_> = columns.iter().flat_map(|column| &column.said).collect();
    let renewed = |kernel: &str| new.iter().any(|said| matches!(said, Said::Program { kernel: k, .. } if k == kernel));
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if let [program, kernel, ..] = line.split_whitespace().collect::<Vec<_>>()[..]
            && !renewed(kernel)
        {
            lines.insert((program.to_owned(), kernel.to_owned()), line.to_owned());
        }
    }
    for said in new {
        if let Said::Program { program, kernel, instructions, stack } = said {
            let line = format!("{program} {kernel} {instructions} {stack}");
            lines.insert((program.clone(), kernel.clone()), line);
        }
    }
    comments.into_iter().map(str::to_owned).chain(lines.into_values()).map(|line| line + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(release: &str, lines: &[&str]) -> Column {
        let said = lines.iter().map(|line| Said::parse(line).unwrap()).collect();
        Column { release: release.to_owned(), said, failed: Vec::new() }
    }

    #[test]
    fn the_table_says_what_was_right_wrong_off_and_not_driven() {
        let first = column(
            "5.10",
            &[
                r#"{"probe": "exec", "off": null}"#,
                r#"{"probe": "tcp", "off": "no such tracepoint"}"#,
                r#"{"count": "execs", "probe": "exec", "expected": "2", "seen": "2", "right": true}"#,
            ],
        );
        let second = column(
            "6.1",
            &[
                r#"{"probe": "exec", "off": null}"#,
                r#"{"probe": "tcp", "off": null}"#,
                r#"{"count": "execs", "probe": "exec", "expected": "2", "seen": "3", "right": false}"#,
                r#"{"undriven": "no network", "probe": "tcp"}"#,
            ],
        );
        let expected = "| probe | 5.10 | 6.1 | 7.x |\n|---|---|---|---|\n\
                        | exec | 1 right | wrong (1) | – |\n| tcp | off (2) | on (3) | – |\n\
                        \n(1) execs expected 2, seen 3\n(2) no such tracepoint\n(3) no network";
        assert_eq!(table(&[first, second, column("7.x", &[])]), expected);
    }

    #[test]
    fn limits_of_other_kernels_are_kept() {
        let old = "# why\nb 6.1 10 8\na 6.1 10 8\na 5.10 7 8\n";
        let new = column("6.1.0", &[r#"{"program": "a", "kernel": "6.1", "instructions": 12, "stack": 16}"#]);
        assert_eq!(with_limits(old, &[new]), "# why\na 5.10 7 8\na 6.1 12 16\n");
    }

    #[test]
    fn what_is_not_for_the_table_is_told_from_what_is_broken() {
        assert!(Said::of("test a ... ok").is_none());
        assert!(Said::of("MATRIX: {").is_some_and(|said| said.is_err()));
        assert!(Said::of(r#"MATRIX: {"probe": "exec", "off": null}"#).is_some_and(|said| said.is_ok()));
    }
}
