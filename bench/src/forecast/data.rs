//! Traces on disk: `entity,ts_s,<numeric columns>`, plain or gzipped, sorted by entity and time, gaps left as they are.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use flate2::read::MultiGzDecoder;

use crate::stats::median;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) common: crate::Options,
    /// Folder of traces, `entity,ts_s,<numeric columns>`, .csv or .csv.gz; or a folder with such a folder `traces`.
    #[arg(long)]
    data: PathBuf,
    /// Only traces whose names contain this.
    #[arg(long)]
    only: Option<String>,
}

impl Options {
    /// Reads one trace after the other.
    pub(crate) fn traces(&self) -> Result<impl Iterator<Item = Result<Trace>>> {
        let wanted = |trace: &Result<Trace>| match (trace, &self.only) {
            (Ok(trace), Some(only)) => trace.name.contains(only),
            _ => true,
        };
        Ok(files(&self.data)?.into_iter().map(|path| read(&path)).filter(wanted))
    }
}

/// One column of one entity.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Series {
    pub(crate) entity: String,
    pub(crate) column: String,
    /// Number of the step, and the mean of what was in it; rising.
    pub(crate) values: Vec<(u64, f64)>,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Trace {
    /// The file without its endings.
    pub(crate) name: String,
    pub(crate) step_s: u64,
    pub(crate) series: Vec<Series>,
}

/// The trace files of a folder, or of its `traces/`.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let traces = folder.join("traces");
    let folder = if traces.is_dir() { &traces } else { folder };
    let entries = std::fs::read_dir(folder).with_context(|| format!("cannot read the folder {}", folder.display()))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if name.ends_with(".csv") || name.ends_with(".csv.gz") {
            files.push(path);
        }
    }
    files.sort();
    ensure!(!files.is_empty(), "{} holds no trace: files end in .csv or .csv.gz", folder.display());
    Ok(files)
}

/// Reads a file.
fn read(path: &Path) -> Result<Trace> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let reader: Box<dyn Read> =
        if name.ends_with(".gz") { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) };
    let name = name.split(".csv").next().unwrap_or_default().to_owned();
    parse(name, BufReader::new(reader)).with_context(|| format!("cannot use {}", path.display()))
}

/// Of one entity: when, and every column's value.
type Rows = Vec<(f64, Vec<Option<f64>>)>;

fn parse(name: String, mut reader: impl BufRead) -> Result<Trace> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let columns: Vec<String> = match line.trim_end().split(',').collect::<Vec<_>>().as_slice() {
        ["entity", "ts_s", columns @ ..] if !columns.is_empty() => columns.iter().map(|c| (*c).to_owned()).collect(),
        _ => bail!("it begins with {:?} and not with `entity,ts_s,<columns>`", line.trim_end()),
    };
    let mut entities: BTreeMap<String, Rows> = BTreeMap::new();
    for number in 2.. {
        line.clear();
        if reader.read_line(&mut line).with_context(|| format!("line {number}"))? == 0 {
            break;
        }
        let mut fields = line.trim_end().split(',');
        let entity = fields.next().unwrap_or_default();
        let at = fields.next().and_then(|text| text.parse::<f64>().ok()).filter(|at| at.is_finite() && *at >= 0.0);
        let at = at.with_context(|| format!("line {number}: the second field is no time in seconds"))?;
        let values: Vec<Option<f64>> = fields
            .map(|text| match text {
                "" => Ok(None),
                text => text.parse::<f64>().map(|value| Some(value).filter(|value| value.is_finite())),
            })
            .collect::<Result<_, _>>()
            .with_context(|| format!("line {number}: not a number"))?;
        ensure!(
            values.len() == columns.len(),
            "line {number} has {} values, the first line names {}",
            values.len(),
            columns.len()
        );
        let rows = entities.entry(entity.to_owned()).or_default();
        ensure!(
            rows.last().is_none_or(|(before, _)| *before <= at),
            "line {number}: {entity} goes back in time, from {} to {at} s",
            rows.last().map_or(0.0, |(before, _)| *before)
        );
        rows.push((at, values));
    }
    let step_s = step(&entities).context("no entity has two rows, so the step is not known")?;
    let series = entities
        .iter()
        .flat_map(|(entity, rows)| {
            columns.iter().enumerate().map(move |(at, column)| Series {
                entity: entity.clone(),
                column: column.clone(),
                values: in_steps(rows, at, step_s),
            })
        })
        .filter(|series| !series.values.is_empty())
        .collect();
    Ok(Trace { name, step_s, series })
}

/// The median time between two rows, in whole seconds.
fn step(entities: &BTreeMap<String, Rows>) -> Option<u64> {
    let between = |rows: &Rows| rows.windows(2).map(|pair| pair[1].0 - pair[0].0).collect::<Vec<_>>();
    let steps: Vec<f64> = entities.values().flat_map(between).filter(|step| *step > 0.0).collect();
    Some((median(&steps)?.round() as u64).max(1))
}

fn in_steps(rows: &Rows, column: usize, step_s: u64) -> Vec<(u64, f64)> {
    let mut values: Vec<(u64, f64)> = Vec::new();
    let mut count = 0.0;
    for (at, row) in rows {
        let Some(value) = row[column] else { continue };
        let number = (at / step_s as f64).round() as u64;
        match values.last_mut() {
            Some((last, mean)) if *last == number => {
                count += 1.0;
                *mean += (value - *mean) / count;
            }
            _ => {
                count = 1.0;
                values.push((number, value));
            }
        }
    }
    values
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]
mod tests {
    use super::*;

    fn trace(text: &str) -> Result<Trace> {
        parse("t".into(), text.as_bytes())
    }

    #[test]
    fn columns_become_series_and_what_falls_into_one_step_its_mean() {
        let text = "entity,ts_s,a,b\nx,600,1,\nx,900,2,5\nx,910,4,7\nx,1500,8,9\ny,600,0,0\ny,900,1,nan\n";
        let trace = trace(text).unwrap();
        assert_eq!(trace.step_s, 300);
        let of = |entity: &str, column: &str| {
            let found = trace.series.iter().find(|s| s.entity == entity && s.column == column);
            found.unwrap().values.clone()
        };
        assert_eq!(of("x", "a"), [(2, 1.0), (3, 3.0), (5, 8.0)]);
        assert_eq!(of("x", "b"), [(3, 6.0), (5, 9.0)]);
        assert_eq!(of("y", "b"), [(2, 0.0)]);
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        for (text, words) in [
            ("name,ts_s,a\n", "not with `entity,ts_s"),
            ("entity,ts_s\n", "not with `entity,ts_s"),
            ("entity,ts_s,a\nx,now,1\n", "line 2: the second field"),
            ("entity,ts_s,a\nx,1,1\nx,2,one\n", "line 3: not a number"),
            ("entity,ts_s,a\nx,1,1,2\n", "line 2 has 2 values, the first line names 1"),
            ("entity,ts_s,a\nx,9,1\nx,2,1\n", "line 3: x goes back in time, from 9 to 2 s"),
            ("entity,ts_s,a\nx,9,1\n", "no entity has two rows"),
        ] {
            let error = format!("{:#}", trace(text).unwrap_err());
            assert!(error.contains(words), "{error}");
        }
    }
}
