//! Is the new generation worse than the old one was? And has it been watched for long enough to say so?
//!
//! A rollback is cheap but not free, and at the level of microseconds every value is noise. So a ratio alone never rolls
//! back: the difference must also be one that somebody could notice, and rest on enough requests. The limits of the
//! ratios are the service's own ([`Handover`]); the floors are here.
//!
//! | compared | worse when above ratio **and** |
//! |---|---|
//! | answers | something came in, none went out, and at least 20 requests were expected |
//! | p99 (both sides ≥ 500 requests; p50 with less) | at least 0.5 ms more |
//! | throughput | at least 20 requests expected, **and** the median latency rose too: clients that merely ask less are no fault |
//! | CPU per request | at least 5 % of a core more at the rate of before, **and** the rate is at least half of it: what a service burns while idle is not the requests' |
//! | memory latency | at least 20 ns more |
//! | TCP resets | at least 3 more than before in the same time |

use warmswap_model::{Handover, Measurements};

/// Requests from which a p99 means something: five of them lie above it.
const P99_REQUESTS_MIN: u64 = 500;
const P50_REQUESTS_MIN: u64 = 20;
const LATENCY_RISE_US_MIN: f64 = 500.0;
const EXPECTED_REQUESTS_MIN: f64 = 20.0;
/// With throughput below its limit, this rise of the median says that it is the service and not the clients.
const MEDIAN_RATIO_SLOWER: f64 = 1.2;
/// Below this share of the rate of before, CPU per request is not comparable.
const COMPARABLE_RATE_MIN: f64 = 0.5;
const CPU_RISE_PCT_MIN: f64 = 5.0;
const MEMORY_LATENCY_RISE_NS_MIN: f64 = 20.0;
const RESETS_MORE_MIN: f64 = 3.0;
/// VERIFY ends at the latest after this many times its shortest length.
const VERIFY_S_MAX_FACTOR: f64 = 10.0;
/// VERIFY ends early when this many times the limit is exceeded.
const CLEARLY_FACTOR: f64 = 2.0;
const CLEARLY_SECONDS_MIN: f64 = 0.5;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Judgement {
    /// The same, or better.
    Ok,
    /// One clause for a person: what rose or fell, from what to what, against which limit.
    Worse { reason: String },
}

/// Whether VERIFY may end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    Continue,
    /// Long enough and enough requests, or as long as it may last.
    Enough,
    /// Not long enough yet, but already so much worse that waiting would only hurt clients.
    ClearlyWorse,
}

/// Compares a stretch after the handover with one before it. A value that is missing on either side is not judged.
#[must_use]
pub fn judge(before: &Measurements, after: &Measurements, limits: &Handover) -> Judgement {
    let checks = [worse_silence, worse_latency, worse_throughput, worse_resets, worse_cpu, worse_memory_latency];
    match checks.iter().find_map(|check| check(before, after, limits)) {
        Some(reason) => Judgement::Worse { reason },
        None => Judgement::Ok,
    }
}

/// Whether `after` is enough to judge. A service that was (nearly) idle is not waited for: even the longest VERIFY would
/// see too few requests to compare.
#[must_use]
pub fn enough(before: &Measurements, after: &Measurements, limits: &Handover) -> Progress {
    let longest = limits.verify_s_min * VERIFY_S_MAX_FACTOR;
    let idle = before.requests_per_s * longest < P50_REQUESTS_MIN as f64;
    // Who waits longer for answers sends less: what does not come for that is evidence too.
    let slow = after.requests >= P50_REQUESTS_MIN && takes_longer(before, after);
    let requests = if slow { after.requests.max(expected_requests(before, after) as u64) } else { after.requests };
    let long = after.seconds >= limits.verify_s_min && (idle || requests >= limits.verify_requests_min);
    if long || after.seconds >= longest {
        return Progress::Enough;
    }
    let doubled = Handover { p99_ratio_max: limits.p99_ratio_max * CLEARLY_FACTOR, ..*limits };
    let counted = after.requests >= limits.verify_requests_min.max(P99_REQUESTS_MIN);
    // The tail alone may be cold caches right after the switch; with the median it is the service.
    let clearly = counted
        && after.seconds >= CLEARLY_SECONDS_MIN
        && worse_latency(before, after, &doubled).is_some()
        && exceeds(before.p50_us, after.p50_us, doubled.p99_ratio_max, LATENCY_RISE_US_MIN).is_some();
    if clearly { Progress::ClearlyWorse } else { Progress::Continue }
}

/// Both values, when `after` is above `ratio_max × before` and at least `rise_min` more.
fn exceeds(before: Option<f64>, after: Option<f64>, ratio_max: f64, rise_min: f64) -> Option<(f64, f64)> {
    let (before, after) = (before?, after?);
    let sound = before.is_finite() && after.is_finite() && before >= 0.0;
    (sound && after > ratio_max * before && after - before >= rise_min).then_some((before, after))
}

/// Requests that would have come as before.
fn expected_requests(before: &Measurements, after: &Measurements) -> f64 {
    before.requests_per_s * after.seconds
}

fn takes_longer(before: &Measurements, after: &Measurements) -> bool {
    matches!((before.p50_us, after.p50_us), (Some(before), Some(after)) if after > before * MEDIAN_RATIO_SLOWER)
}

fn worse_silence(before: &Measurements, after: &Measurements, _: &Handover) -> Option<String> {
    // Without a byte nobody has asked anything: that is no fault of the service.
    let silent =
        after.requests == 0 && after.usage.network > 0.0 && expected_requests(before, after) >= EXPECTED_REQUESTS_MIN;
    silent.then(|| {
        format!("no request was answered in {:.1} s, {:.0}/s were before", after.seconds, before.requests_per_s)
    })
}

fn worse_latency(before: &Measurements, after: &Measurements, limits: &Handover) -> Option<String> {
    let requests = before.requests.min(after.requests);
    let (name, from, to) = match requests {
        P99_REQUESTS_MIN.. => ("p99", before.p99_us, after.p99_us),
        P50_REQUESTS_MIN.. => ("p50", before.p50_us, after.p50_us),
        _ => return None,
    };
    let (from, to) = exceeds(from, to, limits.p99_ratio_max, LATENCY_RISE_US_MIN)?;
    Some(format!("{name} rose from {} to {}, above {:.1} × its baseline", time(from), time(to), limits.p99_ratio_max))
}

fn worse_throughput(before: &Measurements, after: &Measurements, limits: &Handover) -> Option<String> {
    let least = before.requests_per_s * limits.throughput_ratio_min;
    let slower = takes_longer(before, after);
    let worse = after.requests_per_s < least && slower && expected_requests(before, after) >= EXPECTED_REQUESTS_MIN;
    worse.then(|| {
        format!(
            "throughput fell from {:.0}/s to {:.0}/s, below {:.2} × its baseline, while requests took longer",
            before.requests_per_s, after.requests_per_s, limits.throughput_ratio_min
        )
    })
}

fn worse_resets(before: &Measurements, after: &Measurements, _: &Handover) -> Option<String> {
    let usual = if before.seconds > 0.0 { before.tcp_resets as f64 / before.seconds * after.seconds } else { 0.0 };
    // Twice what is usual leaves room for the scatter of a small number.
    let worse = after.tcp_resets as f64 >= 2.0 * usual + RESETS_MORE_MIN;
    worse.then(|| format!("{} TCP resets in {:.1} s, {usual:.1} would be usual", after.tcp_resets, after.seconds))
}

fn worse_cpu(before: &Measurements, after: &Measurements, limits: &Handover) -> Option<String> {
    let enough = before.requests.min(after.requests) >= P50_REQUESTS_MIN
        && after.requests_per_s >= before.requests_per_s * COMPARABLE_RATE_MIN;
    let per_request = |m: &Measurements| (enough && m.requests_per_s > 0.0).then(|| m.usage.cpu / m.requests_per_s);
    let rise_min = CPU_RISE_PCT_MIN / before.requests_per_s.max(f64::MIN_POSITIVE);
    let (from, to) = exceeds(per_request(before), per_request(after), limits.cpu_ratio_max, rise_min)?;
    // Percent of a core per request and second: 1 % is 10 ms of CPU.
    let cpu_time = |pct: f64| time(pct * 10_000.0);
    Some(format!(
        "CPU per request rose from {} to {}, above {:.1} × its baseline",
        cpu_time(from),
        cpu_time(to),
        limits.cpu_ratio_max
    ))
}

fn worse_memory_latency(before: &Measurements, after: &Measurements, limits: &Handover) -> Option<String> {
    let ratio = limits.memory_latency_ratio_max;
    let (from, to) = exceeds(before.memory_latency_ns, after.memory_latency_ns, ratio, MEMORY_LATENCY_RISE_NS_MIN)?;
    Some(format!("memory latency rose from {from:.0} ns to {to:.0} ns, above {ratio:.1} × its baseline"))
}

/// `85 µs`, `0.4 ms`, `36 ms`, `1.2 s`
fn time(us: f64) -> String {
    match us {
        ..100.0 => format!("{us:.0} µs"),
        ..10_000.0 => format!("{:.1} ms", us / 1e3),
        ..1e6 => format!("{:.0} ms", us / 1e3),
        _ => format!("{:.1} s", us / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use warmswap_model::PerResource;

    fn usual() -> Measurements {
        Measurements {
            seconds: 5.0,
            requests: 5000,
            p50_us: Some(120.0),
            p99_us: Some(400.0),
            requests_per_s: 1000.0,
            tcp_resets: 0,
            usage: PerResource { cpu: 20.0, ..PerResource::default() },
            memory_latency_ns: Some(90.0),
        }
    }

    fn reason(after: &Measurements) -> Option<String> {
        match judge(&usual(), after, &Handover::default()) {
            Judgement::Ok => None,
            Judgement::Worse { reason } => Some(reason),
        }
    }

    #[test]
    fn each_kind_of_worse_is_said_in_words() {
        let silent = Measurements { requests: 0, requests_per_s: 0.0, p50_us: None, p99_us: None, ..usual() };
        let cases = [
            (
                Measurements { p99_us: Some(3600.0), ..usual() },
                "p99 rose from 0.4 ms to 3.6 ms, above 2.0 × its baseline",
            ),
            (
                Measurements { requests: 100, p50_us: Some(2000.0), ..usual() },
                "p50 rose from 0.1 ms to 2.0 ms, above 2.0 × its baseline",
            ),
            (
                Measurements { requests_per_s: 300.0, p50_us: Some(180.0), ..usual() },
                "throughput fell from 1000/s to 300/s, below 0.50 × its baseline, while requests took longer",
            ),
            (
                Measurements { usage: PerResource { network: 0.1, ..usual().usage }, ..silent },
                "no request was answered in 5.0 s, 1000/s were before",
            ),
            (Measurements { tcp_resets: 3, ..usual() }, "3 TCP resets in 5.0 s, 0.0 would be usual"),
            (
                Measurements { usage: PerResource { cpu: 50.0, ..PerResource::default() }, ..usual() },
                "CPU per request rose from 0.2 ms to 0.5 ms, above 2.0 × its baseline",
            ),
            (
                Measurements { memory_latency_ns: Some(200.0), ..usual() },
                "memory latency rose from 90 ns to 200 ns, above 2.0 × its baseline",
            ),
        ];
        for (after, words) in cases {
            assert_eq!(reason(&after).as_deref(), Some(words));
        }
    }

    #[test]
    fn what_nobody_could_notice_or_nobody_did_does_not_roll_back() {
        for fine in [
            usual(),
            // More than twice its baseline, but by less than half a millisecond.
            Measurements { p99_us: Some(890.0), ..usual() },
            Measurements { requests: 300, p99_us: Some(5000.0), ..usual() },
            Measurements { requests_per_s: 300.0, p50_us: Some(110.0), ..usual() },
            Measurements { seconds: 0.01, requests: 0, requests_per_s: 0.0, p50_us: None, p99_us: None, ..usual() },
            Measurements { tcp_resets: 2, ..usual() },
            // Nobody asks any more.
            Measurements { requests: 0, requests_per_s: 0.0, p50_us: None, p99_us: None, ..usual() },
            Measurements { p50_us: None, p99_us: None, memory_latency_ns: None, ..usual() },
            Measurements { p99_us: Some(f64::NAN), ..usual() },
        ] {
            assert_eq!(reason(&fine), None, "{fine:?}");
        }
        // A handover from an idle service has nothing to compare with.
        assert_eq!(judge(&Measurements::default(), &usual(), &Handover::default()), Judgement::Ok);
    }

    #[test]
    fn verify_lasts_as_long_as_needed_and_no_longer() {
        let limits = Handover::default();
        let after = |seconds, requests| Measurements { seconds, requests, ..usual() };
        assert_eq!(enough(&usual(), &after(1.9, 5000), &limits), Progress::Continue);
        assert_eq!(enough(&usual(), &after(2.0, 199), &limits), Progress::Continue);
        assert_eq!(enough(&usual(), &after(2.0, 200), &limits), Progress::Enough);
        assert_eq!(enough(&usual(), &after(20.0, 0), &limits), Progress::Enough);
        // Clients that wait for answers send less: what does not come for that is evidence too, once a median is known.
        let overloaded = |requests| Measurements { p50_us: Some(700_000.0), p99_us: None, ..after(2.0, requests) };
        assert_eq!(enough(&usual(), &overloaded(19), &limits), Progress::Continue);
        assert_eq!(enough(&usual(), &overloaded(20), &limits), Progress::Enough);
        assert_eq!(
            reason(&overloaded(20)).as_deref(),
            Some("p50 rose from 0.1 ms to 700 ms, above 2.0 × its baseline")
        );
        let idle = Measurements { requests: 5, requests_per_s: 0.5, ..usual() };
        assert_eq!(enough(&idle, &after(1.9, 0), &limits), Progress::Continue);
        assert_eq!(enough(&idle, &after(2.0, 0), &limits), Progress::Enough, "nothing would come to compare");
        let slow =
            |seconds, requests| Measurements { p50_us: Some(3000.0), p99_us: Some(9000.0), ..after(seconds, requests) };
        assert_eq!(enough(&usual(), &slow(0.6, 600), &limits), Progress::ClearlyWorse);
        assert_eq!(enough(&usual(), &slow(0.6, 400), &limits), Progress::Continue, "too few");
        assert_eq!(enough(&usual(), &slow(0.3, 600), &limits), Progress::Continue, "too early");
        let tail = Measurements { p50_us: Some(130.0), ..slow(0.6, 600) };
        assert_eq!(enough(&usual(), &tail, &limits), Progress::Continue, "only the tail");
    }

    proptest! {
        #[test]
        fn a_generation_that_is_better_in_everything_is_never_rolled_back(
            p50 in 1.0..1e5_f64, tail in 1.0..50.0_f64, rate in 1.0..1e5_f64, better in 0.1..1.0_f64, resets in 0_u64..9,
        ) {
            let before = Measurements {
                p50_us: Some(p50), p99_us: Some(p50 * tail), requests_per_s: rate, requests: (rate * 5.0) as u64,
                tcp_resets: resets, ..usual()
            };
            let after = Measurements {
                p50_us: Some(p50 * better), p99_us: Some(p50 * tail * better), requests_per_s: rate / better,
                ..before
            };
            prop_assert_eq!(judge(&before, &after, &Handover::default()), Judgement::Ok);
            prop_assert_ne!(enough(&before, &after, &Handover::default()), Progress::ClearlyWorse);
        }

        #[test]
        fn what_ends_verify_early_is_also_judged_worse(
            p50 in 10.0..1e4_f64, factor in 0.5..20.0_f64, seconds in 0.0..3.0_f64, requests in 0_u64..3000,
        ) {
            let before = Measurements { p50_us: Some(p50), p99_us: Some(p50 * 3.0), ..usual() };
            let after = Measurements {
                seconds, requests, p50_us: Some(p50 * factor), p99_us: Some(p50 * 3.0 * factor), ..usual()
            };
            if enough(&before, &after, &Handover::default()) == Progress::ClearlyWorse {
                prop_assert_ne!(judge(&before, &after, &Handover::default()), Judgement::Ok);
            }
        }
    }
}
