//! Containers of other tools, and which of them have a place among what the probes count.
//!
//! Services come first: they take a place from whoever is here least on purpose, a group made by hand, the youngest first.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use warmswap_model::{CgroupId, FeatureWindow};
use warmswap_sensor::Sensor;

use crate::api::{Container, Tool};

/// Events of a container may still be read this long after it has gone.
const REMEMBERED: Duration = Duration::from_secs(10);
/// Containers that have gone and are still known. More in so short a time would be nobody's to look at.
const GONE_MAX: usize = 1024;

/// What counts: the probes, or a stand-in.
pub(crate) trait Places {
    fn is_full(&self) -> bool;
    /// Whether it is counted from now on.
    fn take(&mut self, cgroup: CgroupId) -> bool;
    fn give_back(&mut self, cgroup: CgroupId) -> Option<FeatureWindow>;
}

impl Places for Sensor {
    fn is_full(&self) -> bool {
        Sensor::is_full(self)
    }

    fn take(&mut self, cgroup: CgroupId) -> bool {
        self.watch(cgroup).inspect_err(|error| tracing::warn!("a container is not watched: {error}")).is_ok()
    }

    fn give_back(&mut self, cgroup: CgroupId) -> Option<FeatureWindow> {
        self.unwatch(cgroup)
    }
}

#[derive(Debug)]
struct Other {
    container: Container,
    /// Counts up: who came first.
    number: u64,
    watched: bool,
    /// Whether anything has ever run in it: groups that only contain others stay out of sight.
    used: bool,
}

impl Other {
    /// The lowest keeps its place longest.
    fn rank(&self) -> (bool, u64) {
        (self.container.tool == Tool::Cgroup, self.number)
    }
}

/// One to be shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shown {
    pub(crate) cgroup: CgroupId,
    pub(crate) container: Container,
    pub(crate) ended: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Others {
    all: BTreeMap<CgroupId, Other>,
    gone: VecDeque<(Instant, CgroupId, Other)>,
    /// Of those in `gone`: which went since they were shown last.
    ended: Vec<CgroupId>,
    came: u64,
}

impl Others {
    pub(crate) fn come(&mut self, places: Option<&mut impl Places>, cgroup: CgroupId, container: Container) {
        self.came += 1;
        let other = Other { container, number: self.came, watched: false, used: false };
        self.all.entry(cgroup).or_insert(other);
        if let Some(places) = places {
            self.settle(places);
        }
    }

    /// What it did last, when it was watched.
    pub(crate) fn leave(
        &mut self,
        places: Option<&mut impl Places>,
        cgroup: CgroupId,
        now: Instant,
    ) -> Option<FeatureWindow> {
        let mut other = self.all.remove(&cgroup)?;
        let last = places.and_then(|places| {
            let last = if other.watched { places.give_back(cgroup) } else { None };
            self.settle(places);
            last
        });
        other.used |= last.as_ref().is_some_and(has_run);
        self.gone.retain(|(since, ..)| now.duration_since(*since) < REMEMBERED);
        if self.gone.len() == GONE_MAX {
            self.gone.pop_front();
        }
        self.gone.push_back((now, cgroup, other));
        self.ended.push(cgroup);
        last
    }

    /// Gives every place that is free to whoever deserves it most.
    pub(crate) fn settle(&mut self, places: &mut impl Places) {
        while !places.is_full() {
            let waiting = self.all.iter_mut().filter(|(_, other)| !other.watched).min_by_key(|(_, other)| other.rank());
            let Some((cgroup, other)) = waiting else { return };
            if !places.take(*cgroup) {
                return;
            }
            other.watched = true;
        }
    }

    /// Frees a place for a service. Returns what was counted for whoever had it.
    pub(crate) fn make_room(&mut self, places: &mut impl Places) -> Option<FeatureWindow> {
        let watched = self.all.iter_mut().filter(|(_, other)| other.watched);
        let (cgroup, other) = watched.max_by_key(|(_, other)| other.rank())?;
        other.watched = false;
        places.give_back(*cgroup)
    }

    /// What was counted, to know who is at work.
    pub(crate) fn note(&mut self, window: &FeatureWindow) {
        if let Some(other) = self.all.get_mut(&window.cgroup) {
            other.used |= has_run(window);
        }
    }

    pub(crate) fn has(&self, cgroup: CgroupId) -> bool {
        self.all.contains_key(&cgroup)
    }

    pub(crate) fn find(&self, cgroup: CgroupId) -> Option<&Container> {
        let gone = || self.gone.iter().find(|(_, id, _)| *id == cgroup).map(|(.., other)| other);
        self.all.get(&cgroup).or_else(gone).map(|other| &other.container)
    }

    /// Those that are watched, or were until they ended since the last call; and how many have no place.
    pub(crate) fn show(&mut self) -> (Vec<Shown>, usize) {
        let shown =
            |cgroup: CgroupId, other: &Other, ended| Shown { cgroup, container: other.container.clone(), ended };
        let seen = |other: &&Other| other.watched && (other.used || other.container.tool != Tool::Cgroup);
        let here = self.all.iter().filter(|(_, other)| seen(other)).map(|(cgroup, other)| shown(*cgroup, other, false));
        let ended = std::mem::take(&mut self.ended);
        let gone = self.gone.iter().filter(|(_, cgroup, other)| seen(&other) && ended.contains(cgroup));
        let gone = gone.map(|(_, cgroup, other)| shown(*cgroup, other, true));
        let unwatched = self.all.values().filter(|other| !other.watched).count();
        (here.chain(gone).collect(), unwatched)
    }

    /// Nobody looks: what ended need not be shown later.
    pub(crate) fn unseen(&mut self) {
        self.ended.clear();
    }
}

fn has_run(window: &FeatureWindow) -> bool {
    window.counts.run_ns > 0 || window.counts.execs > 0 || window.counts.reads > 0
}

#[cfg(test)]
mod tests {
    use warmswap_model::ProbeCounts;

    use super::*;

    struct Few {
        max: usize,
        taken: Vec<CgroupId>,
    }

    impl Places for Few {
        fn is_full(&self) -> bool {
            self.taken.len() >= self.max
        }

        fn take(&mut self, cgroup: CgroupId) -> bool {
            self.taken.push(cgroup);
            true
        }

        fn give_back(&mut self, cgroup: CgroupId) -> Option<FeatureWindow> {
            let at = self.taken.iter().position(|taken| *taken == cgroup)?;
            self.taken.remove(at);
            Some(window(cgroup, 7))
        }
    }

    fn window(cgroup: CgroupId, run_ns: u64) -> FeatureWindow {
        FeatureWindow {
            cgroup,
            end_unix_ms: 0,
            length_ms: 1000,
            usage: Default::default(),
            counts: ProbeCounts { run_ns, ..ProbeCounts::default() },
            durations: Default::default(),
        }
    }

    fn container(tool: Tool, name: &str) -> Container {
        Container { tool, name: name.into(), id: String::new(), path: name.into() }
    }

    fn names(others: &mut Others) -> Vec<String> {
        let mut names: Vec<String> = others.show().0.into_iter().map(|shown| shown.container.name).collect();
        names.sort();
        names
    }

    #[test]
    fn places_go_to_services_then_to_tools_then_to_groups() {
        let mut places = Few { max: 2, taken: Vec::new() };
        let mut others = Others::default();
        others.come(Some(&mut places), CgroupId(1), container(Tool::Cgroup, "hand"));
        others.come(Some(&mut places), CgroupId(2), container(Tool::Docker, "web"));
        others.come(Some(&mut places), CgroupId(3), container(Tool::Cgroup, "late"));
        others.come(Some(&mut places), CgroupId(4), container(Tool::Podman, "db"));
        assert_eq!(places.taken, [CgroupId(1), CgroupId(2)]);
        assert_eq!(others.show().1, 2);

        // A service comes: the group made by hand goes, and its place is taken before anybody settles.
        assert!(others.make_room(&mut places).is_some());
        places.taken.push(CgroupId(100));
        others.settle(&mut places);
        assert_eq!(places.taken, [CgroupId(2), CgroupId(100)]);

        // The service ends: the tool's container before the older group.
        places.taken.pop();
        others.settle(&mut places);
        assert_eq!(places.taken, [CgroupId(2), CgroupId(4)]);
        assert!(others.leave(Some(&mut places), CgroupId(2), Instant::now()).is_some());
        assert_eq!(places.taken, [CgroupId(4), CgroupId(1)]);
    }

    #[test]
    fn who_ended_is_shown_once_and_known_for_a_while() {
        let mut places = Few { max: 9, taken: Vec::new() };
        let mut others = Others::default();
        others.come(Some(&mut places), CgroupId(1), container(Tool::Docker, "web"));
        others.come(Some(&mut places), CgroupId(2), container(Tool::Cgroup, "folder"));
        others.come(Some(&mut places), CgroupId(3), container(Tool::Cgroup, "worker"));
        assert_eq!(names(&mut others), ["web"], "groups in which nothing ran stay out of sight");
        others.note(&window(CgroupId(2), 0));
        others.note(&window(CgroupId(3), 5));
        assert_eq!(names(&mut others), ["web", "worker"]);
        let now = Instant::now();
        others.leave(Some(&mut places), CgroupId(1), now);
        assert_eq!(names(&mut others), ["web", "worker"]);
        assert_eq!(names(&mut others), ["worker"]);
        assert_eq!(others.find(CgroupId(1)).map(|container| container.name.as_str()), Some("web"));
        others.leave(Some(&mut places), CgroupId(3), now + REMEMBERED);
        assert_eq!(others.find(CgroupId(1)), None);
    }
}
