//! How long clients went without any answer, beyond what is usual.
//!
//! A gap is only worth something beside the gaps of the same clients when nothing happens: a loaded host has gaps of
//! its own, and the longer one looks the longer the longest of them is. So a window in which something happened is compared
//! with windows of the same length in which nothing did.

/// From and to, CLOCK_MONOTONIC, ns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) start_ns: u64,
    pub(crate) end_ns: u64,
}

impl Span {
    pub(crate) const fn length_ns(self) -> u64 {
        self.end_ns.saturating_sub(self.start_ns)
    }

    pub(crate) fn overlap_ns(self, other: Self) -> u64 {
        self.end_ns.min(other.end_ns).saturating_sub(self.start_ns.max(other.start_ns))
    }
}

/// What is left of `whole` without `busy` (in order of their starts).
pub(crate) fn calm(whole: Span, busy: &[Span]) -> Vec<Span> {
    let mut stretches = Vec::new();
    let mut from = whole.start_ns;
    for span in busy {
        if span.start_ns > from {
            stretches.push(Span { start_ns: from, end_ns: span.start_ns.min(whole.end_ns) });
        }
        from = from.max(span.end_ns);
    }
    stretches.push(Span { start_ns: from, end_ns: whole.end_ns });
    stretches.retain(|stretch| stretch.length_ns() > 0);
    stretches
}

/// Windows of one length inside the calm stretches, each overlapping the next by half. When no stretch is that long, the
/// longest one there is: the usual gap then looks smaller, and the excess larger, than it is.
pub(crate) fn windows(calm: &[Span], length_ns: u64) -> Vec<Span> {
    let step = (length_ns / 2).max(1);
    let mut windows = Vec::new();
    for stretch in calm {
        let mut start_ns = stretch.start_ns;
        while start_ns + length_ns <= stretch.end_ns {
            windows.push(Span { start_ns, end_ns: start_ns + length_ns });
            start_ns += step;
        }
    }
    if windows.is_empty() {
        windows.extend(calm.iter().max_by_key(|stretch| stretch.length_ns()));
    }
    windows
}

/// The median over calm windows of the longest gap in each. `None` when nothing was calm.
pub(crate) fn usual_ns(calm: &[Span], length_ns: u64, longest_gap_ns: impl Fn(Span) -> u64) -> Option<u64> {
    let mut gaps: Vec<u64> = windows(calm, length_ns).into_iter().map(longest_gap_ns).collect();
    gaps.sort_unstable();
    gaps.get(gaps.len().saturating_sub(1) / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn span(start_ns: u64, end_ns: u64) -> Span {
        Span { start_ns, end_ns }
    }

    #[test]
    fn what_is_not_busy_is_calm() {
        let busy = [span(10, 20), span(15, 18), span(30, 40), span(95, 120)];
        assert_eq!(calm(span(0, 100), &busy), [span(0, 10), span(20, 30), span(40, 95)]);
        assert_eq!(calm(span(12, 18), &busy), []);
        assert_eq!(calm(span(0, 5), &[]), [span(0, 5)]);
    }

    #[test]
    fn windows_have_the_length_that_is_compared() {
        let calm = [span(0, 10), span(20, 23)];
        assert_eq!(windows(&calm, 4), [span(0, 4), span(2, 6), span(4, 8), span(6, 10)]);
        assert_eq!(windows(&calm, 50), [span(0, 10)], "the longest there is");
        assert_eq!(windows(&[], 4), []);
    }

    #[test]
    fn the_usual_gap_grows_with_the_length_that_is_looked_at() {
        // One gap of 5 that begins every 20.
        let longest = |window: Span| if window.end_ns / 20 > window.start_ns / 20 { 5 } else { 1 };
        let calm = [span(1, 200)];
        assert_eq!(usual_ns(&calm, 4, longest), Some(1));
        assert_eq!(usual_ns(&calm, 30, longest), Some(5));
        assert_eq!(usual_ns(&[], 4, longest), None);
    }

    #[test]
    fn overlaps_are_measured() {
        assert_eq!(span(0, 10).overlap_ns(span(5, 20)), 5);
        assert_eq!(span(0, 10).overlap_ns(span(10, 20)), 0);
    }
}
