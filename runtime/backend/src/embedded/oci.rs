//! The OCI config that libcontainer is given: what Docker gives by default, minus the right to make device nodes.
//!
//! Cgroups are not in it beyond the path: we make the groups and write the limits ourselves (see `cgroup`).

use std::path::Path;

use serde_json::{Value, json};

use super::user::Identity;
use crate::ContainerSpec;
use crate::layout::{NOTIFY_INSIDE, NOTIFY_SOCKET};

/// Docker's default set without `CAP_MKNOD`: no device cgroup is needed then, which a pure v2 host would want as a BPF
/// program, because no process of the container can make a device node that `/dev` does not already have.
const CAPABILITIES: [&str; 13] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

const MASKED: [&str; 10] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];

const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Tells a program where to speak, by the conventions of systemd.
const NOTIFY_VARIABLE: &str = "NOTIFY_SOCKET";

/// Where programs are looked for when the image does not say.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Environment of the container: the image's, overridden by the spec's. `notify` is where the program may speak.
pub(crate) fn environment(spec: &ContainerSpec, notify: Option<&str>) -> Vec<String> {
    let mut ours = spec.env.clone();
    // What the image or a user says of it would be true somewhere else.
    ours.remove(NOTIFY_VARIABLE);
    ours.extend(notify.map(|path| (NOTIFY_VARIABLE.to_owned(), path.to_owned())));
    let mut env: Vec<String> = Vec::with_capacity(spec.image.env.len() + ours.len() + 1);
    let overridden =
        |line: &str| line.split_once('=').is_none_or(|(name, _)| ours.contains_key(name) || name == NOTIFY_VARIABLE);
    env.extend(spec.image.env.iter().filter(|line| !overridden(line)).cloned());
    env.extend(ours.iter().map(|(name, value)| format!("{name}={value}")));
    if !env.iter().any(|line| line.starts_with("PATH=")) {
        env.push(PATH.to_owned());
    }
    env
}

/// `files_max` is the limit on open files the container gets, `notify` the host's folder with its notification socket.
pub(crate) fn config(
    spec: &ContainerSpec,
    identity: &Identity,
    netns: &Path,
    cgroup: &Path,
    files_max: u64,
    notify: Option<&Path>,
) -> Value {
    let notify_inside = notify.map(|_| format!("{NOTIFY_INSIDE}/{NOTIFY_SOCKET}"));
    let args = spec.command.as_ref().unwrap_or(&spec.image.entrypoint);
    let tmpfs = |destination: &str, size: &str, mode: &str, extra: &[&str]| {
        let mut options: Vec<String> = ["nosuid", "nodev"].map(str::to_owned).to_vec();
        options.extend(extra.iter().map(|s| (*s).to_owned()));
        options.extend([format!("mode={mode}"), format!("size={size}")]);
        json!({"destination": destination, "type": "tmpfs", "source": "tmpfs", "options": options})
    };
    let mut mounts = vec![
        json!({"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]}),
        json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=64k"]}),
        json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]}),
        tmpfs("/dev/shm", "64m", "1777", &["noexec"]),
        json!({"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]}),
        json!({"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]}),
        tmpfs("/tmp", "64m", "1777", &[]),
    ];
    // Read-only: a socket can be written to all the same, but neither replaced nor removed.
    mounts.extend(notify.map(|folder| {
        json!({"destination": NOTIFY_INSIDE, "type": "bind", "source": folder,
             "options": ["bind", "nosuid", "noexec", "nodev", "ro"]})
    }));
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": {"uid": identity.uid, "gid": identity.gid, "additionalGids": identity.additional_gids},
            "args": args,
            "env": environment(spec, notify_inside.as_deref()),
            "cwd": spec.image.working_dir,
            "capabilities": {"bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": files_max, "soft": files_max}],
            "noNewPrivileges": true,
            "oomScoreAdj": 0
        },
        "root": {"path": "rootfs", "readonly": false},
        "hostname": spec.id.service.as_str(),
        "mounts": mounts,
        "linux": {
            "cgroupsPath": Path::new("/").join(cgroup),
            "namespaces": [
                {"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"},
                {"type": "network", "path": netns}
            ],
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY
        }
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use warmswap_model::{Generation, ImageRef, ServiceName};

    use super::*;
    use crate::{ContainerId, Limits, PreparedImage};

    fn spec() -> ContainerSpec {
        ContainerSpec {
            id: ContainerId { service: ServiceName::new("s").unwrap(), generation: Generation(1) },
            image: PreparedImage {
                image: ImageRef("/i".into()),
                digest: String::new(),
                entrypoint: vec!["/bin/x".into()],
                env: vec!["A=1".into(), "B=2".into(), "PATH=/opt".into(), "broken".into()],
                working_dir: "/".into(),
                user: String::new(),
                stop_signal: None,
                layers: vec![],
            },
            command: None,
            env: BTreeMap::from([("B".into(), "3".into())]),
            limits: Limits::default(),
        }
    }

    #[test]
    fn the_spec_overrides_the_environment_of_the_image() {
        let mut spec = spec();
        spec.image.env.push("NOTIFY_SOCKET=/elsewhere".into());
        assert_eq!(environment(&spec, None), ["A=1", "PATH=/opt", "B=3"]);
        assert_eq!(environment(&spec, Some("/here")), ["A=1", "PATH=/opt", "B=3", "NOTIFY_SOCKET=/here"]);
    }

    #[test]
    fn libcontainer_reads_the_config() {
        let value = config(&spec(), &Identity::ROOT, Path::new("/run/n"), Path::new("warmswap/s/g1"), 1024, None);
        let parsed: libcontainer::oci_spec::runtime::Spec = serde_json::from_value(value).unwrap();
        let linux = parsed.linux().as_ref().unwrap();
        assert!(linux.resources().is_none(), "limits are ours, not libcontainer's");
        assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/warmswap/s/g1")));
        assert!(!CAPABILITIES.contains(&"CAP_MKNOD"));
    }
}
