//! The machine a result is from, and a warmswap of our own on it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

pub(crate) fn describe() -> Value {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let cpu = cpuinfo.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split_once(':'));
    json!({
        "cpu": cpu.map_or("", |(_, name)| name.trim()),
        "cpus": std::thread::available_parallelism().map_or(1, usize::from),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
    })
}

/// An agent under folders of its own. Removed when dropped.
pub(crate) struct Host {
    warmswap: PathBuf,
    run_dir: PathBuf,
    pub(crate) state_dir: PathBuf,
    agent: std::process::Child,
}

impl Host {
    pub(crate) fn start(programs: &Path) -> Result<Self> {
        let warmswap = programs.join("warmswap");
        ensure!(warmswap.is_file(), "{} is missing; `cargo build --release` makes it", warmswap.display());
        let id = std::process::id();
        let run_dir = PathBuf::from(format!("/run/warmswap-bench-{id}"));
        let state_dir = std::env::temp_dir().join(format!("warmswap-bench-{id}"));
        std::fs::create_dir_all(&state_dir).with_context(|| format!("cannot create {}", state_dir.display()))?;
        let log = std::fs::File::create(state_dir.join("agent.log"))?;
        let agent = Command::new(&warmswap)
            .arg("agent")
            .env("WARMSWAP_RUN_DIR", &run_dir)
            .env("WARMSWAP_STATE_DIR", &state_dir)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start the agent")?;
        let mut host = Self { warmswap, run_dir, state_dir, agent };
        host.wait_until_it_answers()?;
        Ok(host)
    }

    fn wait_until_it_answers(&mut self) -> Result<()> {
        let began = Instant::now();
        loop {
            let status = self.command(&["status", "--json"]).stderr(Stdio::null()).output()?;
            if status.status.success() {
                return Ok(());
            }
            let ended = self.agent.try_wait()?;
            if ended.is_some() || began.elapsed() > Duration::from_secs(60) {
                let log = std::fs::read_to_string(self.state_dir.join("agent.log")).unwrap_or_default();
                bail!("the agent does not answer; its log:\n{log}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.warmswap);
        command
            .args(arguments)
            .env("WARMSWAP_RUN_DIR", &self.run_dir)
            .env("WARMSWAP_STATE_DIR", &self.state_dir)
            .stdin(Stdio::null());
        command
    }

    /// Runs a verb with `--json`; the last line of its output. The exit code is for the caller when `any_code`.
    pub(crate) fn ask(&self, arguments: &[&str], any_code: bool) -> Result<Value> {
        let output = self.command(arguments).arg("--json").output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() && !any_code {
            bail!("warmswap {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
        }
        let last = text.lines().last().with_context(|| {
            format!("warmswap {} said nothing: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim())
        })?;
        Ok(serde_json::from_str(last)?)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let stopped = self.command(&["stop", "--all"]).stdout(Stdio::null()).status();
        if !stopped.is_ok_and(|status| status.success()) {
            eprintln!("`warmswap stop --all` failed for {}", self.run_dir.display());
            let _ = self.agent.kill();
        }
        let _ = self.agent.wait();
        for folder in [&self.run_dir, &self.state_dir] {
            // `stop --all` removes a run folder in which nothing else is.
            if let Err(error) = std::fs::remove_dir_all(folder)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                eprintln!("{} stays behind: {error}", folder.display());
            }
        }
    }
}
