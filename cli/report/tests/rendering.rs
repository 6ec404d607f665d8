//! The page as a reader and the table as a terminal get them.
#![allow(clippy::unwrap_used)]

mod sample;

use proptest::prelude::*;
use sample::sample;
use warmswap_load::Totals;
use warmswap_report::{ClientLoad, ForecastPoint, LatencyPoint, Machine, ReportInput, render, text_table};

/// Every tag that is opened is closed, in order. Enough HTML to catch a broken chart.
fn check_nesting(html: &str) {
    let void = ["meta", "path", "line", "circle", "!doctype"];
    let mut open: Vec<&str> = Vec::new();
    for piece in html.split('<').skip(1) {
        let (tag, _) = piece.split_once('>').expect("every < has its >");
        let name = tag.split([' ', '\n', '/']).find(|part| !part.is_empty()).unwrap_or_default();
        if let Some(closed) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(closed.trim()), "…<{piece}");
        } else if !tag.ends_with('/') && !void.contains(&name) {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "never closed: {open:?}");
}

#[test]
fn the_page_needs_nothing_from_outside() {
    let html = render(&sample());
    check_nesting(&html);
    for outside in ["http:", "https:", "src=", "href=", "@import", "url(", "<script", "<link", "<img", "<iframe"] {
        assert!(!html.contains(outside), "{outside}");
    }
    assert!(html.contains("prefers-color-scheme: dark"));
    assert!(html.len() < 1 << 20, "{} bytes", html.len());
}

#[test]
fn the_page_shows_every_handover_with_its_reason_and_phases() {
    let html = render(&sample());
    for text in [
        "v1 → v2",
        "v2 → v3",
        "p99 rose from 0.4 ms to 3.6 ms, above 2.0 × its baseline",
        "shadow died during SYNC: &lt;signal 9&gt;",
        "rolled back",
        "163 µs",
        "171 µs + 214 µs*",
        "1,000 / 1,000",
        "memory would have run out in 210 s",
        "64 MiB of state mapped",
        "switch back 163 µs, enlarged",
        "2026-11-22 03:33:10 UTC",
        "Linux 6.18.0",
    ] {
        assert!(html.contains(text), "{text}");
    }
    assert_eq!(html.matches("<svg").count(), 2 * (1 + 3 + 4), "each chart wide and narrow");
    assert_eq!(html.matches("<svg").count(), html.matches("aria-label=\"").count() - 1, "each is described in words");
}

#[test]
fn the_page_can_be_rendered_again_from_json() {
    let input = sample();
    let text = serde_json::to_string(&input).unwrap();
    let back: ReportInput = serde_json::from_str(&text).unwrap();
    assert_eq!(render(&back), render(&input));
}

#[test]
fn failures_are_red_and_only_failures() {
    let mut input = sample();
    assert!(!render(&input).contains("tile bad") && !render(&input).contains("<rect class=\"failure\""));
    let clients = input.clients.as_mut().unwrap();
    clients.totals = Totals { failed_requests: 3, lost_writes: 1, ..clients.totals };
    clients.series[700].failed = 3;
    clients.connections_kept = 999;
    input.handovers[0].clients.as_mut().unwrap().failed = 3;
    let html = render(&input);
    assert_eq!(html.matches("tile bad").count(), 3);
    assert_eq!(html.matches("<rect class=\"failure\"").count(), 2, "wide and narrow");
    assert!(html.contains("<td class=\"n bad\" data-label=\"failed\">3</td>"));
}

#[test]
fn a_report_of_nothing_is_still_a_page() {
    let empty = ReportInput {
        title: "<empty & \"quoted\">".into(),
        created_unix_ms: 0,
        machine: Machine::default(),
        clients: None,
        handovers: Vec::new(),
        forecasts: Vec::new(),
    };
    let html = render(&empty);
    check_nesting(&html);
    assert!(html.contains("&lt;empty &amp; &quot;quoted&quot;&gt;") && html.contains("None took place."));
    assert_eq!(text_table(&[]).lines().count(), 1);
}

#[test]
fn the_text_table_is_aligned() {
    let expected = "\
handover   verdict               blackout   longest gap   failed   lost   p99 before → after   reason
v1 → v2    committed               163 µs       2.31 ms        0      0   412 µs → 421 µs
v2 → v3    rolled back   171 µs + 214 µs*       3.87 ms        0      0   417 µs → 3.61 ms     p99 rose from 0.4 ms to 3.6 ms, above 2.0 × its baseline
v2 → v2    aborted                      0       1.48 ms        0      0   415 µs → 409 µs      shadow died during SYNC: <signal 9>
* by the supervisor's clock: the kernel's marks were not seen
";
    assert_eq!(text_table(&sample().handovers), expected);
}

proptest! {
    #[test]
    fn odd_numbers_make_no_broken_page(
        values in prop::collection::vec((any::<Option<f64>>(), any::<Option<f64>>(), any::<u64>()), 0..50),
        seconds in any::<f64>(),
    ) {
        let mut input = sample();
        input.clients = Some(ClientLoad {
            seconds,
            series: values
                .iter()
                .map(|(a, b, n)| LatencyPoint { at_s: *n as f64, p50_us: *a, p99_us: *b, max_us: *a, failed: *n })
                .collect(),
            ..sample().clients.unwrap()
        });
        input.forecasts[0].points = values
            .iter()
            .map(|(a, b, n)| ForecastPoint {
                unix_ms: *n,
                actual: *a,
                q05: *b,
                q50: *a,
                q95: *b,
                lstm_q05: *a,
                lstm_q95: *b,
            })
            .collect();
        let html = render(&input);
        prop_assert!(!html.contains("NaN") && !html.contains("inf "), "a number that is none");
        check_nesting(&html);
    }
}
