//! `tidy`: rules that hold across the workspace and that no compiler checks. Each finding says where and what to do.
//!
//! Not here: what rustfmt and clippy can check.

mod direction;
mod features;
mod links;
mod manifests;
mod sources;

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use cargo_metadata::{Metadata, MetadataCommand};

use crate::run;

/// Something to put right.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Finding {
    /// Relative to the workspace.
    file: PathBuf,
    /// From 1; 0 for the file as a whole.
    line: usize,
    what: String,
}

impl Finding {
    fn new(file: impl Into<PathBuf>, line: usize, what: impl Into<String>) -> Self {
        Self { file: file.into(), line, what: what.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file.display(), self.line.max(1), self.what)
    }
}

/// A file of the project, as git sees it.
pub(crate) struct SourceFile {
    path: PathBuf,
    /// `None` when it is no UTF-8.
    text: Option<String>,
}

pub(crate) fn run() -> Result<()> {
    let findings = findings()?;
    for finding in &findings {
        eprintln!("{finding}");
    }
    if !findings.is_empty() {
        bail!("tidy found {} things to put right", findings.len());
    }
    eprintln!("tidy: nothing to put right");
    Ok(())
}

fn findings() -> Result<Vec<Finding>> {
    let metadata = metadata()?;
    let files = files(run::workspace())?;
    let mut findings = Vec::new();
    findings.extend(direction::check(&metadata));
    findings.extend(features::check()?);
    findings.extend(manifests::check(&metadata)?);
    findings.extend(sources::check(run::workspace(), &files));
    findings.extend(links::check(run::workspace(), &files));
    findings.sort();
    findings.dedup();
    Ok(findings)
}

/// Of the platform we build for; optional dependencies that nobody switched on are not in it.
fn metadata() -> Result<Metadata> {
    MetadataCommand::new()
        .manifest_path(run::workspace().join("Cargo.toml"))
        .other_options(["--filter-platform".to_owned(), "x86_64-unknown-linux-gnu".to_owned()])
        .exec()
        .context("cannot read the workspace's metadata")
}

/// Tracked files, and new ones that are not ignored. Where git does not answer (an unpacked archive, somebody else's
/// checkout), everything but the target folder.
fn files(workspace: &Path) -> Result<Vec<SourceFile>> {
    let listed = run::output(Command::new("git").current_dir(workspace).args([
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]));
    let names = match listed {
        Ok(listed) => listed.split('\0').filter(|name| !name.is_empty()).map(PathBuf::from).collect(),
        Err(_) => walk(workspace)?,
    };
    let mut files = Vec::new();
    for path in names {
        // Deleted but not yet committed as such.
        let Ok(bytes) = std::fs::read(workspace.join(&path)) else { continue };
        files.push(SourceFile { path, text: String::from_utf8(bytes).ok() });
    }
    Ok(files)
}

fn walk(workspace: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut waiting = vec![PathBuf::new()];
    while let Some(folder) = waiting.pop() {
        let entries = std::fs::read_dir(workspace.join(&folder));
        for entry in entries.with_context(|| format!("cannot list {}", folder.display()))? {
            let entry = entry.with_context(|| format!("cannot list {}", folder.display()))?;
            let path = folder.join(entry.file_name());
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                found.push(path);
            } else if path != Path::new("target") && path != Path::new(".git") {
                waiting.push(path);
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_walk_finds_what_git_lists() {
        let workspace = run::workspace();
        let listed = run::output(Command::new("git").current_dir(workspace).args(["ls-files", "-z", "xtask"])).unwrap();
        let walked = walk(workspace).unwrap();
        assert!(!walked.iter().any(|path| path.starts_with("target") || path.starts_with(".git/")));
        for name in listed.split('\0').filter(|name| !name.is_empty()) {
            assert!(walked.contains(&PathBuf::from(name)), "{name}");
        }
    }

    #[test]
    fn tidy_finds_nothing() {
        let findings = findings().unwrap();
        assert!(findings.is_empty(), "{}", findings.iter().map(|f| format!("\n{f}")).collect::<String>());
    }
}
