//! Faults at every step of a handover: somebody is killed, stopped or deceived exactly there, and then everything that
//! warmswap promises is looked at.
//!
//! The steps are not listed by anybody. An undisturbed handover says in its report which steps it took (`warmswap history
//! --steps`); each step, each [`Actor`] and each [`Harm`] is one [`Point`]. For a point the agent is told to stop itself before
//! the step; while it stands still the harm is done to whoever it is meant for, and the agent goes on (or does not).
//!
//! ```text
//!  warmswap update --stop-agent-before-step N     agent: ───────────── N stands still ┊ goes on ──▶ verdict
//!                                                 harm:                      ▲ here
//!                                                 clients: ─INCR─INCR─INCR─ … every answer is checked … ─INCR─▶
//! ```
//!
//! Checked at each point: one generation serves; no acknowledged write is lost, none is done twice, and of two keys that are
//! written one after the other neither is ahead of its turn; somebody accepts again within [`OUTAGE_MAX`]; one
//! generation, one shim and one cgroup are left; an ordinary update works afterwards.

mod harm;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::channel::End;
use crate::store::{Settings, Store};
use crate::wait::within;
use harm::Processes;
use watch::Watch;

/// Somebody must accept, and answer, again after this.
pub const OUTAGE_MAX: Duration = Duration::from_secs(2);
/// A generation that stands still after COMMIT is noticed by its watchdog, as it would be on any other day.
const WATCHDOG: &str = "watchdog_s = 0.8";
/// An agent that is to stand still does so for longer than a client may have to wait.
const STANDSTILL: Duration = Duration::from_millis(2500);
/// Until everything is as it should be again. An agent starts anew in this time, too.
const SETTLE_TIME_MAX: Duration = Duration::from_secs(60);
/// Keys that are there from the start and must never change.
const KEYS: usize = 50;
const NAME: &str = "faults";
/// Before the step in the line that the agent logs.
const REQUESTED: &str = " on request: ";
/// So many of the steps with the same words.
const REPEATS_MAX: usize = 2;
/// How often a step that was not reached is tried again: rounds and messages differ a little from handover to handover.
const TRIES: usize = 3;

/// To whom it happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Actor {
    /// The generation that serves when the handover begins.
    Active,
    /// The generation that is to serve.
    Shadow,
    Agent,
}

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Harm {
    /// SIGKILL.
    Kill,
    /// SIGSTOP. An agent is continued after [`STANDSTILL`], a generation never.
    Stop,
    /// Its next words are garbage: random bytes arrive in its name, in the middle of the conversation.
    Corrupt,
}

/// Where a handover goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Path {
    /// To a verdict of *committed*.
    Commit,
    /// Back, because somebody asks for it during VERIFY.
    RollBack,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Point {
    pub path: Path,
    /// From 1.
    pub step: usize,
    pub actor: Actor,
    pub harm: Harm,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} step {}: {:?} {:?}", self.path, self.step, self.harm, self.actor)
    }
}

/// A point that was hit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hit {
    /// What the step was about to be; generations are `old` and `new`.
    pub step: String,
    pub actor: Actor,
    pub harm: Harm,
    pub path: Path,
}

/// What an enumeration found.
#[derive(Debug, Default)]
pub struct Outcome {
    pub hits: BTreeSet<Hit>,
    /// Points whose step was never reached.
    pub missed: Vec<Point>,
    /// What did not hold, in words.
    pub broken: Vec<String>,
    /// Longest time without an answer, over all points, and where that was.
    pub outage_max: (Duration, String),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let steps: BTreeSet<_> = self.hits.iter().map(|hit| (hit.path, &hit.step)).collect();
        writeln!(f, "{} points hit, at {} distinct steps:", self.hits.len(), steps.len())?;
        writeln!(f, "{:>10} {:>6} {:>6} {:>8}", "", "kill", "stop", "corrupt")?;
        for actor in [Actor::Active, Actor::Shadow, Actor::Agent] {
            let count = |harm| self.hits.iter().filter(|hit| hit.actor == actor && hit.harm == harm).count();
            let (kill, stop, corrupt) = (count(Harm::Kill), count(Harm::Stop), count(Harm::Corrupt));
            writeln!(f, "{:>10} {kill:>6} {stop:>6} {corrupt:>8}", format!("{actor:?}").to_lowercase())?;
        }
        let (outage, point) = &self.outage_max;
        writeln!(f, "longest time without an answer: {} ms, at {point}", outage.as_millis())?;
        if !self.missed.is_empty() {
            writeln!(f, "{} points were not reached (their handover took fewer steps)", self.missed.len())?;
        }
        match self.broken.len() {
            0 => write!(
                f,
                "in all of them: one owner, no acknowledged write lost, state never mixed, accepting again, nothing left"
            ),
            count => write!(f, "{count} BROKEN:\n  {}", self.broken.join("\n  ")),
        }
    }
}

/// A service under watch, whose handovers are disturbed one after the other.
#[derive(Debug)]
pub struct Disturbed {
    store: Store,
    watch: Watch,
    /// Steps of an undisturbed handover by path.
    steps: [Vec<String>; 2],
    version: &'static str,
}

impl Disturbed {
    /// Starts the service and learns which steps there are.
    ///
    /// # Errors
    /// When an undisturbed handover does not do what it should.
    pub fn start() -> Result<Self> {
        let handover = "warm_s_max = 20\nsync_s_max = 20\nquiesce_ms_max = 500\nverify_s_min = 0.3\nverify_requests_min = 5\n\
                        p99_ratio_max = 1e6\ncpu_ratio_max = 1e6\nmemory_latency_ratio_max = 1e6\n\
                        throughput_ratio_min = 0\ndrain_s_max = 1\n";
        let store = Store::start_with(NAME, |store| {
            let image = store.image("v1")?;
            store.file("first", &Settings { handover, top: WATCHDOG, ..Settings::new(&image) })
        })?;
        store.write_keys(KEYS)?;
        let watch = Watch::start(store.address())?;
        let mut disturbed = Self { store, watch, steps: [Vec::new(), Vec::new()], version: "v1" };
        for path in [Path::Commit, Path::RollBack] {
            let owner = disturbed.store.owner()?;
            let report = disturbed.begin(path, None)?.report()?;
            let verdict = if path == Path::Commit { "committed" } else { "rolled_back" };
            ensure!(report["verdict"] == verdict, "an undisturbed handover: {report}");
            let steps = report["steps"].as_array().context("a report without steps")?;
            let steps = steps.iter().filter_map(|step| step["what"].as_str());
            disturbed.steps[path as usize] = steps.map(|what| by_role(what, owner)).collect();
        }
        Ok(disturbed)
    }

    /// Every point there is. What is done again and again, such as telling the one generation what clients come and go
    /// at the other, counts [`REPEATS_MAX`] times.
    #[must_use]
    pub fn points(&self) -> Vec<Point> {
        let mut points = Vec::new();
        for path in [Path::Commit, Path::RollBack] {
            let steps = &self.steps[path as usize];
            // Until PROMOTE both are the same handover.
            let fork = steps.iter().zip(&self.steps[0]).take_while(|(a, b)| a == b).count();
            let first = if path == Path::Commit { 1 } else { fork + 1 };
            let started = steps.iter().position(|what| what.starts_with("start")).map_or(1, |at| at + 2);
            let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
            for (step, what) in (1..).zip(steps) {
                let times = seen.entry(what).or_default();
                *times += 1;
                if step < first || *times > REPEATS_MAX {
                    continue;
                }
                for harm in [Harm::Kill, Harm::Stop, Harm::Corrupt] {
                    for actor in [Actor::Active, Actor::Shadow, Actor::Agent] {
                        if actor != Actor::Shadow || step >= started {
                            points.push(Point { path, step, actor, harm });
                        }
                    }
                }
            }
        }
        points
    }

    /// Does what a point says and looks at everything.
    ///
    /// # Errors
    /// When the scenario itself cannot go on. What does not hold is in the outcome.
    pub fn disturb(&mut self, point: Point, outcome: &mut Outcome) -> Result<()> {
        for _ in 0..TRIES {
            let began = Instant::now();
            let Some(step) = self.hand_over_with(point)? else { continue };
            let hit = Hit { step: step.clone(), actor: point.actor, harm: point.harm, path: point.path };
            let said = format!("{point} ({step})");
            let mut broken: Vec<String> = Vec::new();
            if let Err(error) = self.settle() {
                broken.push(format!("{error:#}"));
            }
            let seen = self.watch.since(began);
            if seen.outage > outcome.outage_max.0 {
                outcome.outage_max = (seen.outage, said.clone());
            }
            if seen.outage > OUTAGE_MAX {
                broken.push(format!("nobody answered for {} ms", seen.outage.as_millis()));
            }
            broken.extend(seen.wrong);
            if let Err(error) = self.store.check_keys(KEYS) {
                broken.push(format!("{error:#}"));
            }
            match self.begin(Path::Commit, None).and_then(Running::report) {
                Ok(report) if report["verdict"] == "committed" => {}
                Ok(report) => broken.push(format!("the next update was {}: {}", report["verdict"], report["reason"])),
                Err(error) => broken.push(format!("the next update: {error:#}")),
            }
            outcome.hits.insert(hit);
            outcome.broken.extend(broken.into_iter().map(|what| format!("{said}: {what}")));
            return Ok(());
        }
        outcome.missed.push(point);
        Ok(())
    }

    /// Ends everything and looks for what is left.
    ///
    /// # Errors
    /// When something is.
    pub fn finish(self) -> Result<()> {
        self.watch.stop();
        self.store.finish()
    }

    /// What the agents logged.
    #[must_use]
    pub fn log(&self) -> String {
        self.store.log()
    }

    /// Begins an update to the other version.
    fn begin(&mut self, path: Path, before_step: Option<usize>) -> Result<Running> {
        self.version = if self.version == "v1" { "v2" } else { "v1" };
        let image = self.store.image(self.version)?;
        let mut command = self.store.ground().command()?;
        command.args(["update", NAME, "--json", "--image"]).arg(image);
        if let Some(step) = before_step {
            command.args(["--stop-agent-before-step", &step.to_string()]);
        }
        let mut rollback = self.store.ground().command()?;
        rollback.args(["rollback", NAME]);
        Running::start(command, (path == Path::RollBack).then_some(rollback))
    }

    /// A handover in which the point's harm is done; the step, when it was reached.
    fn hand_over_with(&mut self, point: Point) -> Result<Option<String>> {
        let agent = self.store.agent_pid()?;
        let processes = Processes::find(&self.store)?;
        let log_before = self.store.log().len();
        let mut update = self.begin(point.path, Some(point.step))?;
        let reached = within(SETTLE_TIME_MAX, || {
            if harm::is_stopped(agent) { Some(true) } else { update.has_ended().then_some(false) }
        });
        if reached == Some(false) {
            update.report()?;
            return Ok(None);
        }
        ensure!(reached.is_some(), "{point}: neither reached nor over\n{}", self.store.log());
        let log = self.store.log();
        let line = log.get(log_before..).unwrap_or(&log).lines().rfind(|line| line.contains(REQUESTED));
        let step = line.and_then(|line| line.rsplit_once(REQUESTED)).map(|(_, step)| step.trim());
        let step = by_role(step.context("the agent stopped without saying where")?, processes.owner);
        self.do_harm(point, &processes, agent)?;
        let ended = update.report();
        if point.actor == Actor::Agent && point.harm == Harm::Kill {
            self.store.start_agent()?;
        } else {
            ended?;
        }
        Ok(Some(step))
    }

    fn do_harm(&mut self, point: Point, processes: &Processes, agent: i32) -> Result<()> {
        let shadow = processes.shadow_pids()?;
        let targets = match point.actor {
            Actor::Active => processes.active.clone(),
            Actor::Shadow => shadow.clone(),
            Actor::Agent => vec![agent],
        };
        match (point.actor, point.harm) {
            (Actor::Agent, Harm::Kill) => return self.store.kill_agent(),
            (Actor::Agent, Harm::Stop) => std::thread::sleep(STANDSTILL),
            (Actor::Agent, Harm::Corrupt) => {
                for pid in processes.active.iter().chain(&shadow) {
                    harm::garble(*pid, End::Agent);
                }
            }
            (_, Harm::Corrupt) => targets.iter().for_each(|pid| harm::garble(*pid, End::Service)),
            (_, Harm::Kill) => targets.iter().try_for_each(|pid| harm::signal(*pid, libc::SIGKILL))?,
            (_, Harm::Stop) => targets.iter().try_for_each(|pid| harm::signal(*pid, libc::SIGSTOP))?,
        }
        harm::signal(agent, libc::SIGCONT)
    }

    /// Waits until one generation is left and serves.
    fn settle(&self) -> Result<()> {
        let mut last = String::new();
        let settled = within(SETTLE_TIME_MAX, || {
            let problem = self.unsettled();
            last = problem.clone().unwrap_or_default();
            problem.is_none().then_some(())
        });
        ensure!(settled.is_some(), "not settled after {} s: {last}", SETTLE_TIME_MAX.as_secs());
        Ok(())
    }

    fn unsettled(&self) -> Option<String> {
        let status = match self.store.status() {
            Ok(status) => status,
            Err(error) => return Some(format!("{error:#}")),
        };
        let generations = status["generations"].as_array().map_or(0, Vec::len);
        if !status["activity"].is_null() || generations != 1 || status["owner"].is_null() {
            return Some(status.to_string());
        }
        let answering = match self.watch.who_answers() {
            Ok(answering) => answering,
            Err(error) => return Some(format!("{error:#}")),
        };
        if answering.len() != 1 || answering.first().copied() != status["owner"].as_u64() {
            return Some(format!("{answering:?} answer, the owner is {}", status["owner"]));
        }
        let groups = Processes::find(&self.store).and_then(|found| found.cgroups().map(|groups| groups.count()));
        let left = (self.store.shims().map_or(0, |shims| shims.len()), groups.unwrap_or_default());
        (left != (1, 1)).then(|| format!("{left:?} shims and cgroups are left of {status}"))
    }
}

/// `tell g7 Own` as `tell new Own`, so that the same step of another handover is the same.
fn by_role(what: &str, owner: u32) -> String {
    let words =
        what.split(' ').map(|word| match word.strip_prefix('g').and_then(|number| number.parse::<u32>().ok()) {
            Some(number) if number == owner => "old",
            Some(_) => "new",
            None => word,
        });
    words.collect::<Vec<_>>().join(" ")
}

/// A handover under way.
struct Running {
    update: Child,
    lines: JoinHandle<Option<Value>>,
}

impl Running {
    /// With `rollback` that command runs as soon as VERIFY begins.
    fn start(mut command: Command, rollback: Option<Command>) -> Result<Self> {
        let mut update = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().context("cannot run warmswap")?;
        let stdout = update.stdout.take().context("no standard output")?;
        let lines = std::thread::spawn(move || follow(stdout, rollback));
        Ok(Self { update, lines })
    }

    fn has_ended(&mut self) -> bool {
        self.update.try_wait().is_ok_and(|ended| ended.is_some())
    }

    /// Waits for the end.
    fn report(mut self) -> Result<Value> {
        self.update.wait()?;
        let report = self.lines.join().ok().flatten();
        report.context("`warmswap update` ended without a report")
    }
}

/// Reads what an update says; the report, when there is one.
fn follow(stdout: ChildStdout, mut rollback: Option<Command>) -> Option<Value> {
    let mut report = None;
    let mut asked = None;
    for line in serde_json::Deserializer::from_reader(stdout).into_iter::<Value>().map_while(Result::ok) {
        let progress = &line["progress"];
        if progress["progress"] == "phase_begun" && progress["phase"] == "verify" {
            let command = rollback.take();
            // It ends when the handover does; that it is refused is what the report says anyway.
            asked = command.and_then(|mut it| it.stdout(Stdio::null()).stderr(Stdio::null()).spawn().ok());
        }
        if let Some(found) = line.get("report") {
            report = Some(found.clone());
        }
    }
    if let Some(mut asked) = asked {
        let _ = asked.wait();
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_compared_by_role() {
        assert_eq!(by_role("tell g7 Own", 7), "tell old Own");
        assert_eq!(by_role("hear Owned from g8", 7), "hear Owned from new");
        assert_eq!(by_role("journal: begin", 7), "journal: begin");
    }
}
