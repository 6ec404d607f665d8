//! Where a service is reached: `[listen.NAME]` of the service file.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// One socket that the runtime opens and every generation is passed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listen {
    pub address: ListenAddress,
    #[serde(default, rename = "type")]
    pub transport: Transport,
    #[serde(default)]
    pub network: Network,
    /// Length of the accept queue; of a UDP socket, how many datagrams of up to 1 KiB may wait. How many wait at a unix
    /// datagram socket is the host's to say (`net.unix.max_dgram_qlen`); senders wait then, and nothing is lost.
    #[serde(default = "default_backlog")]
    pub backlog: u32,
    /// Permissions of a unix socket's file, octal like `0660`.
    #[serde(default)]
    pub mode: Option<String>,
    /// `user[:group]` that a unix socket's file belongs to: the host's names, or numbers.
    #[serde(default)]
    pub owner: Option<String>,
}

fn default_backlog() -> u32 {
    4096
}

impl Listen {
    /// What a unix socket's file may be used for when the service file does not say: by everybody, as a port is.
    pub const MODE_DEFAULT: u32 = 0o666;

    /// A stream listener on the host's network, with what a service file leaves out.
    #[must_use]
    pub fn at(address: impl Into<ListenAddress>) -> Self {
        Self {
            address: address.into(),
            transport: Transport::default(),
            network: Network::default(),
            backlog: default_backlog(),
            mode: None,
            owner: None,
        }
    }

    /// Permissions for a unix socket's file.
    #[must_use]
    pub fn file_mode(&self) -> u32 {
        self.mode.as_deref().and_then(octal).unwrap_or(Self::MODE_DEFAULT)
    }

    /// As `warmswap status` shows it: `127.0.0.1:53/udp`. A TCP listener is its address alone.
    #[must_use]
    pub fn describe(&self) -> String {
        match (&self.address, self.transport) {
            (_, Transport::Stream) => self.address.to_string(),
            (ListenAddress::Inet(address), Transport::Datagram) => format!("{address}/udp"),
            (ListenAddress::Unix(path), Transport::Datagram) => format!("{} (datagrams)", path.display()),
        }
    }
}

/// An IP address with a port, or the path of a unix socket on the host.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ListenAddress {
    Inet(SocketAddr),
    Unix(PathBuf),
}

impl ListenAddress {
    /// Longest path of a unix socket, bytes: what `sockaddr_un` holds without its NUL.
    pub const PATH_LEN_MAX: usize = 107;
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inet(address) => address.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

impl From<SocketAddr> for ListenAddress {
    fn from(address: SocketAddr) -> Self {
        Self::Inet(address)
    }
}

impl From<&Path> for ListenAddress {
    fn from(path: &Path) -> Self {
        Self::Unix(path.to_owned())
    }
}

/// A text that is no address of a socket.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no socket address: give an IP address with a port, like 127.0.0.1:6380, or the absolute path of a unix \
     socket, without \".\" and \"..\""
)]
pub struct InvalidListenAddress(String);

impl FromStr for ListenAddress {
    type Err = InvalidListenAddress;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidListenAddress(text.to_owned());
        if !text.starts_with('/') {
            return text.parse().map(Self::Inet).map_err(|_| invalid());
        }
        // Compared with what the kernel calls the socket, so it is written in one way only.
        let path: PathBuf = Path::new(text).components().collect();
        let plain = path.components().skip(1).all(|part| matches!(part, Component::Normal(_)));
        let named = path.file_name().is_some() && !text.contains('\0');
        if plain && named && path.as_os_str() == text { Ok(Self::Unix(path)) } else { Err(invalid()) }
    }
}

impl Serialize for ListenAddress {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ListenAddress {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Connections, or single messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// TCP, or a unix stream socket.
    #[default]
    Stream,
    /// UDP, or a unix datagram socket.
    Datagram,
}

/// In which network namespace a listener is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// The host's: reachable from outside without address translation or a proxy.
    #[default]
    Host,
    /// The service's own, shared by its generations.
    Service,
}

/// What is wrong with one listener.
pub(crate) struct Wrong {
    pub(crate) name: String,
    pub(crate) field: &'static str,
    pub(crate) problem: String,
}

pub(crate) fn validate(listeners: &BTreeMap<String, Listen>) -> Result<(), Wrong> {
    for (name, listen) in listeners {
        let wrong = |field, problem: String| Err(Wrong { name: name.clone(), field, problem });
        // LISTEN_FDNAMES separates names by colons.
        if name.is_empty() || name.contains(':') || !name.bytes().all(|b| b.is_ascii_graphic()) {
            return wrong("listen", format!("{name:?} is no listener name: printable ASCII without a colon"));
        }
        match &listen.address {
            ListenAddress::Inet(address) => {
                if address.port() == 0 {
                    let problem = format!("port 0 of listener {name:?} would be another one each time: name one");
                    return wrong("address", problem);
                }
                for (field, given) in [("mode", listen.mode.is_some()), ("owner", listen.owner.is_some())] {
                    if given {
                        return wrong(field, format!("listener {name:?} has no file: only a unix socket has"));
                    }
                }
            }
            ListenAddress::Unix(path) => {
                let len = path.as_os_str().len();
                if len > ListenAddress::PATH_LEN_MAX {
                    let most = ListenAddress::PATH_LEN_MAX;
                    return wrong("address", format!("{len} bytes are longer than the {most} of a unix socket's path"));
                }
                if listen.network != Network::Host {
                    let problem = format!("listener {name:?} is a path on the host: only \"host\" makes sense");
                    return wrong("network", problem);
                }
                if let Some(mode) = listen.mode.as_ref().filter(|mode| octal(mode).is_none()) {
                    return wrong("mode", format!("{mode:?} are no permissions: octal digits up to \"0777\""));
                }
                if let Some(owner) = listen.owner.as_ref().filter(|owner| !is_owner(owner)) {
                    return wrong("owner", format!("{owner:?} is no owner like \"user\" or \"user:group\""));
                }
            }
        }
        let same = |other: &&String| {
            listeners.get(*other).is_some_and(|other| {
                // One file is one socket, whatever its type.
                let path = matches!(other.address, ListenAddress::Unix(_));
                other.address == listen.address
                    && (path || (other.transport, other.network) == (listen.transport, listen.network))
            })
        };
        if let Some(other) = listeners.keys().take_while(|other| *other != name).find(same) {
            return wrong("address", format!("listener {other:?} has {} already", listen.address));
        }
    }
    Ok(())
}

fn octal(text: &str) -> Option<u32> {
    let digits = (1..=4).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
    u32::from_str_radix(text, 8).ok().filter(|mode| digits && *mode <= 0o777)
}

fn is_owner(text: &str) -> bool {
    let (user, group) = text.split_once(':').unwrap_or((text, "-"));
    [user, group].iter().all(|name| !name.is_empty() && name.bytes().all(|b| b.is_ascii_graphic() && b != b':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for text in ["127.0.0.1:6380", "[::1]:80", "/run/app.sock", "/a"] {
            assert_eq!(text.parse::<ListenAddress>().unwrap().to_string(), text);
        }
        for text in
            ["", "/", "nowhere", "app.sock", "/run/", "/run//a", "/run/./a", "/run/../a", "/run/a\0b", "@abstract"]
        {
            assert!(text.parse::<ListenAddress>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_path_is_as_long_as_the_kernel_takes() {
        let at = |len: usize| {
            BTreeMap::from([("a".to_owned(), Listen::at(Path::new(&format!("/{}", "x".repeat(len - 1)))))])
        };
        assert!(validate(&at(107)).is_ok());
        assert_eq!(validate(&at(108)).err().map(|wrong| wrong.field), Some("address"));
    }

    #[test]
    fn tcp_and_udp_have_ports_of_their_own() {
        let tcp = Listen::at(SocketAddr::from(([127, 0, 0, 1], 53)));
        let udp = Listen { transport: Transport::Datagram, ..tcp.clone() };
        assert_eq!([tcp.describe(), udp.describe()], ["127.0.0.1:53", "127.0.0.1:53/udp"]);
        assert!(validate(&BTreeMap::from([("t".to_owned(), tcp.clone()), ("u".to_owned(), udp)])).is_ok());
        assert!(validate(&BTreeMap::from([("t".to_owned(), tcp.clone()), ("u".to_owned(), tcp)])).is_err());
    }

    #[test]
    fn a_file_from_before_there_were_unix_sockets_means_the_same() {
        let old = "address = \"127.0.0.1:6380\"\nnetwork = \"host\"\nbacklog = 16\n";
        let listen: Listen = toml::from_str(old).unwrap();
        assert_eq!(listen, Listen { backlog: 16, ..Listen::at(SocketAddr::from(([127, 0, 0, 1], 6380))) });
        assert_eq!(listen.file_mode(), 0o666);
        assert_eq!(Listen { mode: Some("0660".into()), ..listen }.file_mode(), 0o660);
    }
}
