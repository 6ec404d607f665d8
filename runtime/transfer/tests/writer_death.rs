//! A writer is killed at random instants; what it left must be every acknowledged record, whole, and nothing invented.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use warmswap_transfer::channel::{ChannelError, ServiceChannel, SupervisorChannel};
use warmswap_transfer::log::LogConfig;
use warmswap_transfer::map::ResidentMap;
use warmswap_transfer::message::ToSupervisor;
use warmswap_transfer::state::{SegmentNotice, State};

const CHILD: &str = "WARMSWAP_TEST_WRITER_FD";
const KEYS: u64 = 64;

fn config() -> LogConfig {
    LogConfig { segment_len: 64 << 10, ..LogConfig::new(1) }
}

fn value(number: u64) -> Vec<u64> {
    vec![number; 1 + (number % 100) as usize]
}

/// The writer: insert, announce, commit, acknowledge, for ever.
fn write(channel: &ServiceChannel) {
    let mut map = ResidentMap::<Vec<u64>>::new(config()).unwrap();
    map.become_owner(None).unwrap();
    for number in 1.. {
        map.insert(&(number % KEYS).to_le_bytes(), &value(number)).unwrap();
        map.maintain().unwrap();
        while let Some(notice) = map.take_notice() {
            match notice {
                SegmentNotice::New(index) => {
                    if let Some(fd) = map.segment_fd(index) {
                        channel.send(&ToSupervisor::Segment { index }, &[fd]).unwrap();
                    }
                }
                SegmentNotice::Retired(index) => channel.send(&ToSupervisor::SegmentRetired { index }, &[]).unwrap(),
            }
        }
        map.commit();
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
        let mut follower = ResidentMap::<Vec<u64>>::new(config()).unwrap();
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
        let newest = follower.iter().map(|(_, value)| value[0].to_native()).max().unwrap();
        // The one record after the last acknowledgement may have been committed already.
        assert!((acknowledged..=acknowledged + 1).contains(&newest), "{acknowledged} acknowledged, {newest} found");
        for number in newest.saturating_sub(KEYS - 1).max(1)..=newest {
            let found = follower.get(&(number % KEYS).to_le_bytes()).unwrap();
            assert!(found.iter().eq(&value(number)), "record {number} after {acknowledged}");
        }
        // And the heir can write.
        follower.insert(b"heir", &vec![0]).unwrap();
        follower.commit();
    }
}
