//! The load against a server that misbehaves once, in one way: the load must see exactly that, and nothing else.

// A test program: helpers outside #[test] functions may panic too.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use warmswap_load::resp::{Client, Reply, parse};
use warmswap_load::{FaultKind, Load, LoadConfig, LoadResult, Totals};

/// What the server does wrong, at its `AT`th write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// Executes and does not answer.
    DropAnswer,
    /// Executes, answers nothing, and resets the connection.
    ResetAfterExecution,
    /// Resets without having executed.
    ResetBeforeExecution,
    /// Closes orderly.
    Close,
    /// Increments twice.
    IncrementTwice,
    /// Acknowledges an increment and forgets it.
    ForgetIncrement,
    /// Acknowledges the last write of every value and forgets it.
    ForgetSets,
    /// Stops for everybody.
    Stall(Duration),
    /// Answers with an error.
    Error,
    /// Answers twice.
    AnswerTwice,
    /// Answers something that is no RESP.
    Garbage,
    /// Every value read has one byte changed, for one read.
    FlipByte,
}

const AT: u64 = 100;

struct Server {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Store {
    keys: HashMap<Vec<u8>, Vec<u8>>,
}

impl Server {
    fn start(fault: Fault) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let store = Arc::new(Mutex::new(Store::default()));
        let writes = Arc::new(AtomicU64::new(0));
        let stopping = Arc::clone(&stop);
        let accepting = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopping.load(Ordering::SeqCst) {
                    return;
                }
                let (store, writes) = (Arc::clone(&store), Arc::clone(&writes));
                // Ends when its client closes.
                std::thread::spawn(move || serve(stream.unwrap(), fault, &store, &writes));
            }
        });
        Self { address, stop, accepting: Some(accepting) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

fn reset(stream: &TcpStream) {
    let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
    setsockopt(stream, sockopt::Linger, &linger).unwrap();
}

fn serve(mut stream: TcpStream, fault: Fault, store: &Mutex<Store>, writes: &AtomicU64) {
    stream.set_nodelay(true).unwrap();
    let mut received = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        while let Ok(Some((Reply::Array(Some(command)), used))) = parse(&received) {
            received.drain(..used);
            let words: Vec<Vec<u8>> = command
                .into_iter()
                .map(|word| match word {
                    Reply::Bulk(Some(bytes)) => bytes,
                    other => panic!("{other:?}"),
                })
                .collect();
            let mut store = store.lock().unwrap();
            let increments = words[0] == b"INCR";
            let is_write = increments || words[0] == b"SET";
            // Faults that need a certain command wait for the next of that kind.
            let fits = match fault {
                Fault::None | Fault::ForgetSets => false,
                Fault::IncrementTwice | Fault::ForgetIncrement => increments,
                Fault::FlipByte => words[0] == b"GET" && words[1].windows(2).any(|w| w == b":v"),
                _ => is_write,
            };
            let counts = is_write || fault == Fault::FlipByte;
            let number = if counts { writes.fetch_add(1, Ordering::SeqCst) + 1 } else { 0 };
            let faulty = fits && number >= AT && writes.fetch_add(1 << 40, Ordering::SeqCst) < 1 << 40;
            if faulty && fault == Fault::ResetBeforeExecution {
                return reset(&stream);
            }
            let mut answer = match words[0].as_slice() {
                b"INCR" => {
                    let old = store.keys.get(&words[1]).map_or(0, |v| String::from_utf8_lossy(v).parse().unwrap());
                    let new: u64 = old + if faulty && fault == Fault::IncrementTwice { 2 } else { 1 };
                    if !(faulty && fault == Fault::ForgetIncrement) {
                        store.keys.insert(words[1].clone(), new.to_string().into_bytes());
                    }
                    format!(":{new}\r\n").into_bytes()
                }
                b"SET" => {
                    let forgotten = fault == Fault::ForgetSets && store.keys.contains_key(&words[1]);
                    if !forgotten {
                        store.keys.insert(words[1].clone(), words[2].clone());
                    }
                    b"+OK\r\n".to_vec()
                }
                b"GET" => match store.keys.get(&words[1]) {
                    Some(value) => {
                        let mut value = value.clone();
                        if faulty {
                            *value.last_mut().unwrap() ^= 0x20;
                        }
                        [format!("${}\r\n", value.len()).as_bytes(), &value, b"\r\n"].concat()
                    }
                    None => b"$-1\r\n".to_vec(),
                },
                b"DEL" => format!(":{}\r\n", u8::from(store.keys.remove(&words[1]).is_some())).into_bytes(),
                b"PING" => b"+PONG\r\n".to_vec(),
                _ => b"-ERR unknown command\r\n".to_vec(),
            };
            if faulty {
                match fault {
                    Fault::DropAnswer => continue,
                    Fault::ResetAfterExecution => return reset(&stream),
                    Fault::Close => return,
                    // With the lock held, so that nobody is served.
                    Fault::Stall(time) => std::thread::sleep(time),
                    Fault::Error => answer = b"-ERR broken on purpose\r\n".to_vec(),
                    Fault::AnswerTwice => answer.extend_from_within(..),
                    Fault::Garbage => answer = b"hello\r\n".to_vec(),
                    _ => {}
                }
            }
            drop(store);
            if stream.write_all(&answer).is_err() {
                return;
            }
        }
        match stream.read(&mut chunk) {
            Ok(count) if count > 0 => received.extend_from_slice(&chunk[..count]),
            _ => return,
        }
    }
}

fn config(address: SocketAddr) -> LoadConfig {
    LoadConfig {
        connections: 8,
        rate_per_s: 1000.0,
        // With one request on its way per connection, one fault hits one request.
        pipeline_max: 1,
        // Far above what a loaded machine adds.
        timeout: Duration::from_secs(1),
        read_share: 0.2,
        counters: 2,
        values: 2,
        ..LoadConfig::new(address)
    }
}

fn run_with(fault: Fault, change: impl FnOnce(&mut LoadConfig), time_ms: u64) -> LoadResult {
    let server = Server::start(fault);
    let mut config = config(server.address);
    change(&mut config);
    let load = Load::start(config).expect("the load starts");
    std::thread::sleep(Duration::from_millis(time_ms));
    load.stop().expect("the load ends")
}

fn run(fault: Fault) -> LoadResult {
    run_with(fault, |_| (), if fault == Fault::DropAnswer { 1600 } else { 800 })
}

/// The totals without what only says how much was done.
fn faults_of(result: &LoadResult) -> Totals {
    Totals {
        scheduled: 0,
        sent: 0,
        completed: 0,
        writes_acknowledged: 0,
        keys_verified: 0,
        newcomers: 0,
        ..result.totals
    }
}

fn expect(result: &LoadResult, totals: Totals, kinds: &[FaultKind], connections_kept: usize) {
    assert_eq!(faults_of(result), totals, "{:?}", result.faults);
    assert_eq!(result.faults.iter().map(|f| f.kind).collect::<Vec<_>>(), kinds, "{:?}", result.faults);
    assert_eq!(result.connections_kept, connections_kept);
    assert_eq!(result.totals.is_clean(), totals == Totals::default());
    assert_eq!(result.totals.keys_verified, 32);
    assert!(result.totals.completed > 500, "{:?}", result.totals);
}

#[test]
fn a_correct_server_is_clean() {
    let result = run(Fault::None);
    expect(&result, Totals::default(), &[], 8);
    assert_eq!(result.totals.scheduled, result.totals.completed);
    assert_eq!(result.latency.count(), result.totals.completed);
    assert!(result.totals.newcomers >= 10, "{:?}", result.totals);
    assert_eq!(result.newcomer_latency.count(), result.totals.newcomers);
    // Constant rate: what was due in 0.8 s, as far as this machine slept 0.8 s.
    let due = (result.ended_ns - result.started_ns) as f64 / 1e6;
    assert!((result.totals.scheduled as f64 - due).abs() <= 2.0, "{} due in {due} ms", result.totals.scheduled);
}

#[test]
fn a_correct_server_is_clean_with_pipelining_and_large_values() {
    let result = run_with(
        Fault::None,
        |config| {
            config.pipeline_max = 64;
            config.rate_per_s = 4000.0;
            config.connections = 2;
            config.value_bytes = 100_000;
            config.timeout = Duration::from_secs(20);
        },
        300,
    );
    assert!(result.totals.is_clean(), "{:?} {:?}", result.totals, result.faults);
    assert_eq!(result.connections_kept, 2);
}

#[test]
fn a_dropped_answer_is_a_timeout_and_an_uncertain_write() {
    let result = run(Fault::DropAnswer);
    let totals = Totals { failed_requests: 1, uncertain_writes: 1, reconnects: 1, ..Totals::default() };
    expect(&result, totals, &[FaultKind::Timeout], 7);
}

#[test]
fn a_reset_is_a_failure_whether_or_not_the_write_was_applied() {
    for fault in [Fault::ResetAfterExecution, Fault::ResetBeforeExecution] {
        let result = run(fault);
        let totals = Totals { failed_requests: 1, uncertain_writes: 1, resets: 1, reconnects: 1, ..Totals::default() };
        expect(&result, totals, &[FaultKind::Reset], 7);
    }
}

#[test]
fn a_closed_connection_is_a_failure() {
    let result = run(Fault::Close);
    let totals =
        Totals { failed_requests: 1, uncertain_writes: 1, closed_by_server: 1, reconnects: 1, ..Totals::default() };
    expect(&result, totals, &[FaultKind::Closed], 7);
}

#[test]
fn a_write_applied_twice_is_seen() {
    let totals = Totals { duplicated_writes: 1, ..Totals::default() };
    expect(&run(Fault::IncrementTwice), totals, &[FaultKind::DuplicatedWrite], 8);
}

#[test]
fn a_lost_increment_is_seen() {
    let totals = Totals { lost_writes: 1, ..Totals::default() };
    expect(&run(Fault::ForgetIncrement), totals, &[FaultKind::LostWrite], 8);
}

#[test]
fn lost_values_are_seen_in_the_final_read_even_when_nothing_was_read_before() {
    let result = run_with(Fault::ForgetSets, |config| (config.read_share, config.counters) = (0.0, 0), 400);
    // Two values on each of eight connections, each written more than once and each stuck at its first write.
    let totals = Totals { lost_writes: 16, ..Totals::default() };
    assert_eq!(faults_of(&result), totals, "{:?}", result.faults);
}

#[test]
fn a_corrupted_value_is_a_wrong_read() {
    let totals = Totals { wrong_reads: 1, ..Totals::default() };
    expect(&run_with(Fault::FlipByte, |_| (), 1000), totals, &[FaultKind::WrongRead], 8);
}

#[test]
fn an_error_reply_is_a_failed_request() {
    let totals = Totals { failed_requests: 1, uncertain_writes: 1, ..Totals::default() };
    expect(&run(Fault::Error), totals, &[FaultKind::ErrorReply], 8);
}

#[test]
fn an_answer_too_many_and_garbage_cost_the_connection() {
    for (fault, uncertain_writes) in [(Fault::AnswerTwice, 0), (Fault::Garbage, 1)] {
        let result = run(fault);
        let totals = Totals { failed_requests: 1, uncertain_writes, reconnects: 1, ..Totals::default() };
        expect(&result, totals, &[FaultKind::Protocol], 7);
    }
}

#[test]
fn a_stall_shows_in_every_request_that_was_due_in_it() {
    let stall = Duration::from_millis(150);
    let result = run(Fault::Stall(stall));
    expect(&result, Totals::default(), &[], 8);
    let gap = result.longest_gap(result.started_ns, result.ended_ns);
    assert!((140..400).contains(&(gap.longest_ns / 1_000_000)), "{gap:?}");
    assert!(gap.excess_ns() > 130_000_000, "{gap:?}");
    // A closed loop of 8 connections would see 8 slow requests. At 1,000 a second, 150 were due during the stall, and
    // the 75 due in its first half waited for at least 75 ms.
    let slow: u64 = result.latency.buckets.iter().filter(|(ns, _)| *ns >= 75_000_000).map(|(_, n)| n).sum();
    assert!(slow >= 65, "{slow} requests show the stall");
    let window = result.window(gap.start_ns, gap.start_ns + gap.longest_ns);
    assert!(window.p50_us.unwrap() > 50_000.0, "{window:?}");
}

#[test]
fn a_server_that_goes_away_is_reported_and_the_run_ends() {
    let server = Server::start(Fault::None);
    let load = Load::start(config(server.address)).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let before = load.snapshot();
    assert!(before.totals.completed > 0 && before.connections_open == 8 && before.p99_us.is_some(), "{before:?}");
    drop(load);

    let refused = { TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap() };
    let error = Load::start(config(refused)).expect_err("nobody listens");
    assert!(error.to_string().contains("load:*"), "{error}");
    let error = Load::start(LoadConfig { rate_per_s: 0.0, ..config(refused) }).expect_err("no rate");
    assert!(error.to_string().contains("rate_per_s"), "{error}");
}

#[test]
fn a_listener_that_is_closed_for_a_moment_is_seen_by_those_who_arrive_then() {
    let mut server = Server::start(Fault::None);
    let load = Load::start(LoadConfig { new_connections_per_s: 100.0, ..config(server.address) }).unwrap();
    let wait_for = |seen: &dyn Fn(&Totals) -> bool| {
        let begun = Instant::now();
        while !seen(&load.snapshot().totals) {
            assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", load.snapshot());
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    wait_for(&|totals| totals.newcomers > 5);
    // The accepting thread ends and takes the listener with it; connections that are open go on.
    server.stop.store(true, Ordering::SeqCst);
    server.accepting.take().unwrap().join().unwrap();
    wait_for(&|totals| totals.failed_requests > 5);
    let result = load.stop().unwrap();
    let failed = result.totals.failed_requests;
    assert!(result.faults.iter().all(|f| f.kind == FaultKind::Newcomer), "{:?}", result.faults);
    assert_eq!(faults_of(&result), Totals { failed_requests: failed, ..Totals::default() });
    assert_eq!(result.connections_kept, 8);
    assert!(!result.totals.is_clean());
}

#[test]
fn marks_and_windows_share_one_clock() {
    let server = Server::start(Fault::None);
    let load = Load::start(config(server.address)).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let from = load.mark("begin");
    std::thread::sleep(Duration::from_millis(200));
    let to = load.mark("end");
    let result = load.stop().unwrap();
    assert_eq!((result.mark("begin"), result.mark("end")), (Some(from), Some(to)));
    let window = result.window(from, to);
    let due = (to - from) as f64 / 1e6;
    assert!((window.requests as f64 - due).abs() <= 21.0, "{window:?} of {due}");
    let mut client = Client::connect(server.address, Duration::from_secs(1)).unwrap();
    assert!(matches!(client.command(&["GET", "load:0:c0"]).unwrap(), Reply::Bulk(Some(_))));
}
