//! Debian packages. On other systems it says what to install by hand.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::run;

/// Package, a program that proves it is usable, why it is needed.
/// Kept short: each entry is a minute of somebody's time. A C compiler is not among them: without one xtask itself
/// could not have been built.
const PACKAGES: [(&str, &str, &str); 13] = [
    (
        "redis-tools",
        "redis-benchmark",
        "redis-cli and redis-benchmark are the independent clients of the example service",
    ),
    ("iproute2", "ip", "tests look at network namespaces and sockets with it"),
    ("qemu-system-x86", "qemu-system-x86_64", "runs tests on other kernels, with pure cgroup v2"),
    ("busybox-static", "busybox", "is the first program of those virtual machines"),
    // Not docker.io and criu, the benchmark's other peers: the one starts a daemon and changes the packet filter, the
    // other does not work on newer kernels.
    ("runc", "runc", "the benchmark compares handovers with restarts under it"),
    ("bpftrace", "bpftrace", "the benchmark compares the probes with it"),
    ("libbpf-tools", "execsnoop", "the benchmark compares the probes with its tools"),
    ("wrk", "wrk", "is the client of the servers that we did not write"),
    ("gunicorn", "gunicorn", "is a server that we did not write: tests update it in a container of its own"),
    ("haproxy", "haproxy", "is another, which drains in its own way"),
    ("lighttpd", "lighttpd", "is another, which says nothing about itself"),
    ("pkgconf", "pkg-config", "tells the C compiler where the SDK lies: tests build the example in C as a user would"),
    ("python3", "/usr/bin/python3", "is packed into the container of the example in Python"),
];
/// Their packages would start a server on the user's machine, now and whenever it starts.
const SERVERS: [&str; 2] = ["haproxy", "lighttpd"];
/// Asked by every package before it starts a server; 101 means no.
const POLICY: &str = "/usr/sbin/policy-rc.d";

const LOCK_WAIT_MAX: Duration = Duration::from_secs(900);
const LOCK_WAIT_STEP: Duration = Duration::from_secs(5);

/// Returns how many packages it installed.
pub(super) fn install_missing() -> Result<usize> {
    let installed = install_packages()?;
    Ok(installed + usize::from(name_redis_server()?))
}

/// The server that the load is tested against. redis-tools has it already, as one program under several names; the
/// package redis-server would add the name, and start a server on the user's machine.
fn name_redis_server() -> Result<bool> {
    let name = run::tools().join("bin/redis-server");
    let program = Path::new("/usr/bin/redis-check-rdb");
    if found("redis-server") || name.exists() || !program.is_file() {
        return Ok(false);
    }
    let folder = run::tools().join("bin");
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    match std::os::unix::fs::symlink(program, &name) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(error).with_context(|| format!("cannot create {}", name.display()))
        }
        _ => {
            eprintln!("setup: redis-server is now {}: tests check the load against the real thing", name.display());
            Ok(true)
        }
    }
}

fn install_packages() -> Result<usize> {
    let mut missing = missing();
    if missing.is_empty() {
        return Ok(0);
    }
    for (package, _, why) in &missing {
        eprintln!("setup: {package} is missing: {why}");
    }
    let names: Vec<&str> = missing.iter().map(|(package, ..)| *package).collect();
    let by_hand = format!("install by hand: {}", names.join(" "));
    if !run::on_path("apt-get") {
        bail!("there is no apt-get here; {by_hand}");
    }
    let Some(root) = as_root() else {
        bail!("neither root nor sudo: run `apt-get install {}` as root", names.join(" "));
    };

    // An earlier installation that was cut off leaves packages unpacked but not configured, and apt refuses to go on.
    if Command::new("dpkg").arg("--audit").output().is_ok_and(|o| !o.stdout.is_empty()) {
        eprintln!("setup: an earlier installation was cut off, finishing it");
        apt(&root, "dpkg", &["--configure", "-a"])?;
    }
    // Not fatal by itself: one unreachable source that has nothing to do with us must not stop the rest.
    if let Err(error) = apt(&root, "apt-get", &["update", "--quiet=1"]) {
        eprintln!("setup: {error:#}; trying with the package lists that are there");
    }
    let install = ["install", "--yes", "--no-install-recommends", "--quiet=1"];
    let servers: Vec<&str> = SERVERS.into_iter().filter(|server| names.contains(server)).collect();
    let quiet = NothingStarts::begin(&root, &servers)?;
    let done = apt(&root, "apt-get", &[&install[..], &names].concat()).with_context(|| by_hand.clone());
    quiet.end()?;
    done?;

    let installed = missing.len();
    missing = self::missing();
    if let Some((package, proof, _)) = missing.first() {
        bail!("{package} was installed but {proof} is still not there; is its folder on PATH?");
    }
    Ok(installed)
}

/// While it lasts, packages start no servers.
struct NothingStarts<'a> {
    root: &'a [&'static str],
    servers: &'a [&'static str],
    policy_is_ours: bool,
}

impl<'a> NothingStarts<'a> {
    fn begin(root: &'a [&'static str], servers: &'a [&'static str]) -> Result<Self> {
        let policy_is_ours = !servers.is_empty() && !Path::new(POLICY).exists();
        if policy_is_ours {
            let script = format!("printf '#!/bin/sh\\nexit 101\\n' >{POLICY} && chmod 755 {POLICY}");
            as_root_do(root, &["sh", "-c", &script])?;
        }
        Ok(Self { root, servers, policy_is_ours })
    }

    fn end(self) -> Result<()> {
        if self.policy_is_ours {
            as_root_do(self.root, &["rm", "-f", POLICY])?;
        }
        let disable = [&["systemctl", "disable", "--quiet"], self.servers].concat();
        if !self.servers.is_empty() && run::on_path("systemctl") {
            as_root_do(self.root, &disable)?;
        }
        Ok(())
    }
}

fn as_root_do(root: &[&'static str], words: &[&str]) -> Result<()> {
    let words = [root, words].concat();
    let output = Command::new(words[0]).args(&words[1..]).output();
    let output = output.with_context(|| format!("cannot run {}", words.join(" ")))?;
    if !output.status.success() {
        bail!("`{}` failed: {}", words.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// A program that is there counts, whoever installed it; a package that dpkg calls installed but whose program is
/// gone does not.
fn missing() -> Vec<(&'static str, &'static str, &'static str)> {
    PACKAGES.into_iter().filter(|(_, program, _)| !found(program)).collect()
}

/// `ip` and others lie in sbin, which is not on everybody's PATH.
fn found(program: &str) -> bool {
    run::on_path(program) || ["/usr/sbin", "/sbin"].iter().any(|folder| Path::new(folder).join(program).is_file())
}

/// The words to put before a command so that it runs as root; `None` when there is no way.
fn as_root() -> Option<Vec<&'static str>> {
    let root = run::output(Command::new("id").arg("-u")).is_ok_and(|id| id.trim() == "0");
    if root {
        return Some(Vec::new());
    }
    run::on_path("sudo").then(|| vec!["sudo", "--non-interactive"])
}

/// Runs apt or dpkg as root, never asking, waiting with a message while another one holds the lock.
fn apt(root: &[&str], program: &str, arguments: &[&str]) -> Result<()> {
    let started = Instant::now();
    loop {
        let words = [root, &["env", "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C", program], arguments].concat();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]);
        eprintln!("$ {program} {}", arguments.join(" "));
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {program}"))?;
        let mut said = Vec::new();
        if let Some(stderr) = child.stderr.take() {
            said.extend(BufReader::new(stderr).lines().map_while(Result::ok));
        }
        let status = child.wait().with_context(|| format!("cannot wait for {program}"))?;
        if status.success() {
            return Ok(());
        }
        if !is_about_a_lock(&said) {
            bail!("`{program} {}` failed with {status}:\n{}", arguments.join(" "), said.join("\n"));
        }
        if started.elapsed() > LOCK_WAIT_MAX {
            bail!(
                "another apt or dpkg has held the package lock for {} minutes: {}",
                LOCK_WAIT_MAX.as_secs() / 60,
                said.first().map_or("", String::as_str)
            );
        }
        eprintln!("setup: another apt or dpkg is at work, waiting for it ({} s so far)", started.elapsed().as_secs());
        sleep(LOCK_WAIT_STEP);
    }
}

/// `E: Could not get lock …`, `E: Unable to acquire the dpkg frontend lock …`,
/// `dpkg: error: dpkg frontend lock was locked by another process`.
fn is_about_a_lock(said: &[String]) -> bool {
    said.iter().any(|line| {
        ["Could not get lock", "Unable to acquire", "Unable to lock", "was locked by another process"]
            .iter()
            .any(|sign| line.contains(sign))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_lock_is_told_from_other_failures() {
        let said = |text: &str| vec![text.to_owned()];
        assert!(is_about_a_lock(&said("E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 7")));
        assert!(is_about_a_lock(&said("dpkg: error: dpkg frontend lock was locked by another process with pid 7")));
        assert!(!is_about_a_lock(&said("E: Unable to locate package redis-tools")));
    }
}
