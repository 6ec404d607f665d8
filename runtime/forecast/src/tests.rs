//! Behaviour of the whole forecaster on series that are made here.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use burn::tensor::{Device, Tensor, TensorData};
use proptest::prelude::*;
use warmswap_model::{
    CgroupId, Champion, Durations, FeatureWindow, PerResource, ProbeCounts, Quantiles, Resource, ServiceName,
};

use crate::lstm::{Batch, HIDDEN, INPUTS, ModelWeights, Network, OUTPUTS};
use crate::random::Random;
use crate::train::{Lstm, numbers};
use crate::{ForecastConfig, Forecaster, ImportError, LstmState, TrainConfig, TrainError, train};

const START_MS: u64 = 1_800_000_000_000;

fn window(end_unix_ms: u64, usage: [f64; 4]) -> FeatureWindow {
    let [cpu, memory, network, disk] = usage;
    FeatureWindow {
        cgroup: CgroupId(1),
        end_unix_ms,
        length_ms: 1000,
        usage: PerResource { cpu, memory, network, disk },
        counts: ProbeCounts { reads: (cpu.abs() * 100.0) as u64, ..ProbeCounts::default() },
        durations: Durations::default(),
    }
}

fn service(n: usize) -> ServiceName {
    ServiceName::new(format!("s{n}")).unwrap()
}

/// A load that comes in waves with a sharp edge, which the last value is always late for.
fn periodic(step: u64, random: &mut Random) -> [f64; 4] {
    let phase = (step % 20) as f64 / 20.0;
    let edge = if phase < 0.4 { 1.0 } else { 0.0 };
    let wave = (phase * std::f64::consts::TAU).sin();
    [
        (30.0 + 40.0 * edge + random.normal()).max(0.0),
        200.0 + 15.0 * wave + 0.5 * random.normal(),
        (5.0 + 6.0 * edge + 0.2 * random.normal()).max(0.0),
        (2.0 + 1.5 * wave + 0.1 * random.normal()).max(0.0),
    ]
}

fn history(steps: u64, seed: u64, mut make: impl FnMut(u64, &mut Random) -> [f64; 4]) -> Vec<FeatureWindow> {
    let mut random = Random::new(seed);
    (0..steps).map(|step| window(START_MS + step * 1000, make(step, &mut random))).collect()
}

fn run(forecaster: &mut Forecaster, name: &ServiceName, windows: &[FeatureWindow]) {
    for window in windows {
        forecaster.observe(window.end_unix_ms, &[(name.clone(), window)]);
    }
}

fn no_limit() -> impl FnMut(crate::Progress) -> ControlFlow<()> {
    |_| ControlFlow::Continue(())
}

fn levels_ascend(q: &Quantiles) -> bool {
    q.to_levels().windows(2).all(|pair| pair[0] <= pair[1]) && q.to_levels().iter().all(|v| v.is_finite() && *v >= 0.0)
}

#[test]
fn the_fused_step_equals_burns_forward() {
    let mut random = Random::new(3);
    let mut weights = ModelWeights::untrained(1, || random.signed());
    weights.head.fill_with(|| random.signed());
    let (rows, steps) = (7, 25);
    let inputs: Vec<f32> = (0..steps * rows * INPUTS).map(|_| 3.0 * random.signed()).collect();

    let device = Device::flex();
    let tensor = |values: Vec<f32>, shape: [usize; 2]| Tensor::<2>::from_data(TensorData::new(values, shape), &device);
    let zero = || tensor(vec![0.0; rows * HIDDEN], [rows, HIDDEN]);
    let lstm = Lstm::new(&weights, &device);
    let (raw, hidden, cell) = lstm.forward(tensor(inputs.clone(), [steps * rows, INPUTS]), steps, zero(), zero());
    let (raw, hidden, cell) = (numbers(raw), numbers(hidden), numbers(cell));

    let network = Network::new(&weights);
    let mut batch = Batch::default();
    batch.resize(rows);
    for row in 0..rows {
        batch.set(row, &[0.0; INPUTS], &[0.0; HIDDEN], &[0.0; HIDDEN]);
    }
    let close = |a: &[f32], b: &[f32], what: &str| {
        assert_eq!(a.len(), b.len());
        let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-4, "{what} differs by {worst}");
    };
    for step in 0..steps {
        for row in 0..rows {
            let (hidden, cell) = (batch.hidden(row).to_vec(), batch.cell(row).to_vec());
            let at = (step * rows + row) * INPUTS;
            batch.set(row, &inputs[at..at + INPUTS], &hidden, &cell);
        }
        network.step(&mut batch);
        for row in 0..rows {
            let at = (step * rows + row) * OUTPUTS;
            close(batch.raw(row), &raw[at..at + OUTPUTS], "an output");
        }
    }
    for row in 0..rows {
        close(batch.hidden(row), &hidden[row * HIDDEN..(row + 1) * HIDDEN], "the hidden state");
        close(batch.cell(row), &cell[row * HIDDEN..(row + 1) * HIDDEN], "the cell state");
    }
}

#[test]
fn ninety_percent_intervals_cover_under_drift() {
    // Level, slope and noise all change while it runs, for each resource at another time.
    for seed in 0..4 {
        let mut levels = [40.0, 300.0, 10.0, 3.0];
        let windows = history(3000, seed, |step, random| {
            for (at, level) in levels.iter_mut().enumerate() {
                let regime = (step as usize / 400 + at) % 3;
                let size = *level * [0.002, 0.01, 0.004][regime];
                *level = (*level + size * random.normal() + size * 0.1).clamp(1.0, 1e5);
            }
            let spread = 1.0 + (step / 700) as f64;
            levels.map(|level| (level + 0.01 * level * spread * random.normal()).max(0.0))
        });
        let mut forecaster = Forecaster::new(ForecastConfig::default());
        let name = service(0);
        let mut covered = [0usize; 4];
        let mut total = 0usize;
        for (step, one) in windows.iter().enumerate() {
            forecaster.observe(one.end_unix_ms, &[(name.clone(), one)]);
            let demand = forecaster.demand(&name).unwrap();
            if step < 200 || step + 5 >= windows.len() {
                continue;
            }
            let ahead = &windows[step + 1..=step + 5];
            total += 1;
            for (at, resource) in Resource::ALL.into_iter().enumerate() {
                let values = ahead.iter().map(|w| w.usage[resource]);
                let actual =
                    if resource == Resource::Memory { values.fold(0.0, f64::max) } else { values.sum::<f64>() / 5.0 };
                let q = demand.quantiles[resource];
                covered[at] += usize::from(q.q05 <= actual && actual <= q.q95);
            }
        }
        for (resource, covered) in Resource::ALL.into_iter().zip(covered) {
            let share = covered as f64 / total as f64;
            println!("seed {seed} {resource}: coverage {share:.3}");
            assert!((0.85..=0.95).contains(&share), "seed {seed}: {resource} covered {share:.3}");
        }
    }
}

#[test]
fn an_lstm_learns_a_periodic_load_and_beats_the_last_value_clearly() {
    let windows = history(1200, 5, periodic);
    let (past, future) = windows.split_at(600);
    let begun = Instant::now();
    let config = ForecastConfig::default();
    let weights = train(&[past.to_vec()], &config, &TrainConfig::default(), None, &mut no_limit()).unwrap();
    println!("trained {} steps in {:.1} s: {:?}", weights.steps, begun.elapsed().as_secs_f64(), weights.validation);
    assert!(weights.validation.loss < weights.validation.loss_before, "{:?}", weights.validation);

    let mut forecaster = Forecaster::new(config);
    let name = service(0);
    run(&mut forecaster, &name, past);
    forecaster.install(weights).unwrap();
    run(&mut forecaster, &name, future);
    let report = forecaster.explain(&name).unwrap();
    assert_eq!(report.lstm, LstmState::Competes);
    for resource in [Resource::Cpu, Resource::Memory, Resource::Network] {
        let loss = |who: Champion| {
            report.resources[resource].candidates.iter().find(|c| c.candidate == who).and_then(|c| c.loss).unwrap()
        };
        println!("{resource}: {}", report.resources[resource].why);
        assert!(loss(Champion::Lstm) < 0.5 * loss(Champion::LastValue), "{resource}: {report:#?}");
    }
    assert_eq!(report.resources.cpu.champion, Champion::Lstm, "{}", report.resources.cpu.why);
}

#[test]
fn an_lstm_does_not_serve_before_it_has_evidence() {
    let windows = history(300, 6, periodic);
    let config = ForecastConfig::default();
    let brief = TrainConfig { steps_max: 40, ..TrainConfig::default() };
    let weights = train(std::slice::from_ref(&windows), &config, &brief, None, &mut no_limit()).unwrap();
    let mut forecaster = Forecaster::new(config.clone());
    let name = service(0);
    run(&mut forecaster, &name, &windows[..200]);
    assert_eq!(forecaster.explain(&name).unwrap().lstm, LstmState::NotTrained);
    forecaster.install(weights).unwrap();
    let proving = config.evidence_min as usize + config.horizon_steps - 1;
    for one in &windows[200..200 + proving] {
        run(&mut forecaster, &name, std::slice::from_ref(one));
        let report = forecaster.explain(&name).unwrap();
        assert!(matches!(report.lstm, LstmState::Proving { .. }), "{:?}", report.lstm);
        for resource in Resource::ALL {
            assert_ne!(report.resources[resource].champion, Champion::Lstm);
        }
    }
    run(&mut forecaster, &name, &windows[200 + proving..=200 + proving]);
    assert_eq!(forecaster.explain(&name).unwrap().lstm, LstmState::Competes);
}

#[test]
fn training_is_interruptible_repeatable_and_continues_from_earlier_weights() {
    let slice = [history(400, 7, periodic)];
    let config = ForecastConfig::default();
    let brief = TrainConfig { steps_max: 60, ..TrainConfig::default() };
    let mut stop_at_once = |_| ControlFlow::Break(());
    assert_eq!(train(&slice, &config, &brief, None, &mut stop_at_once), Err(TrainError::Interrupted));
    let mut steps = 0;
    let mut stop_later = |progress: crate::Progress| {
        steps = progress.step;
        if progress.step >= 30 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    train(&slice, &config, &brief, None, &mut stop_later).unwrap();
    assert_eq!(steps, 30);

    let first = train(&slice, &config, &brief, None, &mut no_limit()).unwrap();
    assert_eq!(Ok(&first), train(&slice, &config, &brief, None, &mut no_limit()).as_ref());
    let second = train(&slice, &config, &brief, Some(&first), &mut no_limit()).unwrap();
    assert!((second.validation.loss_before - first.validation.loss).abs() < 1e-9, "began from the earlier weights");
    assert!(second.validation.loss <= first.validation.loss, "{:?} after {:?}", second.validation, first.validation);
    assert!(second.steps > first.steps);
    assert_eq!(second.trained_until_unix_ms, slice[0].last().unwrap().end_unix_ms);

    let short = [history(40, 7, periodic)];
    assert!(matches!(
        train(&short, &config, &brief, None, &mut no_limit()),
        Err(TrainError::TooLittleHistory { need: 90, .. })
    ));
}

#[test]
fn weights_trained_on_from_those_that_serve_keep_their_evidence_and_others_do_not() {
    let windows = history(500, 8, periodic);
    let config = ForecastConfig::default();
    let brief = TrainConfig { steps_max: 40, ..TrainConfig::default() };
    let past = [windows[..300].to_vec()];
    let first = train(&past, &config, &brief, None, &mut no_limit()).unwrap();
    let next = train(&past, &config, &brief, Some(&first), &mut no_limit()).unwrap();
    let stranger = train(&past, &config, &TrainConfig { seed: 2, ..brief }, None, &mut no_limit()).unwrap();
    let mut forecaster = Forecaster::new(config);
    let name = service(0);
    run(&mut forecaster, &name, &windows[..300]);
    forecaster.install(first).unwrap();
    run(&mut forecaster, &name, &windows[300..400]);
    let state = |forecaster: &Forecaster| forecaster.explain(&name).unwrap().lstm;
    assert_eq!(state(&forecaster), LstmState::Competes);
    forecaster.install(next).unwrap();
    assert_eq!(state(&forecaster), LstmState::Competes);
    run(&mut forecaster, &name, &windows[400..420]);
    forecaster.install(stranger).unwrap();
    assert!(matches!(state(&forecaster), LstmState::Proving { scored: 0, .. }));
}

fn small_image() -> (Forecaster, Vec<u8>) {
    let mut random = Random::new(9);
    let mut forecaster = Forecaster::new(ForecastConfig::default());
    let windows = history(100, 9, periodic);
    for n in 0..2 {
        run(&mut forecaster, &service(n), &windows);
    }
    forecaster.install(ModelWeights::untrained(1, || random.signed())).unwrap();
    let image = forecaster.export();
    (forecaster, image)
}

#[test]
fn an_image_brings_weights_and_calibration_back() {
    let (mut before, image) = small_image();
    let mut after = Forecaster::new(ForecastConfig::default());
    after.import(&image).unwrap();
    assert_eq!(after.weights(), before.weights());
    assert_eq!(after.export(), image);
    assert_eq!(after.demand(&service(0)), None, "nothing is known before the first window");
    let next = window(START_MS + 100_000, [50.0, 200.0, 8.0, 2.0]);
    before.observe(next.end_unix_ms, &[(service(0), &next)]);
    after.observe(next.end_unix_ms, &[(service(0), &next)]);
    let (before, after) = (before.explain(&service(0)).unwrap(), after.explain(&service(0)).unwrap());
    for resource in Resource::ALL {
        let width = |q: Quantiles| q.q95 - q.q05;
        let last_value = |report: &crate::ForecastReport| report.resources[resource].candidates[0].band.unwrap();
        let ratio = width(last_value(&after)) / width(last_value(&before));
        assert!((0.8..1.25).contains(&ratio), "{resource}: the band of the last value changed by {ratio}");
    }
}

#[test]
fn every_flipped_byte_truncation_and_newer_version_is_refused() {
    let (_, image) = small_image();
    let mut forecaster = Forecaster::new(ForecastConfig::default());
    let one = window(START_MS, [50.0, 200.0, 8.0, 2.0]);
    forecaster.observe(START_MS, &[(service(0), &one)]);
    let demand = forecaster.demand(&service(0));
    // Hashing the whole image for every byte would take minutes: every byte of an image without weights, and of the one
    // with weights the head, the tail and every 997th between.
    let mut small = Forecaster::new(ForecastConfig::default());
    run(&mut small, &service(0), &history(5, 1, periodic));
    let small = small.export();
    let mut refuses = |image: &[u8], at: usize| {
        for flip in [1, 0x80, 0xff] {
            let mut bad = image.to_vec();
            bad[at] ^= flip;
            assert!(forecaster.import(&bad).is_err(), "byte {at} flipped by {flip:#x} was accepted");
        }
    };
    (0..small.len()).for_each(|at| refuses(&small, at));
    let places = (0..64).chain((64..image.len() - 64).step_by(997)).chain(image.len() - 64..image.len());
    places.for_each(|at| refuses(&image, at));
    for length in [0, 7, 8, 19, 20, 51, 52, image.len() / 2, image.len() - 1] {
        assert!(forecaster.import(&image[..length]).is_err(), "{length} bytes were accepted");
    }
    let mut longer = image.clone();
    longer.push(0);
    assert!(matches!(forecaster.import(&longer), Err(ImportError::WrongLength { .. })));
    let mut newer = image.clone();
    let known = u32::from(image[8]);
    newer[8] += 1;
    assert_eq!(forecaster.import(&newer), Err(ImportError::OtherVersion { found: known + 1, known }));
    let mut other = Forecaster::new(ForecastConfig { step_ms: 60_000, ..ForecastConfig::default() });
    assert!(matches!(other.import(&image), Err(ImportError::OtherClock { .. })));
    assert_eq!(forecaster.demand(&service(0)), demand, "the baseline goes on serving");
    assert!(forecaster.weights().is_none());
}

#[test]
fn a_constant_series_is_forecast_as_itself() {
    let mut forecaster = Forecaster::new(ForecastConfig::default());
    let name = service(0);
    run(&mut forecaster, &name, &history(300, 1, |_, _| [25.0, 128.0, 0.0, 0.0]));
    let demand = forecaster.demand(&name).unwrap();
    assert!((demand.quantiles.cpu.q50 - 25.0).abs() < 0.1 && demand.quantiles.cpu.q99 < 25.5, "{demand:?}");
    assert!((demand.quantiles.memory.q50 - 128.0).abs() < 0.1 && demand.quantiles.memory.q99 < 128.5, "{demand:?}");
    assert!(demand.confidence > 0.9, "{demand:?}");
}

#[test]
fn confidence_follows_how_often_the_median_was_right() {
    let mut forecaster = Forecaster::new(ForecastConfig::default());
    let name = service(0);
    let wild = history(300, 2, |_, random| [500.0 * f64::from(random.signed().abs()).powi(4), 100.0, 1.0, 1.0]);
    run(&mut forecaster, &name, &wild);
    let low = forecaster.demand(&name).unwrap().confidence;
    assert!(low < 0.5, "{low}");
}

#[test]
fn duplicates_gaps_and_clock_jumps_are_counted_and_survived() {
    let mut forecaster = Forecaster::new(ForecastConfig::default());
    let name = service(0);
    let one = window(START_MS, [10.0, 100.0, 1.0, 0.0]);
    let mut at = |ms: u64| forecaster.observe(ms, &[(name.clone(), &one)]);
    for tick in 0..50 {
        at(START_MS + tick * 1000 + (tick % 3) * 200);
    }
    at(START_MS + 49_000); // again
    at(START_MS + 52_000); // two are missing
    at(START_MS + 90_000); // a gap
    at(START_MS - 3_600_000); // the clock was set back
    at(START_MS - 3_599_000);
    let report = forecaster.explain(&name).unwrap();
    assert_eq!(report.irregular.duplicates, 1);
    assert_eq!(report.irregular.bridged, 2);
    assert_eq!(report.irregular.gaps, 2);
    assert_eq!(report.samples, 54);
}

#[test]
fn a_forgotten_service_leaves_the_others_alone() {
    let mut forecaster = Forecaster::new(ForecastConfig::default());
    let windows = history(50, 4, periodic);
    for n in 0..3 {
        run(&mut forecaster, &service(n), &windows[..30 + n]);
    }
    let kept = forecaster.explain(&service(2)).unwrap();
    forecaster.forget(&service(0));
    assert_eq!(forecaster.demand(&service(0)), None);
    assert_eq!(forecaster.explain(&service(2)), Some(kept));
    assert_eq!(forecaster.services().count(), 2);
}

/// CPU time of this thread: other programs on the machine do not count.
fn cpu_time() -> Duration {
    let read = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let ns = read.split_whitespace().next().and_then(|ns| ns.parse().ok());
    Duration::from_nanos(ns.unwrap_or(0))
}

#[test]
fn a_thousand_profiles_step_in_one_batch() {
    let mut random = Random::new(11);
    let mut forecaster = Forecaster::new(ForecastConfig::default());
    let mut weights = ModelWeights::untrained(1, || random.signed());
    weights.head.fill_with(|| random.signed());
    forecaster.install(weights).unwrap();
    let names: Vec<ServiceName> = (0..1000).map(service).collect();
    let mut made = |tick: u64| -> Vec<FeatureWindow> {
        (0..1000).map(|n| window(START_MS + tick * 1000, periodic(tick + n, &mut random))).collect()
    };
    // Past the ticks in which every score is kept.
    let (warm_up, measured) = (120u64, 60u64);
    let ticks: Vec<Vec<FeatureWindow>> = (0..warm_up + measured).map(&mut made).collect();
    let mut begun = (Duration::ZERO, Instant::now());
    for (tick, windows) in ticks.iter().enumerate() {
        if tick as u64 == warm_up {
            begun = (cpu_time(), Instant::now());
        }
        let batch: Vec<(ServiceName, &FeatureWindow)> = names.iter().cloned().zip(windows).collect();
        forecaster.observe(START_MS + tick as u64 * 1000, &batch);
    }
    let each = |total: Duration| total.as_secs_f64() * 1e6 / measured as f64;
    println!(
        "a tick of 1,000 profiles: {:.0} µs of CPU, {:.0} µs of time; {:.1} KB per profile",
        each(cpu_time().saturating_sub(begun.0)),
        each(begun.1.elapsed()),
        forecaster.bytes() as f64 / 1e6 // bytes of 1,000 profiles
    );
    // Wide, because tests share the machine: the bench holds the budget.
    assert!(cpu_time().saturating_sub(begun.0).as_millis() < 200 * u128::from(measured), "a tick takes too long");
    for name in &names {
        assert!(forecaster.demand(name).is_some());
    }
}

/// Anything a sensor could hand over when it, a counter or a clock is wrong.
fn any_value() -> impl Strategy<Value = f64> {
    prop_oneof![
        4 => 0.0..1000.0f64,
        1 => any::<f64>(),
        1 => Just(0.0),
        1 => prop_oneof![Just(f64::NAN), Just(f64::INFINITY), Just(f64::NEG_INFINITY), Just(-1.0), Just(f64::MAX), Just(1e-300)],
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn no_input_panics_and_no_quantiles_cross(
        steps in prop::collection::vec((
            prop_oneof![8 => Just(1000i64), 1 => -5000i64..5000, 1 => any::<i64>()],
            [any_value(), any_value(), any_value(), any_value()],
            any::<u64>(),
            prop_oneof![5 => Just(1000u32), 1 => any::<u32>()],
        ), 1..150),
        seed in any::<u64>(),
    ) {
        let mut random = Random::new(seed);
        let mut weights = ModelWeights::untrained(1, || random.signed());
        weights.head.fill_with(|| 4.0 * random.signed());
        let mut forecaster = Forecaster::new(ForecastConfig::default());
        forecaster.install(weights).unwrap();
        let name = service(0);
        let mut now = START_MS;
        let mut windows = Vec::new();
        for (ahead, usage, count, length_ms) in steps {
            now = now.wrapping_add_signed(ahead);
            let mut one = window(now, usage);
            one.length_ms = length_ms;
            one.counts.reads = count;
            one.counts.execs = count;
            one.counts.forks = count;
            one.durations.request_latency.buckets = vec![(1, count), (2, count)];
            forecaster.observe(now, &[(name.clone(), &one), (name.clone(), &one)]);
            let demand = forecaster.demand(&name).unwrap();
            for resource in Resource::ALL {
                prop_assert!(levels_ascend(&demand.quantiles[resource]), "{demand:?}");
            }
            prop_assert!((0.0..=1.0).contains(&demand.confidence));
            windows.push(one);
        }
        let report = forecaster.explain(&name).unwrap();
        prop_assert!(serde_json::to_string(&report).is_ok());
        let image = forecaster.export();
        let mut other = Forecaster::new(ForecastConfig::default());
        prop_assert!(other.import(&image).is_ok());
        let brief = TrainConfig { steps_max: 1, ..TrainConfig::default() };
        if let Ok(weights) = train(&[windows], &ForecastConfig::default(), &brief, None, &mut no_limit()) {
            prop_assert!(other.install(weights).is_ok());
        }
    }
}
