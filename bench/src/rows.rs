//! Rows of a result: one value each, with what it is beside.

use std::fmt::Write as _;

use serde::Serialize;
use serde_json::{Map, Value, json};

#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) id: String,
    pub(crate) value: f64,
    pub(crate) unit: &'static str,
    /// Values behind this one.
    pub(crate) n: usize,
    pub(crate) peer: Option<String>,
    pub(crate) peer_value: Option<f64>,
    /// `value / peer_value`, from paired runs.
    pub(crate) ratio: Option<f64>,
    /// Under what conditions, such as `state_mib` and `connections`.
    #[serde(flatten)]
    pub(crate) conditions: Map<String, Value>,
}

impl Row {
    pub(crate) fn new(id: &str, value: f64, unit: &'static str, n: usize, conditions: &Map<String, Value>) -> Self {
        Self {
            id: id.to_owned(),
            value,
            unit,
            n,
            peer: None,
            peer_value: None,
            ratio: None,
            conditions: conditions.clone(),
        }
    }
}

pub(crate) fn document(suite: &str, rows: &[Row]) -> Value {
    json!({ "suite": suite, "machine": crate::host::describe(), "rows": rows })
}

/// Aligned columns.
pub(crate) fn table(rows: &[Row]) -> String {
    let conditions =
        |row: &Row| row.conditions.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ");
    let id_width = rows.iter().map(|row| row.id.len()).max().unwrap_or(0);
    let where_width = rows.iter().map(|row| conditions(row).len()).max().unwrap_or(0);
    let mut text = String::new();
    for row in rows {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{:<id_width$}  {:<where_width$}  {:>12.1} {:<6} n={}",
            row.id,
            conditions(row),
            row.value,
            row.unit,
            row.n
        );
    }
    text
}

/// Quantile by rank of values in any order; 0 when there are none.
pub(crate) fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (q * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::quantile;

    #[test]
    fn quantiles_are_by_rank() {
        let values = [5.0, 1.0, 3.0, 2.0, 4.0];
        assert_eq!(quantile(&values, 0.5), 3.0);
        assert_eq!(quantile(&values, 0.99), 5.0);
        assert_eq!(quantile(&values, 0.0), 1.0);
        assert_eq!(quantile(&[], 0.5), 0.0);
    }
}
