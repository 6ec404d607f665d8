//! Rules for files: which must exist, how long they may be, how modules begin, and that no path of somebody's
//! machine is in them.

use std::path::{Component, Path};

use super::{Finding, SourceFile};

const MUST_EXIST: [&str; 5] = ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "LICENSE-MIT", "LICENSE-APACHE"];

const LINES_MAX: usize = 700;

/// Files that may be longer, each with its reason.
const MAY_BE_LONGER: [(&str, &str); 0] = [];

pub(super) fn check(workspace: &Path, files: &[SourceFile]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for name in MUST_EXIST {
        if !files.iter().any(|f| f.path == Path::new(name)) {
            findings.push(Finding::new(name, 0, "is missing: write it"));
        }
    }
    let forbidden = machine_paths(workspace);
    for file in files {
        let Some(text) = &file.text else { continue };
        let rust = file.path.extension().is_some_and(|e| e == "rs");
        if rust
            && text.lines().count() > LINES_MAX
            && !MAY_BE_LONGER.iter().any(|(name, _)| file.path == Path::new(name))
        {
            let lines = text.lines().count();
            findings.push(Finding::new(
                &file.path,
                LINES_MAX,
                format!("has {lines} lines, at most {LINES_MAX} are allowed: split it by what changes together"),
            ));
        }
        let in_src = file.path.components().any(|c| c == Component::Normal("src".as_ref()));
        if rust && in_src && !begins_with_purpose(text) {
            findings.push(Finding::new(
                &file.path,
                1,
                "begin with `//!`: what the module is for, and what it is not for",
            ));
        }
        findings.extend(check_paths(&file.path, text, &forbidden));
    }
    findings
}

/// Attributes and ordinary comments may come before.
fn begins_with_purpose(text: &str) -> bool {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines
        .find(|line| !(line.starts_with("#!") || (line.starts_with("//") && !line.starts_with("//!"))))
        .is_some_and(|line| line.starts_with("//!"))
}

/// Where this clone lies, and the folder around it unless every machine has such a folder.
fn machine_paths(workspace: &Path) -> Vec<String> {
    let common = ["/", "/tmp", "/root", "/home", "/srv", "/opt", "/usr/src", "/var/tmp", "/mnt", "/src"];
    // Not every `/home/…`: the root of a container has such folders too.
    let home = std::env::home_dir();
    let mut paths = vec!["/root/.".to_owned()];
    for path in [Some(workspace), workspace.parent(), home.as_deref()].into_iter().flatten() {
        let text = path.to_string_lossy();
        if !common.contains(&text.as_ref()) && path.components().count() > 1 {
            paths.push(format!("{}/", text.trim_end_matches('/')));
        }
    }
    paths
}

fn check_paths(path: &Path, text: &str, forbidden: &[String]) -> Vec<Finding> {
    let mut findings = Vec::new();
    // This file has to name what it looks for.
    if path.ends_with("xtask/src/tidy/sources.rs") {
        return findings;
    }
    for (index, line) in text.lines().enumerate() {
        for beginning in forbidden {
            let absolute = line.match_indices(beginning.as_str()).any(|(at, _)| {
                let before = line[..at].chars().next_back();
                let after = line[at + beginning.len()..].chars().next();
                !before.is_some_and(|c| c.is_alphanumeric() || "._-~}>/".contains(c))
                    && after.is_some_and(|c| c.is_alphanumeric() || c == '.')
            });
            if absolute {
                let what = format!("names a folder of one machine ({beginning}…): make it relative or configurable");
                findings.push(Finding::new(path, index + 1, what));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: &str) -> SourceFile {
        SourceFile { path: path.into(), text: Some(text.to_owned()) }
    }

    fn findings_of(path: &str, text: &str) -> usize {
        let mut files: Vec<SourceFile> = MUST_EXIST.iter().map(|name| file(name, "")).collect();
        files.push(file(path, text));
        check(Path::new("/home/somebody/project"), &files).len()
    }

    #[test]
    fn each_rule_can_fail() {
        assert_eq!(findings_of("a/src/lib.rs", "//! For this.\n"), 0);
        assert_eq!(findings_of("a/src/lib.rs", "// licence\n#![no_std]\n//! For this.\n"), 0);
        assert_eq!(findings_of("a/src/lib.rs", "fn main() {}\n"), 1);
        assert_eq!(findings_of("a/src/lib.rs", &"//! x\n".repeat(LINES_MAX + 1)), 1);
        assert_eq!(findings_of("a.toml", "path = \"/home/somebody/project/x\"\n"), 2);
        assert_eq!(findings_of("a.toml", "path = \"target/home/somebody/x\"\n"), 0);
        assert_eq!(check(Path::new("/"), &[]).len(), MUST_EXIST.len());
    }
}
