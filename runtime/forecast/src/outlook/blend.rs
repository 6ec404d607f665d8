//! A weighted mean of what all candidates say, level by level: whoever was better lately weighs more. Where candidates err in
//! different ways the mean errs less than each; where one is clearly best it is that one.

use serde::{Deserialize, Serialize};

use crate::calibrate::{LEVELS, pinball_at};

/// Steps over which losses are averaged, by level: the further out, the fewer of them say something.
const MEMORY: [f32; LEVELS] = [2000.0, 400.0, 1000.0, 2000.0, 4000.0];
/// A candidate whose loss is this share higher than the best one's weighs 1/e as much; by level, because losses further out are
/// less certain.
const TEMPERATURE: [f32; LEVELS] = [0.06, 0.04, 0.05, 0.06, 0.1];
/// Forecasts that were compared before a candidate counts.
const EVIDENCE_MIN: u32 = 30;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Blend {
    /// By candidate: pinball loss of each level.
    losses: Vec<[f32; LEVELS]>,
    scored: Vec<u32>,
}

impl Blend {
    pub(super) fn new(candidates: usize) -> Self {
        Self { losses: vec![[0.0; LEVELS]; candidates], scored: vec![0; candidates] }
    }

    /// Learns what the candidate said and what came.
    pub(super) fn score(&mut self, who: usize, band: &[f64; LEVELS], actual: f64) {
        let scored = &mut self.scored[who];
        *scored = scored.saturating_add(1);
        for (level, loss) in self.losses[who].iter_mut().enumerate() {
            let rate = (1.0 / MEMORY[level]).max(1.0 / (*scored).min(1 << 20) as f32);
            *loss += rate * (pinball_at(level, band[level], actual) as f32 - *loss);
        }
    }

    /// Who has the lowest loss at a level.
    pub(super) fn best(&self, level: usize, gave: &[bool]) -> Option<usize> {
        self.at(level, gave).min_by(|a, b| a.1.total_cmp(&b.1)).map(|(who, _)| who)
    }

    /// Those that give something and have shown enough, with their losses.
    fn at(&self, level: usize, gave: &[bool]) -> impl Iterator<Item = (usize, f32)> {
        let counts = |(who, gave): (usize, &bool)| (*gave && self.scored[who] >= EVIDENCE_MIN).then_some(who);
        gave.iter().enumerate().filter_map(counts).map(move |who| (who, self.losses[who][level]))
    }

    pub(super) fn forget(&mut self, who: usize) {
        (self.losses[who], self.scored[who]) = ([0.0; LEVELS], 0);
    }

    /// `None` before anybody has shown anything.
    pub(super) fn band(&self, bands: &[[f64; LEVELS]], gave: &[bool]) -> Option<[f64; LEVELS]> {
        let mut band = [0.0; LEVELS];
        for (level, value) in band.iter_mut().enumerate() {
            let best = self.losses[self.best(level, gave)?][level];
            let (mut sum, mut weights) = (0.0, 0.0);
            for (who, loss) in self.at(level, gave) {
                // Nothing is as good as never wrong.
                let worse = if loss > best { (loss - best) / best } else { 0.0 };
                let weight = f64::from((-worse / TEMPERATURE[level]).exp());
                sum += weight * bands[who][level];
                weights += weight;
            }
            *value = sum / weights;
        }
        Some(band)
    }

    /// Whether an import brought something that this code could have made.
    pub(super) fn is_sound(&self, candidates: usize) -> bool {
        self.losses.len() == candidates
            && self.scored.len() == candidates
            && self.losses.iter().flatten().all(|loss| loss.is_finite())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]
mod tests {
    use super::*;

    #[test]
    fn the_best_counts_and_equals_share() {
        let mut blend = Blend::new(3);
        let bands = [[9.0; LEVELS], [11.0; LEVELS], [50.0; LEVELS]];
        assert_eq!(blend.band(&bands, &[true; 3]), None);
        for step in 0..200 {
            // Errs by the same on the other side, in turns.
            let actual = if step % 2 == 0 { 9.0 } else { 11.0 };
            for (who, band) in bands.iter().enumerate() {
                blend.score(who, band, actual);
            }
        }
        let [_, median, ..] = blend.band(&bands, &[true; 3]).unwrap();
        assert!((median - 10.0).abs() < 0.1, "{median}");
        let [_, median, ..] = blend.band(&bands, &[true, false, true]).unwrap();
        assert!((median - 9.0).abs() < 1e-6, "{median}");
    }

    #[test]
    fn who_is_never_wrong_is_alone() {
        let mut blend = Blend::new(2);
        for _ in 0..100 {
            blend.score(0, &[0.0; LEVELS], 0.0);
            blend.score(1, &[1.0; LEVELS], 0.0);
        }
        assert_eq!(blend.band(&[[0.0; LEVELS], [1.0; LEVELS]], &[true; 2]).unwrap(), [0.0; LEVELS]);
    }
}
