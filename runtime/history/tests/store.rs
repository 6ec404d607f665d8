//! The store through its public face, on real files.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use warmswap_history::{BlobKind, DaysRun, History, HistoryError, LOOK_BACK_DAYS, Retention, STEPS_KEPT};
use warmswap_model::{
    CgroupId, ConnectionCounts, Durations, FeatureWindow, Generation, HandoverReport, LatencyHistogram, PerResource,
    ProbeCounts, Rung, ServiceName, StateMove, StepTiming, Trigger, Verdict,
};

/// A full minute, so that minutes and windows begin together.
const START_MS: u64 = 1_800_000_000_000;

fn name(text: &str) -> ServiceName {
    ServiceName::new(text).expect("a valid name")
}

fn window(end_unix_ms: u64, cpu: f64) -> FeatureWindow {
    FeatureWindow {
        cgroup: CgroupId(77),
        end_unix_ms,
        length_ms: 1000,
        usage: PerResource { cpu, memory: 100.0 + cpu, network: 1.25, disk: 0.5 },
        counts: ProbeCounts { reads: 1234, tcp_resets_received: 2, page_faults: u64::MAX / 128, ..Default::default() },
        durations: Durations {
            request_latency: LatencyHistogram { buckets: vec![(1024, 3), (2048, 40), (1 << 30, 1)] },
            block_latency: LatencyHistogram { buckets: vec![(4096, 2)] },
            ..Durations::default()
        },
    }
}

fn report(id: u64, service: &str) -> HandoverReport {
    HandoverReport {
        id,
        service: name(service),
        from: Generation(1),
        to: Generation(2),
        from_image: "v1".into(),
        to_image: "v2".into(),
        trigger: Trigger::MemoryExhaustion { seconds_left: 9 },
        rung: Rung::Full,
        verdict: Verdict::RolledBack,
        reason: Some("p99 rose".into()),
        lost: Vec::new(),
        started_unix_ms: START_MS,
        duration_ms: 12.5,
        phases: Vec::new(),
        steps: Vec::new(),
        blackouts: Vec::new(),
        connections: ConnectionCounts::default(),
        state: StateMove::PreCopied,
        state_bytes: 1 << 30,
        before: None,
        after: None,
        forecast: None,
        reservation: PerResource::default(),
    }
}

#[test]
fn steps_are_kept_of_the_latest_handovers_only() {
    let folder = tempfile::tempdir().unwrap();
    let history = History::open(folder.path()).unwrap();
    let steps = vec![StepTiming { at_us: 1.5, what: "tell g2 Own".into() }];
    let count = STEPS_KEPT as u64 + 3;
    for id in 1..=count {
        history.append_report(&HandoverReport { steps: steps.clone(), ..report(id, "a") }).unwrap();
        history.append_report(&HandoverReport { steps: steps.clone(), ..report(id, "a-b") }).unwrap();
    }
    let kept = history.reports(&name("a")).unwrap();
    assert_eq!(kept.len() as u64, count);
    for report in kept {
        assert_eq!(report.steps.is_empty(), report.id <= count - STEPS_KEPT as u64, "{report:?}");
    }
}

fn fill(history: &History, service: &str, seconds: u64) {
    for second in 1..=seconds {
        history.append_windows(&[(name(service), window(START_MS + second * 1000, second as f64))]).expect("an append");
    }
}

#[test]
fn everything_comes_back_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (name("a"), name("a-b"));
    {
        let history = History::open(folder.path()).unwrap();
        history
            .append_windows(&[(a.clone(), window(START_MS + 1000, 10.0)), (b.clone(), window(START_MS + 1000, 20.0))])
            .unwrap();
        history.append_windows(&[(a.clone(), window(START_MS + 2000, 11.0))]).unwrap();
        history.append_report(&report(1, "a")).unwrap();
        history.append_report(&report(2, "a-b")).unwrap();
        assert_eq!(history.next_handover_id().unwrap(), 1);
        assert_eq!(history.next_handover_id().unwrap(), 2);
        history.put_blob(BlobKind::Model, "seconds", b"weights").unwrap();
        history.put_blob(BlobKind::Tuner, "seconds", b"").unwrap();
    }
    let history = History::open(folder.path()).unwrap();
    let all = 0..u64::MAX;
    assert_eq!(
        history.windows(&a, all.clone()).unwrap(),
        [window(START_MS + 1000, 10.0), window(START_MS + 2000, 11.0)]
    );
    assert_eq!(history.windows(&b, all.clone()).unwrap(), [window(START_MS + 1000, 20.0)]);
    assert_eq!(history.windows(&a, START_MS + 1001..START_MS + 2001).unwrap().len(), 1);
    assert_eq!(history.windows(&a, 5..5).unwrap(), []);
    #[expect(clippy::reversed_empty_ranges, reason = "a range from a user may be upside down")]
    let reversed = 9..3;
    assert_eq!(history.windows(&a, reversed).unwrap(), []);
    assert_eq!(history.windows(&name("unknown"), all).unwrap(), []);
    assert_eq!(history.services().unwrap(), [a.clone(), b]);
    assert_eq!(history.reports(&a).unwrap(), [report(1, "a")]);
    assert_eq!(history.next_handover_id().unwrap(), 3);
    assert_eq!(history.get_blob(BlobKind::Model, "seconds").unwrap().as_deref(), Some(&b"weights"[..]));
    assert_eq!(history.get_blob(BlobKind::Tuner, "seconds").unwrap().as_deref(), Some(&b""[..]));
    assert_eq!(history.get_blob(BlobKind::Tuner, "other").unwrap(), None);
}

#[test]
fn a_full_minute_is_summed_up_even_across_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let service = name("a");
    let history = History::open(folder.path()).unwrap();
    fill(&history, "a", 30);
    drop(history);
    let history = History::open(folder.path()).unwrap();
    for second in 31..=61 {
        history
            .append_windows(&[(service.clone(), window(START_MS + second * 1000, second as f64))])
            .expect("an append");
    }
    let minutes = history.minutes(&service, 0..u64::MAX).unwrap();
    assert_eq!(minutes.len(), 1, "{minutes:?}");
    let minute = &minutes[0];
    assert_eq!(minute.end_unix_ms, START_MS + 60_000);
    assert_eq!(minute.length_ms, 60_000);
    assert!((minute.usage.cpu - 30.5).abs() < 1e-9, "the mean of 1 to 60: {}", minute.usage.cpu);
    assert!((minute.usage.memory - 160.0).abs() < 1e-9, "the highest second: {}", minute.usage.memory);
    assert_eq!(minute.counts.reads, 60 * 1234);
    assert_eq!(minute.durations.request_latency.count(), 60 * 44);
}

#[test]
fn retention_keeps_young_seconds_minutes_and_the_newest_reports() {
    let folder = tempfile::tempdir().unwrap();
    let history = History::open(folder.path()).unwrap();
    fill(&history, "a", 185);
    fill(&history, "b", 5);
    for id in 1..=7 {
        history.append_report(&report(id, "a")).unwrap();
    }
    let retention = Retention { seconds_keep_s: 60, minutes_keep_s: 3600, reports_max: 3, ..Retention::default() };
    let now = START_MS + 185_000;
    let removed = history.enforce_retention(now, &retention).unwrap();
    assert_eq!((removed.seconds, removed.minutes, removed.reports), (124 + 5, 0, 4));
    let seconds = history.windows(&name("a"), 0..u64::MAX).unwrap();
    assert_eq!(seconds.first().map(|w| w.end_unix_ms), Some(START_MS + 125_000));
    assert_eq!(history.minutes(&name("a"), 0..u64::MAX).unwrap().len(), 3);
    assert_eq!(history.reports(&name("a")).unwrap().iter().map(|r| r.id).collect::<Vec<_>>(), [5, 6, 7]);
    assert_eq!(history.services().unwrap(), [name("a")], "a service without windows is forgotten");
    assert_eq!(history.enforce_retention(now, &retention).unwrap(), Default::default(), "nothing is left to do");

    // The forgotten service may come back.
    history.append_windows(&[(name("b"), window(now, 1.0))]).unwrap();
    assert_eq!(history.services().unwrap().len(), 2);
}

#[test]
fn what_a_service_keeps_grows_with_the_days_on_which_it_ran() {
    let retention = Retention {
        seconds_keep_s: 1000,
        seconds_keep_min_s: 200,
        minutes_keep_s: 10_000,
        minutes_keep_min_s: 4000,
        ..Retention::default()
    };
    let keep = |run, seen| retention.keep_s(DaysRun { run, seen });
    assert_eq!(keep(0, 28), (200, 4000));
    assert_eq!(keep(14, 28), (600, 7000));
    assert_eq!(keep(28, 28), (1000, 10_000));
    assert_eq!(keep(1, 1), (1000, 10_000), "a new service is not a rare one");
    assert_eq!(keep(9, 3), (1000, 10_000), "never above the maximum");
    assert_eq!(keep(0, 0), (200, 4000));
    let wrong = Retention { seconds_keep_min_s: 5000, minutes_keep_s: u64::MAX, minutes_keep_min_s: 0, ..retention };
    assert_eq!(wrong.keep_s(DaysRun { run: 28, seen: 28 }), (1000, u64::MAX), "the maximum is the harder limit");
    let default = Retention::default();
    assert!(default.minutes_keep_min_s >= LOOK_BACK_DAYS * 24 * 3600, "deleting must not change the next decision");
}

#[test]
fn a_rare_service_keeps_less_than_one_that_runs_daily() {
    const DAY_MS: u64 = 24 * 3600 * 1000;
    let folder = tempfile::tempdir().unwrap();
    let history = History::open(folder.path()).unwrap();
    // Two minutes of every day, and of every 20th; the second of the next day closes the minute before.
    for day in 0..=100u64 {
        let begin = START_MS + day * DAY_MS;
        let mut windows = Vec::new();
        for at in [begin + 1000, begin + 61_000] {
            windows.push((name("daily"), window(at, 1.0)));
            if day % 20 == 0 {
                windows.push((name("rare"), window(at, 1.0)));
            }
        }
        history.append_windows(&windows).unwrap();
    }
    let now = START_MS + 100 * DAY_MS + 62_000;
    history.enforce_retention(now, &Retention::default()).unwrap();
    let oldest_days = |service: &str| (now - history.minutes(&name(service), 0..now).unwrap()[0].end_unix_ms) / DAY_MS;
    assert_eq!(oldest_days("daily"), 90 - 1, "the maximum");
    assert_eq!(oldest_days("rare"), 20, "two of 28 days: 32 days are kept, and in them it ran 20 days ago");
    assert_eq!(history.enforce_retention(now, &Retention::default()).unwrap(), Default::default(), "decided the same");
}

#[test]
fn a_report_that_could_not_be_read_back_is_refused_and_the_others_stay_readable() {
    let folder = tempfile::tempdir().unwrap();
    let history = History::open(folder.path()).unwrap();
    history.append_report(&report(1, "a")).unwrap();
    let bad = HandoverReport { duration_ms: f64::NAN, ..report(2, "a") };
    assert!(matches!(history.append_report(&bad), Err(HistoryError::Encode { .. })));
    assert_eq!(history.reports(&name("a")).unwrap(), [report(1, "a")]);
}

#[test]
fn windows_from_a_clock_that_ran_ahead_are_deleted() {
    let folder = tempfile::tempdir().unwrap();
    let history = History::open(folder.path()).unwrap();
    fill(&history, "a", 3);
    history.append_windows(&[(name("a"), window(START_MS * 2, 1.0)), (name("a"), window(u64::MAX, 1.0))]).unwrap();
    fill(&history, "a", 4);
    history.enforce_retention(START_MS + 5000, &Retention::default()).unwrap();
    assert_eq!(history.windows(&name("a"), 0..u64::MAX).unwrap().len(), 4);
}

#[test]
fn the_file_stays_bounded_however_long_it_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let history = History::open(folder.path()).unwrap();
    let limit = 300_000;
    let retention = Retention { windows_bytes_max: limit, ..Retention::default() };
    let mut sizes = Vec::new();
    for round in 0..12u64 {
        let windows: Vec<_> = (1..=2000u64)
            .map(|second| (name("a"), window(START_MS + (round * 2000 + second) * 1000, second as f64)))
            .collect();
        history.append_windows(&windows).unwrap();
        history.enforce_retention(START_MS + (round + 1) * 2_000_000, &retention).unwrap();
        sizes.push(fs::metadata(file(folder.path())).unwrap().len());
    }
    assert!(!history.windows(&name("a"), 0..u64::MAX).unwrap().is_empty());
    assert_eq!(sizes[5], sizes[11], "the file still grows: {sizes:?}");
    assert!(sizes[11] < 20 * limit, "{sizes:?}");
}

fn file(folder: &Path) -> std::path::PathBuf {
    folder.join("history.redb")
}

#[test]
fn a_second_agent_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let _first = History::open(folder.path()).unwrap();
    let error = History::open(folder.path()).unwrap_err();
    assert!(matches!(error, HistoryError::InUse { .. }), "{error}");
    assert!(error.to_string().contains("history.redb"), "{error}");
}

/// Opens and uses a file that may be damaged: an error is right, a panic or other content is not.
fn use_it(folder: &Path) -> Result<(), HistoryError> {
    let history = History::open(folder)?;
    let windows = history.windows(&name("a"), 0..u64::MAX)?;
    for (at, one) in windows.iter().enumerate() {
        let second = at as u64 + 1;
        assert_eq!(*one, window(START_MS + second * 1000, second as f64), "damage was read as content");
    }
    history.minutes(&name("a"), 0..u64::MAX)?;
    history.append_windows(&[(name("a"), window(START_MS + 10_000_000, 1.0))])?;
    history.enforce_retention(START_MS + 10_000_000, &Retention::default())?;
    Ok(())
}

#[test]
fn a_damaged_file_is_refused_by_name_and_never_panics() {
    let folder = tempfile::tempdir().unwrap();
    fill(&History::open(folder.path()).unwrap(), "a", 150);
    let whole = fs::read(file(folder.path())).unwrap();
    let used = whole.iter().rposition(|byte| *byte != 0).unwrap();
    let (mut refused, mut tried) = (0, 0);
    for round in 0..120usize {
        let mut bad = whole.clone();
        let at = if round < 40 { round * 8 } else { (round * 7919 * 4096 + round * 613) % used };
        let length = [1, 16, 512][round % 3];
        for byte in bad.iter_mut().skip(at).take(length) {
            *byte = byte.wrapping_add(0x5b);
        }
        let broken = tempfile::tempdir().unwrap();
        fs::write(file(broken.path()), bad).unwrap();
        tried += 1;
        if let Err(error) = use_it(broken.path()) {
            refused += 1;
            assert!(error.to_string().contains("history.redb"), "{error}");
            assert!(fs::metadata(file(broken.path())).is_ok(), "the file is left where it is");
        }
    }
    println!("{refused} of {tried} damaged files were refused, the others held their content");
    assert!(refused > tried / 4, "damage is hardly ever noticed: {refused} of {tried}");

    for length in [1, 100, 4096, whole.len() / 2] {
        let broken = tempfile::tempdir().unwrap();
        fs::write(file(broken.path()), &whole[..length]).unwrap();
        let error = use_it(broken.path()).expect_err("a truncated file was accepted");
        assert!(matches!(error, HistoryError::Damaged { .. }), "{length} bytes: {error:?}");
        assert!(error.to_string().contains("move it away"), "{error}");
    }
    let text = tempfile::tempdir().unwrap();
    fs::write(file(text.path()), "this is no database\n".repeat(1000)).unwrap();
    assert!(matches!(use_it(text.path()), Err(HistoryError::Damaged { .. })));
}

#[test]
fn a_copy_taken_at_any_moment_opens_with_all_that_was_committed() {
    // What a kill leaves is what the file holds at that moment: no buffer of ours is written later.
    let folder = tempfile::tempdir().unwrap();
    let history = History::open(folder.path()).unwrap();
    for second in 1..=70u64 {
        history.append_windows(&[(name("a"), window(START_MS + second * 1000, second as f64))]).expect("an append");
        if second % 7 == 0 {
            let copy = tempfile::tempdir().unwrap();
            fs::copy(file(folder.path()), file(copy.path())).unwrap();
            let copy = History::open(copy.path()).unwrap();
            assert_eq!(copy.windows(&name("a"), 0..u64::MAX).unwrap().len() as u64, second);
        }
    }
}

const CHILD_FOLDER: &str = "WARMSWAP_TEST_HISTORY_FOLDER";

/// Seconds that the killed process keeps, few enough that every round deletes.
const CHILD_KEEPS_S: u64 = 90;
/// Several pages of the database, so that a model that was saved in part would be seen.
const MODEL_BYTES: usize = 40_000;

fn model(tick: u64, key: &str) -> Vec<u8> {
    let seed = [tick.to_le_bytes().as_slice(), key.as_bytes()].concat();
    seed.iter().copied().cycle().take(MODEL_BYTES).collect()
}

/// Not a test of its own: the process that the next test kills. Says each thing that the store has acknowledged.
#[test]
fn child_that_writes_until_it_is_killed() {
    let Some(folder) = std::env::var_os(CHILD_FOLDER) else { return };
    let history = History::open(folder).unwrap();
    let newest = history.windows(&name("a"), 0..u64::MAX).unwrap().last().map_or(START_MS, |w| w.end_unix_ms);
    let retention = Retention { seconds_keep_s: CHILD_KEEPS_S, ..Retention::default() };
    for tick in (newest - START_MS) / 1000 + 1.. {
        let at = window(START_MS + tick * 1000, tick as f64);
        history.append_windows(&[(name("a"), at.clone()), (name("b"), at)]).unwrap();
        println!("appended {tick}");
        for key in ["a", "b"] {
            history.put_blob(BlobKind::Model, key, &model(tick, key)).unwrap();
            println!("saved-{key} {tick}");
        }
        if tick % 5 == 0 {
            history.enforce_retention(START_MS + tick * 1000, &retention).unwrap();
            println!("retained {tick}");
        }
    }
}

#[test]
fn a_kill_loses_nothing_that_was_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = 0x5eed_u64;
    let (mut appended, mut retained, mut saved) = (0, 0, [0, 0]);
    for round in 0..25 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_writes_until_it_is_killed", "--nocapture"])
            .env(CHILD_FOLDER, folder.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut note = |line: &str| {
            // The harness prints the test's name in front of the first line.
            let mut words = line.rsplit(' ');
            let Some(tick) = words.next().and_then(|n| n.parse().ok()) else { return };
            match words.next() {
                Some("appended") => appended = tick,
                Some("retained") => retained = tick,
                Some("saved-a") => saved[0] = tick,
                Some("saved-b") => saved[1] = tick,
                _ => {}
            }
        };
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        for _ in 0..10 + (random >> 33) % 60 {
            note(&lines.next().expect("the child ended by itself").unwrap());
        }
        // And then anywhere inside a transaction.
        std::thread::sleep(Duration::from_micros((random >> 40) % 8000));
        child.kill().unwrap();
        child.wait().unwrap();
        lines.map_while(Result::ok).for_each(|line| note(&line));

        let history = History::open(folder.path()).unwrap();
        let windows = history.windows(&name("a"), 0..u64::MAX).unwrap();
        let ticks: Vec<u64> = windows.iter().map(|w| (w.end_unix_ms - START_MS) / 1000).collect();
        let (first, last) = (ticks[0], *ticks.last().unwrap());
        assert!(
            last == appended || last == appended + 1,
            "round {round}: {appended} was acknowledged, {last} is there"
        );
        assert_eq!(ticks, (first..=last).collect::<Vec<_>>(), "round {round}: a tick is missing");
        assert!(windows.iter().zip(&ticks).all(|(w, tick)| *w == window(w.end_unix_ms, *tick as f64)), "round {round}");
        assert_eq!(history.windows(&name("b"), 0..u64::MAX).unwrap(), windows, "round {round}: a tick was torn");
        let oldest = retained.saturating_sub(CHILD_KEEPS_S).max(1);
        assert!((oldest..=oldest + 5).contains(&first), "round {round}: {first} is the oldest, not {oldest}");
        let minutes = history.minutes(&name("a"), 0..u64::MAX).unwrap();
        assert_eq!(minutes.len() as u64, (last - 1) / 60, "round {round}: a minute that ended is missing");
        for (key, saved) in ["a", "b"].into_iter().zip(saved) {
            let bytes = history.get_blob(BlobKind::Model, key).unwrap().expect("the model is there");
            let whole = (saved..=saved + 1).any(|tick| bytes == model(tick, key));
            assert!(whole, "round {round}: the model acknowledged at {saved} is missing or mixed");
        }
    }
    println!("killed 25 times in {appended} ticks");
    assert!(retained > 2 * CHILD_KEEPS_S, "retention had nothing to delete: {appended} ticks");
}

#[test]
fn a_tick_of_many_services_is_cheap() {
    let folder = tempfile::tempdir().unwrap();
    let history = History::open(folder.path()).unwrap();
    let mut took = Vec::new();
    for tick in 1..=30u64 {
        let windows: Vec<_> = (0..20).map(|n| (name(&format!("s{n}")), window(START_MS + tick * 1000, 5.0))).collect();
        let begun = Instant::now();
        history.append_windows(&windows).unwrap();
        took.push(begun.elapsed());
    }
    took.sort();
    let size = fs::metadata(file(folder.path())).unwrap().len();
    println!("tick of 20 services: median {:?}, worst {:?}; file {} KB", took[15], took[29], size / 1000);
    assert!(took[15].as_millis() < 500, "a tick must stay below a second");
}
