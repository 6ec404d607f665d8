//! Rows of a result: one value each, with what it is beside.

use std::fmt::Write as _;

use serde::Serialize;
use serde_json::{Map, Value, json};

/// Under what conditions a value was measured, such as `state_mib` and `connections`.
pub(crate) type Conditions = Map<String, Value>;

#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) id: String,
    /// `None` when it was not measured; `reason` says why.
    pub(crate) value: Option<f64>,
    pub(crate) unit: &'static str,
    /// Values behind this one.
    pub(crate) n: usize,
    /// First and third quartile, for a median.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) spread: Option<[f64; 2]>,
    /// Within these lies the value with 95 % confidence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) interval: Option<[f64; 2]>,
    /// What is claimed: the value is no more than this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) at_most: Option<f64>,
    pub(crate) peer: Option<String>,
    pub(crate) peer_value: Option<f64>,
    /// Of `value` to `peer_value`, from paired runs.
    pub(crate) ratio: Option<f64>,
    /// Why there is no value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<String>,
    /// Where the time went.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) note: Option<String>,
    #[serde(flatten)]
    pub(crate) conditions: Conditions,
}

impl Row {
    pub(crate) fn new(id: &str, value: Option<f64>, unit: &'static str, n: usize, conditions: &Conditions) -> Self {
        Self {
            id: id.to_owned(),
            value,
            unit,
            n,
            spread: None,
            interval: None,
            at_most: None,
            peer: None,
            peer_value: None,
            ratio: None,
            reason: None,
            note: None,
            conditions: conditions.clone(),
        }
    }

    pub(crate) fn spread(self, spread: Option<[f64; 2]>) -> Self {
        Self { spread, ..self }
    }

    pub(crate) fn interval(self, interval: Option<[f64; 2]>) -> Self {
        Self { interval, ..self }
    }

    pub(crate) fn at_most(self, target: f64) -> Self {
        Self { at_most: Some(target), ..self }
    }

    pub(crate) fn beside(self, peer: &str, peer_value: Option<f64>, ratio: Option<f64>) -> Self {
        Self { peer: Some(peer.to_owned()), peer_value, ratio, ..self }
    }

    pub(crate) fn note(self, note: Option<String>) -> Self {
        Self { note, ..self }
    }

    pub(crate) fn unmeasured(id: &str, unit: &'static str, reason: &str, conditions: &Conditions) -> Self {
        Self { reason: Some(reason.to_owned()), ..Self::new(id, None, unit, 0, conditions) }
    }

    /// A peer that could not be measured.
    pub(crate) fn left_out(id: &str, unit: &'static str, peer: &str, reason: &str, conditions: &Conditions) -> Self {
        Self::unmeasured(id, unit, reason, conditions).beside(peer, None, None)
    }
}

pub(crate) fn document(suite: &str, rows: &[Row]) -> Value {
    json!({ "suite": suite, "machine": crate::host::describe(), "rows": rows })
}

/// Aligned columns.
pub(crate) fn table(rows: &[Row]) -> String {
    let mut lines =
        vec![["", "conditions", "value", "", "spread", "n", "peer", "peer value", "ratio"].map(String::from)];
    lines.extend(rows.iter().map(cells));
    let widths: [usize; COLUMNS] =
        std::array::from_fn(|column| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0));
    let mut text = String::new();
    let mut write_line = |line: &[String; COLUMNS], remark: &str| {
        for (column, (cell, width)) in line.iter().zip(widths).enumerate() {
            // Writing to a String cannot fail.
            let _ = match RIGHT[column] {
                true => write!(text, "{cell:>width$}  "),
                false => write!(text, "{cell:<width$}  "),
            };
        }
        text.push_str(remark);
        text.truncate(text.trim_end().len());
        text.push('\n');
    };
    write_line(&lines[0], "");
    for (line, row) in lines[1..].iter().zip(rows) {
        write_line(line, &remark(row));
    }
    text
}

/// Why there is no value; or how sure it is, whether it is what is claimed, and where the time went.
fn remark(row: &Row) -> String {
    if let Some(reason) = &row.reason {
        return reason.clone();
    }
    let sure = row.interval.map(|[low, high]| format!("95 %: {}…{}", plain(low), plain(high)));
    let claimed = row.value.zip(row.at_most).map(|(value, target)| match value - target {
        over if over <= 0.0 => format!("target ≤ {}: met", plain(target)),
        // Of zero there are no percents.
        over if target == 0.0 => format!("target 0: MISSED by {}", plain(over)),
        over => format!("target ≤ {}: MISSED by {} ({:.0} %)", plain(target), plain(over), 100.0 * over / target),
    });
    [sure, claimed, row.note.clone()].into_iter().flatten().collect::<Vec<_>>().join("; ")
}

const COLUMNS: usize = 9;
const RIGHT: [bool; COLUMNS] = [false, false, true, false, true, true, false, true, true];

fn cells(row: &Row) -> [String; COLUMNS] {
    let number = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), plain);
    let conditions = row.conditions.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ");
    let beside = |value| row.peer.as_ref().map_or_else(String::new, |_| number(value));
    [
        row.id.clone(),
        conditions,
        number(row.value),
        row.unit.to_owned(),
        row.spread.map_or_else(String::new, |[low, high]| format!("{}…{}", plain(low), plain(high))),
        row.n.to_string(),
        row.peer.clone().unwrap_or_default(),
        beside(row.peer_value),
        row.ratio.map_or_else(String::new, |ratio| format!("{ratio:.3}")),
    ]
}

/// As many decimals as say something.
fn plain(value: f64) -> String {
    match value.abs() {
        size if value.fract() == 0.0 && size < 1e15 => format!("{value:.0}"),
        size if size >= 100.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_below_each_other_and_reasons_are_shown() {
        let mut conditions = Conditions::new();
        conditions.insert("hogs".into(), json!(2));
        let rows = [
            Row::new("a.long_name_us", Some(12.5), "µs", 100, &conditions).spread(Some([1.0, 20.25])),
            Row::new("b", Some(3.0), "", 1, &Conditions::new()).beside("peer", Some(6.0), Some(0.5)),
            Row::left_out("c", "µs", "other peer", "it is not installed", &conditions),
        ];
        let table = table(&rows);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 4);
        let place = |line: &str, word: &str| line.split(word).next().unwrap().chars().count();
        assert_eq!(place(lines[2], "peer"), place(lines[3], "other peer"));
        assert!(lines[1].contains("1…20.250") && lines[2].ends_with("0.500"), "{table}");
        assert!(lines[3].contains('–') && lines[3].ends_with("it is not installed"), "{table}");
    }

    #[test]
    fn a_target_that_is_missed_says_by_how_much() {
        let row = |value, target| Row::new("a", Some(value), "", 9, &Conditions::new()).at_most(target);
        assert_eq!(remark(&row(0.2, 0.25)), "target ≤ 0.250: met");
        assert_eq!(remark(&row(0.5, 0.25)), "target ≤ 0.250: MISSED by 0.250 (100 %)");
        let row = row(3.0, 0.0).interval(Some([2.0, 4.0])).note(Some("why".into()));
        assert_eq!(remark(&row), "95 %: 2…4; target 0: MISSED by 3; why");
    }

    #[test]
    fn a_row_without_a_value_is_null_and_says_why() {
        let row = Row::left_out("c", "µs", "p", "because", &Conditions::new());
        let value = serde_json::to_value(row).unwrap();
        assert_eq!(
            (&value["value"], &value["peer_value"], &value["ratio"]),
            (&Value::Null, &Value::Null, &Value::Null)
        );
        assert_eq!(value["reason"], "because");
        assert!(value.get("spread").is_none());
    }
}
