//! The load against the real `redis-server`, which is right by definition.

// A test program: helpers outside #[test] functions may panic too.
#![allow(clippy::unwrap_used)]

use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use warmswap_load::resp::{Client, Reply};
use warmswap_load::{Load, LoadConfig};

struct Redis {
    child: Child,
    address: SocketAddr,
}

impl Redis {
    /// `None` when the program is not installed.
    fn start() -> Option<Self> {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--port"]);
        let child = command.arg(address.port().to_string()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let redis = Self { child: child.ok()?, address };
        let begun = Instant::now();
        while Client::connect(address, Duration::from_secs(1)).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(10), "redis-server does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(redis)
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn redis_is_clean_under_load_and_keeps_what_was_written() {
    let Some(redis) = Redis::start() else {
        println!("LEFT OUT: redis_is_clean_under_load_and_keeps_what_was_written: redis-server is not installed");
        return;
    };
    let config = LoadConfig { connections: 200, rate_per_s: 5000.0, ..LoadConfig::new(redis.address) };
    let load = Load::start(config.clone()).unwrap();
    std::thread::sleep(Duration::from_secs(2));
    let result = load.stop().unwrap();
    assert!(result.totals.is_clean(), "{:?} {:?}", result.totals, result.faults);
    assert_eq!(result.connections_kept, 200);
    assert_eq!(result.totals.keys_verified, 200 * 8);
    assert_eq!(result.totals.completed, result.totals.scheduled);
    assert!(result.totals.completed > 9000, "{:?}", result.totals);
    assert!(!result.series(100_000_000).is_empty());

    // An independent client reads what the load says it wrote: increments acknowledged over all counters.
    let mut client = Client::connect(redis.address, Duration::from_secs(2)).unwrap();
    let keys: Vec<[String; 2]> = (0..200)
        .flat_map(|connection| (0..4).map(move |key| ["GET".into(), format!("load:{connection}:c{key}")]))
        .collect();
    let sum: u64 = client
        .pipeline(&keys)
        .unwrap()
        .into_iter()
        .map(|reply| match reply {
            Reply::Bulk(Some(bytes)) => String::from_utf8(bytes).unwrap().parse::<u64>().unwrap(),
            _ => 0,
        })
        .sum();
    let share = sum as f64 / result.totals.writes_acknowledged as f64;
    assert!((0.4..0.6).contains(&share), "half of the writes are increments, found {share}");

    // A second run begins from nothing although the keys exist.
    let again = Load::start(LoadConfig { seed: 2, ..config }).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(again.stop().unwrap().totals.is_clean());
}

#[test]
fn a_killed_redis_is_failures_and_unverified_keys() {
    let Some(mut redis) = Redis::start() else {
        println!("LEFT OUT: a_killed_redis_is_failures_and_unverified_keys: redis-server is not installed");
        return;
    };
    let mut config = LoadConfig { connections: 10, rate_per_s: 1000.0, ..LoadConfig::new(redis.address) };
    config.timeout = Duration::from_millis(300);
    config.new_connections_per_s = 0.0;
    let load = Load::start(config).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    redis.child.kill().unwrap();
    redis.child.wait().unwrap();
    std::thread::sleep(Duration::from_millis(700));
    assert_eq!(load.snapshot().connections_open, 0);
    let result = load.stop().unwrap();
    // While a process dies, its descriptors close one after the other: some clients come back to a listener that is
    // about to go, and are thrown out again.
    let lost = 10 + result.totals.reconnects;
    assert_eq!(result.totals.resets + result.totals.closed_by_server, lost, "{:?}", result.totals);
    // Every request was answered or failed, and each lost connection counts once when it ended idle.
    let accounted = result.totals.completed + result.totals.failed_requests;
    assert!((result.totals.scheduled..=result.totals.scheduled + lost).contains(&accounted), "{:?}", result.totals);
    assert_eq!((result.totals.keys_verified, result.totals.keys_unverified), (0, 80));
    assert_eq!((result.connections_kept, result.totals.lost_writes), (0, 0));
}
