//! The table at the end of a demo or a list of handovers, in text.

use warmswap_model::{HandoverReport, Verdict};

use crate::format::duration_us;
use crate::input::{ClientView, HandoverView};

/// What every cell of a row says; shared with the HTML table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) handover: String,
    pub(crate) verdict: String,
    pub(crate) blackout: String,
    pub(crate) longest_gap: String,
    pub(crate) failed: String,
    pub(crate) lost: String,
    pub(crate) p99_before: String,
    pub(crate) p99_after: String,
    pub(crate) reason: String,
}

pub(crate) fn row(view: &HandoverView) -> Row {
    let report = &view.report;
    let seen = |value: &dyn Fn(&ClientView) -> Option<String>| {
        view.clients.as_ref().and_then(value).unwrap_or_else(|| "–".into())
    };
    Row {
        handover: view.label.clone(),
        verdict: report.verdict.to_string(),
        blackout: blackout(report),
        longest_gap: seen(&|c| Some(duration_us(c.longest_gap_us))),
        failed: seen(&|c| Some(c.failed.to_string())),
        lost: seen(&|c| Some(c.lost.to_string())),
        p99_before: seen(&|c| c.p99_before_us.map(duration_us)),
        p99_after: seen(&|c| c.p99_after_us.map(duration_us)),
        reason: report.reason.clone().unwrap_or_default(),
    }
}

/// Forward, and after a rollback also backward: `183 µs + 210 µs`. A `*` says that a time is the supervisor's and not the
/// kernel's.
pub(crate) fn blackout(report: &HandoverReport) -> String {
    if report.blackouts.is_empty() {
        // Nothing was ever switched: zero is a fact, unless the old one was gone and nobody measured.
        return if report.verdict == Verdict::Aborted { "0".into() } else { "–".into() };
    }
    let one =
        |b: &warmswap_model::Blackout| format!("{}{}", duration_us(b.us), if b.measured_in_kernel { "" } else { "*" });
    report.blackouts.iter().map(one).collect::<Vec<_>>().join(" + ")
}

/// One line per handover under a heading, columns aligned, no colours. Ends with a newline.
#[must_use]
pub fn text_table(handovers: &[HandoverView]) -> String {
    let rows: Vec<Row> = handovers.iter().map(row).collect();
    // `p99 before → after` is three columns, so that the arrows stand below one another.
    let heading = ["handover", "verdict", "blackout", "longest gap", "failed", "lost"];
    let cells = |r: &Row| {
        [&r.handover, &r.verdict, &r.blackout, &r.longest_gap, &r.failed, &r.lost, &r.p99_before, &r.p99_after]
            .map(Clone::clone)
    };
    let width = |column: usize| {
        let heading = heading.get(column).map_or(0, |h| h.chars().count());
        rows.iter().map(|r| cells(r)[column].chars().count()).max().unwrap_or(0).max(heading)
    };
    let mut widths: Vec<usize> = (0..8).map(width).collect();
    const P99: &str = "p99 before → after";
    let p99_width = widths[6] + 3 + widths[7];
    widths[7] += P99.chars().count().saturating_sub(p99_width);
    let p99_width = widths[6] + 3 + widths[7];

    let mut out = String::new();
    let mut line = |cells: &[String], p99: String, reason: &str| {
        let mut text = String::new();
        for (column, cell) in cells.iter().enumerate() {
            let width = widths[column];
            // Words to the left, numbers to the right.
            text += &if column < 2 { format!("{cell:<width$}   ") } else { format!("{cell:>width$}   ") };
        }
        text += &format!("{p99:<p99_width$}   {reason}");
        out += text.trim_end();
        out.push('\n');
    };
    let has_reason = rows.iter().any(|r| !r.reason.is_empty());
    line(&heading.map(str::to_owned), P99.into(), if has_reason { "reason" } else { "" });
    for row in &rows {
        let p99 = format!("{:>width$} → {}", row.p99_before, row.p99_after, width = widths[6]);
        line(&cells(row)[..6], p99, &row.reason);
    }
    if handovers.iter().flat_map(|h| &h.report.blackouts).any(|b| !b.measured_in_kernel) {
        out += "* by the supervisor's clock: the kernel's marks were not seen\n";
    }
    out
}
