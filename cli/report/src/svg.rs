//! The little SVG that the charts need: scales, ticks, paths, text. Coordinates are pixels with one decimal.

use std::fmt::Write as _;

use crate::format::escape;

/// Maps a range of values to a range of pixels.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scale {
    from: f64,
    to: f64,
    start: f64,
    end: f64,
    log: bool,
}

impl Scale {
    pub(crate) fn linear(from: f64, to: f64, start: f64, end: f64) -> Self {
        Self { from, to: if to > from { to } else { from + 1.0 }, start, end, log: false }
    }

    pub(crate) fn log(from: f64, to: f64, start: f64, end: f64) -> Self {
        Self { from: from.log10(), to: to.log10(), start, end, log: true }
    }

    pub(crate) fn at(&self, value: f64) -> f64 {
        let value = if self.log { value.max(1e-9).log10() } else { value };
        let share = ((value - self.from) / (self.to - self.from)).clamp(0.0, 1.0);
        self.start + share * (self.end - self.start)
    }
}

const TICKS_MAX: usize = 50;

/// Round values from `low` to `high`, about `wanted` of them, in steps of 1, 2 or 5.
pub(crate) fn ticks(low: f64, high: f64, wanted: usize) -> Vec<f64> {
    let rough = (high - low) / wanted.max(1) as f64;
    if !(rough.is_finite() && rough > 0.0) {
        return vec![low];
    }
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|s| s * power).find(|s| *s >= rough).unwrap_or(power * 10.0);
    let first = (low / step).ceil() as i64;
    let last = (high / step + 1e-9).floor() as i64;
    // A range at the end of what numbers can hold must not give a million ticks.
    (first..=last).take(TICKS_MAX).map(|n| n as f64 * step).collect()
}

/// Round instants, in seconds.
pub(crate) fn time_ticks(low: f64, high: f64, wanted: usize) -> Vec<f64> {
    const STEPS: [f64; 16] =
        [1.0, 2.0, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 900.0, 1800.0, 3600.0, 7200.0, 14_400.0, 43_200.0];
    let rough = (high - low) / wanted.max(1) as f64;
    let Some(step) = STEPS.into_iter().find(|s| *s >= rough) else { return ticks(low, high, wanted) };
    let first = (low / step).ceil() as i64;
    let last = (high / step + 1e-9).floor() as i64;
    (first..=last).take(TICKS_MAX).map(|n| n as f64 * step).collect()
}

/// A path through the points; `None` lifts the pen. A single point between gaps becomes a dot.
pub(crate) fn line(points: impl Iterator<Item = Option<(f64, f64)>>) -> String {
    let mut path = String::new();
    let mut down = false;
    for point in points {
        match point {
            Some((x, y)) => {
                let _ = write!(path, "{}{x:.1} {y:.1}", if down { "L" } else { "M" });
                if !down {
                    // A move alone draws nothing; with a round cap this draws a dot.
                    path.push_str("h0");
                }
                down = true;
            }
            None => down = false,
        }
    }
    path
}

/// The area between two curves, piecewise where there is no gap. `(x, upper, lower)`.
pub(crate) fn band(points: impl Iterator<Item = Option<(f64, f64, f64)>>) -> String {
    let mut path = String::new();
    let mut piece: Vec<(f64, f64, f64)> = Vec::new();
    let mut close = |piece: &mut Vec<(f64, f64, f64)>| {
        for (index, (x, upper, _)) in piece.iter().enumerate() {
            let _ = write!(path, "{}{x:.1} {upper:.1}", if index == 0 { "M" } else { "L" });
        }
        for (x, _, lower) in piece.iter().rev() {
            let _ = write!(path, "L{x:.1} {lower:.1}");
        }
        if !piece.is_empty() {
            path.push('Z');
        }
        piece.clear();
    };
    for point in points {
        match point {
            Some(point) => piece.push(point),
            None => close(&mut piece),
        }
    }
    close(&mut piece);
    path
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Anchor {
    Start,
    Middle,
    End,
}

/// One drawing.
#[derive(Debug)]
pub(crate) struct Svg {
    width: f64,
    height: f64,
    body: String,
}

impl Svg {
    pub(crate) fn new(width: f64, height: f64) -> Self {
        Self { width, height, body: String::new() }
    }

    pub(crate) fn path(&mut self, class: &str, d: &str) {
        if !d.is_empty() {
            let _ = write!(self.body, "<path class=\"{class}\" d=\"{d}\"/>");
        }
    }

    pub(crate) fn segment(&mut self, class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
        let _ =
            write!(self.body, "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>");
    }

    /// `title` is shown when the pointer rests on it.
    pub(crate) fn rect(&mut self, class: &str, (x, y): (f64, f64), (w, h): (f64, f64), title: &str) {
        let _ = write!(
            self.body,
            "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\"",
            w.max(0.0),
            h.max(0.0)
        );
        let _ = match title {
            "" => write!(self.body, "/>"),
            title => write!(self.body, "><title>{}</title></rect>", escape(title)),
        };
    }

    pub(crate) fn circle(&mut self, class: &str, (x, y): (f64, f64), r: f64) {
        let _ = write!(self.body, "<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{r}\"/>");
    }

    pub(crate) fn text(&mut self, class: &str, (x, y): (f64, f64), anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let _ = write!(
            self.body,
            "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>",
            escape(text)
        );
    }

    /// `description` is what a screen reader says instead of the picture.
    pub(crate) fn finish(self, class: &str, description: &str) -> String {
        format!(
            "<svg class=\"{class}\" viewBox=\"0 0 {:.0} {:.0}\" role=\"img\" aria-label=\"{}\">{}</svg>\n",
            self.width,
            self.height,
            escape(description),
            self.body
        )
    }
}

/// About how wide a text is at 12 px.
pub(crate) fn text_width(text: &str) -> f64 {
    text.chars().count() as f64 * 6.6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks(0.0, 100.0, 5), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        assert_eq!(ticks(3.0, 9.0, 3), [4.0, 6.0, 8.0]);
        assert_eq!(ticks(5.0, 5.0, 4), [5.0]);
        assert_eq!(time_ticks(0.0, 200.0, 8), [0.0, 30.0, 60.0, 90.0, 120.0, 150.0, 180.0]);
    }

    #[test]
    fn gaps_lift_the_pen() {
        let points = [Some((0.0, 1.0)), Some((1.0, 2.0)), None, Some((3.0, 4.0))];
        assert_eq!(line(points.into_iter()), "M0.0 1.0h0L1.0 2.0M3.0 4.0h0");
        let points = [Some((0.0, 1.0, 2.0)), Some((1.0, 1.0, 2.0)), None];
        assert_eq!(band(points.into_iter()), "M0.0 1.0L1.0 1.0L1.0 2.0L0.0 2.0Z");
        assert_eq!(line(std::iter::empty()), "");
    }

    #[test]
    fn values_outside_a_scale_stay_on_the_paper() {
        let scale = Scale::log(10.0, 1000.0, 100.0, 0.0);
        assert_eq!((scale.at(100.0), scale.at(0.0), scale.at(1e9)), (50.0, 100.0, 0.0));
        assert_eq!(Scale::linear(3.0, 3.0, 0.0, 10.0).at(3.0), 0.0);
    }
}
