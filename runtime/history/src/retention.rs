//! How long windows and reports are kept, and deleting the rest.

use redb::{ReadableTable, ReadableTableMetadata};
use serde::{Deserialize, Serialize};
use warmswap_model::ServiceName;

use crate::store::{Inner, MINUTES, REPORTS, SECONDS, SERVICES, WINDOWS};
use crate::{History, HistoryError};

/// What is kept. Ages are measured from the `now` given to [`History::enforce_retention`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Retention {
    /// Age of the oldest one-second window, s.
    pub seconds_keep_s: u64,
    /// Age of the oldest one-minute window, s.
    pub minutes_keep_s: u64,
    /// Reports per service; the oldest go first.
    pub reports_max: u64,
    /// Bytes of all windows; above it the oldest seconds go before their time, then the oldest minutes.
    pub windows_bytes_max: u64,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            seconds_keep_s: 24 * 3600,
            minutes_keep_s: 90 * 24 * 3600,
            reports_max: 1000,
            windows_bytes_max: 1 << 30,
        }
    }
}

/// What one call deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Removed {
    pub seconds: u64,
    pub minutes: u64,
    pub reports: u64,
}

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

            let mut delete_outside = |clock: u8, keep_ms: u64| -> Result<u64, Inner> {
                let oldest = now_unix_ms.saturating_sub(keep_ms);
                let newest = now_unix_ms.saturating_add(FUTURE_MS);
                let mut count = 0;
                for name in &names {
                    let name = name.as_str();
                    windows.retain_in((name, clock, 0)..(name, clock, oldest), |_, _| {
                        count += 1;
                        false
                    })?;
                    windows.retain_in((name, clock, newest)..=(name, clock, u64::MAX), |_, _| {
                        count += 1;
                        false
                    })?;
                }
                Ok(count)
            };
            let seconds_ms = retention.seconds_keep_s.saturating_mul(1000);
            let minutes_ms = retention.minutes_keep_s.saturating_mul(1000);
            removed.seconds = delete_outside(SECONDS, seconds_ms)?;
            removed.minutes = delete_outside(MINUTES, minutes_ms)?;

            for (clock, keep_ms) in [(SECONDS, seconds_ms), (MINUTES, minutes_ms)] {
                for halving in 1..=HALVINGS_MAX {
                    if tx_bytes(&windows)? <= retention.windows_bytes_max {
                        break;
                    }
                    let mut count = 0;
                    let oldest = now_unix_ms.saturating_sub(keep_ms >> halving);
                    for name in &names {
                        let name = name.as_str();
                        windows.retain_in((name, clock, 0)..(name, clock, oldest), |_, _| {
                            count += 1;
                            false
                        })?;
                    }
                    match clock {
                        SECONDS => removed.seconds += count,
                        _ => removed.minutes += count,
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

fn tx_bytes(windows: &redb::Table<'_, (&'static str, u8, u64), &'static [u8]>) -> Result<u64, Inner> {
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
