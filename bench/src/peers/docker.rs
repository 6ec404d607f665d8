//! `docker restart`, by a dockerd of our own: no registry, no bridge, no packet filter rules, nothing of a dockerd that may
//! run already.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Peer, Workload, installed};
use crate::host::free_port;
use crate::process;

pub(super) const NAME: &str = "docker restart";

const CONTAINER: &str = "store";
const IMAGE: &str = "warmswap-bench";
const START_TIME_MAX: Duration = Duration::from_secs(30);
const STOP_TIME_MAX: Duration = Duration::from_secs(20);
/// What dockerd and its containerd make outside of the folders they are given.
const ELSEWHERE: [&str; 3] = ["/etc/docker/key.json", "/run/docker", "/run/containerd"];

pub(super) struct Docker {
    name: String,
    client: PathBuf,
    socket: PathBuf,
    address: SocketAddr,
    daemon: Child,
    /// Of [`ELSEWHERE`], what was not there before.
    made: Vec<&'static Path>,
}

impl Docker {
    pub(super) fn start(workload: &Workload<'_>) -> Result<Self> {
        let (client, daemon) = (installed("docker", "docker.io")?, installed("dockerd", "docker.io")?);
        let made = ELSEWHERE.map(Path::new).into_iter().filter(|path| !path.exists()).collect();
        let (run, state) = (workload.ground.run.join("docker"), workload.ground.state.join("docker"));
        fs::create_dir_all(&run)?;
        fs::create_dir_all(&state)?;
        let socket = run.join("docker.sock");
        // The host's own settings would mix with ours.
        let settings = state.join("daemon.json");
        fs::write(&settings, "{}")?;
        let log = state.join("dockerd.log");
        let output = File::create(&log)?;
        let daemon = process::command(&daemon)
            .arg("--config-file")
            .arg(&settings)
            .arg("--data-root")
            .arg(state.join("data"))
            .arg("--exec-root")
            .arg(run.join("exec"))
            .arg("--pidfile")
            .arg(run.join("docker.pid"))
            .arg(format!("--host=unix://{}", socket.display()))
            .args(["--group=root", "--bridge=none", "--iptables=false", "--ip6tables=false"])
            .args(["--ip-forward=false", "--ip-masq=false", "--userland-proxy=false"])
            .args(["--exec-opt", "native.cgroupdriver=cgroupfs", "--cgroup-parent"])
            .arg(format!("/{}", workload.ground.cgroup))
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .context("cannot start dockerd")?;
        let mut docker = Self { name: NAME.to_owned(), client, socket, address: free_port()?, daemon, made };
        docker.wait_until_it_answers(&log)?;
        docker.import(&workload.image)?;
        let (program, address) = (workload.program_inside.display().to_string(), docker.address.to_string());
        docker.ask(&["run", "--detach", "--name", CONTAINER, "--network", "host", IMAGE, &program, &address])?;
        Ok(docker)
    }

    fn client(&self) -> Command {
        let mut command = process::command(&self.client);
        command.arg(format!("--host=unix://{}", self.socket.display()));
        command
    }

    fn ask(&self, arguments: &[&str]) -> Result<String> {
        process::run(self.client().args(arguments))
    }

    fn wait_until_it_answers(&mut self, log: &Path) -> Result<()> {
        let version = process::within(START_TIME_MAX, || {
            let ended = self.daemon.try_wait().ok().flatten().is_some();
            let version = self.ask(&["version", "--format", "{{.Server.Version}}"]).ok();
            version.or_else(|| ended.then(String::new))
        });
        match version.as_deref().map(str::trim) {
            Some(version) if !version.is_empty() => self.name = format!("{NAME} ({version})"),
            _ => {
                let text = fs::read_to_string(log).unwrap_or_default();
                bail!("dockerd does not answer; the end of its log: {}", text.lines().last().unwrap_or("(empty)"));
            }
        }
        Ok(())
    }

    fn import(&self, image: &Path) -> Result<()> {
        let tar = process::find("tar").context("tar is not installed")?;
        let mut packing = process::command(&tar)
            .arg("--directory")
            .arg(image)
            .args(["--create", "."])
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start tar")?;
        let archive = packing.stdout.take().context("tar has no output")?;
        let imported = process::run(self.client().args(["import", "-", IMAGE]).stdin(archive));
        let packed = packing.wait()?;
        imported?;
        anyhow::ensure!(packed.success(), "tar ended with {packed}");
        Ok(())
    }
}

impl Peer for Docker {
    fn name(&self) -> &str {
        &self.name
    }

    fn address(&self) -> SocketAddr {
        self.address
    }

    fn replace(&mut self) -> Result<()> {
        self.ask(&["restart", CONTAINER]).map(drop)
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        // Fails when it was not started, or dockerd does not answer; then ending dockerd is all there is to do.
        let _ = self.ask(&["rm", "--force", CONTAINER]);
        if matches!(self.daemon.try_wait(), Ok(None)) {
            let _ = kill(Pid::from_raw(self.daemon.id().cast_signed()), Signal::SIGTERM);
            if process::within(STOP_TIME_MAX, || self.daemon.try_wait().transpose()).is_none() {
                eprintln!("dockerd did not end within {STOP_TIME_MAX:?} of SIGTERM and is killed");
                let _ = self.daemon.kill();
                let _ = self.daemon.wait();
            }
        }
        for path in &self.made {
            let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
            if let Err(error) = removed
                && error.kind() != std::io::ErrorKind::NotFound
            {
                eprintln!("{} stays behind: {error}", path.display());
            }
        }
    }
}
