//! What is printed at the end: per package what passed, failed and was left out, and why.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, bail};

use super::libtest::Outcome;

#[derive(Debug, Default)]
pub(super) struct Summary {
    groups: BTreeMap<String, Outcome>,
}

impl Summary {
    pub(super) fn add(&mut self, group: &str, outcome: Outcome) {
        self.groups.entry(group.to_owned()).or_default().add(outcome);
    }

    /// A check that is one test in itself.
    pub(super) fn step(&mut self, name: &str, result: Result<()>) {
        let outcome = match result {
            Ok(()) => Outcome { passed: 1, ..Outcome::default() },
            Err(error) => {
                eprintln!("{name}: {error:#}");
                Outcome { failed: vec![format!("{name}: {error:#}")], ..Outcome::default() }
            }
        };
        self.add("workspace", outcome);
    }

    /// Prints; the error says that it was not good enough.
    pub(super) fn finish(&self, time: Duration, require_all: bool) -> Result<()> {
        let mut total = Outcome::default();
        println!();
        for (group, outcome) in &self.groups {
            total.add(outcome.clone());
            println!("{group:<28} {}", outcome.counts());
        }
        for (group, outcome) in &self.groups {
            outcome.left_out.iter().for_each(|(test, reason)| println!("left out: {group}: {test}: {reason}"));
        }
        for (group, outcome) in &self.groups {
            outcome.failed.iter().for_each(|test| println!("failed: {group}: {test}"));
        }
        let left_out = total.left_out.len();
        println!("{left_out} left out, {} min {:02} s", time.as_secs() / 60, time.as_secs() % 60);
        println!("{} passed, {} failed", total.passed, total.failed.len());
        if !total.failed.is_empty() {
            bail!("{} failed", total.failed.len());
        }
        if require_all && left_out > 0 {
            bail!("{left_out} left out, and --require-all was given");
        }
        if total.passed == 0 {
            bail!("no test ran");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finish(outcome: Outcome, require_all: bool) -> bool {
        let mut summary = Summary::default();
        summary.add("a", outcome);
        summary.finish(Duration::ZERO, require_all).is_ok()
    }

    #[test]
    fn what_was_left_out_fails_only_when_all_is_required() {
        let left_out = Outcome { passed: 1, left_out: vec![("t".to_owned(), "r".to_owned())], ..Outcome::default() };
        assert!(finish(left_out.clone(), false));
        assert!(!finish(left_out, true));
        assert!(!finish(Outcome { passed: 1, failed: vec!["t".to_owned()], ..Outcome::default() }, false));
        assert!(!finish(Outcome::default(), false));
        assert!(finish(Outcome { passed: 1, ..Outcome::default() }, true));
    }
}
