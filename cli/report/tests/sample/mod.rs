//! A made-up run with every kind of handover, for tests of the rendering and for looking at it.
#![allow(clippy::unwrap_used)]

use warmswap_load::Totals;
use warmswap_model::{
    Blackout, ConnectionCounts, Generation, HandoverReport, PerResource, Phase, PhaseOutcome, PhaseTiming, Resource,
    Rung, ServiceName, StateMove, Trigger, Verdict,
};
use warmswap_report::{
    ClientLoad, ClientView, ForecastPoint, ForecastSeries, HandoverView, LatencyPoint, Machine, ReportInput,
};

const START: u64 = 1_795_318_205_000;

/// Made-up noise, the same in every run, -0.5 to 0.5.
fn noise(i: u64) -> f64 {
    let z = (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((z ^ (z >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as f64 / f64::from(1 << 24) - 0.5
}

fn phases(durations_us: &[(Phase, f64)]) -> Vec<PhaseTiming> {
    let mut at = 0.0;
    durations_us
        .iter()
        .map(|(phase, us)| {
            let timing = PhaseTiming { phase: *phase, start_us: at, duration_us: *us, outcome: PhaseOutcome::Done };
            at += us;
            timing
        })
        .collect()
}

fn handover(id: u64, at_s: f64, images: (&str, &str), verdict: Verdict, phases: Vec<PhaseTiming>) -> HandoverReport {
    HandoverReport {
        id,
        service: ServiceName::new("sessions").unwrap(),
        from: Generation(id as u32),
        to: Generation(id as u32 + 1),
        from_image: format!("images/{}", images.0),
        to_image: format!("images/{}.tar", images.1),
        trigger: if id == 3 { Trigger::MemoryExhaustion { seconds_left: 210 } } else { Trigger::Request },
        rung: Rung::Full,
        verdict,
        reason: None,
        lost: Vec::new(),
        started_unix_ms: START + (at_s * 1e3) as u64,
        duration_ms: phases.iter().map(|p| p.duration_us).sum::<f64>() / 1e3,
        phases,
        steps: Vec::new(),
        blackouts: Vec::new(),
        connections: ConnectionCounts { sent: 1000, received: 1000, closed_meanwhile: 0 },
        state: StateMove::Resident,
        state_bytes: 64 << 20,
        before: None,
        after: None,
        forecast: None,
        reservation: PerResource { cpu: 41.0, memory: 118.0, network: 9.0, disk: 1.0 },
    }
}

fn handovers() -> Vec<HandoverView> {
    let kernel = |us| Blackout { us, measured_in_kernel: true };
    let there = [
        (Phase::Reserve, 2_400.0),
        (Phase::Warm, 212_000.0),
        (Phase::Sync, 64_000.0),
        (Phase::Quiesce, 71.0),
        (Phase::Delta, 38.0),
        (Phase::Promote, 54.0),
    ];
    let mut first = handover(
        1,
        60.0,
        ("v1", "v2"),
        Verdict::Committed,
        phases(&[&there[..], &[(Phase::Verify, 2_003_000.0), (Phase::Commit, 11_000.0)]].concat()),
    );
    first.blackouts = vec![kernel(163.0)];
    let mut second = handover(
        2,
        110.0,
        ("v2", "v3"),
        Verdict::RolledBack,
        phases(&[&there[..], &[(Phase::Verify, 2_400_000.0)], &there[3..]].concat()),
    );
    second.blackouts = vec![kernel(171.0), Blackout { us: 214.0, measured_in_kernel: false }];
    second.reason = Some("p99 rose from 0.4 ms to 3.6 ms, above 2.0 × its baseline".into());
    let mut third = handover(
        3,
        150.0,
        ("v2", "v2"),
        Verdict::Aborted,
        phases(&[(Phase::Reserve, 2_300.0), (Phase::Warm, 205_000.0), (Phase::Sync, 18_000.0)]),
    );
    third.phases[2].outcome = PhaseOutcome::Failed;
    third.reason = Some("shadow died during SYNC: <signal 9>".into());
    third.connections = ConnectionCounts::default();
    third.state_bytes = 0;
    let seen = |gap, before, after| {
        Some(ClientView {
            longest_gap_us: gap,
            usual_gap_us: 900.0,
            failed: 0,
            lost: 0,
            p99_before_us: Some(before),
            p99_after_us: Some(after),
        })
    };
    vec![
        HandoverView::new(first, seen(2_310.0, 412.0, 421.0)),
        HandoverView::new(second, seen(3_870.0, 417.0, 3_610.0)),
        HandoverView::new(third, seen(1_480.0, 415.0, 409.0)),
    ]
}

fn clients() -> ClientLoad {
    let series = (0..1800_u64)
        .map(|i| {
            let at_s = i as f64 / 10.0;
            let slow = if (110.3..112.7).contains(&at_s) { 8.0 } else { 1.0 };
            let p50 = 118.0 * slow * (1.0 + 0.2 * noise(i));
            let p99 = 410.0 * slow * (1.0 + 0.5 * noise(i + 7000));
            let blip = if i == 602 || i == 1103 || i == 1128 { 2100.0 } else { 0.0 };
            let rare = if i % 97 == 13 { 2600.0 * (1.0 + noise(i)) } else { 0.0 };
            LatencyPoint {
                at_s,
                p50_us: Some(p50),
                p99_us: Some(p99),
                max_us: Some(p99 * (1.5 + noise(i + 99)) + blip + rare),
                failed: 0,
            }
        })
        .collect();
    ClientLoad {
        started_unix_ms: START,
        seconds: 180.0,
        totals: Totals {
            scheduled: 360_000,
            sent: 360_000,
            completed: 360_000,
            writes_acknowledged: 252_113,
            keys_verified: 8000,
            ..Totals::default()
        },
        connections: 1000,
        connections_kept: 1000,
        series,
    }
}

fn forecasts() -> Vec<ForecastSeries> {
    let one = |resource: Resource, level: f64, swing: f64, champion: &str| {
        let value = |i: u64| level + swing * (i as f64 / 14.0).sin() + swing * 0.5 * noise(i + level as u64);
        let points = (0..180_u64)
            .map(|i| {
                let middle = level + swing * ((i as f64 - 1.0) / 14.0).sin();
                let known = i >= 20;
                let spread = swing * (0.22 + 6.0 / (i as f64 + 10.0));
                ForecastPoint {
                    unix_ms: START + i * 1000,
                    actual: Some(value(i).max(0.0)),
                    q05: known.then_some((middle - spread).max(0.0)),
                    q50: known.then_some(middle.max(0.0)),
                    q95: known.then_some(middle + spread),
                    lstm_q05: (i >= 60).then_some((middle - 0.8 * spread).max(0.0)),
                    lstm_q95: (i >= 60).then_some(middle + 0.8 * spread),
                }
            })
            .collect();
        ForecastSeries { resource, champion: champion.into(), lstm: "recent loss 0.120, linear 0.150".into(), points }
    };
    vec![
        one(Resource::Cpu, 32.0, 6.0, "LSTM"),
        one(Resource::Memory, 96.0, 3.0, "last value"),
        one(Resource::Network, 7.4, 1.2, "LSTM"),
        one(Resource::Disk, 0.4, 0.3, "linear"),
    ]
}

pub(crate) fn sample() -> ReportInput {
    ReportInput {
        title: "warmswap demo".into(),
        created_unix_ms: START + 185_000,
        machine: Machine {
            host: "builder".into(),
            cpu: "Intel Xeon 2.50 GHz".into(),
            cpus: 2,
            memory_mb: 24_105,
            kernel: "6.18.0".into(),
            versions: vec![
                ("warmswap".into(), "0.1.0".into()),
                ("cgroups".into(), "hybrid (v1 controllers)".into()),
                ("back end".into(), "embedded (libcontainer 0.7)".into()),
            ],
        },
        clients: Some(clients()),
        handovers: handovers(),
        forecasts: forecasts(),
    }
}
