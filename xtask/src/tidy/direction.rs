//! Which room may know which, and where heavy dependencies may be. See ARCHITECTURE.md for the reasons.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use cargo_metadata::{DependencyKind, Metadata, PackageId};

use super::Finding;

/// Every package of the workspace with the others it may depend on (development dependencies apart).
/// *Decide* (model, forecast, policy) knows nothing that acts; handover knows the back-end contract and never
/// forecasts; what a service links (sdk) stays apart from the runtime.
const MAY_KNOW: [(&str, &[&str]); 22] = [
    ("warmswap-events", &[]),
    ("warmswap-probes", &["warmswap-events"]),
    ("warmswap-model", &[]),
    ("warmswap-sensor", &["warmswap-events", "warmswap-model"]),
    ("warmswap-history", &["warmswap-model"]),
    ("warmswap-forecast", &["warmswap-model"]),
    ("warmswap-policy", &["warmswap-model"]),
    ("warmswap-transfer", &["warmswap-model"]),
    ("warmswap-sdk", &["warmswap-transfer"]),
    ("warmswap-sdk-c", &["warmswap-sdk"]),
    ("warmswap-backend", &["warmswap-model", "warmswap-transfer"]),
    ("warmswap-handover", &["warmswap-model", "warmswap-backend", "warmswap-transfer"]),
    (
        "warmswap-agent",
        &[
            "warmswap-model",
            "warmswap-sensor",
            "warmswap-history",
            "warmswap-forecast",
            "warmswap-policy",
            "warmswap-backend",
            "warmswap-handover",
            "warmswap-transfer",
        ],
    ),
    (
        "warmswap",
        &[
            "warmswap-model",
            "warmswap-agent",
            "warmswap-backend",
            "warmswap-sensor",
            "warmswap-load",
            "warmswap-report",
            "warmswap-rootfs",
        ],
    ),
    ("warmswap-report", &["warmswap-model", "warmswap-load"]),
    ("warmswap-load", &["warmswap-model"]),
    ("warmswap-rootfs", &[]),
    (
        "warmswap-bench",
        &[
            "warmswap-model",
            "warmswap-load",
            "warmswap-rootfs",
            "warmswap-backend",
            "warmswap-handover",
            "warmswap-transfer",
            "warmswap-sensor",
            "warmswap-forecast",
            "warmswap-policy",
        ],
    ),
    ("warmswap-tests", &["warmswap-model", "warmswap-load", "warmswap-rootfs", "warmswap-sdk"]),
    ("session-store", &["warmswap-sdk"]),
    ("scoreboard", &["warmswap-sdk"]),
    ("xtask", &["warmswap-rootfs"]),
];

/// A dependency (or all that begin with it, when it ends in `*`), and the only packages that may name it.
const ONLY_UNDER: [(&str, &[&str]); 5] = [
    ("burn*", &["warmswap-forecast"]),
    ("aya*", &["warmswap-sensor", "warmswap-probes"]),
    ("libcontainer", &["warmswap-backend"]),
    ("redb", &["warmswap-history"]),
    ("tokio", &["warmswap-agent", "warmswap"]),
];

/// Nothing in these packages' whole dependency tree may be of the list: decisions do no I/O, a service links little.
const NEVER_IN_TREE: [(&str, &[&str]); 5] = [
    ("warmswap-model", &["libc", "nix", "rustix", "tokio", "mio", "hyper", "aya", "burn"]),
    ("warmswap-policy", &["libc", "nix", "rustix", "tokio", "mio", "hyper", "aya", "burn"]),
    ("warmswap-forecast", &["nix", "tokio", "mio", "hyper", "aya"]),
    ("warmswap-handover", &["tokio", "burn", "aya", "hyper"]),
    ("warmswap-sdk", &["tokio", "burn", "aya", "hyper", "nix", "serde_json"]),
];

/// How many packages a service links with the SDK, itself included. Raise it only for something worth its place in
/// every service.
const SDK_TREE_MAX: usize = 40;

pub(super) fn check(metadata: &Metadata) -> Vec<Finding> {
    check_graph(&Graph::of(metadata))
}

/// The part of the metadata that matters here, so that tests can make one up.
#[derive(Default)]
struct Graph {
    /// Member, its manifest, its direct dependencies without development ones.
    members: BTreeMap<String, (PathBuf, BTreeSet<String>)>,
    /// Everything that is linked or used to build it, direct and indirect, itself included, by member.
    trees: BTreeMap<String, BTreeSet<String>>,
}

impl Graph {
    fn of(metadata: &Metadata) -> Self {
        let mut graph = Self::default();
        let Some(resolve) = &metadata.resolve else { return graph };
        let name = |id: &PackageId| metadata[id].name.to_string();
        let direct: BTreeMap<&PackageId, BTreeSet<&PackageId>> = resolve
            .nodes
            .iter()
            .map(|node| {
                let counts = |kind: DependencyKind| kind != DependencyKind::Development;
                let linked = node.deps.iter().filter(|d| d.dep_kinds.iter().any(|k| counts(k.kind)));
                (&node.id, linked.map(|d| &d.pkg).collect())
            })
            .collect();
        for id in &metadata.workspace_members {
            let manifest = metadata[id].manifest_path.strip_prefix(&metadata.workspace_root);
            let manifest = manifest.map(|m| m.as_std_path().to_owned()).unwrap_or_default();
            let named = direct.get(id).into_iter().flatten().map(|d| name(d)).collect();
            graph.members.insert(name(id), (manifest, named));
            let mut seen = BTreeSet::from([id]);
            let mut waiting = vec![id];
            while let Some(next) = waiting.pop() {
                for dependency in direct.get(next).into_iter().flatten() {
                    if seen.insert(dependency) {
                        waiting.push(dependency);
                    }
                }
            }
            graph.trees.insert(name(id), seen.into_iter().map(name).collect());
        }
        graph
    }
}

fn check_graph(graph: &Graph) -> Vec<Finding> {
    let mut findings = Vec::new();
    let rules: BTreeMap<&str, &[&str]> = MAY_KNOW.into_iter().collect();
    for (member, (manifest, direct)) in &graph.members {
        let Some(may_know) = rules.get(member.as_str()) else {
            findings.push(Finding::new(
                manifest,
                0,
                format!("{member} is new: say in MAY_KNOW of xtask/src/tidy/direction.rs which rooms it may know"),
            ));
            continue;
        };
        for other in direct.iter().filter(|d| graph.members.contains_key(*d)) {
            if !may_know.contains(&other.as_str()) {
                findings.push(Finding::new(
                    manifest,
                    0,
                    format!(
                        "{member} must not depend on {other}: move the code, or what it needs into a room below both"
                    ),
                ));
            }
        }
        for dependency in direct {
            for (pattern, allowed) in ONLY_UNDER {
                if matches(pattern, dependency) && !allowed.contains(&member.as_str()) {
                    let place = allowed.join(" and ");
                    findings.push(Finding::new(
                        manifest,
                        0,
                        format!("{dependency} may be used only in {place}: ask for it through that room's interface"),
                    ));
                }
            }
        }
    }
    for (member, forbidden) in NEVER_IN_TREE {
        let (Some(tree), Some((manifest, _))) = (graph.trees.get(member), graph.members.get(member)) else { continue };
        for name in forbidden.iter().filter(|name| tree.contains(**name)) {
            findings.push(Finding::new(
                manifest,
                0,
                format!(
                    "{member} brings in {name}; see `cargo tree -p {member} -i {name}` and take away what needs it"
                ),
            ));
        }
    }
    let sdk = (graph.trees.get("warmswap-sdk"), graph.members.get("warmswap-sdk"));
    if let (Some(tree), Some((manifest, _))) = sdk
        && tree.len() > SDK_TREE_MAX
    {
        let what =
            format!("the SDK brings {} packages into every service, at most {SDK_TREE_MAX} are allowed", tree.len());
        findings.push(Finding::new(manifest, 0, what));
    }
    findings
}

fn matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(beginning) => name == beginning || name.strip_prefix(beginning).is_some_and(|rest| rest.starts_with('-')),
        None => pattern == name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graph(members: &[(&str, &[&str])]) -> Graph {
        let mut graph = Graph::default();
        for (name, direct) in members {
            let direct: BTreeSet<String> = direct.iter().map(|d| (*d).to_owned()).collect();
            graph.trees.insert((*name).to_owned(), direct.clone());
            graph.members.insert((*name).to_owned(), (PathBuf::from("Cargo.toml"), direct));
        }
        graph
    }

    fn problems(members: &[(&str, &[&str])]) -> usize {
        check_graph(&graph(members)).len()
    }

    #[test]
    fn each_rule_can_fail() {
        let good: [(&str, &[&str]); 3] =
            [("warmswap-model", &["serde"]), ("warmswap-forecast", &["warmswap-model", "burn"]), ("warmswap-sdk", &[])];
        assert_eq!(problems(&good), 0);
        // handover forecasts; burn outside forecast (twice over: named, and in the tree)
        assert_eq!(problems(&[("warmswap-forecast", &[]), ("warmswap-handover", &["warmswap-forecast"])]), 1);
        assert_eq!(problems(&[("warmswap-agent", &["burn-core"])]), 1);
        assert_eq!(problems(&[("warmswap-policy", &["libc"])]), 1);
        assert_eq!(problems(&[("warmswap-unheard-of", &[])]), 1);
        let many: Vec<String> = (0..=SDK_TREE_MAX).map(|i| format!("p{i}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(problems(&[("warmswap-sdk", &many)]), 1);
    }

    #[test]
    fn patterns_match_whole_words() {
        assert!(matches("aya*", "aya") && matches("aya*", "aya-ebpf") && matches("redb", "redb"));
        assert!(!matches("aya*", "ayatana") && !matches("redb", "redbx"));
    }
}
