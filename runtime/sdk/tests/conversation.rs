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
use warmswap_sdk::transfer::ownership::{CLAIM_AFTER, OwnershipLock};
use warmswap_sdk::transfer::state::{NoState, State};
use warmswap_sdk::transfer::store::Store;
use warmswap_sdk::{Event, OUTBOX_LEN_MAX, Service};

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
fn connections_of_an_owner_that_died_are_closed() {
    let mut stage = Stage::owning(NoState);
    let (_client, _fd, cookie) = stage.accept();
    stage.tell(&ToService::Yield { handover: 10, budget_us: 10_000 });
    stage.events();
    stage.service.yielded(Vec::new()).unwrap();
    stage.word(6, true);
    stage.own(None, None, false);
    let events = stage.events();
    assert!(
        matches!(events[..], [Event::ConnectionClosed { cookie: of }, Event::BecomeOwner { .. }] if of == cookie),
        "{events:?}"
    );
}

#[test]
fn who_yielded_serves_again_when_the_supervisor_dies_before_it_named_another() {
    let mut stage = Stage::owning(NoState);
    let (_client, _fd, cookie) = stage.accept();
    stage.tell(&ToService::Yield { handover: 10, budget_us: 10_000 });
    stage.events();
    stage.service.yielded(vec![(cookie, vec![7; 3])]).unwrap();
    stage.said();
    assert!(stage.events().is_empty(), "the supervisor lives");
    assert!(stage.service.wake_within().is_some(), "nothing else would wake it");
    stage.supervisor_dies();
    let events = stage.events();
    assert!(
        matches!(&events[..], [Event::ConnectionCarry { cookie: of, carry }, Event::BecomeOwner { handover: 10 }]
            if *of == cookie && carry == &[7; 3]),
        "{events:?}"
    );
    stage.service.serving().unwrap();
    assert!(stage.service.may_write());
    // The next supervisor makes sure.
    stage.tell(&ToService::Own { handover: 10, commit: None, connections_open: None, follow: false });
    assert!(stage.events().is_empty());
    let owned = ToSupervisor::Owned { handover: 10, connections: 1 };
    assert_eq!(stage.said(), [owned.clone(), owned]);
}

#[test]
fn who_yielded_stays_quiet_when_the_supervisor_dies_after_it_named_another() {
    let mut stage = Stage::owning(NoState);
    stage.tell(&ToService::Yield { handover: 10, budget_us: 10_000 });
    stage.events();
    stage.service.yielded(Vec::new()).unwrap();
    stage.word(6, true);
    stage.supervisor_dies();
    // For the one that was named, and for the clients whose connections it closes.
    assert!(matches!(stage.events()[..], [Event::Retire { .. }]));
    assert!(!stage.service.is_owner());
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

/// Polls for as long as it takes until a claim is due.
fn wait_until_claims_are_due<S: State>(stage: &mut Stage<S>) -> Vec<Event> {
    let until = std::time::Instant::now() + CLAIM_AFTER + Duration::from_millis(100);
    let mut events = Vec::new();
    while std::time::Instant::now() < until {
        events.extend(stage.events());
        std::thread::sleep(Duration::from_millis(2));
    }
    events
}

/// It yields, and the supervisor says nothing more.
fn yielding() -> Stage<NoState> {
    let mut stage = Stage::owning(NoState);
    assert_eq!(stage.ownership.holder(), 5);
    stage.tell(&ToService::Yield { handover: 9, budget_us: 1000 });
    assert!(matches!(stage.events()[..], [Event::Quiesce { .. }]));
    stage.service.yielded(Vec::new()).unwrap();
    assert_eq!(stage.ownership.holder(), 0, "it gave the ownership back");
    stage
}

#[test]
fn who_yielded_to_a_supervisor_that_stands_still_serves_again() {
    let mut stage = yielding();
    let events = wait_until_claims_are_due(&mut stage);
    assert!(matches!(events[..], [Event::BecomeOwner { handover: 9 }]), "{events:?}");
    assert!(stage.service.may_write());
    assert_eq!(stage.ownership.holder(), 5);
    // The supervisor goes on and undoes the handover.
    stage.service.serving().unwrap();
    stage.said();
    stage.tell(&ToService::Own { handover: 9, commit: None, connections_open: None, follow: false });
    assert_eq!(stage.said(), [ToSupervisor::Owned { handover: 9, connections: 0 }]);
}

#[test]
fn who_yielded_does_not_serve_again_when_another_one_does() {
    let mut stage = yielding();
    assert!(stage.ownership.try_acquire(6));
    assert!(wait_until_claims_are_due(&mut stage).is_empty());
    stage.own(None, None, false);
    assert!(stage.events().is_empty(), "not even when it is told to");
    assert!(
        matches!(stage.said().last(), Some(ToSupervisor::Failed { what }) if what == "g6 serves, so this process does not")
    );
    assert!(!stage.service.is_owner());
}

#[test]
fn who_is_named_by_a_supervisor_that_then_stands_still_serves() {
    let mut stage = Stage::new(NoState);
    stage.word(5, true);
    let events = wait_until_claims_are_due(&mut stage);
    assert!(matches!(events[..], [Event::BecomeOwner { .. }]), "{events:?}");
    assert!(stage.service.may_write());
}

#[test]
fn who_is_not_named_waits_however_long_the_supervisor_stands_still() {
    let mut stage = yielding();
    stage.word(6, true);
    assert!(wait_until_claims_are_due(&mut stage).is_empty());
    assert_eq!(stage.ownership.holder(), 0);
}

#[test]
fn an_owner_that_had_to_hold_its_answers_back_is_told_to_send_them() {
    let mut stage = Stage::owning(NoState);
    stage.word(6, true);
    assert!(!stage.service.may_write());
    stage.own(None, None, false);
    let events = stage.events();
    assert!(matches!(events[..], [Event::BecomeOwner { handover: 9 }]), "{events:?}");
    assert!(stage.service.may_write());
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
