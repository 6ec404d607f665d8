//! The messages between the supervisor and one process of a service.
//!
//! What for: the words of a handover, the same in both directions of an update (a rollback is the same conversation
//! with the roles exchanged). Not for: state, which never travels in messages but lies in segments.
//!
//! Descriptors ride beside a message (`SCM_RIGHTS`); each variant says which belong to it. A process is *owner* or
//! *follower*. One handover, seen from the supervisor:
//!
//! ```text
//!           owner                         supervisor                        follower
//!   start                                                    ◀── Hello, Ready
//!                                         Welcome{owner: false} + pages ─▶
//!   SYNC                                  Segment{i} + fd ─────────────▶   (every segment it holds)
//!           ◀── Follow{on}
//!           Connections{…} + fds ──▶      checks cookies, forwards ─────▶  (registers, touches none)
//!           Segment, SegmentRetired,
//!           ConnectionsClosed ──▶         forwards ────────────────────▶
//!           ◀── CaughtUp{round} ──▶ {commit}    CaughtUp{round, commit} ──▶  ◀── CaughtUp{round}
//!   QUIESCE ◀── Yield
//!   DELTA   Connections{carry} ──▶        forwards ────────────────────▶
//!           Yielded{commit, n} ──▶
//!   PROMOTE                               control word; Own{commit, n} ──▶  ◀── Owned
//!           (follower now)                                                 (owner now)
//! ```
//!
//! Abort after `Yield`: `Own` goes back to the old owner, the control word unchanged. `Own` to a process that owns
//! already is answered with `Owned` and changes nothing. All messages of one channel arrive in order, and both sides
//! rely on it: what was sent before `Yielded` is complete when `Yielded` is read.

use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd};

use rkyv::rancor;
use rkyv::util::AlignedVec;

use crate::sys;

/// Version of these messages, the first thing both sides compare.
pub const PROTOCOL_VERSION: u32 = 1;

/// Records per `Connections` message: each may carry one descriptor, and the kernel takes at most 253 per message.
pub const CONNECTIONS_PER_MESSAGE_MAX: usize = 253;

/// Longest `carry` of one record, bytes: it still fits one message with its envelope. A longer one is sent in pieces.
pub const CARRY_LEN_MAX: usize = 60 * 1024;

/// A place in the shared log: `offset` bytes into segment `segment`. Ordered as the log is.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize,
)]
pub struct LogPosition {
    pub segment: u64,
    /// Bytes from the start of the segment, header included.
    pub offset: u64,
}

impl fmt::Display for LogPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.segment, self.offset)
    }
}

/// Where a log ends, and what is alive in it there: two processes that agree on both hold the same state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Commit {
    pub position: LogPosition,
    /// Sum of a hash of the place of every living record, modulo 2⁶⁴.
    pub digest: u64,
}

/// How the state of a service gets to a successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum StateKind {
    /// There is none.
    None,
    /// It lives in segments that every generation maps.
    Resident,
    /// It lives in the owner's memory; a copy is written while the owner serves, then every change.
    Precopied,
    /// It lives in the owner's memory; a copy is written when the owner has stopped serving.
    Snapshot,
}

/// One established connection on its way from owner to follower.
#[derive(Debug, Clone, PartialEq, Eq, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct ConnectionRecord {
    /// `SO_COOKIE` of the socket; the receiver compares it with the descriptor it got.
    pub cookie: u64,
    /// Name of the listener (`LISTEN_FDNAMES`) that accepted it.
    pub listener: String,
    /// Unparsed input, unsent output and the application's state of this connection, as the service encodes it.
    pub carry: Vec<u8>,
    /// True when a descriptor of this message belongs to this record (descriptors in the order of the records that
    /// have one). False for a record that only replaces the `carry` of a connection that was sent before.
    pub attached: bool,
    /// True when the carry goes on in the next record of the same cookie (not `attached`): a carry may be longer than
    /// a message.
    pub more: bool,
}

/// From the supervisor to a process of the service.
#[derive(Debug, Clone, PartialEq, Eq, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum ToService {
    /// Answer to `Hello`. Three descriptors: the control page, the ownership page, and the reading end of a pipe whose other
    /// end closes when the supervisor dies. `owner`: this process owns the service from the start (its
    /// first generation); it behaves as if `Own` with no commit had followed.
    Welcome { service: String, generation: u32, owner: bool },
    /// The supervisor was restarted. Three descriptors as with `Welcome`, which replace the ones before.
    NewSupervisor,
    /// One descriptor: segment `index` of the state log.
    Segment { index: u64 },
    /// The owner no longer needs segment `index`: follow up to what is committed, then unmap it.
    SegmentRetired { index: u64 },
    /// To the owner. On: send every connection there is, then every change (`Connections`, `ConnectionsClosed`). Off: stop;
    /// nobody follows the state either, so that an owner which wrote an older schema for its follower moves on to its own.
    Follow { on: bool },
    /// To the follower. As many descriptors as records with `attached`.
    Connections { records: Vec<ConnectionRecord> },
    /// To the follower: the owner (or its client) closed these; close the duplicates, or the client hangs.
    ConnectionsClosed { cookies: Vec<u64> },
    /// Answer with `CaughtUp` of the same round: the owner once everything before is sent, the follower once it has
    /// followed the log to `commit`.
    CaughtUp { round: u64, commit: Option<Commit> },
    /// To the owner: stop serving, finish what is in flight within `budget_us` microseconds, answer `Yielded`.
    Yield { handover: u64, budget_us: u64 },
    /// Serve. The control word already names this generation. `commit`: where the log ends according to `Yielded`;
    /// `None` when nobody could say (the owner died, or keeps no state): take everything that is published.
    /// `connections_open`: how many connections the receiver must hold, `None` when unknown. `follow`: as after
    /// `Follow{on}`, but the other process already holds every connection: send changes only.
    ///
    /// A process that yielded and is told to own again takes back what it carried over when nobody has begun to serve since,
    /// which the ownership page says. Otherwise, when `connections_open` is `None` and the word is not
    /// `orderly`, an owner died with whatever it had read and not answered: connections are closed, because a client can
    /// deal with an end but not with an answer that never comes.
    ///
    /// Whoever is told to own takes the ownership lock first, and fails when somebody holds it. A process that the word
    /// names behaves as if `Own` without commit and number had come when the supervisor dies, or says nothing for
    /// `ownership::CLAIM_AFTER`, and the lock is free.
    Own { handover: u64, commit: Option<Commit>, connections_open: Option<u64>, follow: bool },
    /// Finish within `drain_ms` milliseconds, answer `Drained` and exit.
    Retire { drain_ms: u64 },
}

/// From a process of the service to the supervisor.
#[derive(Debug, Clone, PartialEq, Eq, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum ToSupervisor {
    /// The first message. `schema_written` is among the schemas the other generation must read. As long as it is followed,
    /// this process goes on in the schema of the owner before it when that is among `schemas_written_back`.
    Hello {
        protocol: u32,
        sdk: String,
        schemas_read: Vec<u32>,
        schema_written: u32,
        schemas_written_back: Vec<u32>,
        state: StateKind,
    },
    /// Initialised; could own as soon as it is told.
    Ready,
    /// One descriptor: a new segment of the log, sent before anything in it is acknowledged to a client.
    Segment {
        index: u64,
    },
    /// Everything alive in segment `index` has been appended again and committed.
    SegmentRetired {
        index: u64,
    },
    /// From the owner of a state that is copied, before `CaughtUp` and `Yielded`: how many bytes of it were written for
    /// the present follower.
    StateMoved {
        bytes: u64,
    },
    /// As many descriptors as records with `attached`.
    Connections {
        records: Vec<ConnectionRecord>,
    },
    ConnectionsClosed {
        cookies: Vec<u64>,
    },
    /// `commit`: where this process's view of the log ends (`None`: it keeps no state). `connections`: how many it holds.
    CaughtUp {
        round: u64,
        commit: Option<Commit>,
        connections: u64,
    },
    /// Stopped serving; the log ends at `commit`; `connections_open` connections were handed over and not closed since.
    Yielded {
        handover: u64,
        commit: Option<Commit>,
        connections_open: u64,
    },
    /// Serving. `connections` it serves from the start.
    Owned {
        handover: u64,
        connections: u64,
    },
    /// Nothing left to do; about to exit.
    Drained,
    /// Cannot do what was asked; stays what it was (owner or follower) before the question.
    Failed {
        what: String,
    },
}

/// A message could not be made or understood.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    #[error("message cannot be archived")]
    Encode(#[source] rancor::Error),
    #[error("{len} bytes are no valid {kind} message")]
    Invalid {
        kind: &'static str,
        len: usize,
        #[source]
        source: rancor::Error,
    },
}

/// What a [`Channel`](crate::channel::Channel) can carry.
pub trait Message: Sized + fmt::Debug {
    fn encode(&self) -> Result<AlignedVec, MessageError>;
    /// `bytes` are untrusted and validated whole.
    fn decode(bytes: &[u8]) -> Result<Self, MessageError>;
    /// How many descriptors must come with this message.
    fn descriptors(&self) -> usize;
    /// Which message it is, for logs and reports.
    fn name(&self) -> &'static str;
    /// Whether its descriptors are connections.
    fn carries_connections(&self) -> bool;
}

fn attached(records: &[ConnectionRecord]) -> usize {
    records.iter().filter(|record| record.attached).count()
}

impl Message for ToService {
    fn encode(&self) -> Result<AlignedVec, MessageError> {
        rkyv::to_bytes::<rancor::Error>(self).map_err(MessageError::Encode)
    }

    fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        decode_with(bytes, "ToService", rkyv::from_bytes::<Self, rancor::Error>)
    }

    fn descriptors(&self) -> usize {
        match self {
            Self::Welcome { .. } | Self::NewSupervisor => 3,
            Self::Segment { .. } => 1,
            Self::Connections { records } => attached(records),
            _ => 0,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Welcome { .. } => "Welcome",
            Self::NewSupervisor => "NewSupervisor",
            Self::Segment { .. } => "Segment",
            Self::SegmentRetired { .. } => "SegmentRetired",
            Self::Follow { .. } => "Follow",
            Self::Connections { .. } => "Connections",
            Self::ConnectionsClosed { .. } => "ConnectionsClosed",
            Self::CaughtUp { .. } => "CaughtUp",
            Self::Yield { .. } => "Yield",
            Self::Own { .. } => "Own",
            Self::Retire { .. } => "Retire",
        }
    }

    fn carries_connections(&self) -> bool {
        matches!(self, Self::Connections { .. })
    }
}

impl Message for ToSupervisor {
    fn encode(&self) -> Result<AlignedVec, MessageError> {
        rkyv::to_bytes::<rancor::Error>(self).map_err(MessageError::Encode)
    }

    fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        decode_with(bytes, "ToSupervisor", rkyv::from_bytes::<Self, rancor::Error>)
    }

    fn descriptors(&self) -> usize {
        match self {
            Self::Segment { .. } => 1,
            Self::Connections { records } => attached(records),
            _ => 0,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Hello { .. } => "Hello",
            Self::Ready => "Ready",
            Self::Segment { .. } => "Segment",
            Self::SegmentRetired { .. } => "SegmentRetired",
            Self::Connections { .. } => "Connections",
            Self::ConnectionsClosed { .. } => "ConnectionsClosed",
            Self::CaughtUp { .. } => "CaughtUp",
            Self::Yielded { .. } => "Yielded",
            Self::Owned { .. } => "Owned",
            Self::StateMoved { .. } => "StateMoved",
            Self::Drained => "Drained",
            Self::Failed { .. } => "Failed",
        }
    }

    fn carries_connections(&self) -> bool {
        matches!(self, Self::Connections { .. })
    }
}

/// rkyv needs its bytes aligned; a slice that is not gets copied once.
fn decode_with<M>(
    bytes: &[u8],
    kind: &'static str,
    from_bytes: impl FnOnce(&[u8]) -> Result<M, rancor::Error>,
) -> Result<M, MessageError> {
    let wrap = |source| MessageError::Invalid { kind, len: bytes.len(), source };
    if (bytes.as_ptr() as usize).is_multiple_of(AlignedVec::<16>::ALIGNMENT) {
        return from_bytes(bytes).map_err(wrap);
    }
    let mut aligned = AlignedVec::<16>::with_capacity(bytes.len());
    aligned.extend_from_slice(bytes);
    from_bytes(&aligned).map_err(wrap)
}

/// Groups records so that each group fits one message: at most [`CONNECTIONS_PER_MESSAGE_MAX`] records and
/// [`CARRY_LEN_MAX`] bytes of names and carry. Returns the ends of the groups.
#[must_use]
pub fn split_connections(records: &[ConnectionRecord]) -> Vec<usize> {
    // What one record costs in the archive besides its text: fixed part and padding, rounded up.
    const RECORD_OVERHEAD: usize = 48;
    const GROUP_LEN_MAX: usize = CARRY_LEN_MAX + 1024;
    let mut ends = Vec::new();
    let (mut count, mut len) = (0, 0);
    for (at, record) in records.iter().enumerate() {
        let cost = RECORD_OVERHEAD + record.listener.len() + record.carry.len();
        if count > 0 && (count == CONNECTIONS_PER_MESSAGE_MAX || len + cost > GROUP_LEN_MAX) {
            ends.push(at);
            (count, len) = (0, 0);
        }
        count += 1;
        len += cost;
    }
    if count > 0 {
        ends.push(records.len());
    }
    ends
}

/// The kernel's id of a socket (`SO_COOKIE`): the same for every duplicate, never used twice while the host is up.
///
/// # Errors
/// When `fd` is no socket.
pub fn socket_cookie(fd: BorrowedFd<'_>) -> std::io::Result<u64> {
    let mut cookie = 0_u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the pointers refer to locals of the stated size that outlive the call.
    let result = unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_COOKIE, (&raw mut cookie).cast(), &raw mut len)
    };
    sys::check(result)?;
    Ok(cookie)
}
