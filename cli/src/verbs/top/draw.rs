//! From what is known to cells. Nothing here knows a terminal, so that tests look at what a person would see.

use std::time::Duration;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Paragraph, Wrap};
use warmswap_agent::api::{Live, LiveContainer, News, NewsKind, ProbeCost, Role, Tool};
use warmswap_model::Resource;

use super::charts;
use super::state::{Sort, State};
use super::text::{amount, bar, fit, gauge, pad, right, spark, time_of_day};

pub(super) const WIDTH_MIN: u16 = 80;
pub(super) const HEIGHT_MIN: u16 = 24;
/// From here on the forecast is drawn over time.
const TALL: u16 = 34;
/// From here on every resource has a sparkline.
const WIDE: u16 = 112;
/// An agent tells something every second; when it has not for so long, it hangs, or the host does.
const SILENT: Duration = Duration::from_secs(4);

const DIM: Style = Style::new().add_modifier(Modifier::DIM);
const BOLD: Style = Style::new().add_modifier(Modifier::BOLD);
const GOOD: Style = Style::new().fg(Color::Green);
const WARN: Style = Style::new().fg(Color::Yellow);
const BAD: Style = Style::new().fg(Color::Red);

/// `silent`: since when the agent has told nothing.
pub(super) fn draw(frame: &mut Frame<'_>, state: &State, silent: Duration) {
    let area = frame.area();
    if area.width < WIDTH_MIN || area.height < HEIGHT_MIN {
        let words = format!(
            "warmswap top needs a terminal of {WIDTH_MIN} by {HEIGHT_MIN} characters; this one has {} by {}. Make it \
             larger, or use warmswap top --json. q leaves.",
            area.width, area.height
        );
        frame.render_widget(Paragraph::new(words).wrap(Wrap { trim: true }), area);
        return;
    }
    let tall = area.height >= TALL;
    let (detail_height, log_height) = if tall { (13, 9) } else { (5, 5) };
    let [title, table, detail, log, footer] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Min(1),
        Constraint::Length(detail_height),
        Constraint::Length(log_height),
        Constraint::Length(1),
    ])
    .areas(area);
    line(frame, title, 0, &title_line(state, silent, area.width));
    if state.help {
        let below = Rect { y: table.y, height: area.height - 1, ..area };
        help(frame, below);
        return;
    }
    let Some(live) = &state.live else {
        let words = match &state.gone {
            Some(why) => format!("{why} Trying again every second."),
            None => "Waiting for the first second.".into(),
        };
        frame.render_widget(Paragraph::new(words).wrap(Wrap { trim: true }), table);
        return;
    };
    rows(frame, table, state, live);
    let chosen = state.selected().and_then(|at| state.containers().nth(at));
    match chosen {
        Some(container) if tall => charts::draw(frame, detail, state, live, container),
        Some(container) => details(frame, detail, state, container),
        None => line(frame, detail, 0, &rule("nothing runs; start a service with warmswap run FILE", area.width)),
    }
    news(frame, log, state);
    line(frame, footer, 0, &footer_line(live, area.width));
}

pub(super) fn line(frame: &mut Frame<'_>, area: Rect, row: u16, line: &Line<'_>) {
    if row < area.height {
        frame.buffer_mut().set_line(area.x, area.y + row, line, area.width);
    }
}

/// A title with a line to the right edge.
pub(super) fn rule(title: &str, width: u16) -> Line<'static> {
    let title = format!("── {} ", fit(title, usize::from(width).saturating_sub(4)));
    Line::styled(format!("{title}{}", "─".repeat(usize::from(width))), DIM)
}

fn title_line(state: &State, silent: Duration, width: u16) -> Line<'static> {
    if let Some(why) = &state.gone {
        let words = format!("warmswap top  the agent is gone: {why}; trying again every second");
        return Line::styled(fit(&words, width.into()), BAD.patch(BOLD));
    }
    if silent >= SILENT {
        let words = format!("warmswap top  the agent has told nothing for {} s", silent.as_secs());
        return Line::styled(fit(&words, width.into()), WARN.patch(BOLD));
    }
    let Some(live) = &state.live else { return Line::styled("warmswap top", BOLD) };
    let services = live.containers.iter().filter(|row| row.tool == Tool::Warmswap && row.role != Some(Role::Shadow));
    let mut services: Vec<&str> = services.map(|row| row.name.as_str()).collect();
    services.sort_unstable();
    services.dedup();
    let others = live.containers.iter().filter(|row| row.tool != Tool::Warmswap).count();
    let cpu: f64 = live.containers.iter().filter_map(|row| row.usage.cpu).sum();
    let many = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
    let mut words = format!(
        "  {}, {}{}  CPU {} of {} %",
        many(services.len(), "service"),
        many(others, "other container"),
        if live.unwatched > 0 { format!(" ({} more unwatched)", live.unwatched) } else { String::new() },
        amount(cpu),
        live.cpus * 100,
    );
    let time = format!("{} UTC", time_of_day(live.unix_ms));
    let room = usize::from(width).saturating_sub("warmswap top".len() + time.len());
    words = pad(&words, room);
    Line::from(vec![Span::styled("warmswap top", BOLD), Span::raw(words), Span::raw(time)])
}

/// Widths of the columns that give and take.
struct Columns {
    name: usize,
    bar: usize,
    spark: usize,
    /// Of memory, network and disk each.
    sparks: usize,
    note: usize,
}

impl Columns {
    fn of(width: u16) -> Self {
        let wide = width >= WIDE;
        let sparks = if wide { 8 } else { 0 };
        let mut spare = usize::from(width).saturating_sub(80 + if wide { 3 * 9 } else { 0 });
        let mut take = |most: usize| {
            let taken = spare.min(most);
            spare -= taken;
            taken
        };
        let (name, spark, bar) = (23 + take(8), 8 + take(8), 5 + take(5));
        Self { name, bar, spark, sparks, note: take(40).saturating_sub(1) }
    }
}

fn rows(frame: &mut Frame<'_>, area: Rect, state: &State, live: &Live) {
    let columns = Columns::of(area.width);
    line(frame, area, 0, &header(&columns, state.sort));
    let shown = usize::from(area.height.saturating_sub(1));
    let chosen = state.selected().unwrap_or(0);
    let total = state.order.len();
    // The chosen one stays in sight, and the end of the list at the end of the screen.
    let first = (chosen + 1).saturating_sub(shown);
    let busiest = live.containers.iter().filter_map(|row| row.usage.cpu).fold(100.0, f64::max);
    for (at, container) in state.containers().enumerate().skip(first).take(shown) {
        let below = total.saturating_sub(first + shown);
        let last = at + 1 == first + shown && below > 0 && at != chosen;
        let row = u16::try_from(at - first + 1).unwrap_or(u16::MAX);
        if last {
            line(frame, area, row, &Line::styled(format!("  … {} more below", below + 1), DIM));
        } else {
            line(frame, area, row, &container_line(&columns, state, container, at == chosen, busiest));
        }
    }
}

fn header(columns: &Columns, sort: Sort) -> Line<'static> {
    let mut spans = vec![Span::styled(pad(" CONTAINER", columns.name + 2), BOLD)];
    let mut cell = |title: &str, width: usize, of: Option<Sort>| {
        let style = if of == Some(sort) { BOLD.add_modifier(Modifier::REVERSED) } else { BOLD };
        let title = fit(title, width);
        spans.push(Span::raw(" ".repeat(width.saturating_sub(title.chars().count()))));
        spans.push(Span::styled(title, style));
        spans.push(Span::raw(" "));
    };
    let spark = |cell: &mut dyn FnMut(&str, usize, Option<Sort>)| {
        if columns.sparks > 0 {
            cell("", columns.sparks, None);
        }
    };
    cell("CPU %", 6, Some(Sort::Usage(Resource::Cpu)));
    cell("", columns.bar, None);
    cell("", columns.spark, None);
    cell("MB", 7, Some(Sort::Usage(Resource::Memory)));
    spark(&mut cell);
    cell("Mbps", 7, Some(Sort::Usage(Resource::Network)));
    spark(&mut cell);
    cell("MB/s", 6, Some(Sort::Usage(Resource::Disk)));
    spark(&mut cell);
    cell("IN/s", 4, Some(Sort::Input));
    cell("EX/s", 5, Some(Sort::Launches));
    Line::from(spans)
}

fn container_line(
    columns: &Columns,
    state: &State,
    container: &LiveContainer,
    chosen: bool,
    busiest: f64,
) -> Line<'static> {
    let base = match container {
        row if row.trouble => BAD,
        row if row.ended || matches!(row.role, Some(Role::Shadow | Role::Parked | Role::Draining)) => DIM,
        row if row.note.is_some() => WARN,
        _ => Style::new(),
    };
    let marker = if chosen { ">" } else { " " };
    let known = |resource: Resource| container.usage[resource].map_or_else(|| "–".to_owned(), amount);
    let history = state.history(container);
    let sparkline = |resource: Resource, width: usize, least: f64| {
        let values = history.map(|history| history.of(resource)).into_iter().flatten();
        spark(values, width, least)
    };
    let cpu = container.usage.cpu.unwrap_or(0.0);
    let mut spans = vec![Span::styled(format!("{marker}{} ", pad(&who(container), columns.name)), base)];
    if chosen {
        spans[0].style = base.patch(BOLD);
    }
    let mut cell = |text: String, style: Style| spans.push(Span::styled(format!("{text} "), style));
    cell(right(&known(Resource::Cpu), 6), base);
    cell(bar(cpu / busiest, columns.bar), base.patch(load_style(cpu, busiest)));
    cell(sparkline(Resource::Cpu, columns.spark, 10.0), base.patch(GOOD));
    for (resource, width, least) in [(Resource::Memory, 7, 1.0), (Resource::Network, 7, 1.0), (Resource::Disk, 6, 1.0)]
    {
        cell(right(&known(resource), width), base);
        if columns.sparks > 0 {
            cell(sparkline(resource, columns.sparks, least), base.patch(GOOD));
        }
    }
    cell(right(&amount(container.inputs_per_s), 4), base);
    cell(right(&amount(container.launches_per_s), 5), base);
    if columns.note > 0 {
        let note = container.note.clone().unwrap_or_default();
        cell(fit(&note, columns.note), base);
    }
    Line::from(spans)
}

fn load_style(cpu: f64, busiest: f64) -> Style {
    if cpu >= 0.8 * busiest && cpu >= 80.0 { WARN } else { GOOD }
}

/// `shop g3`, `shop g4 shadow`, `docker web`.
pub(super) fn who(container: &LiveContainer) -> String {
    let mut words = match (container.tool, container.generation) {
        (Tool::Warmswap, Some(generation)) => format!("{} {generation}", container.name),
        (Tool::Warmswap, None) => container.name.clone(),
        (tool, _) => format!("{tool} {}", container.name),
    };
    let more = match container.role {
        Some(Role::Shadow) => " shadow",
        Some(Role::Parked) => " parked",
        Some(Role::Draining) => " drains",
        Some(Role::Owner) | None if container.ended => " ended",
        Some(Role::Owner) | None => "",
    };
    words.push_str(more);
    words
}

/// What is said of the chosen one above its numbers.
pub(super) fn headline(container: &LiveContainer) -> String {
    let mut words = who(container);
    if container.requests_per_s > 0.0 || container.p99_us.is_some() {
        words.push_str(&format!(", {} requests/s", amount(container.requests_per_s)));
        let p99 = container.p99_us.map(warmswap_report::duration_us);
        words.extend(p99.map(|p99| format!(", p99 {p99}")));
    }
    words.extend(container.note.iter().map(|note| format!(", {note}")));
    words.extend(container.path.iter().map(|path| format!(", {path}")));
    words
}

/// Four lines: what it uses, and what it is expected to need or has used.
fn details(frame: &mut Frame<'_>, area: Rect, state: &State, container: &LiveContainer) {
    line(frame, area, 0, &rule(&headline(container), area.width));
    for (row, resource) in (1..).zip(Resource::ALL) {
        line(frame, area, row, &detail_line(state, container, resource, area.width));
    }
}

fn detail_line(state: &State, container: &LiveContainer, resource: Resource, width: u16) -> Line<'static> {
    const LEAST: [f64; 4] = [10.0, 1.0, 1.0, 1.0];
    let now = container.usage[resource];
    let used = now.map_or_else(|| "–".to_owned(), amount);
    let start = format!(" {} {} {}", pad(resource.name(), 8), right(&used, 8), pad(resource.unit(), 5));
    let recent: Vec<f64> = state
        .history(container)
        .into_iter()
        .flat_map(|history| history.of(resource).rev().take(60))
        .flatten()
        .collect();
    let highest = recent.iter().copied().fold(0.0, f64::max);
    let least = LEAST[Resource::ALL.iter().position(|other| *other == resource).unwrap_or(0)];
    let Some(demand) = &container.demand else {
        let service = container.tool == Tool::Warmswap;
        let words = match (recent.len(), service && matches!(container.role, Some(Role::Owner))) {
            (_, true) => "no forecast yet: it takes some seconds of use".to_owned(),
            (0, _) => "not known here".to_owned(),
            (n, _) => {
                let mean = recent.iter().sum::<f64>() / n as f64;
                format!("mean {}, highest {} in the last {n} s", amount(mean), amount(highest))
            }
        };
        return Line::from(vec![Span::raw(start), Span::styled(format!(" {words}"), DIM)]);
    };
    let band = demand.quantiles[resource];
    let words =
        format!(" next {:.0} s: {} ({}–{})", demand.horizon_s, amount(band.q50), amount(band.q05), amount(band.q95));
    let words = pad(&words, 34);
    let room = usize::from(width).saturating_sub(start.chars().count() + words.chars().count() + 2);
    let scale = highest.max(band.q95).max(now.unwrap_or(0.0)).max(least) * 1.05;
    let inside = now.is_none_or(|now| (band.q05..=band.q95).contains(&now));
    Line::from(vec![
        Span::raw(start),
        Span::raw(words),
        Span::styled("▕", DIM),
        Span::styled(gauge(now, (band.q05, band.q50, band.q95), scale, room), if inside { GOOD } else { WARN }),
        Span::styled("▏", DIM),
    ])
}

fn news(frame: &mut Frame<'_>, area: Rect, state: &State) {
    line(frame, area, 0, &rule("what happened", area.width));
    let shown = usize::from(area.height.saturating_sub(1));
    let skip = state.news.len().saturating_sub(shown);
    for (row, news) in (1..).zip(state.news.iter().skip(skip)) {
        line(frame, area, row, &news_line(news, area.width));
    }
}

fn news_line(news: &News, width: u16) -> Line<'static> {
    let style = match news.kind {
        NewsKind::Came | NewsKind::Went => DIM,
        NewsKind::HandoverBegan => Style::new(),
        NewsKind::Committed | NewsKind::Recovered => GOOD,
        NewsKind::Refused => WARN,
        NewsKind::Trouble | NewsKind::OomKill => BAD,
    };
    let words = format!(" {} {} {}", time_of_day(news.unix_ms), news.of, news.text);
    Line::styled(fit(&words, width.into()), style)
}

fn footer_line(live: &Live, width: u16) -> Line<'static> {
    const KEYS: &str = " ? help  q quit";
    let (words, lossy) = cost_words(&live.probes);
    let style = if lossy { BAD } else { DIM };
    let room = usize::from(width).saturating_sub(KEYS.len());
    Line::from(vec![Span::styled(pad(&words, room), style), Span::raw(KEYS)])
}

/// What the probes cost and lose, and whether they lose anything.
fn cost_words(probes: &ProbeCost) -> (String, bool) {
    if probes.attached == 0 {
        return (" no probes: nothing is counted here; see warmswap check".into(), true);
    }
    let mut parts = vec![format!(
        "{} probes{}",
        probes.attached,
        if probes.off > 0 { format!(" ({} off)", probes.off) } else { String::new() }
    )];
    if let Some(kernel) = &probes.kernel {
        let about = if kernel.empty_ns > 0.0 { "" } else { "at most " };
        parts.push(format!("kernel {about}{:.2} % CPU", kernel.cpu));
    }
    parts.extend(probes.reading_cpu.map(|cpu| format!("reading {cpu:.2} % CPU")));
    parts.push(format!("{} events/s", amount(probes.events_per_s)));
    // First, because it is what must not be cut off.
    let lost: Vec<String> = probes.dropped.iter().map(|lost| format!("{} {}", lost.total, lost.class)).collect();
    let lossy = !lost.is_empty();
    if lossy {
        parts.insert(0, format!("{} events LOST", lost.join(", ")));
    }
    (format!(" {}", parts.join(", ")), lossy)
}

fn help(frame: &mut Frame<'_>, area: Rect) {
    const WORDS: [&str; 19] = [
        "",
        " ↑ ↓ PgUp PgDn   choose a container: its forecast and history are shown below",
        " c m n d         sort by CPU, memory, network, disk",
        " i l             sort by input, by launches",
        " ?               this help",
        " q Esc Ctrl-C    leave",
        "",
        " CPU %   of one CPU: 150 is one and a half",
        " MB      memory in use, MiB; – where the host does not count it",
        " Mbps    network, both directions, as the sockets of the container see it",
        " MB/s    disk, reads and writes",
        " IN/s    reads from terminals and input devices, a second",
        " EX/s    programs started (exec), a second",
        "",
        " bar ▕▒▒┃▒▒ ● ▏  ▒ 90 % interval of the forecast, ┃ its median, ● now",
        " Sparklines show the last seconds, each to its own highest value.",
        "",
        " The line at the bottom: what the probes cost. Their run time in the kernel is",
        " measured with warmswap top --cost only, because measuring lengthens it.",
    ];
    for (row, words) in (0..).zip(WORDS) {
        line(frame, area, row, &Line::raw(words));
    }
}
