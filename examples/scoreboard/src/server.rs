//! The event loop, one thread, and the protocol, a line each way:
//!
//! ```text
//!  SET name points [note]  →  OK                 GET name  →  points note, or -
//!  ADD name points         →  the new points     DEL name  →  OK             COUNT  →  number of names
//! ```
//!
//! One turn: read and execute what is there, publish the state once, look whether this process may still write, send the
//! answers. What a handover finds half read or half sent goes with its connection.

use std::collections::HashMap;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _, RawFd};
use std::time::Duration;

use anyhow::{Context as _, Result};
use warmswap_sdk::{Event, Service};

use crate::board::{Board, Score};

/// Longest line; a client that sends a longer one is let go.
const LINE_LEN_MAX: usize = 1 << 20;
/// A client that does not read its answers is not read from any more.
const UNSENT_LEN_MAX: usize = 1 << 20;
/// Bytes read per client and turn.
const READ_LEN: usize = 64 << 10;

#[derive(Debug)]
struct Client {
    stream: TcpStream,
    input: Vec<u8>,
    output: Vec<u8>,
    gone: bool,
}

impl Client {
    fn new(stream: TcpStream) -> Self {
        Self { stream, input: Vec::new(), output: Vec::new(), gone: false }
    }

    fn read(&mut self) {
        let mut buffer = [0; READ_LEN];
        match self.stream.read(&mut buffer) {
            Ok(0) => self.gone = true,
            Ok(len) => self.input.extend_from_slice(&buffer[..len]),
            Err(error) => self.gone = !is_transient(&error),
        }
    }

    fn send(&mut self) {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(len) => drop(self.output.drain(..len)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    self.gone |= !is_transient(&error);
                    return;
                }
            }
        }
    }

    /// Everything that is not in the socket: length of the input, input, output.
    fn take_carry(&mut self) -> Vec<u8> {
        let (input, output) = (std::mem::take(&mut self.input), std::mem::take(&mut self.output));
        [&(input.len() as u32).to_le_bytes()[..], &input, &output].concat()
    }

    fn put_carry(&mut self, carry: &[u8]) {
        let (input, output) = carry
            .split_first_chunk::<4>()
            .and_then(|(len, rest)| rest.split_at_checked(u32::from_le_bytes(*len) as usize))
            .unwrap_or_default();
        (self.input, self.output) = (input.to_vec(), output.to_vec());
    }
}

fn is_transient(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

pub(crate) struct Server<B> {
    service: Service<B>,
    clients: HashMap<u64, Client>,
}

impl<B: Board> Server<B> {
    pub(crate) fn new(service: Service<B>) -> Self {
        Self { service, clients: HashMap::new() }
    }

    /// Until the supervisor says that it is enough.
    pub(crate) fn run(mut self) -> Result<()> {
        self.service.ready()?;
        loop {
            if self.converse()? {
                self.service.drained()?;
                return Ok(());
            }
            let ready = self.wait()?;
            if self.service.is_owner() {
                self.turn(&ready)?;
            }
        }
    }

    /// Does what the supervisor wants. True when this process is to end.
    fn converse(&mut self) -> Result<bool> {
        while let Some(event) = self.service.poll()? {
            match event {
                Event::ConnectionArrived { cookie, fd, carry, .. } => {
                    let mut client = Client::new(fd.into());
                    client.put_carry(&carry);
                    self.clients.insert(cookie, client);
                }
                Event::ConnectionCarry { cookie, carry } => {
                    if let Some(client) = self.clients.get_mut(&cookie) {
                        client.put_carry(&carry);
                    }
                }
                Event::ConnectionClosed { cookie } => drop(self.clients.remove(&cookie)),
                Event::BecomeOwner { .. } => {
                    self.service.serving()?;
                    self.turn(&[])?;
                }
                Event::Quiesce { .. } => {
                    let left = |client: &Client| !client.input.is_empty() || !client.output.is_empty();
                    let left = self.clients.iter_mut().filter(|(_, client)| left(client));
                    let carry = left.map(|(cookie, client)| (*cookie, client.take_carry())).collect();
                    self.service.yielded(carry)?;
                }
                Event::Retire { .. } => return Ok(true),
                Event::ControlLost => {}
            }
        }
        Ok(false)
    }

    /// Until the supervisor speaks, or a client of the owner; returns what can be read or written.
    fn wait(&self) -> Result<Vec<RawFd>> {
        let entry = |fd: RawFd, events| libc::pollfd { fd, events, revents: 0 };
        let mut entries: Vec<libc::pollfd> = Vec::with_capacity(self.clients.len() + 2);
        entries.extend(self.service.control_fd().map(|fd| entry(fd.as_raw_fd(), libc::POLLIN)));
        if self.service.is_owner() {
            entries.extend(self.service.listeners().iter().map(|l| entry(l.as_fd().as_raw_fd(), libc::POLLIN)));
            for client in self.clients.values() {
                let reads = client.output.len() < UNSENT_LEN_MAX;
                let events =
                    if reads { libc::POLLIN } else { 0 } | if client.output.is_empty() { 0 } else { libc::POLLOUT };
                entries.push(entry(client.stream.as_raw_fd(), events));
            }
        }
        // Rounded up: rounding down would spin for the last part of a millisecond.
        let ms =
            |within: Duration| libc::c_int::try_from(within.as_micros().div_ceil(1000)).unwrap_or(libc::c_int::MAX);
        let timeout = self.service.wake_within().map_or(-1, ms);
        // SAFETY: the pointer and the length are those of live entries.
        let count = unsafe { libc::poll(entries.as_mut_ptr(), entries.len() as libc::nfds_t, timeout) };
        if count < 0 {
            let error = std::io::Error::last_os_error();
            return if is_transient(&error) { Ok(Vec::new()) } else { Err(error).context("cannot wait") };
        }
        Ok(entries.iter().filter(|entry| entry.revents != 0).map(|entry| entry.fd).collect())
    }

    fn turn(&mut self, ready: &[RawFd]) -> Result<()> {
        self.accept()?;
        for client in self.clients.values_mut() {
            if ready.contains(&client.stream.as_raw_fd()) {
                client.read();
            }
            while client.output.len() < UNSENT_LEN_MAX
                && let Some(end) = client.input.iter().position(|byte| *byte == b'\n')
            {
                let line: Vec<u8> = client.input.drain(..=end).collect();
                let answer = execute(self.service.state_mut(), String::from_utf8_lossy(&line).trim_end());
                client.output.extend_from_slice(answer.as_bytes());
                client.output.push(b'\n');
            }
            client.gone |= client.input.len() > LINE_LEN_MAX;
        }
        self.service.commit()?;
        if !self.service.may_write() {
            return Ok(()); // the answers stay, for whoever takes the connections up
        }
        self.clients.values_mut().for_each(Client::send);
        let gone: Vec<u64> = self.clients.iter().filter(|(_, c)| c.gone).map(|(cookie, _)| *cookie).collect();
        for cookie in gone {
            self.clients.remove(&cookie);
            self.service.connection_closed(cookie);
        }
        Ok(())
    }

    fn accept(&mut self) -> Result<()> {
        for at in 0..self.service.listeners().len() {
            let listener = TcpListener::from(self.service.listeners()[at].as_fd().try_clone_to_owned()?);
            listener.set_nonblocking(true)?;
            // An error belongs to the one connection, or passes.
            while let Ok((stream, _)) = listener.accept() {
                stream.set_nonblocking(true)?;
                stream.set_nodelay(true)?;
                let cookie = self.service.connection_opened(stream.as_fd(), at)?;
                self.clients.insert(cookie, Client::new(stream));
            }
        }
        Ok(())
    }
}

/// What one line is answered with.
fn execute(board: &mut impl Board, line: &str) -> String {
    let mut words = line.splitn(4, ' ');
    let (verb, name) = (words.next().unwrap_or_default(), words.next().unwrap_or_default().to_owned());
    let points = words.next().and_then(|text| text.parse::<i64>().ok());
    let note = words.next().unwrap_or_default().to_owned();
    let changed = match (verb, points) {
        ("GET", _) => {
            let text = |score: &Score| format!("{} {}", score.points, score.note).trim_end().to_owned();
            return board.score(&name).map_or_else(|| "-".to_owned(), text);
        }
        ("COUNT", _) => return board.names().to_string(),
        ("SET", Some(points)) => board.set(name, Some(Score { points, note })).map(|()| "OK".to_owned()),
        ("ADD", Some(more)) => {
            let Score { points, note } = board.score(&name).cloned().unwrap_or(Score { points: 0, note });
            let points = points.saturating_add(more);
            board.set(name, Some(Score { points, note })).map(|()| points.to_string())
        }
        ("DEL", _) => board.set(name, None).map(|()| "OK".to_owned()),
        _ => return "ERR say SET name points [note], ADD name points, GET name, DEL name or COUNT".to_owned(),
    };
    changed.unwrap_or_else(|error| format!("ERR {error}"))
}
