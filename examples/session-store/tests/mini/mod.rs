//! The least supervisor that can hand a service over: no containers, no journal, no deadlines worth the name. For tests of
//! what a service does; the real one is in `runtime/handover`.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "part of a test: each file uses some of it, and a failed step fails the test"
)]

use std::collections::{BTreeMap, HashSet};
use std::io::{PipeReader, PipeWriter};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use warmswap_sdk::transfer::channel::{ChannelError, SupervisorChannel};
use warmswap_sdk::transfer::control::{ControlPage, ControlWord};
use warmswap_sdk::transfer::message::{Commit, ToService, ToSupervisor, socket_cookie};
use warmswap_sdk::transfer::ownership::OwnershipLock;
use warmswap_sdk::transfer::segment::segment_schema;

const PATIENCE: Duration = Duration::from_secs(20);
const LISTENER_FD: RawFd = 3;
const CONTROL_FD: RawFd = 4;

pub struct Member {
    pub child: Child,
    pub channel: SupervisorChannel,
    pub generation: u32,
}

impl Drop for Member {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How long a switch took.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    pub to_yielded: Duration,
    pub to_owned: Duration,
    /// Until whatever `probe` did was done.
    pub to_probe: Duration,
}

pub struct Mini {
    listener: TcpListener,
    page: ControlPage,
    ownership: OwnershipLock,
    /// Lives as long as this supervisor.
    lifeline: (PipeReader, PipeWriter),
    epoch: u32,
    generation: u32,
    round: u64,
    handover: u64,
    pub segments: BTreeMap<u64, OwnedFd>,
    pub connections: HashSet<u64>,
    pub owner: Member,
    pub follower: Option<Member>,
    pub failures: Vec<String>,
}

impl Mini {
    pub fn start(program: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let page = ControlPage::create().unwrap();
        let ownership = OwnershipLock::create().unwrap();
        let lifeline = std::io::pipe().unwrap();
        let owner = spawn(program, &listener, [page.as_fd(), ownership.as_fd(), lifeline.0.as_fd()], 1);
        let mut mini = Self {
            listener,
            page,
            ownership,
            lifeline,
            epoch: 0,
            generation: 1,
            round: 0,
            handover: 0,
            segments: BTreeMap::new(),
            connections: HashSet::new(),
            owner,
            follower: None,
            failures: Vec::new(),
        };
        mini.own(None, None, false);
        mini.wait_owner(|message| matches!(message, ToSupervisor::Owned { .. }).then_some(()));
        mini
    }

    pub fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    fn own(&mut self, commit: Option<Commit>, connections_open: Option<u64>, follow: bool) {
        self.epoch += 1;
        self.page.store(ControlWord {
            epoch: self.epoch,
            owner: self.owner.generation,
            orderly: connections_open.is_some(),
        });
        self.tell_own(commit, connections_open, follow);
    }

    fn tell_own(&mut self, commit: Option<Commit>, connections_open: Option<u64>, follow: bool) {
        let own = ToService::Own { handover: self.handover, commit, connections_open, follow };
        self.owner.channel.send(&own, &[]).unwrap();
    }

    /// WARM and SYNC: a follower that has everything.
    pub fn add_follower(&mut self, program: &str) {
        self.generation += 1;
        let shared = [self.page.as_fd(), self.ownership.as_fd(), self.lifeline.0.as_fd()];
        let follower = spawn(program, &self.listener, shared, self.generation);
        self.drain_owner();
        for (index, fd) in &self.segments {
            follower.channel.send(&ToService::Segment { index: *index }, &[fd.as_fd()]).unwrap();
        }
        self.follower = Some(follower);
        self.connections.clear();
        self.owner.channel.send(&ToService::Follow { on: true }, &[]).unwrap();
        self.catch_up();
    }

    /// Until owner and follower agree, twice: the second round has little left to do.
    pub fn catch_up(&mut self) {
        for _ in 0..2 {
            self.round += 1;
            let round = self.round;
            self.owner.channel.send(&ToService::CaughtUp { round, commit: None }, &[]).unwrap();
            let (commit, connections) = self.wait_owner(|message| match message {
                ToSupervisor::CaughtUp { round: of, commit, connections } if *of == round => {
                    Some((*commit, *connections))
                }
                _ => None,
            });
            self.follower().channel.send(&ToService::CaughtUp { round, commit }, &[]).unwrap();
            let held = self.wait_follower(|message| match message {
                ToSupervisor::CaughtUp { round: of, connections, .. } if *of == round => Some(*connections),
                _ => None,
            });
            // Connections may have come or gone since the owner answered.
            assert!(held.abs_diff(connections) <= 64, "{held} of {connections} connections");
        }
    }

    pub fn follower(&mut self) -> &mut Member {
        self.follower.as_mut().expect("a follower")
    }

    /// QUIESCE, as far as `Yielded`.
    pub fn yield_owner(&mut self) -> (Option<Commit>, u64) {
        self.handover += 1;
        let handover = self.handover;
        self.owner.channel.send(&ToService::Yield { handover, budget_us: 100_000 }, &[]).unwrap();
        self.wait_owner(|message| match message {
            ToSupervisor::Yielded { handover: of, commit, connections_open } if *of == handover => {
                Some((*commit, *connections_open))
            }
            _ => None,
        })
    }

    /// QUIESCE to PROMOTE. The follower becomes owner, the owner follower. `probe` runs right after `Own` was sent.
    pub fn switch(&mut self, probe: impl FnOnce()) -> Times {
        let begin = Instant::now();
        let (commit, connections_open) = self.yield_owner();
        let to_yielded = begin.elapsed();
        assert_eq!(connections_open, self.connections.len() as u64, "sent and received connections");
        std::mem::swap(&mut self.owner, self.follower.as_mut().expect("a follower"));
        self.own(commit, Some(connections_open), true);
        probe();
        let to_probe = begin.elapsed();
        let handover = self.handover;
        let connections = self.wait_owner(|message| match message {
            ToSupervisor::Owned { handover: of, connections } if *of == handover => Some(*connections),
            _ => None,
        });
        assert_eq!(connections, connections_open);
        Times { to_yielded, to_owned: begin.elapsed(), to_probe }
    }

    /// The owner yields and is told to go on.
    pub fn abort(&mut self) {
        self.yield_owner();
        self.tell_own(None, None, true);
        self.wait_owner(|message| matches!(message, ToSupervisor::Owned { .. }).then_some(()));
    }

    /// The owner dies without a word; the follower takes over what is published.
    pub fn kill_owner(&mut self) {
        let pid = self.owner.child.id() as libc::pid_t;
        // SAFETY: our own child, not reaped yet.
        unsafe { libc::kill(pid, libc::SIGKILL) };
        self.owner.child.wait().unwrap();
        self.ownership.release(self.owner.generation);
        self.drain_owner();
        self.owner = self.follower.take().expect("a follower");
        self.handover += 1;
        self.own(None, None, false);
        self.wait_owner(|message| matches!(message, ToSupervisor::Owned { .. }).then_some(()));
    }

    pub fn retire_follower(&mut self) {
        let mut follower = self.follower.take().expect("a follower");
        follower.channel.send(&ToService::Retire { drain_ms: 1000 }, &[]).unwrap();
        assert!(follower.child.wait().unwrap().success());
    }

    /// COMMIT: nobody follows the owner any more. Returns once it has drawn its conclusions.
    pub fn unfollow(&mut self) {
        self.owner.channel.send(&ToService::Follow { on: false }, &[]).unwrap();
        self.round += 1;
        let round = self.round;
        self.owner.channel.send(&ToService::CaughtUp { round, commit: None }, &[]).unwrap();
        self.wait_owner(|message| {
            matches!(message, ToSupervisor::CaughtUp { round: of, .. } if *of == round).then_some(())
        });
    }

    /// In which schemas the state is, each once.
    pub fn schemas(&self) -> Vec<u32> {
        let mut schemas: Vec<u32> = self.segments.values().filter_map(|fd| segment_schema(fd.as_fd())).collect();
        schemas.dedup();
        schemas
    }

    /// Passes on whatever the owner has said.
    pub fn drain_owner(&mut self) {
        loop {
            match self.owner.channel.try_recv() {
                Ok(Some((message, fds))) => self.forward(message, &fds),
                Ok(None) | Err(ChannelError::Closed) => return,
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn wait_owner<T>(&mut self, pick: impl Fn(&ToSupervisor) -> Option<T>) -> T {
        let begin = Instant::now();
        loop {
            assert!(begin.elapsed() < PATIENCE, "the owner does not answer; failures: {:?}", self.failures);
            let Some((message, fds)) = self.owner.channel.recv_timeout(PATIENCE).unwrap() else { continue };
            if let Some(found) = pick(&message) {
                return found;
            }
            self.forward(message, &fds);
        }
    }

    fn wait_follower<T>(&mut self, pick: impl Fn(&ToSupervisor) -> Option<T>) -> T {
        loop {
            let (message, _) = self.follower().channel.recv_timeout(PATIENCE).unwrap().expect("an answer in time");
            if let Some(found) = pick(&message) {
                return found;
            }
            assert!(!matches!(message, ToSupervisor::Failed { .. }), "{message:?}");
        }
    }

    fn forward(&mut self, message: ToSupervisor, fds: &[OwnedFd]) {
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        let on = match message {
            ToSupervisor::Segment { index } => {
                self.segments.insert(index, fds[0].try_clone().unwrap());
                ToService::Segment { index }
            }
            ToSupervisor::SegmentRetired { index } => {
                self.segments.remove(&index);
                ToService::SegmentRetired { index }
            }
            ToSupervisor::Connections { records } => {
                for (record, fd) in records.iter().filter(|record| record.attached).zip(fds) {
                    assert_eq!(socket_cookie(fd.as_fd()).unwrap(), record.cookie);
                    self.connections.insert(record.cookie);
                }
                ToService::Connections { records }
            }
            ToSupervisor::ConnectionsClosed { cookies } => {
                for cookie in &cookies {
                    self.connections.remove(cookie);
                }
                ToService::ConnectionsClosed { cookies }
            }
            ToSupervisor::Failed { what } => {
                self.failures.push(what);
                return;
            }
            _ => return,
        };
        if let Some(follower) = &self.follower {
            follower.channel.send(&on, &borrowed).unwrap();
        }
    }
}

/// Starts a program as the agent does: listener as descriptor 3, control channel as 4.
fn spawn(program: &str, listener: &TcpListener, welcome_fds: [BorrowedFd<'_>; 3], generation: u32) -> Member {
    let (mut channel, theirs) = SupervisorChannel::pair().unwrap();
    let theirs = theirs.into_fd();
    let (listener, control) = (listener.as_raw_fd(), theirs.as_raw_fd());
    let mut command = Command::new(program);
    command
        .env("LISTEN_FDS", "1")
        .env("LISTEN_FDNAMES", "resp")
        .env_remove("LISTEN_PID")
        .env("WARMSWAP_CONTROL_FD", CONTROL_FD.to_string());
    // SAFETY: only calls that are safe between fork and exec. Both are moved out of the way of 3 and 4 first.
    unsafe {
        command.pre_exec(move || {
            let listener = libc::fcntl(listener, libc::F_DUPFD, 10);
            let control = libc::fcntl(control, libc::F_DUPFD, 10);
            if libc::dup2(listener, LISTENER_FD) == -1 || libc::dup2(control, CONTROL_FD) == -1 {
                return Err(std::io::Error::last_os_error());
            }
            libc::close(listener);
            libc::close(control);
            Ok(())
        });
    }
    let child = command.spawn().unwrap();
    drop(theirs);
    let hello = channel.recv_timeout(PATIENCE).unwrap().expect("Hello").0;
    assert!(matches!(hello, ToSupervisor::Hello { .. }), "{hello:?}");
    let welcome = ToService::Welcome { service: "test".into(), generation, owner: false };
    channel.send(&welcome, &welcome_fds).unwrap();
    let ready = channel.recv_timeout(PATIENCE).unwrap().expect("Ready").0;
    assert_eq!(ready, ToSupervisor::Ready);
    Member { child, channel, generation }
}

/// A client that speaks just enough RESP for the tests.
pub struct Client {
    stream: std::net::TcpStream,
    reader: std::io::BufReader<std::net::TcpStream>,
}

impl Client {
    pub fn new(address: SocketAddr) -> Self {
        let stream = std::net::TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { reader: std::io::BufReader::new(stream.try_clone().unwrap()), stream }
    }

    pub fn send(&mut self, bytes: &[u8]) {
        use std::io::Write;
        self.stream.write_all(bytes).unwrap();
    }

    pub fn line(&mut self) -> String {
        use std::io::BufRead;
        let mut line = String::new();
        assert!(self.reader.read_line(&mut line).unwrap() > 0, "the connection ended");
        line.trim_end().to_owned()
    }

    /// One inline command and its reply: the line, or the bulk string.
    pub fn ask(&mut self, command: &str) -> String {
        self.send(format!("{command}\r\n").as_bytes());
        self.reply()
    }

    pub fn reply(&mut self) -> String {
        let line = self.line();
        if !line.starts_with('$') || line == "$-1" {
            return line;
        }
        let len: usize = line[1..].parse().unwrap();
        let mut bytes = vec![0; len + 2];
        std::io::Read::read_exact(&mut self.reader, &mut bytes).unwrap();
        bytes.truncate(len);
        String::from_utf8(bytes).unwrap()
    }

    pub fn is_closed(&mut self) -> bool {
        use std::io::BufRead;
        matches!(self.reader.fill_buf(), Ok([]))
    }
}
