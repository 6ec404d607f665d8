//! What a process that means harm can send over its channel: each is refused with an error, nothing leaks.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use warmswap_transfer::channel::{Channel, ChannelError, DESCRIPTORS_MAX, MESSAGE_LEN_MAX, SupervisorChannel};
use warmswap_transfer::message::{
    CARRY_LEN_MAX, CONNECTIONS_PER_MESSAGE_MAX, Commit, ConnectionRecord, LogPosition, Message, ToService,
    ToSupervisor, socket_cookie, split_connections,
};

fn raw_send(fd: BorrowedFd<'_>, bytes: &[u8], fds: &[i32]) -> isize {
    let mut control = [0_u64; 200];
    let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: a valid empty msghdr, filled with pointers to live buffers that are large enough for `fds`.
    unsafe {
        let mut header: libc::msghdr = std::mem::zeroed();
        header.msg_iov = &raw mut iov;
        header.msg_iovlen = 1;
        if !fds.is_empty() {
            let len = size_of_val(fds) as u32;
            header.msg_control = control.as_mut_ptr().cast();
            header.msg_controllen = libc::CMSG_SPACE(len) as _;
            let cmsg = libc::CMSG_FIRSTHDR(&raw const header);
            (*cmsg).cmsg_level = libc::SOL_SOCKET;
            (*cmsg).cmsg_type = libc::SCM_RIGHTS;
            (*cmsg).cmsg_len = libc::CMSG_LEN(len) as _;
            std::ptr::copy_nonoverlapping(fds.as_ptr().cast::<u8>(), libc::CMSG_DATA(cmsg), len as usize);
        }
        libc::sendmsg(fd.as_raw_fd(), &raw const header, libc::MSG_NOSIGNAL)
    }
}

/// How many descriptors of this process refer to `file` (an eventfd, told apart by its inode number is not possible, so a
/// memfd is used).
fn references(file: &OwnedFd) -> usize {
    let target = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter(|entry| {
            entry.as_ref().is_ok_and(|entry| std::fs::read_link(entry.path()).is_ok_and(|link| link == target))
        })
        .count()
}

fn marked_file(name: &std::ffi::CStr) -> OwnedFd {
    use std::os::fd::FromRawFd;
    // SAFETY: a new descriptor that nobody else owns.
    unsafe { OwnedFd::from_raw_fd(libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC)) }
}

#[test]
fn messages_arrive_whole_with_their_descriptors() {
    let (ours, mut theirs) = SupervisorChannel::pair().unwrap();
    assert!(theirs.try_recv().unwrap().is_none());
    let file = marked_file(c"whole");
    ours.send(&ToService::Segment { index: 7 }, &[file.as_fd()]).unwrap();
    ours.send(&ToService::Follow { on: true }, &[]).unwrap();
    let (message, fds) = theirs.try_recv().unwrap().unwrap();
    assert_eq!((message, fds.len()), (ToService::Segment { index: 7 }, 1));
    // SAFETY: plain system call on an owned descriptor.
    assert_eq!(unsafe { libc::fcntl(fds[0].as_raw_fd(), libc::F_GETFD) }, libc::FD_CLOEXEC);
    assert_eq!(theirs.recv_timeout(Duration::from_secs(1)).unwrap().unwrap().0, ToService::Follow { on: true });
    drop(ours);
    assert!(matches!(theirs.try_recv(), Err(ChannelError::Closed)));
    assert!(matches!(theirs.send(&ToSupervisor::Ready, &[]), Err(ChannelError::Closed)));
}

/// The kernel reports messages that the dead one had not read as an error of the next call, whichever it is.
#[test]
fn last_words_are_heard_whatever_the_dead_one_had_not_read() {
    for consume_meets_the_error in [false, true] {
        let (mut ours, theirs) = SupervisorChannel::pair().unwrap();
        let file = marked_file(c"last words");
        ours.send(&ToService::Follow { on: true }, &[]).unwrap();
        theirs.send(&ToSupervisor::Ready, &[]).unwrap();
        theirs.send(&ToSupervisor::Segment { index: 7 }, &[file.as_fd()]).unwrap();
        if consume_meets_the_error {
            assert_eq!(ours.try_peek().unwrap().unwrap().0, ToSupervisor::Ready);
        }
        drop(theirs);
        if !consume_meets_the_error {
            assert_eq!(ours.try_peek().unwrap().unwrap().0, ToSupervisor::Ready);
        }
        ours.consume();
        assert_eq!(ours.try_peek().unwrap().unwrap().0, ToSupervisor::Segment { index: 7 });
        ours.consume();
        assert!(matches!(ours.try_peek(), Err(ChannelError::Closed)));
    }
}

#[test]
fn refused_messages_leak_no_descriptor() {
    let (mut ours, theirs) = SupervisorChannel::pair().unwrap();
    let file = marked_file(c"leak");
    let fd = file.as_raw_fd();
    // Nonsense with a descriptor; a message without descriptors that comes with some; one that lacks its own.
    raw_send(theirs.as_fd(), b"nonsense", &[fd]);
    assert!(matches!(ours.try_recv(), Err(ChannelError::Message(_))));
    raw_send(theirs.as_fd(), &ToSupervisor::Ready.encode().unwrap(), &[fd; 200]);
    assert!(matches!(ours.try_recv(), Err(ChannelError::DescriptorCount { expected: 0, got: 200 })));
    raw_send(theirs.as_fd(), &ToSupervisor::Segment { index: 0 }.encode().unwrap(), &[]);
    assert!(matches!(ours.try_recv(), Err(ChannelError::DescriptorCount { expected: 1, got: 0 })));
    assert_eq!(references(&file), 1);
}

#[test]
fn what_waits_when_the_conversation_is_ended_is_closed() {
    let (mut ours, mut theirs) = SupervisorChannel::pair().unwrap();
    let file = marked_file(c"waits");
    for _ in 0..100 {
        raw_send(theirs.as_fd(), b"", &[]);
        raw_send(theirs.as_fd(), b"nonsense", &[file.as_raw_fd(); 253]);
    }
    let again = file.try_clone().unwrap();
    drop(file);
    ours.hang_up();
    assert_eq!(references(&again), 1);
    assert!(matches!(theirs.try_recv(), Err(ChannelError::Closed)));
    assert!(matches!(theirs.send(&ToSupervisor::Ready, &[]), Err(ChannelError::Closed)));
}

#[test]
fn oversized_and_empty_messages_are_refused() {
    let (mut ours, theirs) = SupervisorChannel::pair().unwrap();
    raw_send(theirs.as_fd(), &vec![0; MESSAGE_LEN_MAX + 1], &[]);
    assert!(matches!(ours.try_recv(), Err(ChannelError::TooLong { .. })));
    raw_send(theirs.as_fd(), b"", &[]);
    assert!(matches!(ours.try_recv(), Err(ChannelError::Closed)));
    let what = "x".repeat(MESSAGE_LEN_MAX);
    assert!(matches!(theirs.send(&ToSupervisor::Failed { what }, &[]), Err(ChannelError::TooLong { .. })));
}

#[test]
fn too_many_descriptors_are_refused_before_the_kernel_is_asked() {
    let (ours, _theirs) = SupervisorChannel::pair().unwrap();
    let file = marked_file(c"many");
    let fds = vec![file.as_fd(); DESCRIPTORS_MAX + 1];
    let record =
        ConnectionRecord { cookie: 1, listener: String::new(), carry: Vec::new(), attached: true, more: false };
    let records = vec![record; fds.len()];
    let sent = ours.send(&ToService::Connections { records }, &fds);
    assert!(matches!(sent, Err(ChannelError::TooManyDescriptors { count: 254 })), "{sent:?}");
}

#[test]
fn descriptors_lost_to_a_low_limit_are_an_error_and_the_rest_closes() {
    // The limit belongs to the whole process, so a process of its own is needed: this test again, in a child.
    const CHILD: &str = "WARMSWAP_TEST_LOW_LIMIT";
    if std::env::var_os(CHILD).is_none() {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "descriptors_lost_to_a_low_limit_are_an_error_and_the_rest_closes"])
            .env(CHILD, "1")
            .stdout(std::process::Stdio::null())
            .status()
            .unwrap();
        assert!(status.success());
        return;
    }
    let (mut ours, theirs) = SupervisorChannel::pair().unwrap();
    let file = marked_file(c"limit");
    let record =
        ConnectionRecord { cookie: 1, listener: String::new(), carry: Vec::new(), attached: true, more: false };
    let message = ToSupervisor::Connections { records: vec![record; 100] };
    theirs.send(&message, &[file.as_fd(); 100]).unwrap();
    let limit = libc::rlimit { rlim_cur: 40, rlim_max: 40 };
    // SAFETY: `limit` is live.
    unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    let lost = ours.try_recv();
    assert!(matches!(lost, Err(ChannelError::DescriptorsLost { connections: true, files_max: 40 })), "{lost:?}");
    assert_eq!(references(&file), 1);
    // Messages are whole, so the next one is understood.
    theirs.send(&ToSupervisor::Ready, &[]).unwrap();
    assert_eq!(ours.try_recv().unwrap().unwrap().0, ToSupervisor::Ready);
    let _hoard: Vec<_> = std::iter::from_fn(|| file.try_clone().ok()).collect();
    theirs.send(&ToSupervisor::Segment { index: 0 }, &[file.as_fd()]).unwrap();
    let lost = ours.try_recv();
    assert!(matches!(lost, Err(ChannelError::DescriptorsLost { connections: false, .. })), "{lost:?}");
}

#[test]
fn a_full_channel_is_an_error_after_the_wait_and_loses_nothing() {
    let (ours, mut theirs) = SupervisorChannel::pair().unwrap();
    let mut sent = 0;
    while ours.try_send(&ToService::Retire { drain_ms: sent }, &[]).unwrap() {
        sent += 1;
    }
    let begin = Instant::now();
    let refused = ours.send_within(&ToService::Follow { on: true }, &[], Duration::from_millis(50));
    assert!(matches!(refused, Err(ChannelError::Full { .. })), "{refused:?}");
    assert!((50..2000).contains(&begin.elapsed().as_millis()));
    for expected in 0..sent {
        assert_eq!(theirs.try_recv().unwrap().unwrap().0, ToService::Retire { drain_ms: expected });
    }
    assert!(theirs.try_recv().unwrap().is_none());
}

#[test]
fn anything_but_a_seqpacket_socket_is_no_channel() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    for fd in [OwnedFd::from(listener), marked_file(c"x"), std::os::unix::net::UnixStream::pair().unwrap().0.into()] {
        assert!(matches!(SupervisorChannel::from_fd(fd), Err(ChannelError::NotAChannel)));
    }
    let (ours, _theirs): (SupervisorChannel, _) = Channel::pair().unwrap();
    assert!(SupervisorChannel::from_fd(ours.into_fd()).is_ok());
}

#[test]
fn a_cookie_belongs_to_a_socket_and_its_duplicates() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let cookie = socket_cookie(client.as_fd()).unwrap();
    assert_eq!(socket_cookie(client.try_clone().unwrap().as_fd()).unwrap(), cookie);
    assert_ne!(socket_cookie(listener.as_fd()).unwrap(), cookie);
    assert!(socket_cookie(marked_file(c"x").as_fd()).is_err());
}

#[test]
fn large_groups_of_connections_are_split_so_that_each_fits_a_message() {
    let record = |carry: usize| ConnectionRecord {
        cookie: 1,
        listener: "listener".into(),
        carry: vec![0; carry],
        attached: true,
        more: false,
    };
    assert_eq!(split_connections(&[]), [0_usize; 0]);
    assert_eq!(split_connections(&vec![record(0); 600]), [253, 506, 600]);
    let mut mixed = vec![record(CARRY_LEN_MAX); 2];
    mixed.extend(vec![record(1000); 300]);
    let mut begin = 0;
    for end in split_connections(&mixed) {
        let records = mixed[begin..end].to_vec();
        assert!(!records.is_empty() && records.len() <= CONNECTIONS_PER_MESSAGE_MAX);
        let len = ToService::Connections { records }.encode().unwrap().len();
        assert!(len <= MESSAGE_LEN_MAX, "{len} bytes");
        begin = end;
    }
    assert_eq!(begin, mixed.len());
}

fn any_record() -> impl Strategy<Value = ConnectionRecord> {
    (any::<u64>(), ".{0,40}", prop::collection::vec(any::<u8>(), 0..200), any::<bool>(), any::<bool>()).prop_map(
        |(cookie, listener, carry, attached, more)| ConnectionRecord { cookie, listener, carry, attached, more },
    )
}

proptest! {
    #[test]
    fn any_bytes_are_decoded_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        let _ = ToService::decode(&bytes);
        let _ = ToSupervisor::decode(&bytes);
    }

    #[test]
    fn damaged_messages_are_decoded_or_refused(
        records in prop::collection::vec(any_record(), 0..8),
        at: prop::sample::Index,
        bytes in prop::collection::vec(any::<u8>(), 1..8),
    ) {
        let mut encoded = ToService::Connections { records }.encode().unwrap();
        let at = at.index(encoded.len());
        for (target, byte) in encoded[at..].iter_mut().zip(bytes) {
            *target = byte;
        }
        let _ = ToService::decode(&encoded);
        let _ = ToService::decode(&encoded[1..]);
    }

    #[test]
    fn messages_survive_the_round_trip(records in prop::collection::vec(any_record(), 0..8), segment: u64, offset: u64) {
        let message = ToSupervisor::Connections { records };
        prop_assert_eq!(ToSupervisor::decode(&message.encode().unwrap()).unwrap(), message);
        let commit = Some(Commit { position: LogPosition { segment, offset }, digest: offset });
        let message = ToService::Own { handover: 1, commit, connections_open: None, follow: true };
        prop_assert_eq!(ToService::decode(&message.encode().unwrap()).unwrap(), message);
    }
}
