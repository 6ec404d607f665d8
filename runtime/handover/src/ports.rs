//! The ports that programs bind by themselves in the network namespace of their service.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;

use warmswap_backend::ContainerState;
use warmswap_model::{Generation, Rung};

use crate::attempt::Attempt;
use crate::supervisor::Supervisor;

/// `TCP_LISTEN` as `/proc/net/tcp` writes it.
const LISTENING: &str = "0A";

/// The sockets that listen at each port, by their inodes, as seen by a process of the service.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Ports(BTreeMap<u16, BTreeSet<u64>>);

impl Ports {
    pub(crate) fn seen_by(pid: u32) -> Self {
        let read = |table: &str| fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
        Self::parse(&format!("{}{}", read("tcp"), read("tcp6")))
    }

    /// Lines of `/proc/net/tcp` and `/proc/net/tcp6`.
    fn parse(tables: &str) -> Self {
        let mut ports: BTreeMap<u16, BTreeSet<u64>> = BTreeMap::new();
        for line in tables.lines() {
            let fields: Vec<&str> = line.split_ascii_whitespace().take(10).collect();
            let [_, local, _, LISTENING, .., inode] = fields[..] else { continue };
            let port = local.rsplit(':').next().and_then(|port| u16::from_str_radix(port, 16).ok());
            if let (Some(port), Ok(inode)) = (port, inode.parse()) {
                ports.entry(port).or_default().insert(inode);
            }
        }
        Self(ports)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The ports at which no socket listens now that did not listen before. Which of the earlier ones have gone
    /// meanwhile does not matter: a generation that drains closes its own.
    pub(crate) fn not_joined(before: &Self, now: &Self) -> Vec<u16> {
        let joined = |port: &u16, known: &BTreeSet<u64>| now.0.get(port).is_some_and(|now| !now.is_subset(known));
        before.0.iter().filter(|(port, known)| !joined(port, known)).map(|(port, _)| *port).collect()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ports: Vec<String> = self.0.keys().map(u16::to_string).collect();
        f.write_str(&ports.join(", "))
    }
}

impl Supervisor {
    /// Of a program that does not link the SDK and listens at these ports by itself.
    pub(crate) fn rung_of_a_stranger(&self, ports: &Ports) -> Rung {
        match self.conditions.ports_shared(self.service()) {
            _ if !self.ground.listeners.is_empty() => Rung::Listeners,
            Ok(()) if !ports.is_empty() => Rung::Ports,
            _ => Rung::None,
        }
    }

    /// In words, what becomes of state and connections.
    pub(crate) fn what_a_stranger_loses(&self, attempt: &Attempt) -> Vec<String> {
        let stored = self.stores.get(&attempt.to).filter(|stored| !stored.is_empty());
        let state = "state in memory does not move";
        let state = stored.map_or_else(|| state.into(), |stored| format!("{state}, except for {stored}"));
        let from = attempt.from;
        let connections = if attempt.rung == Rung::None {
            let why = self.conditions.ports_shared(self.service()).err();
            let why = why.unwrap_or_else(|| format!("it has none, and {from} listens at no port by itself"));
            format!("connections, because no listener moves: {why}")
        } else {
            format!("connections established with {from} end when it has drained")
        };
        vec![state, connections]
    }

    /// The ports at which programs of the service listen by themselves, as one of its generations sees them.
    pub(crate) fn ports_of(&self, generation: Generation) -> Ports {
        match self.backend.state(&self.container(generation)) {
            Ok(ContainerState::Running { pid }) => Ports::seen_by(pid),
            _ => Ports::default(),
        }
    }

    /// Where only the old generation listens, when the new one has to bind the same ports.
    pub(crate) fn ports_left(&self, attempt: &Attempt) -> Vec<String> {
        let left = Ports::not_joined(&attempt.ports, &self.ports_of(attempt.to));
        let left = left.into_iter().filter(|_| attempt.rung == Rung::Ports);
        left.map(|port| format!("{} does not listen at port {port}", attempt.to)).collect()
    }

    /// Whether the new generation, which has to bind the ports of the old one, has bound none of them.
    pub(crate) fn joined_no_port(&self, attempt: &Attempt) -> bool {
        attempt.rung == Rung::Ports
            && Ports::not_joined(&attempt.ports, &self.ports_of(attempt.to)).len() == attempt.ports.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str =
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";

    fn line(local: &str, state: &str, inode: u64) -> String {
        format!(
            "   0: {local} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000     0        0 {inode} 1 1\n"
        )
    }

    #[test]
    fn a_port_is_joined_when_another_socket_listens_at_it() {
        let eighty = |inode| line("0100007F:0050", LISTENING, inode);
        let six = line("00000000000000000000000001000000:1F90", LISTENING, 2);
        let connected = line("0100007F:0051", "01", 3);
        let before = Ports::parse(&format!("{HEAD}{}{connected}{HEAD}{six}", eighty(1)));
        assert_eq!(before.0, BTreeMap::from([(80, BTreeSet::from([1])), (8080, BTreeSet::from([2]))]));
        assert_eq!(Ports::not_joined(&before, &before), [80, 8080]);
        let now = Ports::parse(&format!("{HEAD}{}{}{HEAD}{six}", eighty(1), eighty(4)));
        assert_eq!(Ports::not_joined(&before, &now), [8080]);
        // The old one has gone already.
        assert_eq!(Ports::not_joined(&before, &Ports::parse(&eighty(4))), [8080]);
        assert!(Ports::parse(HEAD).is_empty());
    }
}
