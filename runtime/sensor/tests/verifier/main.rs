//! What the kernel's verifier needed for each program on this kernel, against what is recorded in `limits.txt`: a program
//! that suddenly takes many more instructions is on its way to being refused somewhere.
//!
//! After a change that is meant, record anew: `cargo xtask vm --kernel 5.10,6.1,6.12,7.2,host --record`.

#[macro_use]
#[path = "../support/mod.rs"]
mod support;

mod listener;

use serde_json::json;

/// Lines of: program (as the kernel cuts its name) kernel instructions stack.
const LIMITS: &str = include_str!("limits.txt");

/// How much more than recorded is still no jump: a fifth and no more than so many. Small programs may grow by some.
const MORE_MAX: u64 = 2_000;
const MORE_ALWAYS: u64 = 100;

/// A program in the eyes of the verifier.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Verified {
    program: String,
    /// Looked at, over all paths. The kernel's limit is a million.
    instructions: u64,
    /// Bytes, all functions of it together. The kernel's limit is 512 along any chain of calls.
    stack: u64,
}

impl Verified {
    /// From the last lines of the verifier's log: `stack depth 24+0+64` and `processed 312 insns (limit 1000000) …`.
    fn of(program: &str, log: &str) -> Option<Self> {
        let after = |words: &str| log.lines().rev().find_map(|line| line.trim().strip_prefix(words));
        let instructions = after("processed ")?.split(' ').next()?.parse().ok()?;
        let depths = after("stack depth ")?.split(['+', ' ']).map_while(|depth| depth.parse::<u64>().ok());
        Some(Self { program: program.to_owned(), instructions, stack: depths.sum() })
    }

    fn limit(recorded: u64) -> u64 {
        recorded + (recorded / 5).clamp(MORE_ALWAYS, MORE_MAX)
    }
}

/// `6.1` of `6.1.0-50-cloud-amd64`.
fn kernel_line() -> String {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("procfs");
    let number = |part: &str| part.chars().take_while(char::is_ascii_digit).collect::<String>();
    release.trim().split('.').take(2).map(number).collect::<Vec<_>>().join(".")
}

/// What a program took on this kernel; on one of which nothing is recorded, the most it took anywhere.
fn recorded(limits: &str, program: &str, kernel: &str) -> Option<u64> {
    let lines: Vec<Vec<&str>> = limits
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.split_whitespace().collect())
        .filter(|words: &Vec<&str>| words.len() == 4)
        .collect();
    let known = lines.iter().any(|words| words[1] == kernel);
    let ours = lines.iter().filter(|words| words[0] == program && (words[1] == kernel || !known));
    ours.map(|words| words[2].parse().expect("a number of instructions")).max()
}

#[test]
fn no_program_needs_much_more_of_the_verifier_than_recorded() {
    const TEST: &str = "no_program_needs_much_more_of_the_verifier_than_recorded";
    drop(sensor_or_leave!("no_program_needs_much_more_of_the_verifier_than_recorded"));
    // And the programs that take the place of those with typed arguments.
    let config = warmswap_sensor::SensorConfig { typed: false, ..Default::default() };
    drop(sensor_or_leave!("no_program_needs_much_more_of_the_verifier_than_recorded", config));
    let mut seen = listener::heard();
    seen.sort_by(|a, b| a.program.cmp(&b.program));
    seen.dedup_by(|a, b| a.program == b.program);
    if seen.is_empty() {
        println!("LEFT OUT: {TEST}: cannot listen to the verifier on this architecture");
        return;
    }
    let kernel = kernel_line();
    for one in &seen {
        let Verified { program, instructions, stack } = one;
        println!(
            "MATRIX: {}",
            json!({"program": program, "kernel": kernel, "instructions": instructions, "stack": stack})
        );
    }
    let mut wrong = Vec::new();
    for Verified { program, instructions, .. } in &seen {
        match recorded(LIMITS, program, &kernel) {
            None => wrong.push(format!("{program} is not recorded for {kernel}")),
            Some(recorded) => {
                let limit = Verified::limit(recorded);
                if *instructions > limit {
                    wrong.push(format!("{program}: {instructions} instructions, recorded {recorded}, limit {limit}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}\nrecord anew if that is meant: see the top of this file", wrong.join("\n"));
}

#[test]
fn a_kernel_of_which_nothing_is_recorded_is_held_to_the_most() {
    let limits = "# why\na 6.1 20 8\na 6.12 10 8\nb 6.1 5 0\n";
    assert_eq!(recorded(limits, "a", "6.12"), Some(10));
    assert_eq!(recorded(limits, "a", "6.14"), Some(20));
    assert_eq!(recorded(limits, "b", "6.12"), None);
}

#[test]
fn the_log_of_the_verifier_is_understood() {
    let log = "verification time 84 usec\nstack depth 24+0+64\nprocessed 312 insns (limit 1000000) max_states 1\n";
    let expected = Verified { program: "a".to_owned(), instructions: 312, stack: 88 };
    assert_eq!(Verified::of("a", log), Some(expected));
    assert_eq!(Verified::of("a", "processed many insns"), None);
    assert_eq!([0, 1_000, 100_000].map(Verified::limit), [100, 1_200, 102_000]);
}
