//! The service of the test: remembers numbers, in the shared log, and says who it is. It runs from the test program itself,
//! which is packed into its images; what else an image does is in its file `/etc/behaviour`.
//!
//! One line a request: `PUT n` is answered `OK g`, `MISSING n` with the first number below `n` that is not there and `g`,
//! where `g` is the generation.

use std::collections::HashMap;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::time::Duration;

use warmswap_sdk::transfer::log::LogConfig;
use warmswap_sdk::transfer::segment::SEGMENT_LEN_MIN;
use warmswap_sdk::transfer::store::{Map, Store};
use warmswap_sdk::{Event, Service};

const SCHEMA: u32 = 1;
/// Longer than an owner is given to stop.
const SLOW: Duration = Duration::from_millis(800);
const LOOK_MAX: Duration = Duration::from_millis(20);

/// What an image is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Behaviour {
    Good,
    /// Takes longer to stop than it may.
    Slow,
    NeverReady,
    DiesJoining,
    /// Ends instead of saying that it serves.
    DiesOwning,
    /// Ends right after it said so.
    DiesServing,
}

impl Behaviour {
    pub(crate) const ALL: [Self; 6] =
        [Self::Good, Self::Slow, Self::NeverReady, Self::DiesJoining, Self::DiesOwning, Self::DiesServing];

    pub(crate) fn name(self) -> String {
        format!("{self:?}")
    }
}

type Error = Box<dyn std::error::Error>;

#[derive(Default)]
struct Connection {
    stream: Option<TcpStream>,
    input: Vec<u8>,
    output: Vec<u8>,
}

/// Runs until it is to end.
pub(crate) fn run() -> Result<(), Error> {
    // Containers of the back end `fake` have no process namespace, so this is not process 1.
    // SAFETY: the only other thread is the test harness's own, which waits for this one.
    unsafe { std::env::remove_var("LISTEN_PID") };
    let text = std::fs::read_to_string("/etc/behaviour")?;
    let found = Behaviour::ALL.into_iter().find(|behaviour| behaviour.name() == text);
    let behaviour = found.ok_or("an image of no behaviour")?;
    let config = LogConfig { segment_len: SEGMENT_LEN_MIN, ..LogConfig::new(SCHEMA) };
    let mut store = Store::new(config)?;
    let numbers = store.map::<u64>("numbers")?;
    let mut service = warmswap_sdk::join(store)?;
    match behaviour {
        Behaviour::DiesJoining => std::process::exit(3),
        Behaviour::NeverReady => {}
        _ => service.ready()?,
    }
    let mut connections: HashMap<u64, Connection> = HashMap::new();
    loop {
        while let Some(event) = service.poll()? {
            match event {
                Event::ConnectionArrived { cookie, fd, carry, .. } => {
                    let mut connection = Connection { stream: Some(TcpStream::from(fd)), ..Connection::default() };
                    connection.take_up(&carry);
                    connections.insert(cookie, connection);
                }
                Event::ConnectionCarry { cookie, carry } => {
                    if let Some(connection) = connections.get_mut(&cookie) {
                        connection.take_up(&carry);
                    }
                }
                Event::ConnectionClosed { cookie } => drop(connections.remove(&cookie)),
                Event::BecomeOwner { .. } => {
                    if behaviour == Behaviour::DiesOwning {
                        std::process::exit(4);
                    }
                    service.serving()?;
                    if behaviour == Behaviour::DiesServing {
                        std::process::exit(5);
                    }
                    let cookies: Vec<u64> = connections.keys().copied().collect();
                    cookies.iter().try_for_each(|cookie| answer(&mut service, numbers, &mut connections, *cookie))?;
                }
                Event::Quiesce { .. } => {
                    if behaviour == Behaviour::Slow {
                        std::thread::sleep(SLOW);
                    }
                    let carry = connections.iter_mut().map(|(cookie, connection)| (*cookie, connection.carry()));
                    let carry = carry.filter(|(_, carry)| carry.len() > 1).collect();
                    service.yielded(carry)?;
                }
                Event::Retire { .. } => {
                    service.drained()?;
                    return Ok(());
                }
                Event::ControlLost => {}
            }
        }
        let ready = wait(&service, &connections)?;
        if service.is_owner() {
            accept(&mut service, &mut connections)?;
            for cookie in ready {
                read(&mut service, numbers, &mut connections, cookie)?;
            }
        }
    }
}

impl Connection {
    /// Output, a byte that is in neither, input.
    fn carry(&mut self) -> Vec<u8> {
        [std::mem::take(&mut self.output), vec![0], std::mem::take(&mut self.input)].concat()
    }

    fn take_up(&mut self, carry: &[u8]) {
        if let Some(at) = carry.iter().position(|byte| *byte == 0) {
            self.output = carry[..at].to_vec();
            self.input = carry[at + 1..].to_vec();
        }
    }
}

/// The connections with something to read.
fn wait(service: &Service<Store>, connections: &HashMap<u64, Connection>) -> Result<Vec<u64>, Error> {
    use std::os::fd::AsFd as _;
    let entry = |fd: RawFd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut cookies = Vec::new();
    let mut polled = Vec::new();
    if service.is_owner() {
        for (cookie, connection) in connections {
            if let Some(stream) = &connection.stream {
                cookies.push(*cookie);
                polled.push(entry(stream.as_raw_fd()));
            }
        }
        polled.extend(service.listeners().iter().map(|listener| entry(listener.as_fd().as_raw_fd())));
    }
    polled.extend(service.control_fd().map(|fd| entry(fd.as_raw_fd())));
    let timeout = service.wake_within().unwrap_or(LOOK_MAX).min(LOOK_MAX).as_millis() as libc::c_int;
    // SAFETY: live entries, as many as stated.
    unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, timeout) };
    Ok(cookies.into_iter().zip(&polled).filter(|(_, entry)| entry.revents != 0).map(|(cookie, _)| cookie).collect())
}

fn accept(service: &mut Service<Store>, connections: &mut HashMap<u64, Connection>) -> Result<(), Error> {
    use std::os::fd::AsFd as _;
    loop {
        let Some(listener) = service.listeners().first().map(|listener| listener.as_fd().as_raw_fd()) else {
            return Ok(());
        };
        let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: no address is asked for.
        let fd = unsafe { libc::accept4(listener, std::ptr::null_mut(), std::ptr::null_mut(), flags) };
        if fd < 0 {
            return Ok(());
        }
        // SAFETY: just accepted, owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let cookie = service.connection_opened(fd.as_fd(), 0)?;
        connections.insert(cookie, Connection { stream: Some(TcpStream::from(fd)), ..Connection::default() });
    }
}

fn read(
    service: &mut Service<Store>,
    numbers: Map<u64>,
    connections: &mut HashMap<u64, Connection>,
    cookie: u64,
) -> Result<(), Error> {
    let Some(connection) = connections.get_mut(&cookie) else { return Ok(()) };
    let Some(stream) = connection.stream.as_mut() else { return Ok(()) };
    let mut buffer = [0; 4096];
    match stream.read(&mut buffer) {
        Ok(0) => {}
        Ok(got) => {
            connection.input.extend_from_slice(&buffer[..got]);
            return answer(service, numbers, connections, cookie);
        }
        Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
        Err(_) => {}
    }
    connections.remove(&cookie);
    service.connection_closed(cookie);
    Ok(())
}

/// Executes whole lines, publishes, and sends what was answered, if this process may.
fn answer(
    service: &mut Service<Store>,
    numbers: Map<u64>,
    connections: &mut HashMap<u64, Connection>,
    cookie: u64,
) -> Result<(), Error> {
    let Some(connection) = connections.get_mut(&cookie) else { return Ok(()) };
    let generation = service.generation();
    while let Some(end) = connection.input.iter().position(|byte| *byte == b'\n') {
        let line: Vec<u8> = connection.input.drain(..=end).collect();
        let line = String::from_utf8(line)?;
        let mut words = line.split_whitespace();
        let (verb, number) = (words.next(), words.next().and_then(|word| word.parse::<u64>().ok()));
        let reply = match (verb, number) {
            (Some("PUT"), Some(number)) => {
                numbers.insert(service.state_mut(), &number.to_le_bytes(), &number)?;
                format!("OK {generation}\n")
            }
            (Some("MISSING"), Some(below)) => {
                let missing = (0..below).find(|number| numbers.get(service.state(), &number.to_le_bytes()).is_none());
                format!("{} {generation}\n", missing.map_or_else(|| "none".to_owned(), |number| number.to_string()))
            }
            _ => format!("what? {generation}\n"),
        };
        connection.output.extend_from_slice(reply.as_bytes());
    }
    service.commit()?;
    let _ = service.state_mut().maintain();
    if !service.may_write() {
        return Ok(()); // it goes with the connection
    }
    if let Some(stream) = connection.stream.as_mut() {
        // Replies are short and there is one at a time: they fit, or the client has gone.
        let _ = stream.write_all(&connection.output);
        connection.output.clear();
    }
    Ok(())
}
