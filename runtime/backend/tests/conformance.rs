//! What every back end must do, as one function that is run for each.

#![allow(clippy::unwrap_used, reason = "a test that fails says where")]

mod support;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use support::{Host, LONG, id, log_with, prepare, script, service};
use warmswap_backend::{
    Backend, BackendError, ContainerId, ContainerState, FakeBackend, Limits, NOTIFY, NamedFd, PreparedImage,
};
use warmswap_model::{ImageRef, Listen, Transport};

const NOTIFY_VARIABLE: &str = "NOTIFY_SOCKET";
const KILLED: ContainerState = ContainerState::Exited { code: None, signal: Some(libc::SIGKILL) };

fn exited(code: i32) -> ContainerState {
    ContainerState::Exited { code: Some(code), signal: None }
}

/// One back end, and what another agent on the same host would see.
struct Place<'a> {
    backend: &'a dyn Backend,
    again: &'a dyn Fn() -> Box<dyn Backend>,
    image: PreparedImage,
}

#[test]
fn the_embedded_back_end_conforms() {
    needs_containers!("the_embedded_back_end_conforms");
    let host = Host::new();
    let backend = host.backend();
    let image = prepare(&backend, &host.image("image"));
    conformance(&Place { backend: &backend, again: &|| Box::new(host.backend()), image });
    assert_eq!(host.traces(), Vec::<String>::new());
}

#[test]
fn the_fake_back_end_conforms() {
    needs_containers!("the_fake_back_end_conforms");
    let host = Host::new();
    let backend = FakeBackend::new(&host.folder.path().join("fake"));
    let image = prepare(&backend, &host.image("image"));
    conformance(&Place { backend: &backend, again: &|| Box::new(backend.clone()), image });
}

type Rule = fn(&Place<'_>);

fn conformance(place: &Place<'_>) {
    let rules: [(&str, Rule); 18] = [
        ("the_host_has_something_to_give", the_host_has_something_to_give),
        ("listeners_are_opened_once_and_found_again", listeners_are_opened_once_and_found_again),
        ("sockets_of_every_kind_are_listeners", sockets_of_every_kind_are_listeners),
        ("a_socket_file_is_ours_or_is_left_alone", a_socket_file_is_ours_or_is_left_alone),
        ("nothing_runs_before_start", nothing_runs_before_start),
        ("descriptors_arrive_in_order_and_no_others", descriptors_arrive_in_order_and_no_others),
        (
            "environment_user_and_folder_are_those_of_image_and_spec",
            environment_user_and_folder_are_those_of_image_and_spec,
        ),
        ("exit_codes_and_signals_are_reported", exit_codes_and_signals_are_reported),
        ("waiting_ends_in_time", waiting_ends_in_time),
        ("a_frozen_container_makes_no_progress", a_frozen_container_makes_no_progress),
        ("usage_counts_cpu_time", usage_counts_cpu_time),
        ("limits_are_taken_at_any_time", limits_are_taken_at_any_time),
        ("kept_descriptors_outlive_the_container", kept_descriptors_outlive_the_container),
        ("a_program_can_speak_and_is_known_by_its_number", a_program_can_speak_and_is_known_by_its_number),
        ("another_agent_finds_the_containers", another_agent_finds_the_containers),
        ("what_does_not_exist_is_said_to_be_missing", what_does_not_exist_is_said_to_be_missing),
        ("destroying_twice_is_no_error", destroying_twice_is_no_error),
        ("what_cannot_be_created_leaves_nothing", what_cannot_be_created_leaves_nothing),
    ];
    for (name, rule) in rules {
        let begun = std::time::Instant::now();
        rule(place);
        println!("{}: {name}: {} ms", place.backend.name(), begun.elapsed().as_millis());
    }
}

fn destroy(place: &Place<'_>, id: &ContainerId) {
    place.backend.destroy(id).unwrap();
}

/// Creates, starts and waits for the end of a script; returns its output.
fn run(place: &Place<'_>, id: &ContainerId, text: &str) -> String {
    place.backend.create(&script(&place.image, id, &format!("{text}; echo END")), vec![], vec![]).unwrap();
    place.backend.start(id).unwrap();
    assert_eq!(place.backend.wait(id, LONG).unwrap(), exited(0));
    let log = log_with(place.backend, id, "END");
    destroy(place, id);
    log
}

fn open(place: &Place<'_>, name: &str) {
    place.backend.open_service(&service(name), &BTreeMap::new()).unwrap();
}

fn close(place: &Place<'_>, name: &str) {
    place.backend.close_service(&service(name)).unwrap();
}

fn pipe(name: &str) -> (NamedFd, File, NamedFd, File) {
    let (reader, writer) = std::io::pipe().unwrap();
    let (reader, writer): (OwnedFd, OwnedFd) = (reader.into(), writer.into());
    (
        NamedFd { name: format!("{name}-read"), fd: reader.try_clone().unwrap() },
        reader.into(),
        NamedFd { name: format!("{name}-write"), fd: writer.try_clone().unwrap() },
        writer.into(),
    )
}

fn read_line(file: &mut File) -> String {
    let mut text = String::new();
    let mut byte = [0];
    while file.read(&mut byte).unwrap() == 1 && byte[0] != b'\n' {
        text.push(byte[0].into());
    }
    text
}

fn cookie(fd: &impl AsRawFd) -> u64 {
    let mut value = 0_u64;
    let mut size = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the value and its size are valid for the call.
    let done = unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_COOKIE, (&raw mut value).cast(), &raw mut size)
    };
    assert_eq!(done, 0);
    value
}

fn the_host_has_something_to_give(place: &Place<'_>) {
    let capacity = place.backend.capacity().unwrap();
    assert!(capacity.cpus > 0);
    assert!(capacity.memory_mb_available > 0.0 && capacity.memory_mb_available <= capacity.memory_mb_total);
}

fn any_port() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

fn sockets_of_every_kind_are_listeners(place: &Place<'_>) {
    let folder = tempfile::tempdir().unwrap();
    let (stream_path, datagram_path) = (folder.path().join("stream"), folder.path().join("datagram"));
    let datagrams = |listen: Listen| Listen { transport: Transport::Datagram, ..listen };
    let listen = BTreeMap::from([
        ("a-tcp".to_owned(), Listen::at(any_port())),
        ("b-udp".to_owned(), datagrams(Listen::at(any_port()))),
        (
            "c-stream".to_owned(),
            Listen { mode: Some("0640".into()), owner: Some("1000:1001".into()), ..Listen::at(stream_path.as_path()) },
        ),
        ("d-datagram".to_owned(), datagrams(Listen::at(datagram_path.as_path()))),
    ]);
    let name = service("kinds");
    let ground = place.backend.open_service(&name, &listen).unwrap();
    let cookies: Vec<_> = ground.listeners.iter().map(|l| cookie(&l.fd)).collect();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&stream_path), mode(&datagram_path)), (0o640, 0o666));
    let owner = std::fs::metadata(&stream_path).unwrap();
    assert_eq!((owner.uid(), owner.gid()), (1000, 1001));
    let duplicate = |at: usize| ground.listeners[at].fd.try_clone().unwrap();
    let udp = UdpSocket::from(duplicate(1));
    let (stream, datagram) = (UnixListener::from(duplicate(2)), UnixDatagram::from(duplicate(3)));
    let blocks = std::io::ErrorKind::WouldBlock;
    assert_eq!(udp.recv(&mut [0]).unwrap_err().kind(), blocks);
    assert_eq!(stream.accept().unwrap_err().kind(), blocks);
    assert_eq!(datagram.recv(&mut [0]).unwrap_err().kind(), blocks);

    let one = id("kinds", 1);
    place.backend.create(&script(&place.image, &one, "sleep 100"), ground.listeners, vec![]).unwrap();
    let udp_address = udp.local_addr().unwrap();
    drop((udp, stream, datagram));
    // Only the container and its keeper hold them: what comes now waits for whoever is next.
    UdpSocket::bind(any_port()).unwrap().send_to(b"u", udp_address).unwrap();
    let mut waiting = UnixStream::connect(&stream_path).unwrap();
    waiting.write_all(b"s").unwrap();
    UnixDatagram::unbound().unwrap().send_to(b"d", &datagram_path).unwrap();
    let again = (place.again)().open_service(&name, &listen).unwrap();
    assert_eq!(again.listeners.iter().map(|l| cookie(&l.fd)).collect::<Vec<_>>(), cookies);
    let mut found = again.listeners.into_iter().skip(1).map(|listener| listener.fd);
    let (udp, stream, datagram) = (
        UdpSocket::from(found.next().unwrap()),
        UnixListener::from(found.next().unwrap()),
        UnixDatagram::from(found.next().unwrap()),
    );
    let mut byte = [0];
    assert_eq!((udp.recv(&mut byte).unwrap(), byte), (1, *b"u"));
    assert_eq!((datagram.recv(&mut byte).unwrap(), byte), (1, *b"d"));
    stream.accept().unwrap().0.read_exact(&mut byte).unwrap();
    assert_eq!(byte, *b"s");

    for at in [Listen::at(stream_path.as_path()), datagrams(Listen::at(udp_address))] {
        let taken = BTreeMap::from([("x".to_owned(), at)]);
        let error = place.backend.open_service(&service("other"), &taken).unwrap_err();
        assert!(matches!(&error, BackendError::Listen { name, .. } if name == "x"), "{error}");
    }
    close(place, "other");
    destroy(place, &one);
    drop((udp, stream, datagram));
    close(place, "kinds");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "a socket file is left");
}

fn a_socket_file_is_ours_or_is_left_alone(place: &Place<'_>) {
    let folder = tempfile::tempdir().unwrap();
    let (path, free) = (folder.path().join("a"), folder.path().join("b"));
    let listen =
        BTreeMap::from([("a".to_owned(), Listen::at(free.as_path())), ("b".to_owned(), Listen::at(path.as_path()))]);
    drop(UnixListener::bind(&path).unwrap());
    let error = place.backend.open_service(&service("files"), &listen).unwrap_err();
    assert!(std::error::Error::source(&error).unwrap().to_string().contains("did not make"), "{error:?}");
    assert!(path.exists());
    std::fs::remove_file(&path).unwrap();
    // Nobody keeps what is opened here: it is as after a crash of everything.
    let ground =
        place.backend.open_service(&service("files"), &BTreeMap::from([("b".to_owned(), listen["b"].clone())]));
    drop(ground.unwrap());
    close(place, "files");
    assert!(!path.exists());
    place.backend.open_service(&service("files"), &listen).unwrap();
    if place.backend.name() == "fake" {
        close(place, "files"); // it keeps its listeners itself, and nobody else could
    }
    place.backend.open_service(&service("files"), &listen).unwrap();
    close(place, "files");
    close(place, "files");
    assert!(!path.exists());
}

fn listeners_are_opened_once_and_found_again(place: &Place<'_>) {
    let listen = BTreeMap::from([
        ("b".to_owned(), Listen { backlog: 16, ..Listen::at(any_port()) }),
        ("a".to_owned(), Listen { backlog: 16, ..Listen::at(any_port()) }),
    ]);
    let name = service("listeners");
    let ground = place.backend.open_service(&name, &listen).unwrap();
    let names: Vec<_> = ground.listeners.iter().map(|l| l.name.as_str()).collect();
    assert_eq!(names, ["a", "b"]);
    let cookies: Vec<_> = ground.listeners.iter().map(|l| cookie(&l.fd)).collect();
    let first = std::net::TcpListener::from(ground.listeners[0].fd.try_clone().unwrap());
    let address = first.local_addr().unwrap();
    assert_eq!(first.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock, "listeners are non-blocking");

    let one = id("listeners", 1);
    place.backend.create(&script(&place.image, &one, "sleep 100"), ground.listeners, vec![]).unwrap();
    drop(first);
    // Nobody but the container and its keeper holds them now; a new agent must get the same ones.
    let again = (place.again)().open_service(&name, &listen).unwrap();
    assert_eq!(again.cgroup, ground.cgroup);
    assert_eq!(again.listeners.iter().map(|l| cookie(&l.fd)).collect::<Vec<_>>(), cookies);
    TcpStream::connect(address).unwrap();

    let taken = BTreeMap::from([("x".to_owned(), Listen::at(address))]);
    let error = place.backend.open_service(&service("other"), &taken).unwrap_err();
    assert!(matches!(&error, BackendError::Listen { name, .. } if name == "x"), "{error}");
    close(place, "other");

    let error = place.backend.close_service(&name).unwrap_err();
    assert!(error.to_string().contains("containers are left"), "{error}");
    destroy(place, &one);
    close(place, "listeners");
    drop(again);
    // Not at once: a process that another test spawns holds everything for a moment between fork and exec.
    let end = std::time::Instant::now() + LONG;
    while TcpStream::connect(address).is_ok() {
        assert!(std::time::Instant::now() < end, "a listener is left");
        std::thread::sleep(Duration::from_millis(5));
    }
    close(place, "listeners");
}

fn nothing_runs_before_start(place: &Place<'_>) {
    open(place, "starts");
    let one = id("starts", 1);
    let (_, mut reader, writer, rest) = pipe("p");
    place.backend.create(&script(&place.image, &one, "echo begun >&3; sleep 100"), vec![writer], vec![]).unwrap();
    drop(rest);
    assert!(matches!(place.backend.state(&one).unwrap(), ContainerState::Created { .. }));
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(std::fs::read_to_string(place.backend.log_path(&one)).unwrap_or_default(), "");
    place.backend.start(&one).unwrap();
    assert_eq!(read_line(&mut reader), "begun");
    let ContainerState::Running { pid } = place.backend.state(&one).unwrap() else { panic!("it runs") };
    assert!(Path::new(&format!("/proc/{pid}")).exists());
    let error = place.backend.start(&one).unwrap_err();
    assert!(error.to_string().contains("started before"), "{error}");
    let error = place.backend.create(&script(&place.image, &one, "true"), vec![], vec![]).unwrap_err();
    assert!(matches!(error, BackendError::ContainerExists { .. }), "{error}");
    assert!(matches!(place.backend.state(&one).unwrap(), ContainerState::Running { .. }), "the second create did harm");
    destroy(place, &one);
    // Everything of it has ended: the last write end of the pipe is gone.
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    close(place, "starts");
}

fn descriptors_arrive_in_order_and_no_others(place: &Place<'_>) {
    open(place, "fds");
    let one = id("fds", 1);
    let (first, _, _, mut into_first) = pipe("first");
    let (second, _, _, mut into_second) = pipe("second");
    let (_, mut answers, third, rest) = pipe("third");
    into_first.write_all(b"for three\n").unwrap();
    into_second.write_all(b"for four\n").unwrap();
    drop((into_first, into_second));
    let text = "read a <&3; read b <&4; echo \"$a, $b\" >&5; \
        if (echo x >&6) 2>/dev/null; then echo open >&5; else echo closed >&5; fi";
    place.backend.create(&script(&place.image, &one, text), vec![first, second, third], vec![]).unwrap();
    drop(rest);
    place.backend.start(&one).unwrap();
    assert_eq!(read_line(&mut answers), "for three, for four");
    assert_eq!(read_line(&mut answers), "closed");
    assert_eq!(place.backend.wait(&one, LONG).unwrap(), exited(0));
    destroy(place, &one);
    close(place, "fds");
}

fn environment_user_and_folder_are_those_of_image_and_spec(place: &Place<'_>) {
    open(place, "env");
    let mut image = place.image.clone();
    image.env = vec!["FROM_IMAGE=1".into(), "BOTH=image".into()];
    image.user = "app".into();
    image.working_dir = "/home/app".into();
    let one = id("env", 1);
    let mut spec = script(&image, &one, "echo $FROM_IMAGE $BOTH $FROM_SPEC; id -u; id -g; id -G; pwd; echo $PATH");
    spec.env = BTreeMap::from([("BOTH".into(), "spec".into()), ("FROM_SPEC".into(), "a b".into())]);
    place.backend.create(&spec, vec![], vec![]).unwrap();
    place.backend.start(&one).unwrap();
    assert_eq!(place.backend.wait(&one, LONG).unwrap(), exited(0));
    let log = log_with(place.backend, &one, "/bin");
    let lines: Vec<_> = log.lines().collect();
    assert_eq!(lines[..5], ["1 spec a b", "1000", "1001", "1001 50", "/home/app"]);
    destroy(place, &one);
    close(place, "env");
}

fn exit_codes_and_signals_are_reported(place: &Place<'_>) {
    open(place, "ends");
    let one = id("ends", 1);
    place.backend.create(&script(&place.image, &one, "exit 7"), vec![], vec![]).unwrap();
    place.backend.start(&one).unwrap();
    assert_eq!(place.backend.wait(&one, LONG).unwrap(), exited(7));
    assert_eq!(place.backend.state(&one).unwrap(), exited(7));
    assert_eq!(place.backend.wait(&one, Duration::ZERO).unwrap(), exited(7));
    let error = place.backend.signal(&one, libc::SIGTERM).unwrap_err();
    assert!(error.to_string().contains("has ended"), "{error}");
    destroy(place, &one);

    let two = id("ends", 2);
    let text = "trap 'exit 5' TERM; echo READY; while true; do sleep 0.05; done";
    place.backend.create(&script(&place.image, &two, text), vec![], vec![]).unwrap();
    place.backend.start(&two).unwrap();
    log_with(place.backend, &two, "READY");
    place.backend.signal(&two, libc::SIGTERM).unwrap();
    assert_eq!(place.backend.wait(&two, LONG).unwrap(), exited(5));
    destroy(place, &two);

    let three = id("ends", 3);
    place.backend.create(&script(&place.image, &three, "sleep 100"), vec![], vec![]).unwrap();
    place.backend.start(&three).unwrap();
    place.backend.signal(&three, libc::SIGKILL).unwrap();
    assert_eq!(place.backend.wait(&three, LONG).unwrap(), KILLED);
    destroy(place, &three);
    close(place, "ends");
}

fn waiting_ends_in_time(place: &Place<'_>) {
    open(place, "waits");
    let one = id("waits", 1);
    place.backend.create(&script(&place.image, &one, "sleep 100"), vec![], vec![]).unwrap();
    place.backend.start(&one).unwrap();
    let begun = std::time::Instant::now();
    let state = place.backend.wait(&one, Duration::from_millis(50)).unwrap();
    assert!(matches!(state, ContainerState::Running { .. }), "{state:?}");
    assert!(begun.elapsed() >= Duration::from_millis(50) && begun.elapsed() < LONG);
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| place_wait(place.backend, &one));
        std::thread::sleep(Duration::from_millis(20));
        place.backend.signal(&one, libc::SIGKILL).unwrap();
        assert_eq!(waiter.join().unwrap(), KILLED);
    });
    destroy(place, &one);
    close(place, "waits");
}

fn place_wait(backend: &dyn Backend, id: &ContainerId) -> ContainerState {
    backend.wait(id, LONG).unwrap()
}

fn a_frozen_container_makes_no_progress(place: &Place<'_>) {
    open(place, "freezes");
    let one = id("freezes", 1);
    place.backend.create(&script(&place.image, &one, "while true; do echo x; done"), vec![], vec![]).unwrap();
    place.backend.start(&one).unwrap();
    log_with(place.backend, &one, "x");
    let length = || std::fs::metadata(place.backend.log_path(&one)).unwrap().len();
    place.backend.freeze(&one).unwrap();
    let frozen = length();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(length(), frozen, "it wrote while frozen");
    place.backend.freeze(&one).unwrap();
    place.backend.thaw(&one).unwrap();
    let end = std::time::Instant::now() + LONG;
    while length() == frozen {
        assert!(std::time::Instant::now() < end, "it never went on");
        std::thread::sleep(Duration::from_millis(1));
    }
    place.backend.freeze(&one).unwrap();
    destroy(place, &one);
    close(place, "freezes");
}

fn usage_counts_cpu_time(place: &Place<'_>) {
    open(place, "usage");
    let one = id("usage", 1);
    place.backend.create(&script(&place.image, &one, "while true; do :; done"), vec![], vec![]).unwrap();
    place.backend.start(&one).unwrap();
    let before = place.backend.usage(&one).unwrap();
    let end = std::time::Instant::now() + LONG;
    while place.backend.usage(&one).unwrap().cpu_ns < before.cpu_ns + 20_000_000 {
        assert!(std::time::Instant::now() < end, "20 ms of CPU time were never counted");
        std::thread::sleep(Duration::from_millis(5));
    }
    destroy(place, &one);
    close(place, "usage");
}

fn limits_are_taken_at_any_time(place: &Place<'_>) {
    open(place, "limits");
    let one = id("limits", 1);
    let mut spec = script(&place.image, &one, "sleep 100");
    spec.limits = Limits { memory_mb_max: Some(64.0), processes_max: Some(16), ..Limits::default() };
    place.backend.create(&spec, vec![], vec![]).unwrap();
    place.backend.set_limits(&one, &Limits { cpu_pct_max: Some(50.0), ..Limits::default() }).unwrap();
    place.backend.start(&one).unwrap();
    place.backend.set_limits(&one, &Limits { memory_mb_max: Some(32.0), ..Limits::default() }).unwrap();
    place.backend.set_limits(&one, &Limits::default()).unwrap();
    destroy(place, &one);
    close(place, "limits");
}

fn kept_descriptors_outlive_the_container(place: &Place<'_>) {
    open(place, "keeps");
    let one = id("keeps", 1);
    let (_, mut reader, first, rest) = pipe("first");
    let (second, _, _, _) = pipe("second");
    let (third, _, _, _) = pipe("third");
    place.backend.create(&script(&place.image, &one, "exit 0"), vec![], vec![first, second]).unwrap();
    drop(rest);
    place.backend.keep_fd(&one, third).unwrap();
    place.backend.start(&one).unwrap();
    assert_eq!(place.backend.wait(&one, LONG).unwrap(), exited(0));

    let names = |kept: &[NamedFd]| kept.iter().map(|n| n.name.clone()).collect::<Vec<_>>();
    let kept = (place.again)().kept_fds(&one).unwrap();
    assert_eq!(names(&kept), ["first-write", "second-read", "third-read"]);
    let mut writer = File::from(kept.into_iter().next().unwrap().fd);
    writer.write_all(b"still here\n").unwrap();
    assert_eq!(read_line(&mut reader), "still here");

    let (other, _, _, mut into_other) = pipe("other");
    into_other.write_all(b"new\n").unwrap();
    place.backend.keep_fd(&one, NamedFd { name: "second-read".into(), fd: other.fd }).unwrap();
    place.backend.drop_kept_fd(&one, "first-write").unwrap();
    place.backend.drop_kept_fd(&one, "first-write").unwrap();
    let kept = place.backend.kept_fds(&one).unwrap();
    assert_eq!(names(&kept), ["second-read", "third-read"]);
    assert_eq!(read_line(&mut File::from(kept.into_iter().next().unwrap().fd)), "new");

    // More than one message holds.
    for index in 0..450 {
        let fd = File::open("/dev/null").unwrap().into();
        place.backend.keep_fd(&one, NamedFd { name: format!("n{index}"), fd }).unwrap();
    }
    let kept = place.backend.kept_fds(&one).unwrap();
    assert_eq!(kept.len(), 452);
    assert_eq!(kept[451].name, "n449");
    drop(kept);

    destroy(place, &one);
    drop(writer);
    assert_eq!(reader.read(&mut [0]).unwrap(), 0, "a kept descriptor is left after destroy");
    assert!(matches!(place.backend.kept_fds(&one), Err(BackendError::NoSuchContainer { .. })));
    close(place, "keeps");
}

fn a_program_can_speak_and_is_known_by_its_number(place: &Place<'_>) {
    open(place, "speaks");
    let one = id("speaks", 1);
    let ours = UnixDatagram::unbound().unwrap();
    ours.set_nonblocking(true).unwrap();
    let notify = NamedFd { name: NOTIFY.into(), fd: ours.try_clone().unwrap().into() };
    let mut image = place.image.clone();
    image.env.push(format!("{NOTIFY_VARIABLE}=/elsewhere"));
    let text = format!("sleep 100 & test -w ${NOTIFY_VARIABLE} && echo at=${NOTIFY_VARIABLE}; wait");
    place.backend.create(&script(&image, &one, &text), vec![], vec![notify]).unwrap();
    place.backend.start(&one).unwrap();
    let log = log_with(place.backend, &one, "at=");
    let path = log.trim().trim_start_matches("at=");
    let ContainerState::Running { pid } = place.backend.state(&one).unwrap() else { panic!("it runs") };
    let theirs = UnixDatagram::unbound().unwrap();
    theirs.send_to(b"READY=1", format!("/proc/{pid}/root{path}")).unwrap();
    let kept = (place.again)().kept_fds(&one).unwrap();
    assert_eq!(kept.iter().map(|named| named.name.as_str()).collect::<Vec<_>>(), [NOTIFY]);
    drop(ours);
    let ours = UnixDatagram::from(kept.into_iter().next().unwrap().fd);
    let mut bytes = [0; 16];
    let length = ours.recv(&mut bytes).unwrap();
    assert_eq!(&bytes[..length], b"READY=1");

    let pid = i32::try_from(pid).unwrap();
    let child = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    for inside in [pid, child.trim().parse().unwrap()] {
        assert!(place.backend.has_process(&one, inside).unwrap(), "{inside} is in it");
    }
    for outside in [1, i32::try_from(std::process::id()).unwrap()] {
        assert!(!place.backend.has_process(&one, outside).unwrap(), "{outside} is not in it");
    }
    destroy(place, &one);
    assert!(
        !run(place, &one, &format!("echo at=${NOTIFY_VARIABLE}")).contains('/'),
        "nobody listens, nobody is told to speak"
    );
    close(place, "speaks");
}

fn another_agent_finds_the_containers(place: &Place<'_>) {
    open(place, "found");
    let (running, ended) = (id("found", 1), id("found", 2));
    let mut spec = script(&place.image, &running, "sleep 100");
    spec.env = BTreeMap::from([("A".into(), "1".into())]);
    let cgroup = place.backend.create(&spec, vec![], vec![]).unwrap();
    place.backend.start(&running).unwrap();
    place.backend.create(&script(&place.image, &ended, "exit 3"), vec![], vec![]).unwrap();
    place.backend.start(&ended).unwrap();
    place.backend.wait(&ended, LONG).unwrap();

    let again = (place.again)();
    let found = again.list().unwrap();
    assert_eq!(found.iter().map(|f| f.spec.id.clone()).collect::<Vec<_>>(), [running.clone(), ended.clone()]);
    assert_eq!(found[0].spec, spec);
    assert_eq!(found[0].cgroup, cgroup);
    assert_ne!(found[1].cgroup, cgroup);
    assert!(matches!(found[0].state, ContainerState::Running { .. }));
    assert_eq!(found[1].state, exited(3));
    again.signal(&running, libc::SIGKILL).unwrap();
    assert_eq!(again.wait(&running, LONG).unwrap(), KILLED);
    again.destroy(&running).unwrap();
    again.destroy(&ended).unwrap();
    assert!(place.backend.list().unwrap().is_empty());
    close(place, "found");
}

fn what_does_not_exist_is_said_to_be_missing(place: &Place<'_>) {
    let none = id("nobody", 1);
    let backend = place.backend;
    let limits = Limits::default();
    let errors = [
        backend.start(&none).unwrap_err(),
        backend.state(&none).unwrap_err(),
        backend.wait(&none, Duration::ZERO).unwrap_err(),
        backend.signal(&none, libc::SIGTERM).unwrap_err(),
        backend.has_process(&none, 1).unwrap_err(),
        backend.freeze(&none).unwrap_err(),
        backend.thaw(&none).unwrap_err(),
        backend.usage(&none).unwrap_err(),
        backend.set_limits(&none, &limits).unwrap_err(),
        backend.drop_kept_fd(&none, "x").unwrap_err(),
        backend.kept_fds(&none).unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(error, BackendError::NoSuchContainer { .. }), "{error}");
    }
    let missing = ImageRef(PathBuf::from("/nonexistent/image.tar"));
    let error = backend.prepare_image(&missing).unwrap_err();
    assert!(error.to_string().starts_with("no image at /nonexistent/image.tar"), "{error}");
}

fn destroying_twice_is_no_error(place: &Place<'_>) {
    open(place, "twice");
    let one = id("twice", 1);
    destroy(place, &one);
    assert!(run(place, &one, "echo a").contains('a'));
    destroy(place, &one);
    // The same id again, as after a rollback to a fresh start.
    assert!(run(place, &one, "echo b").contains('b'));
    close(place, "twice");
    close(place, "twice");
}

fn what_cannot_be_created_leaves_nothing(place: &Place<'_>) {
    open(place, "broken");
    let one = id("broken", 1);
    let mut no_program = script(&place.image, &one, "true");
    no_program.command = Some(vec!["/bin/none".into()]);
    let mut no_command = script(&place.image, &one, "true");
    no_command.command = None;
    let mut no_user = script(&place.image, &one, "true");
    no_user.image.user = "nemo".into();
    for (spec, word) in [(no_program, "/bin/none"), (no_command, "command"), (no_user, "nemo")] {
        let error = place.backend.create(&spec, vec![], vec![]).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
        assert!(matches!(place.backend.state(&one), Err(BackendError::NoSuchContainer { .. })));
    }
    assert!(run(place, &one, "echo fine").contains("fine"));
    close(place, "broken");
}
