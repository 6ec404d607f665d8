//! The page around the charts.

use std::fmt::Write as _;

use warmswap_model::{HandoverReport, StateMove, Trigger};

use crate::charts::{self, Size, verdict_class};
use crate::format::{bytes, count, duration_us, escape, utc};
use crate::input::{ClientLoad, ForecastSeries, HandoverView, Machine, ReportInput};
use crate::table::row;
use crate::timeline;

/// One HTML file: no script, nothing from outside.
#[must_use]
pub fn render(input: &ReportInput) -> String {
    let mut out = String::with_capacity(256 << 10);
    let title = escape(&input.title);
    let _ = write!(
        out,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{title}</title>\n<style>\n{}</style>\n</head>\n\
         <body>\n<main>\n<header>\n<h1>{title}</h1>\n<p class=\"sub\">{}</p>\n</header>\n",
        include_str!("style.css"),
        escape(&subtitle(input)),
    );
    tiles(&mut out, input);
    handover_table(&mut out, input);
    if let Some(clients) = &input.clients {
        latency_section(&mut out, clients, &input.handovers);
    }
    phases_section(&mut out, &input.handovers);
    forecast_section(&mut out, &input.forecasts);
    machine_section(&mut out, &input.machine, input.created_unix_ms);
    out.push_str("</main>\n</body>\n</html>\n");
    out
}

fn subtitle(input: &ReportInput) -> String {
    let machine = &input.machine;
    let mut parts = vec![utc(input.created_unix_ms)];
    if !machine.kernel.is_empty() {
        parts.push(format!("Linux {}", machine.kernel));
    }
    if machine.cpus > 0 {
        parts.push(format!("{} CPUs", machine.cpus));
    }
    parts.join(" · ")
}

/// The few numbers that matter most. Red only when something was lost.
fn tiles(out: &mut String, input: &ReportInput) {
    let blackouts = input.handovers.iter().flat_map(|h| &h.report.blackouts).map(|b| b.us);
    let longest = blackouts.reduce(f64::max).map_or_else(|| "–".into(), duration_us);
    let mut tiles = vec![
        (count(input.handovers.len() as u64), "handovers".to_owned(), false),
        (longest, "longest blackout".to_owned(), false),
    ];
    if let Some(clients) = &input.clients {
        let (failed, wrong) = (clients.totals.failed_requests, clients.totals.wrong());
        let kept = format!("{} / {}", count(clients.connections_kept as u64), count(clients.connections as u64));
        let requests = count(clients.totals.scheduled);
        tiles.extend([
            (count(failed), format!("failed of {requests} requests"), failed > 0),
            (count(wrong), "writes lost, doubled or misread".to_owned(), wrong > 0),
            (kept, "connections kept from first to last".to_owned(), clients.connections_kept < clients.connections),
        ]);
    }
    out.push_str("<section class=\"tiles\" aria-label=\"Summary\">\n");
    for (value, name, bad) in &tiles {
        let class = if *bad { "tile bad" } else { "tile" };
        let _ = writeln!(out, "<div class=\"{class}\"><b>{}</b><span>{}</span></div>", escape(value), escape(name));
    }
    out.push_str("</section>\n");
}

fn handover_table(out: &mut String, input: &ReportInput) {
    out.push_str("<section>\n<h2>Handovers</h2>\n");
    if input.handovers.is_empty() {
        out.push_str("<p>None took place.</p>\n</section>\n");
        return;
    }
    out.push_str(
        "<table>\n<thead><tr><th></th><th>handover</th><th>verdict</th><th class=\"n\">blackout</th>\
         <th class=\"n\">longest gap</th><th class=\"n\">failed</th><th class=\"n\">lost</th>\
         <th class=\"n\">p99 before → after</th></tr></thead>\n<tbody>\n",
    );
    for (index, view) in input.handovers.iter().enumerate() {
        let row = row(view);
        let verdict = verdict_class(view.report.verdict);
        let bad = |cell: &str| if matches!(cell, "0" | "–") { "n" } else { "n bad" };
        let _ = writeln!(
            out,
            "<tr class=\"first\"><td class=\"no\"><span class=\"no {verdict}\">{}</span></td>\
             <td class=\"name\">{}</td><td><span class=\"verdict {verdict}\">{}</span></td>\
             <td class=\"n\" data-label=\"blackout\">{}</td><td class=\"n\" data-label=\"longest gap\">{}</td>\
             <td class=\"{}\" data-label=\"failed\">{}</td><td class=\"{}\" data-label=\"lost\">{}</td>\
             <td class=\"n\" data-label=\"p99\">{} → {}</td></tr>",
            index + 1,
            escape(&row.handover),
            escape(&row.verdict),
            escape(&row.blackout),
            escape(&row.longest_gap),
            bad(&row.failed),
            escape(&row.failed),
            bad(&row.lost),
            escape(&row.lost),
            escape(&row.p99_before),
            escape(&row.p99_after),
        );
        if !row.reason.is_empty() {
            let _ = writeln!(out, "<tr class=\"why\"><td></td><td colspan=\"7\">{}</td></tr>", escape(&row.reason));
        }
    }
    out.push_str("</tbody>\n</table>\n<p class=\"note\">");
    out.push_str(
        "Blackout: time in which no generation served, from the marks of the old and the new owner; after a rollback, \
         there and back. Longest gap: longest time in which none of the clients got an answer.",
    );
    if input.handovers.iter().flat_map(|h| &h.report.blackouts).any(|b| !b.measured_in_kernel) {
        out.push_str(" * by the supervisor’s clock: the kernel’s marks were not seen.");
    }
    out.push_str("</p>\n</section>\n");
}

fn latency_section(out: &mut String, clients: &ClientLoad, handovers: &[HandoverView]) {
    let rate = clients.totals.scheduled as f64 / clients.seconds.max(0.001);
    let _ = write!(
        out,
        "<section>\n<h2>Client latency</h2>\n<p class=\"sub\">{} connections, {:.0} requests per second at a constant \
         rate, counted from the instant each was due</p>\n<p class=\"legend\"><span><i class=\"key p50\"></i>p50</span>\
         <span><i class=\"key p99\"></i>p99</span><span><i class=\"key max\"></i>maximum</span>\
         <span><i class=\"key span\"></i>handover, line at the switch</span></p>\n",
        count(clients.connections as u64),
        rate,
    );
    for size in Size::BOTH {
        out.push_str(&charts::latency(clients, handovers, size));
    }
    let t = &clients.totals;
    let _ = write!(
        out,
        "<p class=\"note\">{} requests answered, {} writes acknowledged, {} keys read back and compared at the end: \
         {} lost, {} doubled, {} wrong reads. {} resets, {} reconnects.</p>\n</section>\n",
        count(t.completed),
        count(t.writes_acknowledged),
        count(t.keys_verified),
        count(t.lost_writes),
        count(t.duplicated_writes),
        count(t.wrong_reads),
        count(t.resets),
        count(t.reconnects),
    );
}

fn phases_section(out: &mut String, handovers: &[HandoverView]) {
    if handovers.iter().all(|view| view.report.phases.is_empty()) {
        return;
    }
    out.push_str("<section>\n<h2>Phases</h2>\n");
    for (index, view) in handovers.iter().enumerate() {
        let report = &view.report;
        let verdict = verdict_class(report.verdict);
        let _ = write!(
            out,
            "<article>\n<h3><span class=\"no {verdict}\">{}</span>{} <span class=\"verdict {verdict}\">{}</span></h3>\n\
             <p class=\"sub\">{}</p>\n",
            index + 1,
            escape(&view.label),
            report.verdict,
            escape(&facts(report)),
        );
        for size in Size::BOTH {
            out.push_str(&timeline::draw(&report.phases, size));
        }
        out.push_str(&timeline::list(&report.phases));
        for lost in &report.lost {
            let _ = writeln!(out, "<p class=\"lost\">Lost: {}</p>", escape(lost));
        }
        out.push_str("</article>\n");
    }
    out.push_str("</section>\n");
}

/// What else there is to say about one handover.
fn facts(report: &HandoverReport) -> String {
    let trigger = match report.trigger {
        Trigger::Request => "asked for".to_owned(),
        Trigger::Schedule => "by the schedule".to_owned(),
        Trigger::ImageChanged => "the image changed".to_owned(),
        Trigger::MemoryExhaustion { seconds_left } => format!("memory would have run out in {seconds_left} s"),
    };
    let connections = report.connections;
    let mut parts = vec![
        format!("{} {} to {}", report.service, report.from, report.to),
        trigger,
        format!("rung {}", report.rung),
        format!("{} connections moved", count(connections.received)),
    ];
    let missing = connections.sent.saturating_sub(connections.received + connections.closed_meanwhile);
    if missing > 0 {
        parts.push(format!("{} of {} connections missing", count(missing), count(connections.sent)));
    }
    if report.state_bytes > 0 {
        let state = bytes(report.state_bytes);
        parts.push(match report.state {
            StateMove::PreCopied => format!("{state} of state copied, all but the last while the old one served"),
            StateMove::Snapshot => format!("{state} of state copied while nobody served"),
            StateMove::Resident | StateMove::None => format!("{state} of state mapped, none copied"),
        });
    }
    if report.reservation.cpu > 0.0 || report.reservation.memory > 0.0 {
        parts.push(format!("{:.0} % CPU and {:.0} MB reserved", report.reservation.cpu, report.reservation.memory));
    }
    parts.join(" · ")
}

fn forecast_section(out: &mut String, forecasts: &[ForecastSeries]) {
    let shown: Vec<&ForecastSeries> = forecasts.iter().filter(|series| !series.points.is_empty()).collect();
    if shown.is_empty() {
        return;
    }
    out.push_str(
        "<section>\n<h2>Forecast and actual</h2>\n<p class=\"legend\"><span><i class=\"key band\"></i>forecast, 90 % \
         interval</span><span><i class=\"key median\"></i>forecast, median</span><span><i class=\"key lstm\"></i>LSTM, 90 % \
         interval</span><span><i class=\"key actual\"></i>actual</span></p>\n<div class=\"grid2\">\n",
    );
    for series in shown {
        let covered = series.coverage().map_or_else(
            || "nothing to compare yet".to_owned(),
            |(share, compared)| format!("{:.0} % of {} inside", share * 100.0, count(compared as u64)),
        );
        let champion = if series.champion.is_empty() { String::new() } else { format!(" · {}", series.champion) };
        let _ = write!(
            out,
            "<figure>\n<figcaption><b>{}</b> {} <span>{}</span></figcaption>\n",
            escape(title_of(series)),
            series.resource.unit(),
            escape(&format!("{covered}{champion}")),
        );
        for size in Size::BOTH {
            out.push_str(&charts::forecast(series, size));
        }
        let covered = series.lstm_coverage().map_or_else(String::new, |(share, compared)| {
            format!("{:.0} % of {} inside its 90 % interval · ", share * 100.0, count(compared as u64))
        });
        let _ = writeln!(out, "<p class=\"note\">LSTM: {}</p>", escape(&format!("{covered}{}", series.lstm)));
        out.push_str("</figure>\n");
    }
    out.push_str("</div>\n</section>\n");
}

const fn title_of(series: &ForecastSeries) -> &'static str {
    match series.resource {
        warmswap_model::Resource::Cpu => "CPU",
        warmswap_model::Resource::Memory => "Memory",
        warmswap_model::Resource::Network => "Network",
        warmswap_model::Resource::Disk => "Disk",
    }
}

fn machine_section(out: &mut String, machine: &Machine, created_unix_ms: u64) {
    let mut rows = vec![
        ("date".to_owned(), utc(created_unix_ms)),
        ("host".to_owned(), machine.host.clone()),
        ("processor".to_owned(), format!("{} × {}", machine.cpus, machine.cpu)),
        ("memory".to_owned(), format!("{} MB", count(machine.memory_mb))),
        ("kernel".to_owned(), machine.kernel.clone()),
    ];
    rows.extend(machine.versions.iter().cloned());
    out.push_str("<section>\n<h2>Machine</h2>\n<dl>\n");
    for (name, value) in rows.iter().filter(|(_, value)| !value.is_empty()) {
        let _ = writeln!(out, "<div><dt>{}</dt><dd>{}</dd></div>", escape(name), escape(value));
    }
    out.push_str("</dl>\n</section>\n");
}
