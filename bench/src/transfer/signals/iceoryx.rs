//! The same with iceoryx2: an event for a process that sleeps, a sample for one that looks.

use std::fmt::Debug;
use std::path::Path as FilePath;

use anyhow::{Result, anyhow, ensure};
use iceoryx2::prelude::*;
use iceoryx2::service::port_factory::{event, publish_subscribe};

use super::{begin, look_until, timed};
use crate::transfer::line::{Answer, Line, Signal, TIMEOUT};

type Inter = ipc::Service;

/// The two directions, as seen from the one that begins.
const THERE: &str = "there";
const BACK: &str = "back";

fn failed<E: Debug>(what: &'static str) -> impl FnOnce(E) -> anyhow::Error {
    move |error| anyhow!("iceoryx2 cannot {what}: {error:?}")
}

/// A node whose files lie in `folder` and that leaves Ctrl-C to us.
fn node(folder: &FilePath) -> Result<Node<Inter>> {
    set_log_level(LogLevel::Error);
    let mut config = Config::global_config().clone();
    let root = Path::new(folder.as_os_str().as_encoded_bytes()).map_err(failed("use a folder"))?;
    config.global.set_root_path(&root);
    // What lies in /dev/shm is found again by it.
    let prefix = folder.file_name().unwrap_or_default().as_encoded_bytes();
    config.global.prefix = FileName::new(prefix).map_err(failed("use a prefix"))?;
    NodeBuilder::new()
        .config(&config)
        .signal_handling_mode(SignalHandlingMode::Disabled)
        .create::<Inter>()
        .map_err(failed("make a node"))
}

fn event(node: &Node<Inter>, direction: &str) -> Result<event::PortFactory<Inter>> {
    let name = direction.try_into().map_err(failed("name an event"))?;
    node.service_builder(&name).event().open_or_create().map_err(failed("open an event"))
}

fn samples(node: &Node<Inter>, direction: &str) -> Result<publish_subscribe::PortFactory<Inter, u64, ()>> {
    let name = direction.try_into().map_err(failed("name a service"))?;
    node.service_builder(&name).publish_subscribe::<u64>().open_or_create().map_err(failed("open a service"))
}

pub(super) fn ping_event(folder: &FilePath, count: u32, line: &mut Line) -> Result<Vec<f64>> {
    let node = node(folder)?;
    let (there, back) = (event(&node, THERE)?, event(&node, BACK)?);
    let notifier = there.notifier_builder().create().map_err(failed("make a notifier"))?;
    let listener = back.listener_builder().create().map_err(failed("make a listener"))?;
    begin(Signal::IceoryxEvent { folder: folder.to_owned() }, count, line)?;
    line.expect_ready()?;
    timed(count, |_| {
        notifier.notify().map_err(failed("notify"))?;
        let heard = listener.timed_wait(|_| {}, TIMEOUT).map_err(failed("listen"))?;
        ensure!(heard > 0, "no event came back");
        Ok(())
    })
}

pub(super) fn echo_event(folder: &FilePath, count: u32, line: &mut Line) -> Result<()> {
    let node = node(folder)?;
    let (there, back) = (event(&node, THERE)?, event(&node, BACK)?);
    let notifier = back.notifier_builder().create().map_err(failed("make a notifier"))?;
    let listener = there.listener_builder().create().map_err(failed("make a listener"))?;
    line.tell(&Answer::Ready)?;
    for _ in 0..count {
        let heard = listener.timed_wait(|_| {}, TIMEOUT).map_err(failed("listen"))?;
        ensure!(heard > 0, "no event came");
        notifier.notify().map_err(failed("notify"))?;
    }
    Ok(())
}

pub(super) fn ping_sample(folder: &FilePath, count: u32, line: &mut Line) -> Result<Vec<f64>> {
    let node = node(folder)?;
    let (there, back) = (samples(&node, THERE)?, samples(&node, BACK)?);
    let publisher = there.publisher_builder().create().map_err(failed("make a publisher"))?;
    let subscriber = back.subscriber_builder().create().map_err(failed("make a subscriber"))?;
    begin(Signal::IceoryxSample { folder: folder.to_owned() }, count, line)?;
    line.expect_ready()?;
    timed(count, |round| {
        publisher.send_copy(u64::from(round)).map_err(failed("publish"))?;
        look_until(|| {
            let sample = subscriber.receive().map_err(failed("receive"))?;
            Ok(sample.is_some_and(|sample| *sample == u64::from(round)))
        })
    })
}

pub(super) fn echo_sample(folder: &FilePath, count: u32, line: &mut Line) -> Result<()> {
    let node = node(folder)?;
    let (there, back) = (samples(&node, THERE)?, samples(&node, BACK)?);
    let publisher = back.publisher_builder().create().map_err(failed("make a publisher"))?;
    let subscriber = there.subscriber_builder().create().map_err(failed("make a subscriber"))?;
    line.tell(&Answer::Ready)?;
    for round in 1..=u64::from(count) {
        look_until(|| {
            let sample = subscriber.receive().map_err(failed("receive"))?;
            Ok(sample.is_some_and(|sample| *sample == round))
        })?;
        publisher.send_copy(round).map_err(failed("publish"))?;
    }
    Ok(())
}
