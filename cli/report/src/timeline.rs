//! The phases of one handover: the whole of it on one line, and the switch (QUIESCE to PROMOTE), which is a thousand
//! times shorter, enlarged below.

use warmswap_model::{Phase, PhaseOutcome, PhaseTiming};

use crate::charts::Size;
use crate::format::{duration_us, escape};
use crate::svg::{Anchor, Scale, Svg, text_width};

const BAR: f64 = 26.0;

pub(crate) const fn phase_class(phase: Phase) -> &'static str {
    match phase {
        Phase::Reserve => "ph-reserve",
        Phase::Warm => "ph-warm",
        Phase::Sync => "ph-sync",
        Phase::Quiesce => "ph-quiesce",
        Phase::Delta => "ph-delta",
        Phase::Promote => "ph-promote",
        Phase::Verify => "ph-verify",
        Phase::Commit => "ph-commit",
    }
}

const fn switches(phase: Phase) -> bool {
    matches!(phase, Phase::Quiesce | Phase::Delta | Phase::Promote)
}

/// Runs of consecutive switching phases: the way there and, after a rollback, the way back.
fn switch_runs(phases: &[PhaseTiming]) -> Vec<&[PhaseTiming]> {
    phases
        .chunk_by(|a, b| switches(a.phase) && switches(b.phase) && b.phase > a.phase)
        .filter(|run| run.iter().all(|timing| switches(timing.phase)))
        .collect()
}

fn end_us(timing: &PhaseTiming) -> f64 {
    timing.start_us + timing.duration_us.max(0.0)
}

/// An empty text when there is nothing to draw.
pub(crate) fn draw(phases: &[PhaseTiming], size: Size) -> String {
    let width = if size == Size::Wide { 1040.0 } else { 340.0 };
    let (Some(first), Some(end)) = (phases.first(), phases.iter().map(end_us).reduce(f64::max)) else {
        return String::new();
    };
    let begin = first.start_us;
    let total = Scale::linear(begin, end.max(begin + 1.0), 1.0, width - 1.0);
    let runs = switch_runs(phases);
    let zoom_top = BAR + 30.0;
    let height = if runs.is_empty() { BAR + 20.0 } else { zoom_top + BAR + 20.0 };
    let mut svg = Svg::new(width, height);
    bars(&mut svg, phases, &total, 0.0);
    // Side by side, each as wide as its share would be if all were equal.
    let gap = 24.0;
    let each = (width - gap * runs.len().saturating_sub(1) as f64) / runs.len().max(1) as f64;
    for (index, run) in runs.iter().enumerate() {
        let (from, until) = (run[0].start_us, run.iter().map(end_us).fold(0.0, f64::max));
        let left = index as f64 * (each + gap);
        let (x0, x1) = (total.at(from), total.at(until).max(total.at(from) + 1.0));
        let zoom = Scale::linear(from, until.max(from + 0.1), left + 1.0, left + each - 1.0);
        let wedge =
            format!("M{x0:.1} {BAR}L{x1:.1} {BAR}L{:.1} {zoom_top}L{:.1} {zoom_top}Z", left + each - 1.0, left + 1.0);
        svg.path("wedge", &wedge);
        bars(&mut svg, run, &zoom, zoom_top);
        let way = if index == 0 { "switch" } else { "switch back" };
        let mut text = format!("{way} {}", duration_us(until - from));
        if text_width(&text) + text_width(", enlarged") < each {
            text += ", enlarged";
        }
        svg.text("tick", (left + 1.0, zoom_top + BAR + 15.0), Anchor::Start, &text);
    }
    // Last, so that they lie above the wedge.
    svg.text("tick", (1.0, BAR + 15.0), Anchor::Start, "0");
    svg.text("tick", (width - 1.0, BAR + 15.0), Anchor::End, &duration_us(end - begin));
    svg.finish(size.class(), &describe(phases))
}

fn bars(svg: &mut Svg, phases: &[PhaseTiming], x: &Scale, top: f64) {
    for timing in phases {
        let (from, until) = (x.at(timing.start_us), x.at(end_us(timing)));
        // Half a pixel less, so that neighbours can be told apart; a hair at least, so that nothing vanishes.
        let wide = (until - from - 0.75).max(0.75);
        let outcome = match timing.outcome {
            PhaseOutcome::Done => "",
            PhaseOutcome::Failed => " failed",
            PhaseOutcome::Undone => " undone",
        };
        let title = format!("{}{outcome}: {}", timing.phase, duration_us(timing.duration_us));
        svg.rect(&format!("{}{outcome}", phase_class(timing.phase)), (from, top), (wide, BAR), &title);
        let name = format!("{}{outcome}", timing.phase);
        let long = format!("{name} {}", duration_us(timing.duration_us));
        // The text is bold and in capitals.
        let fits = |text: &str| text_width(text) * 1.2 + 14.0 < wide;
        if let Some(text) = [&long, &name].into_iter().find(|text| fits(text)) {
            svg.text("bar-label", (f64::midpoint(from, from + wide), top + 17.5), Anchor::Middle, text);
        }
    }
}

fn describe(phases: &[PhaseTiming]) -> String {
    let each = phases.iter().map(|t| format!("{} {}", t.phase, duration_us(t.duration_us)));
    format!("Phases: {}.", each.collect::<Vec<_>>().join(", "))
}

/// The same as a list with every time in figures: what is too short to be drawn can be read here.
pub(crate) fn list(phases: &[PhaseTiming]) -> String {
    let item = |timing: &PhaseTiming| {
        let outcome = match timing.outcome {
            PhaseOutcome::Done => "",
            PhaseOutcome::Failed => " <em>failed</em>",
            PhaseOutcome::Undone => " <em>undone</em>",
        };
        format!(
            "<li><i class=\"swatch {}\"></i>{} <b>{}</b>{outcome}</li>",
            phase_class(timing.phase),
            timing.phase,
            escape(&duration_us(timing.duration_us)),
        )
    };
    format!("<ul class=\"phases\">{}</ul>\n", phases.iter().map(item).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timing(phase: Phase, start_us: f64, duration_us: f64) -> PhaseTiming {
        PhaseTiming { phase, start_us, duration_us, outcome: PhaseOutcome::Done }
    }

    #[test]
    fn the_switch_is_enlarged_each_way() {
        let there = [
            timing(Phase::Reserve, 0.0, 100.0),
            timing(Phase::Quiesce, 100.0, 50.0),
            timing(Phase::Delta, 150.0, 20.0),
            timing(Phase::Promote, 170.0, 30.0),
            timing(Phase::Verify, 200.0, 2e6),
        ];
        assert_eq!(switch_runs(&there).len(), 1);
        assert!(draw(&there, Size::Wide).contains("switch 100 µs, enlarged"));
        let back: Vec<_> = there.iter().cloned().chain(there[1..4].iter().cloned()).collect();
        let runs = switch_runs(&back);
        assert_eq!(runs.iter().map(|run| run.len()).collect::<Vec<_>>(), [3, 3]);
        // Also when nothing lies between.
        let at_once: Vec<_> = there[1..4].iter().chain(&there[1..4]).cloned().collect();
        assert_eq!(switch_runs(&at_once).len(), 2);
    }

    #[test]
    fn a_handover_that_never_switched_has_one_line() {
        let phases = [timing(Phase::Reserve, 0.0, 100.0), timing(Phase::Warm, 100.0, 900.0)];
        let svg = draw(&phases, Size::Narrow);
        assert!(!svg.contains("enlarged") && svg.contains("WARM"), "{svg}");
        assert_eq!(draw(&[], Size::Wide), "");
        assert!(list(&phases).contains("RESERVE <b>100 µs</b>"));
    }
}
