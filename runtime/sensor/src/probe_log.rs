//! What the probes say (`ebpf/probes/src/trouble.rs`), passed on into `tracing`.

use std::os::fd::AsRawFd;

use aya::Ebpf;
use aya_log::EbpfLogger;

use crate::PROBE_LOG_TARGET;
use crate::error::SensorError;

/// The map and the global that aya-log has in the object.
pub(crate) const RING: &str = "AYA_LOGS";
pub(crate) const LEVEL: &str = aya_log::LEVEL;

/// Kernel memory: room for some hundred messages; a page when nothing is ever written, because the programs name the map
/// even where the verifier takes the messages out of them.
pub(crate) fn ring_bytes(on: bool) -> u32 {
    if on { 64 * 1024 } else { crate::mapped::page_size() as u32 }
}

/// How many subjects the probes remember having spoken about.
pub(crate) const fn said_max(on: bool) -> u32 {
    if on { 256 } else { 1 }
}

/// The level up to which the probes speak.
pub(crate) const fn level(on: bool) -> u8 {
    if on { aya_log::Level::Warn as u8 } else { 0 }
}

/// The reader of their ring.
pub(crate) struct ProbeLog(EbpfLogger<ToTracing>);

impl ProbeLog {
    /// After the programs are loaded: it takes the map out of the object.
    pub(crate) fn of(object: &mut Ebpf) -> Result<Self, SensorError> {
        EbpfLogger::init_with_logger(object, ToTracing).map(Self).map_err(|source| SensorError::ProbeLog { source })
    }

    /// Readable when a message waits.
    pub(crate) fn raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }

    pub(crate) fn flush(&mut self) {
        self.0.flush();
    }
}

/// aya-log speaks the `log` crate.
struct ToTracing;

impl log::Log for ToTracing {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        // The target of an event is fixed where it is made; the probes have no other.
        match record.level() {
            log::Level::Error => tracing::error!(target: PROBE_LOG_TARGET, "{}", record.args()),
            log::Level::Warn => tracing::warn!(target: PROBE_LOG_TARGET, "{}", record.args()),
            _ => tracing::info!(target: PROBE_LOG_TARGET, "{}", record.args()),
        }
    }

    fn flush(&self) {}
}
