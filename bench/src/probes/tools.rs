//! Programs of others that look on too: bpftrace and libbpf-tools, as their manuals say.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::peers::installed;
use crate::process;

const START_TIME_MAX: Duration = Duration::from_secs(20);
const END_TIME_MAX: Duration = Duration::from_secs(10);
/// Looks at a program's descriptors, 10 ms apart, between which nothing changes any more when it has attached.
const LOOKS: usize = 8;
/// Where the descriptions of tracepoints are looked for.
const DEBUGFS: &str = "/sys/kernel/debug";
const TRACEFS: &str = "/sys/kernel/tracing";

/// A program and what it is to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Tool {
    pub(super) name: &'static str,
    pub(super) program: &'static str,
    pub(super) package: &'static str,
    pub(super) arguments: &'static [&'static str],
    /// Where what it says goes.
    pub(super) output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Output {
    Kept,
    /// `/dev/null`.
    Nowhere,
}

pub(super) const COUNT: Tool = Tool {
    name: "bpftrace count()",
    program: "bpftrace",
    package: "bpftrace",
    arguments: &["-e", "tracepoint:raw_syscalls:sys_exit { @ = count(); }"],
    output: Output::Kept,
};
pub(super) const COUNT_BY_CGROUP: Tool = Tool {
    name: "bpftrace count() by cgroup",
    arguments: &["-e", "tracepoint:raw_syscalls:sys_exit { @[cgroup] = count(); }"],
    ..COUNT
};
pub(super) const COUNT_SWITCHES: Tool = Tool {
    name: "bpftrace count() of switches",
    arguments: &["-e", "tracepoint:sched:sched_switch { @ = count(); }"],
    ..COUNT
};
/// What our record of this event has in it.
pub(super) const PRINT_STATES: Tool = Tool {
    name: "bpftrace printf()",
    arguments: &[
        "-e",
        "tracepoint:sock:inet_sock_set_state { printf(\"%llu %llu %d %d %s %d %d %d %d\\n\", nsecs, cgroup, pid, tid, comm, \
         args->oldstate, args->newstate, args->sport, args->dport); }",
    ],
    output: Output::Nowhere,
    ..COUNT
};
/// The same, to be counted.
pub(super) const KEEP_STATES: Tool = Tool { output: Output::Kept, ..PRINT_STATES };
pub(super) const EXECSNOOP: Tool =
    Tool { name: "execsnoop", program: "execsnoop", package: "libbpf-tools", arguments: &[], output: Output::Kept };
pub(super) const OPENSNOOP: Tool = Tool { name: "opensnoop", program: "opensnoop", ..EXECSNOOP };

/// A tool that has attached. Ended when dropped.
pub(super) struct Attached {
    child: Child,
    said: File,
    complained: File,
}

/// What a tool that was ended had said.
pub(super) struct Said {
    pub(super) text: String,
    pub(super) complaints: String,
}

impl Tool {
    pub(super) fn attach(&self) -> Result<Attached> {
        let file = || -> Result<File> { Ok(memfd_create(self.name, MFdFlags::MFD_CLOEXEC)?.into()) };
        let (said, complained) = (file()?, file()?);
        let to = |file: &File| -> Result<Stdio> { Ok(OwnedFd::from(file.try_clone()?).into()) };
        let mut command = process::command(&installed(self.program, self.package)?);
        command.args(self.arguments).stderr(to(&complained)?);
        command.stdout(if self.output == Output::Kept { to(&said)? } else { Stdio::null() });
        if !Path::new(DEBUGFS).join("tracing/events").exists() {
            // SAFETY: between fork and exec, system calls on constant strings.
            unsafe { command.pre_exec(show_tracepoints) };
        }
        let child = command.spawn().with_context(|| format!("cannot start {}", self.program))?;
        let mut attached = Attached { child, said, complained };
        attached.wait().with_context(|| format!("{} does not attach", self.program))?;
        Ok(attached)
    }
}

/// In a namespace of the tool's own, so that nothing stays mounted.
fn show_tracepoints() -> std::io::Result<()> {
    const NONE: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    // The one brings the other with it; a kernel may have only the other.
    let debugfs = mount(Some("debugfs"), DEBUGFS, Some("debugfs"), MsFlags::empty(), NONE);
    let tracefs = mount(Some("tracefs"), TRACEFS, Some("tracefs"), MsFlags::empty(), NONE);
    Ok(debugfs.or(tracefs)?)
}

impl Attached {
    /// Until it holds a BPF program and its descriptors have not changed for a while: none of these programs says when
    /// it has attached.
    fn wait(&mut self) -> Result<()> {
        let (mut before, mut same) = (Vec::new(), 0);
        let folder = format!("/proc/{}/fd", self.child.id());
        let attached = process::within(START_TIME_MAX, || {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Some(Err(anyhow::anyhow!("it ended with {status}: {}", contents(&mut self.complained).trim())));
            }
            let now = descriptors(&folder);
            let loaded = now.iter().any(|name| name.starts_with("anon_inode:bpf"));
            same = if loaded && now == before { same + 1 } else { 0 };
            before = now;
            (same == LOOKS).then_some(Ok(()))
        });
        attached.with_context(|| format!("it holds no BPF program after {START_TIME_MAX:?}"))?
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it as Ctrl-C does: then it prints what it has.
    pub(super) fn end(mut self) -> Result<Said> {
        kill(Pid::from_raw(i32::try_from(self.child.id())?), Signal::SIGINT)?;
        if process::within(END_TIME_MAX, || self.child.try_wait().transpose()).is_none() {
            bail!("a tool does not end within {END_TIME_MAX:?} of SIGINT");
        }
        Ok(Said { text: contents(&mut self.said), complaints: contents(&mut self.complained) })
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // Fails when it has ended, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn contents(file: &mut File) -> String {
    let mut bytes = Vec::new();
    // A file in memory that is ours.
    let _ = file.rewind().and_then(|()| file.read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

fn descriptors(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().map_while(std::io::Result::ok);
    let names = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
    let mut names: Vec<String> = names.map(|name| name.to_string_lossy().into_owned()).collect();
    names.sort_unstable();
    names
}

impl Said {
    /// Of all the lines `@: N` or `@[key]: N`, the sum.
    pub(super) fn counted(&self) -> u64 {
        let counts = self.text.lines().filter(|line| line.starts_with('@')).filter_map(|line| line.rsplit_once(": "));
        counts.filter_map(|(_, count)| count.trim().parse::<u64>().ok()).sum()
    }

    /// Lines of a `printf` that begins with a number.
    pub(super) fn printed(&self) -> u64 {
        self.text.lines().filter(|line| line.starts_with(|first: char| first.is_ascii_digit())).count() as u64
    }

    /// Of all the lines `Lost N events`, the sum.
    pub(super) fn lost(&self) -> u64 {
        let lines = self.complaints.lines().chain(self.text.lines());
        let lost = lines.filter_map(|line| line.strip_prefix("Lost ")?.strip_suffix(" events"));
        lost.filter_map(|count| count.parse::<u64>().ok()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_losses_are_read() {
        let said = |text: &str, complaints: &str| Said { text: text.to_owned(), complaints: complaints.to_owned() };
        assert_eq!(said("Attaching 1 probe...\n\n\n@: 42\n", "").counted(), 42);
        assert_eq!(said("@[1]: 5\n@[18626]: 65\n", "").counted(), 70);
        assert_eq!(said("", "Lost 12 events\nERROR: no\nLost 3 events\n").lost(), 15);
        assert_eq!(said("", "").lost(), 0);
        assert_eq!(said("Attaching 1 probe...\n12 1 2\n13 1 2\nLost 3 events\n", "").printed(), 2);
    }
}
