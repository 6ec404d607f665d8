//! Forecasts over minutes: each resource of each service is a series of one outlook, which is fed from the history as minutes
//! close. What the outlook has not seen when it begins is read from the history first, a part at each tick.

use std::collections::BTreeMap;

use warmswap_forecast::{History as Series, ImportError, Outlook, OutlookConfig};
use warmswap_history::{BlobKind, History, HistoryError};
use warmswap_model::{FeatureWindow, PerResource, Resource, ServiceName};

use crate::api::{HorizonForecast, MinutesForecast};

/// The outlook's file in the history.
const KEY: &str = "minutes";
const MINUTE_MS: u64 = 60_000;
/// How far back the outlook looks, when it begins and when it is trained.
pub(crate) const LOOK_BACK_MS: u64 = 14 * 24 * 60 * MINUTE_MS;
/// Minutes of one service that one feeding takes in at most: some milliseconds of a tick.
const FED_MAX: u64 = 120;
/// Minutes that an answer shows before the forecast.
const SHOWN_MS: u64 = 60 * MINUTE_MS;

pub(crate) struct Minutes {
    outlook: Outlook,
    /// Up to when each service's history has been read, Unix ms.
    read_until: BTreeMap<ServiceName, u64>,
}

impl Minutes {
    pub(crate) fn new() -> Self {
        Self { outlook: Outlook::new(OutlookConfig::minutes()), read_until: BTreeMap::new() }
    }

    /// Takes up what an earlier agent learned; bytes of it, `None` when there is nothing.
    pub(crate) fn restore(&mut self, history: &History) -> Result<Option<usize>, RestoreError> {
        let Some(image) = history.get_blob(BlobKind::Model, KEY)? else { return Ok(None) };
        self.outlook.import(&image)?;
        Ok(Some(image.len()))
    }

    pub(crate) fn keep(&self, history: &History) -> Result<(), HistoryError> {
        history.put_blob(BlobKind::Model, KEY, &self.outlook.export())
    }

    /// Takes in the minutes of a service that have closed, or the next part of them.
    pub(crate) fn feed(&mut self, history: &History, service: &ServiceName, now_ms: u64) -> Result<(), HistoryError> {
        let ids = PerResource::from_fn(|resource| self.outlook.open(&series_name(service, resource)));
        let seen = self.outlook.last_ms(ids.cpu).map_or(0, |last| last + 1);
        let mut from = *self.read_until.get(service).unwrap_or(&seen.max(now_ms.saturating_sub(LOOK_BACK_MS)));
        // A minute closes with the first second of the next one.
        if from / MINUTE_MS >= now_ms / MINUTE_MS {
            return Ok(());
        }
        let (until, windows) = loop {
            let until = now_ms.min(from + FED_MAX * MINUTE_MS);
            let windows = history.minutes(service, from..until)?;
            if until == now_ms || !windows.is_empty() {
                break (until, windows);
            }
            from = until;
        };
        for window in &windows {
            let values: Vec<_> = Resource::ALL.map(|r| (ids[r], window.usage[r])).to_vec();
            self.outlook.observe(window.end_unix_ms, &values);
        }
        // The newest minute may not have been summed up yet: it is looked for again.
        let next = windows.last().map_or(from, |window| window.end_unix_ms + 1);
        self.read_until.insert(service.clone(), if until < now_ms { until } else { next });
        Ok(())
    }

    /// Trained weights replace those that serve.
    pub(crate) fn outlook(&mut self) -> &mut Outlook {
        &mut self.outlook
    }

    /// Stops following a service.
    pub(crate) fn forget(&mut self, service: &ServiceName) {
        self.read_until.remove(service);
        for resource in Resource::ALL {
            self.outlook.forget(&series_name(service, resource));
        }
    }

    /// `None` before the first minute has closed.
    pub(crate) fn answer(
        &self,
        history: &History,
        service: &ServiceName,
    ) -> Result<Option<MinutesForecast>, HistoryError> {
        let ids = Resource::ALL.map(|resource| self.outlook.find(&series_name(service, resource)));
        let [Some(first), ..] = ids else { return Ok(None) };
        let Some(until_unix_ms) = self.outlook.last_ms(first) else { return Ok(None) };
        let resources = PerResource::from_fn(|resource| {
            let Some(id) = ids[resource as usize] else { return Vec::new() };
            let Some(bands) = self.outlook.bands(id) else { return Vec::new() };
            let horizons = self.outlook.config().horizons.into_iter().zip(self.outlook.coverage(id));
            let one =
                |((band, champion), (minutes, coverage90))| HorizonForecast { minutes, band, champion, coverage90 };
            bands.into_iter().zip(horizons).map(one).collect()
        });
        if resources.cpu.is_empty() {
            return Ok(None);
        }
        let recent = history.minutes(service, until_unix_ms.saturating_sub(SHOWN_MS)..until_unix_ms + 1)?;
        let recent = recent.iter().map(|window| (window.end_unix_ms, window.usage)).collect();
        let trained_steps = self.outlook.weights().map_or(0, |weights| weights.steps);
        Ok(Some(MinutesForecast { until_unix_ms, trained_steps, resources, recent }))
    }
}

fn series_name(service: &ServiceName, resource: Resource) -> String {
    format!("{service}/{}", resource.name())
}

/// The series of one service's minutes, to train on.
pub(crate) fn series_of(windows: &[FeatureWindow]) -> impl Iterator<Item = Series> {
    Resource::ALL
        .into_iter()
        .map(|resource| windows.iter().map(|window| (window.end_unix_ms, window.usage[resource])).collect())
}

/// Why what was learned over minutes was not taken up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RestoreError {
    #[error("it cannot be read: {0}")]
    Read(#[from] HistoryError),
    #[error("it is refused: {0}")]
    Refused(#[from] ImportError),
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]
mod tests {
    use super::*;
    use warmswap_model::{CgroupId, Durations, ProbeCounts};

    const BEGIN_MS: u64 = 1_800_000_000_000;

    /// A history of this many minutes of a service, from two seconds each.
    fn history(folder: &std::path::Path, service: &ServiceName, minutes: std::ops::Range<u64>) -> History {
        let history = History::open(folder).unwrap();
        let windows: Vec<_> = minutes
            .flat_map(|minute| [20_000, 40_000].map(|second| BEGIN_MS + minute * MINUTE_MS + second))
            .map(|end_unix_ms| {
                let cpu = if end_unix_ms / MINUTE_MS % 10 < 5 { 20.0 } else { 60.0 };
                let window = FeatureWindow {
                    cgroup: CgroupId(1),
                    end_unix_ms,
                    length_ms: 1000,
                    usage: PerResource { cpu, memory: 100.0, network: 1.0, disk: 0.0 },
                    counts: ProbeCounts::default(),
                    durations: Durations::default(),
                };
                (service.clone(), window)
            })
            .collect();
        history.append_windows(&windows).unwrap();
        history
    }

    fn fed(minutes: &mut Minutes, history: &History, service: &ServiceName, now_ms: u64) {
        for _ in 0..LOOK_BACK_MS / (FED_MAX * MINUTE_MS) + 2 {
            minutes.feed(history, service, now_ms).unwrap();
        }
    }

    #[test]
    fn minutes_of_before_are_read_and_what_was_learned_survives_the_agent() {
        let folder = tempfile::tempdir().unwrap();
        let service = ServiceName::new("s").unwrap();
        let (mut minutes, now) = (Minutes::new(), BEGIN_MS + 400 * MINUTE_MS + 1000);
        let store = history(folder.path(), &service, 0..400);
        assert_eq!(minutes.answer(&store, &service).unwrap(), None);
        fed(&mut minutes, &store, &service, now);
        let answer = minutes.answer(&store, &service).unwrap().unwrap();
        assert_eq!(answer.until_unix_ms, BEGIN_MS + 399 * MINUTE_MS, "the last one is open");
        assert_eq!(answer.resources.map(|_, horizons| horizons.len()), PerResource::from_fn(|_| 4));
        let [five, ..] = &answer.resources.cpu[..] else { panic!("{answer:?}") };
        assert!(five.minutes == 5 && five.coverage90.is_some(), "{five:?}");
        assert!(answer.resources.memory.iter().all(|of| (of.band.q50 - 100.0).abs() < 1.0), "{answer:?}");
        minutes.keep(&store).unwrap();

        // Killed, and a minute later there is another agent: it goes on where the other one was.
        let mut after = Minutes::new();
        assert!(after.restore(&store).unwrap().is_some());
        drop(store);
        let store = history(folder.path(), &service, 400..403);
        fed(&mut after, &store, &service, now + 3 * MINUTE_MS);
        let answer = after.answer(&store, &service).unwrap().unwrap();
        assert_eq!(answer.until_unix_ms, BEGIN_MS + 402 * MINUTE_MS);
        assert!(answer.resources.cpu[0].coverage90.is_some(), "the record of before counts");
        after.forget(&service);
        assert_eq!(after.answer(&store, &service).unwrap(), None);
    }

    #[test]
    fn what_is_damaged_cut_off_or_newer_is_refused_by_name_and_the_history_serves() {
        let folder = tempfile::tempdir().unwrap();
        let service = ServiceName::new("s").unwrap();
        let store = history(folder.path(), &service, 0..100);
        let now = BEGIN_MS + 100 * MINUTE_MS + 1000;
        let mut minutes = Minutes::new();
        fed(&mut minutes, &store, &service, now);
        minutes.keep(&store).unwrap();
        let image = store.get_blob(BlobKind::Model, KEY).unwrap().unwrap();
        let changed = |at: usize, by: u8| {
            let mut image = image.clone();
            image[at] ^= by;
            image
        };
        for (bad, what) in [
            (image[..image.len() / 2].to_vec(), "cut off"),
            (changed(image.len() / 2, 1), "digest"),
            (changed(8, 0x40), "version"),
        ] {
            store.put_blob(BlobKind::Model, KEY, &bad).unwrap();
            let mut after = Minutes::new();
            let refused = after.restore(&store).unwrap_err().to_string();
            assert!(refused.contains(what), "{refused}");
            fed(&mut after, &store, &service, now);
            assert!(after.answer(&store, &service).unwrap().is_some());
        }
    }
}
