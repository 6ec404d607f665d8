//! The examples in C and Python, handed over between real processes, without containers: each to itself and to the other.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

#[path = "../../../../examples/session-store/tests/mini/mod.rs"]
mod mini;
mod support;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use mini::{Client, Mini};
use support::{Sdk, package, said};

/// Programs to start: the example in C, then the one in Python.
fn programs(sdk: &Sdk) -> [String; 2] {
    let examples = package().join("../../../examples");
    let mut make = Command::new("make");
    make.arg("-C").arg(sdk.path(""));
    fs::copy(examples.join("c-counter/counter.c"), sdk.path("counter.c")).unwrap();
    fs::copy(examples.join("c-counter/Makefile"), sdk.path("Makefile")).unwrap();
    make.arg(format!("LDFLAGS=-Wl,-rpath,{}", sdk.path("lib").display()));
    make.env("PKG_CONFIG_PATH", sdk.path("lib/pkgconfig")).env_remove("MAKEFLAGS").env_remove("CFLAGS");
    said(&mut make);

    let python = sdk.path("python");
    let script = format!(
        "#!/bin/sh\nPYTHONPATH={} WARMSWAP_LIBRARY={} PYTHONDONTWRITEBYTECODE=1 exec /usr/bin/python3 {}\n",
        sdk.path("share/warmswap/python").display(),
        sdk.path("lib/libwarmswap.so.0").display(),
        examples.join("python/counter.py").display()
    );
    fs::write(&python, script).unwrap();
    fs::set_permissions(&python, fs::Permissions::from_mode(0o755)).unwrap();
    [sdk.path("counter"), python].map(|path| path.into_os_string().into_string().unwrap())
}

/// With every pair of programs.
fn in_every_language(test: impl Fn(&str, &str)) {
    let sdk = Sdk::install();
    let programs = programs(&sdk);
    for first in &programs {
        for second in &programs {
            test(first, second);
        }
    }
}

#[test]
fn state_and_connections_survive_a_handover_an_abort_and_the_way_back() {
    in_every_language(|first, second| {
        let mut mini = Mini::start(first);
        let (mut client, mut idle) = (Client::new(mini.address()), Client::new(mini.address()));
        assert_eq!(client.ask("INCR a"), "1");
        assert_eq!(idle.ask("INCR b"), "1");
        mini.add_follower(second);
        assert_eq!(client.ask("INCR a"), "2");
        for round in 0..4 {
            mini.catch_up();
            // Half a request stays in the process that yields.
            client.send(b"INCR ");
            std::thread::sleep(Duration::from_millis(50));
            if round == 1 {
                mini.abort();
            }
            mini.switch(|| ());
            let mut late = Client::new(mini.address());
            client.send(b"a\r\n");
            assert_eq!(client.line(), (round + 3).to_string());
            assert_eq!(late.ask("GET a"), (round + 3).to_string());
            assert_eq!(idle.ask("GET b"), "1");
        }
        assert!(idle.ask("INFO").contains("counters 2"));
        mini.retire_follower();
        assert_eq!(client.ask("INCR a"), "7");
        assert_eq!(mini.failures, [""; 0]);
    });
}

#[test]
fn what_a_client_has_not_read_yet_arrives_whole_and_in_order() {
    const COUNT: u64 = 600_000;
    in_every_language(|first, second| {
        let mut mini = Mini::start(first);
        let mut greedy = TcpStream::connect(mini.address()).unwrap();
        let mut writer = greedy.try_clone().unwrap();
        mini.add_follower(second);
        // More than the sockets take in both directions, and than a process holds back.
        let writer = std::thread::spawn(move || {
            writer.write_all(&b"INCR n\n".repeat(COUNT as usize)).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        std::thread::sleep(Duration::from_millis(300));
        for round in 0..3 {
            mini.catch_up();
            if round == 1 {
                mini.abort();
            }
            mini.switch(|| ());
        }
        // It would have to be told that the connection has ended.
        mini.retire_follower();
        greedy.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut text = String::new();
        greedy.read_to_string(&mut text).unwrap();
        writer.join().unwrap();
        let wrong = text.lines().zip(1..).find(|(line, number)| line.parse() != Ok(*number));
        assert_eq!((text.lines().count() as u64, wrong), (COUNT, None), "{first} to {second}");
        assert_eq!(mini.failures, [""; 0]);
    });
}

#[test]
fn a_connection_that_ends_in_the_owner_ends_for_its_client() {
    in_every_language(|first, second| {
        let mut mini = Mini::start(first);
        let mut client = Client::new(mini.address());
        assert_eq!(client.ask("INCR a"), "1");
        mini.add_follower(second);
        let mut leaving = TcpStream::connect(mini.address()).unwrap();
        leaving.write_all(b"GET a\n").unwrap();
        let mut answer = [0; 2];
        leaving.read_exact(&mut answer).unwrap();
        mini.catch_up();
        leaving.shutdown(Shutdown::Write).unwrap();
        leaving.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        // It would hang for ever if the follower kept its duplicate.
        let begin = Instant::now();
        while leaving.read(&mut answer).map_err(|error| error.kind()) != Ok(0) {
            assert!(begin.elapsed() < Duration::from_secs(20), "{first} to {second}");
            mini.catch_up();
        }
        mini.switch(|| ());
        assert_eq!(client.ask("INCR a"), "2");
        assert_eq!(mini.failures, [""; 0]);
    });
}

#[test]
fn a_killed_owner_takes_no_acknowledged_write_with_it() {
    in_every_language(|first, second| {
        let mut mini = Mini::start(first);
        let mut client = Client::new(mini.address());
        mini.add_follower(second);
        for value in 1..=500 {
            assert_eq!(client.ask("INCR a"), value.to_string());
        }
        mini.kill_owner();
        assert!(client.is_closed(), "nobody knows what the dead owner had read");
        assert_eq!(Client::new(mini.address()).ask("INCR a"), "501");
        assert_eq!(mini.failures, [""; 0]);
    });
}
