//! What a program says by the conventions of systemd (`sd_notify`): lines of `NAME=value` in one datagram.

/// Longest datagram that is read, in bytes.
pub(crate) const BYTES_MAX: usize = 4096;
/// Longest status that is shown, in characters.
const STATUS_CHARS_MAX: usize = 200;
/// As systemd has it.
const NAME_BYTES_MAX: usize = 255;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Watchdog {
    /// It lives.
    Ping,
    /// It wants to be treated as dead.
    Trigger,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Store {
    Add,
    Remove,
}

/// One datagram. What is not here (`MAINPID`, `ERRNO`, names of one's own, …) is tolerated and has no effect.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Saying {
    pub(crate) ready: bool,
    pub(crate) reloading: bool,
    pub(crate) stopping: bool,
    pub(crate) status: Option<String>,
    pub(crate) watchdog: Option<Watchdog>,
    pub(crate) store: Option<Store>,
    /// `FDNAME`
    pub(crate) name: Option<String>,
}

/// Why a datagram is not heard.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    #[error("it is no UTF-8 text")]
    NoText,
    #[error("a line is no assignment")]
    NoAssignment,
    #[error("FDNAME is empty, too long, or has a colon or a character that cannot be printed")]
    BadName,
    #[error("FDSTOREREMOVE comes without FDNAME")]
    NothingToRemove,
}

impl Saying {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        // Some programs count the NUL at the end of their text.
        let bytes = bytes.strip_suffix(b"\0").unwrap_or(bytes);
        let text = std::str::from_utf8(bytes).map_err(|_| Malformed::NoText)?;
        let mut saying = Self::default();
        for line in text.split('\n').filter(|line| !line.is_empty()) {
            let (name, value) = line.split_once('=').ok_or(Malformed::NoAssignment)?;
            match (name, value) {
                ("READY", "1") => saying.ready = true,
                ("RELOADING", "1") => saying.reloading = true,
                ("STOPPING", "1") => saying.stopping = true,
                ("WATCHDOG", "1") => saying.watchdog = Some(Watchdog::Ping),
                ("WATCHDOG", "trigger") => saying.watchdog = Some(Watchdog::Trigger),
                ("STATUS", status) => saying.status = Some(shown(status)),
                ("FDSTORE", "1") => saying.store = Some(Store::Add),
                ("FDSTOREREMOVE", "1") => saying.store = Some(Store::Remove),
                ("FDNAME", name) if is_name(name) => saying.name = Some(name.to_owned()),
                ("FDNAME", _) => return Err(Malformed::BadName),
                // A barrier, too: what it waits for is that its descriptor is closed, after everything said before it.
                _ => {}
            }
        }
        if saying.store == Some(Store::Remove) && saying.name.is_none() {
            return Err(Malformed::NothingToRemove);
        }
        Ok(saying)
    }
}

/// Goes into `LISTEN_FDNAMES`, where colons part names.
fn is_name(name: &str) -> bool {
    (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(|byte| matches!(byte, b' '..=b'~') && byte != b':')
}

/// Fit for somebody's terminal.
fn shown(status: &str) -> String {
    status.chars().map(|c| if c.is_control() { ' ' } else { c }).take(STATUS_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_datagram_says_several_things() {
        let saying = Saying::parse(b"READY=1\nSTATUS=two workers\x1b[31m\nMAINPID=7\nX_OURS=x=y\n").unwrap();
        let expected = Saying { ready: true, status: Some("two workers [31m".into()), ..Saying::default() };
        assert_eq!(saying, expected);
        let saying = Saying::parse(b"FDSTORE=1\nFDNAME=state one\0").unwrap();
        assert_eq!((saying.store, saying.name.as_deref()), (Some(Store::Add), Some("state one")));
        assert_eq!(Saying::parse(b"WATCHDOG=trigger").unwrap().watchdog, Some(Watchdog::Trigger));
        assert_eq!(Saying::parse(b"BARRIER=1").unwrap(), Saying::default());
        assert_eq!(Saying::parse(b"").unwrap(), Saying::default());
        let long = format!("STATUS={}", "ä".repeat(2000));
        assert_eq!(Saying::parse(long.as_bytes()).unwrap().status.unwrap().chars().count(), STATUS_CHARS_MAX);
    }

    #[test]
    fn what_is_no_message_is_refused_as_a_whole() {
        for (bytes, why) in [
            (&b"READY=1\nSTATUS=\xff"[..], Malformed::NoText),
            (b"READY=1\nready", Malformed::NoAssignment),
            (b"FDSTORE=1\nFDNAME=a:b", Malformed::BadName),
            (b"FDSTORE=1\nFDNAME=", Malformed::BadName),
            (b"FDSTORE=1\nFDNAME=\xc3\xa4", Malformed::BadName),
            (b"FDSTOREREMOVE=1", Malformed::NothingToRemove),
        ] {
            assert_eq!(Saying::parse(bytes), Err(why), "{bytes:?}");
        }
        let long = format!("FDSTORE=1\nFDNAME={}", "a".repeat(NAME_BYTES_MAX + 1));
        assert_eq!(Saying::parse(long.as_bytes()), Err(Malformed::BadName));
    }
}
