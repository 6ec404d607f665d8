//! How things look: tables, colour only on a terminal, units that fit.

use std::io::{IsTerminal, Write};

use comfy_table::presets::NOTHING;
use comfy_table::{Cell, CellAlignment, ContentArrangement, Table};
use warmswap_model::Verdict;
pub(crate) use warmswap_report::duration_us;

/// A table without frames whose columns align; numbers to the right.
pub(crate) fn table<const N: usize>(header: [&str; N], right: &[usize]) -> Table {
    let mut table = Table::new();
    // Cells wrap to the width of a terminal; a pipe gets every row on one line.
    let arrangement = match std::io::stdout().is_terminal() {
        true => ContentArrangement::Dynamic,
        false => ContentArrangement::Disabled,
    };
    table.load_preset(NOTHING).set_content_arrangement(arrangement);
    table.set_header(header.iter().map(|text| Cell::new(paint(Style::Dim, text))));
    for column in right {
        if let Some(column) = table.column_mut(*column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

pub(crate) fn print_table(table: &Table) {
    for line in table.lines() {
        say(line.trim_end());
    }
}

/// One line to standard output. A closed pipe ends the program quietly, as with other tools.
pub(crate) fn say(line: &str) {
    match writeln!(std::io::stdout(), "{line}") {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => {
            eprintln!("error: cannot write the output: {error}");
            std::process::exit(1);
        }
    }
}

pub(crate) fn say_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    say(&serde_json::to_string(value)?);
    Ok(())
}

/// To standard error for people, and for programs as the last JSON document.
pub(crate) fn error(error: &anyhow::Error, json: bool) {
    if json {
        say(&serde_json::json!({ "error": format!("{error:#}") }).to_string());
    }
    let label = if std::io::stderr().is_terminal() { "\x1b[31merror:\x1b[0m" } else { "error:" };
    eprintln!("{label} {error:#}");
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Style {
    Good,
    Warn,
    Bad,
    Dim,
    Bold,
}

pub(crate) fn paint(style: Style, text: &str) -> String {
    if !std::io::stdout().is_terminal() || std::env::var_os("NO_COLOR").is_some() {
        return text.to_owned();
    }
    let code = match style {
        Style::Good => "32",
        Style::Warn => "33",
        Style::Bad => "31",
        Style::Dim => "2",
        Style::Bold => "1",
    };
    format!("\x1b[{code}m{text}\x1b[0m")
}

pub(crate) fn verdict(verdict: Verdict) -> String {
    let style = match verdict {
        Verdict::Committed => Style::Good,
        Verdict::RolledBack => Style::Warn,
        Verdict::Aborted => Style::Bad,
    };
    paint(style, &verdict.to_string())
}

pub(crate) fn duration_or_dash(us: Option<f64>) -> String {
    us.map_or_else(|| "–".into(), duration_us)
}
