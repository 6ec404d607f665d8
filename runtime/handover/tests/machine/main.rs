//! Handovers, deaths, faults and restarts in any order, against a model of what must hold: one generation serves, it is the
//! one the model says, every acknowledged write is there, and nothing is left behind.
//!
//! Containers are child processes (the back end `fake`), the supervisor, the SDK and the protocol are the real ones. The
//! seed is fixed, so that every run does the same; `PROPTEST_RNG_SEED` and `PROPTEST_CASES` choose others.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod service;
mod stage;

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestCaseError, TestRunner};
use warmswap_backend::{Backend, Call, ContainerId, ContainerState, FakeBackend};
use warmswap_handover::{Journal, Plan, Supervisor};
use warmswap_model::{
    Generation, HandoverReport, PerResource, Phase, Rung, ServiceFile, ServiceName, Trigger, Verdict,
};

use service::Behaviour;
use stage::{Client, Deed, Director, Orders, Worse, Writer};

/// Set in the processes that are the service.
const IS_SERVICE: &str = "WARMSWAP_TEST_IS_SERVICE";
const THE_SERVICE: &str = "it_is_the_service_when_it_is_started_as_one";
const SETTLE_TIME_MAX: Duration = Duration::from_secs(20);
const CASES: u32 = 40;
const STEPS_MAX: usize = 8;
const SEED: u64 = 20_260_101;

#[derive(Debug, Clone, Copy)]
enum Step {
    Update {
        to: Behaviour,
        orders: Orders,
        fault: Option<(Call, u32)>,
    },
    Rollback,
    KillOwner {
        fault: Option<(Call, u32)>,
    },
    /// The supervisor dies between handovers, and another takes over.
    Restart {
        fault: Option<(Call, u32)>,
    },
    /// Both at once.
    KillOwnerAndRestart,
}

fn any_fault(calls: &'static [Call]) -> impl Strategy<Value = Option<(Call, u32)>> {
    prop_oneof![3 => Just(None), 1 => (prop::sample::select(calls), 1..3_u32).prop_map(Some)]
}

fn any_step() -> impl Strategy<Value = Step> {
    let phases = vec![Phase::Reserve, Phase::Warm, Phase::Sync, Phase::Quiesce, Phase::Verify, Phase::Commit];
    let deeds = vec![Deed::KillOld, Deed::KillNew, Deed::Crash, Deed::Cancel];
    let deed = (prop::sample::select(phases), prop::sample::select(deeds));
    let worse = prop_oneof![5 => Just(None), 4 => Just(Some(Worse::Certain)), 1 => Just(Some(Worse::Late))];
    let orders = (worse, prop_oneof![1 => Just(None), 1 => deed.prop_map(Some)])
        .prop_map(|(worse, deed)| Orders { worse: worse.filter(|_| deed.is_none()), deed });
    let behaviour = prop_oneof![
        8 => Just(Behaviour::Good),
        2 => Just(Behaviour::Slow),
        1 => Just(Behaviour::NeverReady),
        1 => Just(Behaviour::DiesJoining),
        1 => Just(Behaviour::DiesOwning),
        1 => Just(Behaviour::DiesServing),
    ];
    let in_update = &[
        Call::PrepareImage,
        Call::Create,
        Call::Start,
        Call::State,
        Call::Wait,
        Call::Signal,
        Call::SetLimits,
        Call::Destroy,
        Call::KeepFd,
        Call::DropKeptFd,
    ];
    let in_revival = &[Call::PrepareImage, Call::Create, Call::Start, Call::State, Call::SetLimits, Call::Destroy];
    let in_recovery = &[Call::List, Call::KeptFds, Call::OpenService, Call::KeepFd, Call::State, Call::Destroy];
    prop_oneof![
        8 => (behaviour, orders, any_fault(in_update)).prop_map(|(to, orders, fault)| {
            // Nothing could be made of a service whose only image dies as soon as it serves.
            let kept = matches!(orders.deed, Some((_, Deed::Crash))) && to == Behaviour::DiesServing;
            Step::Update { to: if kept { Behaviour::Good } else { to }, orders, fault }
        }),
        1 => Just(Step::Rollback),
        1 => any_fault(in_revival).prop_map(|fault| Step::KillOwner { fault }),
        2 => any_fault(in_recovery).prop_map(|fault| Step::Restart { fault }),
        1 => Just(Step::KillOwnerAndRestart),
    ]
}

/// What the model knows of the service.
#[derive(Debug, Clone, PartialEq)]
struct Model {
    owner: Generation,
    image: Behaviour,
    previous: Option<Behaviour>,
    next: Generation,
}

/// How an update may end.
fn expected(model: &Model, to: Behaviour, orders: &Orders, fault: Option<(Call, u32)>) -> BTreeSet<&'static str> {
    let (committed, rolled_back, aborted) = ("committed", "rolled back", "aborted");
    let before = |phase: Phase| orders.deed.filter(|(at, _)| *at <= phase);
    if matches!(to, Behaviour::NeverReady | Behaviour::DiesJoining) {
        return [aborted].into();
    }
    if matches!(fault, Some((Call::PrepareImage | Call::Create | Call::Start, _))) {
        return [aborted].into();
    }
    match before(Phase::Sync) {
        // Nobody is there to be killed yet, or it is not said yet who.
        Some((Phase::Reserve, Deed::KillOld) | (Phase::Reserve | Phase::Warm, Deed::KillNew)) => {}
        // The shadow takes over, when it can: one that dies as it does leaves nobody to go back to.
        Some((_, Deed::KillOld)) => return [aborted, rolled_back, committed].into(),
        Some(_) => return [aborted].into(),
        None => {}
    }
    // Whether it died before or after it was told is a matter of microseconds.
    match orders.deed {
        Some((Phase::Quiesce, Deed::KillOld)) => return [aborted, rolled_back, committed].into(),
        Some((Phase::Quiesce, Deed::KillNew)) => return [aborted, rolled_back].into(),
        _ => {}
    }
    if model.image == Behaviour::Slow {
        return [aborted].into();
    }
    if fault.is_some() {
        return [aborted, rolled_back, committed].into();
    }
    if matches!(to, Behaviour::DiesOwning | Behaviour::DiesServing) {
        return [rolled_back].into();
    }
    match orders.deed {
        Some((Phase::Verify, Deed::KillNew | Deed::Cancel)) => [rolled_back].into(),
        // Asked for in QUIESCE: the next phase that looks is VERIFY.
        Some((Phase::Quiesce, Deed::Cancel)) => [rolled_back].into(),
        _ if orders.worse.is_some() => [rolled_back].into(),
        _ => [committed].into(),
    }
}

struct System {
    backend: FakeBackend,
    director: Arc<Director>,
    supervisor: Option<Supervisor>,
    images: Arc<HashMap<Behaviour, PathBuf>>,
    journal: PathBuf,
    address: SocketAddr,
    writer: Writer,
    model: Model,
    handovers: u64,
    /// Without segments of state, whose number changes.
    descriptors: usize,
    _folder: tempfile::TempDir,
}

type Outcome = Result<(), TestCaseError>;

macro_rules! ensure {
    ($condition:expr, $($format:tt)+) => {
        if !$condition {
            return Err(TestCaseError::fail(format!($($format)+)));
        }
    };
}

impl System {
    fn start(images: Arc<HashMap<Behaviour, PathBuf>>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let text = format!(
            "name = \"machine\"\nimage = {:?}\ncommand = [\"/bin/service\", \"--exact\", \"{THE_SERVICE}\", \"--nocapture\"]\n\
             [env]\n{IS_SERVICE} = \"1\"\n[listen.lines]\naddress = \"{free}\"\n\
             [handover]\nwarm_s_max = 2\nsync_s_max = 5\nquiesce_ms_max = 500\nverify_s_min = 0.1\ndrain_s_max = 5\n",
            images[&Behaviour::Good]
        );
        let file = ServiceFile::parse("machine.toml", &text).unwrap();
        let backend = FakeBackend::new(&folder.path().join("fake"));
        let director = Arc::new(Director::new(backend.clone()));
        let journal = folder.path().join("machine.jsonl");
        let supervisor =
            Supervisor::start(Arc::new(backend.clone()), director.clone(), file, folder.path().to_owned(), &journal)
                .unwrap_or_else(|error| panic!("{}", warmswap_model::with_causes(&error)));
        let address = address_of(&supervisor);
        let model = Model { owner: Generation(1), image: Behaviour::Good, previous: None, next: Generation(2) };
        let writer = Writer::start(address);
        let mut system = Self {
            backend,
            director,
            supervisor: Some(supervisor),
            images,
            journal,
            address,
            writer,
            model,
            handovers: 0,
            descriptors: 0,
            _folder: folder,
        };
        assert!(system.writer.goes_on(), "the service says: {}", system.said(Generation(1)));
        system.descriptors = system.count_descriptors().0;
        system
    }

    /// What a generation printed.
    fn said(&self, generation: Generation) -> String {
        fs::read_to_string(self.backend.log_path(&container(generation))).unwrap_or_default()
    }

    /// Everything but segments, and segments. The clients' sockets are the writer's one, which is there all the time.
    fn count_descriptors(&mut self) -> (usize, usize) {
        let entries = fs::read_dir("/proc/self/fd").unwrap().flatten();
        let links: Vec<PathBuf> = entries.filter_map(|entry| fs::read_link(entry.path()).ok()).collect();
        let segments = links.iter().filter(|link| link.to_string_lossy().contains("warmswap-segment")).count();
        (links.len() - segments, segments)
    }

    fn supervisor(&mut self) -> &mut Supervisor {
        self.supervisor.as_mut().unwrap()
    }

    fn step(&mut self, step: &Step) -> Outcome {
        let broken = self.writer.broken();
        let may_break = match step {
            Step::Update { to, orders, fault } => self.update(*to, *orders, *fault)?,
            Step::Rollback => match self.model.previous {
                Some(previous) => self.update(previous, Orders::default(), None)?,
                None => false,
            },
            Step::KillOwner { fault } => {
                self.order_fault(*fault);
                self.kill_owner();
                self.expect_revival();
                true
            }
            Step::Restart { fault } => {
                self.supervisor = None;
                self.recover(*fault)?;
                false
            }
            Step::KillOwnerAndRestart => {
                self.supervisor = None;
                self.kill_owner();
                self.recover(None)?;
                self.expect_revival();
                true
            }
        };
        self.settle()?;
        self.check()?;
        let broken = self.writer.broken() - broken;
        ensure!(may_break || broken == 0, "connections broke {broken} times though nobody died");
        Ok(())
    }

    fn order_fault(&self, fault: Option<(Call, u32)>) {
        if let Some((call, times)) = fault {
            self.backend.fail(call, times);
        }
    }

    fn kill_owner(&mut self) {
        let id = container(self.model.owner);
        stage::kill(&self.backend, &id);
    }

    /// Another generation of the same image is going to serve; which number it gets depends on how often it has to be tried.
    fn expect_revival(&mut self) {
        self.model.owner = Generation(0);
    }

    /// Whether connections may break.
    fn update(&mut self, to: Behaviour, orders: Orders, fault: Option<(Call, u32)>) -> Result<bool, TestCaseError> {
        self.handovers += 1;
        let plan = Plan {
            handover: self.handovers,
            trigger: Trigger::Request,
            image: stage::image_ref(&self.images, to),
            file: None,
            forecast: None,
            reservation: PerResource::default(),
            shadow_cpus: None,
            stop_before_step: None,
        };
        self.director.order(orders);
        self.order_fault(fault);
        let expected = expected(&self.model, to, &orders, fault);
        let from = self.model.owner;
        let mut supervisor = self.supervisor.take().unwrap();
        let ran = catch_unwind(AssertUnwindSafe(|| (supervisor.update(&plan), supervisor)));
        self.director.order(Orders::default());
        match ran {
            Ok((report, supervisor)) => {
                self.supervisor = Some(supervisor);
                self.judge_report(&report, from, to, &expected)?;
                Ok(!matches!(orders.deed, None | Some((_, Deed::Cancel)))
                    || fault.is_some()
                    || matches!(to, Behaviour::DiesOwning | Behaviour::DiesServing))
            }
            Err(_) => {
                let Some((phase, Deed::Crash)) = orders.deed else {
                    return Err(TestCaseError::fail("the supervisor panicked"));
                };
                self.recover(None)?;
                let promoted = phase >= Phase::Verify;
                if promoted {
                    self.model.previous = Some(std::mem::replace(&mut self.model.image, to));
                    self.model.owner = self.model.next;
                }
                self.model.next = self.supervisor().record().next_generation;
                Ok(false)
            }
        }
    }

    /// What the report says is possible, agrees with itself, and becomes what the model knows.
    fn judge_report(
        &mut self,
        report: &HandoverReport,
        from: Generation,
        to: Behaviour,
        expected: &BTreeSet<&'static str>,
    ) -> Outcome {
        let verdict = report.verdict.to_string();
        let reason = report.reason.clone().unwrap_or_default();
        println!("   {} to {} {verdict}: {reason}", report.from, report.to);
        ensure!(expected.contains(verdict.as_str()), "{verdict} ({reason}), not one of {expected:?}");
        ensure!(report.from == from && report.to >= self.model.next, "from {} to {}", report.from, report.to);
        ensure!(report.verdict == Verdict::Committed || !reason.is_empty(), "{verdict} without a reason");
        let owner = self.supervisor().owner();
        let promoted = report.blackouts.len();
        match report.verdict {
            Verdict::Committed => {
                ensure!(owner == Some(report.to) || owner.is_none(), "committed, and {owner:?} owns");
                ensure!(report.rung == Rung::Full && promoted == 1, "rung {}, {promoted} blackouts", report.rung);
                ensure!(report.connections.sent == report.connections.received, "{:?}", report.connections);
                self.model.previous = Some(std::mem::replace(&mut self.model.image, to));
                self.model.owner = report.to;
            }
            Verdict::RolledBack | Verdict::Aborted => {
                // Where both are dead, the next look makes another.
                let rightful = owner.is_none_or(|owner| owner == from || !self.is_alive(owner));
                ensure!(rightful, "{verdict}, and {owner:?} owns: {reason}");
                let stopped = report.phases.iter().any(|timing| timing.phase == Phase::Quiesce);
                ensure!(promoted == 0 || stopped, "{promoted} blackouts, and nobody was asked to stop");
            }
        }
        self.model.next = self.supervisor().record().next_generation;
        if !self.is_alive(self.model.owner) {
            self.expect_revival();
        }
        Ok(())
    }

    fn is_alive(&self, generation: Generation) -> bool {
        let found = self.backend.list().unwrap();
        let found = found.into_iter().find(|found| found.spec.id == container(generation));
        found.is_some_and(|found| !matches!(found.state, ContainerState::Exited { .. }))
    }

    /// Until it succeeds: a fault that passes must not cost the service anything.
    fn recover(&mut self, fault: Option<(Call, u32)>) -> Outcome {
        self.order_fault(fault);
        let began = Instant::now();
        loop {
            let backend = Arc::new(self.backend.clone());
            match Supervisor::recover(backend, self.director.clone(), &self.journal) {
                Ok(Some((supervisor, _))) => {
                    self.supervisor = Some(supervisor);
                    return Ok(());
                }
                Ok(None) => return Err(TestCaseError::fail("the journal is gone")),
                Err(error) => {
                    let error = warmswap_model::with_causes(&error);
                    ensure!(fault.is_some(), "not recovered: {error}");
                    ensure!(began.elapsed() < SETTLE_TIME_MAX, "never recovered: {error}");
                }
            }
        }
    }

    /// Until one generation is there and serves, as between handovers.
    fn settle(&mut self) -> Outcome {
        let began = Instant::now();
        loop {
            self.supervisor().tick(Duration::from_millis(5), None);
            let owner = self.supervisor().owner();
            let (members, found) = (self.supervisor().members(), self.backend.list().unwrap_or_default());
            if let (Some(owner), [_], [container]) = (owner, members.as_slice(), found.as_slice())
                && container.spec.id.generation == owner
                && matches!(container.state, ContainerState::Running { .. })
            {
                if self.model.owner == Generation(0) {
                    ensure!(owner >= self.model.next, "{owner} was there before");
                    self.model.owner = owner;
                    self.model.next = self.supervisor().record().next_generation;
                }
                for call in [Call::PrepareImage, Call::Create, Call::Start, Call::State, Call::Wait, Call::Signal] {
                    self.backend.fail(call, 0);
                }
                for call in [Call::SetLimits, Call::Destroy, Call::KeepFd, Call::DropKeptFd, Call::List, Call::KeptFds]
                {
                    self.backend.fail(call, 0);
                }
                self.backend.fail(Call::OpenService, 0);
                return Ok(());
            }
            if began.elapsed() > SETTLE_TIME_MAX {
                let found: Vec<String> = found.iter().map(|c| format!("{} {:?}", c.spec.id, c.state)).collect();
                let trouble = self.supervisor().trouble().map(str::to_owned);
                return Err(TestCaseError::fail(format!(
                    "never at rest: {members:?}, containers {found:?}, {trouble:?}"
                )));
            }
        }
    }

    fn check(&mut self) -> Outcome {
        let model = self.model.clone();
        let image = stage::image_ref(&self.images, model.image);
        let previous = model.previous.map(|previous| stage::image_ref(&self.images, previous));
        let record = self.supervisor().record().clone();
        ensure!(
            self.supervisor().owner() == Some(model.owner),
            "{:?} owns, {} in the model",
            record.owner,
            model.owner
        );
        ensure!(
            record.image == image && record.previous.as_ref().map(|version| &version.image) == previous.as_ref(),
            "{:?}, {:?}",
            record.image,
            record.previous
        );
        let journal = Journal::read(&self.journal).map_err(|error| TestCaseError::fail(error.to_string()))?;
        let journal = journal.ok_or_else(|| TestCaseError::fail("no journal"))?;
        ensure!(journal.open.is_none(), "the journal holds an open handover: {:?}", journal.open);
        ensure!(journal.service == record, "the journal says {:?}, not {record:?}", journal.service);

        let ask = |request: &str| Client::connect(self.address).and_then(|mut client| client.ask(request));
        for _ in 0..3 {
            let acknowledged = self.writer.acknowledged();
            let (missing, generation) =
                ask(&format!("MISSING {acknowledged}")).map_err(|error| TestCaseError::fail(error.to_string()))?;
            ensure!(generation == model.owner.0, "g{generation} answers, {} owns", model.owner);
            ensure!(missing == "none", "write {missing} of {acknowledged} is lost");
        }
        ensure!(self.writer.goes_on(), "nothing more is acknowledged");
        self.check_descriptors()
    }

    fn check_descriptors(&mut self) -> Outcome {
        let began = Instant::now();
        loop {
            let (others, segments) = self.count_descriptors();
            let distinct = segments_in_use();
            // The supervisor's and the one that is kept for the owner.
            if others <= self.descriptors && segments <= 2 * distinct.len() {
                return Ok(());
            }
            // The writer may be between two connections.
            ensure!(
                began.elapsed() < Duration::from_secs(5),
                "{others} descriptors are open, {} at the start; {segments} of {} segments",
                self.descriptors,
                distinct.len()
            );
            self.supervisor().tick(Duration::from_millis(5), None);
        }
    }
}

impl Drop for System {
    fn drop(&mut self) {
        if let Some(supervisor) = self.supervisor.as_mut() {
            let _ = supervisor.stop(&self.journal);
        }
    }
}

fn container(generation: Generation) -> ContainerId {
    ContainerId { service: ServiceName::new("machine").unwrap(), generation }
}

fn address_of(supervisor: &Supervisor) -> SocketAddr {
    let listener = supervisor.ground().listeners[0].fd.try_clone().unwrap();
    std::net::TcpListener::from(listener).local_addr().unwrap()
}

/// Inodes of the segments this process holds.
fn segments_in_use() -> BTreeSet<u64> {
    use std::os::unix::fs::MetadataExt as _;
    let entries = fs::read_dir("/proc/self/fd").unwrap().flatten();
    let is_segment =
        |path: &PathBuf| fs::read_link(path).is_ok_and(|link| link.to_string_lossy().contains("warmswap-segment"));
    let paths = entries.map(|entry| entry.path()).filter(is_segment);
    paths.filter_map(|path| fs::metadata(path).ok()).map(|metadata| metadata.ino()).collect()
}

#[test]
fn whatever_happens_one_generation_serves_and_no_acknowledged_write_is_lost() {
    if std::env::var_os(IS_SERVICE).is_some() {
        return;
    }
    // SAFETY: takes nothing and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        println!(
            "LEFT OUT: whatever_happens_one_generation_serves_and_no_acknowledged_write_is_lost: it needs root for its images"
        );
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let images = Arc::new(stage::images(folder.path()));
    let seed = match Config::default().rng_seed {
        RngSeed::Random => RngSeed::Fixed(SEED),
        chosen @ RngSeed::Fixed(_) => chosen,
    };
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(CASES);
    let config = Config { cases, rng_seed: seed, failure_persistence: None, max_shrink_iters: 40, ..Config::default() };
    let run = |steps: Vec<Step>| {
        let mut system = System::start(Arc::clone(&images));
        for (at, step) in steps.iter().enumerate() {
            let began = Instant::now();
            let done = system.step(step);
            println!("{at}: {step:?}: {:.0} ms", began.elapsed().as_secs_f64() * 1e3);
            done.map_err(|error| TestCaseError::fail(format!("step {at}, {step:?}: {error}")))?;
        }
        Ok(())
    };
    if let Err(error) = TestRunner::new(config).run(&prop::collection::vec(any_step(), 1..STEPS_MAX), run) {
        panic!("{error}");
    }
}

#[test]
fn it_is_the_service_when_it_is_started_as_one() {
    if std::env::var_os(IS_SERVICE).is_none() {
        return;
    }
    if let Err(error) = service::run() {
        eprintln!("the service: {error}");
        std::process::exit(1);
    }
    std::process::exit(0);
}
