//! Whose a cgroup is, by its path: the forms that container tools give theirs. Pure text.
//!
//! Not here: which cgroups there are (`tree`), and whether they are watched (`others`).

use crate::api::Tool;

/// What a path says of its cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// Everything of a container is in it or below it.
    Container { tool: Tool, name: String, id: String },
    /// Of this host or in a container: no container by itself.
    Other,
}

/// Digits of an id that are shown, as Docker does.
const SHOWN: usize = 12;
/// Fewer than any tool's ids have.
const ID_MIN: usize = 12;
/// Digits of an id that stands alone, without a word that says whose it is.
const ID_BARE: usize = 64;

/// Groups of systemd, which is no container tool: its units are the host's own work, whatever they contain.
const UNITS: [&str; 7] = [".slice", ".service", ".scope", ".mount", ".socket", ".swap", ".target"];
/// Groups in which tools put theirs, and groups of what looks after a container.
const FOLDERS: [&str; 13] = [
    "docker",
    "buildx",
    "lxc",
    "lxc.payload",
    "lxc.monitor",
    "lxc.pivot",
    "libpod_parent",
    "kubepods",
    "default",
    "k8s.io",
    "moby",
    "machine",
    "user",
];
const HELPERS: [&str; 4] = ["lxc.monitor.", "libpod-conmon-", "crio-conmon-", "libpod_pod_"];

/// Ids with a word before them: the word, and whose it is.
const PREFIXES: [(&str, Tool); 7] = [
    ("docker-", Tool::Docker),
    ("cri-containerd-", Tool::Containerd),
    ("nerdctl-", Tool::Containerd),
    ("crio-", Tool::Crio),
    ("libpod-payload-", Tool::Podman),
    ("libpod-", Tool::Podman),
    ("ctr-", Tool::Containerd),
];

/// `path`: below the root of the v2 hierarchy, without a slash at either end.
pub(crate) fn place(path: &str) -> Place {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let Some((leaf, above)) = parts.split_last() else { return Place::Other };
    // Our own, whatever their names look like.
    if parts[0] == "warmswap" {
        return Place::Other;
    }
    if let Some((tool, name, id)) = tools_form(leaf, above) {
        return Place::Container { tool, name, id };
    }
    let inside = (1..parts.len()).any(|end| tools_form(parts[end - 1], &parts[..end - 1]).is_some());
    let of_host = parts.iter().any(|part| UNITS.iter().any(|unit| part.ends_with(unit)));
    let of_tool = parts.iter().any(|part| FOLDERS.contains(part) || HELPERS.iter().any(|word| part.starts_with(word)));
    if inside || of_host || of_tool {
        return Place::Other;
    }
    Place::Container { tool: Tool::Cgroup, name: path.trim_matches('/').to_owned(), id: String::new() }
}

/// Tool, name and id, when the last part of a path has the form of a container.
fn tools_form(leaf: &str, above: &[&str]) -> Option<(Tool, String, String)> {
    let parent = above.last().copied().unwrap_or_default();
    let with_id = |tool, id: &str| Some((tool, id[..SHOWN].to_owned(), id.to_owned()));
    let named = |tool, name: String| (!name.is_empty()).then(|| (tool, name, String::new()));

    let bare = leaf.strip_suffix(".scope").unwrap_or(leaf);
    for (prefix, tool) in PREFIXES {
        if let Some(id) = bare.strip_prefix(prefix).filter(|id| is_id(id)) {
            return with_id(tool, id);
        }
    }
    // A runtime that is told a slice but makes groups itself: SLICE:PREFIX:ID.
    if let Some((rest, id)) = leaf.rsplit_once(':').filter(|(_, id)| is_id(id)) {
        let word = rest.rsplit(':').next().unwrap_or_default();
        let tool = PREFIXES.into_iter().find(|(prefix, _)| prefix.strip_suffix('-') == Some(word));
        return with_id(tool.map_or(Tool::Kubernetes, |(_, tool)| tool), id);
    }
    if leaf.len() == ID_BARE && is_id(leaf) {
        let tool = match parent {
            "docker" | "moby" => Tool::Docker,
            "default" | "k8s.io" => Tool::Containerd,
            _ if above.iter().any(|part| part.starts_with("kubepods")) => Tool::Kubernetes,
            _ => Tool::Container,
        };
        return with_id(tool, leaf);
    }
    if let Some(name) = leaf.strip_prefix("lxc.payload.") {
        return named(Tool::Lxc, name.to_owned());
    }
    if parent == "lxc" || parent == "lxc.payload" {
        return named(Tool::Lxc, leaf.to_owned());
    }
    if let Some(name) = bare.strip_prefix("machine-").filter(|_| leaf.ends_with(".scope")) {
        let name = unescape(name);
        // libvirt says which driver and which number the machine has: qemu-3-name.
        let of_libvirt =
            ["qemu-", "lxc-", "xen-"].into_iter().find_map(|driver| name.strip_prefix(driver)?.split_once('-'));
        return match of_libvirt.filter(|(number, _)| number.bytes().all(|b| b.is_ascii_digit())) {
            Some((_, name)) => named(Tool::Libvirt, name.to_owned()),
            None => named(Tool::Nspawn, name),
        };
    }
    let service = leaf.strip_prefix("systemd-nspawn@")?.strip_suffix(".service")?;
    named(Tool::Nspawn, unescape(service))
}

fn is_id(text: &str) -> bool {
    text.len() >= ID_MIN && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// systemd writes what its unit names may not contain as `\xNN`.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("\\x") {
        bytes.extend_from_slice(&rest.as_bytes()[..at]);
        match rest.get(at + 2..at + 4).and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &rest[at + 4..];
            }
            None => {
                bytes.extend_from_slice(b"\\x");
                rest = &rest[at + 2..];
            }
        }
    }
    bytes.extend_from_slice(rest.as_bytes());
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "3f2a91c0de4b5a6978877665544332211000ffeeddccbbaa9988776655443322";

    fn short(path: &str) -> Option<(Tool, String)> {
        match place(&path.replace("ID", ID)) {
            Place::Container { tool, name, .. } => Some((tool, name)),
            Place::Other => None,
        }
    }

    #[test]
    fn the_forms_of_every_tool_are_known() {
        let by_id = [
            (Tool::Docker, "system.slice/docker-ID.scope"),
            (Tool::Docker, "docker/ID"),
            (Tool::Docker, "user.slice/user-1000.slice/user@1000.service/user.slice/docker-ID.scope"),
            (Tool::Docker, "docker/ID/docker/ID"),
            (
                Tool::Containerd,
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1a_2b.slice/cri-containerd-ID.scope",
            ),
            (
                Tool::Containerd,
                "system.slice/docker-ID.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod7.slice/cri-containerd-ID.scope",
            ),
            (Tool::Containerd, "system.slice/kubepods-burstable-pod1a.slice:cri-containerd:ID"),
            (Tool::Containerd, "system.slice/nerdctl-ID.scope"),
            (Tool::Containerd, "default/ID"),
            (Tool::Crio, "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod9.slice/crio-ID.scope"),
            (Tool::Crio, "kubepods/besteffort/pod9/crio-ID"),
            (Tool::Kubernetes, "kubepods/burstable/pod1a2b-3c/ID"),
            (Tool::Podman, "machine.slice/libpod-ID.scope"),
            (Tool::Podman, "user.slice/user-1000.slice/user@1000.service/user.slice/libpod-ID.scope"),
            (Tool::Podman, "libpod_parent/libpod-ID"),
            (Tool::Podman, "system.slice/web.service/libpod-payload-ID"),
            (Tool::Container, "my-own-parent/ID"),
        ];
        for (tool, path) in by_id {
            assert_eq!(short(path), Some((tool, "3f2a91c0de4b".to_owned())), "{path}");
        }
        let by_name = [
            (Tool::Lxc, "lxc.payload.web", "web"),
            (Tool::Lxc, "lxc.payload/web", "web"),
            (Tool::Lxc, "lxc/web", "web"),
            (Tool::Nspawn, "machine.slice/machine-web\\x2d1.scope", "web-1"),
            (Tool::Nspawn, "machine.slice/systemd-nspawn@web\\x2d1.service", "web-1"),
            (Tool::Libvirt, "machine.slice/machine-qemu\\x2d12\\x2dbuild\\x2dbox.scope", "build-box"),
            (Tool::Nspawn, "machine.slice/machine-qemu\\x2dlab.scope", "qemu-lab"),
            (Tool::Cgroup, "batch", "batch"),
            (Tool::Cgroup, "batch/night/job1", "batch/night/job1"),
        ];
        for (tool, path, name) in by_name {
            assert_eq!(short(path), Some((tool, name.to_owned())), "{path}");
        }
    }

    #[test]
    fn what_is_in_a_container_and_what_is_the_hosts_is_no_container_by_itself() {
        for path in [
            "",
            "init.scope",
            "system.slice",
            "system.slice/ssh.service",
            "system.slice/docker.service",
            "system.slice/web.service/workers",
            "user.slice/user-1000.slice/session-2.scope",
            "user.slice/user-1000.slice/user@1000.service/app.slice/app-x.scope",
            "docker",
            "docker/ID/init.scope",
            "docker/ID/system.slice/web.service",
            "docker/ID/workers/one",
            "system.slice/docker-ID.scope/libpod_parent",
            "machine.slice",
            "machine.slice/libpod-conmon-ID.scope",
            "machine.slice/libpod-ID.scope/container",
            "machine.slice/machine-web.scope/payload/system.slice",
            "machine.slice/machine-libpod_pod_ID.slice",
            "kubepods",
            "kubepods/burstable",
            "kubepods/burstable/pod1a2b",
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1a.slice",
            "kubepods.slice/kubepods-pod9.slice/crio-conmon-ID.scope",
            "lxc",
            "lxc.monitor.web",
            "lxc.payload.web/.lxc",
            "lxc.pivot",
            "warmswap",
            "warmswap/shop/g1",
            "warmswap/@0123/docker-ID.scope",
        ] {
            assert_eq!(place(&path.replace("ID", ID)), Place::Other, "{path}");
        }
    }

    #[test]
    fn names_that_nobody_checked_do_no_harm() {
        for path in [
            "docker-.scope",
            "docker-ä.scope",
            "a:b:",
            "machine-\\x.scope",
            "machine-\\xff.scope",
            "machine-.scope",
            "///",
            "ä/é",
        ] {
            let _ = place(path);
        }
        assert_eq!(unescape("a\\x2db\\xzz\\x"), "a-b\\xzz\\x");
        // Upper case and too few digits are no id.
        assert_eq!(place("system.slice/docker-3F2A91C0DE4B.scope"), Place::Other);
        assert_eq!(place("system.slice/docker-3f2a.scope"), Place::Other);
    }
}
