//! Why a service could not be started, found again or handed over.

use warmswap_backend::BackendError;
use warmswap_model::{Generation, ServiceName};
use warmswap_transfer::channel::ChannelError;
use warmswap_transfer::page::PageError;

use crate::journal::JournalError;

#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("cannot talk to {generation} of {service}")]
    Channel {
        service: ServiceName,
        generation: Generation,
        #[source]
        source: ChannelError,
    },
    #[error(transparent)]
    Page(#[from] PageError),
    #[error("{generation} of {service} {problem}{log}")]
    Generation { service: ServiceName, generation: Generation, problem: String, log: LogTail },
    #[error("{0}")]
    Refused(String),
    #[error("cannot {action}")]
    System {
        action: &'static str,
        #[source]
        source: std::io::Error,
    },
}

/// The last lines a container printed, for an error that a person reads.
#[derive(Debug, Default)]
pub struct LogTail(pub Vec<String>);

impl LogTail {
    pub const LINES_MAX: usize = 3;

    #[must_use]
    pub fn read(path: &std::path::Path) -> Self {
        const BYTES_MAX: u64 = 4096;
        let read = || -> std::io::Result<Vec<String>> {
            use std::io::{Read, Seek, SeekFrom};
            let mut file = std::fs::File::open(path)?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(BYTES_MAX)))?;
            let mut bytes = Vec::new();
            file.take(BYTES_MAX).read_to_end(&mut bytes)?;
            let text = String::from_utf8_lossy(&bytes);
            let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
            let from = lines.len().saturating_sub(Self::LINES_MAX);
            Ok(lines[from..].iter().map(|line| (*line).to_owned()).collect())
        };
        Self(read().unwrap_or_default())
    }
}

impl std::fmt::Display for LogTail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() {
            return f.write_str("; it printed nothing");
        }
        f.write_str("; its last words:")?;
        self.0.iter().try_for_each(|line| write!(f, "\n    {line}"))
    }
}
