//! Ours: descriptors of log segments over the control channel; the receiver maps them and checks every record where it
//! lies.

use std::os::fd::AsFd as _;

use anyhow::{Context as _, Result, bail};
use warmswap_load::monotonic_ns;
use warmswap_transfer::channel::{ServiceChannel, SupervisorChannel};
use warmswap_transfer::log::{LogConfig, LogReader, LogWriter};
use warmswap_transfer::message::ToService;
use warmswap_transfer::record::{RecordKind, Shape, Tag};
use warmswap_transfer::segment::SEGMENT_LEN_MIN;

use crate::transfer::line::{Received, TIMEOUT};
use crate::transfer::records::{Record, digest, touch};

const TAG: Tag = Tag { collection: 1, shape: Shape::Map };

const SCHEMA: u32 = 1;

/// The state in a log, as a service that keeps it there has it anyway.
pub(in crate::transfer) struct Source(LogWriter);

impl Source {
    pub(in crate::transfer) fn new(records: &[Record]) -> Result<Self> {
        let reader = LogReader::new(LogConfig::new(SCHEMA))?;
        let mut writer = reader.into_writer(None).map_err(|failed| failed.1)?;
        for record in records {
            writer.append(RecordKind::Put, TAG, &record.key.0, &record.value.0)?;
        }
        writer.commit();
        Ok(Self(writer))
    }

    pub(in crate::transfer) fn send(&self, channel: &SupervisorChannel) -> Result<()> {
        for segment in self.0.segments().iter() {
            channel.send(&ToService::Segment { index: segment.header().index }, &[segment.as_fd()])?;
        }
        Ok(())
    }
}

pub(in crate::transfer) struct Sink(LogReader);

impl Sink {
    pub(in crate::transfer) fn new() -> Result<Self> {
        // It makes segments ahead for when it writes itself, and here it never does.
        Ok(Self(LogReader::new(LogConfig { segment_len: SEGMENT_LEN_MIN, ..LogConfig::new(SCHEMA) })?))
    }

    pub(in crate::transfer) fn receive(&mut self, channel: &mut ServiceChannel, records: u64) -> Result<Received> {
        let mut received = Received { first_ns: 0, all_ns: 0, records: 0, digest: 0 };
        while received.records < records {
            let (message, fds) = channel.recv_timeout(TIMEOUT)?.context("no segment came")?;
            let ToService::Segment { index } = message else { bail!("{message:?} came instead of a segment") };
            let fd = fds.into_iter().next().context("a segment came without a descriptor")?;
            self.0.add_segment(index, fd)?;
            while let Some((at, _)) = self.0.advance()? {
                let record = self.0.segments().record(at.position).context("a record that was read is gone")?;
                if received.records == 0 {
                    touch(record.value);
                    received.first_ns = monotonic_ns();
                }
                received.digest = digest(received.digest, record.key);
                received.records += 1;
            }
        }
        received.all_ns = monotonic_ns();
        Ok(received)
    }
}
