//! What the SDK says and does, message by message, against a supervisor played by the test.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::io::{PipeReader, PipeWriter};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use warmswap_sdk::transfer::channel::SupervisorChannel;
use warmswap_sdk::transfer::control::{ControlPage, ControlWord};
use warmswap_sdk::transfer::log::LogConfig;
use warmswap_sdk::transfer::message::{Commit, ConnectionRecord, ToService, ToSupervisor, socket_cookie};
use warmswap_sdk::transfer::ownership::OwnershipLock;
use warmswap_sdk::transfer::precopy::{Precopied, Precopy};
use warmswap_sdk::transfer::snapshot::{ArchivedShard, Snapshot, Snapshotted};
use warmswap_sdk::transfer::state::{NoState, State};
use warmswap_sdk::transfer::store::{Evolution, Map, Store};
use warmswap_sdk::{Event, OUTBOX_LEN_MAX, Service};

mod ownership;

struct Stage<S> {
    service: Service<S>,
    channel: SupervisorChannel,
    page: ControlPage,
    ownership: OwnershipLock,
    lifeline: (PipeReader, PipeWriter),
    epoch: u32,
}

impl<S: State> Stage<S> {
    fn new(state: S) -> Self {
        let (mut channel, theirs) = SupervisorChannel::pair().unwrap();
        let page = ControlPage::create().unwrap();
        let welcome = ToService::Welcome { service: "test".into(), generation: 5, owner: false };
        let ownership = OwnershipLock::create().unwrap();
        let lifeline = std::io::pipe().unwrap();
        channel.send(&welcome, &[page.as_fd(), ownership.as_fd(), lifeline.0.as_fd()]).unwrap();
        let service = Service::with_channel(state, Vec::new(), theirs).unwrap();
        assert!(matches!(channel.try_recv().unwrap().unwrap().0, ToSupervisor::Hello { .. }));
        Self { service, channel, page, ownership, lifeline, epoch: 0 }
    }

    fn owning(state: S) -> Self {
        let mut stage = Self::new(state);
        stage.own(None, None, false);
        assert!(matches!(stage.events()[..], [Event::BecomeOwner { .. }]));
        stage.service.serving().unwrap();
        assert_eq!(stage.said(), [ToSupervisor::Owned { handover: 9, connections: 0 }]);
        stage
    }

    fn tell(&self, message: &ToService) {
        self.channel.send(message, &[]).unwrap();
    }

    fn word(&mut self, owner: u32, orderly: bool) {
        self.epoch += 1;
        self.page.store(ControlWord { epoch: self.epoch, owner, orderly });
    }

    /// The supervisor dies. Its end of the channel is kept elsewhere.
    fn supervisor_dies(&mut self) {
        self.lifeline = std::io::pipe().unwrap();
    }

    fn own(&mut self, commit: Option<Commit>, connections_open: Option<u64>, follow: bool) {
        self.word(5, false);
        self.tell(&ToService::Own { handover: 9, commit, connections_open, follow });
    }

    /// Generation 6 is made owner and dies.
    fn another_owner(&mut self, serves: bool) {
        self.word(6, true);
        assert!(self.ownership.try_acquire(6));
        if serves {
            self.ownership.begin_serving();
        }
        assert!(self.ownership.release(6));
    }

    fn events(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.service.poll().unwrap()).collect()
    }

    fn said(&mut self) -> Vec<ToSupervisor> {
        self.service.poll().unwrap();
        std::iter::from_fn(|| self.channel.try_recv().unwrap()).map(|(message, _)| message).collect()
    }

    /// A connection that the service has accepted.
    fn accept(&mut self) -> (TcpStream, OwnedFd, u64) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let fd = OwnedFd::from(listener.accept().unwrap().0);
        let cookie = self.service.connection_opened(fd.as_fd(), 0).unwrap();
        (client, fd, cookie)
    }

    /// A connection that the owner serves and this follower hears of.
    fn follow_connection(&mut self) -> (TcpStream, u64) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let fd = OwnedFd::from(listener.accept().unwrap().0);
        let cookie = socket_cookie(fd.as_fd()).unwrap();
        let record =
            ConnectionRecord { cookie, listener: String::new(), carry: Vec::new(), attached: true, more: false };
        self.channel.send(&ToService::Connections { records: vec![record] }, &[fd.as_fd()]).unwrap();
        (client, cookie)
    }
}

fn carries(messages: &[ToSupervisor]) -> Vec<(u64, usize)> {
    let records = messages.iter().flat_map(|message| match message {
        ToSupervisor::Connections { records } => records.as_slice(),
        _ => &[],
    });
    records.filter(|record| !record.attached).map(|record| (record.cookie, record.carry.len())).collect()
}

#[test]
fn only_the_generation_of_the_control_word_may_write() {
    let mut stage = Stage::new(NoState);
    assert!(!stage.service.may_write());
    stage.own(None, None, false);
    assert!(!stage.service.may_write(), "before the message was read");
    stage.events();
    assert!(stage.service.may_write());
    stage.word(6, true);
    assert!(!stage.service.may_write(), "the word names somebody else");
}

#[test]
fn a_new_follower_gets_every_connection_then_every_change() {
    let mut stage = Stage::owning(NoState);
    let mut open: Vec<_> = (0..300).map(|_| stage.accept()).collect();
    assert_eq!(stage.said(), [], "nobody follows");
    stage.tell(&ToService::Follow { on: true });
    stage.tell(&ToService::CaughtUp { round: 1, commit: None });
    let mut got = Vec::new();
    while !got.iter().any(|message| matches!(message, ToSupervisor::CaughtUp { round: 1, .. })) {
        got.extend(stage.said());
    }
    let sent: usize = got
        .iter()
        .map(|message| match message {
            ToSupervisor::Connections { records } => records.iter().filter(|record| record.attached).count(),
            _ => 0,
        })
        .sum();
    assert_eq!(sent, 300);
    assert_eq!(got.last(), Some(&ToSupervisor::CaughtUp { round: 1, commit: None, connections: 300 }));
    let (_, fd, cookie) = open.pop().unwrap();
    drop(fd);
    stage.service.connection_closed(cookie);
    assert_eq!(stage.said(), [ToSupervisor::ConnectionsClosed { cookies: vec![cookie] }]);
}

#[test]
fn a_follower_that_lacks_connections_does_not_become_owner() {
    let mut stage = Stage::new(NoState);
    let (_client, cookie) = stage.follow_connection();
    stage.own(None, Some(2), true);
    let events = stage.events();
    assert!(matches!(events[..], [Event::ConnectionArrived { cookie: of, .. }] if of == cookie), "{events:?}");
    let said = stage.said();
    assert!(matches!(&said[..], [ToSupervisor::Failed { what }] if what.contains("has 1 of 2")), "{said:?}");
    assert!(!stage.service.is_owner());
    let (_other, _) = stage.follow_connection();
    stage.own(None, Some(2), true);
    assert!(matches!(stage.events()[..], [Event::ConnectionArrived { .. }, Event::BecomeOwner { .. }]));
}

/// The limit belongs to the whole process, so a process of its own is needed: the test again, in a child. True in there.
fn in_a_process_of_its_own(test: &str) -> bool {
    const CHILD: &str = "WARMSWAP_TEST_LOW_LIMIT";
    if std::env::var_os(CHILD).is_some() {
        return true;
    }
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    let output = child.args(["--exact", test]).env(CHILD, "1").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    false
}

/// Lets this process open so many more files, until what is returned is dropped.
fn leave_descriptors(count: usize) -> Vec<std::fs::File> {
    let numbers = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let highest = numbers.filter_map(|entry| entry.file_name().to_str()?.parse::<u64>().ok()).max().unwrap();
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is live in both calls.
    unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        limit.rlim_cur = highest + 1 + count as u64;
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 0);
    }
    // The kernel gives the lowest number that is free, and there may be some in between.
    let mut hoard: Vec<_> = std::iter::from_fn(|| std::fs::File::open("/dev/null").ok()).collect();
    hoard.truncate(hoard.len() - count);
    hoard
}

#[test]
fn an_owner_sends_its_connections_with_the_few_descriptors_it_has_left() {
    if !in_a_process_of_its_own("an_owner_sends_its_connections_with_the_few_descriptors_it_has_left") {
        return;
    }
    let mut stage = Stage::owning(NoState);
    let mut open: Vec<_> = (0..200).map(|_| stage.accept()).collect();
    let hoard = leave_descriptors(5);
    stage.tell(&ToService::Follow { on: true });
    stage.tell(&ToService::CaughtUp { round: 1, commit: None });
    let (mut sent, mut messages) = (0, 0);
    let mut take = |said: Vec<ToSupervisor>| {
        for message in said {
            match message {
                ToSupervisor::Connections { records } => {
                    sent += records.len();
                    messages += 1;
                }
                ToSupervisor::CaughtUp { connections: 200, .. } => return Some((sent, messages)),
                other => panic!("{other:?}"),
            }
        }
        None
    };
    let (sent, messages) = std::iter::repeat_with(|| stage.said()).find_map(&mut take).unwrap();
    assert!(sent == 200 && messages >= 40, "{sent} in {messages} messages");
    // The same when it has to stop serving at once: those that came since are told of first.
    drop(hoard);
    open.truncate(100);
    let late: Vec<_> = (0..20).map(|_| stage.accept()).collect();
    let _hoard = leave_descriptors(3);
    stage.tell(&ToService::Yield { handover: 10, budget_us: 2_000_000 });
    stage.events();
    stage.service.yielded(Vec::new()).unwrap();
    let said = stage.said();
    let told = said.iter().map(|m| if let ToSupervisor::Connections { records } = m { records.len() } else { 0 });
    assert_eq!(told.sum::<usize>(), late.len(), "{said:?}");
    assert!(matches!(said.last(), Some(ToSupervisor::Yielded { .. })), "{said:?}");
}

#[test]
fn an_owner_without_a_descriptor_left_says_so_and_serves_on() {
    if !in_a_process_of_its_own("an_owner_without_a_descriptor_left_says_so_and_serves_on") {
        return;
    }
    let mut stage = Stage::owning(NoState);
    let _open: Vec<_> = (0..10).map(|_| stage.accept()).collect();
    let _hoard = leave_descriptors(0);
    stage.tell(&ToService::Follow { on: true });
    let said = stage.said();
    assert!(matches!(&said[..], [ToSupervisor::Failed { what }] if what.contains("no descriptor is left")), "{said:?}");
    assert!(stage.service.may_write() && stage.service.connections() == 10);
}

#[test]
fn a_follower_says_that_its_limit_is_too_low_and_that_connections_were_lost() {
    if !in_a_process_of_its_own("a_follower_says_that_its_limit_is_too_low_and_that_connections_were_lost") {
        return;
    }
    let mut stage = Stage::new(NoState);
    let _first = stage.follow_connection();
    let hoard = leave_descriptors(20);
    stage.events();
    let said = stage.said();
    assert!(matches!(&said[..], [ToSupervisor::Failed { what }] if what.contains("RLIMIT_NOFILE")), "{said:?}");
    let _second = stage.follow_connection();
    drop(hoard);
    let _hoard = leave_descriptors(0);
    assert!(stage.events().is_empty());
    let said = stage.said();
    assert!(matches!(&said[..], [ToSupervisor::Failed { what }] if what.contains("were lost")), "{said:?}");
    assert_eq!(stage.service.connections(), 1);
    // The conversation goes on.
    stage.tell(&ToService::CaughtUp { round: 1, commit: None });
    assert_eq!(stage.said(), [ToSupervisor::CaughtUp { round: 1, commit: None, connections: 1 }]);
}

#[test]
fn a_descriptor_number_that_was_given_away_again_is_not_sent_as_the_old_connection() {
    let mut stage = Stage::owning(NoState);
    let (_client, fd, _cookie) = stage.accept();
    // A bug of the service: closed without a word, and the number taken by something else.
    drop(fd);
    let (_other, _their_fd) = std::os::unix::net::UnixStream::pair().unwrap();
    stage.tell(&ToService::Follow { on: true });
    let said = stage.said();
    assert!(said.iter().all(|message| !matches!(message, ToSupervisor::Connections { .. })), "{said:?}");
}

#[test]
fn what_was_carried_over_comes_back_when_nobody_took_it_and_is_withdrawn_later() {
    let mut stage = Stage::owning(NoState);
    let (_client, _fd, cookie) = stage.accept();
    stage.tell(&ToService::Follow { on: true });
    stage.said();
    stage.tell(&ToService::Yield { handover: 10, budget_us: 10_000 });
    assert!(matches!(stage.events()[..], [Event::Quiesce { handover: 10, .. }]));
    stage.service.yielded(vec![(cookie, vec![7; 3])]).unwrap();
    let said = stage.said();
    assert_eq!(carries(&said), [(cookie, 3)]);
    assert_eq!(said.last(), Some(&ToSupervisor::Yielded { handover: 10, commit: None, connections_open: 1 }));
    assert!(!stage.service.may_write());
    // Called off: the word never changed.
    stage.tell(&ToService::Own { handover: 10, commit: None, connections_open: None, follow: true });
    let events = stage.events();
    assert!(
        matches!(&events[..], [Event::ConnectionCarry { cookie: of, carry }, Event::BecomeOwner { .. }]
            if *of == cookie && carry == &[7; 3]),
        "{events:?}"
    );
    stage.service.serving().unwrap();
    stage.said();
    // By the next handover the request is done: the follower must not be left with half of it.
    stage.tell(&ToService::Yield { handover: 11, budget_us: 10_000 });
    stage.events();
    stage.service.yielded(Vec::new()).unwrap();
    assert_eq!(carries(&stage.said()), [(cookie, 0)]);
}

#[test]
fn an_owner_whose_supervisor_died_sends_connections_to_nobody() {
    let mut stage = Stage::owning(NoState);
    stage.tell(&ToService::Follow { on: true });
    stage.events();
    stage.supervisor_dies();
    stage.events();
    let (_client, _fd, _cookie) = stage.accept();
    assert!(stage.events().is_empty());
    let said = stage.said();
    assert!(said.is_empty(), "{said:?}");
}

#[test]
fn who_was_named_serves_with_its_connections_though_the_supervisor_died_before_it_said_so() {
    for orderly in [true, false] {
        let mut stage = Stage::new(NoState);
        let (_client, cookie) = stage.follow_connection();
        assert!(matches!(stage.events()[..], [Event::ConnectionArrived { .. }]));
        stage.word(5, orderly);
        assert!(stage.events().is_empty(), "the supervisor lives and will say so");
        stage.supervisor_dies();
        let events = stage.events();
        match orderly {
            true => assert!(matches!(events[..], [Event::BecomeOwner { .. }]), "{events:?}"),
            // Its predecessor died with whatever it had read.
            false => assert!(
                matches!(events[..], [Event::ConnectionClosed { cookie: of }, Event::BecomeOwner { .. }] if of == cookie),
                "{events:?}"
            ),
        }
    }
}

#[test]
fn own_to_an_owner_is_answered_and_changes_nothing() {
    let mut stage = Stage::owning(NoState);
    let (_client, _fd, _) = stage.accept();
    stage.tell(&ToService::Yield { handover: 10, budget_us: 10_000 });
    stage.tell(&ToService::Own { handover: 10, commit: None, connections_open: None, follow: false });
    // The event of the yield may or may not have been taken; here it was not.
    let events = stage.events();
    assert!(events.iter().all(|event| matches!(event, Event::Quiesce { .. })), "{events:?}");
    stage.service.yielded(Vec::new()).unwrap();
    assert!(stage.service.may_write());
    assert_eq!(stage.said(), [ToSupervisor::Owned { handover: 10, connections: 1 }]);
}

#[test]
fn a_long_carry_arrives_in_one_piece() {
    let mut owner = Stage::owning(NoState);
    let (client, fd, cookie) = owner.accept();
    owner.tell(&ToService::Yield { handover: 10, budget_us: 10_000 });
    owner.events();
    let carry: Vec<u8> = (0..150_000_u32).map(|at| at as u8).collect();
    owner.service.yielded(vec![(cookie, carry.clone())]).unwrap();
    let mut follower = Stage::new(NoState);
    let record = ConnectionRecord { cookie, listener: "a".into(), carry: Vec::new(), attached: true, more: false };
    let arrived = ToService::Connections { records: vec![record] };
    follower.channel.send(&arrived, &[fd.as_fd()]).unwrap();
    assert!(matches!(follower.events()[..], [Event::ConnectionArrived { .. }]));
    let mut pieces = 0;
    for message in owner.said() {
        if let ToSupervisor::Connections { records } = message {
            pieces += 1;
            follower.tell(&ToService::Connections { records });
        }
    }
    assert_eq!(pieces, 3);
    let events = follower.events();
    assert!(matches!(&events[..], [Event::ConnectionCarry { carry: got, .. }] if *got == carry));
    drop(client);
}

#[test]
fn a_descriptor_under_a_wrong_cookie_is_refused() {
    let mut stage = Stage::new(NoState);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let cookie = socket_cookie(listener.as_fd()).unwrap() + 1;
    let record = ConnectionRecord { cookie, listener: "a".into(), carry: Vec::new(), attached: true, more: false };
    stage.channel.send(&ToService::Connections { records: vec![record] }, &[listener.as_fd()]).unwrap();
    assert!(stage.events().is_empty());
    assert!(matches!(stage.said()[..], [ToSupervisor::Failed { .. }]));
    assert_eq!(stage.service.connections(), 0);
}

#[test]
fn a_supervisor_that_does_not_read_never_blocks_the_service_and_is_told_what_it_missed() {
    let mut stage = Stage::owning(NoState);
    stage.tell(&ToService::Follow { on: true });
    stage.events();
    let (_client, fd, first) = stage.accept();
    stage.events();
    let began = std::time::Instant::now();
    // Opens and closes, each a message of its own.
    for _ in 0..2 * OUTBOX_LEN_MAX {
        stage.service.connection_closed(first);
        stage.service.poll().unwrap();
        stage.service.connection_opened(fd.as_fd(), 0).unwrap();
        stage.service.poll().unwrap();
    }
    assert!(began.elapsed() < Duration::from_secs(20));
    let mut said = Vec::new();
    loop {
        let more = stage.said();
        if more.is_empty() {
            break;
        }
        said.extend(more);
    }
    assert!(said.len() < 2 * OUTBOX_LEN_MAX, "{} messages", said.len());
    assert!(said.iter().any(|message| matches!(message, ToSupervisor::Failed { .. })));
}

#[test]
fn a_segment_is_announced_before_its_first_record_is_published() {
    let mut store = Store::new(LogConfig::new(1)).unwrap();
    let map = store.map::<u64>("map").unwrap();
    let mut stage = Stage::owning(store);
    map.insert(stage.service.state_mut(), b"a", &1).unwrap();
    assert_eq!(stage.said(), []);
    stage.service.commit().unwrap();
    assert_eq!(stage.said(), [ToSupervisor::Segment { index: 0 }]);
    map.insert(stage.service.state_mut(), b"b", &1).unwrap();
    stage.service.commit().unwrap();
    assert_eq!(stage.said(), []);
}

/// Words, one a piece.
#[derive(Default)]
struct Words(Vec<String>);

impl Precopy for Words {
    type Piece = String;
    type Cursor = usize;

    fn begin(&self) -> usize {
        0
    }

    fn next(&self, at: &mut usize) -> Option<String> {
        *at += 1;
        self.0.get(*at - 1).cloned()
    }

    fn apply(&mut self, piece: String) {
        self.0.push(piece);
    }

    fn clear(&mut self) {
        self.0.clear();
    }
}

#[test]
fn an_owner_has_caught_up_when_the_base_of_its_state_is_out_and_serves_meanwhile() {
    let mut stage = Stage::owning(Precopied::new(Words::default(), LogConfig::new(1)));
    for n in 0..20_000 {
        stage.service.state_mut().change(format!("{n:0>100}")).unwrap();
    }
    stage.service.commit().unwrap();
    assert_eq!(stage.said(), [], "nobody follows");
    stage.tell(&ToService::Follow { on: true });
    stage.tell(&ToService::CaughtUp { round: 1, commit: None });
    let (mut said, mut polls) = (Vec::new(), 0);
    while !matches!(said.last(), Some(ToSupervisor::CaughtUp { round: 1, commit: Some(_), .. })) {
        said.extend(stage.said());
        polls += 1;
        if polls == 2 {
            assert!(stage.service.wake_within().is_some_and(|within| within <= Duration::from_millis(1)));
        }
    }
    assert!(polls > 5, "all of it in {polls} calls");
    let moved = said.iter().rev().nth(1);
    assert!(matches!(moved, Some(ToSupervisor::StateMoved { bytes }) if *bytes > 2_000_000), "{moved:?}");
    assert_eq!(said.iter().filter(|message| matches!(message, ToSupervisor::Segment { .. })).count(), 1);
    assert_eq!(stage.service.wake_within(), None, "nothing is left to do");
    // Let go of when nobody follows.
    stage.tell(&ToService::Follow { on: false });
    stage.said();
    assert_eq!(stage.service.commit().unwrap(), None);
}

/// Cannot be told: no shards.
struct Unspeakable;

impl Snapshot for Unspeakable {
    type Shard = u64;

    fn shards(&self) -> Vec<&u64> {
        Vec::new()
    }

    fn len_hint(&self) -> usize {
        0
    }

    fn restore(&mut self, _shards: Vec<ArchivedShard<u64>>) -> Result<(), rkyv::rancor::Error> {
        Ok(())
    }
}

#[test]
fn an_owner_whose_state_cannot_be_handed_over_says_why_and_goes_on_with_what_it_carried_over() {
    let mut stage = Stage::owning(Snapshotted::new(Unspeakable, LogConfig::new(1)));
    let (_client, _fd, cookie) = stage.accept();
    stage.tell(&ToService::Follow { on: true });
    stage.tell(&ToService::CaughtUp { round: 1, commit: None });
    let said = stage.said();
    let failed = |what: &str| what.contains("0 shards");
    assert!(said.iter().any(|message| matches!(message, ToSupervisor::Failed { what } if failed(what))), "{said:?}");
    assert!(said.iter().all(|message| !matches!(message, ToSupervisor::CaughtUp { .. })), "{said:?}");
    // A supervisor that goes on all the same.
    stage.tell(&ToService::Yield { handover: 10, budget_us: 10_000 });
    stage.events();
    stage.service.yielded(vec![(cookie, vec![7; 3])]).unwrap();
    let said = stage.said();
    assert!(said.iter().any(|message| matches!(message, ToSupervisor::Failed { what } if failed(what))), "{said:?}");
    assert!(said.iter().all(|message| !matches!(message, ToSupervisor::Yielded { .. })), "{said:?}");
    stage.tell(&ToService::Own { handover: 10, commit: None, connections_open: None, follow: false });
    let events = stage.events();
    assert!(matches!(&events[..], [Event::ConnectionCarry { .. }, Event::BecomeOwner { .. }]), "{events:?}");
}

/// A store of schema 2 that was told of a log in schema 1, with one value.
fn upgraded(back: bool) -> (Stage<Store>, Map<(String, u8)>) {
    let mut old = Store::new(LogConfig::new(1)).unwrap();
    let texts = old.map::<String>("map").unwrap();
    old.become_owner(None).unwrap();
    texts.insert(&mut old, b"a", &"text".to_owned()).unwrap();
    old.commit();
    let mut new = Store::new(LogConfig { schemas_read: vec![1, 2], ..LogConfig::new(2) }).unwrap();
    let evolution = Evolution::new();
    let evolution = if back {
        evolution.both_ways::<String>(1, |old| (old.as_str().to_owned(), 1), |new| new.0.as_str().to_owned())
    } else {
        evolution.one_way::<String>(1, |old| (old.as_str().to_owned(), 1))
    };
    let map = new.map_evolved("map", evolution).unwrap();
    let mut stage = Stage::new(new);
    stage.channel.send(&ToService::Segment { index: 0 }, &[old.segment_fd(0).unwrap()]).unwrap();
    stage.own(old.commit(), Some(0), true);
    assert!(matches!(stage.events()[..], [Event::BecomeOwner { .. }]));
    stage.service.serving().unwrap();
    (stage, map)
}

/// Segments by name: of the old log, or of the new one.
fn segments(messages: &[ToSupervisor]) -> Vec<&'static str> {
    messages
        .iter()
        .filter_map(|message| match message {
            ToSupervisor::Segment { index } => Some(if *index < 1 << 32 { "old" } else { "new" }),
            ToSupervisor::SegmentRetired { index } => {
                Some(if *index < 1 << 32 { "old retired" } else { "new retired" })
            }
            _ => None,
        })
        .collect()
}

#[test]
fn the_older_schema_is_written_until_nobody_follows() {
    let (mut stage, map) = upgraded(true);
    assert_eq!(map.get(stage.service.state(), b"a").unwrap().1, 1);
    stage.said();
    map.insert(stage.service.state_mut(), b"b", &("more".into(), 2)).unwrap();
    stage.service.commit().unwrap();
    assert_eq!(segments(&stage.said()), ["old"], "where the follower looks");
    stage.tell(&ToService::Follow { on: false });
    stage.tell(&ToService::CaughtUp { round: 1, commit: None });
    let said = stage.said();
    assert_eq!(segments(&said), ["new", "old retired", "old retired"]);
    assert!(matches!(said.last(), Some(ToSupervisor::CaughtUp { .. })), "after what there was to say: {said:?}");
    map.insert(stage.service.state_mut(), b"c", &("last".into(), 3)).unwrap();
    stage.service.commit().unwrap();
    assert_eq!(segments(&stage.said()), [""; 0]);
}

#[test]
fn without_a_way_back_the_new_log_is_announced_before_anything_is_acknowledged() {
    let (mut stage, map) = upgraded(false);
    assert_eq!(segments(&stage.said()), [""; 0]);
    map.insert(stage.service.state_mut(), b"b", &("more".into(), 2)).unwrap();
    stage.service.commit().unwrap();
    assert_eq!(segments(&stage.said()), ["new", "old retired"]);
}

#[test]
fn an_owner_outlives_the_control_channel_and_a_follower_does_not() {
    let mut owner = Stage::owning(NoState);
    let (channel, _) = SupervisorChannel::pair().unwrap();
    owner.channel = channel;
    assert!(matches!(owner.events()[..], [Event::ControlLost]));
    assert!(owner.service.control_fd().is_none() && owner.service.may_write());
    let mut follower = Stage::new(NoState);
    let (channel, _) = SupervisorChannel::pair().unwrap();
    follower.channel = channel;
    assert!(matches!(follower.events()[..], [Event::ControlLost, Event::Retire { .. }]));
}

#[test]
fn a_message_that_nobody_understands_does_not_end_the_conversation() {
    let mut stage = Stage::owning(NoState);
    let (mut client, fd, _) = stage.accept();
    for garbage in [&b"\xff\xfe garbage"[..], &[0; 64], &[0xff; 4096]] {
        send_raw(stage.channel.as_fd(), garbage);
    }
    assert!(matches!(
        &stage.said()[..],
        [ToSupervisor::Failed { .. }, ToSupervisor::Failed { .. }, ToSupervisor::Failed { .. }]
    ));
    stage.tell(&ToService::Follow { on: true });
    assert!(matches!(&stage.said()[..], [ToSupervisor::Connections { .. }]));
    std::io::Write::write_all(&mut client, b"x").unwrap();
    drop(fd);
}

fn send_raw(fd: std::os::fd::BorrowedFd<'_>, bytes: &[u8]) {
    use std::os::fd::AsRawFd as _;
    // SAFETY: a live descriptor and a buffer of the stated length.
    let sent = unsafe { libc::send(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
    assert_eq!(usize::try_from(sent).unwrap(), bytes.len());
}
