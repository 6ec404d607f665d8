//! Ours, for a process that looks: the control word, as an owner sees that it is no longer one. Each side has a page of its
//! own, because only the one that made a page can write it.

use std::os::fd::AsFd as _;

use anyhow::{Context as _, Result, bail};
use warmswap_transfer::channel::{ServiceChannel, SupervisorChannel};
use warmswap_transfer::control::{ControlPage, ControlView, ControlWord};
use warmswap_transfer::message::{ToService, ToSupervisor};
use warmswap_transfer::ownership::OwnershipLock;

use super::{begin, look_until, timed};
use crate::transfer::line::{Answer, Line, Signal, TIMEOUT};

const fn word(round: u32) -> ControlWord {
    ControlWord { epoch: round, owner: 1, orderly: true }
}

pub(super) fn ping(count: u32, channel: &mut SupervisorChannel, line: &mut Line) -> Result<Vec<f64>> {
    begin(Signal::Word, count, line)?;
    let page = ControlPage::create()?;
    // A control page comes with the ownership lock and the reading end of a pipe.
    let (ownership, (lifeline, _end)) = (OwnershipLock::create()?, std::io::pipe()?);
    channel.send(&ToService::NewSupervisor, &[page.as_fd(), ownership.as_fd(), lifeline.as_fd()])?;
    // No message brings a page back; this one brings any one descriptor.
    let (_, fds) = channel.recv_timeout(TIMEOUT)?.context("no page came back")?;
    let view = ControlView::map(fds.first().context("a page came back without a descriptor")?.as_fd())?;
    line.expect_ready()?;
    timed(count, |round| {
        page.store(word(round));
        look_until(|| Ok(view.load().epoch == round))
    })
}

pub(super) fn echo(count: u32, channel: &mut ServiceChannel, line: &mut Line) -> Result<()> {
    let (message, fds) = channel.recv_timeout(TIMEOUT)?.context("no page came")?;
    let (ToService::NewSupervisor, Some(fd)) = (&message, fds.first()) else { bail!("{message:?} came as a page") };
    let view = ControlView::map(fd.as_fd())?;
    let page = ControlPage::create()?;
    channel.send(&ToSupervisor::Segment { index: 0 }, &[page.as_fd()])?;
    line.tell(&Answer::Ready)?;
    for round in 1..=count {
        look_until(|| Ok(view.load().epoch == round))?;
        page.store(word(round));
    }
    Ok(())
}
