//! By how much work is slower that is watched by all probes.
//!
//! ```text
//!  cycle:  off │ attach │ on │ on │ detach │ off      on over off, by CPU time; drift that is linear cancels
//! ```
//!
//! One CPU does the work and nothing else, so CPU time is what the work costs whatever else the host does; client and server
//! share it, so what the kernel does between them is in it too. A short piece of work after each change is not counted; and where
//! probes do less after a while, the work goes on until then. Windows are taken every second, as the agent takes them.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use warmswap_model::FeatureWindow;

use super::floor::{self, Floor};
use super::jobs::{PIECE_BYTES, PIECES};
use super::ours::{self, Watching};
use super::tools::{Attached, COUNT_BY_CGROUP, EXECSNOOP, OPENSNOOP, Tool};
use super::worker::{Task, Took, Worker};
use super::{Ground, reason};
use crate::interrupt;
use crate::process;
use crate::progress::Progress;
use crate::rows::{Conditions, Row};
use crate::stats::{median, median_interval, quartiles};

const TARGET: f64 = 1.01;
const WARM_UP_SHARE: f64 = 0.1;
/// Its client takes some milliseconds to begin, which are no requests, and its CPU time comes in whole ticks of the kernel (4 ms of
/// each block here): fewer and longer blocks.
const REDIS_BLOCKS: f64 = 6.0;
const REDIS_CYCLES: f64 = 1.0 / 3.0;
const PIPELINED_MAX: u64 = 16;

/// How many cycles with our probes and with a peer or nothing, and how long a block is.
#[derive(Clone, Copy)]
struct Plan {
    ours: usize,
    others: usize,
    block_ns: f64,
}

const QUICK: Plan = Plan { ours: 6, others: 0, block_ns: 50e6 };
const WHOLE: Plan = Plan { ours: 40, others: 12, block_ns: 120e6 };

impl Plan {
    const fn of(quick: bool) -> Self {
        if quick { QUICK } else { WHOLE }
    }
}

/// Work that comes in any amount.
struct Job {
    id: &'static str,
    conditions: Conditions,
    /// So much of it.
    task: Box<dyn Fn(u32) -> Task>,
    /// How much of it a window shows, at least.
    counted: fn(&FeatureWindow) -> u64,
    peer: &'static Tool,
    /// Whether those who look on do less of it after a while: so they are given the while.
    settles: bool,
    /// Programs that do nothing at the hooks that matter here.
    floor: Option<fn() -> Result<Floor>>,
}

pub(super) fn programs(ground: &Ground, quick: bool) -> Result<Vec<Row>> {
    let _placed = ground.keep_off()?;
    let (name, program) = ["busybox", "true"]
        .into_iter()
        .find_map(|name| Some((name, process::find(name)?)))
        .context("neither busybox nor true is there to be started")?;
    let mut conditions = Conditions::new();
    conditions.insert("program".into(), json!(name));
    let job = Job {
        id: "probes.exec_slowdown",
        conditions,
        task: Box::new(move |count| Task::Programs { program: program.clone(), count }),
        counted: |window| window.counts.execs,
        peer: &EXECSNOOP,
        settles: false,
        floor: None,
    };
    measure(ground, &job, None, Plan::of(quick))
}

pub(super) fn files(ground: &Ground, quick: bool) -> Result<Vec<Row>> {
    let _placed = ground.keep_off()?;
    let mut rows = Vec::new();
    let folders = [("tmpfs", PathBuf::from("/dev/shm")), ("disk", ground.folder.clone())];
    for (on, folder) in folders.into_iter().take(if quick { 1 } else { 2 }) {
        let mut conditions = Conditions::new();
        conditions.insert("on".into(), json!(on));
        conditions.insert("pieces".into(), json!(2 * PIECES));
        conditions.insert("bytes".into(), json!(PIECE_BYTES));
        let job = Job {
            id: "probes.file_slowdown",
            conditions,
            task: Box::new(move |rounds| Task::Files { folder: folder.clone(), rounds }),
            counted: |window| window.counts.writes / PIECES as u64,
            peer: &OPENSNOOP,
            settles: false,
            floor: None,
        };
        rows.extend(measure(ground, &job, None, Plan::of(quick))?);
    }
    Ok(rows)
}

/// The server takes part in each job of its own worker.
pub(super) fn redis(ground: &Ground, quick: bool) -> Result<Vec<Row>> {
    let _placed = ground.keep_off()?;
    let plan = Plan::of(quick);
    let cycles = |many: usize| (many as f64 * REDIS_CYCLES).ceil() as usize;
    let plan = Plan { ours: cycles(plan.ours), others: cycles(plan.others), block_ns: REDIS_BLOCKS * plan.block_ns };
    const ID: &str = "probes.redis_slowdown";
    let mut rows = Vec::new();
    let programs = || -> Result<_> {
        let client = crate::peers::installed("redis-benchmark", "redis-tools")?;
        // redis-tools has the server too, under another name; it looks at the one it is called by.
        let server = process::find("redis-server").or_else(|| process::find("redis-check-rdb"));
        Ok((server.context("redis-server is not installed: `apt-get install redis-tools` installs it")?, client))
    };
    let (server, client) = match programs() {
        Ok(programs) => programs,
        Err(error) => return Ok(vec![Row::unmeasured(ID, "×", &reason(&error), &Conditions::new())]),
    };
    for &pipelined in if quick { &[1][..] } else { &[1, PIPELINED_MAX] } {
        let mut worker = ground.worker()?;
        let port = crate::host::free_port()?.port();
        let arguments =
            format!("--port {port} --bind 127.0.0.1 --appendonly no --dir {} --save", ground.folder.display());
        let arguments = arguments.split(' ').map(str::to_owned).chain([String::new()]).collect();
        worker.work(&Task::Serve { program: server.clone(), name: "redis-server".to_owned(), arguments })?;
        let listens = process::within(std::time::Duration::from_secs(5), || {
            std::net::TcpStream::connect(("127.0.0.1", port)).ok()
        });
        listens.context("redis-server does not listen")?;
        let mut conditions = Conditions::new();
        conditions.insert("pipelined".into(), json!(pipelined));
        let program = client.clone();
        let job = Job {
            id: ID,
            conditions,
            task: Box::new(move |requests| {
                // Each of SET and GET.
                let count = (requests.div_ceil(2)).to_string();
                let (port, pipelined) = (port.to_string(), pipelined.to_string());
                let arguments = ["-p", &port, "-q", "-t", "set,get", "-c", "50", "-P", &pipelined, "-n", &count];
                Task::Ask { program: program.clone(), arguments: arguments.map(str::to_owned).into() }
            }),
            // One has some dozens of bytes. Of so many the number of latencies is an estimate: that they are measured is looked at apart.
            counted: |window| (window.counts.rx_bytes / 20).min(window.counts.tx_bytes / 4),
            peer: &COUNT_BY_CGROUP,
            settles: true,
            floor: Some(Floor::at_segments),
        };
        rows.extend(measure(ground, &job, Some(&mut worker), plan)?);
    }
    Ok(rows)
}

/// Somebody who looks on.
trait Onlooker {
    /// Whether he does as much as he will always do.
    fn is_settled(&mut self) -> bool {
        true
    }

    /// Fails when he has seen less than this, as far as he can tell.
    fn has_seen(&mut self, _done: u64) -> Result<()> {
        Ok(())
    }
}

impl Onlooker for Attached {}
impl Onlooker for Floor {}

struct Ours {
    watching: Watching,
    /// Windows that were taken before what is measured.
    before: usize,
    /// `None` when probes are left off: it may see nothing.
    counted: Option<fn(&FeatureWindow) -> u64>,
}

impl Onlooker for Ours {
    /// The first window says how much there is to do, and begins before there is.
    fn is_settled(&mut self) -> bool {
        self.before = self.watching.so_far().len();
        self.before >= 2
    }

    fn has_seen(&mut self, done: u64) -> Result<()> {
        let Some(counted) = self.counted else { return Ok(()) };
        let before = self.before;
        let looks = self.watching.until_the_end()?;
        let of_it = looks.get(before..).unwrap_or_default();
        let counted: u64 = of_it.iter().map(|look| counted(&look.window)).sum();
        // What is added for those that are not measured says nothing of whether any are.
        let measured = |look: Option<&ours::Look>| look.map_or(Duration::ZERO, |look| look.measured);
        let goes_on = measured(looks.last()) > measured(before.checked_sub(1).and_then(|last| looks.get(last)));
        ensure!(before == 0 || goes_on, "warmswap measured no requests");
        ensure!(counted >= done, "warmswap counted {counted} of {done}");
        Ok(())
    }
}

/// Off, on, on, off.
struct Cycle([Took; 4]);

impl Cycle {
    fn ratio(&self, of: fn(&Took) -> f64) -> f64 {
        let [off, on, on_too, off_too] = &self.0;
        (of(on) + of(on_too)) / (of(off) + of(off_too))
    }
}

fn measure(ground: &Ground, job: &Job, worker: Option<&mut Worker>, plan: Plan) -> Result<Vec<Row>> {
    let mut own = None;
    let worker = match worker {
        Some(worker) => worker,
        None => own.insert(ground.worker()?),
    };
    let conditions = job.conditions.iter().map(|(key, value)| format!(" {key}={value}")).collect::<String>();
    let mut progress = Progress::begin(format_args!("{}{conditions}", job.id));
    let count = amount(worker, job, plan.block_ns)?;
    let mut cycles = |who: &str, number, attach: &dyn Fn() -> Result<Box<dyn Onlooker>>| -> Result<Vec<Cycle>> {
        let mut done = Vec::with_capacity(number);
        while done.len() < number {
            done.push(one_cycle(worker, job, count, attach)?);
            progress.at(format_args!("{who}: {} of {number} cycles", done.len()));
        }
        Ok(done)
    };
    let row =
        |id: &str, cycles: &[Cycle]| filled(Row::new(id, None, "×", cycles.len(), &job.conditions), cycles, count);
    let counted = ground.without.is_empty().then_some(job.counted);
    let watch = || -> Result<Box<dyn Onlooker>> {
        Ok(Box::new(Ours { watching: Watching::begin(ours::attach(ground, true)?), before: 0, counted }))
    };
    let ours = row(job.id, &cycles("warmswap", plan.ours, &watch)?).at_most(TARGET);
    if plan.others == 0 {
        return Ok(vec![ours]);
    }
    // Who cannot be had is left out.
    let mut other = |id: &str, who: &'static str, attach: &dyn Fn() -> Result<Box<dyn Onlooker>>| match cycles(
        who,
        plan.others,
        attach,
    ) {
        Ok(theirs) => {
            let row = row(id, &theirs);
            let note = row.note.as_ref().map(|note| format!("{who}; {note}"));
            Ok(row.note(note))
        }
        Err(error) if error.is::<interrupt::Interrupted>() => Err(error),
        Err(error) => Ok(Row::left_out(id, "×", who, &reason(&error), &job.conditions)),
    };
    let peer = other(&format!("{}_peer", job.id), job.peer.name, &|| Ok(Box::new(job.peer.attach()?)))?;
    let mut rows = vec![ours.beside(job.peer.name, peer.value, None), peer];
    if let Some(floor) = job.floor {
        rows.push(other(&format!("{}_floor", job.id), floor::NAME, &|| Ok(Box::new(floor()?)))?);
    }
    Ok(rows)
}

fn filled(row: Row, cycles: &[Cycle], count: u32) -> Row {
    let ratios = |of| cycles.iter().map(|cycle| cycle.ratio(of)).collect::<Vec<f64>>();
    let (by_cpu, by_wall) = (ratios(|took| took.cpu_ns), ratios(|took| took.wall_ns));
    let off = |cycle: &Cycle| f64::midpoint(cycle.0[0].cpu_ns, cycle.0[3].cpu_ns) / f64::from(count);
    let each = median(&cycles.iter().map(off).collect::<Vec<_>>()).unwrap_or(0.0);
    let note = format!("off: {:.1} µs each; by the clock {:.4}", each / 1e3, median(&by_wall).unwrap_or(0.0));
    Row { value: median(&by_cpu), ..row }.spread(quartiles(&by_cpu)).interval(median_interval(&by_cpu)).note(Some(note))
}

/// How much of it fills a block.
fn amount(worker: &mut Worker, job: &Job, block_ns: f64) -> Result<u32> {
    let mut count = 64;
    loop {
        let took = worker.work(&(job.task)(count))?;
        if took.wall_ns > block_ns / 8.0 {
            return Ok((f64::from(count) * block_ns / took.wall_ns).ceil() as u32);
        }
        if count > u32::MAX / 8 {
            bail!("{} takes no time", job.id);
        }
        count *= 4;
    }
}

fn one_cycle(
    worker: &mut Worker,
    job: &Job,
    count: u32,
    attach: impl FnOnce() -> Result<Box<dyn Onlooker>>,
) -> Result<Cycle> {
    interrupt::check()?;
    let warm_up = (job.task)((f64::from(count) * WARM_UP_SHARE).ceil() as u32);
    let task = (job.task)(count);
    worker.work(&warm_up)?;
    let off = worker.work(&task)?;
    let mut onlooker = attach()?;
    worker.work(&warm_up)?;
    while job.settles && !onlooker.is_settled() {
        worker.work(&task)?;
    }
    let (on, on_too) = (worker.work(&task)?, worker.work(&task)?);
    onlooker.has_seen(2 * u64::from(count))?;
    drop(onlooker);
    worker.work(&warm_up)?;
    Ok(Cycle([off, on, on_too, worker.work(&task)?]))
}
