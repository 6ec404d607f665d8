//! `warmswap top` and `warmswap trace` beside containers that nobody of ours started: what they did is theirs, to the
//! last exec, however short they lived and whatever they were in. And the terminal afterwards.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use warmswap_rootfs::pack_rootfs_as;
use warmswap_tests::{Agent, Ground, LENIENT, Requirement, Store, Terminal, eventually, needs, within};

const PATIENCE: Duration = Duration::from_secs(120);
const CONTAINERS: Requirement = Requirement::Containers;
const BPF: Requirement = Requirement::Bpf;

/// A cgroup of the v2 hierarchy, made and removed by hand.
struct Group {
    folder: PathBuf,
}

impl Group {
    fn new(name: &str) -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let words = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let v2 = words.filter(|words| words[2] == "cgroup2").map(|words| words[1].to_owned()).next().unwrap();
        let folder = Path::new(&v2).join(name);
        fs::create_dir(&folder).unwrap();
        // Tools take some time from the group to the first process, too; an idle machine needs less than a millisecond.
        std::thread::sleep(Duration::from_millis(200));
        Self { folder }
    }

    /// Runs this many programs in it, one after the other, of which the shell is the first.
    fn run(&self, programs: u32) -> Child {
        let script = format!("i=1; while [ $i -lt {programs} ]; do /bin/sh -c :; i=$((i+1)); done");
        self.shell(&script).spawn().unwrap()
    }

    fn shell(&self, script: &str) -> Command {
        let mut procs = File::options().write(true).open(self.folder.join("cgroup.procs")).unwrap();
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", script]);
        // SAFETY: one system call between fork and exec; 0 stands for whoever writes it.
        unsafe { shell.pre_exec(move || procs.write_all(b"0")) };
        shell
    }

    /// CPU time as the kernel counts it for this group, s.
    fn cpu_s(&self) -> f64 {
        let text = fs::read_to_string(self.folder.join("cpu.stat")).unwrap();
        let used = text.lines().find_map(|line| line.strip_prefix("usage_usec ")).unwrap();
        used.parse::<f64>().unwrap() / 1e6
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // A process that was just killed takes a moment to leave.
        within(Duration::from_secs(5), || fs::remove_dir(&self.folder).ok());
    }
}

/// A command of ours that prints a document a line, and goes on meanwhile.
struct Lines {
    child: Option<Child>,
    file: PathBuf,
}

impl Lines {
    fn of(ground: &Ground, arguments: &[&str]) -> Self {
        let file = ground.path(&format!("{}.lines", arguments.join("-").replace('/', "_")));
        let out = File::create(&file).unwrap();
        let mut command = ground.command().unwrap();
        let child = command.args(arguments).arg("--json").stdout(out).stderr(Stdio::inherit()).spawn().unwrap();
        Self { child: Some(child), file }
    }

    fn so_far(&self) -> Vec<Value> {
        let text = fs::read_to_string(&self.file).unwrap();
        // The last line may not be whole yet.
        text.split_inclusive('\n')
            .filter(|line| line.ends_with('\n'))
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    fn end(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Fails when it has ended, which is as good.
            let _ = child.kill();
            child.wait().unwrap();
        }
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        self.end();
    }
}

fn rows<'a>(seconds: &'a [Value], name: &'a str) -> impl Iterator<Item = (&'a Value, f64)> {
    seconds.iter().flat_map(move |second| {
        let rows = second["containers"].as_array().unwrap().iter();
        rows.filter(move |row| row["name"] == name).map(move |row| (row, second["seconds"].as_f64().unwrap()))
    })
}

/// Programs started over all seconds.
fn launches(seconds: &[Value], name: &str) -> f64 {
    rows(seconds, name).map(|(row, length)| row["launches_per_s"].as_f64().unwrap() * length).sum()
}

fn cpu_s(seconds: &[Value], name: &str) -> f64 {
    rows(seconds, name).map(|(row, length)| row["usage"]["cpu"].as_f64().unwrap() / 100.0 * length).sum()
}

#[test]
fn a_service_and_whatever_else_runs_are_seen_for_what_they_do() {
    needs!("a_service_and_whatever_else_runs_are_seen_for_what_they_do", CONTAINERS, BPF);
    let name = "scenario-top";
    let store = Store::start(name, LENIENT).unwrap();
    let load = store.load().unwrap();
    let steady = Group::new("top-steady");
    let mut busy = steady
        .shell("while :; do /bin/sh -c :; i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done; done")
        .spawn()
        .unwrap();
    let mut top = Lines::of(store.ground(), &["top", "--seconds", "600"]);
    eventually("a first second", PATIENCE, || !top.so_far().is_empty());

    // Two that come and go within a second, one in the other.
    let mut trace = Lines::of(store.ground(), &["trace", "--container", "top-outer", "--class", "exec"]);
    std::thread::sleep(Duration::from_secs(1)); // until the trace listens
    {
        let outer = Group::new("top-outer");
        let inner = Group::new("top-outer/inner");
        let mut in_outer = outer.run(20);
        let mut in_inner = inner.run(30);
        assert!(in_outer.wait().unwrap().success() && in_inner.wait().unwrap().success());
        drop(inner);
        drop(outer);
    }
    // Named like a container of Docker, with groups of its own.
    let id = "5f3a91c0de4b5a6978877665544332211000ffeeddccbbaa9988776655443322";
    {
        let container = Group::new(&format!("docker-{id}.scope"));
        let below = Group::new(&format!("docker-{id}.scope/init.scope"));
        assert!(container.run(10).wait().unwrap().success() && below.run(7).wait().unwrap().success());
    }

    let before = (steady.cpu_s(), top.so_far().len());
    eventually("five seconds more", PATIENCE, || top.so_far().len() >= before.1 + 5);
    let seconds = top.so_far();
    let used = steady.cpu_s() - before.0;
    top.end();

    assert_eq!(launches(&seconds, "top-outer").round(), 20.0);
    assert_eq!(launches(&seconds, "top-outer/inner").round(), 30.0);
    assert_eq!(launches(&seconds, "5f3a91c0de4b").round(), 17.0, "what is in a container is the container's");
    let (docker, _) = rows(&seconds, "5f3a91c0de4b").next().unwrap();
    assert_eq!((&docker["tool"], &docker["path"]), (&"docker".into(), &format!("docker-{id}.scope").into()));
    assert_eq!(rows(&seconds, "top-outer").last().unwrap().0["ended"], true);

    let told = cpu_s(&seconds[before.1..], "top-steady");
    assert!((used - told).abs() <= 0.2 * used + 0.3, "the kernel says {used} s, top {told} s");
    assert!(launches(&seconds, "top-steady") > 5.0);
    let (service, _) = rows(&seconds, name).last().unwrap();
    assert_eq!(
        (&service["tool"], &service["generation"], &service["role"]),
        (&"warmswap".into(), &1.into(), &"owner".into())
    );
    assert!(
        service["requests_per_s"].as_f64().unwrap() > 0.0 && service["usage"]["memory"].as_f64().unwrap() > 0.0,
        "{service}"
    );
    let cpu = service["usage"]["cpu"].as_f64().unwrap();
    assert!(cpu > 0.0 && cpu <= 100.0 * service_cpus(&seconds), "{service}");
    let probes = &seconds.last().unwrap()["probes"];
    assert!(probes["attached"].as_u64().unwrap() > 0 && probes["reading_cpu"].as_f64().unwrap() < 50.0, "{probes}");
    assert!(probes["kernel"].is_null(), "measured without being asked: {probes}");

    let seen = || trace.so_far().into_iter().filter(|line| line["container"]["name"] == "top-outer").count();
    eventually("the trace has 20 launches", PATIENCE, || seen() >= 20);
    let lines = trace.so_far();
    trace.end();
    assert!(lines.iter().all(|line| line["container"]["name"] == "top-outer" && line["event"]["class"] == "exec"));
    assert_eq!(lines.len(), 20);

    // A handover shows both generations, and is told.
    let mut top = Lines::of(store.ground(), &["top", "--cost", "--seconds", "600"]);
    eventually("a first second", PATIENCE, || !top.so_far().is_empty());
    assert!(store.update("v2").unwrap().said.success(), "{}", store.log());
    let told = |kind: &str| {
        top.so_far().iter().any(|second| second["news"].as_array().unwrap().iter().any(|news| news["kind"] == kind))
    };
    eventually("the handover is told", PATIENCE, || told("handover_began") && told("committed"));
    eventually("the new owner is shown", PATIENCE, || {
        let seconds = top.so_far();
        rows(&seconds, name).last().is_some_and(|(row, _)| row["generation"] == 2 && row["role"] == "owner")
    });
    let kernel = top.so_far().last().unwrap()["probes"]["kernel"].clone();
    assert!(kernel["runs_per_s"].as_f64().unwrap() > 0.0 && kernel["cpu"].as_f64().unwrap() < 50.0, "{kernel}");
    top.end();
    busy.kill().unwrap();
    busy.wait().unwrap();
    drop(steady);
    assert!(load.stop().unwrap().totals.is_clean());
    store.finish().unwrap();
}

fn service_cpus(seconds: &[Value]) -> f64 {
    seconds[0]["cpus"].as_f64().unwrap() + 1.0 // a second is cut with some play
}

fn on_terminal(store: &Store, arguments: &[&str], width: u16, height: u16) -> Terminal {
    let mut command = store.ground().command().unwrap();
    command.arg("top").args(arguments);
    Terminal::start(command, width, height).unwrap()
}

#[test]
fn a_terminal_is_drawn_on_and_given_back() {
    needs!("a_terminal_is_drawn_on_and_given_back", CONTAINERS, BPF);
    let name = "scenario-screen";
    let mut store = Store::start(name, LENIENT).unwrap();
    let shows = |terminal: &Terminal, words: &str| {
        let found = within(PATIENCE, || terminal.lines().iter().any(|line| line.contains(words)).then_some(()));
        assert!(found.is_some(), "{words:?} is not on the screen:\n{}", terminal.lines().join("\n"));
    };
    let mut terminal = on_terminal(&store, &[], 80, 24);
    shows(&terminal, &format!("{name} g1"));
    assert!(terminal.taken() && !terminal.as_before().unwrap());
    terminal.press("?").unwrap();
    shows(&terminal, "q Esc Ctrl-C");
    terminal.press("?m").unwrap();
    shows(&terminal, "what happened");
    terminal.press("q").unwrap();
    assert_eq!(terminal.ended(PATIENCE).and_then(|status| status.code()), Some(0));
    assert!(!terminal.taken() && terminal.as_before().unwrap());

    // A signal, Ctrl-C, and a terminal that is too small.
    let mut terminal = on_terminal(&store, &[], 60, 10);
    shows(&terminal, "needs a terminal of 80 by 24");
    let sent = Command::new("kill").args(["-TERM", &terminal.pid().to_string()]).status().unwrap();
    assert!(sent.success());
    assert_eq!(terminal.ended(PATIENCE).and_then(|status| status.code()), Some(128 + 15));
    assert!(!terminal.taken() && terminal.as_before().unwrap());

    // The line breaks.
    let mut terminal = on_terminal(&store, &[], 80, 24);
    shows(&terminal, &format!("{name} g1"));
    terminal.hang_up();
    assert_eq!(terminal.ended(PATIENCE).and_then(|status| status.code()), Some(128 + 1));

    // The agent dies and another one takes its place.
    let mut terminal = on_terminal(&store, &[], 140, 40);
    shows(&terminal, &format!("{name} g1"));
    store.kill_agent().unwrap();
    shows(&terminal, "the agent is gone");
    shows(&terminal, name);
    store.start_agent().unwrap();
    shows(&terminal, "1 service");
    terminal.press("\u{3}").unwrap();
    assert_eq!(terminal.ended(PATIENCE).and_then(|status| status.code()), Some(0));
    assert!(!terminal.taken() && terminal.as_before().unwrap());
    store.finish().unwrap();
}

#[test]
fn without_a_terminal_or_an_agent_it_says_what_to_do() {
    needs!("without_a_terminal_or_an_agent_it_says_what_to_do", CONTAINERS);
    let ground = Ground::new().unwrap();
    let said = ground.warmswap(&["top"]).unwrap();
    assert_eq!(said.status, Some(1));
    assert!(said.stderr.contains("no agent answers") && said.stderr.contains("warmswap agent"), "{}", said.stderr);
    let agent = Agent::start(&ground).unwrap();
    let seconds = ground.json(&["top", "--count", "2"]).unwrap();
    assert_eq!(seconds.as_array().map(Vec::len), Some(2), "{seconds}");
    for second in seconds.as_array().unwrap() {
        assert!(second["seconds"].as_f64().unwrap() > 0.0 && second["unix_ms"].as_u64().unwrap() > 0, "{second}");
    }
    agent.terminate().unwrap();
    ground.finish().unwrap();
}

/// A bundle for runc that runs a shell script, in a group as Docker with systemd names it.
fn bundle(folder: &Path, id: &str, script: &str) {
    pack_rootfs_as(Path::new("/bin/sh"), &folder.join("rootfs"), Some("sh")).unwrap();
    assert!(Command::new("runc").arg("spec").current_dir(folder).status().unwrap().success());
    let file = folder.join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    config["process"]["terminal"] = false.into();
    config["process"]["args"] = vec!["/bin/sh", "-c", script].into();
    config["linux"]["cgroupsPath"] = format!("/docker-{id}.scope").into();
    fs::write(file, config.to_string()).unwrap();
}

#[test]
fn a_container_that_runc_runs_is_seen_with_its_memory() {
    needs!("a_container_that_runc_runs_is_seen_with_its_memory", CONTAINERS, BPF, Requirement::Program("runc"));
    let ground = Ground::new().unwrap();
    let agent = Agent::start(&ground).unwrap();
    let id = "6f3a91c0de4b5a6978877665544332211000ffeeddccbbaa9988776655443322";
    let folder = ground.path("bundle");
    bundle(&folder, id, "i=0; while [ $i -lt 40 ]; do /bin/sh -c :; i=$((i+1)); done; read line || :");
    let mut top = Lines::of(&ground, &["top", "--seconds", "600"]);
    eventually("a first second", PATIENCE, || !top.so_far().is_empty());
    let mut runc = Command::new("runc");
    runc.arg("--root").arg(ground.path("runc")).arg("run").arg("--bundle").arg(&folder).arg("warmswap-test-top");
    let mut runc = runc.stdin(Stdio::piped()).spawn().unwrap();
    let name = &id[..12];
    let launched = within(PATIENCE, || (launches(&top.so_far(), name) >= 40.5).then_some(()));
    // Whoever reads a line ends when there is none.
    drop(runc.stdin.take());
    assert!(runc.wait().unwrap().success());
    assert!(launched.is_some(), "{} launches", launches(&top.so_far(), name));
    eventually("its end is shown", PATIENCE, || rows(&top.so_far(), name).any(|(row, _)| row["ended"] == true));
    let seconds = top.so_far();
    top.end();
    // Its own program and 40 more; runc itself may run one on the way in.
    let launches = launches(&seconds, name).round();
    assert!((41.0..=43.0).contains(&launches), "{launches} launches");
    let known = rows(&seconds, name).any(|(row, _)| row["usage"]["memory"].as_f64().is_some_and(|mb| mb > 0.0));
    assert!(known && rows(&seconds, name).all(|(row, _)| row["tool"] == "docker"), "{seconds:?}");
    let told: Vec<&Value> = seconds.iter().flat_map(|second| second["news"].as_array().unwrap()).collect();
    for kind in ["came", "went"] {
        assert!(told.iter().any(|news| news["of"] == name && news["kind"] == kind), "{kind}: {told:?}");
    }
    let findings = ground.json(&["check"]).unwrap();
    let finding = findings.as_array().unwrap().iter().find(|finding| finding["name"] == "containers of other tools");
    assert!(finding.is_some_and(|finding| finding["ok"].is_boolean() && finding["detail"] != ""), "{findings}");
    agent.terminate().unwrap();
    ground.finish().unwrap();
}
