//! One client: what it has sent that is no whole request yet, and what it has not been sent yet.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use crate::resp::REQUEST_LEN_MAX;

/// A client that does not read its replies is not read from any more once this many bytes wait for it.
pub(crate) const OUTPUT_LEN_MAX: usize = 1 << 20;
/// Bytes read per turn.
const READ_LEN: usize = 32 << 10;
/// Buffers larger than this are given back when they are empty.
const BUFFER_KEPT_MAX: usize = 64 << 10;

#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) fd: OwnedFd,
    pub(crate) input: Vec<u8>,
    pub(crate) output: Vec<u8>,
    /// Bytes of `output` that are sent.
    sent: usize,
    /// Nothing more is read: close when `output` is sent.
    pub(crate) closing: bool,
    /// The client will send nothing more, and is answered what it has sent.
    pub(crate) ended: bool,
    /// Requests wait in `input` because too much output does: execute them when it is sent.
    pub(crate) throttled: bool,
    /// What epoll watches for: reading, writing.
    pub(crate) interest: (bool, bool),
}

/// What became of a read or write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Open,
    /// The other side has gone.
    Gone,
}

impl Connection {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            input: Vec::new(),
            output: Vec::new(),
            sent: 0,
            closing: false,
            ended: false,
            throttled: false,
            interest: (true, false),
        }
    }

    pub(crate) fn unsent(&self) -> usize {
        self.output.len() - self.sent
    }

    /// Whether anything would be lost if the connection were continued from its socket alone.
    pub(crate) fn is_settled(&self) -> bool {
        self.input.is_empty() && self.unsent() == 0 && !self.closing && !self.ended
    }

    pub(crate) fn wants_input(&self) -> bool {
        !self.closing && !self.ended && self.unsent() < OUTPUT_LEN_MAX && self.input.len() < REQUEST_LEN_MAX + READ_LEN
    }

    /// Reads what is there, up to [`READ_LEN`].
    pub(crate) fn read(&mut self, scratch: &mut Vec<u8>) -> Outcome {
        scratch.resize(READ_LEN, 0);
        // SAFETY: the buffer has READ_LEN bytes.
        let got = unsafe { libc::recv(self.fd.as_raw_fd(), scratch.as_mut_ptr().cast(), READ_LEN, libc::MSG_DONTWAIT) };
        match usize::try_from(got) {
            Ok(0) => Outcome::Gone,
            Ok(got) => {
                self.input.extend_from_slice(&scratch[..got]);
                Outcome::Open
            }
            Err(_) if is_transient(&io::Error::last_os_error()) => Outcome::Open,
            Err(_) => Outcome::Gone,
        }
    }

    /// Sends what the socket takes.
    pub(crate) fn flush(&mut self) -> Outcome {
        while self.unsent() > 0 {
            let rest = &self.output[self.sent..];
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            // SAFETY: `rest` is live.
            let put = unsafe { libc::send(self.fd.as_fd().as_raw_fd(), rest.as_ptr().cast(), rest.len(), flags) };
            match usize::try_from(put) {
                Ok(put) => self.sent += put,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() == io::ErrorKind::Interrupted {
                        continue;
                    }
                    return if is_transient(&error) { Outcome::Open } else { Outcome::Gone };
                }
            }
        }
        self.output.clear();
        self.sent = 0;
        if self.output.capacity() > BUFFER_KEPT_MAX {
            self.output = Vec::new();
        }
        Outcome::Open
    }

    /// Forgets `len` bytes of input that were a request.
    pub(crate) fn consume(&mut self, len: usize) {
        self.input.drain(..len);
        if self.input.is_empty() && self.input.capacity() > BUFFER_KEPT_MAX {
            self.input = Vec::new();
        }
    }

    /// Moves everything that is not in the socket out, for the process that continues: flags, length of the input,
    /// input, output.
    pub(crate) fn take_carry(&mut self) -> Vec<u8> {
        let mut carry = vec![u8::from(self.closing) | u8::from(self.ended) << 1];
        carry.extend_from_slice(&(self.input.len() as u32).to_le_bytes());
        carry.extend_from_slice(&self.input);
        carry.extend_from_slice(&self.output[self.sent..]);
        self.put_carry(&[]);
        carry
    }

    /// Replaces everything that is not in the socket; empty for nothing. False when the bytes are not from
    /// [`Self::take_carry`].
    pub(crate) fn put_carry(&mut self, carry: &[u8]) -> bool {
        self.sent = 0;
        (self.closing, self.ended) = (false, false);
        self.input.clear();
        self.output.clear();
        let Some((header, rest)) = carry.split_first_chunk::<5>() else { return carry.is_empty() };
        let len = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
        let Some((input, output)) = rest.split_at_checked(len) else { return false };
        (self.closing, self.ended) = (header[0] & 1 != 0, header[0] & 2 != 0);
        self.input.extend_from_slice(input);
        self.output.extend_from_slice(output);
        true
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_carried_arrives_and_is_gone_here() {
        let new = || Connection::new(std::fs::File::open("/dev/null").unwrap().into());
        let (mut old, mut heir) = (new(), new());
        old.input = b"*1\r\n$4\r\nPI".to_vec();
        old.output = b"+PONG\r\n+PONG\r\n".to_vec();
        old.sent = 7;
        old.ended = true;
        let carry = old.take_carry();
        assert!(old.is_settled());
        assert!(heir.put_carry(&carry));
        assert_eq!((&heir.input[..], &heir.output[..]), (&b"*1\r\n$4\r\nPI"[..], &b"+PONG\r\n"[..]));
        assert!(heir.ended && !heir.closing);
        assert!(!heir.put_carry(&[0, 255, 255, 0, 0, 1]), "a length beyond the end");
        assert!(heir.put_carry(&[]) && heir.is_settled());
    }
}
