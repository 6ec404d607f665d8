//! Stop and start with runc, in the host's network, as a service manager does it: SIGTERM, wait for the end, start anew.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{Peer, Workload, installed};
use crate::host::free_port;
use crate::process;

pub(super) const NAME: &str = "stop and start with runc";

const ID: &str = "store";
const STOP_TIME_MAX: Duration = Duration::from_secs(10);

pub(super) struct Runc {
    name: String,
    program: PathBuf,
    root: PathBuf,
    bundle: PathBuf,
    address: SocketAddr,
}

impl Runc {
    pub(super) fn start(workload: &Workload<'_>) -> Result<Self> {
        let program = installed("runc", "runc")?;
        let version = process::run(process::command(&program).arg("--version"))?;
        let version = version.lines().next().and_then(|line| line.split(' ').next_back()).unwrap_or("?").to_owned();
        let bundle = workload.ground.state.join("runc");
        fs::create_dir_all(&bundle)?;
        process::run(process::command(&program).args(["spec", "--bundle"]).arg(&bundle))?;
        let address = free_port()?;
        let file = bundle.join("config.json");
        let spec: Value = serde_json::from_slice(&fs::read(&file)?).context("`runc spec` wrote no JSON")?;
        let cgroup = format!("/{}/runc", workload.ground.cgroup);
        let spec = adapted(spec, workload, address, &cgroup)?;
        fs::write(&file, serde_json::to_vec(&spec)?)?;
        let runc = Self {
            name: format!("{NAME} {version}"),
            program,
            root: workload.ground.run.join("runc"),
            bundle,
            address,
        };
        runc.run()?;
        Ok(runc)
    }

    fn ask(&self, arguments: &[&str]) -> Result<String> {
        process::run(process::command(&self.program).arg("--root").arg(&self.root).args(arguments))
    }

    fn run(&self) -> Result<()> {
        // Its standard streams are the container's, so they cannot be pipes that somebody waits for the end of.
        let log = self.bundle.join("log");
        let status = process::command(&self.program)
            .arg("--root")
            .arg(&self.root)
            .arg("--log")
            .arg(&log)
            .args(["run", "--detach", "--bundle"])
            .arg(&self.bundle)
            .arg(ID)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        if !status.success() {
            anyhow::bail!("`runc run` ended with {status}: {}", fs::read_to_string(&log).unwrap_or_default().trim());
        }
        Ok(())
    }
}

/// What `runc spec` makes is a shell on a terminal in a network of its own.
fn adapted(mut spec: Value, workload: &Workload<'_>, address: SocketAddr, cgroup: &str) -> Result<Value> {
    spec["process"]["terminal"] = json!(false);
    spec["process"]["args"] = json!([workload.program_inside, address.to_string()]);
    spec["root"]["path"] = json!(workload.image);
    spec["linux"]["cgroupsPath"] = json!(cgroup);
    let namespaces = spec["linux"]["namespaces"].as_array_mut().context("`runc spec` names no namespaces")?;
    namespaces.retain(|namespace| namespace["type"] != "network");
    Ok(spec)
}

impl Peer for Runc {
    fn name(&self) -> &str {
        &self.name
    }

    fn address(&self) -> SocketAddr {
        self.address
    }

    fn replace(&mut self) -> Result<()> {
        self.ask(&["kill", ID, "TERM"])?;
        // Refused as long as it runs.
        let deleted = process::within(STOP_TIME_MAX, || self.ask(&["delete", ID]).ok());
        deleted.with_context(|| format!("the container did not end within {STOP_TIME_MAX:?} of SIGTERM"))?;
        self.run()
    }
}

impl Drop for Runc {
    fn drop(&mut self) {
        if let Err(error) = self.ask(&["delete", "--force", ID]) {
            eprintln!("a container of runc stays behind: {error:#}");
        }
    }
}
