//! A server on listeners of every kind, that keeps nothing but its connections. It answers
//!
//! * a line `TEXT` with `gN TEXT`, where N is its generation;
//! * a datagram in the same way, to its sender;
//! * the line `bye` by ending its own side of the connection; what comes after is counted and not answered;
//! * the line `counted` with how many bytes that were, over all connections.
//!
//! With the argument `deaf` it accepts and reads nothing, until another generation owns.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use warmswap_sdk::transfer::state::NoState;
use warmswap_sdk::{Event, ListenerKind, Service};

/// Taken from one socket before the supervisor and the others have their turn.
const BATCH: usize = 64;
const LENGTH_MAX: usize = 16 << 10;
const CLIENT_READS_WITHIN: Duration = Duration::from_secs(10);

fn main() -> Result<()> {
    let deaf = std::env::args().nth(1).as_deref() == Some("deaf");
    let service = warmswap_sdk::join(NoState)?;
    Server { service, deaf, connections: HashMap::new(), leave_by: None }.run()
}

struct Server {
    service: Service<NoState>,
    deaf: bool,
    connections: HashMap<u64, Connection>,
    leave_by: Option<Instant>,
}

struct Connection {
    fd: OwnedFd,
    input: Vec<u8>,
    output: Vec<u8>,
    /// Our side has ended, and so many bytes came since.
    counted: Option<u64>,
    /// The other side has ended.
    ended: bool,
}

impl Connection {
    fn new(fd: OwnedFd, carry: &[u8]) -> Option<Self> {
        let mut connection = Self { fd, input: Vec::new(), output: Vec::new(), counted: None, ended: false };
        connection.take_up(carry).then_some(connection)
    }

    /// Flags, bytes counted, length of the input, input, output.
    fn carry(&mut self) -> Vec<u8> {
        let mut carry = vec![u8::from(self.counted.is_some()) | u8::from(self.ended) << 1];
        carry.extend(self.counted.unwrap_or(0).to_le_bytes());
        carry.extend((self.input.len() as u64).to_le_bytes());
        carry.append(&mut self.input);
        carry.append(&mut self.output);
        carry
    }

    fn take_up(&mut self, carry: &[u8]) -> bool {
        let Some((flags, rest)) = carry.split_first() else { return true };
        let Some((counted, rest)) = rest.split_first_chunk() else { return false };
        let Some((length, rest)) = rest.split_first_chunk() else { return false };
        let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
        let Some((input, output)) = rest.split_at_checked(length) else { return false };
        self.counted = (flags & 1 != 0).then_some(u64::from_le_bytes(*counted));
        self.ended = flags & 2 != 0;
        (self.input, self.output) = (input.to_vec(), output.to_vec());
        true
    }
}

impl Server {
    fn run(mut self) -> Result<()> {
        self.service.ready()?;
        loop {
            if self.converse()? || self.leave_by.is_some_and(|by| self.is_done(by)) {
                self.service.drained()?;
                return Ok(());
            }
            for ready in self.wait() {
                if let Some(at) =
                    self.service.listeners().iter().position(|listener| listener.as_fd().as_raw_fd() == ready)
                {
                    self.arrive(at)?;
                } else if let Some((cookie, _)) = self.connections.iter().find(|(_, c)| c.fd.as_raw_fd() == ready) {
                    self.talk(*cookie)?;
                }
            }
        }
    }

    fn is_done(&self, by: Instant) -> bool {
        !self.service.is_owner() || self.connections.values().all(|c| c.output.is_empty()) || Instant::now() >= by
    }

    /// True when the process is to end.
    fn converse(&mut self) -> Result<bool> {
        while let Some(event) = self.service.poll()? {
            match event {
                Event::ConnectionArrived { cookie, fd, carry, .. } => {
                    let connection = Connection::new(fd, &carry).context("a carry that is not ours")?;
                    self.connections.insert(cookie, connection);
                }
                Event::ConnectionCarry { cookie, carry } => {
                    let known = self.connections.get_mut(&cookie).is_none_or(|connection| connection.take_up(&carry));
                    anyhow::ensure!(known, "a carry that is not ours");
                }
                Event::ConnectionClosed { cookie } => drop(self.connections.remove(&cookie)),
                Event::BecomeOwner { .. } => {
                    self.service.serving()?;
                    for cookie in self.connections.keys().copied().collect::<Vec<_>>() {
                        self.answer(cookie)?;
                    }
                }
                Event::Quiesce { .. } => {
                    let unsettled = self.connections.iter_mut();
                    let carry = unsettled.map(|(cookie, connection)| (*cookie, connection.carry())).collect();
                    self.service.yielded(carry)?;
                }
                Event::Retire { deadline } => self.leave_by = Some(deadline),
                // An owner goes on, the others are told to retire.
                Event::ControlLost => {}
            }
        }
        Ok(false)
    }

    /// What is ready. Only an owner looks at anything but the supervisor.
    fn wait(&self) -> Vec<RawFd> {
        let entry = |fd: BorrowedFd<'_>, events| libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
        let mut entries: Vec<_> = self.service.control_fd().map(|fd| entry(fd, libc::POLLIN)).into_iter().collect();
        if self.service.is_owner() && !self.deaf {
            entries.extend(self.service.listeners().iter().map(|listener| entry(listener.as_fd(), libc::POLLIN)));
            entries.extend(self.connections.values().map(|connection| {
                let read = if connection.ended { 0 } else { libc::POLLIN };
                let write = if connection.output.is_empty() { 0 } else { libc::POLLOUT };
                entry(connection.fd.as_fd(), read | write)
            }));
        }
        let patience = self.service.wake_within().unwrap_or(Duration::from_millis(100)).as_micros().div_ceil(1000);
        // SAFETY: as many entries as stated, all live.
        unsafe { libc::poll(entries.as_mut_ptr(), entries.len() as libc::nfds_t, patience as libc::c_int) };
        entries.iter().filter(|entry| entry.revents != 0).map(|entry| entry.fd).collect()
    }

    fn arrive(&mut self, at: usize) -> Result<()> {
        for _ in 0..BATCH {
            let listener = &self.service.listeners()[at];
            if matches!(listener.kind, ListenerKind::Udp | ListenerKind::UnixDatagram) {
                if !self.answer_datagram(at)? {
                    return Ok(());
                }
                continue;
            }
            let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
            let socket = listener.as_fd().as_raw_fd();
            // SAFETY: no address is asked for.
            let fd = unsafe { libc::accept4(socket, std::ptr::null_mut(), std::ptr::null_mut(), flags) };
            if fd < 0 {
                return Ok(());
            }
            // SAFETY: just accepted, owned by nobody else.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            let cookie = self.service.connection_opened(fd.as_fd(), at)?;
            self.connections.insert(cookie, Connection::new(fd, &[]).context("a new connection carries nothing")?);
        }
        Ok(())
    }

    /// False when none waits.
    fn answer_datagram(&self, at: usize) -> Result<bool> {
        let socket = self.service.listeners()[at].as_fd().as_raw_fd();
        let mut text = [0_u8; LENGTH_MAX];
        let mut sender = MaybeUninit::<libc::sockaddr_storage>::zeroed();
        let mut length = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
        // SAFETY: buffer, address and its length are live and as large as stated.
        let got = unsafe {
            let address = sender.as_mut_ptr().cast();
            libc::recvfrom(socket, text.as_mut_ptr().cast(), text.len(), libc::MSG_DONTWAIT, address, &raw mut length)
        };
        let Ok(got) = usize::try_from(got) else { return Ok(false) };
        let answer = [format!("g{} ", self.service.generation()).as_bytes(), &text[..got]].concat();
        anyhow::ensure!(self.service.may_write(), "a datagram was read that another generation should have read");
        let asked = Instant::now();
        loop {
            // SAFETY: both buffers are live and as long as stated.
            let put = unsafe {
                let address = sender.as_ptr().cast();
                libc::sendto(socket, answer.as_ptr().cast(), answer.len(), libc::MSG_NOSIGNAL, address, length)
            };
            let error = io::Error::last_os_error();
            // Few answers fit into the queue of a client that has not read the ones before.
            if put < 0 && error.kind() == io::ErrorKind::WouldBlock && asked.elapsed() < CLIENT_READS_WITHIN {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            if put < 0 {
                eprintln!("a datagram is not answered: {error}");
            }
            return Ok(true);
        }
    }

    fn talk(&mut self, cookie: u64) -> Result<()> {
        let Some(connection) = self.connections.get_mut(&cookie) else { return Ok(()) };
        let mut text = [0_u8; LENGTH_MAX];
        let socket = connection.fd.as_raw_fd();
        // SAFETY: the buffer is live and as long as stated.
        let got = unsafe { libc::recv(socket, text.as_mut_ptr().cast(), text.len(), libc::MSG_DONTWAIT) };
        match usize::try_from(got) {
            Ok(0) => connection.ended = true,
            Ok(got) => match &mut connection.counted {
                Some(counted) => *counted += got as u64,
                None => connection.input.extend_from_slice(&text[..got]),
            },
            Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return self.close(cookie),
        }
        self.answer(cookie)
    }

    /// Whole lines of the input; then sends what the socket takes.
    fn answer(&mut self, cookie: u64) -> Result<()> {
        let counted: u64 = self.connections.values().filter_map(|connection| connection.counted).sum();
        let Some(connection) = self.connections.get_mut(&cookie) else { return Ok(()) };
        while let Some(end) = connection.input.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = connection.input.drain(..=end).collect();
            match &line[..end] {
                b"bye" => {
                    // SAFETY: two integers.
                    unsafe { libc::shutdown(connection.fd.as_raw_fd(), libc::SHUT_WR) };
                    connection.counted = Some(connection.input.drain(..).len() as u64);
                }
                b"counted" => connection.output.extend(format!("{counted}\n").bytes()),
                _ => {
                    connection.output.extend(format!("g{} ", self.service.generation()).bytes());
                    connection.output.extend(line);
                }
            }
        }
        anyhow::ensure!(self.service.may_write(), "asked to answer without owning");
        while !connection.output.is_empty() {
            let (socket, rest) = (connection.fd.as_raw_fd(), &connection.output);
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            // SAFETY: `rest` is live.
            let put = unsafe { libc::send(socket, rest.as_ptr().cast(), rest.len(), flags) };
            match usize::try_from(put) {
                Ok(put) => drop(connection.output.drain(..put)),
                Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(_) => return self.close(cookie),
            }
        }
        if connection.ended { self.close(cookie) } else { Ok(()) }
    }

    fn close(&mut self, cookie: u64) -> Result<()> {
        self.connections.remove(&cookie);
        self.service.connection_closed(cookie);
        Ok(())
    }
}
