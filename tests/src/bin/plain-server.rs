//! A server that has never heard of warmswap: it takes its listener from `LISTEN_FDS`, answers every line with the text of
//! [`VERSION`], and on SIGTERM accepts nobody any more, finishes with those it has, and ends.

use std::fs;
use std::io::{self, BufRead as _, BufReader, ErrorKind, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::FromRawFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use warmswap_tests::PLAIN_SERVER_VERSION as VERSION;

const STEP: Duration = Duration::from_millis(1);

static TOLD_TO_END: AtomicBool = AtomicBool::new(false);

extern "C" fn end(_signal: libc::c_int) {
    TOLD_TO_END.store(true, Ordering::Relaxed);
}

fn main() -> Result<()> {
    // SAFETY: the handler does nothing but store to an atomic.
    unsafe { libc::signal(libc::SIGTERM, end as *const () as libc::sighandler_t) };
    let answer = fs::read_to_string(VERSION).with_context(|| format!("cannot read {VERSION}"))?;
    let passed = std::env::var("LISTEN_FDS").unwrap_or_default();
    ensure!(passed == "1", "LISTEN_FDS={passed:?}, not one listener");
    // SAFETY: passed to this process by the convention of `LISTEN_FDS`, and taken once.
    let listener = unsafe { TcpListener::from_raw_fd(3) };
    // Others accept from it too: whoever comes second must not wait.
    listener.set_nonblocking(true).context("cannot make the listener non-blocking")?;
    // Ends when every client has gone.
    thread::scope(|clients| {
        while !TOLD_TO_END.load(Ordering::Relaxed) {
            match listener.accept() {
                Ok((stream, _)) => {
                    let answer = &answer;
                    clients.spawn(move || serve(&stream, answer));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(STEP),
                Err(error) => return Err(error).context("cannot accept"),
            }
        }
        Ok(())
    })
}

fn serve(mut stream: &TcpStream, answer: &str) {
    let mut answered = || -> io::Result<()> {
        for line in BufReader::new(stream).lines() {
            line?;
            stream.write_all(answer.as_bytes())?;
        }
        Ok(())
    };
    if let Err(error) = answered() {
        eprintln!("a client: {error}");
    }
}
