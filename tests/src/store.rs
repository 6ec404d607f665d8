//! The example service on a ground of its own, as nearly every scenario needs it: images, service file, agent, clients.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use warmswap_load::resp::{Client, Reply};
use warmswap_load::{Load, LoadConfig, RunningLoad};

use crate::hesitant::Hesitant;
use crate::wait::within;
use crate::{Agent, Ground, Said};

/// Handover settings for scenarios that are about something else than the judgement: a loaded or an emulated machine
/// makes latencies and processor times differ by more than any sensible limit.
pub const LENIENT: &str = "quiesce_ms_max = 2000\nverify_s_min = 1\nverify_requests_min = 20\np99_ratio_max = 1e6\n\
                           cpu_ratio_max = 1e6\nmemory_latency_ratio_max = 1e6\nthroughput_ratio_min = 0\n";

/// What may differ between the service files of one scenario.
#[derive(Debug, Clone)]
pub struct Settings<'a> {
    pub image: &'a Path,
    /// Empty: what the image says.
    pub command: &'a [&'a str],
    /// Lines before the first table.
    pub top: &'a str,
    /// Lines of `[env]`.
    pub env: &'a str,
    pub memory_mb_max: f64,
    /// Whether it is given the listener; if not, it may bind what it likes in its network namespace.
    pub listens: bool,
    /// Lines of `[handover]`.
    pub handover: &'a str,
    /// Further tables.
    pub more: &'a str,
}

impl<'a> Settings<'a> {
    #[must_use]
    pub fn new(image: &'a Path) -> Self {
        Self {
            image,
            command: &["/bin/service"],
            top: "",
            env: "",
            memory_mb_max: 512.0,
            listens: true,
            handover: LENIENT,
            more: "",
        }
    }
}

/// session-store as a service, with an agent.
#[derive(Debug)]
pub struct Store {
    // Before the agent, so that a failed test ends the services through it.
    ground: Ground,
    agent: Option<Agent>,
    name: &'static str,
    address: SocketAddr,
}

/// How an update, or a rollback, went.
#[derive(Debug, Clone)]
pub struct Update {
    pub said: Said,
    /// The [report](warmswap_model::HandoverReport), when there was a handover.
    pub report: Option<Value>,
}

impl Update {
    /// `committed`, `rolled_back`, `aborted`, or empty without a handover.
    #[must_use]
    pub fn verdict(&self) -> &str {
        self.report.as_ref().and_then(|report| report["verdict"].as_str()).unwrap_or_default()
    }

    /// Why not, from wherever a user reads it.
    #[must_use]
    pub fn reason(&self) -> String {
        let reason = self.report.as_ref().and_then(|report| report["reason"].as_str());
        reason.map_or_else(|| self.said.stderr.trim().to_owned(), str::to_owned)
    }
}

impl Store {
    /// Version 1 runs when this returns.
    ///
    /// # Errors
    /// When it does not come up; with what the agent logged.
    pub fn start(name: &'static str, handover: &str) -> Result<Self> {
        Self::start_with(name, |store| {
            let image = store.image("v1")?;
            store.file("first", &Settings { handover, ..Settings::new(&image) })
        })
    }

    /// As [`Store::start`], with the service file that `first` writes; it need not be session-store that runs.
    ///
    /// # Errors
    /// As [`Store::start`].
    pub fn start_with(name: &'static str, first: impl FnOnce(&Self) -> Result<PathBuf>) -> Result<Self> {
        let ground = Ground::new()?;
        let address = free_address()?;
        let agent = Agent::start(&ground)?;
        let store = Self { ground, agent: Some(agent), name, address };
        let file = first(&store)?;
        let said = store.ground.warmswap(&["run", &file.to_string_lossy()])?;
        ensure!(said.success(), "`warmswap run` ended with {:?}: {}\n{}", said.status, said.stderr, store.log());
        Ok(store)
    }

    #[must_use]
    pub const fn ground(&self) -> &Ground {
        &self.ground
    }

    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// What the agents on this ground logged.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.ground.path("agent.log")).unwrap_or_default()
    }

    /// The image of a version: `v1`, `v2` or `v3`.
    ///
    /// # Errors
    /// When its program has not been built.
    pub fn image(&self, version: &str) -> Result<PathBuf> {
        let image = self.ground.path("images").join(version);
        // A generation may run from it: what has been packed stays as it is.
        if image.exists() { Ok(image) } else { self.ground.image(version, &format!("session-store-{version}")) }
    }

    /// Writes a service file of this service.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn file(&self, name: &str, settings: &Settings<'_>) -> Result<PathBuf> {
        let Settings { image, command, top, env, memory_mb_max, listens, handover, more } = settings;
        let listen = format!("[listen.resp]\naddress = \"{}\"\n", self.address);
        let listen = if *listens { listen } else { String::new() };
        let command = if command.is_empty() { String::new() } else { format!("command = {command:?}\n") };
        let text = format!(
            "name = \"{}\"\nimage = {image:?}\n{command}{top}\n[env]\n{env}\n{listen}\
             [resources]\nmemory_mb_max = {memory_mb_max}\n[handover]\n{handover}\n{more}\n",
            self.name
        );
        self.ground.service_file(name, &text)
    }

    /// Does something in the network namespace of the service.
    ///
    /// # Errors
    /// When there is no such namespace.
    pub fn inside<T: Send>(&self, act: impl FnOnce() -> T + Send) -> Result<T> {
        let path = self.netns();
        let namespace = fs::File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        // A thread of its own, which takes the namespace with it when it ends.
        std::thread::scope(|scope| {
            let entered = scope.spawn(move || -> Result<T> {
                nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).context("cannot enter it")?;
                Ok(act())
            });
            entered.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// The network namespace of the service.
    #[must_use]
    pub fn netns(&self) -> PathBuf {
        self.ground.run_dir().join("netns").join(self.name)
    }

    /// Updates to a version and waits for the end.
    ///
    /// # Errors
    /// When the command could not be run; that it refuses is none.
    pub fn update(&self, version: &str) -> Result<Update> {
        self.hand_over(&["update", self.name, "--image", &self.image(version)?.to_string_lossy()])
    }

    /// `warmswap update --file`.
    ///
    /// # Errors
    /// As [`Store::update`].
    pub fn update_to_file(&self, file: &Path) -> Result<Update> {
        self.hand_over(&["update", self.name, "--file", &file.to_string_lossy()])
    }

    /// `warmswap update` or `warmswap rollback` with these arguments.
    ///
    /// # Errors
    /// As [`Store::update`].
    pub fn hand_over(&self, arguments: &[&str]) -> Result<Update> {
        let said = self.ground.warmswap(&[arguments, &["--json"]].concat())?;
        let lines: Vec<Value> = serde_json::Deserializer::from_str(&said.stdout)
            .into_iter()
            .collect::<Result<_, _>>()
            .with_context(|| format!("`warmswap {}` printed {:?}", arguments.join(" "), said.stdout))?;
        let report = lines.iter().find_map(|line| line.get("report")).cloned();
        Ok(Update { said, report })
    }

    /// Begins an update and returns once the service is in one of these activities, as `warmswap status` shows them.
    ///
    /// # Errors
    /// When it does not come to that.
    pub fn begin_update(&self, arguments: &[&str], activity: &str) -> Result<Child> {
        let mut command = self.ground.command()?;
        command.arg("update").arg(self.name).args(arguments).arg("--json");
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let there = within(Duration::from_secs(120), || {
            let ended = child.try_wait().ok().flatten();
            let now = self.status().ok().and_then(|status| status["activity"].as_str().map(str::to_owned));
            if now.as_deref() == Some(activity) { Some(true) } else { ended.map(|_| false) }
        });
        if there != Some(true) {
            // Fails when it has ended, which is as good.
            let _ = child.kill();
            let output = child.wait_with_output()?;
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            bail!("the update was never {activity}: {}{}\n{}", text(&output.stdout), text(&output.stderr), self.log());
        }
        Ok(child)
    }

    /// What `warmswap status` says of this service.
    ///
    /// # Errors
    /// When the agent does not answer or does not know the service.
    pub fn status(&self) -> Result<Value> {
        let status = self.ground.json(&["status", self.name])?;
        Ok(status["services"][0].clone())
    }

    /// The generation that serves.
    ///
    /// # Errors
    /// When none does, or more than one.
    pub fn owner(&self) -> Result<u32> {
        let status = self.status()?;
        let owner = status["owner"].as_u64().and_then(|owner| u32::try_from(owner).ok());
        let owner = owner.with_context(|| format!("nobody serves: {status}"))?;
        let members = status["generations"].as_array().context("no generations")?;
        let owners: Vec<&Value> = members.iter().filter(|member| member["role"] == "owner").collect();
        ensure!(owners.len() == 1 && owners[0]["generation"] == owner, "not one owner: {status}");
        Ok(owner)
    }

    /// Processes of a generation, as the kernel knows them.
    ///
    /// # Errors
    /// When there is no such cgroup.
    pub fn pids(&self, generation: u32) -> Result<Vec<i32>> {
        let mut waiting = vec![self.cgroup(generation)?];
        let mut pids = Vec::new();
        while let Some(folder) = waiting.pop() {
            let text = fs::read_to_string(folder.join("cgroup.procs"))?;
            pids.extend(text.lines().map(str::parse).collect::<Result<Vec<i32>, _>>()?);
            waiting.extend(folders(&folder)?);
        }
        Ok(pids)
    }

    /// The v2 cgroup of a generation.
    ///
    /// # Errors
    /// When there is none.
    pub fn cgroup(&self, generation: u32) -> Result<PathBuf> {
        let status = self.status()?;
        let members = status["generations"].as_array().context("no generations")?;
        let member = members.iter().find(|member| member["generation"] == generation);
        let inode = member.and_then(|member| member["cgroup"].as_u64());
        let inode = inode.with_context(|| format!("there is no g{generation}: {status}"))?;
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let words = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let v2 = words.filter(|words| words.get(2) == Some(&"cgroup2")).find_map(|words| words.get(1).copied());
        let mut waiting = vec![Path::new(v2.context("no cgroup v2 hierarchy is mounted")?).join("warmswap")];
        while let Some(folder) = waiting.pop() {
            if fs::metadata(&folder)?.ino() == inode {
                return Ok(folder);
            }
            waiting.extend(folders(&folder)?);
        }
        bail!("no cgroup below warmswap has the inode {inode}")
    }

    /// # Errors
    /// When no agent runs.
    pub fn agent_pid(&self) -> Result<i32> {
        let agent = self.agent.as_ref().context("no agent runs")?;
        Ok(i32::try_from(agent.pid())?)
    }

    /// The processes that keep the containers of this ground.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn shims(&self) -> Result<Vec<i32>> {
        let run_dir = self.ground.run_dir();
        let mut shims = Vec::new();
        for entry in fs::read_dir("/proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // Ended since the folder was read, perhaps.
            let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
            let mut words = line.split(|byte| *byte == 0);
            let ours = run_dir.as_os_str().as_encoded_bytes();
            if words.any(|word| word == b"internal-shim") && words.next() == Some(ours) {
                shims.push(pid);
            }
        }
        Ok(shims)
    }

    /// Writes the service file of an update to a shadow that waits at `place`, see [`Hesitant`].
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn hesitant_file(&self, place: &str, handover: &str) -> Result<PathBuf> {
        let image = self.ground.image("hesitant", "hesitant")?;
        self.file(place, &Settings { command: &["/bin/service", place], handover, ..Settings::new(&image) })
    }

    /// A generation of [`Store::hesitant_file`], once it waits.
    ///
    /// # Errors
    /// When it does not come to that within two minutes.
    pub fn hesitant(&self, generation: u32) -> Result<Hesitant> {
        let found =
            within(Duration::from_secs(120), || self.pids(generation).ok()?.into_iter().find_map(Hesitant::find));
        found.with_context(|| format!("g{generation} does not wait anywhere\n{}", self.log()))
    }

    /// A connection.
    ///
    /// # Errors
    /// When it is refused.
    pub fn client(&self) -> Result<Client> {
        Ok(Client::connect(self.address, Duration::from_secs(60))?)
    }

    /// Clients that check their own acknowledged writes, at a rate that an emulated machine keeps up with.
    ///
    /// # Errors
    /// When they cannot connect.
    pub fn load(&self) -> Result<RunningLoad> {
        self.load_of(20, 200.0)
    }

    /// As [`Store::load`], with so many connections and requests a second.
    ///
    /// # Errors
    /// When they cannot connect.
    pub fn load_of(&self, connections: usize, rate_per_s: f64) -> Result<RunningLoad> {
        // Longer than an agent takes to come back: the clients of one that died in QUIESCE wait for the next.
        let timeout = Duration::from_secs(60);
        let config = LoadConfig { connections, rate_per_s, timeout, ..LoadConfig::new(self.address) };
        let load = Load::start(LoadConfig { new_connections_per_s: 5.0, ..config })?;
        // A baseline, and proof that it runs.
        let answered = within(Duration::from_secs(60), || (load.snapshot().totals.completed >= 200).then_some(()));
        answered.context("the load got no answers")?;
        Ok(load)
    }

    /// Writes keys whose values can be told again by [`Store::check_keys`].
    ///
    /// # Errors
    /// When one is not acknowledged.
    pub fn write_keys(&self, count: usize) -> Result<()> {
        let mut client = self.client()?;
        for (key, value) in pairs(count) {
            let reply = client.command(&["SET", &key, &value])?;
            ensure!(reply == Reply::Simple("OK".into()), "SET {key}: {reply}");
        }
        Ok(())
    }

    /// # Errors
    /// When a key of [`Store::write_keys`] does not have its value.
    pub fn check_keys(&self, count: usize) -> Result<()> {
        let mut client = self.client()?;
        for (key, value) in pairs(count) {
            let reply = client.command(&["GET", &key])?;
            ensure!(reply == Reply::Bulk(Some(value.clone().into_bytes())), "GET {key}: {reply}, not {value:?}");
        }
        Ok(())
    }

    /// Ends the agent as a crash does. Containers go on.
    ///
    /// # Errors
    /// When it had ended before.
    pub fn kill_agent(&mut self) -> Result<()> {
        self.agent.take().context("no agent runs")?.kill()
    }

    /// # Errors
    /// When it does not come up.
    pub fn start_agent(&mut self) -> Result<()> {
        ensure!(self.agent.is_none(), "an agent runs");
        self.agent = Some(Agent::start(&self.ground)?);
        Ok(())
    }

    /// Ends everything and looks for what is left.
    ///
    /// # Errors
    /// When something is.
    pub fn finish(self) -> Result<()> {
        let log = self.log();
        self.ground.finish().with_context(|| format!("log of the agent:\n{log}"))
    }
}

fn folders(folder: &Path) -> Result<impl Iterator<Item = PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    Ok(entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()))
}

fn pairs(count: usize) -> impl Iterator<Item = (String, String)> {
    (0..count).map(|n| (format!("kept:{n}"), format!("value {n} {}", "x".repeat(n % 100))))
}

/// Nobody listens there now.
fn free_address() -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no free port on 127.0.0.1")?;
    Ok(listener.local_addr()?)
}
