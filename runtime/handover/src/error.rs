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

/// Longest text of a container that is passed on, characters.
const WORDS_MAX: usize = 400;

/// What a container says, fit for a terminal, a log and one line of a report: no control characters, nothing that turns the
/// direction of the text, and not endless.
pub(crate) fn plain(text: &str) -> String {
    let turns = |c: char| matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let mut words: String =
        text.chars().take(WORDS_MAX).map(|c| if c.is_control() || turns(c) { '\u{fffd}' } else { c }).collect();
    if text.chars().nth(WORDS_MAX).is_some() {
        words.push('…');
    }
    words
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
            Ok(lines[from..].iter().map(|line| plain(line)).collect())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_container_are_harmless_and_short() {
        assert_eq!(plain("it is 3 °C – fine"), "it is 3 °C – fine");
        assert_eq!(plain("a\x1b[2J\nb\u{9b}c\u{202e}d"), "a\u{fffd}[2J\u{fffd}b\u{fffd}c\u{fffd}d");
        let long = plain(&"ü".repeat(70_000));
        assert!(long.chars().count() == WORDS_MAX + 1 && long.ends_with('…'));
    }
}
