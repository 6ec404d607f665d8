//! Containers that other tools started: found in the cgroup v2 hierarchy, watched as far as there are places.
//!
//! A container's cgroup, and whatever it makes below, is one container; one inside another counts for itself, and not for
//! the outer one. On hybrid hosts the tools that know v1 only leave their processes in the root of v2: these cannot be
//! told from the host's own (`warmswap check` says so). runc 1.1 makes a v2 group there too.

mod check;
mod others;
mod path;
mod tree;

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::eventfd::EventFd;
use warmswap_model::{CgroupId, Generation, ServiceName};
use warmswap_sensor::CgroupMounts;

use crate::api::{Container, NewsKind, Tool};
use crate::lock;
use crate::shared::Shared;
pub use check::{OtherContainers, check_other_containers};
pub(crate) use others::{Others, Shown};
use path::{Place, place};
use tree::{Change, Tree};

/// A round in which something came or went costs so much of a credit that grows with time: a few may follow each other at
/// once, but whoever makes groups without end does not have us run without end.
const ROUND: Duration = Duration::from_millis(5);
const CREDIT_MAX: Duration = Duration::from_millis(200);
/// Groups that have gone and whose parents are still known; as long as events of theirs may come.
const GONE_MAX: usize = 4096;

/// Who did something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Whose {
    Service(ServiceName, Option<Generation>),
    Other(Container),
}

/// Which cgroup is in which.
#[derive(Debug, Default)]
pub(crate) struct Lineage {
    parents: BTreeMap<CgroupId, CgroupId>,
    gone: VecDeque<CgroupId>,
}

impl Lineage {
    fn came(&mut self, id: CgroupId, parent: CgroupId) {
        self.parents.insert(id, parent);
    }

    fn went(&mut self, id: CgroupId) {
        if self.gone.len() == GONE_MAX
            && let Some(oldest) = self.gone.pop_front()
        {
            self.parents.remove(&oldest);
        }
        self.gone.push_back(id);
    }

    /// A group and those around it, the innermost first.
    fn of(&self, cgroup: CgroupId) -> impl Iterator<Item = CgroupId> {
        std::iter::successors(Some(cgroup), |id| self.parents.get(id).copied()).take(32)
    }
}

#[derive(Debug)]
pub(crate) struct Containers {
    mounts: CgroupMounts,
    lineage: Mutex<Lineage>,
    /// Ends the thread's waiting; `None` when there is none to be had, and then nothing is followed.
    wake: Option<EventFd>,
}

impl Containers {
    pub(crate) fn new() -> Self {
        // When that fails, the sensor has said so.
        let mounts = CgroupMounts::of_host().unwrap_or_default();
        Self { mounts, lineage: Mutex::default(), wake: EventFd::new().ok() }
    }

    /// The agent ends.
    pub(crate) fn wake(&self) {
        // Fails only when it has been woken already.
        let _ = self.wake.as_ref().map(|wake| wake.write(1));
    }

    /// A group and those around it, the innermost first.
    pub(crate) fn lineage(&self, cgroup: CgroupId) -> Vec<CgroupId> {
        lock(&self.lineage).of(cgroup).collect()
    }

    /// From the hierarchy that has the memory controller; `None` when the container has no group there.
    pub(crate) fn memory_mb(&self, container: &Container) -> Option<f64> {
        let (root, file) = match &self.mounts.v1_memory {
            Some(v1) => (v1, "memory.usage_in_bytes"),
            None => (self.mounts.v2.as_ref()?, "memory.current"),
        };
        let file = root.join(&container.path).join(file);
        let bytes: u64 = std::fs::read_to_string(file).ok()?.trim().parse().ok()?;
        Some(bytes as f64 / f64::from(1 << 20))
    }
}

/// Follows the tree until `stop`.
pub(crate) fn run(shared: &Shared, stop: &AtomicBool) {
    let Containers { mounts, wake, .. } = &shared.containers;
    let (Some(root), Some(wake)) = (&mounts.v2, wake) else { return };
    let mut tree = match Tree::new(root) {
        Ok(tree) => tree,
        Err(error) => {
            tracing::warn!("containers of other tools are not seen: cannot look at {}: {error}", root.display());
            return;
        }
    };
    let mut credit = Credit { left: CREDIT_MAX, at: Instant::now() };
    while !stop.load(Ordering::Relaxed) {
        let changes = tree.wait(wake.as_fd());
        let pause = if changes.is_empty() { None } else { credit.spend(Instant::now()) };
        for change in changes {
            match change {
                Change::Came { id, parent, path } => {
                    // Before it is watched, so that its first event finds it.
                    lock(&shared.containers.lineage).came(id, parent);
                    came(shared, id, path);
                }
                Change::Went { id } => {
                    went(shared, id);
                    lock(&shared.containers.lineage).went(id);
                }
            }
        }
        pause.into_iter().for_each(std::thread::sleep);
    }
}

/// What [`ROUND`] is about.
struct Credit {
    left: Duration,
    at: Instant,
}

impl Credit {
    /// How long to wait when there is none left.
    fn spend(&mut self, now: Instant) -> Option<Duration> {
        self.left = (self.left + now.duration_since(self.at)).min(CREDIT_MAX);
        self.at = now;
        match self.left.checked_sub(ROUND) {
            Some(left) => {
                self.left = left;
                None
            }
            None => Some(ROUND),
        }
    }
}

fn came(shared: &Shared, cgroup: CgroupId, path: String) {
    let Place::Container { tool, name, id } = place(&path) else { return };
    let name = name_given(tool, &id).unwrap_or(name);
    if tool != Tool::Cgroup {
        shared.live.tell(NewsKind::Came, &name, format!("{tool} container came"));
    }
    shared.observatory.come(cgroup, Container { tool, name, id, path });
}

fn went(shared: &Shared, cgroup: CgroupId) {
    let Some(container) = shared.observatory.leave(cgroup) else { return };
    if container.tool != Tool::Cgroup {
        shared.live.tell(NewsKind::Went, &container.name, format!("{} container went", container.tool));
    }
}

/// The name that a person gave a container, from the files of its tool. It is not asked: it may be busy, or old.
fn name_given(tool: Tool, id: &str) -> Option<String> {
    match tool {
        Tool::Docker => {
            let file = Path::new("/var/lib/docker/containers").join(id).join("config.v2.json");
            docker_name(&std::fs::read_to_string(file).ok()?)
        }
        Tool::Podman => {
            let file = "/var/lib/containers/storage/overlay-containers/containers.json";
            podman_name(&std::fs::read_to_string(file).ok()?, id)
        }
        _ => None,
    }
}

fn docker_name(text: &str) -> Option<String> {
    let document: serde_json::Value = serde_json::from_str(text).ok()?;
    clean(document["Name"].as_str()?.trim_start_matches('/'))
}

fn podman_name(text: &str, id: &str) -> Option<String> {
    let document: serde_json::Value = serde_json::from_str(text).ok()?;
    let ours = document.as_array()?.iter().find(|container| container["id"] == id)?;
    clean(ours["names"][0].as_str()?)
}

/// What would move the cursor is no name.
fn clean(name: &str) -> Option<String> {
    (!name.is_empty() && !name.chars().any(char::is_control)).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_in_those_around_it_also_when_it_has_gone() {
        let mut lineage = Lineage::default();
        lineage.came(CgroupId(2), CgroupId(1));
        lineage.came(CgroupId(3), CgroupId(2));
        lineage.went(CgroupId(3));
        assert_eq!(lineage.of(CgroupId(3)).collect::<Vec<_>>(), [CgroupId(3), CgroupId(2), CgroupId(1)]);
        for id in 0..GONE_MAX as u64 {
            lineage.came(CgroupId(100 + id), CgroupId(1));
            lineage.went(CgroupId(100 + id));
        }
        assert_eq!(lineage.of(CgroupId(3)).collect::<Vec<_>>(), [CgroupId(3)]);
        assert_eq!(lineage.parents.len(), GONE_MAX + 1);
        // Whoever claims to be in itself does not hang us.
        lineage.came(CgroupId(9), CgroupId(9));
        assert_eq!(lineage.of(CgroupId(9)).count(), 32);
    }

    #[test]
    fn a_burst_is_followed_at_once_and_a_flood_is_not() {
        let begin = Instant::now();
        let mut credit = Credit { left: CREDIT_MAX, at: begin };
        let at_once = (0..100).take_while(|_| credit.spend(begin).is_none()).count();
        assert_eq!(at_once, 40);
        assert_eq!(credit.spend(begin + ROUND), None);
        assert_eq!(credit.spend(begin + ROUND), Some(ROUND));
        let later = begin + Duration::from_secs(60);
        assert_eq!((0..100).take_while(|_| credit.spend(later).is_none()).count(), 40);
    }

    #[test]
    fn names_come_from_the_files_of_the_tools() {
        assert_eq!(docker_name(r#"{"ID":"3f","Name":"/web"}"#), Some("web".into()));
        assert_eq!(docker_name(r#"{"Name":"/a\u001b[2J"}"#), None);
        assert_eq!(docker_name("{"), None);
        let podman = r#"[{"id":"aa","names":["db","x"]},{"id":"bb"}]"#;
        assert_eq!(podman_name(podman, "aa"), Some("db".into()));
        assert_eq!(podman_name(podman, "bb"), None);
    }
}
