//! Who serves when the supervisor stands still.

use std::time::{Duration, Instant};

use warmswap_sdk::Event;
use warmswap_sdk::transfer::message::{ToService, ToSupervisor};
use warmswap_sdk::transfer::ownership::CLAIM_AFTER;
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
