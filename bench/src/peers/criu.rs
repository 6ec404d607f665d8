//! CRIU: the process is written to files, ended, and restored from them, its TCP connections too. It cannot change the
//! program, and is here for what it does to clients.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, setsid};

use super::{Peer, Workload, installed};
use crate::host::free_port;
use crate::process;

pub(super) const NAME: &str = "criu dump and restore";

const END_TIME_MAX: Duration = Duration::from_secs(5);

pub(super) struct Criu {
    name: String,
    program: PathBuf,
    images: PathBuf,
    address: SocketAddr,
    /// Stays the same over all restores.
    pid: Pid,
    /// The first incarnation is our child; restored ones are not.
    child: Option<Child>,
}

impl Criu {
    pub(super) fn start(workload: &Workload<'_>) -> Result<Self> {
        let program = installed("criu", "criu")?;
        let version = process::run(process::command(&program).arg("--version"))?;
        let version = version.split_whitespace().nth(1).unwrap_or("?").to_owned();
        let check = process::output(process::command(&program).arg("check"))?;
        if !check.status.success() {
            bail!("`criu check` of version {version} says: {}", process::last_words(&check));
        }
        let address = free_port()?;
        let mut command = Command::new(&workload.program);
        command.arg(address.to_string()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // SAFETY: setsid is safe to call between fork and exec, and nothing else is done there.
        unsafe { command.pre_exec(|| setsid().map(drop).map_err(Into::into)) };
        let child = command.spawn().context("cannot start session-store")?;
        let criu = Self {
            name: format!("{NAME} ({version})"),
            program,
            images: workload.ground.state.join("criu"),
            address,
            pid: Pid::from_raw(child.id().cast_signed()),
            child: Some(child),
        };
        Ok(criu)
    }

    /// CRIU says in a file why it failed.
    fn act(&self, verb: &str, arguments: &[&str]) -> Result<()> {
        let log = format!("{verb}.log");
        let status = process::command(&self.program)
            .arg(verb)
            .arg("--images-dir")
            .arg(&self.images)
            .args(["--tcp-established", "--log-file", &log])
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        if !status.success() {
            let text = fs::read_to_string(self.images.join(&log)).unwrap_or_default();
            let errors: Vec<&str> = text.lines().filter(|line| line.contains("Error")).collect();
            bail!("`criu {verb}` ended with {status}: {}", errors.join("; "));
        }
        Ok(())
    }
}

impl Peer for Criu {
    fn name(&self) -> &str {
        &self.name
    }

    fn address(&self) -> SocketAddr {
        self.address
    }

    fn replace(&mut self) -> Result<()> {
        if self.images.exists() {
            fs::remove_dir_all(&self.images)?;
        }
        fs::create_dir_all(&self.images)?;
        self.act("dump", &["--tree", &self.pid.to_string()])?;
        // Its number must be free before it can come back under it.
        if let Some(mut child) = self.child.take() {
            child.wait()?;
        }
        let place = PathBuf::from(format!("/proc/{}", self.pid));
        let gone = process::within(END_TIME_MAX, || (!Path::exists(&place)).then_some(()));
        gone.with_context(|| format!("process {} is still there after `criu dump`", self.pid))?;
        self.act("restore", &["--restore-detached"])
    }
}

impl Drop for Criu {
    fn drop(&mut self) {
        // Fails when it has ended, which is as good.
        let _ = kill(self.pid, Signal::SIGKILL);
        if let Some(child) = &mut self.child {
            let _ = child.wait();
        }
    }
}
