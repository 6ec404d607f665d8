//! What the BPF programs and the sensor must agree on, bit for bit: records, counters, map names, the layout table of
//! kernel structs, and the arithmetic of latency buckets.
//!
//! Not here: how records are produced (`ebpf/probes`) or turned into windows (`runtime/sensor`). Everything is plain
//! data without pointers, so that a shared mapping of it means the same on both sides.
//!
//! Keyed by *slot*: user space gives every watched cgroup a slot (1 and up; 0 means "not watched"), and the frequent
//! counters live at `slot * cpus + cpu` in one mapped array. Finding the slot of the current cgroup is a comparison
//! with a per-CPU cached word (see [`CacheWord`]) and only after a change of cgroup a hash lookup.
#![no_std]

mod buckets;
mod layout;

pub use buckets::{BUCKETS, SUB_BUCKETS_PER_OCTAVE, bucket_of_ns, bucket_upper_ns};
pub use layout::{ARG_MISSING, Layout, OFFSET_MISSING, SYSCALL_TABLE, SyscallKind};

/// Names of the maps in the BPF object.
pub mod map {
    /// Marks and out-of-memory kills.
    pub const RING_URGENT: &str = "RING_URGENT";
    /// CPU → by which the reader of `RING_URGENT` there is woken; where there is none, the ring wakes who waits for it.
    pub const WAKERS: &str = "WAKERS";
    /// Never wakes, drained on a timer: everything else.
    pub const RING_BULK: &str = "RING_BULK";
    /// `slot * cpus + cpu` → [`crate::Counters`].
    pub const COUNTERS: &str = "COUNTERS";
    /// `slot * DISTRIBUTIONS + distribution` → [`crate::Histogram`].
    pub const HISTOGRAMS: &str = "HISTOGRAMS";
    /// `slot` → since when it is watched, `CLOCK_MONOTONIC`, ns.
    pub const SINCE: &str = "SINCE";
    /// `cpu * CACHE_LANES + lane` → [`crate::CacheWord`].
    pub const CACHE: &str = "CACHE";
    /// Socket → what is known of its connection; private to the probes.
    pub const CONNECTIONS: &str = "CONNECTIONS";
    /// cgroup id → slot.
    pub const WATCHED: &str = "WATCHED";
    /// Id of the cgroup that block requests are charged to → slot. The same ids as in `WATCHED` where the io
    /// controller is on v2, those of the v1 blkio hierarchy where it is not.
    pub const WATCHED_BLOCK: &str = "WATCHED_BLOCK";
    /// One [`crate::Control`].
    pub const CONTROL: &str = "CONTROL";
    /// `class` → [`crate::ClassAccount`].
    pub const ACCOUNT: &str = "ACCOUNT";
    /// Number of a socket → requests that wait for their answer, [`crate::Places`].
    pub const REQUESTS: &str = "REQUESTS";
    /// `slot` → when the last request arrived; private to the probes.
    pub const ASKED: &str = "ASKED";
    /// (message, subject) → how often; private to the probes.
    pub const SAID: &str = "SAID";
    /// [`crate::PORT_SHARED`] and [`crate::PORT_REFUSED`] → how many sockets.
    pub const PORTS: &str = "PORTS";
}

/// Sockets that share their port with whoever binds it too.
pub const PORT_SHARED: u32 = 0;
/// Sockets that the kernel did not let.
pub const PORT_REFUSED: u32 = 1;

/// Names of the read-only globals that the sensor sets before loading.
pub mod global {
    pub const LAYOUT: &str = "LAYOUT";
    pub const CPUS: &str = "CPUS";
    pub const OWN_TGID: &str = "OWN_TGID";
    pub const BULK_RING_BYTES: &str = "BULK_RING_BYTES";
    pub const SYSCALLS: &str = "SYSCALLS";
}

/// The `prctl` option that is a handover mark: "WSWP". No kernel knows it, so the call fails with EINVAL and does
/// nothing else.
pub const MARK_OPTION: u64 = 0x5753_5750;

/// Classes of events that are sent. Discriminants are array indices and stay as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum Class {
    /// A process replaced its program. Followed by the path and the first argument ([`ExecRecord`]).
    Exec = 0,
    /// A process (not a thread) was created. `args[0]`: pid of the child.
    Fork = 1,
    /// The first thread of a process ended. `args[0]`: exit code as in `wait(2)`; `args[1]`: its age, ns, 0 when unknown.
    Exit = 2,
    /// A TCP socket changed state. `args[0]`: old state << 8 | new state; `args[1]`: local port << 16 | remote port.
    Tcp = 3,
    /// A TCP reset. `args[0]`: 1 sent, 2 received; `args[1]`: ports as above.
    TcpReset = 4,
    /// A read from a terminal or an input device returned data. `args[0]`: device number as the kernel holds it
    /// (major << 20 | minor); `args[1]`: bytes.
    Input = 5,
    /// The kernel chose a process to kill for want of memory. `args[0]`: pid of the victim.
    Oom = 6,
    /// A handover mark. `args[0]`: mark << 32 | generation; `args[1]`: handover id.
    Mark = 7,
    /// A reader of an input device was told that the screen turns, or may. `args[0]`: how often in one read << 32 | type << 16 |
    /// code, as in `linux/input-event-codes.h`, of the last time; `args[1]`: its value.
    Orientation = 8,
}

/// How many classes there are.
pub const CLASSES: usize = 9;

impl Class {
    pub const ALL: [Self; CLASSES] = [
        Self::Exec,
        Self::Fork,
        Self::Exit,
        Self::Tcp,
        Self::TcpReset,
        Self::Input,
        Self::Oom,
        Self::Mark,
        Self::Orientation,
    ];

    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Exec => "exec",
            Self::Fork => "fork",
            Self::Exit => "exit",
            Self::Tcp => "tcp",
            Self::TcpReset => "tcp-reset",
            Self::Input => "input",
            Self::Oom => "oom",
            Self::Mark => "mark",
            Self::Orientation => "orientation",
        }
    }

    /// From the number in a record; `None` for a number no probe sends.
    #[must_use]
    pub const fn from_number(value: u16) -> Option<Self> {
        let value = value as usize;
        if value < CLASSES { Some(Self::ALL[value]) } else { None }
    }

    /// The class's bit in [`Control::classes`].
    #[must_use]
    pub const fn bit(self) -> u64 {
        1 << self as u32
    }

    /// How full the bulk ring may be, percent, for a record of this class to be sent still. What is above is kept for
    /// classes whose loss would cost more: of TCP states and forks the counters tell nearly all, of a launch only its record
    /// tells what was launched.
    #[must_use]
    pub const fn sheds_above_percent(self) -> u64 {
        match self {
            Self::Tcp => 75,
            Self::Fork => 80,
            Self::Input => 85,
            Self::TcpReset => 90,
            Self::Exit => 95,
            Self::Exec | Self::Orientation | Self::Oom | Self::Mark => 100,
        }
    }

    /// Urgent classes go through a ring of their own, wake who reads it, and are always sent.
    #[must_use]
    pub const fn urgent(self) -> bool {
        matches!(self, Self::Oom | Self::Mark)
    }
}

/// The fixed part of every event: one cache line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Record {
    /// `CLOCK_MONOTONIC`, ns.
    pub time_ns: u64,
    /// cgroup v2 id; 0 when the kernel could not tell.
    pub cgroup: u64,
    pub class: u16,
    /// Slot of the deepest watched cgroup around it; 0 when none is watched.
    pub slot: u16,
    /// Process (thread group) id; 0 when the event did not happen in a process's context.
    pub pid: u32,
    pub tid: u32,
    /// The user: real id of the process, owner of the socket, or [`UID_UNKNOWN`].
    pub uid: u32,
    pub comm: [u8; 16],
    pub args: [u64; 2],
}

/// No user has this id: `chown` and the like take it for "leave as it is".
pub const UID_UNKNOWN: u32 = u32::MAX;

/// How much of a program's path, and of its first argument, is sent.
pub const PATH_LENGTH: usize = 64;

/// An exec: the fixed part, then the path of the program and the name that it was called by (`argv[0]`), each
/// zero-terminated; what is longer is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct ExecRecord {
    pub record: Record,
    pub path: [u8; PATH_LENGTH],
    pub name: [u8; PATH_LENGTH],
}

/// What one CPU counted for one slot. Only grows. Whole cache lines, so that CPUs do not share any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Counters {
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub write_bytes: u64,
    pub tty_inputs: u64,
    pub run_ns: u64,
    pub page_faults: u64,
    pub rx_packets: u64,
    pub rx_bytes: u64,
    pub tx_packets: u64,
    pub tx_bytes: u64,
    pub tcp_opened: u64,
    pub tcp_closed: u64,
    pub tcp_resets: u64,
    pub tcp_resets_received: u64,
    pub execs: u64,
    pub forks: u64,
    pub exits: u64,
    pub oom_kills: u64,
    pub block_requests: u64,
    pub block_bytes: u64,
    pub block_sequential: u64,
    pub run_delay_ns: u64,
    pub major_faults: u64,
    pub tcp_retransmits: u64,
    pub accepts: u64,
    pub device_inputs: u64,
    pub orientation_changes: u64,
    pub reserved: [u64; 4],
}

/// What is kept as a histogram per slot. Discriminants are array indices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Distribution {
    /// From the first segment of a request to the first of its answer.
    RequestLatency = 0,
    /// From the arrival of one request to that of the next, over all connections.
    RequestGap = 1,
    /// Smoothed round-trip time of each connection, as what it carries is counted: once a window, and as it ends.
    RoundTrip = 2,
    /// From the making of a block request to its completion.
    BlockLatency = 3,
}

/// How many there are.
pub const DISTRIBUTIONS: u32 = 4;

impl Distribution {
    pub const ALL: [Self; DISTRIBUTIONS as usize] =
        [Self::RequestLatency, Self::RequestGap, Self::RoundTrip, Self::BlockLatency];
}

/// Durations of one slot, by bucket.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Histogram {
    pub buckets: [u64; BUCKETS],
}

/// What user space tells the probes while they run.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Control {
    /// Raised by one whenever `WATCHED` changed; cached slots of another epoch are looked up again.
    pub epoch: u64,
    /// Bit per [`Class`]: which classes to send. Urgent classes are sent whatever stands here.
    pub classes: u64,
    /// 1: send events of every cgroup; 0: of watched ones only. Urgent classes are sent from everywhere.
    pub everywhere: u64,
    /// Requests that began before this moment, `CLOCK_MONOTONIC`, ns, are not measured: not all of them was seen.
    pub requests_since: u64,
    /// 1: requests that begin now are not measured either.
    pub requests_closed: u64,
    /// 1: handover marks are looked for at the end of system calls, because this kernel shows them nowhere else.
    pub marks_at_exit: u64,
}

/// A request that waits for its answer; nothing when `sock` is 0.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Request {
    pub sock: u64,
    /// `CLOCK_MONOTONIC`, ns.
    pub since_ns: u64,
    /// What was to be sent next as it arrived, in sequence numbers.
    pub next: u32,
    pub slot: u32,
    pub unused: u64,
}

/// Requests whose sockets have the same number.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Places(pub [Request; 4]);

/// How many [`Places`] there are.
pub const REQUEST_ROWS: u32 = 1 << 13;

/// Kernel side of the accounting: what a probe wanted to send, and what was not sent for want of room in the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct ClassAccount {
    pub emitted: u64,
    pub dropped: u64,
    /// Of those dropped: while there was room, but [not for this class](Class::sheds_above_percent).
    pub shed: u64,
}

/// What a person may act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InputDevice {
    /// What a person or a supervisor types into.
    Terminal,
    /// evdev and the like.
    Device,
}

impl InputDevice {
    /// By the numbers of a character device. Not `/dev/ptmx` (5:2): what is read there is the output of the program on the
    /// other side.
    #[inline(always)]
    #[must_use]
    pub const fn of(major: u32, minor: u32) -> Option<Self> {
        const TTY: u32 = 4;
        const TTY_AUXILIARY: u32 = 5;
        const PTMX_MINOR: u32 = 2;
        const INPUT: u32 = 13;
        const PTY_FIRST: u32 = 136;
        const PTY_LAST: u32 = 143;
        const SERIAL_LOW_DENSITY: u32 = 204;
        const HYPERVISOR_CONSOLE: u32 = 229;
        if major == INPUT {
            return Some(Self::Device);
        }
        let terminal = major == TTY
            || (major == TTY_AUXILIARY && minor != PTMX_MINOR)
            || (major >= PTY_FIRST && major <= PTY_LAST)
            || major == SERIAL_LOW_DENSITY
            || major == HYPERVISOR_CONSOLE;
        if terminal { Some(Self::Terminal) } else { None }
    }
}

/// Cached words per CPU: one lane per kind of context, so that an interrupting program does not fight for the word
/// of the program it interrupted. Two cache lines per CPU, the second for tasks and packets, which are now of this cgroup and
/// now of that.
pub const CACHE_LANES: u32 = 16;
pub const LANE_SYSCALL: u32 = 0;
pub const LANE_OTHER: u32 = 1;
/// The first of [`LANES_BY_ID`], by cgroup id.
pub const LANE_BY_ID: u32 = 8;
pub const LANES_BY_ID: u32 = 8;

/// Highest number of slots: what fits a [`CacheWord`].
pub const SLOTS_MAX: u32 = 1 << 12;

/// A cgroup id, an epoch and a slot in one word, so that it is read and written whole: `id:40 | epoch:12 | slot:12`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheWord(pub u64);

impl CacheWord {
    /// Ids from here on are not cached (kernfs would have to wrap its 32-bit counter 256 times).
    pub const CGROUP_LIMIT: u64 = 1 << 40;

    /// The upper part that must match for the slot to be valid.
    #[inline(always)]
    #[must_use]
    pub const fn key(cgroup: u64, epoch: u64) -> u64 {
        (cgroup << 24) | ((epoch & 0xfff) << 12)
    }

    #[inline(always)]
    #[must_use]
    pub const fn slot(self) -> u32 {
        (self.0 & 0xfff) as u32
    }

    #[inline(always)]
    #[must_use]
    pub const fn matches(self, key: u64) -> bool {
        self.0 & !0xfff == key
    }
}

const _: () = {
    assert!(size_of::<Record>() == 64);
    assert!(size_of::<ExecRecord>() == 192);
    assert!(size_of::<Counters>() == 256);
    assert!(SLOTS_MAX <= 1 << u16::BITS);
    assert!(size_of::<Control>() == 48);
    assert!(size_of::<Request>() == 32);
    assert!(size_of::<ClassAccount>() == 24);
    assert!(size_of::<Histogram>() == BUCKETS * 8);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_and_their_numbers_agree() {
        for (index, class) in Class::ALL.into_iter().enumerate() {
            assert_eq!(class as usize, index);
            assert_eq!(Class::from_number(index as u16), Some(class));
        }
        assert_eq!(Class::from_number(CLASSES as u16), None);
    }

    #[test]
    fn a_cached_slot_is_valid_only_for_its_cgroup_and_epoch() {
        let word = CacheWord(CacheWord::key(4711, 3) | 17);
        assert!(word.matches(CacheWord::key(4711, 3)));
        assert!(word.matches(CacheWord::key(4711, 3 + 4096)));
        assert!(!word.matches(CacheWord::key(4711, 4)));
        assert!(!word.matches(CacheWord::key(4712, 3)));
        assert_eq!(word.slot(), 17);
    }
}
