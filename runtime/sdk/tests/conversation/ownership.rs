//! Who serves when the owner dies, or the supervisor dies or stands still; and with which connections.

use std::net::TcpStream;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use warmswap_sdk::Event;
use warmswap_sdk::transfer::message::{ToService, ToSupervisor};
use warmswap_sdk::transfer::ownership::{CLAIM_AFTER, OwnershipLock};
use warmswap_sdk::transfer::state::{NoState, State};

use super::Stage;

/// Polls for as long as it takes until a claim is due.
fn wait_until_claims_are_due<S: State>(stage: &mut Stage<S>) -> Vec<Event> {
    let until = Instant::now() + CLAIM_AFTER + Duration::from_millis(100);
    let mut events = Vec::new();
    while Instant::now() < until {
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

/// It has yielded and holds a connection, for which it carried `carry` over.
fn yielded_with_a_connection(carry: &[u8]) -> (Stage<NoState>, (TcpStream, OwnedFd), u64) {
    let mut stage = Stage::owning(NoState);
    let (client, fd, cookie) = stage.accept();
    stage.tell(&ToService::Yield { handover: 10, budget_us: 10_000 });
    stage.events();
    let carries = if carry.is_empty() { Vec::new() } else { vec![(cookie, carry.to_vec())] };
    stage.service.yielded(carries).unwrap();
    (stage, (client, fd), cookie)
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
fn connections_of_an_owner_that_died_are_closed() {
    let (mut stage, _connection, cookie) = yielded_with_a_connection(&[]);
    stage.another_owner(true);
    stage.own(None, None, false);
    let events = stage.events();
    assert!(
        matches!(events[..], [Event::ConnectionClosed { cookie: of }, Event::BecomeOwner { .. }] if of == cookie),
        "{events:?}"
    );
}

#[test]
fn connections_are_kept_when_the_owner_between_died_before_it_began_to_serve() {
    let (mut stage, _connection, cookie) = yielded_with_a_connection(&[7; 3]);
    stage.another_owner(false);
    stage.own(None, None, false);
    let events = stage.events();
    assert!(
        matches!(&events[..], [Event::ConnectionCarry { cookie: of, carry }, Event::BecomeOwner { .. }]
            if *of == cookie && carry == &[7; 3]),
        "{events:?}"
    );
}

#[test]
fn a_new_ownership_page_does_not_say_who_served_before() {
    let (mut stage, _connection, cookie) = yielded_with_a_connection(&[]);
    stage.another_owner(true);
    // The next supervisor found the page nowhere. On its own, too, somebody has served once.
    stage.ownership = OwnershipLock::create().unwrap();
    stage.another_owner(true);
    let pages = [stage.page.as_fd(), stage.ownership.as_fd(), stage.lifeline.0.as_fd()];
    stage.channel.send(&ToService::NewSupervisor, &pages).unwrap();
    stage.own(None, None, false);
    let events = stage.events();
    assert!(
        matches!(events[..], [Event::ConnectionClosed { cookie: of }, Event::BecomeOwner { .. }] if of == cookie),
        "{events:?}"
    );
}

#[test]
fn who_yielded_serves_again_when_the_supervisor_dies_before_it_named_another() {
    let (mut stage, _connection, cookie) = yielded_with_a_connection(&[7; 3]);
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
