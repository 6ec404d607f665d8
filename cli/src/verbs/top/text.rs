//! Numbers and little pictures as text of a given width.

use ratatui::text::Span;

const EIGHTHS: [char; 8] = ['▏', '▎', '▍', '▌', '▋', '▊', '▉', '█'];
const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Cells that text takes.
fn width(text: &str) -> usize {
    Span::raw(text).width()
}

/// At most `room` cells, with `…` where something is missing.
pub(super) fn fit(text: &str, room: usize) -> String {
    if width(text) <= room {
        return text.to_owned();
    }
    let mut fitted = String::new();
    for character in text.chars() {
        fitted.push(character);
        if width(&fitted) >= room {
            fitted.pop();
            break;
        }
    }
    if room > 0 {
        fitted.push('…');
    }
    fitted
}

/// Exactly `room` cells.
pub(super) fn pad(text: &str, room: usize) -> String {
    let fitted = fit(text, room);
    let missing = room.saturating_sub(width(&fitted));
    fitted + &" ".repeat(missing)
}

/// Exactly `room` cells, at their right.
pub(super) fn right(text: &str, room: usize) -> String {
    let fitted = fit(text, room);
    " ".repeat(room.saturating_sub(width(&fitted))) + &fitted
}

/// Four digits at most, as many decimals as matter.
pub(super) fn amount(value: f64) -> String {
    match value.abs() {
        v if v < 0.05 => "0".into(),
        v if v < 99.95 => format!("{value:.1}"),
        v if v < 9_999.5 => format!("{value:.0}"),
        v if v < 999_500.0 => format!("{:.0}k", value / 1e3),
        v if v < 1e9 => format!("{:.1}M", value / 1e6),
        _ => format!("{value:.0e}"),
    }
}

/// A share of the width.
pub(super) fn bar(share: f64, width: usize) -> String {
    let eighths = (share.clamp(0.0, 1.0) * width as f64 * 8.0).round() as usize;
    let mut text = "█".repeat(eighths / 8);
    if let Some(part) = (eighths % 8).checked_sub(1) {
        text.push(EIGHTHS[part]);
    }
    let drawn = text.chars().count();
    text + &" ".repeat(width.saturating_sub(drawn))
}

/// The newest values, the newest at the right, to the highest of them or `least`.
pub(super) fn spark(values: impl DoubleEndedIterator<Item = Option<f64>>, width: usize, least: f64) -> String {
    let mut newest: Vec<Option<f64>> = values.rev().take(width).collect();
    newest.resize(width, None);
    let highest = newest.iter().flatten().copied().fold(least, f64::max);
    let level = |value: f64| LEVELS[((value / highest * 8.0).ceil() as usize).clamp(1, 8) - 1];
    newest.into_iter().rev().map(|value| value.map_or(' ', level)).collect()
}

/// An interval with its median, and a value, on a scale from 0.
pub(super) fn gauge(now: Option<f64>, (low, median, high): (f64, f64, f64), scale: f64, width: usize) -> String {
    let Some(last) = width.checked_sub(1) else { return String::new() };
    let cell = |value: f64| ((value / scale).clamp(0.0, 1.0) * last as f64).round() as usize;
    let mut cells = vec![' '; width];
    cells[cell(low)..=cell(high).max(cell(low))].fill('▒');
    cells[cell(median)] = '┃';
    if let Some(now) = now {
        cells[cell(now)] = '●';
    }
    cells.into_iter().collect()
}

/// UTC.
pub(super) fn time_of_day(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000 % 86_400;
    format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_has_the_width_it_was_given() {
        assert_eq!(fit("docker 3f2a", 8), "docker …");
        assert_eq!((fit("abc", 3), fit("abc", 0), fit("日本語", 4)), ("abc".into(), String::new(), "日…".into()));
        assert_eq!((pad("ab", 4), right("ab", 4), pad("abcde", 4)), ("ab  ".into(), "  ab".into(), "abc…".into()));
        assert_eq!(
            (bar(0.5, 5), bar(2.0, 3), bar(-1.0, 2), bar(f64::NAN, 2)),
            ("██▌  ".into(), "███".into(), "  ".into(), "  ".into())
        );
        assert_eq!(spark([Some(0.0), None, Some(50.0), Some(100.0)].into_iter(), 6, 10.0), "  ▁ ▄█");
        assert_eq!(gauge(Some(9.0), (2.0, 4.0, 6.0), 10.0, 11), "  ▒▒┃▒▒  ● ");
        assert_eq!(gauge(None, (f64::NAN, 1e99, -1.0), 10.0, 3).chars().count(), 3);
        assert_eq!(gauge(None, (0.0, 0.0, 0.0), 1.0, 0), "");
    }

    #[test]
    fn amounts_fit_in_six_cells() {
        let amounts = [0.0, 0.04, 0.05, 99.94, 99.96, 9_999.4, 12_345.0, 1_234_567.0].map(amount);
        assert_eq!(amounts, ["0", "0", "0.1", "99.9", "100", "9999", "12k", "1.2M"]);
        assert_eq!(time_of_day(86_400_000 + 3_661_000), "01:01:01");
    }
}
