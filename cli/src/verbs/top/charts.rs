//! The chosen container over time, where the terminal is tall enough: what it used, and for a service what was forecast.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::symbols::Marker;
use ratatui::text::Line;
use ratatui::widgets::{Axis, Chart, Dataset, GraphType};
use warmswap_agent::api::{Live, LiveContainer};
use warmswap_model::Resource;

use super::draw::{headline, line, rule};
use super::state::{History, State};
use super::text::amount;

/// Narrower charts say nothing.
const CHART_WIDTH_MIN: u16 = 34;
/// Room for the future, s.
const AHEAD: f64 = 5.0;

pub(super) fn draw(frame: &mut Frame<'_>, area: Rect, state: &State, live: &Live, container: &LiveContainer) {
    line(frame, area, 0, &rule(&headline(container), area.width));
    let below = Rect { y: area.y + 1, height: area.height.saturating_sub(1), ..area };
    let count = usize::from(area.width / CHART_WIDTH_MIN).clamp(1, 4);
    let places = Layout::horizontal(vec![Constraint::Fill(1); count]).spacing(1).split(below);
    let Some(history) = state.history(container) else { return };
    for (place, resource) in places.iter().zip(Resource::ALL) {
        chart(frame, *place, history, live.unix_ms, container, resource);
    }
}

fn chart(
    frame: &mut Frame<'_>,
    area: Rect,
    history: &History,
    now: u64,
    container: &LiveContainer,
    resource: Resource,
) {
    line(frame, area, 0, &title(container, resource));
    // A dot is half a cell wide.
    let seconds = f64::from(area.width.saturating_sub(8)) * 2.0;
    let age = |unix_ms: u64| (unix_ms as f64 - now as f64) / 1e3;
    let within = |(at, _): &(f64, f64)| *at >= -seconds;
    let used: Vec<(f64, f64)> =
        history.used.iter().filter_map(|(at, used)| Some((age(*at), used[resource]?))).filter(within).collect();
    let band = |of: fn(&warmswap_model::Quantiles) -> f64| -> Vec<(f64, f64)> {
        history.expected.iter().map(|one| (age(one.unix_ms), of(&one.quantiles[resource]))).filter(within).collect()
    };
    let (low, median, high) = (band(|q| q.q05), band(|q| q.q50), band(|q| q.q95));
    let least = if resource == Resource::Cpu { 10.0 } else { 1.0 };
    let highest = used.iter().chain(&high).map(|(_, value)| *value).fold(0.0, f64::max) * 1.05;
    let highest = highest.max(least);
    let dataset =
        |points, kind, style| Dataset::default().marker(Marker::Braille).graph_type(kind).style(style).data(points);
    let dim = Style::new().add_modifier(Modifier::DIM);
    let datasets = vec![
        dataset(&low, GraphType::Line, Style::new().fg(Color::Blue)),
        dataset(&high, GraphType::Line, Style::new().fg(Color::Blue)),
        dataset(&median, GraphType::Scatter, Style::new().fg(Color::Cyan)),
        dataset(&used, GraphType::Line, Style::new().fg(Color::Green).add_modifier(Modifier::BOLD)),
    ];
    let from = format!("-{seconds:.0} s");
    let times = Axis::default().bounds([-seconds, AHEAD]).labels([from, "now".to_owned()]).style(dim);
    let values = Axis::default().bounds([0.0, highest]).labels(["0".to_owned(), amount(highest)]).style(dim);
    let plot = Rect { y: area.y + 1, height: area.height.saturating_sub(1), ..area };
    frame.render_widget(Chart::new(datasets).x_axis(times).y_axis(values).legend_position(None), plot);
}

fn title(container: &LiveContainer, resource: Resource) -> Line<'static> {
    let now = container.usage[resource].map_or_else(|| "–".to_owned(), amount);
    let next = container.demand.as_ref().map(|demand| {
        let band = demand.quantiles[resource];
        format!(" → {} ({}–{})", amount(band.q50), amount(band.q05), amount(band.q95))
    });
    Line::raw(format!("{resource} {now}{} {}", next.unwrap_or_default(), resource.unit()))
}
