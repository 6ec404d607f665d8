//! The other process: started by the sender with the control channel as standard input and the line as standard output.

use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::prctl;
use nix::sys::resource::{Usage, UsageWho, getrusage};
use nix::sys::signal::Signal as Kill;
use nix::sys::time::TimeValLike as _;
use warmswap_transfer::channel::ServiceChannel;

use super::line::{Answer, Command, Effort, Line, Way};
use super::signals;
use super::ways::{segments, socket_copy, tmpfs_file};

/// Name of the hidden command that is this process.
pub(crate) const COMMAND: &str = "receive";

pub(crate) fn run() -> Result<()> {
    prctl::set_pdeathsig(Kill::SIGKILL)?;
    let mut channel = ServiceChannel::from_fd(std::io::stdin().as_fd().try_clone_to_owned()?)
        .context("this command is for the use of `warmswap-bench transfer` only")?;
    let mut line = Line::new(UnixStream::from(std::io::stdout().as_fd().try_clone_to_owned()?))?;
    loop {
        let answer = match line.hear()? {
            Command::Receive { way, records } => receive(way, records, &mut channel, &mut line),
            Command::Echo { signal, count } => {
                signals::echo(&signal, count, &mut channel, &mut line).map(|()| Answer::Echoed)
            }
            Command::End => return Ok(()),
            Command::File { .. } => bail!("a file that was not asked for"),
        };
        line.tell(&answer.unwrap_or_else(|error| Answer::Failed { what: format!("{error:#}") }))?;
    }
}

/// What was received is let go of when everything is measured: freeing it is not part of a transfer.
fn receive(way: Way, records: u64, channel: &mut ServiceChannel, line: &mut Line) -> Result<Answer> {
    let mut sink = segments::Sink::new()?;
    line.tell(&Answer::Ready)?;
    let before = getrusage(UsageWho::RUSAGE_SELF)?;
    let mut kept = Vec::new();
    let received = match way {
        Way::Segments => sink.receive(channel, records)?,
        Way::SocketCopy => {
            let (received, state) = socket_copy::receive(&mut line.0, records)?;
            kept = state;
            received
        }
        Way::TmpfsFile => {
            let Command::File { path } = line.hear()? else { bail!("no file came") };
            let (received, state) = tmpfs_file::receive(&path, records)?;
            kept = state;
            received
        }
    };
    ensure!(received.records == records, "{} records came instead of {records}", received.records);
    let answer = Answer::Received(received, effort(&before, &getrusage(UsageWho::RUSAGE_SELF)?));
    drop(kept);
    Ok(answer)
}

fn effort(before: &Usage, after: &Usage) -> Effort {
    Effort {
        user_us: (after.user_time() - before.user_time()).num_microseconds(),
        kernel_us: (after.system_time() - before.system_time()).num_microseconds(),
        page_faults: after.minor_page_faults() - before.minor_page_faults(),
    }
}
