//! What `top` knows and what is selected: no terminal, no clock.

use std::collections::{BTreeMap, VecDeque};

use warmswap_agent::api::{Live, LiveContainer, News, Role, Tool};
use warmswap_model::{PerResource, Quantiles, Resource};

/// Seconds of history per container.
pub(super) const SECONDS_KEPT: usize = 300;
const NEWS_KEPT: usize = 100;

/// What the table is ordered by, highest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sort {
    Usage(Resource),
    Launches,
    Input,
}

impl Sort {
    fn of(self, container: &LiveContainer) -> f64 {
        match self {
            Self::Usage(resource) => container.usage[resource].unwrap_or(-1.0),
            Self::Launches => container.launches_per_s,
            Self::Input => container.inputs_per_s,
        }
    }
}

/// One line of the table over time: a service keeps its history when another generation serves.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    tool: Tool,
    name: String,
    /// Of a generation that does not serve, or of a container: 0 for a service.
    cgroup: u64,
}

impl Key {
    pub(super) fn of(container: &LiveContainer) -> Self {
        let service = container.tool == Tool::Warmswap && matches!(container.role, None | Some(Role::Owner));
        Self {
            tool: container.tool,
            name: container.name.clone(),
            cgroup: if service { 0 } else { container.cgroup.0 },
        }
    }
}

/// What was forecast for a second that comes or came.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Expected {
    pub(super) unix_ms: u64,
    pub(super) quantiles: PerResource<Quantiles>,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct History {
    /// Time and use, oldest first.
    pub(super) used: VecDeque<(u64, PerResource<Option<f64>>)>,
    pub(super) expected: VecDeque<Expected>,
}

impl History {
    pub(super) fn of(&self, resource: Resource) -> impl DoubleEndedIterator<Item = Option<f64>> + '_ {
        self.used.iter().map(move |(_, used)| used[resource])
    }
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) live: Option<Live>,
    /// Of `live`, in the order shown.
    pub(super) order: Vec<usize>,
    pub(super) histories: BTreeMap<Key, History>,
    pub(super) news: VecDeque<News>,
    pub(super) sort: Sort,
    selected: Option<Key>,
    pub(super) help: bool,
    /// Why there is no agent.
    pub(super) gone: Option<String>,
}

/// What a key does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    Sort(Sort),
    /// Lines down; up when negative.
    Move(isize),
    Help,
    Close,
    Quit,
}

impl State {
    pub(super) fn new() -> Self {
        Self {
            live: None,
            order: Vec::new(),
            histories: BTreeMap::new(),
            news: VecDeque::new(),
            sort: Sort::Usage(Resource::Cpu),
            selected: None,
            help: false,
            gone: None,
        }
    }

    /// A second has passed.
    pub(super) fn take(&mut self, mut live: Live) {
        self.gone = None;
        // A new agent remembers what an old one did not tell; an old one tells nothing twice.
        for news in live.news.drain(..) {
            if self.news.len() == NEWS_KEPT {
                self.news.pop_front();
            }
            self.news.push_back(news);
        }
        let now = live.unix_ms;
        for container in &live.containers {
            let history = self.histories.entry(Key::of(container)).or_default();
            push(&mut history.used, (now, container.usage));
            if let Some(demand) = &container.demand {
                let unix_ms = now + (demand.horizon_s.max(0.0) * 1e3) as u64;
                push(&mut history.expected, Expected { unix_ms, quantiles: demand.quantiles });
            }
        }
        let oldest = now.saturating_sub(SECONDS_KEPT as u64 * 1000);
        self.histories.retain(|_, history| history.used.back().is_some_and(|(at, _)| *at >= oldest));
        self.live = Some(live);
        self.arrange();
    }

    /// False when it is time to leave.
    pub(super) fn obey(&mut self, command: Command) -> bool {
        match command {
            Command::Sort(sort) => {
                self.sort = sort;
                self.arrange();
            }
            Command::Move(lines) => self.go(lines),
            Command::Help => self.help = !self.help,
            Command::Close if self.help => self.help = false,
            Command::Close | Command::Quit => return false,
        }
        true
    }

    /// Where the selected one is in the order; the first when it has gone.
    pub(super) fn selected(&self) -> Option<usize> {
        let containers = &self.live.as_ref()?.containers;
        let found = self.order.iter().position(|at| Some(Key::of(&containers[*at])) == self.selected);
        found.or((!self.order.is_empty()).then_some(0))
    }

    pub(super) fn containers(&self) -> impl Iterator<Item = &LiveContainer> {
        let containers = self.live.as_ref().map(|live| &live.containers);
        self.order.iter().filter_map(move |at| containers?.get(*at))
    }

    pub(super) fn history(&self, container: &LiveContainer) -> Option<&History> {
        self.histories.get(&Key::of(container))
    }

    fn go(&mut self, lines: isize) {
        let Some(at) = self.selected() else { return };
        let to = at.saturating_add_signed(lines).min(self.order.len() - 1);
        let chosen = self.containers().nth(to).map(Key::of);
        self.selected = chosen;
    }

    fn arrange(&mut self) {
        let Some(live) = &self.live else { return };
        let mut order: Vec<usize> = (0..live.containers.len()).collect();
        let sort = self.sort;
        order.sort_by(|a, b| {
            let (a, b) = (&live.containers[*a], &live.containers[*b]);
            // To what is shown, so that lines do not swap places for nothing.
            let shown = |container| (sort.of(container) * 10.0).round();
            let names = || (a.tool, &a.name, a.generation, a.cgroup).cmp(&(b.tool, &b.name, b.generation, b.cgroup));
            shown(b).total_cmp(&shown(a)).then_with(names)
        });
        self.order = order;
    }
}

fn push<T>(queue: &mut VecDeque<T>, value: T) {
    if queue.len() == SECONDS_KEPT {
        queue.pop_front();
    }
    queue.push_back(value);
}
