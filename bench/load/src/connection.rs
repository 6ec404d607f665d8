//! One connection of the load: requests that are due, requests that are on their way, and bytes half sent or half
//! received. Knows nothing of other connections or of the schedule.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::ledger::{Ledger, Operation};
use crate::resp::{self, ProtocolError, Reply};

/// A request that was sent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pending {
    pub(crate) operation: Operation,
    pub(crate) due_ns: u64,
    pub(crate) sent_ns: u64,
}

/// What tells a socket from every other one that ever was on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    cookie: u64,
    local: SocketAddr,
    peer: SocketAddr,
}

impl Identity {
    pub(crate) fn of(stream: &TcpStream) -> io::Result<Self> {
        Ok(Self { cookie: socket_cookie(stream)?, local: stream.local_addr()?, peer: stream.peer_addr()? })
    }
}

/// SO_COOKIE: unique among all sockets since boot.
fn socket_cookie(stream: &TcpStream) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: `cookie` and `length` live through the call, `length` says how large `cookie` is, and the descriptor is
    // open because `stream` is borrowed.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// How a connection ended.
#[derive(Debug)]
pub(crate) enum Ended {
    ByPeer,
    Broken(io::Error),
    Protocol(ProtocolError),
}

#[derive(Debug)]
pub(crate) struct Connection {
    stream: Option<TcpStream>,
    /// Of the socket opened at the start; `None` once that one was lost.
    pub(crate) original: Option<Identity>,
    pub(crate) ledger: Ledger,
    /// Instants at which requests were due that were not sent yet.
    pub(crate) due: VecDeque<u64>,
    pub(crate) pending: VecDeque<Pending>,
    out: Vec<u8>,
    out_sent: usize,
    received: Vec<u8>,
    received_parsed: usize,
    /// When the last socket was lost; 0 before the first loss.
    pub(crate) lost_ns: u64,
    /// Whether the poller was asked to report room for more output.
    pub(crate) wants_write: bool,
}

impl Connection {
    pub(crate) fn new(ledger: Ledger) -> Self {
        Self {
            stream: None,
            original: None,
            ledger,
            due: VecDeque::new(),
            pending: VecDeque::new(),
            out: Vec::new(),
            out_sent: 0,
            received: Vec::new(),
            received_parsed: 0,
            lost_ns: 0,
            wants_write: false,
        }
    }

    pub(crate) fn open(&mut self, stream: TcpStream) {
        self.stream = Some(stream);
        self.wants_write = false;
    }

    pub(crate) fn is_open(&self) -> bool {
        self.stream.is_some()
    }

    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.stream.as_ref().map(AsFd::as_fd)
    }

    /// Forgets the socket and what was in transit on it. Returns the socket, so that the caller can close it after
    /// it was taken out of the poller.
    pub(crate) fn close(&mut self, now_ns: u64) -> Option<TcpStream> {
        self.lost_ns = now_ns;
        self.original = None;
        self.out.clear();
        self.received.clear();
        (self.out_sent, self.received_parsed) = (0, 0);
        self.wants_write = false;
        self.stream.take()
    }

    /// Takes the socket out without calling it lost (at the end of the run).
    pub(crate) fn take_stream(&mut self) -> Option<TcpStream> {
        self.stream.take()
    }

    /// Queues one request for sending.
    pub(crate) fn request(&mut self, operation: Operation, due_ns: u64, now_ns: u64) {
        let key = self.ledger.key(operation);
        let key = key.as_bytes();
        match operation {
            Operation::Increment { .. } => resp::encode(&mut self.out, &[b"INCR", key]),
            Operation::Set { key: number, sequence } => {
                let content = self.ledger.content(number, sequence);
                resp::encode(&mut self.out, &[b"SET", key, &content]);
            }
            Operation::GetCounter { .. } | Operation::GetValue { .. } => resp::encode(&mut self.out, &[b"GET", key]),
        }
        self.pending.push_back(Pending { operation, due_ns, sent_ns: now_ns });
    }

    /// Sends as much as the socket takes. True when nothing is left.
    pub(crate) fn flush(&mut self) -> Result<bool, Ended> {
        let Some(stream) = self.stream.as_mut() else { return Ok(true) };
        while self.out_sent < self.out.len() {
            match stream.write(&self.out[self.out_sent..]) {
                Ok(0) => return Err(Ended::ByPeer),
                Ok(count) => self.out_sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Ended::Broken(error)),
            }
        }
        self.out.clear();
        self.out_sent = 0;
        Ok(true)
    }

    /// Reads what is there. An end is reported only after everything before it has been read, so that answers that
    /// came with it still count.
    pub(crate) fn receive(&mut self, chunk: &mut [u8]) -> Option<Ended> {
        let stream = self.stream.as_mut()?;
        loop {
            match stream.read(chunk) {
                Ok(0) => return Some(Ended::ByPeer),
                Ok(count) => {
                    self.received.extend_from_slice(&chunk[..count]);
                    if count < chunk.len() {
                        return None;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Some(Ended::Broken(error)),
            }
        }
    }

    /// The next complete answer among the bytes received.
    pub(crate) fn next_reply(&mut self) -> Result<Option<Reply>, Ended> {
        match resp::parse(&self.received[self.received_parsed..]).map_err(Ended::Protocol)? {
            Some((reply, used)) => {
                self.received_parsed += used;
                Ok(Some(reply))
            }
            None => {
                self.received.drain(..self.received_parsed);
                self.received_parsed = 0;
                Ok(None)
            }
        }
    }
}
