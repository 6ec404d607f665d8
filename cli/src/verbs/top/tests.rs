//! What a person would see.

use std::time::Duration;

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use warmswap_agent::api::{Dropped, KernelCost, Live, LiveContainer, News, NewsKind, ProbeCost, Role, Tool};
use warmswap_model::{CgroupId, Champion, DemandVector, Generation, PerResource, Quantiles, Resource};

use super::draw::draw;
use super::state::{Command, Sort, State};

const NOW: u64 = 1_700_000_000_000;

fn usage(cpu: f64, memory: f64) -> PerResource<Option<f64>> {
    PerResource { cpu: Some(cpu), memory: Some(memory), network: Some(3.4), disk: Some(0.0) }
}

fn container(tool: Tool, name: &str, cgroup: u64, cpu: f64) -> LiveContainer {
    LiveContainer {
        tool,
        name: name.into(),
        generation: None,
        role: None,
        path: (tool != Tool::Warmswap).then(|| format!("docker/{name}")),
        cgroup: CgroupId(cgroup),
        usage: usage(cpu, 120.4),
        launches_per_s: 1.0,
        inputs_per_s: 0.0,
        requests_per_s: 0.0,
        p99_us: None,
        oom_kills: 0,
        demand: None,
        note: None,
        trouble: false,
        ended: false,
    }
}

fn demand() -> DemandVector {
    let quantiles = |q50: f64| Quantiles { q05: q50 - 10.0, q50, q90: q50 + 8.0, q95: q50 + 12.0, q99: q50 + 20.0 };
    DemandVector {
        horizon_s: 5.0,
        quantiles: PerResource {
            cpu: quantiles(40.0),
            memory: quantiles(120.0),
            network: quantiles(12.0),
            disk: quantiles(10.0),
        },
        champion: PerResource::from_fn(|_| Champion::Lstm),
        coverage90: PerResource::default(),
        confidence: 0.9,
    }
}

fn generation(number: u32, role: Role, cpu: f64) -> LiveContainer {
    let serves = role == Role::Owner;
    LiveContainer {
        generation: Some(Generation(number)),
        role: Some(role),
        requests_per_s: if serves { 1500.0 } else { 0.0 },
        p99_us: serves.then_some(310.0),
        demand: serves.then(demand),
        ..container(Tool::Warmswap, "shop", u64::from(number), cpu)
    }
}

fn live(second: u64, containers: Vec<LiveContainer>) -> Live {
    Live {
        unix_ms: NOW + second * 1000,
        seconds: 1.0,
        cpus: 2,
        containers,
        unwatched: 0,
        probes: ProbeCost { attached: 21, reading_cpu: Some(0.024), events_per_s: 34.0, ..ProbeCost::default() },
        news: Vec::new(),
    }
}

/// A service, its shadow and a container of Docker, for a minute.
fn host() -> State {
    let mut state = State::new();
    for second in 0..60 {
        let containers = vec![
            generation(3, Role::Owner, 42.1),
            generation(4, Role::Shadow, 7.0),
            container(Tool::Docker, "web", 9, 80.0 + (second % 10) as f64),
        ];
        state.take(live(second, containers));
    }
    state
}

fn screen_after(state: &State, width: u16, height: u16, silent: Duration) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a terminal");
    terminal.draw(|frame| draw(frame, state, silent)).expect("drawn");
    let buffer = terminal.backend().buffer();
    let row = |y| (0..width).filter_map(|x| buffer.cell((x, y)).map(|cell| cell.symbol())).collect::<String>();
    (0..height).map(|y| row(y).trim_end().to_owned()).collect()
}

fn screen(state: &State, width: u16, height: u16) -> Vec<String> {
    screen_after(state, width, height, Duration::ZERO)
}

/// The one line that contains the words.
fn line_with<'a>(lines: &'a [String], words: &str) -> &'a str {
    let found: Vec<&String> = lines.iter().filter(|line| line.contains(words)).collect();
    assert_eq!(found.len(), 1, "{words:?} in\n{}", lines.join("\n"));
    found[0]
}

fn with_news(state: &mut State, news: Vec<News>) {
    let mut next = live(60, state.live.as_ref().expect("a second").containers.clone());
    next.news = news;
    state.take(next);
}

fn news(id: u64, kind: NewsKind, text: &str) -> News {
    News { id, unix_ms: NOW + 1000, kind, of: "shop".into(), text: text.into() }
}

#[test]
fn a_host_in_80_by_24() {
    let lines = screen(&host(), 80, 24);
    assert_eq!(lines[0], "warmswap top  1 service, 1 other container  CPU 138 of 200 %        22:14:19 UTC");
    assert_eq!(lines[1], " CONTAINER                CPU %                     MB    Mbps   MB/s IN/s  EX/s");
    assert_eq!(lines[2], ">docker web                89.0 ████▌ ████████     120     3.4      0    0   1.0");
    assert_eq!(lines[3], " shop g3                   42.1 ██▏   ████████     120     3.4      0    0   1.0");
    assert_eq!(lines[4], " shop g4 shadow             7.0 ▍     ▆▆▆▆▆▆▆▆     120     3.4      0    0   1.0");
    assert!(lines[13].starts_with("── docker web, docker/web ──"), "{}", lines[13]);
    assert_eq!(lines[14], " cpu          89.0 %     mean 84.5, highest 89.0 in the last 60 s");
    assert!(lines[18].starts_with("── what happened ──"), "{}", lines[18]);
    assert_eq!(lines[23], " 21 probes, reading 0.02 % CPU, 34.0 events/s                     ? help  q quit");
    assert!(lines.iter().all(|line| line.chars().count() <= 80));
}

#[test]
fn the_forecast_of_the_chosen_service_is_beside_what_it_uses() {
    let mut state = host();
    assert!(state.obey(Command::Move(1)));
    let lines = screen(&state, 80, 24);
    assert!(lines[3].starts_with(">shop g3"), "{}", lines[3]);
    assert!(lines[13].starts_with("── shop g3, 1500 requests/s, p99 310 µs ──"), "{}", lines[13]);
    assert_eq!(lines[14], " cpu          42.1 %     next 5 s: 40.0 (30.0–52.0)       ▕          ▒▒▒▒┃●▒▒▒ ▏");
    // 3.4 Mbps, where 2 to 24 were expected.
    assert_eq!(lines[16], " network       3.4 Mbps  next 5 s: 12.0 (2.0–24.0)        ▕  ▒●▒▒▒▒▒┃▒▒▒▒▒▒▒▒▒ ▏");
}

#[test]
fn a_tall_terminal_shows_it_over_time() {
    let mut state = host();
    state.obey(Command::Move(1));
    let lines = screen(&state, 140, 40);
    line_with(&lines, "cpu 42.1 → 40.0 (30.0–52.0) %");
    assert!(line_with(&lines, "now").contains("-52 s"), "{}", line_with(&lines, "now"));
    let braille = lines.iter().flat_map(|line| line.chars()).filter(|c| ('\u{2801}'..='\u{28ff}').contains(c)).count();
    assert!(braille > 100, "{braille}\n{}", lines.join("\n"));
    // Wide enough for a sparkline of each resource.
    assert!(lines[3].matches('█').count() > 16, "{}", lines[3]);
}

#[test]
fn a_terminal_that_is_too_small_says_so() {
    for (width, height) in [(60, 10), (79, 24), (80, 23), (20, 5)] {
        let text = screen(&host(), width, height).join(" ");
        assert!(text.contains("warmswap top"), "{text}");
        assert!(!text.contains("docker"), "{text}");
    }
    let text = screen(&host(), 60, 10).join(" ");
    assert!(text.contains("needs a terminal of 80 by 24 characters; this one has 60 by"), "{text}");
    screen(&host(), 1, 1);
}

#[test]
fn lines_are_sorted_and_the_chosen_one_stays_chosen() {
    let mut state = State::new();
    let mut busy = container(Tool::Docker, "busy", 1, 90.0);
    let mut big = container(Tool::Podman, "big", 2, 1.0);
    big.usage.memory = Some(900.0);
    busy.usage.disk = None;
    big.launches_per_s = 0.0;
    state.take(live(0, vec![big.clone(), busy.clone()]));
    let names = |state: &State| state.containers().map(|row| row.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&state), ["busy", "big"]);
    state.obey(Command::Move(1));
    assert!(screen(&state, 80, 24)[3].starts_with(">podman big"));
    state.obey(Command::Sort(Sort::Usage(Resource::Memory)));
    assert_eq!(names(&state), ["big", "busy"]);
    assert!(screen(&state, 80, 24)[2].starts_with(">podman big"));
    state.obey(Command::Sort(Sort::Usage(Resource::Disk)));
    assert_eq!(names(&state), ["big", "busy"], "what is not known comes last");
    assert!(screen(&state, 80, 24)[3].contains("–"));
    state.obey(Command::Sort(Sort::Launches));
    assert_eq!(names(&state), ["busy", "big"]);
    // It goes: the first is chosen.
    state.take(live(1, vec![busy]));
    assert_eq!(state.selected(), Some(0));
    for moved in [isize::MIN, isize::MAX, -1, 1] {
        state.obey(Command::Move(moved));
        assert_eq!(state.selected(), Some(0));
    }
    state.take(live(2, Vec::new()));
    state.obey(Command::Move(1));
    assert_eq!(state.selected(), None);
    line_with(&screen(&state, 80, 24), "nothing runs");
}

#[test]
fn a_long_list_says_how_much_is_below_and_follows_the_chosen_one() {
    let mut state = State::new();
    let many = (0..30).map(|at| container(Tool::Docker, &format!("c{at:02}"), at + 1, 30.0 - at as f64)).collect();
    state.take(live(0, many));
    let lines = screen(&state, 80, 24);
    assert!(lines[2].contains("c00") && lines[10].contains("c08"), "{}", lines.join("\n"));
    assert_eq!(lines[12], "  … 20 more below");
    state.obey(Command::Move(isize::MAX));
    let lines = screen(&state, 80, 24);
    assert!(lines[12].starts_with(">docker c29"), "{}", lines.join("\n"));
}

#[test]
fn a_service_keeps_its_history_when_another_generation_serves() {
    let mut state = host();
    state.take(live(60, vec![generation(4, Role::Owner, 50.0), generation(3, Role::Parked, 0.0)]));
    let serving = state.containers().next().expect("a line").clone();
    assert_eq!(serving.generation, Some(Generation(4)));
    let used = state.history(&serving).expect("a history").used.len();
    assert_eq!(used, 61);
    line_with(&screen(&state, 80, 24), " shop g3 parked");
}

#[test]
fn what_happens_is_told_in_order() {
    let mut state = host();
    let told = vec![
        news(1, NewsKind::HandoverBegan, "handover 7 begins"),
        news(2, NewsKind::Committed, "handover 7 from g3 to g4 committed, blackout 92 µs"),
        news(3, NewsKind::OomKill, "a process was killed for want of memory"),
    ];
    with_news(&mut state, told);
    let lines = screen(&state, 80, 24);
    assert_eq!(lines[19], " 22:13:21 shop handover 7 begins");
    assert_eq!(lines[20], " 22:13:21 shop handover 7 from g3 to g4 committed, blackout 92 µs");
    assert_eq!(lines[21], " 22:13:21 shop a process was killed for want of memory");
    let more = (4..50).map(|id| news(id, NewsKind::Trouble, &format!("trouble {id} {}", "x".repeat(200)))).collect();
    with_news(&mut state, more);
    let lines = screen(&state, 80, 24);
    assert!(lines[22].starts_with(" 22:13:21 shop trouble 49 xxx") && lines[22].ends_with('…'), "{}", lines[22]);
}

#[test]
fn an_agent_that_is_gone_or_silent_is_said_to_be() {
    let mut state = host();
    let lines = screen_after(&state, 80, 24, Duration::from_secs(9));
    assert_eq!(lines[0], "warmswap top  the agent has told nothing for 9 s");
    state.gone = Some("no agent answers".into());
    let lines = screen(&state, 80, 24);
    assert!(lines[0].starts_with("warmswap top  the agent is gone: no agent answers; trying again"), "{}", lines[0]);
    assert!(lines[2].contains("docker web"), "what was known stays");
    state.take(live(61, Vec::new()));
    assert!(screen(&state, 80, 24)[0].starts_with("warmswap top  0 services"));
    let mut state = State::new();
    line_with(&screen(&state, 80, 24), "Waiting for the first second.");
    state.gone = Some("it ended".into());
    line_with(&screen(&state, 80, 24), "it ended Trying again");
}

#[test]
fn what_the_probes_cost_and_lose_is_in_the_last_line() {
    let mut state = host();
    let mut next = live(60, Vec::new());
    next.probes.kernel = Some(KernelCost { cpu: 0.456, runs_per_s: 12_345.0, ns_per_run: 37.0, empty_ns: 27.0 });
    state.take(next.clone());
    let lines = screen(&state, 80, 24);
    assert!(lines[23].starts_with(" 21 probes, kernel 0.46 % CPU, reading 0.02 % CPU, 34.0 events/s"), "{}", lines[23]);
    next.probes.kernel = None;
    next.probes.off = 2;
    next.probes.dropped = vec![Dropped { class: "tcp".into(), now: 0, total: 17 }];
    state.take(next.clone());
    let lines = screen(&state, 80, 24);
    assert!(lines[23].starts_with(" 17 tcp events LOST, 21 probes (2 off), reading 0.02 % CPU"), "{}", lines[23]);
    next.probes = ProbeCost::default();
    state.take(next);
    assert!(screen(&state, 80, 24)[23].starts_with(" no probes: nothing is counted here"));
}

#[test]
fn help_opens_and_closes_before_esc_leaves() {
    let mut state = host();
    assert!(state.obey(Command::Help) && state.help);
    let lines = screen(&state, 80, 24);
    line_with(&lines, "q Esc Ctrl-C");
    assert!(!lines.iter().any(|line| line.contains("docker")));
    assert!(state.obey(Command::Close) && !state.help);
    assert!(!state.obey(Command::Close));
    assert!(!state.obey(Command::Quit));
}
