//! What a test needs of the machine, and how it says that it was left out.

use std::fs;
use std::path::Path;

/// Something a machine may lack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Requirement {
    /// Root, overlayfs and a cgroup v2 hierarchy.
    Containers,
    /// The kernel loads BPF programs and describes its types.
    Bpf,
    /// A program on PATH (or in the usual folders for administrators' programs).
    Program(&'static str),
}

/// Says that `test` could not run here. `cargo xtask test` collects these lines, word for word, and
/// `--require-all` makes failures of them.
pub fn left_out(test: &str, reason: &str) {
    println!("LEFT OUT: {test}: {reason}");
}

/// The first requirement that is not met, as a reason.
#[must_use]
pub fn missing(requirements: &[Requirement]) -> Option<String> {
    requirements.iter().find_map(|requirement| match requirement {
        Requirement::Containers => no_containers(),
        Requirement::Bpf => no_bpf(),
        Requirement::Program(name) => no_program(name),
    })
}

fn no_containers() -> Option<String> {
    // SAFETY: geteuid takes nothing, changes nothing and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        return Some("it needs root".to_owned());
    }
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !filesystems.lines().any(|line| line.ends_with("\toverlay")) {
        return Some("the kernel has no overlayfs (module overlay)".to_owned());
    }
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    if !mounts.lines().any(|line| line.split(' ').nth(2) == Some("cgroup2")) {
        return Some("no cgroup v2 hierarchy is mounted".to_owned());
    }
    None
}

fn no_bpf() -> Option<String> {
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        return Some("the kernel does not describe its types (no /sys/kernel/btf/vmlinux)".to_owned());
    }
    crate::bpf::objects().err().map(|error| format!("the kernel does not let us list BPF objects: {error}"))
}

fn no_program(name: &str) -> Option<String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|folder: std::path::PathBuf| folder.join(name).is_file());
    (!found).then(|| format!("{name} is not installed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(missing(&[Requirement::Program("sh")]), None);
        let reason = missing(&[Requirement::Program("sh"), Requirement::Program("no-such-program")]).unwrap();
        assert!(reason.contains("no-such-program"), "{reason}");
    }
}
