//! The process that is watched: it works when it is told to and says what that took it.
//!
//! One of its own, because the sensor leaves out what its own process does, and because a cgroup has processes.

use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::cgroup::Cgroup;
use super::{cpus, jobs};
use crate::line::Line;
use crate::process;

/// Name of the hidden command that is this process.
pub(crate) const COMMAND: &str = "work";

/// What it can be told to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Task {
    /// From now on on this CPU only, children too.
    StayOn {
        cpu: usize,
    },
    /// A cheap system call, in batches.
    SystemCalls {
        batches: u32,
    },
    /// Switches from one thread to another, in batches.
    Switches {
        batches: u32,
    },
    /// Starts this program and waits for its end, so often.
    Programs {
        program: PathBuf,
        count: u32,
    },
    /// Opens a file in this folder, writes and reads a few small pieces, closes it, so often.
    Files {
        folder: PathBuf,
        rounds: u32,
    },
    /// Changes of a TCP socket's state, so many; at once, or so many a second.
    States {
        count: u32,
        per_s: Option<u32>,
    },
    /// Handover marks with pauses in between.
    Marks {
        count: u32,
        pause: Duration,
    },
    /// Starts a server, which ends with this process.
    Serve {
        program: PathBuf,
        name: String,
        arguments: Vec<String>,
    },
    /// Runs a client of that server to its end.
    Ask {
        program: PathBuf,
        arguments: Vec<String>,
    },
    End,
}

/// What a task took.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(super) struct Took {
    pub(super) wall_ns: f64,
    /// Of the process, of its children that have ended meanwhile, and of its server; of [`Task::States`] without the pauses.
    pub(super) cpu_ns: f64,
    /// One system call or switch, the median of the batches; 0 for other tasks.
    pub(super) each_ns: f64,
}

#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Done(Took),
    Failed { what: String },
}

/// The process, seen by who tells it. Ended when dropped.
pub(super) struct Worker {
    child: Child,
    line: Line,
}

impl Worker {
    pub(super) fn start(cgroup: &Cgroup) -> Result<Self> {
        let (line, its_line) = UnixStream::pair()?;
        let child = process::command(&std::env::current_exe()?)
            .arg(COMMAND)
            .stdout(Stdio::from(OwnedFd::from(its_line)))
            // Not a terminal that we may run in: who has one open can read input, which costs more to watch. It says what fails.
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start the process that is watched")?;
        let worker = Self { child, line: Line::new(line)? };
        cgroup.add(worker.child.id())?;
        Ok(worker)
    }

    pub(super) fn work(&mut self, task: &Task) -> Result<Took> {
        self.line.tell(task)?;
        match self.line.hear()? {
            Answer::Done(took) => Ok(took),
            Answer::Failed { what } => bail!("the process that is watched failed: {what}"),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Killed all the same when it does not listen: it may be in the middle of something.
        let _ = self.line.tell(&Task::End);
        if process::within(Duration::from_secs(2), || self.child.try_wait().transpose()).is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

pub(crate) fn run() -> Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    let mut line = Line::new(UnixStream::from(std::io::stdout().as_fd().try_clone_to_owned()?))
        .context("this command is for the use of `warmswap-bench probes` only")?;
    // Nobody speaks while a peer starts.
    line.0.set_read_timeout(None)?;
    let mut server = None;
    loop {
        let done = match line.hear()? {
            Task::End => return Ok(()),
            Task::StayOn { cpu } => cpus::stay_on(cpu).map(|()| Took::default()),
            Task::SystemCalls { batches } => jobs::system_calls(batches),
            Task::Switches { batches } => jobs::switches(batches),
            Task::Programs { program, count } => jobs::timed(None, || jobs::programs(&program, count)),
            Task::Files { folder, rounds } => jobs::timed(None, || jobs::files(&folder, rounds)),
            Task::States { count, per_s } => jobs::states(count, per_s),
            Task::Marks { count, pause } => jobs::timed(None, || jobs::marks(count, pause)),
            Task::Serve { program, name, arguments } => {
                jobs::Server::start(&program, &name, &arguments).map(|started| {
                    server = Some(started);
                    Took::default()
                })
            }
            Task::Ask { program, arguments } => jobs::timed(server.as_ref(), || jobs::ask(&program, &arguments)),
        };
        line.tell(&done.map_or_else(|error| Answer::Failed { what: format!("{error:#}") }, Answer::Done))?;
    }
}
