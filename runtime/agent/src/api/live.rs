//! What `warmswap top` shows: a snapshot a second, made from what the agent's tick has anyway.

use std::fmt;

use serde::{Deserialize, Serialize};
use warmswap_handover::Role;
use warmswap_model::{CgroupId, DemandVector, Generation, PerResource};

use super::EventAccount;

/// What created a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tool {
    /// This agent.
    Warmswap,
    Docker,
    /// containerd, for Kubernetes or nerdctl.
    Containerd,
    Crio,
    /// Some runtime, for Kubernetes.
    Kubernetes,
    Podman,
    Lxc,
    Nspawn,
    /// A virtual machine or container of libvirt.
    Libvirt,
    /// Its id looks like a container's, its place is nobody's that is known here.
    Container,
    /// A cgroup that somebody made by hand.
    Cgroup,
}

impl Tool {
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Warmswap => "warmswap",
            Self::Docker => "docker",
            Self::Containerd => "containerd",
            Self::Crio => "cri-o",
            Self::Kubernetes => "kubernetes",
            Self::Podman => "podman",
            Self::Lxc => "lxc",
            Self::Nspawn => "nspawn",
            Self::Libvirt => "libvirt",
            Self::Container => "container",
            Self::Cgroup => "cgroup",
        }
    }
}

impl fmt::Display for Tool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A container that something else than this agent started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    pub tool: Tool,
    /// As its tool calls it where that can be read without asking it, else the beginning of its id.
    pub name: String,
    /// Empty when its tool gives it a name instead.
    pub id: String,
    /// Of its cgroup, below the root of the v2 hierarchy.
    pub path: String,
}

impl Container {
    /// Whether somebody who says `what` means this one: its name, or at least three digits that its id begins with.
    #[must_use]
    pub fn is(&self, what: &str) -> bool {
        self.name == what || (what.len() >= 3 && self.id.starts_with(what))
    }
}

/// One second of the host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Live {
    /// Wall clock at its end, Unix ms.
    pub unix_ms: u64,
    /// Its length, s. All rates are over all of it, also of what came or went meanwhile.
    pub seconds: f64,
    pub cpus: u32,
    pub containers: Vec<LiveContainer>,
    /// Containers that are known, but that the probes have no place for.
    pub unwatched: usize,
    pub probes: ProbeCost,
    /// What happened since the last snapshot; in the first one, what is still remembered.
    pub news: Vec<News>,
}

/// One container: a generation of a service, or what another tool started.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LiveContainer {
    pub tool: Tool,
    /// Of the service or the container.
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<Generation>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<Role>,
    /// Of the cgroup of another tool's container, below the root of the v2 hierarchy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    pub cgroup: CgroupId,
    /// Absent: not known here (no probes, or no memory controller for its cgroup).
    pub usage: PerResource<Option<f64>>,
    /// Programs started (exec).
    pub launches_per_s: f64,
    /// Reads from terminals and input devices.
    pub inputs_per_s: f64,
    pub requests_per_s: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub p99_us: Option<f64>,
    /// Processes killed for want of memory, in this second.
    pub oom_kills: u64,
    /// What the owner of a service is expected to need.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub demand: Option<DemandVector>,
    /// What the service does, if it is not just serving, or what is wrong with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    #[serde(default)]
    pub trouble: bool,
    /// It ended in this second.
    #[serde(default)]
    pub ended: bool,
}

/// What watching costs, and what it yields.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct ProbeCost {
    pub attached: usize,
    pub off: usize,
    /// CPU time of the thread that reads the events, by its own clock: % of one CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reading_cpu: Option<f64>,
    /// Events that probes sent, a second.
    pub events_per_s: f64,
    /// Events lost in the second, and since the agent started, of the classes that lost any.
    pub dropped: Vec<Dropped>,
    /// Only when asked for, because measuring it costs more than what is measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<KernelCost>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    pub class: String,
    pub now: u64,
    pub total: u64,
}

/// The probes' run time as the kernel measures it, without what measuring adds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct KernelCost {
    /// % of one CPU.
    pub cpu: f64,
    pub runs_per_s: f64,
    pub ns_per_run: f64,
    /// What the kernel reports for a program that does nothing, taken off each run; 0 when it could not be measured.
    pub empty_ns: f64,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct News {
    /// Counts up.
    pub id: u64,
    pub unix_ms: u64,
    pub kind: NewsKind,
    /// The service or container.
    pub of: String,
    pub text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NewsKind {
    /// A service or container came or went.
    Came,
    Went,
    HandoverBegan,
    Committed,
    /// Rolled back, aborted, or it could not even begin.
    Refused,
    Trouble,
    Recovered,
    OomKill,
}

impl ProbeCost {
    /// From two readings of the accounts, `seconds` apart.
    pub(crate) fn account(&mut self, before: &[EventAccount], after: &[EventAccount], seconds: f64) {
        let earlier = |class: &str| before.iter().find(|account| account.class == class);
        let sent =
            after.iter().map(|now| now.emitted - earlier(&now.class).map_or(0, |then| then.emitted).min(now.emitted));
        self.events_per_s = sent.sum::<u64>() as f64 / seconds.max(1e-3);
        let lost = after.iter().filter(|account| account.dropped > 0).map(|now| Dropped {
            class: now.class.clone(),
            now: now.dropped.saturating_sub(earlier(&now.class).map_or(0, |then| then.dropped)),
            total: now.dropped,
        });
        self.dropped = lost.collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_counted_since_the_last_reading_and_losses_are_named() {
        let account = |class: &str, emitted, dropped| EventAccount {
            class: class.into(),
            emitted,
            consumed: emitted - dropped,
            discarded: 0,
            dropped,
            shed: 0,
        };
        let mut cost = ProbeCost::default();
        cost.account(
            &[account("exec", 10, 0), account("tcp", 5, 1)],
            &[account("exec", 30, 0), account("tcp", 9, 3)],
            2.0,
        );
        assert_eq!(cost.events_per_s, 12.0);
        assert_eq!(cost.dropped, [Dropped { class: "tcp".into(), now: 2, total: 3 }]);
    }

    #[test]
    fn a_container_is_found_by_name_and_by_the_beginning_of_its_id() {
        let container = Container { tool: Tool::Docker, name: "web".into(), id: "3f2a91".into(), path: String::new() };
        assert!(container.is("web") && container.is("3f2") && container.is("3f2a91"));
        assert!(!container.is("3f") && !container.is("we") && !container.is(""));
    }
}
