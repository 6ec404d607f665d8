//! The machine a result is from, and a warmswap of our own on it.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};
use warmswap_load::{monotonic_ns, unix_ms};
use warmswap_model::HandoverReport;

use crate::gaps::Span;
use crate::process;

/// The program in every image.
pub(crate) const PROGRAM: &str = "session-store";

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

/// What the kernel says can be used without swapping, MiB.
pub(crate) fn memory_available_mib() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kib.context("/proc/meminfo has no MemAvailable")? / 1024)
}

/// Thousands of connections need thousands of descriptors.
pub(crate) fn raise_descriptor_limit() -> Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most).context("cannot raise the limit of open files")
}

pub(crate) fn free_port() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

/// A handover, with when it was.
pub(crate) struct Timed {
    pub(crate) report: HandoverReport,
    /// From RESERVE to the verdict.
    pub(crate) span: Span,
    /// With everything around it, the command too.
    pub(crate) busy: Span,
}

/// An agent under folders of its own. Removed when dropped.
pub(crate) struct Host {
    warmswap: PathBuf,
    pub(crate) run_dir: PathBuf,
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
        let agent = process::command(&warmswap)
            .arg("agent")
            .env("WARMSWAP_RUN_DIR", &run_dir)
            .env("WARMSWAP_STATE_DIR", &state_dir)
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

    /// Root file systems with the same program; updates go from one to the other.
    pub(crate) fn make_images(&self, programs: &Path) -> Result<()> {
        let program = programs.join("session-store-v1");
        for image in 0..2 {
            warmswap_rootfs::pack_rootfs_as(&program, &self.image(image), Some(PROGRAM))
                .with_context(|| format!("cannot make an image of {}", program.display()))?;
        }
        Ok(())
    }

    pub(crate) fn image(&self, which: usize) -> PathBuf {
        self.state_dir.join("images").join(["a", "b"][which % 2])
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = process::command(&self.warmswap);
        command.args(arguments).env("WARMSWAP_RUN_DIR", &self.run_dir).env("WARMSWAP_STATE_DIR", &self.state_dir);
        command
    }

    /// Runs a verb with `--json`; the last line of its output. The exit code is for the caller when `any_code`.
    pub(crate) fn ask(&self, arguments: &[&str], any_code: bool) -> Result<Value> {
        let output = process::output(self.command(arguments).arg("--json"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() && !any_code {
            bail!("warmswap {}: {}", arguments.join(" "), process::last_words(&output));
        }
        let last = text.lines().last().with_context(|| {
            format!("warmswap {} said nothing: {}", arguments.join(" "), process::last_words(&output))
        })?;
        Ok(serde_json::from_str(last)?)
    }

    pub(crate) fn update(&self, service: &str, image: &Path) -> Result<Timed> {
        let (start_ns, start_unix_ms) = (monotonic_ns(), unix_ms());
        let line = self.ask(&["update", service, "--image", &image.display().to_string()], true)?;
        let busy = Span { start_ns, end_ns: monotonic_ns() };
        let Some(report) = line.get("report") else { bail!("the update of {service} ended with {line}") };
        let report: HandoverReport = serde_json::from_value(report.clone())?;
        if let Some(reason) = &report.reason {
            eprintln!("  {} {}: {reason}", report.to, report.verdict);
        }
        // The report's clock has whole milliseconds: rounded outwards.
        let begun_ms = report.started_unix_ms.saturating_sub(start_unix_ms);
        let begun_ns = (busy.start_ns + begun_ms * 1_000_000).saturating_sub(1_000_000).max(busy.start_ns);
        let ended_ns = (begun_ns + (report.duration_ms * 1e6) as u64 + 2_000_000).min(busy.end_ns);
        Ok(Timed { span: Span { start_ns: begun_ns, end_ns: ended_ns }, report, busy })
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
