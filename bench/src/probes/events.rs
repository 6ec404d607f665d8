//! What an event costs from the kernel to whoever asked for it, and at what rate events are lost.
//!
//! The same event on both sides, changes of a TCP socket's state: here through ring, draining thread and queue to a
//! subscriber that looks at it and drops it, there through `printf` to /dev/null.
//!
//! ```text
//!  producer, on its own CPU:   time in bursts of calls, with somebody looking on and without
//!  consumer, on the others:    CPU time of its whole process until it has caught up
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use nix::time::ClockId;
use serde_json::json;
use warmswap_sensor::{Class, Classes, Sensor, Subscription};

use super::cpus::Place;
use super::jobs::{clock_ns, cpu_of_ns};
use super::ours;
use super::tools::{KEEP_STATES, Output, PRINT_STATES, Tool};
use super::worker::{Task, Took, Worker};
use super::{Ground, reason};
use crate::hogs::Hogs;
use crate::interrupt;
use crate::process;
use crate::progress::Progress;
use crate::rows::{Conditions, Row};
use crate::stats::{median, median_interval, quartiles, ratios};

const COST: &str = "probes.event_cpu_ns";
const BESIDE: &str = "probes.event_cpu_vs_bpftrace";
const TARGET: f64 = 0.15;
const DROPPED: &str = "probes.dropped";
const PEER_DROPPED: &str = "probes.peer_dropped";
const LOSSLESS: &str = "probes.lossless_per_s";

const PROBE: &str = "tcp-state";
/// Of the subscriber; what the agent gives one is for the eyes of a person.
const QUEUE: usize = 1 << 16;

/// At which costs are compared.
const PER_S: u32 = 100_000;
/// How many in a block, and how many rounds of blocks.
const QUICK: (u32, usize) = (10_000, 6);
const WHOLE: (u32, usize) = (30_000, 24);

/// Rates at which it is looked for losses, each twice the one before; the last is as fast as it goes.
const RATES: [Option<u32>; 6] = [Some(100_000), Some(200_000), Some(400_000), Some(800_000), Some(1_600_000), None];
const LOSS_MIN: f64 = 0.01;
const LOSS_TIMES: usize = 3;
const LOSS_S: f64 = 0.3;
/// So many that a reader who is nobody special has to wait.
const HOGS: usize = 8;

const CATCH_UP_TIME_MAX: Duration = Duration::from_secs(10);

pub(super) fn run(ground: &Ground, quick: bool) -> Result<Vec<Row>> {
    let (count, rounds) = if quick { QUICK } else { WHOLE };
    let mut rows = Vec::new();
    rows.extend(costs(ground, Place::Elsewhere, count, rounds)?);
    if quick {
        rows.extend(losses(ground, HOGS, &[None])?);
        return Ok(rows);
    }
    rows.extend(costs(ground, Place::SameCpu, count, rounds)?);
    for hogs in [0, HOGS] {
        rows.extend(losses(ground, hogs, &RATES)?);
    }
    rows.push(lossless(ground)?);
    Ok(rows)
}

/// One block of events.
#[derive(Debug, Clone, Copy)]
struct Block {
    took: Took,
    consumer_ns: f64,
    emitted: u64,
    delivered: u64,
}

impl Block {
    /// Of the producer above what it takes alone, and of the consumer, for each event that was delivered.
    fn cost_ns(&self, alone_ns: f64) -> [f64; 2] {
        let each = |ns: f64| ns / self.delivered.max(1) as f64;
        [each(self.took.cpu_ns - alone_ns), each(self.consumer_ns)]
    }

    fn per_s(&self) -> f64 {
        self.emitted as f64 / (self.took.wall_ns / 1e9)
    }

    const fn lost(&self) -> u64 {
        self.emitted.saturating_sub(self.delivered)
    }
}

fn costs(ground: &Ground, place: Place, count: u32, rounds: usize) -> Result<Vec<Row>> {
    let _placed = ground.cpus.place(place)?;
    let mut conditions = conditions(place);
    conditions.insert("per_s".into(), json!(PER_S));
    let mut progress = Progress::begin(format_args!("what an event costs that is delivered, read on {}", place.name()));
    let task = Task::States { count, per_s: Some(PER_S) };
    let mut worker = ground.worker()?;
    let mut costs: [Vec<[f64; 2]>; 2] = Default::default();
    let mut lost = [0; 2];
    let mut absent = None;
    let mut before = alone(&mut worker, &task)?;
    for round in 0..rounds {
        for place in 0..2 {
            interrupt::check()?;
            let which = (place + round) % 2;
            if which == 1 && absent.is_some() {
                continue;
            }
            let block =
                if which == 0 { ours(ground, &mut worker, &task) } else { theirs(&mut worker, &task, &PRINT_STATES) };
            let block = match block {
                Err(error) if which == 1 && !error.is::<interrupt::Interrupted>() => {
                    absent = Some(reason(&error));
                    continue;
                }
                block => block?,
            };
            let after = alone(&mut worker, &task)?;
            costs[which].push(block.cost_ns(f64::midpoint(before, after)));
            lost[which] += block.lost();
            before = after;
        }
        progress.at(format_args!("{} of {rounds} rounds", round + 1));
    }
    let sums = costs.each_ref().map(|costs| costs.iter().map(|[made, used]| made + used).collect::<Vec<f64>>());
    let note = |which: usize| {
        let part = |of: usize| median(&costs[which].iter().map(|cost| cost[of]).collect::<Vec<_>>()).unwrap_or(0.0);
        format!("producer {:.0}, consumer {:.0} ns, {} lost", part(0), part(1), lost[which])
    };
    let row = |id: &str, values: &[f64], unit| {
        Row::new(id, median(values), unit, values.len(), &conditions)
            .spread(quartiles(values))
            .interval(median_interval(values))
    };
    let mine = row(COST, &sums[0], "ns");
    if let Some(reason) = absent {
        return Ok(vec![mine.note(Some(note(0))), Row::left_out(BESIDE, "×", PRINT_STATES.name, &reason, &conditions)]);
    }
    let ratios = ratios(&sums[0], &sums[1]);
    let both = format!("{}; peer: {}", note(0), note(1));
    let beside = |row: Row| row.beside(PRINT_STATES.name, median(&sums[1]), median(&ratios));
    Ok(vec![beside(mine).note(Some(both)), beside(row(BESIDE, &ratios, "×")).at_most(TARGET)])
}

fn alone(worker: &mut Worker, task: &Task) -> Result<f64> {
    Ok(worker.work(task)?.cpu_ns)
}

/// A subscriber in a thread of its own.
struct Subscriber {
    seen: Arc<AtomicU64>,
    thread: JoinHandle<u64>,
}

impl Subscriber {
    fn start(sensor: &mut Sensor) -> Result<Self> {
        let classes = Classes::NONE.with(Class::Tcp);
        let events = sensor.subscribe(Subscription { classes, everywhere: false, capacity: QUEUE })?;
        let seen = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&seen);
        let thread = std::thread::spawn(move || {
            for event in events.receiver() {
                std::hint::black_box(&event);
                // Relaxed: only the count matters.
                counter.fetch_add(1, Ordering::Relaxed);
            }
            events.lost()
        });
        Ok(Self { seen, thread })
    }

    fn seen(&self) -> u64 {
        self.seen.load(Ordering::Relaxed)
    }

    /// How many events found the queue full. The sensor is gone already.
    fn end(self) -> Result<u64> {
        self.thread.join().map_err(|_| anyhow!("the subscriber panicked"))
    }
}

fn ours(ground: &Ground, worker: &mut Worker, task: &Task) -> Result<Block> {
    let mut sensor = ours::attach_only(PROBE, ground)?;
    let subscriber = Subscriber::start(&mut sensor)?;
    let before = clock_ns(ClockId::CLOCK_PROCESS_CPUTIME_ID)?;
    let took = worker.work(task)?;
    sensor.flush()?;
    let totals = sensor.accounting().of(Class::Tcp);
    let caught_up = process::within(CATCH_UP_TIME_MAX, || (subscriber.seen() >= totals.consumed).then_some(()));
    let consumer_ns = clock_ns(ClockId::CLOCK_PROCESS_CPUTIME_ID)? - before;
    let delivered = subscriber.seen();
    drop(sensor);
    let full = subscriber.end()?;
    ensure!(caught_up.is_some(), "the subscriber has seen {delivered} of {} events", totals.consumed);
    ensure!(
        totals.emitted == totals.consumed + totals.discarded + totals.dropped && full <= totals.discarded,
        "events are not accounted for: {totals:?}, queue full {full} times"
    );
    ensure!(totals.emitted >= u64::from(events(task)), "the probe saw {} events of {}", totals.emitted, events(task));
    Ok(Block { took, consumer_ns, emitted: totals.emitted, delivered })
}

fn theirs(worker: &mut Worker, task: &Task, tool: &Tool) -> Result<Block> {
    let attached = tool.attach()?;
    let before = cpu_of_ns(attached.pid())?;
    let took = worker.work(task)?;
    // It has caught up when it does nothing any more.
    let mut last = cpu_of_ns(attached.pid())?;
    loop {
        std::thread::sleep(Duration::from_millis(30));
        let now = cpu_of_ns(attached.pid())?;
        if now - last < 1e5 {
            break;
        }
        last = now;
    }
    let consumer_ns = last - before;
    let said = attached.end()?;
    let emitted = u64::from(events(task));
    // What it says of itself where nobody reads what it prints.
    let delivered = match tool.output {
        Output::Kept => said.printed().min(emitted),
        Output::Nowhere => emitted.saturating_sub(said.lost()),
    };
    Ok(Block { took, consumer_ns, emitted, delivered })
}

const fn events(task: &Task) -> u32 {
    match task {
        Task::States { count, .. } => *count,
        _ => 0,
    }
}

/// The lowest rate at which bpftrace loses more than one event in a hundred, and ours at the rate that this came to: every
/// event holds up its maker, so that is less than what was asked for. Where it loses nothing, the highest rate it allows.
///
/// Hogs are where the reader is.
fn losses(ground: &Ground, hogs: usize, rates: &[Option<u32>]) -> Result<Vec<Row>> {
    let _placed = ground.keep_off()?;
    let _neighbours = Hogs::start(hogs)?;
    let mut progress = Progress::begin(format_args!("how many events are lost, with {hogs} hogs beside the reader"));
    let mut worker = ground.worker()?;
    let mut found = None;
    let mut absent = None;
    for rate in rates {
        interrupt::check()?;
        match theirs(&mut worker, &at(*rate), &KEEP_STATES) {
            Err(error) => absent = Some(reason(&error)),
            Ok(block) => {
                progress.at(format_args!("{} of {} lost", block.lost(), block.emitted));
                found = Some((*rate, block));
                if block.lost() as f64 <= LOSS_MIN * block.emitted as f64 {
                    continue;
                }
            }
        }
        break;
    }
    let (asked, attained) = found.map_or((RATES[0], RATES[0]), |(rate, block)| (rate, Some(block.per_s() as u32)));
    let mut blocks: [Vec<Block>; 2] = Default::default();
    for _ in 0..LOSS_TIMES {
        interrupt::check()?;
        blocks[0].push(ours(ground, &mut worker, &at(attained))?);
        if absent.is_none() {
            blocks[1].push(theirs(&mut worker, &at(asked), &KEEP_STATES)?);
        }
    }
    let mut conditions = conditions(Place::Elsewhere);
    conditions.insert("hogs".into(), json!(hogs));
    let row = |id: &str, blocks: &[Block]| {
        let sum = |of: fn(&Block) -> u64| blocks.iter().map(of).sum::<u64>();
        let (lost, emitted) = (sum(Block::lost), sum(|block| block.emitted));
        let per_s = median(&blocks.iter().map(Block::per_s).collect::<Vec<_>>()).unwrap_or(0.0);
        let share = 100.0 * lost as f64 / emitted as f64;
        let note = format!("{share:.1} % of {emitted} events; {per_s:.0} a second");
        Row::new(id, Some(lost as f64), "", emitted as usize, &conditions).note(Some(note))
    };
    let mine = row(DROPPED, &blocks[0]).at_most(0.0);
    Ok(match absent {
        Some(reason) => vec![mine, Row::left_out(PEER_DROPPED, "", KEEP_STATES.name, &reason, &conditions)],
        None => {
            let theirs = row(PEER_DROPPED, &blocks[1]);
            vec![mine.beside(KEEP_STATES.name, theirs.value, None), theirs]
        }
    })
}

/// The highest of the rates at which nothing of ours is lost.
fn lossless(ground: &Ground) -> Result<Row> {
    let _placed = ground.cpus.place(Place::Elsewhere)?;
    let mut progress = Progress::begin("up to what rate nothing is lost");
    let mut worker = ground.worker()?;
    let (mut best, mut then, mut runs) = (0.0, String::new(), 0);
    for rate in RATES {
        interrupt::check()?;
        let block = ours(ground, &mut worker, &at(rate))?;
        runs += 1;
        progress.at(format_args!("{} of {} lost", block.lost(), block.emitted));
        if block.lost() > 0 {
            then = format!("at {:.0} a second {} of {} are lost", block.per_s(), block.lost(), block.emitted);
            break;
        }
        best = block.per_s();
    }
    Ok(Row::new(LOSSLESS, Some(best), "1/s", runs, &conditions(Place::Elsewhere)).note(Some(then)))
}

fn conditions(place: Place) -> Conditions {
    let mut conditions = Conditions::new();
    conditions.insert("event".into(), json!("tcp state"));
    conditions.insert("reader".into(), json!(place.name()));
    conditions
}

fn at(per_s: Option<u32>) -> Task {
    let count = (f64::from(per_s.unwrap_or(1_000_000)) * LOSS_S) as u32;
    Task::States { count, per_s }
}
