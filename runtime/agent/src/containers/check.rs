//! Which containers of other tools can be told apart here, for `warmswap check`.

use std::path::Path;

use warmswap_sensor::CgroupMounts;

use super::path::{Place, place};
use crate::api::Tool;

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OtherContainers {
    /// Whether each of them can be told from the host and from the others.
    pub ok: bool,
    pub detail: String,
    /// What to do about it; empty when nothing is wrong.
    pub remedy: String,
}

/// Looks at the cgroups of this host. Never fails: what cannot be looked at has no containers.
#[must_use]
pub fn check_other_containers() -> OtherContainers {
    let mounts = CgroupMounts::of_host().unwrap_or_default();
    let v2 = mounts.v2.as_deref().map(below).unwrap_or_default();
    let v1 = mounts.v1_block.as_deref().map(below).unwrap_or_default();
    judge(&v2, &v1)
}

/// From the paths of all groups of both hierarchies.
fn judge(v2: &[String], v1: &[String]) -> OtherContainers {
    let here = v2.iter().filter(|path| label(path).is_some()).count();
    let mut lost: Vec<String> = v1.iter().filter(|path| !v2.contains(path)).filter_map(|path| label(path)).collect();
    lost.sort();
    let found = match here {
        0 => "none is here now".to_owned(),
        n => format!("{n} found"),
    };
    if lost.is_empty() {
        return OtherContainers { ok: true, detail: found, remedy: String::new() };
    }
    let shown = lost.iter().take(3).cloned().collect::<Vec<_>>().join(", ");
    let more = if lost.len() > 3 { ", …" } else { "" };
    OtherContainers {
        ok: false,
        detail: format!(
            "{} of {} have no group in the v2 hierarchy ({shown}{more}): what they do is the host's, for top and trace",
            lost.len(),
            lost.len() + here
        ),
        remedy: "boot with a unified hierarchy (systemd.unified_cgroup_hierarchy=1), where their tools make v2 groups"
            .into(),
    }
}

fn label(path: &str) -> Option<String> {
    match place(path) {
        Place::Container { tool, name, .. } if tool != Tool::Cgroup => Some(format!("{tool} {name}")),
        _ => None,
    }
}

/// Paths of all folders below a root.
fn below(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut waiting = vec![String::new()];
    while let Some(path) = waiting.pop() {
        for name in super::tree::folders(&root.join(&path)) {
            let child = if path.is_empty() { name } else { format!("{path}/{name}") };
            waiting.push(child.clone());
            found.push(child);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_that_only_v1_knows_are_named() {
        let id = "3f2a91c0de4b5a6978877665544332211000ffeeddccbbaa9988776655443322";
        let v1 = [format!("docker/{id}"), "lxc.payload.web".into(), "batch".into(), "warmswap/shop/g1".into()];
        let both = judge(&v1, &v1);
        assert_eq!((both.ok, both.detail.as_str()), (true, "2 found"));
        let found = judge(&["lxc.payload.web".into()], &v1);
        assert!(!found.ok && !found.remedy.is_empty());
        assert!(
            found.detail.starts_with("1 of 2 have no group in the v2 hierarchy (docker 3f2a91c0de4b):"),
            "{}",
            found.detail
        );
        assert_eq!(judge(&[], &["batch".into()]).detail, "none is here now");
    }
}
