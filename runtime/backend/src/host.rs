//! What the host has, what it can do, and what of ours is on it.

use std::ffi::CString;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::cgroup::{Hierarchies, file_error};
use crate::{BackendError, HostCapacity};

pub(crate) fn capacity() -> Result<HostCapacity, BackendError> {
    let path = Path::new("/proc/meminfo");
    let text = fs::read_to_string(path).map_err(file_error("read", path))?;
    #[expect(clippy::cast_precision_loss, reason = "2^53 KiB is more memory than any host has")]
    let mb = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.trim().strip_suffix("kB")?.trim().parse().ok())
            .map_or(0.0, |kib: u64| kib as f64 / 1024.0)
    };
    // Those this process may use: a runtime that is confined cannot give more.
    let cpus = std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX));
    Ok(HostCapacity { cpus, memory_mb_available: mb("MemAvailable"), memory_mb_total: mb("MemTotal") })
}

/// Processes whose command line has all these words after its first, one after the other.
pub(crate) fn processes_with_arguments(words: &[&[u8]]) -> Vec<String> {
    let mut found = Vec::new();
    for pid in crate::layout::folder_names(Path::new("/proc")) {
        if !pid.bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let args: Vec<&[u8]> = command.split(|b| *b == 0).collect();
        if args.get(1..).is_some_and(|rest| rest.starts_with(words)) {
            found.push(format!("process {pid} ({})", String::from_utf8_lossy(args[0])));
        }
    }
    found
}

/// A cgroup and everything below it, with the processes inside.
pub(crate) fn describe_cgroup(folder: &Path, out: &mut Vec<String>) {
    out.push(format!("cgroup {}", folder.display()));
    for pid in fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default().lines() {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        out.push(format!("process {pid} ({}) in {}", name.trim(), folder.display()));
    }
    for name in crate::layout::folder_names(folder) {
        let child = folder.join(&name);
        // Folders with '@' belong to runtimes with another run folder.
        if !name.starts_with('@') && child.is_dir() {
            describe_cgroup(&child, out);
        }
    }
}

/// Mount points in this mount namespace at or below a folder, outer ones first.
pub(crate) fn mounts_below(folder: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    text.lines()
        .filter_map(|line| line.split(' ').nth(4))
        // Spaces and the like are written as octal; our own folders have none below the run folder.
        .map(|point| PathBuf::from(point.replace("\\040", " ")))
        .filter(|point| point.starts_with(folder))
        .collect()
}

/// One thing the embedded back end wants of a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub name: String,
    pub ok: bool,
    pub detail: String,
    /// What to do about it; empty when nothing is wrong.
    pub remedy: String,
}

impl Finding {
    fn new(name: &str, found: Result<String, String>, remedy: &str) -> Self {
        let (ok, detail) = match found {
            Ok(detail) => (true, detail),
            Err(detail) => (false, detail),
        };
        Self { name: name.to_owned(), ok, detail, remedy: if ok { String::new() } else { remedy.to_owned() } }
    }
}

/// What this host can and cannot do for containers. Changes nothing.
#[must_use]
pub fn check() -> Vec<Finding> {
    let root = nix::unistd::geteuid().is_root();
    let mut findings = vec![Finding::new(
        "root",
        if root { Ok("yes".into()) } else { Err("this is an ordinary user".into()) },
        "run warmswap as root: namespaces and cgroups need it",
    )];
    match Hierarchies::detect() {
        Ok(hierarchies) => {
            let kind = if hierarchies.v1.is_empty() { "alone" } else { "beside v1 (hybrid)" };
            let detail = format!("{} at {}", kind, hierarchies.v2.display());
            findings.push(Finding::new("cgroup v2", Ok(detail), ""));
            for (controller, v2_name) in
                [("cpu", "cpu"), ("cpuset", "cpuset"), ("memory", "memory"), ("disk weights", "io"), ("pids", "pids")]
            {
                findings.push(check_controller(&hierarchies, controller, v2_name));
            }
        }
        Err(error) => findings.push(Finding::new("cgroup v2", Err(error.to_string()), "mount it at /sys/fs/cgroup")),
    }
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    findings.push(Finding::new(
        "overlayfs",
        if filesystems.split_ascii_whitespace().any(|word| word == "overlay") {
            Ok("yes".into())
        } else if has_module("overlay") {
            Ok("as a module".into())
        } else {
            Err("unknown to the kernel".into())
        },
        "load the module: modprobe overlay",
    ));
    for name in ["mnt", "pid", "net", "ipc", "uts"] {
        let exists = Path::new("/proc/self/ns").join(name).exists();
        let found = if exists { Ok("yes".into()) } else { Err("missing in the kernel".into()) };
        findings.push(Finding::new(&format!("{name} namespace"), found, "use a kernel with CONFIG_NAMESPACES"));
    }
    let me = crate::process::ProcessId::own();
    let pidfd = me.and_then(crate::process::ProcessId::pidfd).map(|_| "yes".to_owned());
    findings.push(Finding::new("pidfd", pidfd.ok_or("pidfd_open is refused".into()), "use Linux 5.3 or later"));
    findings.push(Finding::new("memfd seals", check_seals(), "use Linux 5.1 or later"));
    findings
}

fn check_controller(hierarchies: &Hierarchies, name: &str, controller: &str) -> Finding {
    let v1_name = if controller == "io" { "blkio" } else { controller };
    let found = if hierarchies.has_v2(controller) {
        Ok("in v2".to_owned())
    } else if let Some(path) = hierarchies.v1.get(v1_name) {
        // The weights of v1 exist only with a proportional I/O scheduler.
        let has_weight = ["blkio.weight", "blkio.bfq.weight"].iter().any(|file| path.join(file).exists());
        if controller == "io" && !has_weight {
            Err(format!("the v1 controller at {} has no weights", path.display()))
        } else {
            Ok(format!("in v1 at {}", path.display()))
        }
    } else {
        Err("missing: its limits are left out".to_owned())
    };
    let remedy = match controller {
        "io" => "choose the bfq I/O scheduler, or boot with cgroup v2 alone",
        _ => "enable the controller (kernel command line: cgroup_enable), or boot with cgroup v2 alone",
    };
    Finding::new(&format!("cgroup {name}"), found, remedy)
}

/// Whether the running kernel could load it.
fn has_module(name: &str) -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let list = fs::read_to_string(format!("/lib/modules/{}/modules.dep", release.trim())).unwrap_or_default();
    list.lines().filter_map(|line| line.split(':').next()).any(|path| path.contains(&format!("/{name}.ko")))
}

/// The seals that shared state stands on.
fn check_seals() -> Result<String, String> {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let name = CString::new("warmswap-check").map_err(|error| error.to_string())?;
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let fd = memfd_create(name.as_c_str(), flags).map_err(|errno| format!("memfd_create: {errno}"))?;
    // F_SEAL_FUTURE_WRITE
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::from_bits_retain(libc::F_SEAL_FUTURE_WRITE);
    fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).map_err(|errno| format!("F_ADD_SEALS: {errno}"))?;
    Ok("shrink, grow, future write".to_owned())
}
