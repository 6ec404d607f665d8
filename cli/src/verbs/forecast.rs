//! `warmswap forecast`: what a service is expected to need, who says so, and how often it was right.

use std::process::ExitCode;

use anyhow::Result;
use warmswap_agent::api::{Band, ForecastAnswer, LstmState, MinutesForecast};
use warmswap_model::{Resource, ServiceName};
use warmswap_report::utc;

use super::Here;
use crate::client::Client;
use crate::output::{Style, paint, print_table, say, say_json, table};

/// Columns and rows of a plot.
const PLOT_WIDTH: usize = 72;
const PLOT_HEIGHT: usize = 8;
/// What a column stands for where the plot shows what is ahead.
const MINUTES_OF_COLUMN: usize = 5;

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
        plot_seconds(resource, &answer.bands);
    }
    match &answer.minutes {
        Some(minutes) => show_minutes(minutes),
        None => say("\nover minutes: nothing yet, the first minute has not closed"),
    }
    for line in answer.tuner.iter().map(|resource| &resource.text) {
        say(&format!("reserve {line}"));
    }
    Ok(ExitCode::SUCCESS)
}

fn show_minutes(forecast: &MinutesForecast) {
    say(&format!("\nover minutes, from {}", utc(forecast.until_unix_ms)));
    let mut rows = table(
        ["resource", "in", "q05", "q50", "q90", "q95", "q99", "", "champion", "coverage"],
        &[1, 2, 3, 4, 5, 6, 9],
    );
    for resource in Resource::ALL {
        for of in &forecast.resources[resource] {
            let mut row = vec![resource.to_string(), format!("{} min", of.minutes)];
            row.extend(of.band.to_levels().map(|value| format!("{value:.2}")));
            let coverage = of.coverage90.map_or_else(|| "–".into(), |share| format!("{:.0} %", share * 100.0));
            row.extend([resource.unit().into(), of.champion.name().into(), coverage]);
            rows.add_row(row);
        }
    }
    print_table(&rows);
    for resource in Resource::ALL {
        plot_minutes(resource, forecast);
    }
}

/// One column of a plot.
#[derive(Debug, Clone, Copy, Default)]
struct Column {
    came: Option<f64>,
    /// The 90 % interval.
    expected: Option<(f64, f64)>,
}

/// What was forecast for the last seconds, and what came.
fn plot_seconds(resource: Resource, bands: &[Band]) {
    let shown = &bands[bands.len().saturating_sub(PLOT_WIDTH)..];
    let column = |band: &Band| {
        let quantiles = band.demand.quantiles[resource];
        Column { came: Some(band.actual[resource]), expected: Some((quantiles.q05, quantiles.q95)) }
    };
    let columns: Vec<Column> = shown.iter().map(column).collect();
    let title = format!("{resource} ({}), last {} s: ● came, ░ expected with 90 %", resource.unit(), shown.len());
    plot(&title, &columns);
}

/// The last minutes, a column each, and the interval that the next hour is expected in, [`MINUTES_OF_COLUMN`] a column.
fn plot_minutes(resource: Resource, forecast: &MinutesForecast) {
    let horizons = &forecast.resources[resource];
    let Some(longest) = horizons.last() else { return };
    let ahead = longest.minutes / MINUTES_OF_COLUMN;
    let shown = PLOT_WIDTH.saturating_sub(ahead).min(forecast.recent.len());
    let past = &forecast.recent[forecast.recent.len() - shown..];
    let Some((_, last)) = past.last() else { return };
    let mut columns: Vec<Column> =
        past.iter().map(|(_, usage)| Column { came: Some(usage[resource]), expected: None }).collect();
    columns.extend((1..=ahead).map(|column| {
        let minute = (column * MINUTES_OF_COLUMN) as f64;
        // From the last value to the horizons, in straight lines.
        let mut from = (0.0, last[resource], last[resource]);
        for of in horizons {
            let to = (of.minutes as f64, of.band.q05, of.band.q95);
            if minute <= to.0 {
                let share = (minute - from.0) / (to.0 - from.0);
                let between = |from: f64, to: f64| from + share * (to - from);
                return Column { came: None, expected: Some((between(from.1, to.1), between(from.2, to.2))) };
            }
            from = to;
        }
        Column::default()
    }));
    let title = format!(
        "{resource} ({}), last {shown} and next {} minutes: ● came, ░ expected with 90 %",
        resource.unit(),
        longest.minutes
    );
    plot(&title, &columns);
}

/// Newest to the right.
fn plot(title: &str, columns: &[Column]) {
    let values = || columns.iter().flat_map(|c| [c.came, c.expected.map(|e| e.0), c.expected.map(|e| e.1)]).flatten();
    let low = values().fold(f64::INFINITY, f64::min);
    let high = values().fold(f64::NEG_INFINITY, f64::max);
    if columns.len() < 2 || !low.is_finite() {
        return;
    }
    let span = if high > low { high - low } else { 1.0 };
    let row_of = |value: f64| (((value - low) / span) * (PLOT_HEIGHT - 1) as f64).round() as usize;
    say(&format!("\n{title}"));
    for row in (0..PLOT_HEIGHT).rev() {
        let label = match row {
            r if r == PLOT_HEIGHT - 1 => format!("{high:>9.2}"),
            0 => format!("{low:>9.2}"),
            _ => " ".repeat(9),
        };
        let cells: String = columns
            .iter()
            .map(|column| {
                if column.came.is_some_and(|value| row_of(value) == row) {
                    '●'
                } else if column.expected.is_some_and(|(low, high)| (row_of(low)..=row_of(high)).contains(&row)) {
                    '░'
                } else {
                    ' '
                }
            })
            .collect();
        say(format!("{} {cells}", paint(Style::Dim, &label)).trim_end());
    }
}
