//! Why something could not be remembered or recalled.

use std::path::PathBuf;

/// Why the history could not be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    #[error("cannot create the history folder {folder}: make it writable, or name another state folder")]
    Folder {
        folder: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the history {file} is in use by another process: stop the other agent first")]
    InUse { file: PathBuf },
    #[error(
        "the history {file} is damaged ({what}): move it away, for example to {file}.damaged, and start again with an \
         empty one; services are not touched"
    )]
    Damaged { file: PathBuf, what: String },
    #[error(
        "the history {file} was written by a newer warmswap (format {found}, this one knows {known}): use that version, \
         or move the file away to start again with an empty one"
    )]
    Newer { file: PathBuf, found: u64, known: u64 },
    #[error("cannot {doing} in the history {file}: {source}; check that its disk has room and works")]
    Storage {
        file: PathBuf,
        doing: &'static str,
        #[source]
        source: Box<redb::Error>,
    },
    #[error("cannot {doing} for the history {file}: {what}")]
    Encode { file: PathBuf, doing: &'static str, what: String },
}
