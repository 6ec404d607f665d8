//! Links in Markdown files that point into the project must point at something.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use super::{Finding, SourceFile};

pub(super) fn check(workspace: &Path, files: &[SourceFile]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in files.iter().filter(|f| is_markdown(&f.path)) {
        let Some(text) = &file.text else { continue };
        for (line, target) in links(text) {
            if let Err(what) = check_target(workspace, &file.path, text, &target) {
                findings.push(Finding::new(&file.path, line, what));
            }
        }
    }
    findings
}

fn is_markdown(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "md")
}

fn check_target(workspace: &Path, file: &Path, text: &str, target: &str) -> Result<(), String> {
    if target.contains("://") || target.starts_with("mailto:") {
        return Ok(());
    }
    let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
    let other;
    let text = if path.is_empty() {
        text
    } else {
        let from = file.parent().unwrap_or(Path::new(""));
        let found = normal(&from.join(path)).filter(|p| workspace.join(p).exists());
        let Some(found) = found else {
            return Err(format!(
                "links to {path}, which does not exist: correct the path (it is relative to this file)"
            ));
        };
        if anchor.is_empty() || !is_markdown(&found) {
            return Ok(());
        }
        other = std::fs::read_to_string(workspace.join(&found)).map_err(|e| format!("cannot read {path}: {e}"))?;
        &other
    };
    if anchor.is_empty() || anchors(text).iter().any(|a| a == anchor) {
        return Ok(());
    }
    Err(format!("links to #{anchor}, but no heading there has that name: use one of its headings"))
}

/// Without `.` and `..`; `None` when it leaves the workspace.
fn normal(path: &Path) -> Option<PathBuf> {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir if normal.pop() => {}
            Component::Normal(name) => normal.push(name),
            _ => return None,
        }
    }
    Some(normal)
}

/// Lines outside fenced code, with their numbers from 1 and without what stands in backquotes.
fn prose(text: &str) -> impl Iterator<Item = (usize, String)> {
    let mut fenced = false;
    text.lines().enumerate().filter_map(move |(index, line)| {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
            return None;
        }
        (!fenced).then(|| (index + 1, line.split('`').step_by(2).collect::<Vec<_>>().join(" ")))
    })
}

/// `[text](target)` and `[name]: target`.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (number, line) in prose(text) {
        for (at, _) in line.match_indices("](") {
            let rest = &line[at + 2..];
            if let Some(end) = rest.find(')') {
                let target = rest[..end].split_whitespace().next().unwrap_or("");
                found.push((number, target.trim_matches(['<', '>']).to_owned()));
            }
        }
        if let Some((_, target)) = line.strip_prefix('[').and_then(|rest| rest.split_once("]: ")) {
            found.push((number, target.split_whitespace().next().unwrap_or("").to_owned()));
        }
    }
    found
}

/// The names that code hosts give to headings: lower case, spaces to hyphens, punctuation gone, repeated ones
/// numbered.
fn anchors(text: &str) -> Vec<String> {
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    let mut anchors = Vec::new();
    let mut fenced = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        }
        let heading = line.trim_start_matches('#');
        if fenced || heading.len() == line.len() || !heading.starts_with(' ') {
            continue;
        }
        let kept = heading.trim().to_lowercase();
        let kept = kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
        let name: String = kept.map(|c| if c == ' ' { '-' } else { c }).collect();
        let times = seen.entry(name.clone()).or_default();
        anchors.push(if *times == 0 { name } else { format!("{name}-{times}") });
        *times += 1;
    }
    anchors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_links_are_found_and_code_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let other = "# One\n\n## Two words: `x`\n## One\n";
        std::fs::create_dir(folder.path().join("docs")).unwrap();
        std::fs::write(folder.path().join("docs/other.md"), other).unwrap();
        let text = "# Top\n[a](docs/other.md) [b](docs/other.md#two-words-x) [c](#top) [d](https://x.y/#z)\n\
                    [e](docs/other.md#one-1)\n```\n[f](absent)\n```\n`[g](absent)`\n\
                    [h](absent.md)\n[i](docs/other.md#absent)\n[j](../outside)\n[k](#absent)\n[l]: absent\n";
        let file = SourceFile { path: PathBuf::from("README.md"), text: Some(text.to_owned()) };
        let lines: Vec<usize> = check(folder.path(), &[file]).iter().map(|f| f.line).collect();
        assert_eq!(lines, [8, 9, 10, 11, 12]);
    }
}
