//! How long windows and reports are kept, and deleting the rest.

use std::ops::Range;

use redb::{ReadableTable, ReadableTableMetadata};
use serde::{Deserialize, Serialize};
use warmswap_model::ServiceName;

use crate::store::{Inner, MINUTES, REPORTS, SECONDS, SERVICES, WINDOWS};
use crate::{History, HistoryError};

type WindowsTable<'a> = redb::Table<'a, (&'static str, u8, u64), &'static [u8]>;

/// What is kept. Ages are measured from the `now` given to [`History::enforce_retention`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Retention {
    /// Age of the oldest one-second window of a service that runs every day, s: no service keeps more.
    pub seconds_keep_s: u64,
    /// The same of a service that has not run for [`LOOK_BACK_DAYS`], s: no service keeps less, but for the limit in bytes.
    pub seconds_keep_min_s: u64,
    /// Age of the oldest one-minute window of a service that runs every day, s: no service keeps more.
    pub minutes_keep_s: u64,
    /// The same of a service that has not run for [`LOOK_BACK_DAYS`], s: no service keeps less, but for the limit in bytes.
    pub minutes_keep_min_s: u64,
    /// Reports per service; the oldest go first.
    pub reports_max: u64,
    /// Bytes of all windows; above it the oldest seconds go before their time, then the oldest minutes.
    pub windows_bytes_max: u64,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            seconds_keep_s: 24 * 3600,
            seconds_keep_min_s: 6 * 3600,
            minutes_keep_s: 90 * 24 * 3600,
            // Not below the days looked at, or deleting would change what the next call decides from.
            minutes_keep_min_s: LOOK_BACK_DAYS * 24 * 3600,
            reports_max: 1000,
            windows_bytes_max: 1 << 30,
        }
    }
}

/// Days on which a service ran, of those since its first window, at most the last [`LOOK_BACK_DAYS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DaysRun {
    pub run: u64,
    pub seen: u64,
}

impl Retention {
    /// How long a service keeps its seconds and its minutes, s: in proportion to the share of days on which it ran, between
    /// the minimum and the maximum. A minimum above the maximum counts as the maximum.
    pub fn keep_s(&self, days: DaysRun) -> (u64, u64) {
        let between = |min: u64, max: u64| {
            let min = min.min(max);
            let more = u128::from(max - min) * u128::from(days.run.min(days.seen)) / u128::from(days.seen.max(1));
            min.saturating_add(u64::try_from(more).unwrap_or(max - min))
        };
        (between(self.seconds_keep_min_s, self.seconds_keep_s), between(self.minutes_keep_min_s, self.minutes_keep_s))
    }
}

/// What one call deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Removed {
    pub seconds: u64,
    pub minutes: u64,
    pub reports: u64,
}

/// Days that say how often a service is used.
pub const LOOK_BACK_DAYS: u64 = 28;
const DAY_MS: u64 = 24 * 3600 * 1000;
/// Windows further ahead of now than this were stamped by a clock that was wrong.
const FUTURE_MS: u64 = 24 * 3600 * 1000;
/// How often the ages are halved to come below the limit in bytes: 2^-20 of a day is below a tick.
const HALVINGS_MAX: u32 = 20;

impl History {
    /// Deletes what is older than `retention` allows at `now_unix_ms`, in one transaction. Freed pages are used
    /// again; the file itself does not shrink, so its size is bounded by the most that was ever kept.
    pub fn enforce_retention(&self, now_unix_ms: u64, retention: &Retention) -> Result<Removed, HistoryError> {
        let (removed, gone) = self.write("delete old windows", |tx| {
            let mut removed = Removed::default();
            let mut windows = tx.open_table(WINDOWS)?;
            let mut services = tx.open_table(SERVICES)?;
            let names: Vec<String> =
                services.iter()?.map(|entry| Ok(entry?.0.value().to_owned())).collect::<Result<_, Inner>>()?;

            let mut kept = Vec::with_capacity(names.len());
            for name in &names {
                let (seconds_s, minutes_s) = retention.keep_s(days_run(&windows, name, now_unix_ms)?);
                kept.push((name.as_str(), seconds_s.saturating_mul(1000), minutes_s.saturating_mul(1000)));
            }
            let newest = now_unix_ms.saturating_add(FUTURE_MS);
            for &(name, seconds_ms, minutes_ms) in &kept {
                for (clock, keep_ms, count) in
                    [(SECONDS, seconds_ms, &mut removed.seconds), (MINUTES, minutes_ms, &mut removed.minutes)]
                {
                    *count += delete(&mut windows, name, clock, 0..now_unix_ms.saturating_sub(keep_ms))?;
                    *count += delete(&mut windows, name, clock, newest..u64::MAX)?;
                    *count += u64::from(windows.remove((name, clock, u64::MAX))?.is_some());
                }
            }

            for clock in [SECONDS, MINUTES] {
                for halving in 1..=HALVINGS_MAX {
                    if tx_bytes(&windows)? <= retention.windows_bytes_max {
                        break;
                    }
                    for &(name, seconds_ms, minutes_ms) in &kept {
                        let (keep_ms, count) = match clock {
                            SECONDS => (seconds_ms, &mut removed.seconds),
                            _ => (minutes_ms, &mut removed.minutes),
                        };
                        *count += delete(&mut windows, name, clock, 0..now_unix_ms.saturating_sub(keep_ms >> halving))?;
                    }
                }
            }

            let mut gone = Vec::new();
            for name in &names {
                if windows.range((name.as_str(), 0, 0)..=(name.as_str(), u8::MAX, u64::MAX))?.next().is_none() {
                    services.remove(name.as_str())?;
                    gone.extend(ServiceName::new(name.as_str()));
                }
            }
            removed.reports = delete_reports(&mut tx.open_table(REPORTS)?, retention.reports_max)?;
            Ok((removed, gone))
        })?;
        self.forget_open_minutes(&gone);
        Ok(removed)
    }
}

/// Deletes the windows of a service whose end lies in `range`, and says how many.
fn delete(windows: &mut WindowsTable<'_>, name: &str, clock: u8, range: Range<u64>) -> Result<u64, Inner> {
    let mut count = 0;
    windows.retain_in((name, clock, range.start)..(name, clock, range.end), |_, _| {
        count += 1;
        false
    })?;
    Ok(count)
}

/// A day counts when it holds a window: one look-up a day and clock, so that a thousand services stay cheap.
fn days_run(windows: &WindowsTable<'_>, name: &str, now_unix_ms: u64) -> Result<DaysRun, Inner> {
    let first = |clock: u8, range: Range<u64>| -> Result<Option<u64>, Inner> {
        let found = windows.range((name, clock, range.start)..(name, clock, range.end))?.next().transpose()?;
        Ok(found.map(|(key, _)| key.value().2))
    };
    let end = now_unix_ms.saturating_add(1);
    let oldest = [first(SECONDS, 0..end)?, first(MINUTES, 0..end)?].into_iter().flatten().min();
    let Some(oldest) = oldest else { return Ok(DaysRun { run: 0, seen: 1 }) };
    let seen = ((end - oldest).div_ceil(DAY_MS)).min(LOOK_BACK_DAYS);
    let mut run = 0;
    for day in 0..seen {
        let to = end.saturating_sub(day * DAY_MS);
        let range = to.saturating_sub(DAY_MS)..to;
        let ran = first(MINUTES, range.clone())?.is_some() || first(SECONDS, range)?.is_some();
        run += u64::from(ran);
    }
    Ok(DaysRun { run, seen })
}

fn tx_bytes(windows: &WindowsTable<'_>) -> Result<u64, Inner> {
    Ok(windows.stats()?.stored_bytes())
}

/// Keeps the newest `reports_max` of every service.
fn delete_reports(
    reports: &mut redb::Table<'_, (&'static str, u64), &'static [u8]>,
    reports_max: u64,
) -> Result<u64, Inner> {
    let mut counts: Vec<(String, u64)> = Vec::new();
    for entry in reports.iter()? {
        let key = entry?.0;
        let (name, _) = key.value();
        match counts.last_mut() {
            Some((last, count)) if last == name => *count += 1,
            _ => counts.push((name.to_owned(), 1)),
        }
    }
    let mut removed = 0;
    for (name, count) in counts {
        let mut excess = count.saturating_sub(reports_max);
        if excess == 0 {
            continue;
        }
        reports.retain_in((name.as_str(), 0)..=(name.as_str(), u64::MAX), |_, _| {
            let keep = excess == 0;
            if !keep {
                excess -= 1;
                removed += 1;
            }
            keep
        })?;
    }
    Ok(removed)
}
