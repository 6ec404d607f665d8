//! Client latency over time, and forecast against actual.

use crate::format::{clock, duration_us, number};
use crate::input::{ClientLoad, ForecastPoint, ForecastSeries, HandoverView, LatencyPoint};
use crate::svg::{Anchor, Scale, Svg, band, line, text_width, ticks, time_ticks};
use warmswap_model::{Phase, Verdict};

/// For which kind of screen a chart is drawn. The page shows the one that fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Size {
    Wide,
    Narrow,
}

impl Size {
    pub(crate) const BOTH: [Self; 2] = [Self::Wide, Self::Narrow];

    pub(crate) const fn class(self) -> &'static str {
        match self {
            Self::Wide => "wide",
            Self::Narrow => "narrow",
        }
    }
}

/// The word that colours a verdict in the style sheet.
pub(crate) const fn verdict_class(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Committed => "good",
        Verdict::RolledBack => "warn",
        Verdict::Aborted => "mute",
    }
}

/// Where the handover begins, switches and ends, in seconds since the start of the load.
fn instants(load: &ClientLoad, view: &HandoverView) -> (f64, Option<f64>, f64) {
    let start = (view.report.started_unix_ms as f64 - load.started_unix_ms as f64) / 1e3;
    let switch = view.report.phases.iter().find(|timing| timing.phase == Phase::Quiesce);
    (start, switch.map(|timing| start + timing.start_us / 1e6), start + view.report.duration_ms / 1e3)
}

/// p50, p99 and maximum per interval, with the handovers behind them.
pub(crate) fn latency(load: &ClientLoad, handovers: &[HandoverView], size: Size) -> String {
    let (width, plot_height, left, right) = match size {
        Size::Wide => (1080.0, 300.0, 62.0, 12.0),
        Size::Narrow => (360.0, 240.0, 52.0, 8.0),
    };
    let seconds = load.seconds.max(1.0);
    let x = Scale::linear(0.0, seconds, left, width - right);
    let (labels, label_rows) = place_labels(load, handovers, &x, width - right, size);
    let top = 12.0 + 22.0 * label_rows as f64;
    let bottom = top + plot_height;
    let mut svg = Svg::new(width, bottom + 26.0);

    let (low, high) = latency_range(load);
    let y = Scale::log(low, high, bottom, top);
    for (index, view) in handovers.iter().enumerate() {
        let (start, switch, end) = instants(load, view);
        let class = verdict_class(view.report.verdict);
        let (from, until) = (x.at(start), x.at(end).max(x.at(start) + 2.0));
        let title = format!("{}. {}: {}", index + 1, view.label, view.report.verdict);
        svg.rect(&format!("span {class}"), (from, top), (until - from, plot_height), &title);
        let at = x.at(switch.unwrap_or(start));
        let label_y = top - 10.0 - 22.0 * labels[index].row as f64;
        svg.segment(&format!("mark {class}"), (at, label_y), (at, bottom));
    }
    let mut decade = low;
    while decade <= high * 1.001 {
        let at = y.at(decade);
        svg.segment("grid", (left, at), (width - right, at));
        svg.text("tick", (left - 8.0, at + 4.0), Anchor::End, &duration_us(decade));
        decade *= 10.0;
    }
    for second in time_ticks(0.0, seconds, if size == Size::Wide { 10 } else { 4 }) {
        svg.segment("grid faint", (x.at(second), top), (x.at(second), bottom));
        svg.text("tick", (x.at(second), bottom + 20.0), Anchor::Middle, &clock(second));
    }

    let columns = per_column(&load.series, (width - right - left) as usize);
    let curve = |value: fn(&LatencyPoint) -> Option<f64>| {
        line(columns.iter().map(|p| value(p).map(|us| (x.at(p.at_s), y.at(us)))))
    };
    svg.path("curve max", &curve(|p| p.max_us));
    svg.path("curve p99", &curve(|p| p.p99_us));
    svg.path("curve p50", &curve(|p| p.p50_us));
    for point in load.series.iter().filter(|p| p.failed > 0) {
        let title = format!("{} failed at {}", point.failed, clock(point.at_s));
        svg.rect("failure", (x.at(point.at_s) - 1.5, bottom - 14.0), (3.0, 14.0), &title);
    }
    for (index, label) in labels.iter().enumerate() {
        let label_y = top - 10.0 - 22.0 * label.row as f64;
        let class = verdict_class(handovers[index].report.verdict);
        svg.circle(&format!("pill {class}"), (label.x, label_y), 9.0);
        svg.text("pill-number", (label.x, label_y + 4.0), Anchor::Middle, &(index + 1).to_string());
        if !label.text.is_empty() {
            let (at, anchor) =
                if label.leftwards { (label.x - 14.0, Anchor::End) } else { (label.x + 14.0, Anchor::Start) };
            svg.text("label", (at, label_y + 4.0), anchor, &label.text);
        }
    }
    let worst = load.series.iter().filter_map(|p| p.max_us).fold(0.0, f64::max);
    let description = format!(
        "Client latency over {}: p50, p99 and maximum on a logarithmic axis, with {} handovers marked. Highest latency {}.",
        clock(seconds),
        handovers.len(),
        duration_us(worst)
    );
    svg.finish(size.class(), &description)
}

struct Label {
    x: f64,
    row: usize,
    text: String,
    leftwards: bool,
}

/// Puts the labels into as few rows as they need without overlapping.
fn place_labels(
    load: &ClientLoad,
    handovers: &[HandoverView],
    x: &Scale,
    limit: f64,
    size: Size,
) -> (Vec<Label>, usize) {
    let mut rows: Vec<f64> = Vec::new();
    let mut labels = Vec::new();
    for view in handovers {
        let (start, switch, _) = instants(load, view);
        let at = x.at(switch.unwrap_or(start));
        let text = match size {
            Size::Wide => format!("{}, {}", view.label, view.report.verdict),
            // The number refers to the table.
            Size::Narrow => String::new(),
        };
        let reach = if text.is_empty() { 10.0 } else { 18.0 + text_width(&text) };
        let leftwards = at + reach > limit && !text.is_empty();
        let (from, until) = if leftwards { (at - reach, at + 12.0) } else { (at - 12.0, at + reach) };
        let row = rows.iter().position(|taken| *taken < from).unwrap_or(rows.len());
        if row == rows.len() {
            rows.push(until);
        } else {
            rows[row] = until;
        }
        labels.push(Label { x: at, row, text, leftwards });
    }
    (labels, rows.len().max(1))
}

/// Latencies outside this range are no latencies: 10 ns, 3 hours.
const SHORTEST_US: f64 = 0.01;
const LONGEST_US: f64 = 1e10;

/// Whole decades around all values.
fn latency_range(load: &ClientLoad) -> (f64, f64) {
    // What lies outside is drawn at the edge.
    let sensible = |us: &f64| (SHORTEST_US..LONGEST_US).contains(us);
    let values = || load.series.iter().flat_map(|p| [p.p50_us, p.max_us]).flatten().filter(sensible);
    let low = values().fold(f64::INFINITY, f64::min);
    let high = values().fold(0.0, f64::max);
    if !low.is_finite() {
        return (10.0, 10_000.0);
    }
    let floor = 10_f64.powf(low.log10().floor());
    let ceiling = 10_f64.powf(high.log10().ceil());
    (floor, ceiling.max(floor * 100.0))
}

/// At most one point per pixel: the highest p99 and maximum and the median p50 of what falls into it, so that no peak
/// is drawn away.
fn per_column(series: &[LatencyPoint], columns: usize) -> Vec<LatencyPoint> {
    let step = series.len().div_ceil(columns.max(1)).max(1);
    let highest = |values: &mut dyn Iterator<Item = Option<f64>>| values.flatten().reduce(f64::max);
    series
        .chunks(step)
        .map(|chunk| {
            let mut p50: Vec<f64> = chunk.iter().filter_map(|p| p.p50_us).collect();
            p50.sort_by(f64::total_cmp);
            LatencyPoint {
                at_s: chunk[0].at_s,
                p50_us: p50.get(p50.len() / 2).copied(),
                p99_us: highest(&mut chunk.iter().map(|p| p.p99_us)),
                max_us: highest(&mut chunk.iter().map(|p| p.max_us)),
                failed: chunk.iter().map(|p| p.failed).sum(),
            }
        })
        .collect()
}

/// The forecast band with its median, and what came.
pub(crate) fn forecast(series: &ForecastSeries, size: Size) -> String {
    let (width, plot_height, left, right) = match size {
        Size::Wide => (520.0, 180.0, 48.0, 8.0),
        Size::Narrow => (360.0, 170.0, 46.0, 8.0),
    };
    let (top, bottom) = (8.0, 8.0 + plot_height);
    let mut svg = Svg::new(width, bottom + 24.0);
    let points = &series.points;
    let begin = points.first().map_or(0, |p| p.unix_ms);
    let seconds = |p: &ForecastPoint| p.unix_ms.saturating_sub(begin) as f64 / 1e3;
    let length = points.last().map_or(1.0, seconds).max(1.0);
    let (low, high) = value_range(points);
    let x = Scale::linear(0.0, length, left, width - right);
    let y = Scale::linear(low, high, bottom, top);
    for value in ticks(low, high, 5) {
        svg.segment("grid", (left, y.at(value)), (width - right, y.at(value)));
        svg.text("tick", (left - 8.0, y.at(value) + 4.0), Anchor::End, &number(value));
    }
    for second in time_ticks(0.0, length, if size == Size::Wide { 6 } else { 4 }) {
        svg.text("tick", (x.at(second), bottom + 18.0), Anchor::Middle, &clock(second));
    }
    svg.path("band", &band(points.iter().map(|p| Some((x.at(seconds(p)), y.at(p.q95?), y.at(p.q05?))))));
    let curve = |value: fn(&ForecastPoint) -> Option<f64>| {
        line(points.iter().map(|p| value(p).map(|v| (x.at(seconds(p)), y.at(v)))))
    };
    svg.path("curve lstm", &curve(|p| p.lstm_q05));
    svg.path("curve lstm", &curve(|p| p.lstm_q95));
    svg.path("curve median", &curve(|p| p.q50));
    svg.path("curve actual", &curve(|p| p.actual));
    let name = series.resource.name();
    let description = match series.coverage() {
        Some((share, compared)) => {
            format!("{name}: {:.0} % of {compared} actual values lie inside the forecast 90 % interval.", share * 100.0)
        }
        None => format!("{name}: nothing to compare yet."),
    };
    svg.finish(size.class(), &description)
}

/// With room above and below; from zero unless the values all lie far from it.
fn value_range(points: &[ForecastPoint]) -> (f64, f64) {
    let values = || {
        points.iter().flat_map(|p| [p.actual, p.q05, p.q95, p.lstm_q05, p.lstm_q95]).flatten().filter(|v| v.is_finite())
    };
    let low = values().fold(f64::INFINITY, f64::min);
    let high = values().fold(f64::NEG_INFINITY, f64::max);
    if !low.is_finite() || high <= 0.0 {
        return (0.0, 1.0);
    }
    let room = ((high - low) * 0.08).max(high * 0.01);
    if low < high * 0.5 { (0.0, high + room) } else { ((low - room).max(0.0), high + room) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_peak_is_drawn_away() {
        let series: Vec<LatencyPoint> = (0..5000)
            .map(|i| LatencyPoint {
                at_s: f64::from(i) / 10.0,
                p50_us: Some(100.0),
                p99_us: Some(200.0),
                max_us: Some(if i == 4321 { 9000.0 } else { 300.0 }),
                failed: u64::from(i == 4321),
            })
            .collect();
        let columns = per_column(&series, 300);
        assert!(columns.len() <= 300);
        assert!(columns.iter().any(|p| p.max_us == Some(9000.0) && p.failed == 1));
        assert!(columns.iter().all(|p| p.p50_us == Some(100.0)));
        assert!(per_column(&[], 300).is_empty());
    }

    #[test]
    fn an_axis_starts_at_zero_unless_that_hides_the_curve() {
        let at = |v: f64| ForecastPoint { actual: Some(v), ..ForecastPoint::default() };
        assert_eq!(value_range(&[at(2.0), at(10.0)]).0, 0.0);
        assert!(value_range(&[at(200.0), at(210.0)]).0 > 190.0);
        assert_eq!(value_range(&[]), (0.0, 1.0));
        assert_eq!(value_range(&[at(0.0)]), (0.0, 1.0));
    }
}
