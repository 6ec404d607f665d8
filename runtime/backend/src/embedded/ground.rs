//! What all generations of a service share: its network namespace and its listeners.
//!
//! Made by a short-lived helper process, because both belong to whoever makes them: a socket remembers the cgroup and the
//! network namespace it was created in, and so do the connections accepted from it.
//!
//! Listeners are non-blocking (several generations wait for the same queue, so whoever is woken may find nothing), and
//! close-on-exec everywhere but in the container they are passed to. A *listener* is a socket that accepts connections, or
//! a datagram socket with an address.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, SockaddrIn6, SockaddrStorage, bind, getpeername,
    getsockname, getsockopt, listen, setsockopt, socket, sockopt,
};
use nix::sys::stat::{Mode, umask};
use warmswap_model::{Listen, ListenAddress, Network, Transport};

use super::sockets;
use super::wire::{Channel, FDS_MAX, GroundReply, GroundRequest};

/// `struct ifreq` with flags, as SIOCGIFFLAGS and SIOCSIFFLAGS take it; padded to the kernel's size.
#[repr(C)]
struct InterfaceFlags {
    name: [u8; libc::IFNAMSIZ],
    flags: i16,
    padding: [u8; 22],
}

/// Entry of the helper process. The request comes over standard input.
pub(crate) fn main() -> Result<(), String> {
    let agent = super::shim::take_boot_channel().map_err(|error| format!("cannot take the channel: {error}"))?;
    let (request, _): (GroundRequest, _) = agent.expect().map_err(|error| format!("no request: {error}"))?;
    if let Err(reply) = work(&agent, &request) {
        agent.send(&reply, &[]).map_err(|error| format!("cannot answer: {error}"))?;
    }
    Ok(())
}

fn work(agent: &Channel, request: &GroundRequest) -> Result<(), GroundReply> {
    let failed = |what: String| {
        move |error: &dyn std::fmt::Display| GroundReply::Failed { problem: format!("cannot {what}: {error}") }
    };
    // A socket's file is there before it has its permissions.
    umask(Mode::from_bits_truncate(0o077));
    if !request.listen.is_empty() {
        fs::write(&request.cgroup_procs, "0")
            .map_err(|error| failed(format!("join the cgroup {}", request.cgroup_procs.display()))(&error))?;
    }
    let mut listeners: Vec<(String, OwnedFd)> = Vec::with_capacity(request.listen.len());
    let mut open = |network| -> Result<(), GroundReply> {
        for (name, wanted) in request.listen.iter().filter(|(_, wanted)| wanted.network == network) {
            match open_listener(wanted, &request.sockets) {
                Ok(fd) => listeners.push((name.clone(), fd)),
                Err(error) => {
                    for (_, wanted) in request.listen.iter().filter(|(n, _)| listeners.iter().any(|(o, _)| o == n)) {
                        if let ListenAddress::Unix(path) = &wanted.address {
                            sockets::unbind_file(path, &request.sockets);
                        }
                    }
                    let (errno, problem) = (error.raw_os_error(), error.to_string());
                    return Err(GroundReply::Listen { name: name.clone(), errno, problem });
                }
            }
        }
        Ok(())
    };
    open(Network::Host)?;
    enter_netns(&request.netns)
        .map_err(|error| failed(format!("make the network namespace {}", request.netns.display()))(&error))?;
    open(Network::Service)?;
    let mut chunks = listeners.chunks(FDS_MAX).peekable();
    loop {
        let chunk = chunks.next().unwrap_or_default();
        let last = chunks.peek().is_none();
        let reply = GroundReply::Listeners { names: chunk.iter().map(|(name, _)| name.clone()).collect(), last };
        let fds: Vec<_> = chunk.iter().map(|(_, fd)| fd.as_fd()).collect();
        agent.send(&reply, &fds).map_err(|error| failed("pass the listeners on".into())(&error))?;
        if last {
            return Ok(());
        }
    }
}

/// `record` is where the service's socket files are written down.
pub(crate) fn open_listener(wanted: &Listen, record: &Path) -> io::Result<OwnedFd> {
    let kind = match wanted.transport {
        Transport::Stream => SockType::Stream,
        Transport::Datagram => SockType::Datagram,
    };
    let fd = match &wanted.address {
        ListenAddress::Inet(address) => open_inet(*address, kind, wanted.backlog)?,
        ListenAddress::Unix(path) => {
            let fd = sockets::unix_socket(kind)?;
            sockets::bind_file(fd.as_fd(), path, wanted, record)?;
            fd
        }
    };
    if kind == SockType::Stream {
        // The kernel cuts it to net.core.somaxconn.
        listen(&fd, Backlog::new(i32::try_from(wanted.backlog).unwrap_or(i32::MAX)).unwrap_or(Backlog::MAXCONN))?;
    }
    Ok(fd)
}

fn open_inet(address: SocketAddr, kind: SockType, backlog: u32) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, kind, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    match kind {
        // Two UDP sockets with it would share a port, and the datagrams, without an error.
        SockType::Stream => setsockopt(&fd, sockopt::ReuseAddr, &true)?,
        // 1 KiB each, which the kernel doubles for what it stores beside. Refused to whoever is not root; then the
        // host's usual room has to do.
        _ => {
            let room = usize::try_from(backlog).unwrap_or(usize::MAX).saturating_mul(1024).min(i32::MAX as usize / 2);
            let _ = setsockopt(&fd, sockopt::RcvBufForce, &room);
        }
    }
    if address.is_ipv6() {
        // `[::]` shall not take 0.0.0.0 away from another listener.
        setsockopt(&fd, sockopt::Ipv6V6Only, &true)?;
    }
    bind(fd.as_raw_fd(), &SockaddrStorage::from(address))?;
    Ok(fd)
}

/// Whether a descriptor is this listener.
pub(crate) fn listens_on(fd: BorrowedFd<'_>, wanted: &Listen) -> bool {
    let Ok(bound) = getsockname::<SockaddrStorage>(fd.as_raw_fd()) else { return false };
    let same_address = match &wanted.address {
        ListenAddress::Unix(path) => bound.as_unix_addr().and_then(|bound| bound.path()) == Some(path),
        ListenAddress::Inet(wanted) => {
            let bound: Option<SocketAddr> = bound
                .as_sockaddr_in()
                .map(|v4| SocketAddr::from(*v4))
                .or_else(|| bound.as_sockaddr_in6().map(|v6| SocketAddr::from(*v6)));
            // Port 0 is "any": it was chosen when the listener was opened.
            bound.is_some_and(|b| b.ip() == wanted.ip() && (b.port() == wanted.port() || wanted.port() == 0))
        }
    };
    same_address && listener_transport(fd) == Some(wanted.transport)
}

pub(crate) fn is_listener(fd: BorrowedFd<'_>) -> bool {
    listener_transport(fd).is_some()
}

/// `None` for what is no listener: other descriptors, established connections, datagram sockets without an address.
fn listener_transport(fd: BorrowedFd<'_>) -> Option<Transport> {
    match getsockopt(&fd, sockopt::SockType).ok()? {
        SockType::Stream => {
            // One that a generation has shut down for all keeps its port, and can listen again.
            let shut = || inet_port(fd).is_some() && getpeername::<SockaddrStorage>(fd.as_raw_fd()).is_err();
            (getsockopt(&fd, sockopt::AcceptConn).ok()? || shut()).then_some(Transport::Stream)
        }
        SockType::Datagram => {
            let bound = getsockname::<SockaddrStorage>(fd.as_raw_fd()).ok()?;
            let has_path = bound.as_unix_addr().is_some_and(|unix| unix.path().is_some());
            (has_path || inet_port(fd).is_some()).then_some(Transport::Datagram)
        }
        _ => None,
    }
}

/// The port that an IP socket is bound to.
fn inet_port(fd: BorrowedFd<'_>) -> Option<u16> {
    let bound = getsockname::<SockaddrStorage>(fd.as_raw_fd()).ok()?;
    let v4 = bound.as_sockaddr_in().map(SockaddrIn::port);
    v4.or_else(|| bound.as_sockaddr_in6().map(SockaddrIn6::port)).filter(|port| *port != 0)
}

/// Enters the network namespace, or makes it: loopback up, bound to the path so that it outlives this process.
fn enter_netns(path: &Path) -> io::Result<()> {
    if is_netns(path) {
        setns(fs::File::open(path)?, CloneFlags::CLONE_NEWNET)?;
        return Ok(());
    }
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
    unshare(CloneFlags::CLONE_NEWNET)?;
    loopback_up()?;
    // A program that binds its own port is followed by one that binds it too; what waits at the port moves then. Kernels
    // before 5.14 do not know it.
    let _ = fs::write("/proc/sys/net/ipv4/tcp_migrate_req", "1");
    mount(Some("/proc/self/ns/net"), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    Ok(())
}

/// Whether a namespace is mounted there.
pub(crate) fn is_netns(path: &Path) -> bool {
    nix::sys::statfs::statfs(path).is_ok_and(|found| found.filesystem_type() == nix::sys::statfs::NSFS_MAGIC)
}

fn loopback_up() -> io::Result<()> {
    let fd = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut request = InterfaceFlags { name: [0; libc::IFNAMSIZ], flags: 0, padding: [0; 22] };
    request.name[..2].copy_from_slice(b"lo");
    // SAFETY: a socket and a pointer to a struct of the size and layout of ifreq, alive during the call.
    if unsafe { libc::ioctl(fd.as_raw_fd(), libc::SIOCGIFFLAGS as _, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    request.flags |= i16::try_from(libc::IFF_UP).unwrap_or(1);
    // SAFETY: as above.
    if unsafe { libc::ioctl(fd.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
