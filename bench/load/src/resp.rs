//! The Redis serialization protocol (RESP2), as far as a client needs it: an incremental parser, an encoder, and a
//! blocking [`Client`] for tests, set-up and read-back.
//!
//! Not here: RESP3, cluster redirection, TLS. The load itself does not use [`Client`], because a client that waits
//! for each answer before it sends again cannot keep a constant rate.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Longest bulk string that is accepted (Redis' own limit), so that a broken server cannot make us allocate at will.
pub const BULK_LENGTH_MAX: usize = 512 << 20;
/// Longest line (simple string, error, number) that is accepted.
pub const LINE_LENGTH_MAX: usize = 64 << 10;
/// Most elements in an array.
pub const ARRAY_LENGTH_MAX: usize = 1 << 20;
/// Deepest nesting of arrays.
pub const DEPTH_MAX: usize = 8;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    Simple(String),
    Error(String),
    Integer(i64),
    /// `None` is the null bulk string: the key does not exist.
    Bulk(Option<Vec<u8>>),
    Array(Option<Vec<Reply>>),
}

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 60;
        let clipped = |text: &str| text.chars().take(SHOWN).collect::<String>();
        match self {
            Self::Simple(text) => write!(f, "{}", clipped(text)),
            Self::Error(text) => write!(f, "error {}", clipped(text)),
            Self::Integer(number) => write!(f, "{number}"),
            Self::Bulk(None) | Self::Array(None) => f.write_str("nil"),
            Self::Bulk(Some(bytes)) => write!(f, "{:?}", clipped(&String::from_utf8_lossy(bytes))),
            Self::Array(Some(items)) => write!(f, "array of {}", items.len()),
        }
    }
}

/// Bytes that are no RESP.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    #[error("reply begins with byte {0:#04x}, which is no RESP type")]
    UnknownType(u8),
    #[error("{text:?} is no number")]
    BadNumber { text: String },
    #[error("length {length} is above the limit of {limit}")]
    TooLong { length: i64, limit: usize },
    #[error("bulk string does not end with CR LF")]
    BadEnd,
    #[error("arrays nested deeper than {DEPTH_MAX}")]
    TooDeep,
}

/// Takes one reply from the front of `bytes`: the reply and its length in bytes, or `None` when it is not complete.
pub fn parse(bytes: &[u8]) -> Result<Option<(Reply, usize)>, ProtocolError> {
    parse_nested(bytes, 0)
}

fn parse_nested(bytes: &[u8], depth: usize) -> Result<Option<(Reply, usize)>, ProtocolError> {
    if depth > DEPTH_MAX {
        return Err(ProtocolError::TooDeep);
    }
    let Some(&kind) = bytes.first() else { return Ok(None) };
    if !matches!(kind, b'+' | b'-' | b':' | b'$' | b'*') {
        return Err(ProtocolError::UnknownType(kind));
    }
    let Some(end) = bytes.windows(2).position(|pair| pair == b"\r\n") else {
        if bytes.len() > LINE_LENGTH_MAX {
            return Err(ProtocolError::TooLong { length: bytes.len() as i64, limit: LINE_LENGTH_MAX });
        }
        return Ok(None);
    };
    let line = &bytes[1..end];
    let after = end + 2;
    let text = || String::from_utf8_lossy(line).into_owned();
    let number = || {
        std::str::from_utf8(line)
            .ok()
            .and_then(|t| t.parse::<i64>().ok())
            .ok_or_else(|| ProtocolError::BadNumber { text: text() })
    };
    let length = |limit: usize| match number()? {
        -1 => Ok(None),
        n if n < 0 || n as u64 > limit as u64 => Err(ProtocolError::TooLong { length: n, limit }),
        n => Ok(Some(n as usize)),
    };
    Ok(Some(match kind {
        b'+' => (Reply::Simple(text()), after),
        b'-' => (Reply::Error(text()), after),
        b':' => (Reply::Integer(number()?), after),
        b'$' => match length(BULK_LENGTH_MAX)? {
            None => (Reply::Bulk(None), after),
            Some(length) => {
                let Some(tail) = bytes.get(after + length..after + length + 2) else { return Ok(None) };
                if tail != b"\r\n" {
                    return Err(ProtocolError::BadEnd);
                }
                (Reply::Bulk(Some(bytes[after..after + length].to_vec())), after + length + 2)
            }
        },
        _ => match length(ARRAY_LENGTH_MAX)? {
            None => (Reply::Array(None), after),
            Some(count) => {
                let mut at = after;
                // Not `with_capacity(count)`: the count is the peer's word only.
                let mut items = Vec::new();
                for _ in 0..count {
                    let Some((item, used)) = parse_nested(&bytes[at..], depth + 1)? else { return Ok(None) };
                    items.push(item);
                    at += used;
                }
                (Reply::Array(Some(items)), at)
            }
        },
    }))
}

/// Appends one command to `out`.
pub fn encode<A: AsRef<[u8]>>(out: &mut Vec<u8>, command: &[A]) {
    out.extend_from_slice(format!("*{}\r\n", command.len()).as_bytes());
    for argument in command {
        let argument = argument.as_ref();
        out.extend_from_slice(format!("${}\r\n", argument.len()).as_bytes());
        out.extend_from_slice(argument);
        out.extend_from_slice(b"\r\n");
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("cannot connect to {address}; is the service running and its listener open?")]
    Connect {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("connection to {address} failed while {doing}")]
    Broken {
        address: SocketAddr,
        doing: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("{address} closed the connection with {missing} replies missing")]
    Closed { address: SocketAddr, missing: usize },
    #[error("{address} sent what is no RESP")]
    Protocol {
        address: SocketAddr,
        #[source]
        source: ProtocolError,
    },
    #[error("{address} sent {count} bytes more than was asked for")]
    Unasked { address: SocketAddr, count: usize },
}

/// A blocking client: one connection, one caller.
#[derive(Debug)]
pub struct Client {
    address: SocketAddr,
    stream: TcpStream,
    received: Vec<u8>,
}

impl Client {
    /// Connects; `timeout` also bounds each later wait for an answer.
    pub fn connect(address: SocketAddr, timeout: Duration) -> Result<Self, ClientError> {
        let connect = || {
            let stream = TcpStream::connect_timeout(&address, timeout)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(timeout))?;
            stream.set_write_timeout(Some(timeout))?;
            Ok(stream)
        };
        let stream = connect().map_err(|source| ClientError::Connect { address, source })?;
        Ok(Self { address, stream, received: Vec::new() })
    }

    /// Takes over a connection that is already open and has no answer outstanding.
    pub fn from_stream(stream: TcpStream, timeout: Duration) -> Result<Self, ClientError> {
        let unknown = SocketAddr::from(([0, 0, 0, 0], 0));
        let address = stream.peer_addr().unwrap_or(unknown);
        let set_up = || {
            stream.set_nonblocking(false)?;
            stream.set_read_timeout(Some(timeout))?;
            stream.set_write_timeout(Some(timeout))
        };
        set_up().map_err(|source| ClientError::Broken { address, doing: "set up", source })?;
        Ok(Self { address, stream, received: Vec::new() })
    }

    /// One command, one reply. An error reply is a [`Reply::Error`], not an `Err`.
    pub fn command<A: AsRef<[u8]>>(&mut self, command: &[A]) -> Result<Reply, ClientError> {
        let mut replies = self.pipeline(&[command])?;
        replies.pop().ok_or(ClientError::Closed { address: self.address, missing: 1 })
    }

    /// Sends all commands at once, then reads as many replies, in order.
    pub fn pipeline<A: AsRef<[u8]>, C: AsRef<[A]>>(&mut self, commands: &[C]) -> Result<Vec<Reply>, ClientError> {
        let address = self.address;
        let mut out = Vec::new();
        for command in commands {
            encode(&mut out, command.as_ref());
        }
        self.stream.write_all(&out).map_err(|source| ClientError::Broken { address, doing: "send", source })?;
        let mut replies = Vec::with_capacity(commands.len());
        let mut parsed = 0;
        let mut chunk = [0; 16 << 10];
        loop {
            while replies.len() < commands.len() {
                let found =
                    parse(&self.received[parsed..]).map_err(|source| ClientError::Protocol { address, source })?;
                let Some((reply, used)) = found else { break };
                replies.push(reply);
                parsed += used;
            }
            if replies.len() == commands.len() {
                self.received.drain(..parsed);
                if !self.received.is_empty() {
                    return Err(ClientError::Unasked { address, count: self.received.len() });
                }
                return Ok(replies);
            }
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(ClientError::Closed { address, missing: commands.len() - replies.len() }),
                Ok(count) => self.received.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(ClientError::Broken { address, doing: "wait for the reply", source }),
            }
        }
    }

    /// The end of the connection on this side.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.stream.local_addr()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_type_is_read() {
        let cases: [(&[u8], Reply); 7] = [
            (b"+OK\r\n", Reply::Simple("OK".into())),
            (b"-ERR no\r\n", Reply::Error("ERR no".into())),
            (b":-7\r\n", Reply::Integer(-7)),
            (b"$3\r\na\r\n\r\n", Reply::Bulk(Some(b"a\r\n".to_vec()))),
            (b"$0\r\n\r\n", Reply::Bulk(Some(Vec::new()))),
            (b"$-1\r\n", Reply::Bulk(None)),
            (b"*2\r\n:1\r\n*-1\r\n", Reply::Array(Some(vec![Reply::Integer(1), Reply::Array(None)]))),
        ];
        for (bytes, reply) in cases {
            assert_eq!(parse(bytes), Ok(Some((reply, bytes.len()))));
            for cut in 0..bytes.len() {
                assert_eq!(parse(&bytes[..cut]), Ok(None), "cut at {cut} of {bytes:?}");
            }
        }
    }

    #[test]
    fn broken_bytes_are_refused() {
        let nested = "*1\r\n".repeat(DEPTH_MAX + 2);
        for bytes in ["HTTP/1.1 200\r\n", ":x\r\n", "$-2\r\n", "$99999999999\r\n", "$1\r\nab\r\n", nested.as_str()] {
            assert!(parse(bytes.as_bytes()).is_err(), "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_verdict(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(Some((_, used))) = parse(&bytes) {
                prop_assert!(used <= bytes.len());
            }
        }

        #[test]
        fn a_command_is_an_array_of_bulk_strings(
            command in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 1..5),
        ) {
            let mut out = Vec::new();
            encode(&mut out, &command);
            let items = command.into_iter().map(|a| Reply::Bulk(Some(a))).collect();
            prop_assert_eq!(parse(&out), Ok(Some((Reply::Array(Some(items)), out.len()))));
        }
    }
}
