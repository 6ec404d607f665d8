//! The same clients beside what people do today: each contestant is replaced in turn, and watched alone for some seconds.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use serde_json::json;
use warmswap_load::{LoadResult, RunningLoad, monotonic_ns};

use super::group::Cell;
use super::plan::Plan;
use super::results::{self, FAILED, LOST, RESETS, connections_lost};
use super::subject::{Subject, load, show_faults};
use crate::gaps::{self, Span};
use crate::host::{Host, PROGRAM, Timed};
use crate::interrupt;
use crate::peers::{self, Absent, Ground, Peer, Workload};
use crate::progress::Progress;
use crate::rows::{Conditions, Row};
use crate::stats::{median, paired_ratio, quartiles};
use crate::suite::Outcome;

const STATE_MIB: u64 = 1;
const CONNECTIONS: usize = 100;
/// After the command that replaces has ended, clients may still be without an answer.
const SETTLE: Duration = Duration::from_millis(300);

const WARMSWAP: &str = "warmswap";
const GAP: &str = "handover.peak_gap_us";
const P99: &str = "handover.p99_after_ratio";

/// What clients of one contestant saw.
struct Seen {
    name: String,
    /// When it was replaced.
    busy: Vec<Span>,
    load: LoadResult,
}

pub(super) fn run(host: &Host, programs: &Path, plan: &Plan) -> Result<Outcome> {
    let mut progress = Progress::begin("beside restarts with the same program");
    let ground = Ground::new(&host.state_dir)?;
    let workload = Workload {
        ground: &ground,
        image: host.image(0),
        program_inside: PathBuf::from("/bin").join(PROGRAM),
        program: programs.join("session-store-v1"),
    };
    let (peers, mut absent) = peers::start(&workload);
    let mut subject = Subject::start(host, "bench-beside", STATE_MIB)?;
    let mut contestants = vec![Contestant::new(WARMSWAP, load(subject.address, CONNECTIONS)?, None)];
    for peer in peers {
        let name = peer.name().to_owned();
        contestants.push(Contestant::new(&name, load(peer.address(), CONNECTIONS)?, Some(peer)));
    }
    let mut handovers = Vec::new();
    interrupt::sleep(plan.watch)?;
    for round in 0..plan.restarts {
        let mut going_on = Vec::with_capacity(contestants.len());
        for mut contestant in contestants {
            let start_ns = monotonic_ns();
            let replaced = match &mut contestant.peer {
                None => subject.update(host).map(|timed| handovers.push(timed)),
                Some(peer) => peer.replace(),
            };
            let busy = Span { start_ns, end_ns: monotonic_ns() };
            match replaced {
                Ok(()) => {
                    contestant.busy.push(busy);
                    going_on.push(contestant);
                }
                Err(error) if contestant.peer.is_none() => return Err(error),
                Err(error) => absent.push(Absent::new(&contestant.name, &error)),
            }
            interrupt::sleep(plan.watch.max(SETTLE))?;
        }
        contestants = going_on;
        progress.at(format_args!("round {} of {}", round + 1, plan.restarts));
    }
    let seen = contestants.into_iter().map(Contestant::end).collect::<Result<Vec<_>>>()?;
    host.ask(&["stop", &subject.name], false)?;
    Ok(outcome(seen, handovers, &absent, plan))
}

/// Who is replaced in turn: warmswap, or a peer.
struct Contestant {
    name: String,
    load: RunningLoad,
    /// `None` for warmswap.
    peer: Option<Box<dyn Peer>>,
    busy: Vec<Span>,
}

impl Contestant {
    fn new(name: &str, load: RunningLoad, peer: Option<Box<dyn Peer>>) -> Self {
        Self { name: name.to_owned(), load, peer, busy: Vec::new() }
    }

    /// The load ends before what it loads.
    fn end(self) -> Result<Seen> {
        Ok(Seen { name: self.name, busy: self.busy, load: self.load.stop()? })
    }
}

fn outcome(mut seen: Vec<Seen>, handovers: Vec<Timed>, absent: &[Absent], plan: &Plan) -> Outcome {
    let mut conditions = results::conditions(STATE_MIB, CONNECTIONS, 0);
    conditions.insert("watched_s".into(), json!(plan.watch.as_secs_f64()));
    let mut busy: Vec<Span> = seen.iter().flat_map(|contestant| contestant.busy.iter().map(settled)).collect();
    busy.sort_unstable_by_key(|span| span.start_ns);
    let ours = seen.remove(0);
    let mut outcome = Outcome::default();
    for peer in &seen {
        outcome.rows.extend(rows(&ours, peer, &busy, plan.watch, &conditions));
    }
    for peer in absent {
        outcome.rows.push(Row::left_out(GAP, "µs", &peer.name, &peer.reason, &conditions));
    }
    show_faults(WARMSWAP, &ours.load, &handovers);
    let cell = Cell { state_mib: STATE_MIB, handovers, load: Some(ours.load) };
    outcome.violations = results::violations(&[cell]);
    outcome
}

fn rows(ours: &Seen, peer: &Seen, busy: &[Span], watch: Duration, conditions: &Conditions) -> Vec<Row> {
    let n = ours.busy.len();
    let compare = |id: &str, unit, of: &dyn Fn(&Seen) -> Vec<f64>| {
        let (mine, theirs) = (of(ours), of(peer));
        Row::new(id, median(&mine), unit, n, conditions).spread(quartiles(&mine)).beside(
            &peer.name,
            median(&theirs),
            paired_ratio(&mine, &theirs),
        )
    };
    let count = |id: &str, of: &dyn Fn(&LoadResult) -> u64| {
        let (mine, theirs) = (of(&ours.load) as f64, of(&peer.load) as f64);
        let ratio = (theirs > 0.0).then(|| mine / theirs);
        Row::new(id, Some(mine), "", n, conditions).beside(&peer.name, Some(theirs), ratio)
    };
    vec![
        compare(GAP, "µs", &|seen| excesses_us(seen, busy)),
        compare(P99, "", &|seen| seen.busy.iter().filter_map(|span| p99_ratio(&seen.load, *span, watch)).collect()),
        count(FAILED, &|load| load.totals.failed_requests),
        count(LOST, &|load| load.totals.wrong() + load.totals.keys_unverified),
        count(RESETS, &|load| connections_lost(&load.totals)),
    ]
}

fn settled(span: &Span) -> Span {
    Span { end_ns: span.end_ns + SETTLE.as_nanos() as u64, ..*span }
}

/// How much longer than usual the longest gap around each replacement was.
fn excesses_us(seen: &Seen, busy: &[Span]) -> Vec<f64> {
    let longest = |window: Span| seen.load.longest_gap(window.start_ns, window.end_ns).longest_ns;
    let whole = Span { start_ns: seen.load.started_ns, end_ns: seen.load.ended_ns };
    let calm = gaps::calm(whole, busy);
    let excess = |window: Span| {
        longest(window).saturating_sub(gaps::usual_ns(&calm, window.length_ns(), longest).unwrap_or(0)) as f64 / 1e3
    };
    seen.busy.iter().map(settled).map(excess).collect()
}

/// p99 of requests due after a replacement over p99 of those before.
fn p99_ratio(load: &LoadResult, span: Span, watch: Duration) -> Option<f64> {
    let watch = watch.as_nanos() as u64;
    let before = load.window(span.start_ns.saturating_sub(watch), span.start_ns).p99_us?;
    let after = load.window(span.end_ns, span.end_ns + watch).p99_us?;
    Some(after / before)
}
