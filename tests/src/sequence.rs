//! Clients that number their requests, send them at a constant rate and count how often each was answered.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

/// The longest that an answer is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long it is looked for answers too many.
const AFTERMATH: Duration = Duration::from_millis(300);

/// What became of the requests of one client.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    pub sent: u64,
    /// Sent and never answered.
    pub lost: u64,
    /// Answers to what had been answered before.
    pub repeated: u64,
    /// How many answers each generation gave.
    pub by: BTreeMap<String, u64>,
}

impl Tally {
    /// # Errors
    /// Unless every request was answered exactly once, by this many generations, each of which answered something.
    pub fn exactly_once(&self, generations: usize) -> Result<()> {
        ensure!(self.lost == 0 && self.repeated == 0, "not every request was answered once: {self:?}");
        ensure!(self.sent > 0 && self.by.values().sum::<u64>() == self.sent, "answers do not add up: {self:?}");
        ensure!(self.by.len() == generations, "{} generations answered, not {generations}: {self:?}", self.by.len());
        Ok(())
    }

    /// `gN NUMBER`.
    fn count(&mut self, answer: &str) -> Result<u64> {
        let (generation, number) = answer.trim().split_once(' ').with_context(|| format!("{answer:?} is no answer"))?;
        *self.by.entry(generation.to_owned()).or_default() += 1;
        number.parse().with_context(|| format!("{answer:?} is no answer"))
    }
}

/// A connection, whatever it runs over.
pub trait Stream: Read + Write + Send {
    /// # Errors
    /// As the system call.
    fn patience(&self, time: Duration) -> io::Result<()>;
}

impl Stream for TcpStream {
    fn patience(&self, time: Duration) -> io::Result<()> {
        self.set_nodelay(true)?;
        self.set_read_timeout(Some(time))
    }
}

impl<S: Stream + ?Sized> Stream for Box<S> {
    fn patience(&self, time: Duration) -> io::Result<()> {
        (**self).patience(time)
    }
}

impl Stream for UnixStream {
    fn patience(&self, time: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(time))
    }
}

/// Numbered lines over one connection, until `done`.
///
/// # Errors
/// When the connection breaks, or an answer is not the one that is due.
pub fn lines(stream: impl Stream, every: Duration, done: &AtomicBool) -> Result<Tally> {
    stream.patience(PATIENCE)?;
    let mut stream = BufReader::new(stream);
    let mut tally = Tally::default();
    let began = Instant::now();
    while !done.load(Ordering::Acquire) {
        thread::sleep((began + every.mul_f64(tally.sent as f64)).saturating_duration_since(Instant::now()));
        let number = tally.sent;
        // In two parts, so that a handover finds half a request as often as not.
        stream.get_mut().write_all(number.to_string().as_bytes())?;
        thread::sleep(every / 4);
        stream.get_mut().write_all(b"\n")?;
        tally.sent += 1;
        let mut answer = String::new();
        ensure!(stream.read_line(&mut answer)? > 0, "the connection ended before the answer to {number}");
        ensure!(tally.count(&answer)? == number, "{number} was answered with {answer:?}");
    }
    Ok(tally)
}

/// A datagram socket that is connected to the service.
pub trait Datagrams: Sync {
    /// # Errors
    /// As the system call.
    fn patience(&self, time: Duration) -> io::Result<()>;
    /// # Errors
    /// As the system call.
    fn put(&self, text: &[u8]) -> io::Result<usize>;
    /// # Errors
    /// As the system call.
    fn get(&self, text: &mut [u8]) -> io::Result<usize>;
}

impl Datagrams for UdpSocket {
    fn patience(&self, time: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(time))
    }

    fn put(&self, text: &[u8]) -> io::Result<usize> {
        self.send(text)
    }

    fn get(&self, text: &mut [u8]) -> io::Result<usize> {
        self.recv(text)
    }
}

impl Datagrams for UnixDatagram {
    fn patience(&self, time: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(time))
    }

    fn put(&self, text: &[u8]) -> io::Result<usize> {
        self.send(text)
    }

    fn get(&self, text: &mut [u8]) -> io::Result<usize> {
        self.recv(text)
    }
}

/// A unix datagram socket that a service in a container can answer: its name is not a path, which would mean something
/// else in there.
///
/// # Errors
/// As the system calls.
pub fn unix_datagram_to(path: &Path) -> io::Result<UnixDatagram> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let name = format!("client-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(name)?)?;
    socket.connect(path)?;
    Ok(socket)
}

/// Numbered datagrams at a constant rate whether answers come or not, until `done`.
///
/// # Errors
/// When one cannot be sent or an answer is none. Lost and repeated ones are counted.
pub fn datagrams(socket: &impl Datagrams, every: Duration, done: &AtomicBool) -> Result<Tally> {
    socket.patience(AFTERMATH)?;
    let sent = AtomicU64::new(0);
    let sending = AtomicBool::new(true);
    thread::scope(|scope| {
        let receiver = scope.spawn(|| -> Result<Tally> {
            let mut tally = Tally::default();
            let mut answers: BTreeMap<u64, u64> = BTreeMap::new();
            let mut text = [0; 256];
            let mut sent_all = None;
            loop {
                match socket.get(&mut text) {
                    Ok(length) => {
                        *answers.entry(tally.count(&String::from_utf8_lossy(&text[..length]))?).or_default() += 1;
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        let (total, over) = (sent.load(Ordering::Acquire), !sending.load(Ordering::Acquire));
                        let since = *sent_all.get_or_insert_with(Instant::now);
                        if !over {
                            sent_all = None;
                        } else if answers.len() as u64 >= total || since.elapsed() > PATIENCE {
                            tally.sent = total;
                            tally.lost = total.saturating_sub(answers.len() as u64);
                            tally.repeated = answers.values().map(|count| count - 1).sum();
                            return Ok(tally);
                        }
                    }
                    Err(error) => return Err(error).context("cannot receive"),
                }
            }
        });
        let began = Instant::now();
        let send = || -> Result<()> {
            for number in 0_u64.. {
                if done.load(Ordering::Acquire) {
                    break;
                }
                thread::sleep((began + every.mul_f64(number as f64)).saturating_duration_since(Instant::now()));
                socket.put(number.to_string().as_bytes()).with_context(|| format!("cannot send {number}"))?;
                sent.store(number + 1, Ordering::Release);
            }
            Ok(())
        };
        let result = send();
        sending.store(false, Ordering::Release);
        let tally = receiver.join();
        result?;
        tally.unwrap_or_else(|_| bail!("the receiving thread panicked"))
    })
}

/// Connects anew for every request, at a constant rate, until `done`; how many were answered.
///
/// # Errors
/// When one is refused, reset or not answered.
pub fn newcomers<S: Stream>(
    connect: impl Fn() -> io::Result<S>,
    request: &[u8],
    is_answer: impl Fn(&str) -> bool,
    every: Duration,
    done: &AtomicBool,
) -> Result<u64> {
    let began = Instant::now();
    for number in 0_u64.. {
        if done.load(Ordering::Acquire) {
            return Ok(number);
        }
        thread::sleep((began + every.mul_f64(number as f64)).saturating_duration_since(Instant::now()));
        let mut stream = connect().with_context(|| format!("client {number} cannot connect"))?;
        stream.patience(PATIENCE)?;
        stream.write_all(request).with_context(|| format!("client {number} cannot ask"))?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).with_context(|| format!("client {number} is not answered"))?;
        ensure!(is_answer(&answer), "client {number} was answered with {answer:?}");
    }
    Ok(0)
}
