//! Services that are not written in Rust: the counters of `examples/c-counter` and `examples/python`, updated and rolled
//! back, each into itself and into one another, under clients that keep one connection and check every answer.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, atomic::AtomicBool};
use std::thread::JoinHandle;
use std::time::Duration;

use tempfile::TempDir;
use warmswap_rootfs::{pack_packages, pack_rootfs_as};
use warmswap_tests::{Requirement, Settings, Store, Update, eventually, needs, program};

/// A loaded machine takes its time.
const PATIENCE: Duration = Duration::from_secs(60);
const CLIENTS: usize = 8;
const CONTAINERS: Requirement = Requirement::Containers;
const COMPILER: Requirement = Requirement::Program("cc");
const PKG_CONFIG: Requirement = Requirement::Program("pkg-config");
const MAKE: Requirement = Requirement::Program("make");
/// Where the example in Python lies in its image.
const FOLDER: &str = "/srv";

/// In which language a generation is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Language {
    C,
    Python,
}

/// The SDK, installed for these tests alone, and what is built with it.
struct Workshop {
    folder: TempDir,
}

impl Workshop {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let library = program("libwarmswap.so").unwrap();
        let mut install = Command::new("sh");
        install.arg(sources().join("runtime/sdk/c/install.sh")).arg(library.parent().unwrap()).arg(folder.path());
        succeed(&mut install);
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Builds the example by its Makefile, to find the library beside the program.
    fn image_of_c(&self, version: &str) -> PathBuf {
        let image = self.path(&format!("images/c-{version}"));
        let place = self.path(&format!("build-{version}"));
        fs::create_dir_all(&place).unwrap();
        for name in ["counter.c", "Makefile"] {
            fs::copy(sources().join("examples/c-counter").join(name), place.join(name)).unwrap();
        }
        let mut make = Command::new("make");
        make.arg("-C").arg(&place).arg(format!("VERSION={version}"));
        make.arg("LDFLAGS=-Wl,-rpath,'$$ORIGIN'");
        // `make` passes its own settings down to those that it starts.
        make.env("PKG_CONFIG_PATH", self.path("lib/pkgconfig")).env_remove("MAKEFLAGS").env_remove("CFLAGS");
        succeed(&mut make);
        fs::copy(self.path("lib/libwarmswap.so.0"), place.join("libwarmswap.so.0")).unwrap();
        pack_rootfs_as(&place.join("counter"), &image, Some("counter")).unwrap();
        fs::copy(place.join("libwarmswap.so.0"), image.join("bin/libwarmswap.so.0")).unwrap();
        image
    }

    /// Debian's Python, the example, and what `install-sdk` installs for it.
    fn image_of_python(&self, version: &str) -> PathBuf {
        let image = self.path(&format!("images/python-{version}"));
        pack_packages(&["python3"], &image).unwrap();
        let inside = image.join(FOLDER.trim_start_matches('/'));
        fs::create_dir_all(&inside).unwrap();
        fs::create_dir_all(image.join("bin")).unwrap();
        fs::copy(sources().join("examples/python/counter.py"), inside.join("counter.py")).unwrap();
        fs::copy(self.path("share/warmswap/python/warmswap.py"), inside.join("warmswap.py")).unwrap();
        fs::copy(self.path("lib/libwarmswap.so.0"), inside.join("libwarmswap.so.0")).unwrap();
        let start = format!(
            "#!/usr/bin/python3\nimport os, runpy, sys\n\
             os.environ.update(VERSION={version:?}, WARMSWAP_LIBRARY=\"{FOLDER}/libwarmswap.so.0\")\n\
             sys.path.insert(0, \"{FOLDER}\")\nrunpy.run_path(\"{FOLDER}/counter.py\", run_name=\"__main__\")\n"
        );
        fs::write(image.join("bin/counter"), start).unwrap();
        fs::set_permissions(image.join("bin/counter"), fs::Permissions::from_mode(0o755)).unwrap();
        image
    }

    /// Of one generation: `/bin/counter`, whose answer to `INFO` begins with language and version.
    fn image(&self, language: Language, version: &str) -> PathBuf {
        match language {
            Language::C => self.image_of_c(version),
            Language::Python => self.image_of_python(version),
        }
    }
}

/// The root of the workspace.
fn sources() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn succeed(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{command:?}: {}{}", text(&output.stdout), text(&output.stderr));
}

/// One connection to the counters.
struct Client {
    stream: TcpStream,
    answers: BufReader<TcpStream>,
}

impl Client {
    fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let answers = BufReader::new(stream.try_clone().unwrap());
        Self { stream, answers }
    }

    fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).unwrap();
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        let len = self.answers.read_line(&mut line).unwrap();
        assert!(len > 0 && line.ends_with('\n'), "the connection was closed after {line:?}");
        line.truncate(len - 1);
        line
    }

    fn ask(&mut self, line: &str) -> String {
        self.send(line);
        self.send("\n");
        self.answer()
    }

    /// `c-counter 1` of `c-counter 1 generation 1 …`.
    fn version(&mut self) -> String {
        self.ask("INFO").split(' ').take(2).collect::<Vec<_>>().join(" ")
    }
}

/// Clients that each count up a counter of their own, over one connection each.
struct Crowd {
    ends: Arc<AtomicBool>,
    /// Of the one that is furthest behind.
    slowest: Vec<Arc<AtomicU64>>,
    threads: Vec<JoinHandle<u64>>,
}

impl Crowd {
    fn start(address: SocketAddr) -> Self {
        let ends = Arc::new(AtomicBool::new(false));
        let slowest: Vec<Arc<AtomicU64>> = (0..CLIENTS).map(|_| Arc::default()).collect();
        let threads = slowest.iter().enumerate().map(|(number, counted)| {
            let (ends, counted) = (Arc::clone(&ends), Arc::clone(counted));
            std::thread::spawn(move || {
                let mut client = Client::connect(address);
                let mut value = 0;
                while !ends.load(Ordering::Acquire) {
                    // Half of it stays in the service for a moment, and some of it over a handover.
                    client.send("INCR cli");
                    std::thread::sleep(Duration::from_millis(2));
                    client.send(&format!("ent-{number}\n"));
                    value += 1;
                    assert_eq!(client.answer(), value.to_string(), "client {number}");
                    counted.store(value, Ordering::Release);
                }
                value
            })
        });
        let threads = threads.collect();
        let crowd = Self { ends, slowest, threads };
        crowd.goes_on();
        crowd
    }

    /// Everybody has counted on since the call.
    fn goes_on(&self) {
        let counted = || self.slowest.iter().map(|counted| counted.load(Ordering::Acquire));
        let before: Vec<u64> = counted().collect();
        eventually("every client is answered", PATIENCE, || {
            let ended = self.threads.iter().any(JoinHandle::is_finished);
            ended || counted().zip(&before).all(|(now, before)| now > before + 20)
        });
    }

    /// Every connection lived to the end and every answer was the right one. Returns how far each has counted.
    fn stop(self) -> Vec<u64> {
        self.ends.store(true, Ordering::Release);
        self.threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    }
}

fn start(name: &'static str, workshop: &Workshop, language: Language) -> Store {
    let image = workshop.image(language, "1");
    let settings = Settings { command: &["/bin/counter"], ..Settings::new(&image) };
    Store::start_with(name, |store| store.file("first", &settings)).unwrap()
}

fn assert_committed(update: &Update, store: &Store) {
    assert_eq!(update.verdict(), "committed", "{}\n{}", update.reason(), store.log());
    let report = update.report.as_ref().unwrap();
    assert_eq!(report["rung"], "full", "{report}");
}

fn name_of(language: Language) -> &'static str {
    match language {
        Language::C => "c-counter",
        Language::Python => "python-counter",
    }
}

/// From generation to generation through `path`, then back by `warmswap rollback`; then the owner dies.
fn counts_on(name: &'static str, first: Language, path: &[Language]) {
    let workshop = Workshop::new();
    let store = start(name, &workshop, first);
    let mut half = Client::connect(store.address());
    assert_eq!(half.version(), format!("{} 1", name_of(first)));
    assert_eq!(half.ask("INCR kept"), "1");
    assert!(half.ask("DANCE").starts_with("ERR "));
    let crowd = Crowd::start(store.address());

    let mut before = (first, "1".to_owned());
    let mut now = before.clone();
    for (number, language) in path.iter().enumerate() {
        half.send("INCR ke");
        let version = (number + 2).to_string();
        let image = workshop.image(*language, &version);
        let update = store.hand_over(&["update", name, "--image", &image.to_string_lossy()]).unwrap();
        assert_committed(&update, &store);
        half.send("pt\n");
        assert_eq!(half.answer(), version);
        assert_eq!(half.version(), format!("{} {version}", name_of(*language)));
        crowd.goes_on();
        before = std::mem::replace(&mut now, (*language, version));
    }
    half.send("GET ke");
    let back = store.hand_over(&["rollback", name]).unwrap();
    assert_committed(&back, &store);
    half.send("pt\n");
    assert_eq!(half.answer(), now.1);
    assert_eq!(half.version(), format!("{} {}", name_of(before.0), before.1), "what was there before");
    crowd.goes_on();
    let counted = crowd.stop();

    let owner = store.owner().unwrap();
    for pid in store.pids(owner).unwrap() {
        // SAFETY: a system call without memory, on a process of a container of ours.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0, "process {pid} is not there");
    }
    eventually("another generation serves", PATIENCE, || store.owner().is_ok_and(|revived| revived != owner));
    // Whoever connects while nobody accepts yet waits in the listener's queue.
    let mut new = Client::connect(store.address());
    assert_eq!(new.version(), format!("{} {}", name_of(before.0), before.1));
    for (number, value) in counted.into_iter().enumerate() {
        assert_eq!(new.ask(&format!("GET client-{number}")), value.to_string(), "client {number}");
    }
    assert_eq!(new.ask("INCR kept"), (path.len() + 2).to_string());
    store.finish().unwrap();
}

#[test]
fn a_service_in_c_is_updated_rolled_back_and_revived() {
    needs!("a_service_in_c_is_updated_rolled_back_and_revived", CONTAINERS, COMPILER, PKG_CONFIG, MAKE);
    counts_on("scenario-c", Language::C, &[Language::C, Language::C, Language::C]);
}

#[test]
fn a_service_in_python_is_updated_rolled_back_and_revived() {
    needs!("a_service_in_python_is_updated_rolled_back_and_revived", CONTAINERS, COMPILER, PKG_CONFIG, MAKE);
    counts_on("scenario-python", Language::Python, &[Language::Python, Language::Python, Language::Python]);
}

#[test]
fn a_service_is_updated_from_one_language_to_the_other_and_back() {
    needs!("a_service_is_updated_from_one_language_to_the_other_and_back", CONTAINERS, COMPILER, PKG_CONFIG, MAKE);
    counts_on("scenario-languages", Language::C, &[Language::Python, Language::C]);
}
