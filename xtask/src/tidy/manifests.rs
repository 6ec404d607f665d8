//! What every package's manifest must say: the shared lints, the shared fields, versions decided in one place.

use std::path::Path;

use anyhow::{Context as _, Result};
use cargo_metadata::Metadata;

use super::Finding;

const SHARED_FIELDS: [&str; 5] = ["version", "edition", "rust-version", "license", "publish"];

pub(super) fn check(metadata: &Metadata) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for id in &metadata.workspace_members {
        let path = metadata[id].manifest_path.as_std_path();
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let relative = path.strip_prefix(metadata.workspace_root.as_std_path()).unwrap_or(path);
        findings.extend(check_manifest(relative, &text));
    }
    Ok(findings)
}

fn check_manifest(path: &Path, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut section = "";
    let mut inherits_lints = false;
    let mut described = false;
    let mut shared: Vec<&str> = SHARED_FIELDS.to_vec();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_end_matches(']');
            continue;
        }
        match section {
            "lints" => inherits_lints |= line.replace(' ', "") == "workspace=true",
            "package" => {
                let key = line.split(['.', ' ', '=']).next().unwrap_or(line);
                if line.contains("workspace = true") {
                    shared.retain(|field| *field != key);
                }
                described |= key == "description" && !line.ends_with("\"\"");
            }
            // A continued line of a list has no key.
            _ if section.ends_with("dependencies") && line.contains('=') && !line.contains("workspace = true") => {
                let what = "decide the version in the root Cargo.toml, here write `name.workspace = true`";
                findings.push(Finding::new(path, index + 1, what));
            }
            _ => {}
        }
    }
    if !inherits_lints {
        findings.push(Finding::new(path, 0, "add `[lints]` with `workspace = true`"));
    }
    if !described {
        findings.push(Finding::new(path, 0, "add a `description`: one line on what it is for"));
    }
    for field in shared {
        findings.push(Finding::new(path, 0, format!("write `{field}.workspace = true`")));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "[package]\nname = \"x\"\ndescription = \"d\"\nversion.workspace = true\n\
        edition.workspace = true\nrust-version.workspace = true\nlicense.workspace = true\npublish.workspace = true\n\
        [lints]\nworkspace = true\n[dependencies]\nserde.workspace = true\n\
        clap = { workspace = true, features = [\"env\"] }\n[features]\na = []\n";

    fn problems(text: &str) -> usize {
        check_manifest(Path::new("Cargo.toml"), text).len()
    }

    #[test]
    fn each_rule_can_fail() {
        assert_eq!(problems(GOOD), 0);
        assert_eq!(problems(&GOOD.replace("[lints]\nworkspace = true\n", "")), 1);
        assert_eq!(problems(&GOOD.replace("edition.workspace = true", "edition = \"2024\"")), 1);
        assert_eq!(problems(&GOOD.replace("serde.workspace = true", "serde = \"1\"")), 1);
        assert_eq!(problems(&GOOD.replace("description = \"d\"\n", "")), 1);
    }
}
