//! Ours, for a process that sleeps: a message over the control channel, as every step of a handover is told.

use anyhow::{Context as _, Result, ensure};
use warmswap_transfer::channel::{ServiceChannel, SupervisorChannel};
use warmswap_transfer::message::{ToService, ToSupervisor};

use super::{begin, timed};
use crate::transfer::line::{Answer, Line, Signal, TIMEOUT};

pub(super) fn ping(count: u32, channel: &mut SupervisorChannel, line: &mut Line) -> Result<Vec<f64>> {
    begin(Signal::Channel, count, line)?;
    line.expect_ready()?;
    timed(count, |round| {
        channel.send(&ToService::CaughtUp { round: round.into(), commit: None }, &[])?;
        let (answer, _) = channel.recv_timeout(TIMEOUT)?.context("no answer came")?;
        let right = matches!(answer, ToSupervisor::CaughtUp { round: of, .. } if of == u64::from(round));
        ensure!(right, "{answer:?} came as the answer to round {round}");
        Ok(())
    })
}

pub(super) fn echo(count: u32, channel: &mut ServiceChannel, line: &mut Line) -> Result<()> {
    line.tell(&Answer::Ready)?;
    for _ in 0..count {
        let (message, _) = channel.recv_timeout(TIMEOUT)?.context("no signal came")?;
        let ToService::CaughtUp { round, .. } = message else { anyhow::bail!("{message:?} came as a signal") };
        channel.send(&ToSupervisor::CaughtUp { round, commit: None, connections: 0 }, &[])?;
    }
    Ok(())
}
