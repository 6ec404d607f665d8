//! A server that knows the conventions of systemd and nothing of warmswap: its listener and its memory come in
//! `LISTEN_FDS`, it says that it is ready and alive, it keeps a counter in a memory file that it has stored, and it
//! finishes on SIGUSR1 alone. Its first argument is what it does not do: `ready` or `watchdog`.
//!
//! It answers lines: `count`, `status TEXT`, `store NAME`, `forget NAME`, `hang`, `flood`, `die`.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, ErrorKind, IoSlice, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use warmswap_tests::PLAIN_SERVER_VERSION as VERSION;

const STEP: Duration = Duration::from_millis(1);
/// Name of the counter among what is stored.
const COUNTER: &str = "counter";

static TOLD_TO_END: AtomicBool = AtomicBool::new(false);
static HANGS: AtomicBool = AtomicBool::new(false);

extern "C" fn end(_signal: libc::c_int) {
    TOLD_TO_END.store(true, Ordering::Relaxed);
}

/// Where it speaks.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Manager {
    fn say(&self, text: &str, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let address = nix::sys::socket::UnixAddr::new(&self.path)?;
        let raw: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights[..] };
        let flags = MsgFlags::MSG_NOSIGNAL;
        sendmsg(self.socket.as_raw_fd(), &[IoSlice::new(text.as_bytes())], control, flags, Some(&address))
            .with_context(|| format!("cannot say {text:?}"))?;
        Ok(())
    }

    /// Returns when everything said before has been heard.
    fn barrier(&self) -> Result<()> {
        let (mut reader, writer) = io::pipe()?;
        self.say("BARRIER=1", &[writer.as_fd()])?;
        drop(writer);
        io::Read::read(&mut reader, &mut [0])?;
        Ok(())
    }

    fn store(&self, name: &str) -> Result<File> {
        let file = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC)?);
        file.write_all_at(&0_u64.to_le_bytes(), 0)?;
        self.say(&format!("FDSTORE=1\nFDNAME={name}"), &[file.as_fd()])?;
        self.barrier()?;
        Ok(file)
    }
}

struct Server {
    version: String,
    names: String,
    manager: Manager,
    counter: Mutex<File>,
}

fn main() -> Result<()> {
    // SAFETY: the handler does nothing but store to an atomic; ignoring is no handler.
    unsafe {
        libc::signal(libc::SIGUSR1, end as *const () as libc::sighandler_t);
        libc::signal(libc::SIGTERM, libc::SIG_IGN);
    }
    let leaves_out = std::env::args().nth(1).unwrap_or_default();
    let path = std::env::var_os("NOTIFY_SOCKET").context("nobody wants to be notified")?.into();
    let manager = Manager { socket: UnixDatagram::unbound()?, path };
    let names = std::env::var("LISTEN_FDNAMES").context("LISTEN_FDNAMES is not set")?;
    let number = |wanted: &str| names.split(':').position(|name| name == wanted).map(|index| 3 + index as i32);
    let listener = number("resp").context("there is no listener")?;
    // SAFETY: passed to this process by the convention of `LISTEN_FDS`, and taken once.
    let listener = unsafe { TcpListener::from_raw_fd(listener) };
    listener.set_nonblocking(true).context("cannot make the listener non-blocking")?;
    let counter = match number(COUNTER) {
        // SAFETY: as above.
        Some(fd) => unsafe { File::from_raw_fd(fd) },
        None => manager.store(COUNTER)?,
    };
    let version = fs::read_to_string(VERSION).with_context(|| format!("cannot read {VERSION}"))?.trim().to_owned();
    let server = Arc::new(Server { version, names, manager, counter: Mutex::new(counter) });
    if leaves_out != "ready" {
        server.manager.say(&format!("READY=1\nSTATUS=this is {}", server.version), &[])?;
    }
    if let Some(every) = std::env::var("WATCHDOG_USEC").ok().filter(|_| leaves_out != "watchdog") {
        let every = Duration::from_micros(every.parse()?) / 10;
        let server = Arc::clone(&server);
        thread::spawn(move || -> Result<()> {
            while !HANGS.load(Ordering::Relaxed) {
                server.manager.say("WATCHDOG=1", &[])?;
                thread::sleep(every);
            }
            Ok(())
        });
    }
    // Ends when every client has gone.
    thread::scope(|clients| {
        while !TOLD_TO_END.load(Ordering::Relaxed) {
            match listener.accept() {
                Ok((stream, _)) => {
                    let server = &server;
                    clients.spawn(move || {
                        if let Err(error) = serve(server, &stream) {
                            eprintln!("a client: {error:#}");
                        }
                    });
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(STEP),
                Err(error) => return Err(error).context("cannot accept"),
            }
        }
        Ok(())
    })
}

fn serve(server: &Arc<Server>, mut stream: &TcpStream) -> Result<()> {
    for line in BufReader::new(stream).lines() {
        let answer = answer(server, &line?)?;
        stream.write_all(format!("{answer}\n").as_bytes())?;
    }
    Ok(())
}

fn answer(server: &Arc<Server>, line: &str) -> Result<String> {
    let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
    match verb {
        "count" => {
            let counter = server.counter.lock().unwrap_or_else(PoisonError::into_inner);
            let mut bytes = [0; 8];
            counter.read_exact_at(&mut bytes, 0)?;
            let count = u64::from_le_bytes(bytes) + 1;
            counter.write_all_at(&count.to_le_bytes(), 0)?;
            return Ok(format!("{} {count} {}", server.version, server.names));
        }
        "status" => {
            server.manager.say(&format!("STATUS={rest}"), &[])?;
            server.manager.barrier()?;
        }
        "store" => drop(server.manager.store(rest)?),
        "forget" => {
            server.manager.say(&format!("FDSTOREREMOVE=1\nFDNAME={rest}"), &[])?;
            server.manager.barrier()?;
        }
        "hang" => HANGS.store(true, Ordering::Relaxed),
        "flood" => {
            let server = Arc::clone(server);
            thread::spawn(move || {
                for round in 0_u64.. {
                    let text = if round % 2 == 0 { "no message at all" } else { "STATUS=flood" };
                    // Waits while nobody listens.
                    let _ = server.manager.say(text, &[]);
                }
            });
        }
        "die" => std::process::exit(1),
        _ => return Ok(format!("no such verb: {verb}")),
    }
    Ok("done".into())
}
