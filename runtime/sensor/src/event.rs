//! Events as users see them: one line each, or JSON.

use std::fmt;

use serde::{Deserialize, Serialize};
use warmswap_events::{Class, ExecRecord, PATH_LENGTH, Record, UID_UNKNOWN};
use warmswap_model::CgroupId;

/// A set of event classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Classes(u64);

impl Classes {
    pub const NONE: Self = Self(0);
    pub const ALL: Self = Self((1 << warmswap_events::CLASSES) - 1);

    #[must_use]
    pub const fn with(self, class: Class) -> Self {
        Self(self.0 | class.bit())
    }

    #[must_use]
    pub const fn contains(self, class: Class) -> bool {
        self.0 & class.bit() != 0
    }

    pub(crate) const fn bits(self) -> u64 {
        self.0
    }

    /// From names as [`Class::name`] gives them, separated by commas.
    ///
    /// # Errors
    /// The first name that no class has.
    pub fn parse(names: &str) -> Result<Self, UnknownClass> {
        names.split(',').map(str::trim).filter(|name| !name.is_empty()).try_fold(Self::NONE, |set, name| {
            let class = Class::ALL.into_iter().find(|class| class.name() == name);
            class.map(|class| set.with(class)).ok_or_else(|| UnknownClass { name: name.to_owned() })
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is no event class; the classes are exec, fork, exit, tcp, tcp-reset, input, oom, mark, orientation")]
pub struct UnknownClass {
    pub name: String,
}

/// What happened, by class.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "class")]
pub enum Detail {
    /// A process replaced its program: an application was launched. `name`: its first argument, which it may choose at will.
    Exec {
        path: String,
        #[serde(default)]
        name: String,
    },
    /// A process was created.
    Fork { child: u32 },
    /// A process ended, with a code or by a signal. `age_ns`: since it was created, 0 when the kernel does not say.
    Exit {
        code: u8,
        signal: u8,
        #[serde(default)]
        age_ns: u64,
    },
    /// A TCP socket changed its state.
    Tcp { old: String, new: String, local_port: u16, remote_port: u16 },
    /// A TCP reset was sent or received.
    TcpReset { sent: bool, local_port: u16, remote_port: u16 },
    /// A terminal or input device gave data to a reader.
    Input { device_major: u32, device_minor: u32, bytes: u64 },
    /// The kernel chose a victim for want of memory.
    Oom { victim: u32 },
    /// A handover mark.
    Mark { mark: u32, handover: u64, generation: u32 },
    /// A reader of an input device was told that the screen turns, so many times in one read; the last of them.
    Orientation { cause: Turn, value: i32, times: u32 },
}

/// What turns the screen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Turn {
    /// The device was folded into a tablet (1) or back (0).
    TabletMode,
    /// The switch that locks the rotation: locked (1) or not (0).
    RotateLock,
    /// The key that rotates the display was pressed.
    RotateKey,
    /// The key that locks the rotation was pressed.
    RotateLockKey,
    /// Of a build of the probes that knows more.
    Other,
}

impl Turn {
    /// From type and code as in `linux/input-event-codes.h`.
    fn of(kind: u64, code: u64) -> Self {
        match (kind, code) {
            (5, 0x01) => Self::TabletMode,
            (5, 0x0c) => Self::RotateLock,
            (1, 0x99) => Self::RotateKey,
            (1, 0x231) => Self::RotateLockKey,
            _ => Self::Other,
        }
    }

    fn in_words(self) -> &'static str {
        match self {
            Self::TabletMode => "tablet mode",
            Self::RotateLock => "rotate lock",
            Self::RotateKey => "rotate key",
            Self::RotateLockKey => "rotate lock key",
            Self::Other => "unknown",
        }
    }
}

impl Detail {
    #[must_use]
    pub const fn class(&self) -> Class {
        match self {
            Self::Exec { .. } => Class::Exec,
            Self::Fork { .. } => Class::Fork,
            Self::Exit { .. } => Class::Exit,
            Self::Tcp { .. } => Class::Tcp,
            Self::TcpReset { .. } => Class::TcpReset,
            Self::Input { .. } => Class::Input,
            Self::Oom { .. } => Class::Oom,
            Self::Mark { .. } => Class::Mark,
            Self::Orientation { .. } => Class::Orientation,
        }
    }
}

/// One thing that happened in the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// `CLOCK_MONOTONIC`, ns.
    pub time_ns: u64,
    /// Wall clock, ns since the Unix epoch.
    pub unix_ns: u64,
    /// 0 when the kernel could not tell.
    pub cgroup: CgroupId,
    /// 0 when it did not happen in a process's name (TCP timers, packets that arrive).
    pub pid: u32,
    pub tid: u32,
    /// The real user id of the process, or of whoever made the socket; `None` when the kernel could not tell.
    #[serde(default)]
    pub uid: Option<u32>,
    pub comm: String,
    #[serde(flatten)]
    pub detail: Detail,
}

/// A handover mark, see [`warmswap_events::MARK_OPTION`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// 1: stopped serving, 2: serving; others belong to the agent.
    pub mark: u32,
    pub handover: u64,
    pub generation: u32,
    pub cgroup: CgroupId,
    pub pid: u32,
    /// `CLOCK_MONOTONIC`, ns.
    pub time_ns: u64,
}

impl Mark {
    /// `None` when the record is of another class.
    pub(crate) fn of(record: &Record) -> Option<Self> {
        (Class::from_number(record.class) == Some(Class::Mark)).then_some(Self {
            mark: (record.args[0] >> 32) as u32,
            generation: record.args[0] as u32,
            handover: record.args[1],
            cgroup: CgroupId(record.cgroup),
            pid: record.pid,
            time_ns: record.time_ns,
        })
    }
}

/// Makes the calling thread's handover mark: the system call that the probe watches for. Always "fails" in the kernel.
pub fn make_mark(mark: u32, handover: u64, generation: u32) {
    // SAFETY: an unknown prctl option has no effect; its arguments are plain numbers.
    unsafe {
        libc::syscall(
            libc::SYS_prctl,
            warmswap_events::MARK_OPTION,
            u64::from(mark),
            handover,
            u64::from(generation),
            0u64,
        );
    }
}

/// The fixed part of a record and the texts of an exec. `None` when the bytes are no record this program knows.
pub(crate) fn decode(bytes: &[u8]) -> Option<(Record, &[u8])> {
    if bytes.len() < size_of::<Record>() {
        return None;
    }
    // SAFETY: there are enough bytes, and every bit pattern is a Record (it consists of integers).
    let record = unsafe { bytes.as_ptr().cast::<Record>().read_unaligned() };
    let class = Class::from_number(record.class)?;
    let expected = if class == Class::Exec { size_of::<ExecRecord>() } else { size_of::<Record>() };
    (bytes.len() == expected).then(|| (record, &bytes[size_of::<Record>()..]))
}

impl Event {
    /// `texts`: as [`decode`] gives them. `unix_minus_monotonic_ns`: to add to the record's time.
    pub(crate) fn of(record: &Record, texts: &[u8], unix_minus_monotonic_ns: u64) -> Option<Self> {
        let [first, second] = record.args;
        let (local_port, remote_port) = ((second >> 16) as u16, second as u16);
        let detail = match Class::from_number(record.class)? {
            Class::Exec => {
                let (path, name) = texts.split_at(texts.len().min(PATH_LENGTH));
                Detail::Exec { path: text(path), name: text(name) }
            }
            Class::Fork => Detail::Fork { child: first as u32 },
            // As in wait(2): the code in the second byte, a signal in the low seven bits.
            Class::Exit => Detail::Exit { code: (first >> 8) as u8, signal: (first & 0x7f) as u8, age_ns: second },
            Class::Tcp => Detail::Tcp {
                old: tcp_state(first >> 8).to_owned(),
                new: tcp_state(first & 0xff).to_owned(),
                local_port,
                remote_port,
            },
            Class::TcpReset => Detail::TcpReset { sent: first == 1, local_port, remote_port },
            Class::Input => Detail::Input {
                device_major: (first >> 20) as u32,
                device_minor: (first & 0xf_ffff) as u32,
                bytes: second,
            },
            Class::Oom => Detail::Oom { victim: first as u32 },
            Class::Mark => Detail::Mark { mark: (first >> 32) as u32, handover: second, generation: first as u32 },
            Class::Orientation => {
                let cause = Turn::of((first >> 16) & 0xffff, first & 0xffff);
                Detail::Orientation { cause, value: second as i32, times: (first >> 32) as u32 }
            }
        };
        Some(Self {
            time_ns: record.time_ns,
            unix_ns: record.time_ns.wrapping_add(unix_minus_monotonic_ns),
            cgroup: CgroupId(record.cgroup),
            pid: record.pid,
            tid: record.tid,
            uid: (record.uid != UID_UNKNOWN).then_some(record.uid),
            comm: text(&record.comm),
            detail,
        })
    }
}

/// Up to the first zero; whatever is no UTF-8 or would move the cursor is replaced, since programs choose their names.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let text = String::from_utf8_lossy(&bytes[..end]);
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

fn seconds_of(ns: u64) -> f64 {
    ns as f64 / 1e9
}

fn tcp_state(number: u64) -> &'static str {
    const NAMES: [&str; 14] = [
        "?",
        "established",
        "syn-sent",
        "syn-recv",
        "fin-wait-1",
        "fin-wait-2",
        "time-wait",
        "close",
        "close-wait",
        "last-ack",
        "listen",
        "closing",
        "new-syn-recv",
        "bound",
    ];
    usize::try_from(number).ok().and_then(|number| NAMES.get(number)).copied().unwrap_or("?")
}

impl fmt::Display for Event {
    /// Time of day (UTC), class, cgroup, user, pid, program, detail; columns of fixed width as far as they go.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let micros = self.unix_ns / 1_000 % 86_400_000_000;
        let (seconds, micros) = (micros / 1_000_000, micros % 1_000_000);
        write!(
            f,
            "{:02}:{:02}:{:02}.{micros:06} {:<11} {:>8} {:>5} {:>7} {:<15} ",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60,
            self.detail.class().name(),
            self.cgroup.0,
            self.uid.map_or_else(|| "–".to_owned(), |uid| uid.to_string()),
            self.pid,
            self.comm,
        )?;
        match &self.detail {
            Detail::Exec { path, name } if name == path || name.is_empty() => f.write_str(path),
            Detail::Exec { path, name } => write!(f, "{path} as {name}"),
            Detail::Fork { child } => write!(f, "child {child}"),
            Detail::Exit { code, signal: 0, age_ns } => write!(f, "code {code} after {:.3} s", seconds_of(*age_ns)),
            Detail::Exit { signal, age_ns, .. } => write!(f, "signal {signal} after {:.3} s", seconds_of(*age_ns)),
            Detail::Tcp { old, new, local_port, remote_port } => {
                write!(f, "{old} → {new}, port {local_port}, peer {remote_port}")
            }
            Detail::TcpReset { sent, local_port, remote_port } => {
                let way = if *sent { "sent" } else { "received" };
                write!(f, "{way}, port {local_port}, peer {remote_port}")
            }
            Detail::Input { device_major, device_minor, bytes } => {
                write!(f, "{bytes} B from device {device_major}:{device_minor}")
            }
            Detail::Oom { victim } => write!(f, "victim {victim}"),
            Detail::Mark { mark, handover, generation } => {
                write!(f, "mark {mark} of handover {handover}, generation {generation}")
            }
            Detail::Orientation { cause, value, times: 1 } => write!(f, "{} {value}", cause.in_words()),
            Detail::Orientation { cause, value, times } => {
                write!(f, "{} {value}, the last of {times}", cause.in_words())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(class: Class, args: [u64; 2]) -> Record {
        let mut comm = [0; 16];
        comm[..5].copy_from_slice(b"a\x1b[2J");
        Record { time_ns: 5_000, cgroup: 77, class: class as u16, slot: 1, pid: 3, tid: 4, uid: 1000, comm, args }
    }

    #[test]
    fn events_are_one_line_and_survive_json() {
        for class in Class::ALL {
            let event = Event::of(&record(class, [0x0102_0304, 0x1f90_0050]), b"/bin/x\0y", 1_000_000_000)
                .expect("every class has a form");
            assert_eq!(event.detail.class(), class);
            let line = event.to_string();
            assert!(line.contains(class.name()) && !line.chars().any(char::is_control), "{line}");
            let json = serde_json::to_string(&event).expect("serialises");
            assert_eq!(serde_json::from_str::<Event>(&json).expect("comes back"), event, "{json}");
        }
    }

    #[test]
    fn exit_codes_and_signals_are_told_apart() {
        let exit = |status| Event::of(&record(Class::Exit, [status, 7]), b"", 0).map(|event| event.detail);
        assert_eq!(exit(3 << 8), Some(Detail::Exit { code: 3, signal: 0, age_ns: 7 }));
        assert_eq!(exit(9), Some(Detail::Exit { code: 0, signal: 9, age_ns: 7 }));
        assert_eq!(exit(11 | 0x80), Some(Detail::Exit { code: 0, signal: 11, age_ns: 7 }));
    }

    #[test]
    fn bytes_that_are_no_record_are_refused() {
        assert!(decode(&[0; 10]).is_none());
        let mut bytes = [0u8; 64];
        bytes[16] = 99;
        assert!(decode(&bytes).is_none(), "an unknown class");
        bytes[16] = Class::Exec as u8;
        assert!(decode(&bytes).is_none(), "an exec without a path");
        bytes[16] = Class::Fork as u8;
        assert!(decode(&bytes).is_some());
    }

    #[test]
    fn class_names_are_parsed() {
        assert_eq!(Classes::parse("exec, mark"), Ok(Classes::NONE.with(Class::Exec).with(Class::Mark)));
        assert!(Classes::parse("exec,nothing").is_err());
    }
}
