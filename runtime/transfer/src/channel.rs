//! One conversation over a `SOCK_SEQPACKET` unix socket: whole messages with the descriptors that belong to them.
//!
//! The other end is untrusted. Bytes are validated before anything is built from them, and descriptors are owned from
//! the moment they are received, so that no error leaks one. Not for bulk data: a message has at most [`MESSAGE_LEN_MAX`] bytes.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rkyv::util::AlignedVec;

use crate::message::{Message, MessageError, ToService, ToSupervisor};
use crate::sys;

pub use crate::sys::files_max;

/// Longest message, bytes.
pub const MESSAGE_LEN_MAX: usize = 64 * 1024;
/// Most descriptors per message (`SCM_MAX_FD` of the kernel).
pub const DESCRIPTORS_MAX: usize = 253;
/// How long [`Channel::send`] waits for room before it gives up.
pub const SEND_TIMEOUT: Duration = Duration::from_secs(1);

/// Room for messages that wait for the other side, bytes; the kernel doubles it and takes about 1 KiB a message. While
/// no agent runs, a service announces its new segments here; should it die then, those that did not fit would be lost.
const WAITING_LEN: libc::c_int = 1 << 20;
/// More packets than fit [`WAITING_LEN`], however short they are.
const WAITING_MAX: usize = 4096;

/// Why a message was not sent or received. Where it [concerns one message](Self::is_of_one_message) the conversation can
/// go on without it.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    #[error("the other side has closed the control channel")]
    Closed,
    #[error("the control channel stayed full for {waited_ms} ms")]
    Full { waited_ms: u128 },
    #[error("a message of {len} bytes is longer than {MESSAGE_LEN_MAX}")]
    TooLong { len: usize },
    #[error("{count} descriptors are more than the {DESCRIPTORS_MAX} that fit one message")]
    TooManyDescriptors { count: usize },
    /// The kernel hands over what still fits and forgets the rest; the whole message is dropped. `connections`: they were
    /// connections, without which the handover cannot go on but the conversation can.
    #[error(
        "descriptors of a message were lost: this process may have {files_max} files open (RLIMIT_NOFILE), which is too few"
    )]
    DescriptorsLost { connections: bool, files_max: u64 },
    #[error("a message came with {got} descriptors instead of {expected}")]
    DescriptorCount { expected: usize, got: usize },
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error("the descriptor is no SOCK_SEQPACKET unix socket")]
    NotAChannel,
    #[error("cannot {what} the control channel")]
    System {
        what: &'static str,
        #[source]
        source: io::Error,
    },
}

impl ChannelError {
    /// Packets keep their bounds, so one that cannot be used says nothing about the next.
    #[must_use]
    pub const fn is_of_one_message(&self) -> bool {
        match self {
            Self::Full { .. }
            | Self::TooLong { .. }
            | Self::TooManyDescriptors { .. }
            | Self::DescriptorsLost { connections: true, .. }
            | Self::DescriptorCount { .. }
            | Self::Message(_) => true,
            Self::DescriptorsLost { connections: false, .. }
            | Self::Closed
            | Self::NotAChannel
            | Self::System { .. } => false,
        }
    }
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> ChannelError {
    move |source| ChannelError::System { what, source }
}

/// The supervisor's end.
pub type SupervisorChannel = Channel<ToService, ToSupervisor>;
/// The service's end.
pub type ServiceChannel = Channel<ToSupervisor, ToService>;

/// An end that sends `Out` and receives `In`.
#[derive(Debug)]
pub struct Channel<Out, In> {
    fd: OwnedFd,
    buffer: AlignedVec,
    /// Of the packet received last.
    sender: Option<i32>,
    directions: PhantomData<fn(Out) -> In>,
}

impl<Out: Message, In: Message> Channel<Out, In> {
    /// Two connected ends.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn pair() -> Result<(Self, Channel<In, Out>), ChannelError> {
        let mut fds = [0; 2];
        // SAFETY: `fds` has room for the two descriptors.
        let result =
            unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr()) };
        sys::check(result).map_err(system("create"))?;
        // SAFETY: both were just created and nobody else owns them.
        let [a, b] = fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
        for end in [&a, &b] {
            // Only root may ask for more than the host's default. Without it there is room for some hundred messages.
            let _ = set_socket_option(end.as_fd(), libc::SO_SNDBUFFORCE, WAITING_LEN);
        }
        Ok((Self::wrap(a), Channel::wrap(b)))
    }

    /// # Errors
    /// [`ChannelError::NotAChannel`] when `fd` is something else than a `SOCK_SEQPACKET` unix socket.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, ChannelError> {
        let option = |name| socket_option(fd.as_fd(), name).map_err(|_| ChannelError::NotAChannel);
        if option(libc::SO_DOMAIN)? != libc::AF_UNIX || option(libc::SO_TYPE)? != libc::SOCK_SEQPACKET {
            return Err(ChannelError::NotAChannel);
        }
        Ok(Self::wrap(fd))
    }

    fn wrap(fd: OwnedFd) -> Self {
        let mut buffer = AlignedVec::new();
        buffer.resize(MESSAGE_LEN_MAX, 0);
        Self { fd, buffer, sender: None, directions: PhantomData }
    }

    /// From now on the kernel attests who sends what arrives here.
    ///
    /// # Errors
    /// When the kernel does not do that.
    pub fn attest_senders(&self) -> Result<(), ChannelError> {
        set_socket_option(self.fd.as_fd(), libc::SO_PASSCRED, 1).map_err(system("have senders attested on"))
    }

    /// The process that sent the packet received last, whether it could be understood or not. `None` when nobody attests it.
    #[must_use]
    pub const fn sender(&self) -> Option<i32> {
        self.sender
    }

    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Sends, waiting up to [`SEND_TIMEOUT`] for room.
    ///
    /// # Errors
    /// [`ChannelError::Full`] after the wait; nothing was sent then.
    pub fn send(&self, message: &Out, descriptors: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        self.send_within(message, descriptors, SEND_TIMEOUT)
    }

    /// Sends, waiting up to `timeout` for room.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn send_within(
        &self,
        message: &Out,
        descriptors: &[BorrowedFd<'_>],
        timeout: Duration,
    ) -> Result<(), ChannelError> {
        let bytes = check_outgoing(message, descriptors)?;
        let begin = Instant::now();
        loop {
            if self.send_bytes(&bytes, descriptors)? {
                return Ok(());
            }
            let waited = begin.elapsed();
            if waited >= timeout {
                return Err(ChannelError::Full { waited_ms: waited.as_millis() });
            }
            // Too many descriptors in flight also counts as full and does not wake poll: look again every 5 ms.
            sys::poll(self.fd.as_fd(), libc::POLLOUT, (timeout - waited).min(Duration::from_millis(5)))
                .map_err(system("wait for"))?;
        }
    }

    /// Sends if there is room; `false` when there is none.
    ///
    /// # Errors
    /// Anything but a full channel.
    pub fn try_send(&self, message: &Out, descriptors: &[BorrowedFd<'_>]) -> Result<bool, ChannelError> {
        self.send_bytes(&check_outgoing(message, descriptors)?, descriptors)
    }

    fn send_bytes(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<bool, ChannelError> {
        let mut control = ControlBuffer::new();
        let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        // SAFETY: an all-zero msghdr is a valid empty one.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = &raw mut iov;
        header.msg_iovlen = 1;
        if !descriptors.is_empty() {
            let payload = size_of_val(descriptors);
            debug_assert_eq!(size_of::<BorrowedFd<'_>>(), size_of::<libc::c_int>());
            header.msg_control = control.0.as_mut_ptr().cast();
            // SAFETY: CMSG_SPACE only computes.
            header.msg_controllen = unsafe { libc::CMSG_SPACE(payload as u32) } as _;
            // SAFETY: the buffer is large enough for one control message with DESCRIPTORS_MAX descriptors, which
            // `check_outgoing` enforced, and aligned for cmsghdr; BorrowedFd is a transparent c_int.
            unsafe {
                let cmsg = libc::CMSG_FIRSTHDR(&raw const header);
                (*cmsg).cmsg_level = libc::SOL_SOCKET;
                (*cmsg).cmsg_type = libc::SCM_RIGHTS;
                (*cmsg).cmsg_len = libc::CMSG_LEN(payload as u32) as _;
                std::ptr::copy_nonoverlapping(descriptors.as_ptr().cast::<u8>(), libc::CMSG_DATA(cmsg), payload);
            }
        }
        loop {
            // SAFETY: header points to live locals; the kernel only reads them.
            let sent = unsafe {
                libc::sendmsg(self.fd.as_raw_fd(), &raw const header, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
            };
            if sent >= 0 {
                return Ok(true);
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                // ETOOMANYREFS: more descriptors in flight than RLIMIT_NOFILE; passes when the other side reads.
                Some(libc::EAGAIN | libc::ENOBUFS | libc::ETOOMANYREFS) => return Ok(false),
                Some(libc::EPIPE | libc::ECONNRESET | libc::ENOTCONN) => return Err(ChannelError::Closed),
                _ => return Err(ChannelError::System { what: "send on", source: error }),
            }
        }
    }

    /// The next message if one is waiting. Never blocks.
    ///
    /// # Errors
    /// [`ChannelError::Closed`] at the end; anything else means that the other side broke the protocol.
    pub fn try_recv(&mut self) -> Result<Option<(In, Vec<OwnedFd>)>, ChannelError> {
        self.receive(0)
    }

    /// As [`Self::try_recv`], but the message stays the next one until [`Self::consume`]: should this process die while it
    /// deals with it, whoever takes over the channel finds it there still.
    ///
    /// # Errors
    /// As [`Self::try_recv`]. A message that cannot be used has to be consumed as well.
    pub fn try_peek(&mut self) -> Result<Option<(In, Vec<OwnedFd>)>, ChannelError> {
        self.receive(libc::MSG_PEEK)
    }

    /// Takes away the message that [`Self::try_peek`] returned, or refused.
    pub fn consume(&mut self) {
        loop {
            // SAFETY: nothing is read into. What is left of the packet, its descriptors too, is dropped by the kernel.
            let got = unsafe { libc::recv(self.fd.as_raw_fd(), std::ptr::null_mut(), 0, libc::MSG_DONTWAIT) };
            // As in `receive`: these two leave the packet where it is. Any other error means that nothing waits.
            let again = |error: io::Error| matches!(error.raw_os_error(), Some(libc::EINTR | libc::ECONNRESET));
            if got >= 0 || !again(io::Error::last_os_error()) {
                return;
            }
        }
    }

    fn receive(&mut self, peek: libc::c_int) -> Result<Option<(In, Vec<OwnedFd>)>, ChannelError> {
        let mut control = ControlBuffer::new();
        let mut iov = libc::iovec { iov_base: self.buffer.as_mut_ptr().cast(), iov_len: self.buffer.len() };
        // SAFETY: an all-zero msghdr is a valid empty one.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = &raw mut iov;
        header.msg_iovlen = 1;
        header.msg_control = control.0.as_mut_ptr().cast();
        header.msg_controllen = size_of_val(&control.0) as _;
        let len = loop {
            let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC | peek;
            // SAFETY: header points to buffers of the stated lengths that outlive the call.
            let got = unsafe { libc::recvmsg(self.fd.as_raw_fd(), &raw mut header, flags) };
            if let Ok(got) = usize::try_from(got) {
                break got;
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                // ECONNRESET: the other side died with messages of ours unread. The kernel says so once, and before it hands out
                // what the dead one had sent, which may be the only word of an acknowledged write.
                Some(libc::EINTR | libc::ECONNRESET) => {}
                Some(libc::EAGAIN) => return Ok(None),
                Some(libc::ENOTCONN) => return Err(ChannelError::Closed),
                _ => return Err(ChannelError::System { what: "receive from", source: error }),
            }
        };
        // Own the descriptors before anything can fail.
        let (descriptors, sender) = take_control(&header);
        self.sender = sender;
        if header.msg_flags & libc::MSG_TRUNC != 0 {
            return Err(ChannelError::TooLong { len });
        }
        if header.msg_flags & libc::MSG_CTRUNC != 0 {
            let connections = In::decode(&self.buffer[..len]).is_ok_and(|message| message.carries_connections());
            return Err(ChannelError::DescriptorsLost { connections, files_max: sys::files_max() });
        }
        if len == 0 {
            // No message is empty, so this is the end (or an intruder's empty packet, which ends it as well).
            return Err(ChannelError::Closed);
        }
        let message = In::decode(&self.buffer[..len])?;
        let expected = message.descriptors();
        if expected != descriptors.len() {
            return Err(ChannelError::DescriptorCount { expected, got: descriptors.len() });
        }
        Ok(Some((message, descriptors)))
    }

    /// Ends the conversation for both sides, whoever else holds an end, and closes the descriptors that are still on their
    /// way: they count against every process of the same user.
    pub fn hang_up(&mut self) {
        // SAFETY: plain system call on an owned descriptor.
        unsafe { libc::shutdown(self.fd.as_raw_fd(), libc::SHUT_RDWR) };
        // A packet of no bytes looks like the end, so the end cannot be told.
        for _ in 0..WAITING_MAX {
            let _ = self.try_recv();
        }
    }

    /// The next message, waiting up to `timeout`; `None` when none came.
    ///
    /// # Errors
    /// As [`Self::try_recv`].
    pub fn recv_timeout(&mut self, timeout: Duration) -> Result<Option<(In, Vec<OwnedFd>)>, ChannelError> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(received) = self.try_recv()? {
                return Ok(Some(received));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            sys::poll(self.fd.as_fd(), libc::POLLIN, left).map_err(system("wait for"))?;
        }
    }
}

impl<Out, In> AsFd for Channel<Out, In> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn check_outgoing<M: Message>(message: &M, descriptors: &[BorrowedFd<'_>]) -> Result<AlignedVec, ChannelError> {
    if descriptors.len() > DESCRIPTORS_MAX {
        return Err(ChannelError::TooManyDescriptors { count: descriptors.len() });
    }
    let expected = message.descriptors();
    if expected != descriptors.len() {
        return Err(ChannelError::DescriptorCount { expected, got: descriptors.len() });
    }
    let bytes = message.encode()?;
    if bytes.len() > MESSAGE_LEN_MAX {
        return Err(ChannelError::TooLong { len: bytes.len() });
    }
    Ok(bytes)
}

/// Room for [`DESCRIPTORS_MAX`] descriptors and the credentials of their sender, aligned for the headers.
struct ControlBuffer([u64; 134]);

impl ControlBuffer {
    fn new() -> Self {
        // SAFETY: CMSG_SPACE only computes.
        const LEN: u32 =
            unsafe { libc::CMSG_SPACE(DESCRIPTORS_MAX as u32 * 4) + libc::CMSG_SPACE(size_of::<libc::ucred>() as u32) };
        const { assert!(LEN as usize <= size_of::<Self>()) };
        Self([0; 134])
    }
}

/// The descriptors of a packet, and the process that sent it.
fn take_control(header: &libc::msghdr) -> (Vec<OwnedFd>, Option<i32>) {
    let (mut taken, mut sender) = (Vec::new(), None);
    // SAFETY: the kernel filled the control buffer that `header` describes; the CMSG macros walk inside it, every
    // descriptor in an SCM_RIGHTS message is ours alone from now on, and credentials are read only when they are whole.
    unsafe {
        let mut cmsg = libc::CMSG_FIRSTHDR(header);
        while !cmsg.is_null() {
            let payload = ((*cmsg).cmsg_len as usize).saturating_sub(libc::CMSG_LEN(0) as usize);
            match ((*cmsg).cmsg_level, (*cmsg).cmsg_type) {
                (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                    let data = libc::CMSG_DATA(cmsg).cast::<libc::c_int>();
                    for at in 0..payload / size_of::<libc::c_int>() {
                        taken.push(OwnedFd::from_raw_fd(data.add(at).read_unaligned()));
                    }
                }
                (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) if payload >= size_of::<libc::ucred>() => {
                    // 0: a process that has no number here.
                    let pid = libc::CMSG_DATA(cmsg).cast::<libc::ucred>().read_unaligned().pid;
                    sender = (pid > 0).then_some(pid);
                }
                _ => {}
            }
            cmsg = libc::CMSG_NXTHDR(header, cmsg);
        }
    }
    (taken, sender)
}

fn set_socket_option(fd: BorrowedFd<'_>, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the pointer refers to a local of the stated size that outlives the call.
    sys::check(unsafe { libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, name, (&raw const value).cast(), len) })
        .map(drop)
}

fn socket_option(fd: BorrowedFd<'_>, name: libc::c_int) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the pointers refer to locals of the stated size that outlive the call.
    let result =
        unsafe { libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, name, (&raw mut value).cast(), &raw mut len) };
    sys::check(result)?;
    Ok(value)
}
