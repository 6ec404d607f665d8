//! `warmswap forecast`: what a service is expected to need, who says so, and how often it was right.

use std::process::ExitCode;

use anyhow::Result;
use warmswap_agent::api::{Band, ForecastAnswer, LstmState};
use warmswap_model::{Resource, ServiceName};

use super::Here;
use crate::client::Client;
use crate::output::{Style, paint, print_table, say, say_json, table};

/// Columns and rows of a plot.
const PLOT_WIDTH: usize = 72;
const PLOT_HEIGHT: usize = 8;

pub(super) fn forecast(here: &Here, service: &ServiceName) -> Result<ExitCode> {
    let client = Client::connect(&here.run_dir)?;
    let answer: ForecastAnswer = client.get(&format!("/v1/services/{service}/forecast"))?;
    if here.json {
        say_json(&answer)?;
        return Ok(ExitCode::SUCCESS);
    }
    let Some(report) = &answer.report else {
        say(&format!("nothing is known about {service} yet; windows arrive once a second"));
        return Ok(ExitCode::SUCCESS);
    };
    let lstm = match report.lstm {
        LstmState::NotTrained => "the LSTM is not trained yet".to_owned(),
        LstmState::Proving { scored, needed } => {
            format!("the LSTM proves itself: {scored} of {needed} forecasts compared")
        }
        LstmState::Competes => "the LSTM competes".to_owned(),
    };
    say(&format!(
        "{service}: next {} s, confidence {:.0} %, {} windows seen, {lstm}",
        report.horizon_s,
        report.confidence * 100.0,
        report.samples
    ));
    let mut rows =
        table(["resource", "now", "q05", "q50", "q95", "q99", "", "champion", "coverage", "why"], &[1, 2, 3, 4, 5, 8]);
    for resource in Resource::ALL {
        let own = &report.resources[resource];
        let number = |value: f64| format!("{value:.2}");
        rows.add_row([
            resource.to_string(),
            number(own.last),
            number(own.band.q05),
            number(own.band.q50),
            number(own.band.q95),
            number(own.band.q99),
            own.unit.clone(),
            own.champion.name().into(),
            own.coverage90.map_or_else(|| "–".into(), |share| format!("{:.0} %", share * 100.0)),
            own.why.clone(),
        ]);
    }
    print_table(&rows);
    for resource in Resource::ALL {
        plot(resource, &answer.bands);
    }
    for line in answer.tuner.iter().map(|resource| &resource.text) {
        say(&format!("reserve {line}"));
    }
    Ok(ExitCode::SUCCESS)
}

/// What was forecast (the 90 % interval as a shade) and what came (dots), newest to the right.
fn plot(resource: Resource, bands: &[Band]) {
    let shown = &bands[bands.len().saturating_sub(PLOT_WIDTH)..];
    if shown.len() < 2 {
        return;
    }
    let lowest = |band: &Band| band.actual[resource].min(band.demand.quantiles[resource].q05);
    let highest = |band: &Band| band.actual[resource].max(band.demand.quantiles[resource].q95);
    let low = shown.iter().map(lowest).fold(f64::INFINITY, f64::min);
    let high = shown.iter().map(highest).fold(f64::NEG_INFINITY, f64::max);
    let span = if high > low { high - low } else { 1.0 };
    let row_of = |value: f64| (((value - low) / span) * (PLOT_HEIGHT - 1) as f64).round() as usize;
    say(&format!("\n{resource} ({}), last {} s: ● came, ░ expected with 90 %", resource.unit(), shown.len()));
    for row in (0..PLOT_HEIGHT).rev() {
        let label = match row {
            r if r == PLOT_HEIGHT - 1 => format!("{high:>9.2}"),
            0 => format!("{low:>9.2}"),
            _ => " ".repeat(9),
        };
        let cells: String = shown
            .iter()
            .map(|band| {
                let quantiles = band.demand.quantiles[resource];
                if row_of(band.actual[resource]) == row {
                    '●'
                } else if (row_of(quantiles.q05)..=row_of(quantiles.q95)).contains(&row) {
                    '░'
                } else {
                    ' '
                }
            })
            .collect();
        say(format!("{} {cells}", paint(Style::Dim, &label)).trim_end());
    }
}
