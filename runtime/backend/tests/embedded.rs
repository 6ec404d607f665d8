//! What only the embedded back end promises: isolation, limits of the kernel, and outliving whoever is killed.

#![allow(clippy::unwrap_used, reason = "a test that fails says where")]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use support::{Host, LONG, id, log_with, prepare, script, service};
use warmswap_backend::{
    Backend, BackendError, ContainerId, ContainerState, EmbeddedBackend, EmbeddedConfig, Limits, NamedFd,
};
use warmswap_model::{Listen, Network};

fn open(backend: &EmbeddedBackend, name: &str) {
    backend.open_service(&service(name), &BTreeMap::new()).unwrap();
}

/// Creates and starts a script.
fn start(host: &Host, backend: &EmbeddedBackend, id: &ContainerId, text: &str) {
    let image = prepare(backend, &host.image("image"));
    backend.create(&script(&image, id, text), vec![], vec![]).unwrap();
    backend.start(id).unwrap();
}

/// Runs a script to its end and returns what it said.
fn output(host: &Host, backend: &EmbeddedBackend, id: &ContainerId, text: &str) -> String {
    start(host, backend, id, &format!("{text}\necho END"));
    backend.wait(id, LONG).unwrap();
    let log = log_with(backend, id, "END");
    backend.destroy(id).unwrap();
    log
}

fn nothing_is_left(host: &Host) {
    assert_eq!(host.traces(), Vec::<String>::new());
}

fn shim_pid(host: &Host, id: &ContainerId) -> i32 {
    let path = host.config().run_dir.join("containers").join(id.service.as_str()).join(id.generation.to_string());
    let text = fs::read_to_string(path.join("state.json")).unwrap();
    let record: serde_json::Value = serde_json::from_str(&text).unwrap();
    record["shim"]["pid"].as_i64().unwrap().try_into().unwrap()
}

fn kill(pid: i32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
}

/// Files named `name` in the container's group, in whatever hierarchy has them.
fn cgroup_file(id: &ContainerId, names: &[&str]) -> Option<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    for line in mounts.lines().filter(|line| line.contains(" - cgroup")) {
        let root = Path::new(line.split(' ').nth(4).unwrap()).join("warmswap");
        for runtime in fs::read_dir(&root).into_iter().flatten().flatten() {
            let folder = runtime.path().join(id.service.as_str()).join(id.generation.to_string());
            for name in names {
                if let Ok(text) = fs::read_to_string(folder.join(name)) {
                    return Some(text.trim().to_owned());
                }
            }
        }
    }
    None
}

#[test]
fn limits_are_in_the_cgroup_files() {
    needs_containers!("limits_are_in_the_cgroup_files");
    let host = Host::new();
    let backend = host.backend();
    open(&backend, "limited");
    let one = id("limited", 1);
    let image = prepare(&backend, &host.image("image"));
    let mut spec = script(&image, &one, "sleep 100");
    spec.limits = Limits {
        cpu_pct_max: Some(150.0),
        cpu_weight: Some(200),
        cpus: Some(vec![0]),
        memory_mb_max: Some(64.0),
        memory_mb_reserved: Some(16.0),
        disk_weight: Some(200),
        processes_max: Some(33),
    };
    backend.create(&spec, vec![], vec![]).unwrap();
    let one_of = |names: &[&str], values: &[&str]| {
        let found = cgroup_file(&one, names);
        assert!(found.as_deref().is_some_and(|f| values.contains(&f)), "{names:?}: {found:?}, not {values:?}");
    };
    one_of(&["cpu.max", "cpu.cfs_quota_us"], &["150000 100000", "150000"]);
    one_of(&["cpu.weight", "cpu.shares"], &["200", "2048"]);
    one_of(&["cpuset.cpus"], &["0"]);
    one_of(&["memory.max", "memory.limit_in_bytes"], &["67108864"]);
    one_of(&["memory.low", "memory.soft_limit_in_bytes"], &["16777216"]);
    one_of(&["pids.max"], &["33"]);
    backend.start(&one).unwrap();
    let changed = Limits { cpu_pct_max: Some(25.0), memory_mb_max: Some(32.0), ..Limits::default() };
    backend.set_limits(&one, &changed).unwrap();
    one_of(&["cpu.max", "cpu.cfs_quota_us"], &["25000 100000", "25000"]);
    one_of(&["memory.max", "memory.limit_in_bytes"], &["33554432"]);
    one_of(&["pids.max"], &["33"]);
    assert_eq!(backend.usage(&one).unwrap().memory_bytes_max, Some(33_554_432));
    backend.destroy(&one).unwrap();
    backend.close_service(&service("limited")).unwrap();
    nothing_is_left(&host);
}

#[test]
fn the_memory_limit_kills_and_is_counted() {
    needs_containers!("the_memory_limit_kills_and_is_counted");
    let host = Host::new();
    let backend = host.backend();
    open(&backend, "oom");
    let one = id("oom", 1);
    let image = prepare(&backend, &host.image("image"));
    // A shell variable that doubles.
    let mut spec = script(&image, &one, "a=xxxxxxxxxxxxxxxx; while true; do a=$a$a; done");
    spec.limits.memory_mb_max = Some(16.0);
    backend.create(&spec, vec![], vec![]).unwrap();
    backend.start(&one).unwrap();
    let state = backend.wait(&one, LONG).unwrap();
    assert_eq!(state, ContainerState::Exited { code: None, signal: Some(libc::SIGKILL) });
    let usage = backend.usage(&one).unwrap();
    assert!(usage.oom_kills >= 1, "{usage:?}");
    backend.destroy(&one).unwrap();
    backend.close_service(&service("oom")).unwrap();
}

#[test]
fn a_container_is_isolated() {
    needs_containers!("a_container_is_isolated");
    let host = Host::new();
    let backend = host.backend();
    open(&backend, "isolated");
    let one = id("isolated", 1);
    let log = output(
        &host,
        &backend,
        &one,
        "echo pid $$
        ls /proc | grep -c '^[0-9]'
        /bin/busybox hostname
        /bin/busybox mknod /tmp/disk b 8 0 2>/dev/null && echo mknod || echo no mknod
        (echo 1 > /proc/sys/kernel/panic) 2>/dev/null && echo sysctl || echo no sysctl
        /bin/busybox mount -t tmpfs x /tmp 2>/dev/null && echo mount || echo no mount
        grep -E 'NoNewPrivs|CapEff|SigIgn|SigBlk' /proc/self/status
        /bin/busybox ip link
        ls /dev; cat /proc/self/cgroup
        [ -w /sys/kernel ] && (echo > /sys/kernel/x) 2>/dev/null && echo sys || echo no sys",
    );
    assert!(log.contains("pid 1\n"), "{log}");
    assert!(log.contains("isolated\n"), "{log}");
    for word in ["no mknod", "no sysctl", "no mount", "no sys\n", "NoNewPrivs:\t1", "CapEff:\t00000000a00425fb"] {
        assert!(log.contains(word), "{word} is missing in {log}");
    }
    let mask = |name: &str| {
        let line = log.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t")).unwrap();
        u64::from_str_radix(line, 16).unwrap()
    };
    // The 31 classic signals; 32 and 33 belong to the C library.
    assert_eq!(mask("SigIgn") & 0x7fff_ffff, 0, "ignored signals are inherited");
    assert_eq!(mask("SigBlk"), 0, "blocked signals are inherited");
    assert!(log.contains("lo:") && !log.contains("eth0"), "{log}");
    for device in ["null", "zero", "urandom", "pts", "shm"] {
        assert!(log.lines().any(|line| line == device), "{device} is missing in {log}");
    }
    // In a v2 group of its own when its first instruction ran.
    assert!(log.lines().any(|line| line.starts_with("0::") && line.ends_with("/isolated/g1")), "{log}");
    backend.close_service(&service("isolated")).unwrap();
    nothing_is_left(&host);
}

#[test]
fn generations_share_a_network_namespace_and_listeners_live_where_they_should() {
    needs_containers!("generations_share_a_network_namespace_and_listeners_live_where_they_should");
    let host = Host::new();
    let backend = host.backend();
    let any = |port: u16, network| Listen { network, ..Listen::at(SocketAddr::from(([127, 0, 0, 1], port))) };
    let listen = BTreeMap::from([
        ("inside".to_owned(), any(7000, Network::Service)),
        ("outside".to_owned(), any(0, Network::Host)),
    ]);
    let name = service("net");
    let ground = backend.open_service(&name, &listen).unwrap();
    let outside = TcpListener::from(ground.listeners[1].fd.try_clone().unwrap()).local_addr().unwrap();
    TcpStream::connect(outside).unwrap();
    assert!(TcpStream::connect("127.0.0.1:7000").is_err(), "the service's own port is on the host");
    let again = backend.open_service(&name, &listen);
    assert!(matches!(again, Err(BackendError::Listen { .. })), "nobody keeps the listeners yet");

    let image = prepare(&backend, &host.image("image"));
    let (one, two) = (id("net", 1), id("net", 2));
    backend.create(&script(&image, &one, "readlink /proc/self/ns/net; sleep 100"), ground.listeners, vec![]).unwrap();
    backend.start(&one).unwrap();
    let text = "readlink /proc/self/ns/net; grep 0100007F:1B58 /proc/net/tcp; echo END";
    let found = backend.open_service(&name, &listen).unwrap();
    backend.create(&script(&image, &two, text), found.listeners, vec![]).unwrap();
    backend.start(&two).unwrap();
    backend.wait(&two, LONG).unwrap();
    let (first, second) = (log_with(&backend, &one, "net:"), log_with(&backend, &two, "END"));
    // 127.0.0.1:7000 in state LISTEN.
    assert!(second.contains("0100007F:1B58 00000000:0000 0A"), "{second}");
    assert_eq!(first.lines().next(), second.lines().next());
    let ours = fs::read_link("/proc/self/ns/net").unwrap();
    assert_ne!(first.lines().next(), ours.to_str());
    backend.destroy(&one).unwrap();
    backend.destroy(&two).unwrap();
    backend.close_service(&name).unwrap();
    nothing_is_left(&host);
}

#[test]
fn hundreds_of_descriptors_arrive() {
    needs_containers!("hundreds_of_descriptors_arrive");
    let host = Host::new();
    let backend = host.backend();
    open(&backend, "many");
    let one = id("many", 1);
    let image = prepare(&backend, &host.image("image"));
    let fds = (0..500)
        .map(|index| {
            let (reader, mut writer) = std::io::pipe().unwrap();
            writeln!(writer, "number {index}").unwrap();
            NamedFd { name: format!("f{index}"), fd: reader.into() }
        })
        .collect();
    let text = "cat /proc/self/fd/3 /proc/self/fd/250 /proc/self/fd/502; ls /proc/self/fd | grep -c .; echo END";
    backend.create(&script(&image, &one, text), fds, vec![]).unwrap();
    backend.start(&one).unwrap();
    backend.wait(&one, LONG).unwrap();
    let log = log_with(&backend, &one, "END");
    // 0, 1, 2, the 500 and the one that ls reads the folder with.
    assert_eq!(log, "number 0\nnumber 247\nnumber 499\n504\nEND\n");
    backend.destroy(&one).unwrap();
    backend.close_service(&service("many")).unwrap();
}

#[test]
fn containers_are_created_at_the_same_time() {
    needs_containers!("containers_are_created_at_the_same_time");
    let host = Host::new();
    let backend = host.backend();
    let image = prepare(&backend, &host.image("image"));
    open(&backend, "crowd");
    std::thread::scope(|scope| {
        for generation in 1..=6 {
            let (backend, image) = (&backend, &image);
            scope.spawn(move || {
                let one = id("crowd", generation);
                let code = i32::try_from(generation).unwrap();
                backend.create(&script(image, &one, &format!("exit {code}")), vec![], vec![]).unwrap();
                backend.start(&one).unwrap();
                let state = backend.wait(&one, LONG).unwrap();
                assert_eq!(state, ContainerState::Exited { code: Some(code), signal: None });
                backend.destroy(&one).unwrap();
            });
        }
    });
    backend.close_service(&service("crowd")).unwrap();
    nothing_is_left(&host);
}

#[test]
fn a_container_whose_shim_was_killed_is_listed_signalled_and_destroyed() {
    needs_containers!("a_container_whose_shim_was_killed_is_listed_signalled_and_destroyed");
    let host = Host::new();
    let backend = host.backend();
    open(&backend, "orphan");
    for generation in 1..=3 {
        let one = id("orphan", generation);
        start(&host, &backend, &one, "trap 'exit 5' TERM; echo READY; while true; do sleep 0.05; done");
        log_with(&backend, &one, "READY");
        kill(shim_pid(&host, &one));
        let end = Instant::now() + LONG;
        while backend.drop_kept_fd(&one, "none").is_ok() {
            assert!(Instant::now() < end);
        }
        let error = backend.drop_kept_fd(&one, "none").unwrap_err().to_string();
        assert!(error.contains("its shim process has ended"), "{error}");
        assert!(backend.kept_fds(&one).unwrap().is_empty(), "it was given none and has no memory files");
        let fresh = host.backend();
        let found = fresh.list().unwrap();
        let state = found.iter().find(|f| f.spec.id == one).unwrap().state;
        assert!(matches!(state, ContainerState::Running { .. }), "{state:?}");
        assert!(fresh.usage(&one).unwrap().cpu_ns > 0);
        fresh.freeze(&one).unwrap();
        fresh.thaw(&one).unwrap();
        match generation {
            1 => {
                // Its exit status went with the shim, but not the fact.
                fresh.signal(&one, libc::SIGTERM).unwrap();
                assert_eq!(fresh.wait(&one, LONG).unwrap(), ContainerState::Exited { code: None, signal: None });
                fresh.destroy(&one).unwrap();
            }
            2 => fresh.destroy(&one).unwrap(),
            _ => {
                fresh.freeze(&one).unwrap();
                backend.destroy(&one).unwrap();
            }
        }
    }
    assert!(backend.list().unwrap().is_empty());
    backend.close_service(&service("orphan")).unwrap();
    nothing_is_left(&host);
}

/// Not a test: the agent that [`an_agent_that_is_killed_takes_nothing_with_it`] kills.
#[test]
fn agent_to_be_killed() {
    let Ok(folder) = std::env::var("WARMSWAP_TEST_AGENT_FOLDER") else { return };
    let folder = PathBuf::from(folder);
    let config = EmbeddedConfig {
        run_dir: folder.join("run"),
        state_dir: folder.join("state"),
        shim_exe: env!("CARGO_BIN_EXE_warmswap-shim").into(),
    };
    let backend = EmbeddedBackend::new(config).unwrap();
    let image = prepare(&backend, &folder.join("image"));
    let listen = BTreeMap::from([("l".to_owned(), Listen::at(SocketAddr::from(([127, 0, 0, 1], 0))))]);
    let ground = backend.open_service(&service("kept"), &listen).unwrap();
    let address = TcpListener::from(ground.listeners[0].fd.try_clone().unwrap()).local_addr().unwrap();
    let one = id("kept", 1);
    backend.create(&script(&image, &one, "echo READY; sleep 100"), ground.listeners, vec![]).unwrap();
    backend.start(&one).unwrap();
    let (reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(b"from the dead").unwrap();
    drop(writer);
    backend.keep_fd(&one, NamedFd { name: "segment-0".into(), fd: OwnedFd::from(reader) }).unwrap();
    println!("ADDRESS {address}");
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn an_agent_that_is_killed_takes_nothing_with_it() {
    needs_containers!("an_agent_that_is_killed_takes_nothing_with_it");
    let host = Host::new();
    host.image("image");
    let mut agent = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "agent_to_be_killed", "--nocapture"])
        .env("WARMSWAP_TEST_AGENT_FOLDER", host.folder.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(agent.stdout.take().unwrap()).lines();
    let address = lines
        .find_map(|line| Some(line.unwrap().split_once("ADDRESS ")?.1.parse::<SocketAddr>().unwrap()))
        .expect("the agent created its container");
    agent.kill().unwrap();
    agent.wait().unwrap();

    let backend = host.backend();
    let one = id("kept", 1);
    TcpStream::connect(address).expect("the listener is open without the agent");
    let found = backend.list().unwrap();
    assert!(matches!(found[0].state, ContainerState::Running { .. }));
    backend.signal(&one, libc::SIGKILL).unwrap();
    let state = backend.wait(&one, LONG).unwrap();
    assert_eq!(state, ContainerState::Exited { code: None, signal: Some(libc::SIGKILL) });

    let kept = backend.kept_fds(&one).unwrap();
    assert_eq!(kept.iter().map(|k| k.name.as_str()).collect::<Vec<_>>(), ["listen-l", "segment-0"]);
    let mut text = String::new();
    fs::File::from(kept.into_iter().nth(1).unwrap().fd).read_to_string(&mut text).unwrap();
    assert_eq!(text, "from the dead");
    TcpStream::connect(address).expect("the listener is open without agent and container");
    let listen = BTreeMap::from([("l".to_owned(), Listen::at(address))]);
    assert_eq!(backend.open_service(&service("kept"), &listen).unwrap().listeners.len(), 1);

    backend.destroy(&one).unwrap();
    backend.close_service(&service("kept")).unwrap();
    nothing_is_left(&host);
}

#[test]
fn purge_removes_whatever_is_there() {
    needs_containers!("purge_removes_whatever_is_there");
    let host = Host::new();
    let backend = host.backend();
    let run_dir = host.config().run_dir;
    for name in ["one", "two"] {
        open(&backend, name);
        for generation in 1..=2 {
            start(&host, &backend, &id(name, generation), "sleep 100");
        }
    }
    backend.freeze(&id("one", 1)).unwrap();
    kill(shim_pid(&host, &id("one", 2)));
    // A crash in the middle of create, and a folder that nobody understands.
    let shim = shim_pid(&host, &id("two", 1));
    fs::write(run_dir.join("containers/two/g1/state.json"), "{").unwrap();
    fs::remove_file(run_dir.join("containers/two/g1/spec.json")).unwrap();
    fs::create_dir_all(run_dir.join("containers/three/g9")).unwrap();
    let socket = host.folder.path().join("app.sock");
    let listen = BTreeMap::from([("app".to_owned(), Listen::at(socket.as_path()))]);
    drop(backend.open_service(&service("four"), &listen).unwrap());
    let left = warmswap_backend::leftovers(&run_dir);
    for part in
        ["/app.sock", "cgroup ", "process ", "mount ", "/netns/one", "/containers/three", &format!("process {shim} ")]
    {
        assert!(left.iter().any(|line| line.contains(part)), "{part} is not in {left:#?}");
    }
    let removed = warmswap_backend::purge(&run_dir).unwrap();
    assert!(removed.iter().any(|line| line.ends_with("/netns/one")), "{removed:#?}");
    assert!(!socket.exists());
    // Shims of this very process are its zombies until it collects them.
    drop(backend);
    assert_eq!(warmswap_backend::leftovers(&run_dir), Vec::<String>::new());
    assert_eq!(warmswap_backend::purge(&run_dir).unwrap(), Vec::<String>::new());
    nothing_is_left(&host);
}

#[test]
fn two_runtimes_on_one_host_do_not_touch_each_other() {
    needs_containers!("two_runtimes_on_one_host_do_not_touch_each_other");
    let (host, other) = (Host::new(), Host::new());
    let (backend, neighbour) = (host.backend(), other.backend());
    open(&backend, "same");
    open(&neighbour, "same");
    let one = id("same", 1);
    start(&host, &backend, &one, "sleep 100");
    start(&other, &neighbour, &one, "sleep 100");
    warmswap_backend::purge(&other.config().run_dir).unwrap();
    assert!(neighbour.list().unwrap().is_empty());
    assert!(matches!(backend.state(&one).unwrap(), ContainerState::Running { .. }));
    backend.destroy(&one).unwrap();
    backend.close_service(&service("same")).unwrap();
    nothing_is_left(&host);
}
