//! `warmswap-bench infer`: what a forecast costs: the step of the LSTM beside ONNX Runtime with the same weights, a tick of a
//! thousand profiles, and the memory of ten thousand.

mod onnx;

use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use warmswap_forecast::{ForecastConfig, Forecaster, ModelWeights, Stepper};
use warmswap_model::{CgroupId, Durations, FeatureWindow, PerResource, ProbeCounts, ServiceName};

use crate::interrupt;
use crate::progress::Progress;
use crate::rows::{Conditions, Row};
use crate::stats::{median, median_interval, quartiles, ratios};
use crate::suite::Outcome;
use onnx::Onnx;

const PEER: &str = "ONNX Runtime, one thread";
/// Rows of a step: one profile, as when a single one is asked; and a host full of them.
const ROWS: [usize; 2] = [1, 1000];
const ROUNDS_QUICK: usize = 10;
const ROUNDS_WHOLE: usize = 40;
/// Steps of a round: long enough that the clock's own price is nothing.
const ROWS_OF_A_ROUND: usize = 20_000;
/// Outputs of the same network agree within this.
const TOLERANCE: f32 = 2e-3;

const PROFILES: usize = 1000;
const PROFILES_OF_MEMORY: usize = 10_000;
/// Until nothing grows any more: rings, scores and replays are full.
const TICKS_TO_FILL: u64 = 400;
const TICK_US_MAX: f64 = 1000.0;

pub(crate) fn run(_programs: &Path, quick: bool) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let rounds = if quick { ROUNDS_QUICK } else { ROUNDS_WHOLE };
    let mut progress = Progress::begin("the step of the network, beside ONNX Runtime");
    let weights = Stepper::weights_of_anything(SEED);
    let mut peer = Onnx::start(&weights)?;
    for rows in ROWS {
        outcome.rows.push(step(&weights, rows, rounds, &mut peer, &mut progress)?);
    }
    drop(peer);
    outcome.rows.extend(tick(rounds, &mut progress)?);
    outcome.rows.push(memory(&mut progress)?);
    Ok(outcome)
}

const SEED: u64 = 7;
const INPUT: f32 = 0.5;

/// Alternating rounds of ours and the peer's; values are medians of rounds.
fn step(weights: &ModelWeights, rows: usize, rounds: usize, peer: &mut Onnx, progress: &mut Progress) -> Result<Row> {
    let mut conditions = Conditions::new();
    conditions.insert("rows".into(), json!(rows));
    let steps = (ROWS_OF_A_ROUND / rows).max(20);
    let mut stepper = Stepper::new(weights, rows);
    let (mut ours, mut theirs, mut which) = (Vec::new(), Vec::new(), String::new());
    for round in 0..rounds {
        interrupt::check()?;
        stepper.begin(INPUT);
        let begun = Instant::now();
        for _ in 0..steps {
            black_box(&mut stepper).step();
        }
        ours.push(begun.elapsed().as_secs_f64() * 1e6 / steps as f64);
        if let Some(came) = peer.steps(rows, steps)? {
            let near =
                came.raw.iter().zip(stepper.outputs(0)).all(|(a, b)| (a - b).abs() <= TOLERANCE * (1.0 + b.abs()));
            ensure!(
                near && came.raw.len() == stepper.outputs(0).len(),
                "after {steps} steps the same network gives {:?} in ONNX Runtime and {:?} here",
                came.raw,
                stepper.outputs(0)
            );
            theirs.push(came.us);
            which = format!("{}, without the {:.1} µs of a call that computes nothing", came.how, came.call_us);
        }
        progress.at(format_args!("{rows} rows, round {} of {rounds}", round + 1));
    }
    let row = Row::new("infer.step", median(&ours), "µs", ours.len(), &conditions).spread(quartiles(&ours));
    let each = ratios(&ours, &theirs);
    Ok(match &peer.missing {
        Some(reason) => row.beside(PEER, None, None).note(Some(format!("{PEER} left out: {reason}"))),
        None => row
            .beside(PEER, median(&theirs), median(&each))
            .interval(median_interval(&ours))
            .note(Some(format!("{which}; ratio target ≤ 1"))),
    })
}

/// A tick of the seconds clock as the agent makes it: windows in, forecasts of before scored, new ones made.
fn tick(rounds: usize, progress: &mut Progress) -> Result<Vec<Row>> {
    let mut profiles = Profiles::new(PROFILES)?;
    let mut us = Vec::new();
    for tick in 0..TICKS_TO_FILL {
        profiles.tick();
        progress.at(format_args!("tick {tick} of {TICKS_TO_FILL}"));
    }
    for _ in 0..rounds * 10 {
        interrupt::check()?;
        us.push(profiles.tick());
    }
    let mut conditions = Conditions::new();
    conditions.insert("profiles".into(), json!(PROFILES));
    let row = Row::new("infer.tick_1000_us", median(&us), "µs", us.len(), &conditions);
    Ok(vec![row.spread(quartiles(&us)).interval(median_interval(&us)).at_most(TICK_US_MAX)])
}

fn memory(progress: &mut Progress) -> Result<Row> {
    let mut profiles = Profiles::new(PROFILES_OF_MEMORY)?;
    for tick in 0..TICKS_TO_FILL {
        interrupt::check()?;
        profiles.tick();
        progress.at(format_args!("{PROFILES_OF_MEMORY} profiles, tick {tick} of {TICKS_TO_FILL}"));
    }
    let mut conditions = Conditions::new();
    conditions.insert("profiles".into(), json!(PROFILES_OF_MEMORY));
    let mb = profiles.forecaster.bytes() as f64 / 1e6;
    Ok(Row::new("infer.profiles_10000_mb", Some(mb), "MB", 1, &conditions))
}

/// Profiles with a load that moves, and a network that is installed.
struct Profiles {
    forecaster: Forecaster,
    names: Vec<ServiceName>,
    windows: Vec<FeatureWindow>,
    ticks: u64,
    seed: u64,
}

impl Profiles {
    fn new(count: usize) -> Result<Self> {
        let mut forecaster = Forecaster::new(ForecastConfig::default());
        forecaster.install(Stepper::weights_of_anything(SEED)).context("the network is refused")?;
        let names = (0..count).map(|n| ServiceName::new(format!("p{n}"))).collect::<Result<Vec<_>, _>>()?;
        let window = FeatureWindow {
            cgroup: CgroupId(1),
            end_unix_ms: 0,
            length_ms: 1000,
            usage: PerResource::default(),
            counts: ProbeCounts::default(),
            durations: Durations::default(),
        };
        Ok(Self { forecaster, names, windows: vec![window; count], ticks: 0, seed: SEED })
    }

    /// How long it took, in µs.
    fn tick(&mut self) -> f64 {
        const BEGIN_MS: u64 = 1_800_000_000_000;
        self.ticks += 1;
        let now = BEGIN_MS + self.ticks * 1000;
        for window in &mut self.windows {
            // Numbers that only depend on where they stand (an LCG): a load that moves.
            self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let moved = (self.seed >> 33) as f64 / f64::from(1u32 << 31);
            window.end_unix_ms = now;
            window.usage = PerResource { cpu: 20.0 + 10.0 * moved, memory: 100.0 + moved, network: moved, disk: 0.0 };
            window.counts.reads = (100.0 * moved) as u64;
        }
        let named: Vec<_> = self.names.iter().cloned().zip(&self.windows).collect();
        let begun = Instant::now();
        self.forecaster.observe(now, &named);
        begun.elapsed().as_secs_f64() * 1e6
    }
}
