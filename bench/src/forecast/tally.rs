//! What the forecasts of one series at one horizon came to.

use warmswap_forecast::Scored;
use warmswap_model::{Champion, Quantiles};

/// Levels at which pinball losses are compared, as places in [`Quantiles::LEVELS`].
pub(super) const COMPARED: [(usize, &str); 3] = [(1, "q50"), (2, "q90"), (4, "q99")];

/// One candidate's, or what was served.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sum {
    pub(super) count: u64,
    loss: [f64; Quantiles::LEVELS.len()],
    error: f64,
    covered: u64,
    width: f64,
}

impl Sum {
    fn add(&mut self, band: &Quantiles, actual: f64) {
        self.count += 1;
        for ((loss, level), value) in self.loss.iter_mut().zip(Quantiles::LEVELS).zip(band.to_levels()) {
            let over = actual - value;
            *loss += (level * over).max((level - 1.0) * over);
        }
        self.error += (actual - band.q50).abs();
        self.covered += u64::from(band.q05 <= actual && actual <= band.q95);
        self.width += band.q95 - band.q05;
    }

    fn mean(&self, sum: f64) -> Option<f64> {
        (self.count > 0).then(|| sum / self.count as f64)
    }

    /// Mean pinball loss at a level.
    pub(super) fn loss(&self, level: usize) -> Option<f64> {
        self.mean(self.loss[level])
    }

    /// Mean absolute error of the median.
    pub(super) fn error(&self) -> Option<f64> {
        self.mean(self.error)
    }

    pub(super) fn coverage(&self) -> Option<f64> {
        self.mean(self.covered as f64)
    }

    pub(super) fn width(&self) -> Option<f64> {
        self.mean(self.width)
    }
}

#[derive(Debug, Clone, Default)]
pub(super) struct Tally {
    pub(super) served: Sum,
    /// As many as a forecast has candidates.
    candidates: Vec<(Champion, Sum)>,
    /// How often each served.
    champions: Vec<(Champion, u64)>,
}

impl Tally {
    pub(super) fn add(&mut self, scored: &Scored) {
        self.served.add(&scored.served, scored.actual);
        if self.candidates.is_empty() {
            self.candidates = scored.candidates.iter().map(|(who, _)| (*who, Sum::default())).collect();
        }
        for ((_, sum), (_, band)) in self.candidates.iter_mut().zip(&scored.candidates) {
            if let Some(band) = band {
                sum.add(band, scored.actual);
            }
        }
        match self.champions.iter_mut().find(|(who, _)| *who == scored.champion) {
            Some((_, count)) => *count += 1,
            None => self.champions.push((scored.champion, 1)),
        }
    }

    /// Of a candidate that forecast all the time. The LSTM's forms are counted by their place among them.
    pub(super) fn of(&self, champion: Champion, form: usize) -> Option<&Sum> {
        let (_, sum) = self.candidates.iter().filter(|(who, _)| *who == champion).nth(form)?;
        // One that begins late is compared over another time: it must have been there for nearly all of it.
        (sum.count as f64 >= 0.95 * self.served.count as f64).then_some(sum)
    }

    /// Share of the time that a candidate served.
    pub(super) fn served_by(&self, champion: Champion) -> f64 {
        let count = self.champions.iter().find(|(who, _)| *who == champion).map_or(0, |(_, count)| *count);
        count as f64 / self.served.count.max(1) as f64
    }
}
