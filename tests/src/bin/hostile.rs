//! A container that means harm: `hostile STAGE MISDEED` takes part in a handover up to the stage, by hand and without the
//! SDK, then does what `warmswap_tests::hostile` says of the misdeed, and lives on.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, IntoRawFd as _, OwnedFd, RawFd};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use warmswap_sdk::transfer::channel::{MESSAGE_LEN_MAX, ServiceChannel};
use warmswap_sdk::transfer::message::{
    Commit, ConnectionRecord, LogPosition, Message as _, PROTOCOL_VERSION, StateKind, ToService, ToSupervisor,
    socket_cookie,
};
use warmswap_sdk::transfer::segment::{Header, SEGMENT_LEN_MIN};
use warmswap_tests::hostile::{BEGUN, Misdeed, Stage};

/// What session-store writes.
const SCHEMA: u32 = 1;
const DESCRIPTORS_MAX: usize = 253;
/// So long an owner behaves.
const SERVES: Duration = Duration::from_millis(100);
/// Between two packets of those that never stop: enough to keep the other side busy, without starving the machine.
const BREATH: Duration = Duration::from_micros(20);

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let stage = arguments.next().as_deref().and_then(Stage::of_name).context("say when: first, shadow or verify")?;
    let misdeed = arguments.next().as_deref().and_then(Misdeed::of_name).context("say what to do")?;
    let hostile = Hostile::join(stage)?;
    if stage != Stage::Shadow {
        sleep(SERVES); // what it said last is heard
    }
    std::fs::write(BEGUN, "").context("cannot say that it begins")?;
    hostile.misbehave(misdeed)?;
    loop {
        sleep(Duration::from_secs(60));
    }
}

struct Hostile {
    /// Our end, under its number; the channel type would not let us send what we want to.
    control: RawFd,
    /// The supervisor's end.
    rescue: RawFd,
    lifeline: Option<OwnedFd>,
    page: Option<OwnedFd>,
    /// Segments and connections that came.
    held: Vec<OwnedFd>,
}

fn numbered(variable: &str) -> Result<RawFd> {
    std::env::var(variable)?.parse().with_context(|| format!("{variable} is no number"))
}

impl Hostile {
    /// Behaves until it is time.
    fn join(stage: Stage) -> Result<Self> {
        let (control, rescue) = (numbered("WARMSWAP_CONTROL_FD")?, numbered("WARMSWAP_RESCUE_FD")?);
        // SAFETY: passed to this process for it alone to own, and taken once.
        let mut channel = ServiceChannel::from_fd(unsafe { OwnedFd::from_raw_fd(control) })?;
        let mut hostile = Self { control, rescue, lifeline: None, page: None, held: Vec::new() };
        channel.send(&hello(PROTOCOL_VERSION, vec![SCHEMA]), &[])?;
        channel.send(&ToSupervisor::Ready, &[])?;
        let mut connections = BTreeMap::new();
        loop {
            let received = channel.recv_timeout(Duration::from_secs(3600))?;
            let (message, mut fds) = received.context("nobody said anything for an hour")?;
            match message {
                ToService::Welcome { .. } | ToService::NewSupervisor => {
                    hostile.lifeline = fds.pop();
                    drop(fds.pop()); // the ownership lock
                    hostile.page = fds.pop();
                }
                ToService::Connections { records } => {
                    let attached = records.iter().filter(|record| record.attached);
                    connections.extend(attached.map(|record| record.cookie).zip(fds));
                }
                ToService::ConnectionsClosed { cookies } => {
                    cookies.iter().for_each(|cookie| drop(connections.remove(cookie)));
                }
                ToService::CaughtUp { .. } if stage == Stage::Shadow => break,
                ToService::CaughtUp { round, commit } => {
                    channel
                        .send(&ToSupervisor::CaughtUp { round, commit, connections: connections.len() as u64 }, &[])?;
                }
                ToService::Own { handover, .. } => {
                    let connections = connections.len() as u64;
                    channel.send(&ToSupervisor::Owned { handover, connections }, &[])?;
                    break;
                }
                _ => hostile.held.append(&mut fds),
            }
        }
        hostile.held.extend(connections.into_values());
        let _ = channel.into_fd().into_raw_fd(); // stays open under its number
        Ok(hostile)
    }

    fn misbehave(&self, misdeed: Misdeed) -> Result<()> {
        match misdeed {
            Misdeed::Noise => (0..200).for_each(|n| self.packet(&noise(n, (n as usize * 331) % 4000 + 1), &[])),
            Misdeed::Empty => (0..10).for_each(|_| self.packet(&[], &[])),
            Misdeed::Lengths => self.lengths()?,
            Misdeed::Flood => {
                let bytes = ToSupervisor::Failed { what: "x".repeat(MESSAGE_LEN_MAX - 1024) }.encode()?;
                self.for_ever(|| self.packet(&bytes, &[]));
            }
            Misdeed::Chatter => {
                let messages = answers().iter().map(|answer| answer.encode()).collect::<Result<Vec<_>, _>>()?;
                self.for_ever(|| messages.iter().for_each(|bytes| self.packet(bytes, &[])));
            }
            Misdeed::Greetings => {
                let bytes = hello(PROTOCOL_VERSION, vec![SCHEMA]).encode()?;
                self.for_ever(|| self.packet(&bytes, &[]));
            }
            Misdeed::Deaf => {}
            Misdeed::Descriptors => {
                let ready = ToSupervisor::Ready.encode()?;
                let file = File::open("/")?;
                let fds = [file.as_raw_fd(); DESCRIPTORS_MAX];
                self.for_ever(|| self.packet(&ready, &fds));
            }
            Misdeed::Strangers => self.for_ever(|| {
                if let Err(error) = self.strangers() {
                    eprintln!("{error:#}");
                }
            }),
            Misdeed::Missing => {
                self.say(&ToSupervisor::Segment { index: 0 }, &[])?;
                let records = vec![connection(1), connection(2)];
                self.say(&ToSupervisor::Connections { records }, &[self.control])?;
            }
            Misdeed::Unsealed => {
                self.segment(&memory(c"hostile", &header(0).to_bytes(), SEGMENT_LEN_MIN as u64, false)?, 0)?;
            }
            Misdeed::Shrunk => {
                let file = memory(c"hostile", &header(0).to_bytes(), SEGMENT_LEN_MIN as u64, false)?;
                self.segment(&file, 0)?;
                File::from(file).set_len(0)?;
            }
            Misdeed::Forged => self.forged()?,
            Misdeed::Foreign => self.foreign()?,
            Misdeed::Huge => {
                for index in 0..4 {
                    self.segment(&memory(c"hostile", &header(index).to_bytes(), i64::MAX as u64, true)?, index)?;
                }
            }
            Misdeed::Many => {
                for index in 0..6000 {
                    let file = memory(c"hostile", &header(index).to_bytes(), SEGMENT_LEN_MIN as u64, true)?;
                    self.segment(&file, index)?;
                }
            }
            Misdeed::Cookie => {
                let (ours, _theirs) = std::os::unix::net::UnixStream::pair()?;
                let records = vec![connection(self.cookie(self.control)?)];
                self.say(&ToSupervisor::Connections { records }, &[ours.as_raw_fd()])?;
            }
            Misdeed::Listener => {
                for fd in [3, self.control, self.rescue] {
                    self.say(&ToSupervisor::Connections { records: vec![connection(self.cookie(fd)?)] }, &[fd])?;
                }
            }
            Misdeed::Answers => {
                for answer in answers() {
                    self.say(&answer, &[])?;
                }
            }
            Misdeed::Words => {
                let what = format!("\x1b[2J\x1b]0;owned\x07\r\0\u{9b}31m\u{202e}\n{}", "loud ".repeat(12_000));
                self.say(&ToSupervisor::Failed { what: what.clone() }, &[])?;
                eprintln!("{what}");
            }
            Misdeed::Schemas => {
                self.say(&hello(PROTOCOL_VERSION, (0..15_000).collect()), &[])?;
                self.say(&hello(u32::MAX, vec![SCHEMA]), &[])?;
            }
            Misdeed::Closed => [self.control, self.rescue].iter().for_each(|fd| drop(unsafe_owned(*fd))),
            Misdeed::Shut => {
                for fd in [self.control, self.rescue] {
                    // SAFETY: integers only.
                    unsafe { libc::shutdown(fd, libc::SHUT_RDWR) };
                }
            }
            Misdeed::Children => self.children()?,
            Misdeed::Rescue => self.rescue(),
            Misdeed::Lifeline => {
                let lifeline = self.lifeline.as_ref().context("no lifeline came")?;
                let path = format!("/proc/self/fd/{}", lifeline.as_raw_fd());
                let mut pipe = File::options().write(true).open(path).context("the pipe opens for writing")?;
                io::Write::write_all(&mut pipe, b"alive? dead?")?;
                std::mem::forget(pipe);
            }
            Misdeed::Log => {
                // SAFETY: integers only.
                if unsafe { libc::ftruncate(1, 1 << 40) } != 0 {
                    bail!("the log cannot be made longer: {}", io::Error::last_os_error());
                }
            }
            Misdeed::Page => {
                let page = self.page.as_ref().context("no page came")?;
                let path = format!("/proc/self/fd/{}", page.as_raw_fd());
                let file = File::options().read(true).write(true).open(path)?;
                let word = std::os::unix::fs::FileExt::write_all_at(&file, &u64::MAX.to_le_bytes(), 8);
                let shrunk = file.set_len(0);
                if word.is_ok() || shrunk.is_ok() {
                    // What the scenario looks for.
                    self.say(&ToSupervisor::Failed { what: "wrote to the control page".into() }, &[])?;
                }
            }
        }
        Ok(())
    }

    fn for_ever(&self, mut each: impl FnMut()) {
        loop {
            each();
            sleep(BREATH);
        }
    }

    fn lengths(&self) -> Result<()> {
        let whole = ToSupervisor::Connections { records: vec![connection(1); 4] }.encode()?;
        for at in (0..whole.len() - 4).step_by(4) {
            let mut bytes = whole.to_vec();
            bytes[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
            self.packet(&bytes, &[]);
        }
        self.packet(&vec![0; MESSAGE_LEN_MAX + 1], &[]);
        self.packet(&vec![255; 3 * MESSAGE_LEN_MAX], &[]);
        Ok(())
    }

    /// Connections that nobody made.
    fn strangers(&self) -> Result<()> {
        let mut sockets = Vec::new();
        for _ in 0..DESCRIPTORS_MAX {
            sockets.push(OwnedFd::from(std::os::unix::net::UnixDatagram::unbound()?));
        }
        let fds: Vec<RawFd> = sockets.iter().map(|socket| socket.as_raw_fd()).collect();
        let records = fds.iter().map(|fd| Ok(connection(self.cookie(*fd)?))).collect::<Result<Vec<_>>>()?;
        self.say(&ToSupervisor::Connections { records }, &fds)
    }

    fn forged(&self) -> Result<()> {
        let len = SEGMENT_LEN_MIN as u64;
        let commit_at = 64;
        for (index, byte) in [(0, 0), (1, 8), (2, 16), (3, 32), (4, 48)] {
            let mut bytes = header(index).to_bytes();
            bytes[byte] ^= 0xff;
            self.segment(&memory(c"hostile", &bytes, len, true)?, index)?;
        }
        self.segment(&memory(c"hostile", &header(u64::MAX).to_bytes(), len, true)?, 5)?;
        self.segment(&memory(c"hostile", &header(u64::MAX).to_bytes(), len, true)?, u64::MAX)?;
        let mut bytes = header(6).to_bytes();
        bytes[commit_at..commit_at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
        self.segment(&memory(c"hostile", &bytes, len, true)?, 6)?;
        self.segment(&memory(c"hostile", &header(7).to_bytes(), len * 2, true)?, 7)
    }

    fn foreign(&self) -> Result<()> {
        let (reader, writer) = io::pipe()?;
        let huge_pages = memory_of(c"hostile", &[], 2 << 20, false, libc::MFD_HUGETLB).ok();
        let files = [
            Some(OwnedFd::from(reader)),
            Some(writer.into()),
            Some(File::open("/")?.into()),
            Some(File::open("/dev/zero")?.into()),
            Some(File::open("/dev/urandom")?.into()),
            Some(File::open("/proc/self/mem")?.into()),
            Some(File::create("/tmp/plain")?.into()),
            huge_pages,
        ];
        for (index, file) in (0..).zip(files.into_iter().flatten()) {
            self.segment(&file, index)?;
        }
        Ok(())
    }

    fn children(&self) -> Result<()> {
        // SAFETY: this process has one thread; the child makes system calls only.
        match unsafe { libc::fork() } {
            -1 => bail!("no child: {}", io::Error::last_os_error()),
            0 => {
                let bytes = noise(7, 100);
                self.for_ever(|| self.packet(&bytes, &[]));
            }
            _ => [self.control, self.rescue].iter().for_each(|fd| drop(unsafe_owned(*fd))),
        }
        Ok(())
    }

    /// What the agent has to say is read here, and what it hears comes from here.
    fn rescue(&self) {
        let mut buffer = vec![0_u8; MESSAGE_LEN_MAX];
        let small: libc::c_int = 1;
        // SAFETY: a live integer of the stated size.
        unsafe {
            let len = size_of::<libc::c_int>() as libc::socklen_t;
            libc::setsockopt(self.rescue, libc::SOL_SOCKET, libc::SO_SNDBUF, (&raw const small).cast(), len);
        }
        self.for_ever(|| {
            // SAFETY: a live buffer of the stated length.
            unsafe {
                libc::recv(self.control, buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_DONTWAIT);
                libc::recv(self.rescue, buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_DONTWAIT);
                libc::send(self.rescue, buffer.as_ptr().cast(), 100, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL);
            }
        });
    }

    fn cookie(&self, fd: RawFd) -> Result<u64> {
        // SAFETY: open: one of those this process was started with, or the caller's.
        Ok(socket_cookie(unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) })?)
    }

    fn segment(&self, file: &OwnedFd, index: u64) -> Result<()> {
        self.say(&ToSupervisor::Segment { index }, &[file.as_raw_fd()])
    }

    fn say(&self, message: &ToSupervisor, fds: &[RawFd]) -> Result<()> {
        self.packet(&message.encode()?, fds);
        Ok(())
    }

    /// Waits for room; whether anybody listens is all the same.
    fn packet(&self, bytes: &[u8], fds: &[RawFd]) {
        let mut control = [0_u64; 140];
        let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        // SAFETY: an all-zero msghdr is a valid empty one; it is filled with pointers to live buffers that are large
        // enough for DESCRIPTORS_MAX descriptors.
        unsafe {
            let mut header: libc::msghdr = std::mem::zeroed();
            header.msg_iov = &raw mut iov;
            header.msg_iovlen = 1;
            if !fds.is_empty() {
                assert!(fds.len() <= DESCRIPTORS_MAX);
                let len = size_of_val(fds) as u32;
                header.msg_control = control.as_mut_ptr().cast();
                header.msg_controllen = libc::CMSG_SPACE(len) as _;
                let cmsg = libc::CMSG_FIRSTHDR(&raw const header);
                (*cmsg).cmsg_level = libc::SOL_SOCKET;
                (*cmsg).cmsg_type = libc::SCM_RIGHTS;
                (*cmsg).cmsg_len = libc::CMSG_LEN(len) as _;
                std::ptr::copy_nonoverlapping(fds.as_ptr().cast::<u8>(), libc::CMSG_DATA(cmsg), len as usize);
            }
            libc::sendmsg(self.control, &raw const header, libc::MSG_NOSIGNAL);
        }
    }
}

/// To close a number that this process was started with.
fn unsafe_owned(fd: RawFd) -> OwnedFd {
    // SAFETY: nothing in this process uses the number afterwards but system calls that may fail.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn hello(protocol: u32, schemas_read: Vec<u32>) -> ToSupervisor {
    ToSupervisor::Hello {
        protocol,
        sdk: "by hand".into(),
        schemas_read,
        schema_written: SCHEMA,
        schemas_written_back: Vec::new(),
        state: StateKind::Resident,
    }
}

fn connection(cookie: u64) -> ConnectionRecord {
    ConnectionRecord { cookie, listener: "resp".into(), carry: Vec::new(), attached: true, more: false }
}

fn answers() -> Vec<ToSupervisor> {
    let commit = Some(Commit { position: LogPosition { segment: u64::MAX, offset: u64::MAX }, digest: 0 });
    let mut answers = vec![ToSupervisor::Ready, ToSupervisor::Drained];
    for number in [0, 1, 2, 3, u64::MAX] {
        answers.push(ToSupervisor::CaughtUp { round: number, commit, connections: number });
        answers.push(ToSupervisor::Yielded { handover: number, commit, connections_open: number });
        answers.push(ToSupervisor::Owned { handover: number, connections: number });
        answers.push(ToSupervisor::SegmentRetired { index: number });
        answers.push(ToSupervisor::ConnectionsClosed { cookies: vec![number; 1000] });
    }
    answers
}

fn header(index: u64) -> Header {
    Header { index, schema: SCHEMA, len: SEGMENT_LEN_MIN as u64, created_unix_ms: 0, previous_end: 0 }
}

fn memory(name: &CStr, beginning: &[u8], len: u64, sealed: bool) -> Result<OwnedFd> {
    memory_of(name, beginning, len, sealed, 0)
}

fn memory_of(name: &CStr, beginning: &[u8], len: u64, sealed: bool, flags: libc::c_uint) -> Result<OwnedFd> {
    // SAFETY: a valid name; the result is checked.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_ALLOW_SEALING | flags) };
    if fd < 0 {
        bail!("no memory file: {}", io::Error::last_os_error());
    }
    // SAFETY: just made, owned by nobody else.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(len).context("the memory file cannot be that long")?;
    std::os::unix::fs::FileExt::write_all_at(&file, beginning, 0)?;
    if sealed {
        // SAFETY: integers only.
        unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL) };
    }
    Ok(file.into())
}

/// The same bytes for the same seed.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut byte = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|_| byte()).collect()
}
