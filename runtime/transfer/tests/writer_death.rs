//! A writer is killed at random instants; what it left must be every acknowledged record, whole, and nothing invented.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use warmswap_transfer::channel::{ChannelError, ServiceChannel, SupervisorChannel};
use warmswap_transfer::log::LogConfig;
use warmswap_transfer::message::ToSupervisor;
use warmswap_transfer::state::{SegmentNotice, State};
use warmswap_transfer::store::{Counters, Log, Map, Store};

const CHILD: &str = "WARMSWAP_TEST_WRITER_FD";
const KEYS: u64 = 64;

fn config() -> LogConfig {
    LogConfig { segment_len: 64 << 10, ..LogConfig::new(1) }
}

fn value(number: u64) -> Vec<u64> {
    vec![number; 1 + (number % 100) as usize]
}

/// Several collections that change together.
struct Held {
    store: Store,
    map: Map<Vec<u64>>,
    counters: Counters,
    log: Log<u64>,
}

impl Held {
    fn new() -> Self {
        let mut store = Store::new(config()).unwrap();
        let (map, counters) = (store.map("map").unwrap(), store.counters("counters").unwrap());
        let log = store.log("log").unwrap();
        Self { store, map, counters, log }
    }
}

/// The writer: change, announce, commit, acknowledge, for ever.
fn write(channel: &ServiceChannel) {
    let Held { mut store, map, counters, log } = Held::new();
    store.become_owner(None).unwrap();
    for number in 1.. {
        map.insert(&mut store, &(number % KEYS).to_le_bytes(), &value(number)).unwrap();
        counters.add(&mut store, b"written", 1).unwrap();
        log.append(&mut store, &number).unwrap();
        log.trim_before(&mut store, number.saturating_sub(KEYS)).unwrap();
        store.maintain().unwrap();
        while let Some(notice) = store.take_notice() {
            match notice {
                SegmentNotice::New(index) => {
                    if let Some(fd) = store.segment_fd(index) {
                        channel.send(&ToSupervisor::Segment { index }, &[fd]).unwrap();
                    }
                }
                SegmentNotice::Retired(index) => channel.send(&ToSupervisor::SegmentRetired { index }, &[]).unwrap(),
            }
        }
        store.commit();
        // Stands for the reply to the client.
        let acknowledged = ToSupervisor::CaughtUp { round: number, commit: None, connections: 0 };
        channel.send(&acknowledged, &[]).unwrap();
    }
}

#[test]
fn a_killed_writer_leaves_every_acknowledged_record() {
    if let Ok(fd) = std::env::var(CHILD) {
        // SAFETY: the parent passed this descriptor for this process to own.
        let fd = unsafe { OwnedFd::from_raw_fd(fd.parse().unwrap()) };
        write(&ServiceChannel::from_fd(fd).unwrap());
        return;
    }
    for round in 0..40_u64 {
        let (mut channel, theirs) = SupervisorChannel::pair().unwrap();
        let theirs = theirs.into_fd();
        let number = theirs.as_raw_fd();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "a_killed_writer_leaves_every_acknowledged_record"]).env(CHILD, number.to_string());
        command.stdout(std::process::Stdio::null());
        // SAFETY: only a call that is safe between fork and exec.
        unsafe {
            command.pre_exec(move || {
                libc::fcntl(number, libc::F_SETFD, 0);
                Ok(())
            });
        }
        let mut child = command.spawn().unwrap();
        drop(theirs);
        let Held { store: mut follower, map, counters, log } = Held::new();
        let mut acknowledged = 0;
        let mut killed = false;
        loop {
            match channel.recv_timeout(Duration::from_secs(10)) {
                Ok(Some((message, fds))) => match message {
                    ToSupervisor::Segment { index } => {
                        follower.add_segment(index, fds.into_iter().next().unwrap()).unwrap();
                    }
                    ToSupervisor::SegmentRetired { index } => follower.retire_segment(index).unwrap(),
                    ToSupervisor::CaughtUp { round: number, .. } => acknowledged = number,
                    other => panic!("{other:?}"),
                },
                Ok(None) => panic!("the writer says nothing"),
                Err(ChannelError::Closed) => break,
                Err(error) => panic!("{error}"),
            }
            if !killed && acknowledged > round * 37 {
                // The writer runs on meanwhile: the instant is not ours to choose.
                std::thread::sleep(Duration::from_micros(round * 13));
                child.kill().unwrap();
                killed = true;
            }
        }
        child.wait().unwrap();
        follower.become_owner(None).unwrap();
        let newest = map.iter(&follower).map(|(_, value)| value[0].to_native()).max().unwrap();
        // The changes after the last acknowledgement may have been committed already.
        assert!((acknowledged..=acknowledged + 1).contains(&newest), "{acknowledged} acknowledged, {newest} found");
        for number in newest.saturating_sub(KEYS - 1).max(1)..=newest {
            let found = map.get(&follower, &(number % KEYS).to_le_bytes()).unwrap();
            assert!(found.iter().eq(&value(number)), "record {number} after {acknowledged}");
        }
        // One commit shows all or nothing of them, unless a new segment was begun in between.
        let counted = counters.get(&follower, b"written") as u64;
        let (last, entry) = log.iter(&follower).next_back().unwrap();
        assert_eq!(entry.to_native(), last + 1);
        assert!((acknowledged..=newest).contains(&counted) && (acknowledged..=newest).contains(&(last + 1)));
        let kept = log.iter(&follower).count() as u64;
        assert!(kept >= KEYS.min(last + 1), "{kept} entries");
        // And the heir can write.
        map.insert(&mut follower, b"heir", &vec![0]).unwrap();
        assert_eq!(log.append(&mut follower, &0).unwrap(), last + 1);
        follower.commit();
    }
}
