//! What is remembered of one series: the recent values, means and moves over several memories, and what was usual at
//! this time of day and of the week.

use serde::{Deserialize, Serialize};

use super::{HORIZONS, OutlookConfig};

/// Recent values kept, a power of two and above [`OutlookConfig::HORIZON_STEPS_MAX`].
const RING: usize = 64;
/// Steps over which the means, and the moves from one value to the next, are averaged.
pub(super) const MEMORIES: [f64; 4] = [3.0, 12.0, 48.0, 288.0];
/// The longest of them.
const LEVEL: usize = MEMORIES.len() - 1;
/// Steps over which the highest and the lowest value are forgotten.
const EXTREMES_MEMORY: f64 = 96.0;
/// Steps over which the typical change over a horizon is averaged, and the longer ones that keep some of it.
const SCALE_MEMORY: f64 = 288.0;
const SCALE_MEMORY_LONG: f64 = 4000.0;
const SCALE_LONG_SHARE: f64 = 0.1;
/// Changes below this share of the level are noise.
const RELATIVE_FLOOR: f64 = 1e-4;

const DAY_MS: u64 = 86_400_000;
const HOUR_MS: u64 = 3_600_000;
const HOURS_OF_WEEK: usize = 168;
/// Shortest stretch of a day that is remembered by itself.
const SLOT_MS_MIN: u64 = 300_000;
/// How much of the newest day goes into what is usual.
const USUAL_RATE: f32 = 0.3;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Memory {
    ring: Vec<f64>,
    /// Where the next value goes; the one before is the newest.
    head: usize,
    pub(super) seen: u64,
    pub(super) means: [f64; MEMORIES.len()],
    pub(super) moves: [f64; MEMORIES.len()],
    pub(super) high: f64,
    pub(super) low: f64,
    changes: [f64; HORIZONS],
    changes_long: [f64; HORIZONS],
    pub(super) season: Season,
}

impl Memory {
    pub(super) fn new(config: &OutlookConfig) -> Self {
        Self {
            ring: vec![0.0; RING],
            head: 0,
            seen: 0,
            means: [0.0; MEMORIES.len()],
            moves: [0.0; MEMORIES.len()],
            high: 0.0,
            low: 0.0,
            changes: [0.0; HORIZONS],
            changes_long: [0.0; HORIZONS],
            season: Season::new(config.step_ms),
        }
    }

    /// The value `back` steps before the newest.
    pub(super) fn value(&self, back: usize) -> f64 {
        self.ring[(self.head + RING - 1 - back % RING) % RING]
    }

    /// Forgets the recent values, which a gap made meaningless, and starts again from `value`.
    pub(super) fn restart(&mut self, value: f64) {
        self.ring.fill(value);
        self.means[..LEVEL].fill(value);
        (self.high, self.low) = (value, value);
        if self.seen == 0 {
            self.means[LEVEL] = value;
        }
    }

    /// `unix_ms` is when the step ended; a value that was not `measured` only fills a place.
    pub(super) fn push(&mut self, unix_ms: u64, value: f64, measured: bool, config: &OutlookConfig) {
        if self.seen == 0 {
            self.restart(value);
        }
        let moved = (value - self.value(0)).abs();
        self.ring[self.head] = value;
        self.head = (self.head + 1) % RING;
        self.seen = self.seen.saturating_add(1);
        let rate = |memory: f64| (1.0 / memory).max(1.0 / self.seen.min(1 << 30) as f64);
        for ((mean, moves), memory) in self.means.iter_mut().zip(&mut self.moves).zip(MEMORIES) {
            *mean += rate(memory) * (value - *mean);
            *moves += rate(memory) * (moved - *moves);
        }
        let level = self.means[LEVEL];
        self.high = value.max(self.high - (self.high - level) / EXTREMES_MEMORY);
        self.low = value.min(self.low + (level - self.low) / EXTREMES_MEMORY);
        for (at, horizon) in config.horizons.iter().enumerate() {
            let change = (value - self.value(*horizon)).abs();
            self.changes[at] += rate(SCALE_MEMORY) * (change - self.changes[at]);
            self.changes_long[at] += rate(SCALE_MEMORY_LONG) * (change - self.changes_long[at]);
        }
        if measured {
            self.season.push(unix_ms, value);
        }
    }

    pub(super) fn level(&self) -> f64 {
        self.means[LEVEL]
    }

    /// Smallest change that counts.
    pub(super) fn floor(&self, config: &OutlookConfig) -> f64 {
        config.floor.max(RELATIVE_FLOOR * self.level().abs())
    }

    /// Typical change over a horizon.
    pub(super) fn scale(&self, horizon: usize, config: &OutlookConfig) -> f64 {
        let long = SCALE_LONG_SHARE * self.changes_long[horizon];
        self.changes[horizon].max(long).max(self.floor(config))
    }

    /// Whether an import brought something that this code could have made.
    pub(super) fn is_sound(&self) -> bool {
        let finite = |values: &[f64]| values.iter().all(|value| value.is_finite());
        self.ring.len() == RING
            && self.head < RING
            && finite(&self.ring)
            && [&self.means[..], &self.moves, &self.changes, &self.changes_long].into_iter().all(finite)
            && finite(&[self.high, self.low])
            && self.season.is_sound()
    }

    pub(super) fn heap_bytes(&self) -> usize {
        self.ring.capacity() * size_of::<f64>() + self.season.heap_bytes()
    }
}

/// A stretch of time whose mean is being made.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Stretch {
    number: u64,
    sum: f64,
    count: u32,
}

impl Stretch {
    /// The mean of the one before, when a new one begins.
    fn push(&mut self, number: u64, value: f64) -> Option<(u64, f32)> {
        let ended = (self.number != number && self.count > 0).then(|| (self.number, self.mean()));
        if self.number != number {
            *self = Self { number, sum: 0.0, count: 0 };
        }
        self.sum += value;
        self.count += 1;
        ended
    }

    fn mean(&self) -> f32 {
        (self.sum / f64::from(self.count.max(1))) as f32
    }
}

/// What was at this time of day yesterday and usually, and at this hour of the week.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Season {
    slot_ms: u64,
    slot: Stretch,
    hour: Stretch,
    /// NaN: not known yet.
    yesterday: Vec<f32>,
    usual: Vec<f32>,
    week: Vec<f32>,
}

impl Season {
    fn new(step_ms: u64) -> Self {
        // A step that does not go into a day, or is longer than one, has no time of day.
        let slot_ms = step_ms.max(SLOT_MS_MIN);
        let slots = if DAY_MS.is_multiple_of(slot_ms) { (DAY_MS / slot_ms) as usize } else { 0 };
        let begin = Stretch { number: 0, sum: 0.0, count: 0 };
        Self {
            slot_ms,
            slot: begin,
            hour: begin,
            yesterday: vec![f32::NAN; slots],
            usual: vec![f32::NAN; slots],
            week: vec![f32::NAN; HOURS_OF_WEEK],
        }
    }

    fn push(&mut self, unix_ms: u64, value: f64) {
        if let Some((ended, mean)) = self.slot.push(unix_ms / self.slot_ms, value)
            && !self.yesterday.is_empty()
        {
            let at = (ended % self.yesterday.len() as u64) as usize;
            self.yesterday[at] = mean;
            let usual = &mut self.usual[at];
            *usual = if usual.is_nan() { mean } else { *usual + USUAL_RATE * (mean - *usual) };
        }
        if let Some((ended, mean)) = self.hour.push(unix_ms / HOUR_MS, value) {
            self.week[(ended % HOURS_OF_WEEK as u64) as usize] = mean;
        }
    }

    /// The mean of the slot a day before this time.
    pub(super) fn yesterday(&self, unix_ms: u64) -> Option<f64> {
        self.at(&self.yesterday, unix_ms, 0)
    }

    /// What is usual around this time, over three slots.
    pub(super) fn usual(&self, unix_ms: u64) -> Option<f64> {
        let known = [-1, 0, 1].map(|beside| self.at(&self.usual, unix_ms, beside));
        let (sum, count) = known.iter().flatten().fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
        (count > 0.0).then(|| sum / count)
    }

    /// The mean of the hour a week before this time.
    pub(super) fn last_week(&self, unix_ms: u64) -> Option<f64> {
        let value = self.week[(unix_ms / HOUR_MS % HOURS_OF_WEEK as u64) as usize];
        (!value.is_nan()).then_some(f64::from(value))
    }

    fn at(&self, slots: &[f32], unix_ms: u64, beside: i64) -> Option<f64> {
        let count = slots.len() as i64;
        if count == 0 {
            return None;
        }
        let slot = (unix_ms / self.slot_ms) as i64 + beside;
        let value = slots[slot.rem_euclid(count) as usize];
        (!value.is_nan()).then_some(f64::from(value))
    }

    fn is_sound(&self) -> bool {
        let slots = self.yesterday.len();
        self.slot_ms > 0
            && self.usual.len() == slots
            && slots as u64 <= DAY_MS / SLOT_MS_MIN
            && self.week.len() == HOURS_OF_WEEK
            && [&self.yesterday, &self.usual, &self.week].into_iter().flatten().all(|value| !value.is_infinite())
    }

    fn heap_bytes(&self) -> usize {
        (self.yesterday.capacity() + self.usual.capacity() + self.week.capacity()) * size_of::<f32>()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]
mod tests {
    use super::*;

    #[test]
    fn a_day_and_a_week_ago_are_known_by_their_time() {
        let config = OutlookConfig::minutes();
        let mut memory = Memory::new(&config);
        let days = 9;
        for step in 0..days * 24 * 60 {
            let at = step * 60_000;
            memory.push(at, (at / DAY_MS * 1000 + at % DAY_MS / HOUR_MS) as f64, true, &config);
        }
        let now = days * DAY_MS;
        // Half past ten of the day that begins.
        let at = now + 10 * HOUR_MS + HOUR_MS / 2;
        assert_eq!(memory.season.yesterday(at), Some((days - 1) as f64 * 1000.0 + 10.0));
        assert_eq!(memory.season.last_week(at), Some((days - 7) as f64 * 1000.0 + 10.0));
        let usual = memory.season.usual(at).unwrap();
        assert!(usual < (days - 1) as f64 * 1000.0 && usual > (days - 5) as f64 * 1000.0, "{usual}");
    }

    #[test]
    fn a_step_that_is_no_part_of_a_day_has_no_season() {
        let mut config = OutlookConfig::minutes();
        config.step_ms = 7 * HOUR_MS;
        let mut memory = Memory::new(&config);
        for step in 0..100 {
            memory.push(step * config.step_ms, 1.0, true, &config);
        }
        assert_eq!(memory.season.yesterday(0), None);
        assert_eq!(memory.season.usual(0), None);
    }
}
