//! Loads a service for some seconds and says what was found:
//! `cargo run --release -p warmswap-load --example load -- ADDRESS [SECONDS] [RATE] [CONNECTIONS]`.
//! Exit code 1 when anything was wrong.

use std::process::ExitCode;
use std::time::Duration;

use warmswap_load::{Load, LoadConfig};

fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: f64| arguments.get(at).map_or(Ok(default), |text| text.parse::<f64>());
    let Some(address) = arguments.first() else {
        eprintln!("which address? usage: load ADDRESS [SECONDS] [RATE] [CONNECTIONS]");
        return Ok(ExitCode::from(2));
    };
    let config = LoadConfig {
        rate_per_s: number(2, 2000.0)?,
        connections: number(3, 100.0)? as usize,
        ..LoadConfig::new(address.parse()?)
    };
    let load = Load::start(config)?;
    std::thread::sleep(Duration::from_secs_f64(number(1, 10.0)?));
    let result = load.stop()?;
    let us = |q: f64, histogram: &warmswap_model::LatencyHistogram| {
        histogram.quantile_ns(q).map_or_else(|| "–".into(), |ns| format!("{:.0} µs", ns as f64 / 1e3))
    };
    for (name, histogram) in [
        ("latency", &result.latency),
        ("of this, sent late", &result.generator_lag),
        ("new connections", &result.newcomer_latency),
    ] {
        let [p50, p99, max] = [0.5, 0.99, 1.0].map(|q| us(q, histogram));
        println!("{name:<20} p50 {p50:>9}   p99 {p99:>9}   max {max:>9}   n {}", histogram.count());
    }
    println!("longest gap          {:?}", result.longest_gap(result.started_ns, result.ended_ns));
    println!("connections kept     {} of {}", result.connections_kept, result.connections);
    println!("{:#?}", result.totals);
    for fault in result.faults.iter().take(20) {
        println!("{fault:?}");
    }
    Ok(if result.totals.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
