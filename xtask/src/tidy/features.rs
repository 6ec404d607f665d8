//! burn takes minutes to compile. `cargo build --release` and the tests use the same compiled burn only if the tests'
//! own dependencies switch on no further feature of anything below burn; this compares the two.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;

use super::Finding;
use crate::run;

pub(super) fn check() -> Result<Vec<Finding>> {
    let built = features(&tree("normal,build")?);
    let tested = features(&tree("normal,build,dev")?);
    let below_burn: BTreeSet<String> = features(&run::output(run::cargo().args([
        "tree",
        "--package=warmswap-forecast",
        "--edges=normal,build",
        "--prefix=none",
        "--format={p}|{f}",
    ]))?)
    .into_keys()
    .collect();
    Ok(compare(&built, &tested, &below_burn))
}

/// Of the default members, as `cargo build` sees them.
fn tree(edges: &str) -> Result<String> {
    run::output(run::cargo().args(["tree", "--edges", edges, "--prefix=none", "--format={p}|{f}"]))
}

/// `name v1.2.3 (/path) (*)|a,b` → features by name and version. The same package may be there more than once (for
/// the host and for the target): all its variants count.
fn features(tree: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut packages: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in tree.lines() {
        let Some((package, features)) = line.split_once('|') else { continue };
        let package = package.split(" (").next().unwrap_or(package);
        packages.entry(package.to_owned()).or_default().insert(features.trim_end_matches(" (*)").to_owned());
    }
    packages
}

fn compare(
    built: &BTreeMap<String, BTreeSet<String>>,
    tested: &BTreeMap<String, BTreeSet<String>>,
    below_burn: &BTreeSet<String>,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (package, variants) in built.iter().filter(|(package, _)| below_burn.contains(*package)) {
        for other in tested.get(package).into_iter().flatten().filter(|other| !variants.contains(*other)) {
            findings.push(Finding::new(
                "Cargo.toml",
                0,
                format!(
                    "the tests compile {package} with the features [{other}], a plain build with {variants:?}, so \
                     burn is compiled twice: name the missing features in a normal dependency, or do without"
                ),
            ));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_feature_that_only_tests_switch_on_is_found_below_burn_only() {
        let built = features("burn v0.22.0|std\nrand v0.9.0|std (*)\nx v1.0.0 (proc-macro)|\n");
        let tested = features("burn v0.22.0|std\nrand v0.9.0|small,std\nx v1.0.0 (proc-macro)|extra\n");
        let below = BTreeSet::from(["burn v0.22.0".to_owned(), "rand v0.9.0".to_owned()]);
        assert_eq!(compare(&built, &tested, &below).len(), 1);
        assert_eq!(compare(&built, &built, &below), []);
    }
}
