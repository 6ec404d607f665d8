//! What people do today instead of a handover, with the same program and the same clients.
//!
//! Peers are programs of the host, used as their manuals say, each with folders, a socket and cgroups of its own: a
//! daemon that runs already is not touched. One that is missing or does not work here is named with the reason; no figure
//! is ever made up for it.

mod criu;
mod docker;
mod ground;
mod runc;

use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::process;

pub(crate) use ground::Ground;

const LISTEN_TIME_MAX: Duration = Duration::from_secs(5);

/// A service that runs under something else than warmswap.
pub(crate) trait Peer {
    fn name(&self) -> &str;

    fn address(&self) -> SocketAddr;

    /// Replaces the running process by a new one; returns when that was started.
    fn replace(&mut self) -> Result<()>;
}

/// A peer that cannot be measured here.
pub(crate) struct Absent {
    pub(crate) name: String,
    pub(crate) reason: String,
}

impl Absent {
    /// Says so, too.
    pub(crate) fn new(name: &str, error: &anyhow::Error) -> Self {
        let reason = format!("{error:#}").split_whitespace().collect::<Vec<_>>().join(" ");
        eprintln!("  {name} is left out: {reason}");
        Self { name: name.to_owned(), reason }
    }
}

/// What all peers run.
pub(crate) struct Workload<'a> {
    pub(crate) ground: &'a Ground,
    /// A root file system with the program.
    pub(crate) image: PathBuf,
    /// Inside the image, and on the host.
    pub(crate) program_inside: PathBuf,
    pub(crate) program: PathBuf,
}

/// Starts every peer that there is.
pub(crate) fn start(workload: &Workload<'_>) -> (Vec<Box<dyn Peer>>, Vec<Absent>) {
    let mut peers = Vec::new();
    let mut absent = Vec::new();
    type Start = fn(&Workload<'_>) -> Result<Box<dyn Peer>>;
    let all: [(&'static str, Start); 3] = [
        (runc::NAME, |workload| Ok(Box::new(runc::Runc::start(workload)?))),
        (docker::NAME, |workload| Ok(Box::new(docker::Docker::start(workload)?))),
        (criu::NAME, |workload| Ok(Box::new(criu::Criu::start(workload)?))),
    ];
    for (name, start) in all {
        match start(workload).and_then(answering) {
            Ok(peer) => peers.push(peer),
            Err(error) => absent.push(Absent::new(name, &error)),
        }
    }
    (peers, absent)
}

/// A program that was started does not listen at once.
fn answering(peer: Box<dyn Peer>) -> Result<Box<dyn Peer>> {
    let connected = process::within(LISTEN_TIME_MAX, || TcpStream::connect(peer.address()).ok());
    connected.with_context(|| format!("it does not listen on {} within {LISTEN_TIME_MAX:?}", peer.address()))?;
    Ok(peer)
}

/// Finds the program of a peer.
pub(crate) fn installed(program: &str, package: &str) -> Result<PathBuf> {
    let found = process::find(program);
    found.ok_or_else(|| anyhow::anyhow!("{program} is not installed: `apt-get install {package}` installs it"))
}
