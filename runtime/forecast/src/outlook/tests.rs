//! Behaviour of a whole outlook on series that are made here.

use std::ops::ControlFlow;

use warmswap_model::{Champion, Quantiles};

use super::*;
use crate::TrainConfig;
use crate::random::Random;

/// A Monday, midnight.
const START_MS: u64 = 1_798_416_000_000;
const STEP_MS: u64 = 300_000;
const DAY: u64 = 288;

/// A working day: busy from eight to six, and noise that grows with it.
fn daily(step: u64, random: &mut Random) -> f64 {
    let hour = (step % DAY) as f64 / 12.0;
    let busy = if (8.0..18.0).contains(&hour) { 1.0 } else { 0.1 };
    (100.0 * busy * (1.0 + 0.1 * random.normal())).max(0.0)
}

fn history(steps: u64, seed: u64, mut make: impl FnMut(u64, &mut Random) -> f64) -> History {
    let mut random = Random::new(seed);
    (0..steps).map(|step| (START_MS + step * STEP_MS, make(step, &mut random))).collect()
}

/// Mean pinball loss of what was served and of one candidate, and the coverage of what was served, at one horizon.
struct Came {
    served: f64,
    other: f64,
    covered: f64,
}

fn run(outlook: &mut Outlook, id: SeriesId, values: &[(u64, f64)], horizon: usize, other: Champion) -> Came {
    let loss = |band: &Quantiles, actual: f64| crate::calibrate::pinball(&band.to_levels(), actual);
    let (mut came, mut count) = (Came { served: 0.0, other: 0.0, covered: 0.0 }, 0.0);
    for (unix_ms, value) in values {
        outlook.observe(*unix_ms, &[(id, *value)]);
        for scored in outlook.scored(id).filter(|scored| scored.horizon == horizon) {
            let (_, band) = scored.candidates.iter().find(|(who, _)| *who == other).unwrap();
            let Some(band) = band else { continue };
            count += 1.0;
            came.served += loss(&scored.served, scored.actual);
            came.other += loss(band, scored.actual);
            came.covered += f64::from(u8::from(crate::calibrate::inside(&scored.served.to_levels(), scored.actual)));
        }
    }
    Came { served: came.served / count, other: came.other / count, covered: came.covered / count }
}

fn outlook() -> (Outlook, SeriesId) {
    let mut outlook = Outlook::new(OutlookConfig::every(STEP_MS));
    let id = outlook.open("a/cpu");
    (outlook, id)
}

#[test]
fn horizons_are_in_minutes_where_the_clock_allows() {
    assert_eq!(OutlookConfig::minutes().horizons, [5, 15, 30, 60]);
    assert_eq!(OutlookConfig::every(300_000).horizons, [1, 3, 6, 12]);
    assert_eq!(OutlookConfig::every(3_600_000).horizons, [1, 3, 6, 12]);
    assert_eq!(OutlookConfig::every(1000).horizons, [1, 3, 6, 12]);
    assert_eq!(OutlookConfig::every(0).step_ms, 1);
}

#[test]
fn what_happens_every_day_is_foreseen_and_the_interval_is_honest() {
    let (mut outlook, id) = outlook();
    assert!(outlook.bands(id).is_none());
    let values = history(14 * DAY, 1, daily);
    let (past, rest) = values.split_at(7 * DAY as usize);
    run(&mut outlook, id, past, 3, Champion::LastValue);
    let came = run(&mut outlook, id, rest, 3, Champion::LastValue);
    assert!(came.served < 0.6 * came.other, "{} beside {} of the last value", came.served, came.other);
    assert!((0.87..=0.93).contains(&came.covered), "{}", came.covered);
    let [_, _, _, (band, _)] = outlook.bands(id).unwrap();
    assert!(band.to_levels().is_sorted());
    let [.., coverage] = outlook.coverage(id);
    assert!(coverage.is_some_and(|coverage| (0.85..=0.95).contains(&coverage)), "{coverage:?}");
}

#[test]
fn a_trained_network_is_blended_in_and_the_same_history_gives_the_same() {
    let histories: Vec<History> = (0..4).map(|seed| history(7 * DAY, seed, daily)).collect();
    let config = OutlookConfig::every(STEP_MS);
    let brief = TrainConfig { steps_max: 40, ..TrainConfig::default() };
    let train = || train_outlook(&histories, &config, &brief, None, &mut |_| ControlFlow::Continue(())).unwrap();
    let weights = train();
    assert_eq!(weights, train());
    let (mut outlook, id) = outlook();
    let values = history(10 * DAY, 9, daily);
    let (past, rest) = values.split_at(7 * DAY as usize);
    run(&mut outlook, id, past, 0, Champion::LastValue);
    outlook.install(weights).unwrap();
    let came = run(&mut outlook, id, rest, 0, Champion::Lstm);
    assert!(came.served.is_finite() && came.other.is_finite());
    assert!(outlook.scored(id).all(|scored| scored.candidates.iter().all(|(_, band)| band.is_some())));
}

#[test]
fn gaps_duplicates_jumps_of_the_clock_and_no_numbers_are_ordinary() {
    let (mut outlook, id) = outlook();
    let mut random = Random::new(3);
    let at = |step: u64| START_MS + step * STEP_MS;
    for step in 0..600 {
        outlook.observe(at(step), &[(id, daily(step, &mut random))]);
    }
    // Twice, and no number: nothing comes due.
    outlook.observe(at(599), &[(id, 1.0)]);
    assert_eq!(outlook.scored(id).count(), 0);
    for value in [f64::NAN, f64::INFINITY, -1.0] {
        outlook.observe(at(600), &[(id, value)]);
        assert_eq!(outlook.scored(id).count(), 0);
    }
    // Two steps are missing: what was forecast for 603 is compared, and nothing twice.
    outlook.observe(at(603), &[(id, 10.0)]);
    assert_eq!(outlook.scored(id).map(|scored| scored.horizon).collect::<Vec<_>>(), [2, 3]);
    outlook.observe(at(604), &[(id, 10.0)]);
    assert_eq!(outlook.scored(id).map(|scored| scored.horizon).collect::<Vec<_>>(), [0, 2, 3]);
    // A day is missing, and the clock goes back: it begins anew with what is usual.
    for step in [900, 100] {
        outlook.observe(at(step), &[(id, 10.0)]);
        assert_eq!(outlook.scored(id).count(), 0);
        assert!(outlook.bands(id).unwrap().iter().all(|(band, _)| band.to_levels().iter().all(|q| q.is_finite())));
    }
}

#[test]
fn a_constant_is_foreseen_exactly_and_a_series_of_zeros_too() {
    for constant in [0.0, 42.0] {
        let (mut outlook, id) = outlook();
        let values = history(3 * DAY, 1, |_, _| constant);
        run(&mut outlook, id, &values, 0, Champion::LastValue);
        for (band, _) in outlook.bands(id).unwrap() {
            assert!((band.q50 - constant).abs() <= 1e-6 * constant.max(1.0), "{band:?}");
            assert!(band.q99 - constant <= 0.01 * constant.max(1e-3), "{band:?}");
        }
    }
}

#[test]
fn what_was_learned_is_kept_and_a_bad_image_is_refused_by_name() {
    let (mut outlook, id) = outlook();
    let values = history(10 * DAY, 5, daily);
    let (past, rest) = values.split_at(9 * DAY as usize);
    run(&mut outlook, id, past, 0, Champion::LastValue);
    outlook.install(crate::Stepper::weights_of_anything(1)).unwrap();
    let image = outlook.export();
    let mut again = Outlook::new(OutlookConfig::every(STEP_MS));
    again.import(&image).unwrap();
    let id_again = again.open("a/cpu");
    assert_eq!(again.export(), image);
    assert!(again.bands(id_again).is_none(), "nothing recent is known");
    let loss = |outlook: &mut Outlook, id| run(outlook, id, rest, 3, Champion::LastValue).served;
    assert!(loss(&mut again, id_again) < 1.2 * loss(&mut outlook, id));

    let refused = |image: &[u8], words: &str| {
        let mut fresh = Outlook::new(OutlookConfig::every(STEP_MS));
        let error = fresh.import(image).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        assert!(fresh.names.is_empty());
    };
    refused(b"", "does not begin with \"WSWPOUTL\"");
    refused(&crate::Forecaster::new(crate::ForecastConfig::default()).export(), "does not begin with \"WSWPOUTL\"");
    refused(&image[..image.len() - 1], "cut off or added to");
    for at in [8, 30, image.len() / 2, image.len() - 1] {
        let mut flipped = image.clone();
        flipped[at] ^= 4;
        refused(&flipped, if at == 8 { "version" } else { "digest does not match" });
    }
    let other = Outlook::new(OutlookConfig::minutes()).export();
    refused(&other, "horizons [1, 3, 6, 12]");
}
