//! Numbers as people read them.

use std::fmt::Write as _;

/// `0`, `183 µs`, `1.24 ms`, `36 ms`, `4.2 s`, `3 min 20 s`. Three digits at most.
#[must_use]
pub fn duration_us(us: f64) -> String {
    let digits = |value: f64, unit: &str| {
        let decimals = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
        let text = format!("{value:.decimals$}");
        // 1.50 says no more than 1.5, 4.00 no more than 4.
        let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
        format!("{text} {unit}")
    };
    match us {
        us if !us.is_finite() || us < 0.0 => "–".into(),
        ..0.05 => "0".into(),
        ..99.95 => digits((us * 10.0).round() / 10.0, "µs"),
        ..999.5 => digits(us, "µs"),
        ..999_500.0 => digits(us / 1e3, "ms"),
        ..100e6 => digits(us / 1e6, "s"),
        _ => {
            let seconds = (us / 1e6).round() as u64;
            format!("{} min {} s", seconds / 60, seconds % 60)
        }
    }
}

/// `1,234,567`
#[must_use]
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `512 B`, `64 MiB`, `1.2 GiB`
#[must_use]
pub fn bytes(number: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = number as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let decimals = usize::from(unit > 0 && value < 10.0);
    format!("{value:.decimals$} {}", UNITS[unit])
}

/// A plain number for an axis or a label: `0`, `0.25`, `12`, `1,500`.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 1000.0 => count(v.round() as u64),
        v if v >= 10.0 || v == 0.0 => format!("{value:.0}"),
        _ => {
            let text = format!("{value:.2}");
            text.trim_end_matches('0').trim_end_matches('.').to_owned()
        }
    }
}

/// Seconds as `m:ss`.
pub(crate) fn clock(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64;
    if seconds >= 3600 {
        format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
    } else {
        format!("{}:{:02}", seconds / 60, seconds % 60)
    }
}

/// `2026-11-22 03:30:05 UTC`
#[must_use]
pub fn utc(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000;
    let (days, of_day) = ((seconds / 86_400) as i64, seconds % 86_400);
    // Days since 1970 to a civil date; eras of 400 years that begin on 1 March (H. Hinnant, chrono-compatible dates).
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let mut text = format!("{year:04}-{month:02}-{day:02} ");
    let _ = write!(text, "{:02}:{:02}:{:02} UTC", of_day / 3600, of_day / 60 % 60, of_day % 60);
    text
}

/// Text inside HTML or SVG, attributes included.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // Control characters are not allowed in HTML and could come out of a broken service's error text.
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units_that_fit() {
        for (us, text) in [
            (0.0, "0"),
            (0.4, "0.4 µs"),
            (18.34, "18.3 µs"),
            (182.6, "183 µs"),
            (999.7, "1 ms"),
            (1240.0, "1.24 ms"),
            (36_000.0, "36 ms"),
            (450_000.0, "450 ms"),
            (4_200_000.0, "4.2 s"),
            (99_990_000.0, "100 s"),
            (200_000_000.0, "3 min 20 s"),
            (f64::NAN, "–"),
            (-1.0, "–"),
        ] {
            assert_eq!(duration_us(us), text, "{us}");
        }
    }

    #[test]
    fn counts_bytes_and_dates_are_readable() {
        assert_eq!((count(0).as_str(), count(999).as_str(), count(1_234_567).as_str()), ("0", "999", "1,234,567"));
        assert_eq!((bytes(12).as_str(), bytes(1536).as_str(), bytes(64 << 20).as_str()), ("12 B", "1.5 KiB", "64 MiB"));
        assert_eq!(utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(utc(951_827_696_000), "2000-02-29 12:34:56 UTC");
        assert_eq!(utc(1_795_318_205_999), "2026-11-22 03:30:05 UTC");
        assert_eq!((number(0.25).as_str(), number(1500.0).as_str(), clock(75.2).as_str()), ("0.25", "1,500", "1:15"));
        assert_eq!(escape("<a href='x'>\u{7}&"), "&lt;a href=&#39;x&#39;&gt; &amp;");
    }
}
