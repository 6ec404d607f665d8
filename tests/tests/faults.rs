//! A spread of the faults that `cargo xtask faults` injects at every step of a handover.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use warmswap_tests::faults::{Actor, Disturbed, Outcome};
use warmswap_tests::{Requirement, needs};

/// Coprime to the number of actors times harms, so that every combination comes up, at different steps.
const EVERY: usize = 11;

#[test]
fn whoever_is_killed_stopped_or_deceived_at_whatever_step_nothing_is_lost() {
    needs!("whoever_is_killed_stopped_or_deceived_at_whatever_step_nothing_is_lost", Requirement::Containers);
    let mut disturbed = Disturbed::start().unwrap();
    let points: Vec<_> = disturbed.points().into_iter().step_by(EVERY).collect();
    let mut outcome = Outcome::default();
    for point in &points {
        if let Err(error) = disturbed.disturb(*point, &mut outcome) {
            panic!("{point}: {error:#}\n{outcome}\n{}", disturbed.log());
        }
    }
    println!("{outcome}");
    assert!(outcome.broken.is_empty(), "{outcome}\n{}", disturbed.log());
    // Two of them may be the same, in words: those that are hit are fewer than those that are reached.
    assert!(outcome.missed.len() * 10 <= points.len(), "most of {} points are reached: {outcome}", points.len());
    for actor in [Actor::Active, Actor::Shadow, Actor::Agent] {
        assert!(outcome.hits.iter().any(|hit| hit.actor == actor), "{actor:?} was never hit: {outcome}");
    }
    disturbed.finish().unwrap();
}
