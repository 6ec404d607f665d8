//! When to hand over without being asked: by the schedule, because the image has changed, or because memory will meet
//! its limit.
//!
//! The state is to be kept across restarts of the agent; what has fired is written into it, so nothing fires twice.

use serde::{Deserialize, Serialize};
use warmswap_model::{Schedule, Trigger};

use crate::trend::memory_exhaustion;

const DAY_S: u64 = 24 * 3600;
const MINUTE_S: u64 = 60;
/// A scheduled time that was missed (the agent was busy, down, or the host asleep) is made up for within this time, and
/// not later: an update planned for the night must not happen at noon.
const CATCH_UP_S: u64 = 3600;
/// How often in a row a new image must be seen unchanged, so that one that is still being written is left alone.
const IMAGE_CHECKS: u32 = 2;
/// Pause after a handover for memory, so that one that was aborted is not tried again at every tick.
const MEMORY_PAUSE_S: u64 = 300;

/// What has been seen and what has fired.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct TriggerState {
    /// Scheduled times up to here have fired or passed.
    schedule_done_unix_s: Option<u64>,
    /// A digest other than the running one, and how often in a row it was seen.
    image_seen: Option<(String, u32)>,
    /// The digest that a handover was started for. Not tried again: it was taken, or it was rolled back.
    image_fired: Option<String>,
    memory_fired_unix_s: Option<u64>,
}

#[derive(Debug, Clone, Copy)]
pub struct TriggerInput<'a> {
    pub now_unix_s: u64,
    pub schedule: &'a Schedule,
    pub running_digest: &'a str,
    /// What the image now is; `None` when it was not looked at for this call (or cannot be read).
    pub image_digest: Option<&'a str>,
    /// (seconds, MB) of the active generation, ascending in time.
    pub memory: &'a [(f64, f64)],
    pub memory_limit_mb: f64,
}

/// At most one trigger per call; what is not returned now is found again at the next call. Memory comes first, because it
/// cannot wait.
pub fn triggers(state: &mut TriggerState, input: &TriggerInput<'_>) -> Option<Trigger> {
    memory_trigger(state, input).or_else(|| image_trigger(state, input)).or_else(|| schedule_trigger(state, input))
}

fn memory_trigger(state: &mut TriggerState, input: &TriggerInput<'_>) -> Option<Trigger> {
    let horizon_s = input.schedule.before_memory_exhaustion_s?;
    let now = input.now_unix_s;
    // A clock that was set back must not silence this for longer than the pause.
    let pausing = state.memory_fired_unix_s.is_some_and(|fired| now >= fired && now < fired + MEMORY_PAUSE_S);
    if pausing {
        return None;
    }
    let forecast = memory_exhaustion(input.memory, input.memory_limit_mb, horizon_s as f64)?;
    state.memory_fired_unix_s = Some(now);
    Some(Trigger::MemoryExhaustion { seconds_left: forecast.seconds_left as u64 })
}

fn image_trigger(state: &mut TriggerState, input: &TriggerInput<'_>) -> Option<Trigger> {
    let digest = input.image_digest.filter(|_| input.schedule.watch_image)?;
    if digest == input.running_digest {
        state.image_seen = None;
        state.image_fired = None;
        return None;
    }
    let times = match &state.image_seen {
        Some((seen, times)) if seen == digest => times.saturating_add(1),
        _ => 1,
    };
    state.image_seen = Some((digest.to_owned(), times));
    if times < IMAGE_CHECKS || state.image_fired.as_deref() == Some(digest) {
        return None;
    }
    state.image_fired = Some(digest.to_owned());
    Some(Trigger::ImageChanged)
}

fn schedule_trigger(state: &mut TriggerState, input: &TriggerInput<'_>) -> Option<Trigger> {
    let now = input.now_unix_s;
    let done = match state.schedule_done_unix_s {
        Some(done) if done <= now => done.max(now.saturating_sub(CATCH_UP_S)),
        // The clock was set back. Within a day nothing is repeated; beyond, the old mark is meaningless.
        Some(done) if done < now + DAY_S => return None,
        // First call: times that have passed belong to the past.
        _ => now,
    };
    state.schedule_done_unix_s = Some(now);
    // The last instant of each scheduled time at or before now.
    let due = input.schedule.minutes_utc().map(|minute| {
        let into_day = u64::from(minute) * MINUTE_S;
        let today = now / DAY_S * DAY_S + into_day;
        if today <= now { Some(today) } else { today.checked_sub(DAY_S) }
    });
    due.flatten().any(|at| at > done).then_some(Trigger::Schedule)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIDNIGHT: u64 = 20_000 * DAY_S;

    fn at(hours: u64, minutes: u64) -> u64 {
        MIDNIGHT + hours * 3600 + minutes * 60
    }

    fn schedule(times: &[&str]) -> Schedule {
        Schedule {
            daily_utc: times.iter().map(|t| (*t).to_owned()).collect(),
            watch_image: true,
            before_memory_exhaustion_s: Some(300),
        }
    }

    fn input<'a>(now_unix_s: u64, schedule: &'a Schedule) -> TriggerInput<'a> {
        TriggerInput {
            now_unix_s,
            schedule,
            running_digest: "a",
            image_digest: None,
            memory: &[],
            memory_limit_mb: 500.0,
        }
    }

    fn fired(state: &mut TriggerState, schedule: &Schedule, times: &[u64]) -> Vec<u64> {
        times.iter().copied().filter(|now| triggers(state, &input(*now, schedule)).is_some()).collect()
    }

    #[test]
    fn a_scheduled_time_fires_once_a_day() {
        let schedule = schedule(&["03:30"]);
        let ticks: Vec<u64> = (0..3 * DAY_S).step_by(7).map(|s| MIDNIGHT + s).collect();
        let found = fired(&mut TriggerState::default(), &schedule, &ticks);
        assert_eq!(found.len(), 3);
        assert!(found.iter().all(|now| (now - MIDNIGHT) % DAY_S - (3 * 3600 + 1800) < 7), "{found:?}");
    }

    #[test]
    fn a_missed_time_is_made_up_for_soon_or_not_at_all() {
        let schedule = schedule(&["03:30"]);
        assert_eq!(fired(&mut TriggerState::default(), &schedule, &[at(3, 0), at(4, 10)]), [at(4, 10)]);
        assert!(fired(&mut TriggerState::default(), &schedule, &[at(3, 0), at(12, 0)]).is_empty());
        assert!(fired(&mut TriggerState::default(), &schedule, &[at(3, 40)]).is_empty(), "before the first start");
    }

    #[test]
    fn a_restart_does_not_fire_again() {
        let schedule = schedule(&["03:30"]);
        let mut state = TriggerState::default();
        assert_eq!(fired(&mut state, &schedule, &[at(3, 29), at(3, 30)]), [at(3, 30)]);
        let mut state: TriggerState = serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap();
        assert!(fired(&mut state, &schedule, &[at(3, 30), at(3, 31)]).is_empty());
        assert!(fired(&mut state, &schedule, &[at(3, 10), at(3, 30), at(3, 31)]).is_empty(), "clock set back");
        assert_eq!(fired(&mut state, &schedule, &[at(24 + 3, 29), at(24 + 3, 31)]), [at(24 + 3, 31)]);
    }

    #[test]
    fn times_around_midnight_fire() {
        let schedule = schedule(&["23:59", "00:00"]);
        let mut state = TriggerState::default();
        let times = [at(23, 58), at(23, 59) + 30, at(24, 0) + 2, at(24, 1)];
        assert_eq!(fired(&mut state, &schedule, &times), [times[1], times[2]]);
        let mut state = TriggerState::default();
        assert_eq!(fired(&mut state, &schedule, &[at(23, 58), at(24, 5)]), [at(24, 5)], "both missed, one handover");
    }

    #[test]
    fn a_changed_image_fires_once_when_it_is_stable() {
        let schedule = schedule(&[]);
        let mut state = TriggerState::default();
        let mut see = |running: &str, digest: Option<&str>| {
            let input = TriggerInput { running_digest: running, image_digest: digest, ..input(at(1, 0), &schedule) };
            triggers(&mut state, &input)
        };
        assert_eq!(see("a", Some("a")), None);
        assert_eq!(see("a", Some("b")), None, "seen once");
        assert_eq!(see("a", None), None, "not looked at");
        assert_eq!(see("a", Some("c")), None, "still being written");
        assert_eq!(see("a", Some("c")), Some(Trigger::ImageChanged));
        assert_eq!(see("a", Some("c")), None, "rolled back: not tried again");
        assert_eq!(see("a", Some("d")), None);
        assert_eq!(see("a", Some("d")), Some(Trigger::ImageChanged));
        assert_eq!(see("d", Some("d")), None, "committed");
        assert_eq!((see("d", Some("c")), see("d", Some("c"))), (None, Some(Trigger::ImageChanged)));
    }

    #[test]
    fn memory_fires_with_the_time_left_and_then_pauses() {
        let schedule = schedule(&["03:30"]);
        let leak: Vec<(f64, f64)> = (0..120).map(|s| (f64::from(s), 300.0 + f64::from(s))).collect();
        let mut state = TriggerState::default();
        let mut tick = |now, memory| triggers(&mut state, &TriggerInput { memory, ..input(now, &schedule) });
        match tick(at(3, 0), &leak) {
            Some(Trigger::MemoryExhaustion { seconds_left }) => assert!((78..=84).contains(&seconds_left)),
            other => panic!("{other:?}"),
        }
        assert_eq!(tick(at(3, 4), &leak), None);
        assert!(tick(at(3, 5), &leak).is_some());
        assert_eq!(tick(at(3, 11), &leak[..10]), None);
    }

    proptest! {
        #[test]
        fn however_the_ticks_fall_no_time_fires_twice_a_day(gaps in prop::collection::vec(1_u64..5000, 1..300)) {
            let schedule = schedule(&["00:00", "03:30", "12:15"]);
            let mut now = MIDNIGHT + 5;
            let ticks: Vec<u64> = gaps.iter().map(|gap| { now += gap; now }).collect();
            let days = (now - MIDNIGHT) / DAY_S + 1;
            let found = fired(&mut TriggerState::default(), &schedule, &ticks);
            prop_assert!(found.len() as u64 <= 3 * days);
            prop_assert!(found.windows(2).all(|pair| pair[1] > pair[0]));
        }
    }
}
