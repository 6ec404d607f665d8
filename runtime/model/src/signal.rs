//! Signals by name, as service files and image configs write them: `SIGTERM`, `TERM`, `SIGRTMIN+3`, `15`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Linux on x86-64; those that somebody may want to end a program with, or with which one tells it to finish.
const NAMES: [(&str, i32); 12] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ABRT", 6),
    ("KILL", 9),
    ("USR1", 10),
    ("USR2", 12),
    ("ALRM", 14),
    ("TERM", 15),
    ("CONT", 18),
    ("WINCH", 28),
    ("PWR", 30),
];
/// As programs count: the two below it are the C library's own.
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// A signal that is sent to a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Signal(i32);

impl Signal {
    /// What every program understands.
    pub const TERM: Self = Self(15);

    #[must_use]
    pub const fn number(self) -> i32 {
        self.0
    }
}

/// A text that names no signal that can be sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no signal that ends a program: write SIGTERM, SIGUSR1, SIGRTMIN+3 or the like")]
pub struct InvalidSignal(String);

impl FromStr for Signal {
    type Err = InvalidSignal;

    fn from_str(text: &str) -> Result<Self, InvalidSignal> {
        let name = text.strip_prefix("SIG").unwrap_or(text);
        let real_time = |base: i32, rest: &str| match rest {
            "" => Some(base),
            rest => rest.parse::<i32>().ok().map(|offset| base.saturating_add(offset)),
        };
        let number = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
            (Some(rest), _) => real_time(RTMIN, rest),
            (_, Some(rest)) => real_time(RTMAX, rest),
            _ => name.parse().ok(),
        };
        let listed = |number: &i32| NAMES.iter().any(|(_, known)| known == number) || (RTMIN..=RTMAX).contains(number);
        let named = NAMES.iter().find(|(known, _)| *known == name).map(|(_, number)| *number);
        named.or(number.filter(listed)).map(Self).ok_or_else(|| InvalidSignal(text.to_owned()))
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMES.iter().find(|(_, number)| *number == self.0) {
            Some((name, _)) => write!(f, "SIG{name}"),
            None if self.0 == RTMIN => f.write_str("SIGRTMIN"),
            None => write!(f, "SIGRTMIN+{}", self.0 - RTMIN),
        }
    }
}

impl TryFrom<String> for Signal {
    type Error = InvalidSignal;

    fn try_from(text: String) -> Result<Self, InvalidSignal> {
        text.parse()
    }
}

impl From<Signal> for String {
    fn from(signal: Signal) -> Self {
        signal.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_the_names_that_images_use() {
        for (text, number) in
            [("SIGTERM", 15), ("USR1", 10), ("3", 3), ("SIGRTMIN+3", 37), ("RTMIN", 34), ("RTMAX-1", 63)]
        {
            let signal: Signal = text.parse().unwrap();
            assert_eq!(signal.number(), number, "{text}");
            assert_eq!(signal.to_string().parse(), Ok(signal), "{text}");
        }
        for text in ["", "SIG", "SIGNONE", "0", "-9", "65", "SIGRTMIN+99", "RTMIN+x", "term"] {
            assert!(text.parse::<Signal>().is_err(), "{text:?}");
        }
    }
}
