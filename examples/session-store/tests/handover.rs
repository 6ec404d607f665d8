//! The store handed over between real processes, with the real clients of the protocol.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod mini;

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mini::{Client, Mini};

const V1: &str = env!("CARGO_BIN_EXE_session-store-v1");
const V2: &str = env!("CARGO_BIN_EXE_session-store-v2");
const V4: &str = env!("CARGO_BIN_EXE_session-store-v4");
const V5: &str = env!("CARGO_BIN_EXE_session-store-v5");

#[test]
fn state_and_connections_survive_an_update_and_its_rollback() {
    let mut mini = Mini::start(V1);
    let mut client = Client::new(mini.address());
    let mut idle = Client::new(mini.address());
    assert_eq!(client.ask("SET a one"), "+OK");
    assert_eq!(client.ask("SET b gone EX 100"), "+OK");
    mini.add_follower(V2);
    assert_eq!(client.ask("INCR n"), ":1");
    assert_eq!(client.ask("GETDEL a"), "-ERR unknown command 'GETDEL', with args beginning with: 'a'");
    mini.switch(|| ());
    assert_eq!(client.ask("INCR n"), ":2");
    assert_eq!(client.ask("GET a"), "one");
    assert_eq!(client.ask("GETDEL a"), "one");
    let ttl: i64 = client.ask("TTL b")[1..].parse().unwrap();
    assert!((90..=100).contains(&ttl), "{ttl}");
    assert_eq!(client.ask("SET c two"), "+OK");
    assert_eq!(client.ask("OBJECT IDLETIME c"), ":0");
    let mut late = Client::new(mini.address());
    assert_eq!(late.ask("PING"), "+PONG");
    // Back to version 1, with what was written since.
    mini.catch_up();
    mini.switch(|| ());
    assert_eq!(client.ask("GET c"), "two");
    assert_eq!(client.ask("GET a"), "$-1");
    assert_eq!(client.ask("INCR n"), ":3");
    assert_eq!(client.ask("EXPIRE c 50"), ":1");
    assert_eq!(idle.ask("DBSIZE"), ":3");
    assert_eq!(late.ask("GET n"), "3");
    // And forward again: the tail that version 1 does not know is still there.
    mini.catch_up();
    mini.switch(|| ());
    assert_eq!(late.ask("GET c"), "two");
    assert!(idle.ask("INFO").contains("session_store_version:2.0.0"));
    mini.retire_follower();
    assert_eq!(client.ask("INCR n"), ":4");
    assert_eq!(mini.failures, [""; 0]);
}

#[test]
fn a_change_of_schema_carries_the_state_and_its_rollback_what_was_written_since() {
    let mut mini = Mini::start(V2);
    let mut client = Client::new(mini.address());
    for n in 0..1000 {
        assert_eq!(client.ask(&format!("SET kept:{n} {n}")), "+OK");
    }
    assert_eq!(client.ask("SET short one EX 100"), "+OK");
    for round in 1..=3 {
        match round {
            1 => mini.add_follower(V4),
            _ => mini.catch_up(),
        }
        mini.switch(|| ());
        assert!(client.ask("INFO").contains("session_store_version:4.0.0"));
        assert_eq!(client.ask("GET kept:999"), "999");
        assert_eq!(client.ask("OBJECT IDLETIME kept:1"), ":0");
        assert_eq!(client.ask("INCR n"), format!(":{}", 2 * round - 1));
        assert_eq!(client.ask("EXPIRE short 50"), ":1");
        assert_eq!(client.ask("DEL kept:0"), if round == 1 { ":1" } else { ":0" });
        // Back to version 2, in schema 1.
        mini.catch_up();
        mini.switch(|| ());
        assert!(client.ask("INFO").contains("session_store_version:2.0.0"));
        assert_eq!(client.ask("INCR n"), format!(":{}", 2 * round));
        let ttl: i64 = client.ask("TTL short")[1..].parse().unwrap();
        assert!((45..=50).contains(&ttl), "{ttl}");
        assert_eq!(client.ask("EXISTS kept:0 kept:1"), ":1");
        assert_eq!(client.ask("EXPIRE short 100"), ":1");
    }
    // For good: the old schema is not needed any more.
    mini.catch_up();
    mini.switch(|| ());
    mini.retire_follower();
    mini.unfollow();
    assert_eq!(mini.schemas(), [2]);
    mini.add_follower(V5);
    mini.switch(|| ());
    assert!(client.ask("INFO").contains("session_store_version:5.0.0"));
    assert_eq!(client.ask("GET n"), "6");
    assert_eq!(client.ask("DBSIZE"), ":1001");
    assert_eq!(mini.failures, [""; 0]);
}

#[test]
fn half_a_request_and_half_a_reply_move_with_their_connection() {
    let mut mini = Mini::start(V1);
    let mut partial = Client::new(mini.address());
    let mut greedy = Client::new(mini.address());
    let value = "x".repeat(500_000);
    assert_eq!(partial.ask("PING"), "+PONG");
    greedy.send(format!("*3\r\n$3\r\nSET\r\n$3\r\nbig\r\n$500000\r\n{value}\r\n").as_bytes());
    assert_eq!(greedy.reply(), "+OK");
    mini.add_follower(V2);
    // More replies than the socket buffers take (they are not read), and a request without its end.
    greedy.send(&b"GET big\r\n".repeat(40));
    partial.send(b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$200000\r\n");
    partial.send(&vec![b'y'; 150_000]);
    std::thread::sleep(Duration::from_millis(200));
    for round in 0..5 {
        mini.catch_up();
        if round % 2 == 0 {
            mini.abort();
        }
        mini.switch(|| ());
    }
    partial.send(&vec![b'y'; 50_000]);
    partial.send(b"\r\nGET k\r\n");
    assert_eq!(partial.reply(), "+OK");
    assert_eq!(partial.reply(), "y".repeat(200_000));
    for at in 0..40 {
        assert!(greedy.reply() == value, "reply {at} of 40");
        if at == 20 {
            mini.catch_up();
            mini.switch(|| ());
        }
    }
    assert_eq!(mini.failures, [""; 0]);
}

#[test]
fn a_connection_that_ends_in_the_owner_ends_for_its_client_while_a_follower_holds_it() {
    let mut mini = Mini::start(V1);
    let mut client = Client::new(mini.address());
    assert_eq!(client.ask("PING"), "+PONG");
    mini.add_follower(V1);
    assert_eq!(mini.connections.len(), 1);
    assert_eq!(client.ask("QUIT"), "+OK");
    mini.catch_up();
    assert!(client.is_closed());
    assert_eq!(mini.connections.len(), 0);
}

#[test]
fn a_killed_owner_loses_no_acknowledged_write() {
    let mut mini = Mini::start(V1);
    for round in 0..5 {
        mini.add_follower(V1);
        let mut idle = Client::new(mini.address());
        assert_eq!(idle.ask("PING"), "+PONG");
        let address = mini.address();
        let stop = AtomicBool::new(false);
        let (writer, acknowledged) = std::thread::scope(|scope| {
            let stop = &stop;
            let writer = scope.spawn(move || {
                use std::io::{Read, Write};
                let mut stream = std::net::TcpStream::connect(address).unwrap();
                let mut acknowledged = 0_u64;
                let mut reply = [0; 5];
                while !stop.load(Ordering::Relaxed) {
                    let sent = stream.write_all(format!("SET {round}-{acknowledged} {acknowledged}\r\n").as_bytes());
                    if sent.is_err() || stream.read_exact(&mut reply).is_err() || &reply != b"+OK\r\n" {
                        break;
                    }
                    acknowledged += 1;
                }
                (stream, acknowledged)
            });
            std::thread::sleep(Duration::from_millis(40 + round * 17));
            mini.kill_owner();
            stop.store(true, Ordering::Relaxed);
            writer.join().unwrap()
        });
        drop(writer);
        // Nobody knows what the dead owner had read from it: an end is better than an answer that never comes.
        assert!(idle.is_closed());
        assert!(acknowledged > 0, "nothing was written in round {round}");
        let mut client = Client::new(mini.address());
        for at in 0..acknowledged {
            assert_eq!(client.ask(&format!("GET {round}-{at}")), at.to_string());
        }
    }
}

#[test]
fn redis_benchmark_sees_no_error_over_twenty_switches() {
    if Command::new("redis-benchmark").arg("--help").output().is_err() {
        println!("LEFT OUT: redis_benchmark_sees_no_error_over_twenty_switches: redis-benchmark is not installed");
        return;
    }
    let mut mini = Mini::start(V1);
    let port = mini.address().port().to_string();
    let mut counter = Client::new(mini.address());
    mini.add_follower(V2);
    let benchmark = Command::new("redis-benchmark")
        .args(["-p", &port, "-t", "set,get,incr", "-n", "60000", "-c", "50", "-r", "1000", "-d", "100", "--csv"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    for round in 1..=20 {
        std::thread::sleep(Duration::from_millis(50));
        mini.catch_up();
        mini.switch(|| ());
        assert_eq!(counter.ask("INCR switches"), format!(":{round}"));
    }
    // What the benchmark still opens and closes has to be passed on until it is done.
    let done = std::thread::spawn(move || benchmark.wait_with_output().unwrap());
    while !done.is_finished() {
        mini.drain_owner();
        std::thread::sleep(Duration::from_millis(1));
    }
    let output = done.join().unwrap();
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}\n{errors}");
    assert!(!errors.to_lowercase().contains("error") && !text.to_lowercase().contains("error"), "{text}\n{errors}");
    for test in ["SET", "GET", "INCR"] {
        assert!(text.contains(&format!("\"{test}\"")), "{text}");
    }
    let cli = Command::new("redis-cli").args(["-p", &port, "GET", "switches"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&cli.stdout).trim(), "20");
    assert_eq!(mini.failures, [""; 0]);
}
