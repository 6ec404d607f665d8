//! Connections of every kind through updates: many, half closed, full, cut in the middle of a request, waiting to be
//! accepted; over TCP, UDP and unix sockets; and with too few descriptors.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::fs;
use std::io::{BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use warmswap_load::LoadResult;
use warmswap_load::resp::Reply;
use warmswap_tests::channel::descriptor_of;
use warmswap_tests::sequence::{self, Stream, unix_datagram_to};
use warmswap_tests::{LENIENT, Requirement, SetOnDrop, Settings, Store, Update, eventually, needs};

/// Emulated machines take their time.
const PATIENCE: Duration = Duration::from_secs(120);
/// Lenient, and short where a test has many updates.
const BRISK: &str = "quiesce_ms_max = 2000\nverify_s_min = 0.1\nverify_requests_min = 1\np99_ratio_max = 1e6\n\
                     cpu_ratio_max = 1e6\nmemory_latency_ratio_max = 1e6\nthroughput_ratio_min = 0\n";

fn assert_clean(result: &LoadResult) {
    assert!(result.totals.is_clean(), "{:?}\n{:?}", result.totals, result.faults);
    assert!(result.totals.writes_acknowledged > 0 && result.totals.keys_verified > 0, "{:?}", result.totals);
    assert_eq!(result.connections_kept, result.connections);
}

#[track_caller]
fn assert_committed(update: &Update, store: &Store) {
    assert_eq!(update.verdict(), "committed", "{}\n{}", update.reason(), store.log());
    let connections = &update.report.as_ref().unwrap()["connections"];
    assert_eq!(connections["sent"], connections["received"], "{connections}");
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    Stream::patience(&stream, PATIENCE).unwrap();
    stream
}

fn line(stream: &mut impl std::io::Read) -> String {
    let mut text = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte).unwrap() == 1 {
        if byte == *b"\n" {
            return String::from_utf8(text).unwrap();
        }
        text.push(byte[0]);
    }
    format!("{} and the end", String::from_utf8_lossy(&text))
}

/// Sets the soft and hard limit of open files of a process.
fn limit_files(pid: i32, soft: u64, hard: u64) {
    let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
    // SAFETY: the struct is live, nothing is asked for in return.
    let done = unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut()) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// Soft and hard.
fn files_limits(pid: u32) -> (u64, u64) {
    let text = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    let mut numbers = line.split_whitespace().map(|number| number.parse().unwrap_or(u64::MAX));
    (numbers.next().unwrap(), numbers.next().unwrap())
}

fn open_files(pid: u32) -> u64 {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count() as u64
}

/// The program of a generation.
fn pid(store: &Store, generation: u32) -> i32 {
    *store.pids(generation).unwrap().first().unwrap()
}

/// A session-store that also listens on a unix socket.
fn with_unix_socket(name: &'static str, handover: &str) -> (Store, PathBuf) {
    let mut path = PathBuf::new();
    let store = Store::start_with(name, |store| {
        path = store.ground().path("store.sock");
        let more = format!("[listen.unix]\naddress = {path:?}\nmode = \"0600\"\n");
        let image = store.image("v1")?;
        store.file("first", &Settings { handover, more: &more, ..Settings::new(&image) })
    });
    (store.unwrap(), path)
}

/// sockets-server on one listener of each kind.
struct Sockets {
    store: Store,
    udp: SocketAddr,
    stream: PathBuf,
    datagram: PathBuf,
}

impl Sockets {
    /// The first generation is told `argument`.
    fn start(name: &'static str, argument: &[&str], handover: &str) -> Self {
        let mut paths = [PathBuf::new(), PathBuf::new()];
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let store = Store::start_with(name, |store| {
            paths = ["stream", "datagram"].map(|kind| store.ground().path(&format!("{kind}.sock")));
            Self::file(store, "first", argument, handover, udp)
        });
        let [stream, datagram] = paths;
        Self { store: store.unwrap(), udp, stream, datagram }
    }

    fn file(store: &Store, name: &str, argument: &[&str], handover: &str, udp: SocketAddr) -> anyhow::Result<PathBuf> {
        let image = store.ground().path("images").join("sockets");
        let image = if image.exists() { image } else { store.ground().image("sockets", "sockets-server")? };
        let [stream, datagram] = ["stream", "datagram"].map(|kind| store.ground().path(&format!("{kind}.sock")));
        let more = format!(
            "[listen.udp]\naddress = \"{udp}\"\ntype = \"datagram\"\n[listen.stream]\naddress = {stream:?}\n\
             [listen.datagram]\naddress = {datagram:?}\ntype = \"datagram\"\n"
        );
        let command = [&["/bin/service"], argument].concat();
        store.file(name, &Settings { command: &command, handover, more: &more, ..Settings::new(&image) })
    }

    fn update(&self, name: &str, handover: &str) -> Update {
        self.store.update_to_file(&Self::file(&self.store, name, &[], handover, self.udp).unwrap()).unwrap()
    }

    fn udp_client(&self) -> UdpSocket {
        udp_to(self.udp)
    }
}

#[test]
fn fifteen_hundred_connections_move_at_once_though_the_agent_was_started_with_a_low_soft_limit() {
    let name = "fifteen_hundred_connections_move_at_once_though_the_agent_was_started_with_a_low_soft_limit";
    needs!(name, Requirement::Containers);
    const MANY: usize = 1500;
    let own = i32::try_from(std::process::id()).unwrap();
    let (soft, hard) = files_limits(std::process::id());
    // What the agent inherits. Nobody else starts processes as long as this test has no ground.
    let store = {
        limit_files(own, 1024, hard);
        let store = Store::start("scenario-many", LENIENT);
        limit_files(own, hard.max(soft), hard);
        store.unwrap()
    };
    assert_eq!(files_limits(store.agent_pid().unwrap().unsigned_abs()), (hard, hard), "the agent raises its own");
    let load = store.load_of(MANY, 500.0).unwrap();
    for (version, owner) in [("v2", 2), ("v1", 3)] {
        let update = store.update(version).unwrap();
        assert_committed(&update, &store);
        let received = update.report.unwrap()["connections"]["received"].as_u64().unwrap();
        assert!(received >= MANY as u64, "{received}");
        assert_eq!(store.owner().unwrap(), owner);
    }
    assert_clean(&load.stop().unwrap());
    store.finish().unwrap();
}

#[test]
fn too_few_descriptors_end_the_handover_with_a_reason_and_no_connection_is_lost() {
    let name = "too_few_descriptors_end_the_handover_with_a_reason_and_no_connection_is_lost";
    needs!(name, Requirement::Containers);
    const MANY: usize = 700;
    let mut store = Store::start("scenario-few", LENIENT).unwrap();
    let agent = store.agent_pid().unwrap().unsigned_abs();
    let agent_pid = i32::try_from(agent).unwrap();
    let (_, hard) = files_limits(agent);
    let load = store.load_of(MANY, 200.0).unwrap();
    let aborted = |store: &Store, words: &[&str]| {
        let update = store.update("v2").unwrap();
        assert_eq!(update.verdict(), "aborted", "{update:?}");
        for word in words {
            assert!(update.reason().contains(word), "{word:?} is not in {:?}", update.reason());
        }
        assert_eq!(store.owner().unwrap(), 1);
        eventually("the shadow is gone", PATIENCE, || {
            store.status().is_ok_and(|s| s["generations"].as_array().is_some_and(|g| g.len() == 1))
        });
    };

    // The agent's: it can start a shadow, but not pass on what the owner sends.
    let before = open_files(agent);
    limit_files(agent_pid, before + 45, hard);
    aborted(&store, &["g1 failed", "the agent could not take", "RLIMIT_NOFILE", "SYNC"]);
    limit_files(agent_pid, hard, hard);
    eventually("the agent keeps nothing", PATIENCE, || open_files(agent) <= before);

    // The owner's: not one left to send a connection with. Who arrives now waits, and is served later.
    let owner = pid(&store, 1);
    let used = open_files(owner.unsigned_abs());
    limit_files(owner, used, hard);
    aborted(&store, &["g1 failed", "no descriptor is left", "SYNC"]);
    limit_files(owner, hard, hard);

    // The shadow's, which it has from the agent. Last, because this limit does not rise again as long as that agent lives.
    limit_files(agent_pid, 600, 600);
    aborted(&store, &["g4 failed", "600 files", "RLIMIT_NOFILE", "SYNC"]);
    eventually("the agent keeps nothing", PATIENCE, || open_files(agent) <= before);
    store.kill_agent().unwrap();
    store.start_agent().unwrap();
    let update = store.update("v2").unwrap();
    assert_committed(&update, &store);
    assert_clean(&load.stop().unwrap());
    store.finish().unwrap();
}

#[test]
fn an_owner_with_few_descriptors_left_sends_its_connections_a_few_at_a_time() {
    let name = "an_owner_with_few_descriptors_left_sends_its_connections_a_few_at_a_time";
    needs!(name, Requirement::Containers);
    let store = Store::start("scenario-tight", LENIENT).unwrap();
    let mut clients: Vec<_> = (0..300).map(|_| store.client().unwrap()).collect();
    for client in &mut clients {
        assert_eq!(client.command(&["PING"]).unwrap(), Reply::Simple("PONG".into()));
    }
    let owner = pid(&store, 1);
    let (_, hard) = files_limits(owner.unsigned_abs());
    limit_files(owner, open_files(owner.unsigned_abs()) + 5, hard);
    // Nor does the kernel let it send any as long as more than its limit are on the way, whoever sent them.
    let (held, other) = UnixStream::pair().unwrap();
    for _ in 0..4 {
        put_on_the_way(&held);
    }
    let v2 = store.image("v2").unwrap();
    let update = store.begin_update(&["--image", &v2.to_string_lossy()], "preparing").unwrap();
    thread::sleep(Duration::from_secs(2));
    assert_eq!(store.status().unwrap()["activity"], "preparing", "it waits for room");
    drop((held, other));
    let output = update.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}\n{}", store.log());
    assert_eq!(store.owner().unwrap(), 2);
    for client in &mut clients {
        assert_eq!(client.command(&["GETDEL", "none"]).unwrap(), Reply::Bulk(None), "v2 serves it");
    }
    store.finish().unwrap();
}

/// Sends as many descriptors as fit a message; nobody receives them.
fn put_on_the_way(socket: &UnixStream) {
    const COUNT: usize = 253;
    let fds = [socket.as_raw_fd(); COUNT];
    let mut control = [0_u64; 130];
    let mut byte = 0_u8;
    let mut part = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // SAFETY: an all-zero msghdr is a valid empty one; what it points to is live and as large as it says, with room for
    // one control message of COUNT descriptors.
    let sent = unsafe {
        let mut header: libc::msghdr = std::mem::zeroed();
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = libc::CMSG_SPACE(size_of_val(&fds) as u32) as _;
        let message = libc::CMSG_FIRSTHDR(&raw const header);
        (*message).cmsg_level = libc::SOL_SOCKET;
        (*message).cmsg_type = libc::SCM_RIGHTS;
        (*message).cmsg_len = libc::CMSG_LEN(size_of_val(&fds) as u32) as _;
        std::ptr::copy_nonoverlapping(fds.as_ptr().cast(), libc::CMSG_DATA(message), size_of_val(&fds));
        libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_NOSIGNAL)
    };
    assert_eq!(sent, 1, "{}", std::io::Error::last_os_error());
}

/// More than any socket takes.
const REPLIES: usize = 40;
const VALUE_LEN: usize = 500_000;

/// Asks for more replies than fit, half of a request more, and reads nothing.
fn ask_too_much(stream: &mut impl Stream) {
    stream.write_all(&b"GET big\r\n".repeat(REPLIES)).unwrap();
    stream.write_all(b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$20000\r\n").unwrap();
    stream.write_all(&vec![b'y'; 15_000]).unwrap();
}

fn read_some(stream: &mut BufReader<impl Stream>, replies: usize) {
    let expected = [format!("${VALUE_LEN}\r\n").as_bytes(), &vec![b'x'; VALUE_LEN], b"\r\n"].concat();
    let mut reply = vec![0; expected.len()];
    for at in 0..replies {
        stream.read_exact(&mut reply).unwrap();
        assert!(reply == expected, "reply {at} of {replies}");
    }
}

fn read_slowly(stream: &mut BufReader<impl Stream>) {
    for _ in 0..REPLIES / 4 {
        thread::sleep(Duration::from_millis(300));
        read_some(stream, 1);
    }
}

fn finish_request(mut stream: BufReader<impl Stream>) {
    stream.get_mut().write_all(&vec![b'y'; 5_000]).unwrap();
    stream.get_mut().write_all(b"\r\nGET k\r\n").unwrap();
    assert_eq!(line(&mut stream), "+OK\r");
    assert_eq!(line(&mut stream), "$20000\r");
    assert_eq!(line(&mut stream), format!("{}\r", "y".repeat(20_000)));
}

fn set_big(store: &Store) {
    let big = "x".repeat(VALUE_LEN);
    assert_eq!(store.client().unwrap().command(&["SET", "big", &big]).unwrap(), Reply::Simple("OK".into()));
}

#[test]
fn unsent_answers_pipelined_and_half_read_requests_move_with_their_connection() {
    let name = "unsent_answers_pipelined_and_half_read_requests_move_with_their_connection";
    needs!(name, Requirement::Containers);
    let (store, path) = with_unix_socket("scenario-full", LENIENT);
    set_big(&store);
    let load = store.load().unwrap();
    let (mut tcp, mut unix) = (connect(store.address()), UnixStream::connect(&path).unwrap());
    Stream::patience(&unix, PATIENCE).unwrap();
    ask_too_much(&mut tcp);
    ask_too_much(&mut unix);
    let (mut tcp, mut unix) = (BufReader::new(tcp), BufReader::new(unix));
    for version in ["v2", "v1", "v2"] {
        assert_committed(&store.update(version).unwrap(), &store);
        read_some(&mut tcp, REPLIES / 4);
        read_some(&mut unix, REPLIES / 4);
    }
    assert_committed(&store.hand_over(&["rollback", "scenario-full"]).unwrap(), &store);
    // Slowly, through one more.
    thread::scope(|scope| {
        let readers = [scope.spawn(|| read_slowly(&mut tcp)), scope.spawn(|| read_slowly(&mut unix))];
        assert_committed(&store.update("v2").unwrap(), &store);
        for reader in readers {
            reader.join().unwrap();
        }
    });
    finish_request(tcp);
    finish_request(unix);
    assert_clean(&load.stop().unwrap());
    store.finish().unwrap();
}

#[test]
fn a_client_that_has_ended_its_side_gets_every_answer_from_the_next_generation() {
    let name = "a_client_that_has_ended_its_side_gets_every_answer_from_the_next_generation";
    needs!(name, Requirement::Containers);
    let (store, path) = with_unix_socket("scenario-half", LENIENT);
    set_big(&store);
    let (mut tcp, mut unix) = (connect(store.address()), UnixStream::connect(&path).unwrap());
    Stream::patience(&unix, PATIENCE).unwrap();
    tcp.write_all(&b"GET big\r\n".repeat(REPLIES)).unwrap();
    tcp.shutdown(Shutdown::Write).unwrap();
    unix.write_all(&b"GET big\r\n".repeat(REPLIES)).unwrap();
    unix.shutdown(Shutdown::Write).unwrap();
    let (mut tcp, mut unix) = (BufReader::new(tcp), BufReader::new(unix));
    for version in ["v2", "v1"] {
        assert_committed(&store.update(version).unwrap(), &store);
        read_some(&mut tcp, REPLIES / 2);
        read_some(&mut unix, REPLIES / 2);
    }
    assert_eq!((line(&mut tcp), line(&mut unix)), (" and the end".into(), " and the end".into()));
    store.finish().unwrap();
}

#[test]
fn a_connection_of_which_the_server_has_ended_its_side_is_read_on_by_the_next_generation() {
    let name = "a_connection_of_which_the_server_has_ended_its_side_is_read_on_by_the_next_generation";
    needs!(name, Requirement::Containers);
    const EACH: usize = 100_000;
    let sockets = Sockets::start("scenario-bye", &[], LENIENT);
    let mut asking = connect(sockets.store.address());
    let (mut tcp, mut unix) = (connect(sockets.store.address()), UnixStream::connect(&sockets.stream).unwrap());
    Stream::patience(&unix, PATIENCE).unwrap();
    for stream in [&mut tcp as &mut dyn Stream, &mut unix] {
        stream.write_all(b"bye\n").unwrap();
        assert_eq!(line(&mut &mut *stream), " and the end");
        stream.write_all(&[b'x'; EACH]).unwrap();
    }
    let mut counted = |expected: usize| {
        eventually("it is counted", PATIENCE, || {
            asking.write_all(b"counted\n").unwrap();
            line(&mut asking) == expected.to_string()
        });
    };
    counted(2 * EACH);
    assert_committed(&sockets.update("second", LENIENT), &sockets.store);
    for stream in [&mut tcp as &mut dyn Stream, &mut unix] {
        stream.write_all(&[b'x'; EACH]).unwrap();
    }
    counted(4 * EACH);
    asking.write_all(b"who?\n").unwrap();
    assert_eq!(line(&mut asking), "g2 who?");
    sockets.store.finish().unwrap();
}

#[test]
fn what_waits_while_the_owner_accepts_and_reads_nothing_is_served_by_the_next_generation() {
    let name = "what_waits_while_the_owner_accepts_and_reads_nothing_is_served_by_the_next_generation";
    needs!(name, Requirement::Containers);
    const WAITING: usize = 300;
    let sockets = Sockets::start("scenario-deaf", &["deaf"], LENIENT);
    let mut tcp: Vec<_> = (0..WAITING).map(|_| connect(sockets.store.address())).collect();
    let mut unix: Vec<_> = (0..WAITING).map(|_| UnixStream::connect(&sockets.stream).unwrap()).collect();
    for (at, stream) in tcp.iter_mut().enumerate() {
        stream.write_all(format!("{at}\n").as_bytes()).unwrap();
        if at % 2 == 0 {
            stream.shutdown(Shutdown::Write).unwrap();
        }
    }
    for (at, stream) in unix.iter_mut().enumerate() {
        Stream::patience(stream, PATIENCE).unwrap();
        stream.write_all(format!("{at}\n").as_bytes()).unwrap();
        if at % 2 == 0 {
            stream.shutdown(Shutdown::Write).unwrap();
        }
    }
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let stop = SetOnDrop(&done);
        let (udp, datagram) = (sockets.udp_client(), unix_datagram_to(&sockets.datagram).unwrap());
        let every = Duration::from_millis(5);
        let (one, two) = (&done, &done);
        let udp = scope.spawn(move || sequence::datagrams(&udp, every, one));
        let datagram = scope.spawn(move || sequence::datagrams(&datagram, every, two));
        assert_committed(&sockets.update("second", LENIENT), &sockets.store);
        drop(stop);
        for client in [udp, datagram] {
            client.join().unwrap().unwrap().exactly_once(1).unwrap();
        }
    });
    for at in 0..WAITING {
        let last = if at % 2 == 0 { " and the end" } else { "g2 more" };
        for stream in [&mut tcp[at] as &mut dyn Stream, &mut unix[at]] {
            assert_eq!(line(&mut &mut *stream), format!("g2 {at}"));
            if at % 2 == 1 {
                stream.write_all(b"more\n").unwrap();
            }
            assert_eq!(line(&mut &mut *stream), last);
        }
    }
    sockets.store.finish().unwrap();
}

#[test]
fn clients_that_come_while_the_owner_is_stopped_are_all_served() {
    needs!("clients_that_come_while_the_owner_is_stopped_are_all_served", Requirement::Containers);
    const WAITING: usize = 400;
    let (store, path) = with_unix_socket("scenario-stopped", LENIENT);
    // SAFETY: two integers.
    assert_eq!(unsafe { libc::kill(pid(&store, 1), libc::SIGSTOP) }, 0);
    let mut clients: Vec<Box<dyn Stream>> = Vec::new();
    for at in 0..WAITING {
        let mut client: Box<dyn Stream> = match at % 2 {
            0 => Box::new(connect(store.address())),
            _ => Box::new(UnixStream::connect(&path).unwrap()),
        };
        client.patience(PATIENCE).unwrap();
        client.write_all(b"INCR n\r\n").unwrap();
        clients.push(client);
    }
    // Nobody continues it, so it is followed by force; it had accepted none of them.
    let update = store.update("v2").unwrap();
    assert_eq!(update.verdict(), "committed", "{}\n{}", update.reason(), store.log());
    assert!(update.reason().contains("is stopped by a signal"), "{}", update.reason());
    let mut answers: Vec<usize> =
        clients.iter_mut().map(|client| line(client).trim().trim_start_matches(':').parse().unwrap()).collect();
    answers.sort_unstable();
    assert!(answers.into_iter().eq(1..=WAITING), "every one is counted once");
    assert_eq!(store.owner().unwrap(), 2);
    store.finish().unwrap();
}

#[test]
fn a_listener_that_a_generation_shuts_down_for_all_listens_again() {
    needs!("a_listener_that_a_generation_shuts_down_for_all_listens_again", Requirement::Containers);
    let mut store = Store::start("scenario-shutdown", LENIENT).unwrap();
    store.write_keys(100).unwrap();
    let mut client = store.client().unwrap();
    // As a program does that believes to be alone: the first descriptor it was given.
    let listener = descriptor_of(pid(&store, 1), 3).unwrap();
    // SAFETY: an integer and a live descriptor.
    let shut_down = || assert_eq!(unsafe { libc::shutdown(listener.as_raw_fd(), libc::SHUT_RD) }, 0);
    let accepts = |store: &Store, number: i64| {
        eventually("somebody accepts again", Duration::from_secs(5), || {
            let answer = store.client().and_then(|mut client| Ok(client.command(&["INCR", "newcomers"])?));
            answer.is_ok_and(|answer| answer == Reply::Integer(number))
        });
    };
    shut_down();
    accepts(&store, 1);
    assert!(matches!(client.command(&["INCR", "regulars"]).unwrap(), Reply::Integer(1)), "nothing happened to it");
    assert!(store.log().contains("has shut the listener resp down for all; it listens again"), "{}", store.log());
    // Nobody is there to notice; the next agent does.
    store.kill_agent().unwrap();
    shut_down();
    store.start_agent().unwrap();
    accepts(&store, 2);
    assert_committed(&store.update("v2").unwrap(), &store);
    store.check_keys(100).unwrap();
    store.finish().unwrap();
}

#[test]
fn requests_over_every_kind_of_socket_are_answered_exactly_once_through_ten_updates() {
    let name = "requests_over_every_kind_of_socket_are_answered_exactly_once_through_ten_updates";
    needs!(name, Requirement::Containers);
    const UPDATES: usize = 10;
    let sockets = Sockets::start("scenario-kinds", &[], BRISK);
    let done = AtomicBool::new(false);
    let (often, calmly) = (Duration::from_millis(2), Duration::from_millis(4));
    thread::scope(|scope| {
        let stop = SetOnDrop(&done);
        let done = &done;
        let (udp, datagram) = (sockets.udp_client(), unix_datagram_to(&sockets.datagram).unwrap());
        let (tcp, unix) = (connect(sockets.store.address()), UnixStream::connect(&sockets.stream).unwrap());
        let clients = [
            ("udp", scope.spawn(move || sequence::datagrams(&udp, often, done))),
            ("unix datagram", scope.spawn(move || sequence::datagrams(&datagram, often, done))),
            ("tcp", scope.spawn(move || sequence::lines(tcp, calmly, done))),
            ("unix stream", scope.spawn(move || sequence::lines(unix, calmly, done))),
        ];
        for update in 0..UPDATES {
            assert_committed(&sockets.update(&format!("file-{update}"), BRISK), &sockets.store);
        }
        thread::sleep(Duration::from_millis(300));
        drop(stop);
        for (kind, client) in clients {
            let tally = client.join().unwrap().unwrap_or_else(|error| panic!("{kind}: {error:#}"));
            println!("{kind}: {} requests, {} lost, {} answered twice", tally.sent, tally.lost, tally.repeated);
            tally.exactly_once(UPDATES + 1).unwrap_or_else(|error| panic!("{kind}: {error:#}"));
        }
    });
    sockets.store.finish().unwrap();
}

#[test]
fn new_clients_at_a_constant_rate_do_not_notice_twenty_updates_in_a_row() {
    needs!("new_clients_at_a_constant_rate_do_not_notice_twenty_updates_in_a_row", Requirement::Containers);
    const UPDATES: u32 = 20;
    let (store, path) = with_unix_socket("scenario-twenty", BRISK);
    let load = store.load().unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let stop = SetOnDrop(&done);
        let (every, address) = (Duration::from_millis(10), store.address());
        let pong = |answer: &str| answer == "+PONG\r\n";
        let (done, path) = (&done, &path);
        let tcp =
            scope.spawn(move || sequence::newcomers(|| TcpStream::connect(address), b"PING\r\n", pong, every, done));
        let unix =
            scope.spawn(move || sequence::newcomers(|| UnixStream::connect(path), b"PING\r\n", pong, every, done));
        for update in 0..UPDATES {
            let version = if update % 2 == 0 { "v2" } else { "v1" };
            assert_committed(&store.update(version).unwrap(), &store);
        }
        drop(stop);
        for (kind, client) in [("tcp", tcp), ("unix", unix)] {
            let served = client.join().unwrap().unwrap_or_else(|error| panic!("{kind}: {error:#}"));
            println!("{kind}: {served} new clients, all answered");
            assert!(served > u64::from(UPDATES), "{served}");
        }
    });
    assert_eq!(store.owner().unwrap(), UPDATES + 1);
    assert_clean(&load.stop().unwrap());
    store.finish().unwrap();
}

#[test]
fn sockets_outlive_the_agent_and_their_files_go_with_the_service() {
    needs!("sockets_outlive_the_agent_and_their_files_go_with_the_service", Requirement::Containers);
    let Sockets { mut store, udp, stream, datagram } = Sockets::start("scenario-files", &[], BRISK);
    let address = store.address();
    assert_eq!(
        store.status().unwrap()["listeners"],
        serde_json::json!([
            ["datagram", format!("{} (datagrams)", datagram.display())],
            ["resp", address.to_string()],
            ["stream", stream.to_string_lossy()],
            ["udp", format!("{udp}/udp")],
        ])
    );
    for path in [&stream, &datagram] {
        let found = fs::metadata(path).unwrap();
        assert!(found.file_type().is_socket() && found.permissions().mode() & 0o777 == 0o666, "{found:?}");
    }
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let stop = SetOnDrop(&done);
        let every = Duration::from_millis(5);
        let (one, two) = (udp_to(udp), unix_datagram_to(&datagram).unwrap());
        let (done, stream) = (&done, UnixStream::connect(&stream).unwrap());
        let clients = [
            scope.spawn(move || sequence::datagrams(&one, every, done)),
            scope.spawn(move || sequence::datagrams(&two, every, done)),
            scope.spawn(move || sequence::lines(stream, every, done)),
        ];
        store.kill_agent().unwrap();
        thread::sleep(Duration::from_millis(200));
        store.start_agent().unwrap();
        let file = Sockets::file(&store, "second", &[], BRISK, udp).unwrap();
        assert_committed(&store.update_to_file(&file).unwrap(), &store);
        thread::sleep(Duration::from_millis(200));
        drop(stop);
        for client in clients {
            client.join().unwrap().unwrap().exactly_once(2).unwrap();
        }
    });
    let ground = store.ground();
    assert!(ground.warmswap(&["stop", "scenario-files"]).unwrap().success());
    assert!(!stream.exists() && !datagram.exists());

    // Somebody else's file is in the way.
    fs::write(&datagram, "mine").unwrap();
    let file = ground.path("first.toml").to_string_lossy().into_owned();
    let said = ground.warmswap(&["run", &file]).unwrap();
    for words in [datagram.to_str().unwrap(), "no socket"] {
        assert!(!said.success() && said.stderr.contains(words), "{said:?}");
    }
    assert_eq!(fs::read_to_string(&datagram).unwrap(), "mine");
    assert!(!stream.exists());
    assert_eq!(cgroups_named("scenario-files", Path::new("/sys/fs/cgroup")), Vec::<PathBuf>::new());
    fs::remove_file(&datagram).unwrap();
    let said = ground.warmswap(&["run", &file]).unwrap();
    assert!(said.success(), "{said:?}");
    assert!(stream.exists() && datagram.exists());

    store.kill_agent().unwrap();
    let said = store.ground().warmswap(&["stop", "--all"]).unwrap();
    assert!(said.success() && said.stdout.contains(&format!("removed socket {}", stream.display())), "{said:?}");
    assert!(!stream.exists() && !datagram.exists());
    store.finish().unwrap();
}

fn cgroups_named(name: &str, below: &Path) -> Vec<PathBuf> {
    let folders = fs::read_dir(below).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir());
    folders
        .flat_map(|entry| match entry.file_name() == name {
            true => vec![entry.path()],
            false => cgroups_named(name, &entry.path()),
        })
        .collect()
}

fn udp_to(address: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.connect(address).unwrap();
    socket
}
