//! Servers from Debian, unchanged and configured by their own documented means: each is updated twenty times under `wrk`
//! without a failed request.
//! One of them binds its port by itself and is replaced by one that does the same.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use warmswap_rootfs::pack_packages;
use warmswap_tests::{LENIENT, Requirement, Settings, Store, eventually, needs};

const UPDATES: u32 = 20;
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: service\r\nConnection: close\r\n\r\n";
/// A loaded machine takes its time.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server that somebody else wrote.
struct Program {
    /// Of the service.
    name: &'static str,
    package: &'static str,
    command: &'static [&'static str],
    /// What its service file says of it.
    top: &'static str,
    /// Lines of `[handover]`.
    handover: &'static str,
    /// It binds its port by itself, in the network namespace of its service, and knows of no convention.
    binds: bool,
    /// Its configuration, in the image.
    files: fn(SocketAddr) -> Vec<(&'static str, String)>,
}

/// Takes `LISTEN_FDS`, says `READY=1`, finishes on SIGTERM. Its sync workers close every connection after the answer, so
/// none idles in an old generation.
const GUNICORN: Program = Program {
    name: "scenario-gunicorn",
    package: "gunicorn",
    command: &["/usr/bin/gunicorn", "--chdir", "/srv", "--workers", "2", "--worker-tmp-dir", "/dev/shm", "app:app"],
    top: "ready = \"notify\"\n",
    handover: "",
    binds: false,
    files: |_| {
        let app = "import os\n\
            BODY = b'version-' + os.environb[b'VERSION'] + b'.'\n\
            def app(environ, start_response):\n    \
                start_response('200 OK', [('Content-Length', str(len(BODY)))])\n    \
                return [BODY]\n";
        vec![("srv/app.py", app.to_owned())]
    },
};

/// Takes its listener as `fd@3`, says `READY=1`, finishes on SIGUSR1. A connection that idles then is kept for one more
/// request (`idle-close-on-response`), as closing it would cross the client's next one.
const HAPROXY: Program = Program {
    name: "scenario-haproxy",
    package: "haproxy",
    command: &["/usr/sbin/haproxy", "-Ws", "-f", "/etc/service.cfg"],
    top: "ready = \"notify\"\nstop_signal = \"SIGUSR1\"\n",
    handover: "",
    binds: false,
    files: |_| {
        let config = "global\n    maxconn 1000\n\
            defaults\n    mode http\n    timeout client 60s\n    option idle-close-on-response\n\
            frontend web\n    bind fd@3\n    \
            http-request return status 200 content-type text/plain lf-string \"version-%[env(VERSION)].\"\n";
        vec![("etc/service.cfg", config.to_owned())]
    },
};

/// Takes `LISTEN_FDS` by address, says nothing, finishes on SIGINT. It closes connections that idle then, which would cross
/// the client's next request, so it is told to keep none.
const LIGHTTPD: Program = Program {
    name: "scenario-lighttpd",
    package: "lighttpd",
    command: &["/usr/sbin/lighttpd", "-D", "-f", "/etc/service.conf"],
    top: "stop_signal = \"SIGINT\"\n",
    // Of one that says nothing it is only known that it runs.
    handover: "warm_s_max = 1\n",
    binds: false,
    files: |address| lighttpd_files("server.systemd-socket-activation = \"enable\"\n", address),
};

/// The same, left to itself: it binds its port, as the one before it has.
const LIGHTTPD_BY_ITSELF: Program =
    Program { name: "scenario-ports", binds: true, files: |address| lighttpd_files("", address), ..LIGHTTPD };

fn lighttpd_files(activation: &str, address: SocketAddr) -> Vec<(&'static str, String)> {
    let config = format!(
        "server.modules = (\"mod_setenv\")\n\
             {activation}\
             server.bind = \"{}\"\nserver.port = {}\n\
             server.document-root = \"/srv\"\nindex-file.names = (\"index.txt\")\n\
             server.max-keep-alive-requests = 0\n\
             setenv.set-response-header = (\"X-Version\" => \"version-\" + env.VERSION + \".\")\n",
        address.ip(),
        address.port()
    );
    vec![("etc/service.conf", config), ("srv/index.txt", "hello\n".to_owned())]
}

impl Program {
    fn handover(&self) -> String {
        let all = format!("{LENIENT}drain_s_max = 60\n{}", self.handover);
        all.replace("verify_s_min = 1\n", "verify_s_min = 0.3\n")
    }

    /// A service file of a version; the image is packed once.
    fn file(&self, store: &Store, version: u32) -> PathBuf {
        let image = store.ground().path("images").join(self.package);
        if !image.exists() {
            pack_packages(&[self.package], &image).unwrap();
            for (path, text) in (self.files)(store.address()) {
                fs::create_dir_all(image.join(path).parent().unwrap()).unwrap();
                fs::write(image.join(path), text).unwrap();
            }
        }
        let handover = self.handover();
        let env = format!("VERSION = \"{version}\"\n");
        let settings = Settings {
            command: self.command,
            top: self.top,
            env: &env,
            handover: &handover,
            listens: !self.binds,
            ..Settings::new(&image)
        };
        store.file(&format!("version-{version}"), &settings).unwrap()
    }
}

/// Clients on eight connections, as fast as they are answered.
struct Wrk(Child);

impl Wrk {
    fn start(store: &Store, inside: bool) -> Self {
        let (address, patience) = (store.address(), format!("{}s", PATIENCE.as_secs()));
        let mut command = Command::new(if inside { "nsenter" } else { "wrk" });
        if inside {
            command.arg(format!("--net={}", store.netns().display())).arg("wrk");
        }
        command.args(["--threads", "1", "--connections", "8", "--duration", "3600s", "--timeout", &patience]);
        command.arg(format!("http://{address}/")).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self(command.spawn().unwrap())
    }

    /// What it counted.
    fn finish(mut self) -> String {
        assert!(self.0.try_wait().unwrap().is_none(), "wrk has ended by itself");
        // SAFETY: a child that has not been waited for, so the number is still its own.
        unsafe { libc::kill(self.0.id().try_into().unwrap(), libc::SIGINT) };
        let mut said = String::new();
        self.0.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        self.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        self.0.wait().unwrap();
        said
    }
}

impl Drop for Wrk {
    fn drop(&mut self) {
        // Fails when it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What wrk says when every request was answered with success, as a number of requests.
fn all_answered(said: &str) -> Option<u64> {
    let bad = ["Socket errors", "Non-2xx"];
    let requests = said.lines().find_map(|line| line.trim().split_once(" requests in ")?.0.parse().ok());
    requests.filter(|_| !bad.iter().any(|bad| said.contains(bad)))
}

/// A whole answer, over a connection of its own.
fn get(address: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(REQUEST)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn updates_lose_no_request(program: &Program) {
    let store = Store::start_with(program.name, |store| Ok(program.file(store, 0))).unwrap();
    let get = || if program.binds { store.inside(|| get(store.address())).unwrap() } else { get(store.address()) };
    eventually("it answers", PATIENCE, || get().is_ok_and(|answer| answer.contains("version-0.")));
    let wrk = Wrk::start(&store, program.binds);
    let began = Instant::now();
    for version in 1..=UPDATES {
        let update = store.update_to_file(&program.file(&store, version)).unwrap();
        assert_eq!(update.verdict(), "committed", "{version}: {}\n{}", update.reason(), store.log());
        let report = update.report.unwrap();
        assert_eq!(report["rung"], if program.binds { "ports" } else { "listeners" });
        assert_eq!(store.owner().unwrap(), version + 1);
        // The old one accepts until it has taken notice.
        let wanted = format!("version-{version}.");
        eventually("the new version answers", PATIENCE, || get().unwrap().contains(&wanted));
    }
    let took = began.elapsed();
    eventually("the old ones have drained", PATIENCE, || {
        store.status().is_ok_and(|status| status["generations"].as_array().is_some_and(|all| all.len() == 1))
    });
    let said = wrk.finish();
    println!("{}: {UPDATES} updates in {took:.1?}\n{said}", program.package);
    let requests = all_answered(&said).unwrap_or_else(|| panic!("requests failed:\n{said}\n{}", store.log()));
    assert!(requests > 100 * u64::from(UPDATES), "so few requests prove nothing:\n{said}");
    store.finish().unwrap();
}

#[test]
fn gunicorn_is_updated_twenty_times_without_a_failed_request() {
    let name = "gunicorn_is_updated_twenty_times_without_a_failed_request";
    needs!(name, Requirement::Containers, Requirement::Program("wrk"), Requirement::Program("gunicorn"));
    updates_lose_no_request(&GUNICORN);
}

#[test]
fn haproxy_is_updated_twenty_times_without_a_failed_request() {
    let name = "haproxy_is_updated_twenty_times_without_a_failed_request";
    needs!(name, Requirement::Containers, Requirement::Program("wrk"), Requirement::Program("haproxy"));
    updates_lose_no_request(&HAPROXY);
}

#[test]
fn lighttpd_is_updated_twenty_times_without_a_failed_request() {
    let name = "lighttpd_is_updated_twenty_times_without_a_failed_request";
    needs!(name, Requirement::Containers, Requirement::Program("wrk"), Requirement::Program("lighttpd"));
    updates_lose_no_request(&LIGHTTPD);
}

#[test]
fn a_program_that_binds_its_own_port_is_updated_twenty_times_without_a_failed_request() {
    let name = "a_program_that_binds_its_own_port_is_updated_twenty_times_without_a_failed_request";
    let programs = ["wrk", "nsenter", "lighttpd"].map(Requirement::Program);
    needs!(name, Requirement::Containers, Requirement::Bpf, programs[0], programs[1], programs[2]);
    updates_lose_no_request(&LIGHTTPD_BY_ITSELF);
}

#[test]
fn connections_that_wait_at_a_port_move_when_the_program_that_bound_it_ends() {
    let name = "connections_that_wait_at_a_port_move_when_the_program_that_bound_it_ends";
    needs!(name, Requirement::Containers, Requirement::Bpf, Requirement::Program("lighttpd"));
    const WAITING: usize = 50;
    let program = &LIGHTTPD_BY_ITSELF;
    let store = Store::start_with(program.name, |store| Ok(program.file(store, 0))).unwrap();
    let ask = || store.inside(|| get(store.address())).unwrap();
    eventually("it answers", PATIENCE, || ask().is_ok());
    // It accepts nobody any more, and does not know it.
    for pid in store.pids(1).unwrap() {
        // SAFETY: two integers.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGSTOP) }, 0);
    }
    let waiting: Vec<TcpStream> = (0..WAITING)
        .map(|_| {
            let mut stream = store.inside(|| TcpStream::connect_timeout(&store.address(), PATIENCE)).unwrap().unwrap();
            stream.write_all(REQUEST).unwrap();
            stream
        })
        .collect();
    let text = fs::read_to_string(program.file(&store, 1)).unwrap();
    let file = store.ground().service_file("impatient", &text.replace("drain_s_max = 60", "drain_s_max = 1")).unwrap();
    let update = store.update_to_file(&file).unwrap();
    assert_eq!(update.verdict(), "committed", "{}\n{}", update.reason(), store.log());
    let report = update.report.unwrap();
    assert_eq!(report["rung"], "ports");
    let lost = ["state in memory does not move", "connections established with g1 end when it has drained"];
    assert_eq!(report["lost"], serde_json::json!(lost));
    for (index, mut stream) in waiting.into_iter().enumerate() {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut answer = String::new();
        stream
            .read_to_string(&mut answer)
            .unwrap_or_else(|error| panic!("connection {index}: {error}\n{}", store.log()));
        assert!(answer.contains("version-1."), "connection {index}: {answer}");
    }
    store.finish().unwrap();
}

#[test]
fn a_program_that_leaves_the_port_alone_does_not_replace_one_that_serves_it() {
    let name = "a_program_that_leaves_the_port_alone_does_not_replace_one_that_serves_it";
    needs!(name, Requirement::Containers, Requirement::Bpf, Requirement::Program("lighttpd"));
    let program = &LIGHTTPD_BY_ITSELF;
    let store = Store::start_with(program.name, |store| Ok(program.file(store, 0))).unwrap();
    let ask = || store.inside(|| get(store.address())).unwrap();
    eventually("it answers", PATIENCE, || ask().is_ok());
    let idle = store.ground().path("images").join("idle");
    pack_packages(&["coreutils"], &idle).unwrap();
    let settings = Settings {
        command: &["/bin/sleep", "1000"],
        listens: false,
        handover: &program.handover(),
        ..Settings::new(&idle)
    };
    let update = store.update_to_file(&store.file("idle", &settings).unwrap()).unwrap();
    assert_eq!(update.verdict(), "rolled_back", "{update:?}");
    let port = store.address().port();
    let reason = format!("g2 listens at no port of g1: {port}");
    assert!(update.reason().contains(&reason), "{}", update.reason());
    assert!(ask().unwrap().contains("version-0."));
    store.finish().unwrap();
}

#[test]
fn a_failed_request_is_seen_in_what_wrk_says() {
    let good = "Running 1m test @ http://x/\n  9 requests in 1.00s, 1KB read\nRequests/sec: 9\n";
    assert_eq!(all_answered(good), Some(9));
    assert_eq!(all_answered(&format!("{good}  Socket errors: connect 0, read 1, write 0, timeout 0\n")), None);
    assert_eq!(all_answered(&format!("{good}  Non-2xx or 3xx responses: 1\n")), None);
    assert_eq!(all_answered("unable to connect"), None);
}
