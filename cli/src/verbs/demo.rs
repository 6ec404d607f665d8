//! `warmswap demo`: the main job on this host, on real containers, under load that checks its own writes.
//!
//! 1. session-store v1 runs in a container; clients load it at a constant rate and check every acknowledged write.
//! 2. The forecast learns from what the probes see.
//! 3. An update to v2 commits; one to v3, which is slow on purpose, rolls back by itself; in one more, the shadow is killed.
//! 4. One table, one HTML report, and nothing left behind.
//!
//! Everything happens under folders and an agent of its own; a running warmswap is not touched.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use warmswap_agent::api::{
    Fault, ForecastAnswer, ResourceReport, RunRequest, ServiceStatus, UpdateLine, UpdateRequest,
};
use warmswap_load::{Load, LoadConfig, LoadResult, RunningLoad};
use warmswap_model::{Champion, HandoverReport, PerResource, Resource, Verdict};
use warmswap_report::{
    ClientLoad, ClientView, ForecastPoint, ForecastSeries, HandoverView, Machine, ReportInput, text_table,
};

use super::Here;
use super::update::{hand_over, show_progress, verdict_line};
use crate::args::DemoArgs;
use crate::client::{Client, start_agent};
use crate::output::{Style, paint, say, say_json};

const SERVICE: &str = "session-store";
const VERSIONS: [&str; 3] = ["v1", "v2", "v3"];
/// Seconds of load after which the forecast's LSTM can have been trained and proven.
const QUIET_LINE_EVERY: Duration = Duration::from_secs(15);

pub(super) fn demo(here: &Here, args: &DemoArgs) -> Result<ExitCode> {
    let talk = Talk { quiet: here.json };
    let stage = Stage::set(args, &talk)?;
    let outcome = stage.play(args, &talk);
    let left = stage.strike();
    let (input, load) = outcome?;
    let html = warmswap_report::render(&input);
    std::fs::write(&args.report, html).with_context(|| format!("cannot write {}", args.report.display()))?;
    let data = args.report.with_extension("json");
    std::fs::write(&data, serde_json::to_vec(&input)?).with_context(|| format!("cannot write {}", data.display()))?;

    let problems = judge(&input, &load, &left);
    if here.json {
        say_json(&json!({ "report": input, "left_behind": left, "problems": problems }))?;
    } else {
        finale(&input, &load, &args.report, &problems);
    }
    Ok(if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Says what happens, unless the result is for a program.
struct Talk {
    quiet: bool,
}

impl Talk {
    fn title(&self, text: &str) {
        if !self.quiet {
            say(&format!("\n{}", paint(Style::Bold, text)));
        }
    }

    fn line(&self, text: &str) {
        if !self.quiet {
            say(text);
        }
    }
}

/// Folders, images and an agent for one demo.
struct Stage {
    run_dir: PathBuf,
    state_dir: PathBuf,
    address: SocketAddr,
    client: Client,
    agent: std::process::Child,
}

impl Stage {
    fn set(args: &DemoArgs, talk: &Talk) -> Result<Self> {
        let programs = match &args.programs {
            Some(folder) => folder.clone(),
            None => std::env::current_exe()?.parent().map(Path::to_path_buf).unwrap_or_default(),
        };
        let id = std::process::id();
        let run_dir = PathBuf::from(format!("/run/warmswap-demo-{id}"));
        let state_dir = std::env::temp_dir().join(format!("warmswap-demo-{id}"));
        let images = state_dir.join("images");
        for version in VERSIONS {
            let program = programs.join(format!("{SERVICE}-{version}"));
            ensure!(
                program.is_file(),
                "{} is missing; `cargo build --release` makes it, or say where it is with --programs",
                program.display()
            );
            warmswap_rootfs::pack_rootfs_as(&program, &images.join(version), Some(SERVICE))
                .with_context(|| format!("cannot make an image of {}", program.display()))?;
        }
        let address = free_port()?;
        let log = state_dir.join("agent.log");
        let mut agent = start_agent(&run_dir, &state_dir, &log)?;
        let client = Client::wait_for_agent(&run_dir, &mut agent, &log)?;
        talk.line(&format!("agent {} started; its log is {}", agent.id(), log.display()));
        let stage = Self { run_dir, state_dir, address, client, agent };
        stage.strike_on_interrupt();
        Ok(stage)
    }

    fn image(&self, version: &str) -> PathBuf {
        self.state_dir.join("images").join(version)
    }

    fn play(&self, args: &DemoArgs, talk: &Talk) -> Result<(ReportInput, LoadResult)> {
        talk.title("1  session-store v1 in a container");
        let text = format!(
            "name = \"{SERVICE}\"\nimage = \"images/v1\"\ncommand = [\"/bin/{SERVICE}\"]\n\n\
             [listen.resp]\naddress = \"{}\"\n\n[resources]\nmemory_mb_max = 512\n",
            self.address
        );
        let path = self.state_dir.join("session-store.toml");
        std::fs::write(&path, &text)?;
        let status: ServiceStatus = self.client.post("/v1/services", &RunRequest { path, text })?;
        talk.line(&format!("serves on {} as {}", self.address, status.owner.map_or("–".into(), |g| g.to_string())));

        let load = Load::start(LoadConfig {
            connections: args.connections,
            rate_per_s: args.rate,
            key_prefix: "demo".into(),
            ..LoadConfig::new(self.address)
        })?;
        talk.line(&format!(
            "{} connections send {:.0} requests a second and check every acknowledged write",
            args.connections, args.rate
        ));

        talk.title("2  The forecast learns from what the probes see");
        self.learn(&load, Duration::from_secs(args.learn_s), talk)?;

        talk.title("3  Handovers under load");
        let mut reports = Vec::new();
        for (version, fault) in [("v2", None), ("v3", None), ("v2", Some(Fault::KillShadowInSync))] {
            load.mark(version);
            reports.push(self.update(version, fault, talk)?);
            self.wait(&load, Duration::from_secs(args.between_s), "serving on", talk);
        }
        let forecast: ForecastAnswer = self.client.get(&format!("/v1/services/{SERVICE}/forecast"))?;
        talk.title("4  Every client reads back what it wrote");
        let load = load.stop()?;
        let totals = load.totals;
        talk.line(&format!(
            "{} requests, {} acknowledged writes, {} keys read back; {} of {} connections open since before the first handover",
            totals.completed, totals.writes_acknowledged, totals.keys_verified, load.connections_kept, load.connections
        ));
        let handovers = reports
            .into_iter()
            .map(|report| {
                let clients = ClientView::new(&load, &report);
                HandoverView::new(report, Some(clients))
            })
            .collect();
        let input = ReportInput {
            title: "warmswap demo".into(),
            created_unix_ms: warmswap_load::unix_ms(),
            machine: machine(),
            clients: Some(ClientLoad::from(&load)),
            handovers,
            forecasts: forecast_series(&forecast),
        };
        Ok((input, load))
    }

    fn learn(&self, load: &RunningLoad, length: Duration, talk: &Talk) -> Result<()> {
        self.wait(load, length, "learning", talk);
        let answer: ForecastAnswer = self.client.get(&format!("/v1/services/{SERVICE}/forecast"))?;
        let Some(report) = answer.report else { bail!("no window reached the forecast in {} s", length.as_secs()) };
        for resource in Resource::ALL {
            let own = &report.resources[resource];
            talk.line(&format!(
                "  {resource:<8} {:>8.1} {:<5} expected {:>8.1} – {:<8.1} {}",
                own.last, own.unit, own.band.q05, own.band.q95, own.why
            ));
        }
        Ok(())
    }

    fn wait(&self, load: &RunningLoad, length: Duration, what: &str, talk: &Talk) {
        let began = Instant::now();
        let bar = if talk.quiet { ProgressBar::hidden() } else { ProgressBar::new(length.as_secs().max(1)) };
        if let Ok(style) = ProgressStyle::with_template("  {msg} {bar:24} {pos:>3}/{len} s") {
            bar.set_style(style);
        }
        let mut said = Instant::now();
        while began.elapsed() < length {
            std::thread::sleep(Duration::from_millis(250).min(length));
            let now = load.snapshot();
            let line = format!("{what}: {:.0} requests/s, {} failed", now.requests_per_s, now.totals.failed_requests);
            bar.set_position(began.elapsed().as_secs());
            bar.set_message(line.clone());
            // Without a terminal the bar is invisible; say so now and then.
            if bar.is_hidden() && said.elapsed() > QUIET_LINE_EVERY {
                said = Instant::now();
                talk.line(&format!("  {line} ({} of {} s)", began.elapsed().as_secs(), length.as_secs()));
            }
        }
        bar.finish_and_clear();
    }

    fn update(&self, version: &str, fault: Option<Fault>, talk: &Talk) -> Result<HandoverReport> {
        let request = UpdateRequest { image: Some(self.image(version)), file: None, fault };
        let path = format!("/v1/services/{SERVICE}/update");
        let report = hand_over(&self.client, &path, &request, |line| {
            match line {
                UpdateLine::Progress(progress) if !talk.quiet => show_progress(progress),
                UpdateLine::Report(report) => talk.line(&verdict_line(report)),
                _ => {}
            }
            Ok(())
        })?;
        Ok(report)
    }

    /// Ends everything and says what could not be removed.
    fn strike(mut self) -> Vec<String> {
        self.strike_agent();
        let left = clean(&self.run_dir, &self.state_dir);
        let _ = self.agent.wait();
        left
    }

    fn strike_agent(&self) {
        if let Err(error) = self.client.stop("/v1/stop") {
            eprintln!("the agent does not stop by itself: {error:#}");
        }
        self.client.wait_until_gone();
    }

    /// Ctrl-C in the middle leaves nothing behind either.
    fn strike_on_interrupt(&self) {
        let (run_dir, state_dir) = (self.run_dir.clone(), self.state_dir.clone());
        std::thread::spawn(move || {
            let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
            if runtime.block_on(tokio::signal::ctrl_c()).is_ok() {
                eprintln!("interrupted; removing what the demo made");
                if let Ok(client) = Client::connect(&run_dir) {
                    let _ = client.stop("/v1/stop"); // what it leaves is removed below
                    client.wait_until_gone();
                }
                clean(&run_dir, &state_dir);
                std::process::exit(130);
            }
        });
    }
}

fn clean(run_dir: &Path, state_dir: &Path) -> Vec<String> {
    let mut left = Vec::new();
    match super::stop::purge(run_dir) {
        Ok((_, still)) => left.extend(still),
        Err(error) => left.push(format!("{error:#}")),
    }
    for folder in [run_dir, state_dir] {
        if let Err(error) = std::fs::remove_dir_all(folder)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            left.push(format!("{}: {error}", folder.display()));
        }
    }
    left
}

fn free_port() -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot find a free port on 127.0.0.1")?;
    Ok(listener.local_addr()?)
}

fn machine() -> Machine {
    let first_line = |path: &str| {
        std::fs::read_to_string(path).ok().and_then(|text| text.lines().next().map(str::to_owned)).unwrap_or_default()
    };
    let field = |path: &str, key: &str| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(key));
        line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
    };
    let memory_kb: u64 =
        field("/proc/meminfo", "MemTotal").split_whitespace().next().and_then(|kb| kb.parse().ok()).unwrap_or(0);
    Machine {
        host: first_line("/proc/sys/kernel/hostname"),
        cpu: field("/proc/cpuinfo", "model name"),
        cpus: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
        memory_mb: memory_kb / 1024,
        kernel: first_line("/proc/sys/kernel/osrelease"),
        versions: vec![("warmswap".into(), env!("CARGO_PKG_VERSION").into())],
    }
}

fn forecast_series(answer: &ForecastAnswer) -> Vec<ForecastSeries> {
    let of = |resource: Resource, say: fn(&ResourceReport) -> String| {
        answer.report.as_ref().map_or_else(String::new, |report| say(&report.resources[resource]))
    };
    let series: PerResource<ForecastSeries> = PerResource::from_fn(|resource| ForecastSeries {
        resource,
        champion: of(resource, |own| own.why.clone()),
        lstm: of(resource, how_the_lstm_fares),
        points: answer
            .bands
            .iter()
            .map(|band| {
                let quantiles = band.demand.quantiles[resource];
                ForecastPoint {
                    unix_ms: band.unix_ms,
                    actual: Some(band.actual[resource]),
                    q05: Some(quantiles.q05),
                    q50: Some(quantiles.q50),
                    q95: Some(quantiles.q95),
                    lstm_q05: band.lstm[resource].map(|lstm| lstm.q05),
                    lstm_q95: band.lstm[resource].map(|lstm| lstm.q95),
                }
            })
            .collect(),
    });
    let PerResource { cpu, memory, network, disk } = series;
    vec![cpu, memory, network, disk]
}

fn how_the_lstm_fares(own: &ResourceReport) -> String {
    let lstm = own.candidates.iter().find(|candidate| candidate.candidate == Champion::Lstm);
    let Some((lstm, loss)) = lstm.and_then(|lstm| Some((lstm, lstm.loss?))) else {
        return "none of its forecasts has come due: it was not trained in time".into();
    };
    let others = own.candidates.iter().filter(|other| other.candidate != Champion::Lstm);
    let best =
        others.filter_map(|other| Some((other.loss?, other.candidate.name()))).min_by(|a, b| a.0.total_cmp(&b.0));
    let beside = best.map_or_else(String::new, |(loss, name)| format!(", {name} of {loss:.3}"));
    format!("recent loss of {loss:.3} {}{beside}, over {} forecasts", own.unit, lstm.scored)
}

/// Everything that is not as it should be, in words. The verdicts are what the demo is for: v2 commits, v3 rolls back,
/// the killed shadow aborts.
fn judge(input: &ReportInput, load: &LoadResult, left: &[String]) -> Vec<String> {
    let totals = &load.totals;
    let mut problems: Vec<String> = [
        (totals.failed_requests, "requests failed"),
        (totals.lost_writes, "acknowledged writes were lost"),
        (totals.duplicated_writes, "acknowledged writes were applied twice"),
        (totals.wrong_reads, "reads were wrong"),
        (totals.resets, "connections were reset"),
        (totals.reconnects, "connections had to be opened again"),
        (totals.keys_unverified, "keys could not be read back"),
        ((load.connections - load.connections_kept) as u64, "connections were not kept"),
    ]
    .into_iter()
    .filter(|(count, _)| *count > 0)
    .map(|(count, what)| format!("{count} {what}"))
    .collect();
    let wanted = [Verdict::Committed, Verdict::RolledBack, Verdict::Aborted];
    for (view, wanted) in input.handovers.iter().zip(wanted) {
        if view.report.verdict != wanted {
            problems.push(format!("{} was {}, not {wanted}", view.label, view.report.verdict));
        }
    }
    problems.extend(left.iter().map(|what| format!("left behind: {what}")));
    problems
}

fn finale(input: &ReportInput, load: &LoadResult, report: &Path, problems: &[String]) {
    say("");
    for line in text_table(&input.handovers).lines() {
        say(line);
    }
    let totals = load.totals;
    say(&format!(
        "\n{} requests: {} failed, {} acknowledged writes lost, {} applied twice, {} connections reset",
        totals.completed, totals.failed_requests, totals.lost_writes, totals.duplicated_writes, totals.resets
    ));
    say(&format!("report: {}", report.display()));
    for problem in problems {
        say(&paint(Style::Bad, &format!("✗ {problem}")));
    }
    if problems.is_empty() {
        say(&paint(Style::Good, "✓ nothing failed, nothing was lost, nothing is left behind"));
    }
}
