//! Which request is let through while something runs.
//!
//! ```text
//!            Update, trigger                 promoted
//!  Serving ───────────────────▶ HandingOver ─────────▶ Verifying ──┬─ ended ─▶ Serving
//!     ▲                             │ ended (aborted)      │ Rollback, worse
//!     └─────────────────────────────┴──────────── ended ── RollingBack
//!  any, but Stopping and Stopped ── Stop ──▶ (stop wanted) ── what runs has ended ──▶ Stopping ──▶ Stopped
//! ```
//!
//! Pure: [`admit`] says what would happen, [`ServiceState::accept`] records it, [`ServiceState::on`] follows what the
//! handover reports. Whoever owns the service acts on it. A *predicted* handover that does not fit is ignored, because it
//! will be predicted again; a person is told why not.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activity {
    /// One generation serves and nothing else goes on.
    Serving,
    /// RESERVE to SYNC: the active serves, and everything can be undone.
    Preparing,
    /// QUIESCE to PROMOTE: milliseconds in which nothing else may happen.
    Switching,
    /// The new generation serves, the old one is parked.
    Verifying,
    RollingBack,
    Stopping,
    Stopped,
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Request {
    /// By a person, to an image with this digest.
    Update {
        digest: String,
    },
    /// By a trigger.
    PredictedUpdate {
        digest: String,
    },
    /// Back to the generation before: an abort while nothing is promoted yet.
    Rollback,
    Stop,
}

/// What the handover or the container reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    QuiesceBegan,
    /// The shadow owns the service.
    Promoted,
    /// The verdict was "worse", or the supervisor found the new generation dead.
    RollbackBegan,
    /// Committed, rolled back or aborted: one generation serves.
    HandoverEnded,
    /// Everything of the service is gone.
    Stopped,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    Accept,
    /// Nothing has to be done, and nobody has to be told that something failed.
    Ignore,
    /// For a person: why not, and what to do.
    Deny {
        reason: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceState {
    pub activity: Activity,
    /// Of the generation that serves.
    pub digest: String,
    /// Of the generation that is being brought in, while one is.
    pub target: Option<String>,
    pub stop_wanted: bool,
    pub rollback_wanted: bool,
}

impl ServiceState {
    /// A service whose first generation serves an image with this digest.
    #[must_use]
    pub fn serving(digest: impl Into<String>) -> Self {
        Self {
            activity: Activity::Serving,
            digest: digest.into(),
            target: None,
            stop_wanted: false,
            rollback_wanted: false,
        }
    }

    /// Records a request that [`admit`] accepts; anything else changes nothing.
    pub fn accept(&mut self, request: &Request) -> Admission {
        let admission = admit(self, request);
        if admission == Admission::Accept {
            match request {
                Request::Update { digest } | Request::PredictedUpdate { digest } => {
                    self.activity = Activity::Preparing;
                    self.target = Some(digest.clone());
                }
                Request::Rollback => self.rollback_wanted = true,
                Request::Stop => {
                    self.stop_wanted = true;
                    self.settle();
                }
            }
        }
        admission
    }

    /// Follows what happened. An event that cannot follow from the present activity changes nothing and gives `false`: it
    /// is stale, and whoever sent it has lost track.
    pub fn on(&mut self, event: Event) -> bool {
        use Activity::{Preparing, RollingBack, Serving, Stopped, Stopping, Switching, Verifying};
        let next = match (self.activity, event) {
            (Preparing, Event::QuiesceBegan) => Switching,
            (Switching, Event::Promoted) => Verifying,
            (Verifying, Event::RollbackBegan) => RollingBack,
            (Preparing | Switching | Verifying | RollingBack, Event::HandoverEnded) => Serving,
            (Stopping, Event::Stopped) => Stopped,
            _ => return false,
        };
        if event == Event::HandoverEnded {
            let target = self.target.take();
            // Only a handover that ends out of VERIFY is committed.
            if let (Verifying, Some(target)) = (self.activity, target) {
                self.digest = target;
            }
            self.rollback_wanted = false;
        }
        self.activity = next;
        self.settle();
        true
    }

    /// Begins to stop once nothing else runs.
    fn settle(&mut self) {
        if self.stop_wanted && self.activity == Activity::Serving {
            self.activity = Activity::Stopping;
        }
    }
}

/// What becomes of a request now.
#[must_use]
pub fn admit(state: &ServiceState, request: &Request) -> Admission {
    use Activity::{Preparing, RollingBack, Serving, Stopped, Stopping, Switching, Verifying};
    let deny = |reason: &str| Admission::Deny { reason: reason.to_owned() };
    let ended = match state.activity {
        Stopped => Some("the service is stopped; start it with `warmswap run`"),
        Stopping => Some("the service is being stopped"),
        _ if state.stop_wanted => Some("the service will be stopped as soon as the handover in progress has ended"),
        _ => None,
    };
    match (request, ended) {
        (Request::Stop, Some(_)) | (Request::PredictedUpdate { .. }, Some(_)) => Admission::Ignore,
        (_, Some(reason)) => deny(reason),
        (Request::Stop, None) => Admission::Accept,
        (Request::Update { .. } | Request::PredictedUpdate { .. }, None) if state.activity == Serving => {
            Admission::Accept
        }
        (Request::PredictedUpdate { .. }, None) => Admission::Ignore,
        (Request::Update { digest }, None) => match &state.target {
            Some(target) if target == digest && state.activity != RollingBack && !state.rollback_wanted => {
                Admission::Ignore
            }
            _ => deny(
                "another handover of this service is in progress; wait until it has ended (`warmswap status`), or undo \
                 it with `warmswap rollback`",
            ),
        },
        (Request::Rollback, None) => match state.activity {
            _ if state.rollback_wanted => Admission::Ignore,
            RollingBack => Admission::Ignore,
            Preparing | Switching | Verifying => Admission::Accept,
            Serving | Stopping | Stopped => deny(
                "no older generation is parked: it retired when the last handover was committed; update to the older \
                 image instead",
            ),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn update(digest: &str) -> Request {
        Request::Update { digest: digest.into() }
    }

    fn predicted(digest: &str) -> Request {
        Request::PredictedUpdate { digest: digest.into() }
    }

    fn in_activity(activity: Activity) -> ServiceState {
        let busy = !matches!(activity, Activity::Serving | Activity::Stopping | Activity::Stopped);
        ServiceState { activity, target: busy.then(|| "b".into()), ..ServiceState::serving("a") }
    }

    #[test]
    fn a_second_update_is_denied_and_the_same_one_ignored() {
        let mut state = ServiceState::serving("a");
        assert_eq!(state.accept(&update("b")), Admission::Accept);
        assert_eq!(state.accept(&update("b")), Admission::Ignore);
        assert_eq!(state.accept(&predicted("c")), Admission::Ignore);
        match state.accept(&update("c")) {
            Admission::Deny { reason } => assert!(reason.contains("in progress") && reason.contains("status")),
            other => panic!("{other:?}"),
        }
        assert_eq!(state.target.as_deref(), Some("b"));
    }

    #[test]
    fn an_update_to_the_running_image_is_a_restart_and_accepted() {
        assert_eq!(admit(&ServiceState::serving("a"), &update("a")), Admission::Accept);
    }

    #[test]
    fn rollback_needs_something_to_go_back_to() {
        for activity in [Activity::Preparing, Activity::Switching, Activity::Verifying] {
            let mut state = in_activity(activity);
            assert_eq!(state.accept(&Request::Rollback), Admission::Accept, "{activity:?}");
            assert_eq!(state.accept(&Request::Rollback), Admission::Ignore, "{activity:?}");
            assert!(matches!(state.accept(&update("b")), Admission::Deny { .. }), "{activity:?}");
        }
        assert_eq!(admit(&in_activity(Activity::RollingBack), &Request::Rollback), Admission::Ignore);
        assert!(matches!(admit(&in_activity(Activity::Serving), &Request::Rollback), Admission::Deny { .. }));
    }

    #[test]
    fn a_stop_waits_for_the_handover_and_nothing_comes_after_it() {
        let mut state = in_activity(Activity::Verifying);
        assert_eq!(state.accept(&Request::Stop), Admission::Accept);
        assert_eq!((state.activity, state.stop_wanted), (Activity::Verifying, true));
        assert_eq!(state.accept(&Request::Stop), Admission::Ignore);
        assert_eq!(state.accept(&predicted("c")), Admission::Ignore);
        assert!(matches!(state.accept(&update("c")), Admission::Deny { .. }));
        assert!(state.on(Event::HandoverEnded));
        assert_eq!((state.activity, state.digest.as_str()), (Activity::Stopping, "b"));
        assert!(state.on(Event::Stopped));
        assert_eq!(state.accept(&Request::Stop), Admission::Ignore);
        assert!(matches!(state.accept(&Request::Rollback), Admission::Deny { .. }));
    }

    #[test]
    fn only_a_committed_handover_changes_what_serves() {
        let mut state = ServiceState::serving("a");
        for (events, serves) in [
            (vec![Event::HandoverEnded], "a"),
            (vec![Event::QuiesceBegan, Event::HandoverEnded], "a"),
            (vec![Event::QuiesceBegan, Event::Promoted, Event::RollbackBegan, Event::HandoverEnded], "a"),
            (vec![Event::QuiesceBegan, Event::Promoted, Event::HandoverEnded], "b"),
        ] {
            assert_eq!(state.accept(&update("b")), Admission::Accept);
            assert!(events.iter().all(|event| state.on(*event)), "{events:?}");
            assert_eq!((state.digest.as_str(), state.activity), (serves, Activity::Serving), "{events:?}");
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Ask(Request),
        Happens(Event),
    }

    fn any_step() -> impl Strategy<Value = Step> {
        let request = prop_oneof![
            "[ab]".prop_map(|digest| Request::Update { digest }),
            "[ab]".prop_map(|digest| Request::PredictedUpdate { digest }),
            Just(Request::Rollback),
            Just(Request::Stop),
        ];
        let event = prop::sample::select(vec![
            Event::QuiesceBegan,
            Event::Promoted,
            Event::RollbackBegan,
            Event::HandoverEnded,
            Event::Stopped,
        ]);
        prop_oneof![request.prop_map(Step::Ask), event.prop_map(Step::Happens)]
    }

    proptest! {
        #[test]
        fn whatever_is_asked_and_happens_the_rules_hold(steps in prop::collection::vec(any_step(), 0..60)) {
            let mut state = ServiceState::serving("a");
            let (mut handovers_open, mut stop_accepted) = (0_i32, false);
            for step in steps {
                let before = state.clone();
                match step {
                    Step::Ask(request) => {
                        let expected = admit(&state, &request);
                        let admission = state.accept(&request);
                        prop_assert_eq!(&admission, &expected);
                        let updates = matches!(request, Request::Update { .. } | Request::PredictedUpdate { .. });
                        if admission == Admission::Accept {
                            handovers_open += i32::from(updates);
                            prop_assert!(!stop_accepted, "accepted {request:?} after a stop");
                            stop_accepted |= request == Request::Stop;
                        } else {
                            prop_assert_eq!(&state, &before);
                            prop_assert!(request != Request::Stop || stop_accepted, "a stop is never refused");
                        }
                        // A trigger is never answered with an error, because nobody reads it.
                        let denied = matches!(admission, Admission::Deny { .. });
                        let by_trigger = matches!(request, Request::PredictedUpdate { .. });
                        prop_assert!(!(denied && by_trigger));
                    }
                    Step::Happens(event) => {
                        if state.on(event) {
                            handovers_open -= i32::from(event == Event::HandoverEnded);
                        } else {
                            prop_assert_eq!(&state, &before);
                        }
                    }
                }
                prop_assert!((0..=1).contains(&handovers_open), "one handover at a time");
                prop_assert_eq!(state.target.is_some(), handovers_open == 1);
                let idle = matches!(state.activity, Activity::Serving | Activity::Stopping | Activity::Stopped);
                prop_assert_eq!(idle, handovers_open == 0);
                prop_assert!(!(state.stop_wanted && state.activity == Activity::Serving), "a stop is not forgotten");
            }
        }
    }
}
