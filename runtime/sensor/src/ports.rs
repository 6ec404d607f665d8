//! Services whose programs bind their own ports: see `ebpf/probes/src/ports.rs`.

use std::collections::BTreeMap;
use std::fs::File;

use aya::maps::{Array, MapData};
use aya::programs::cgroup_sock_addr::CgroupSockAddrLink;
use aya::programs::{CgroupAttachMode, CgroupSockAddr, Program};
use warmswap_events::PORT_REFUSED;
use warmswap_model::CgroupId;

use crate::{Result, Sensor, SensorError, host, load};

/// The programs, loaded with the others and attached to one cgroup at a time.
const PROGRAMS: [&str; 2] = ["share_port_v4", "share_port_v6"];

/// Attachments end with this process, as all of ours do: what a program has bound stays bound.
#[derive(Default)]
pub(crate) struct Ports {
    links: BTreeMap<CgroupId, Vec<CgroupSockAddrLink>>,
}

impl Sensor {
    /// From now on, processes of this v2 cgroup may bind TCP ports that others of it have bound. Does nothing when it is
    /// so already.
    ///
    /// # Errors
    /// When the kernel does not take the programs, or the cgroup is gone.
    pub fn share_ports(&mut self, cgroup: CgroupId) -> Result<()> {
        if self.ports.links.contains_key(&cgroup) {
            return Ok(());
        }
        let failed = |problem: String| SensorError::Ports { cgroup, problem };
        let root = self.mounts.v2.as_ref().ok_or_else(|| failed("no cgroup v2 hierarchy is mounted".into()))?;
        let path = host::cgroup_path(root, cgroup).map_err(|error| failed(error.to_string()))?;
        let mut links = Vec::with_capacity(PROGRAMS.len());
        for name in PROGRAMS {
            let Some(Program::CgroupSockAddr(program)) = self.loaded.object.program_mut(name) else {
                return Err(failed(format!("the object has no program {name}")));
            };
            let folder = File::open(&path).map_err(|error| failed(format!("{}: {error}", path.display())))?;
            links.push(attach(program, folder).map_err(failed)?);
        }
        self.ports.links.insert(cgroup, links);
        Ok(())
    }

    /// Ends what [`Self::share_ports`] began. Sockets that are bound stay as they are.
    pub fn unshare_ports(&mut self, cgroup: CgroupId) {
        self.ports.links.remove(&cgroup);
    }

    /// How many sockets the kernel did not let share their port since [`Self::load`]; Linux before 6.1 lets none.
    ///
    /// # Errors
    /// When the kernel does not let us read it.
    pub fn ports_refused(&self) -> Result<u64> {
        let name = warmswap_events::map::PORTS;
        let map = self.loaded.object.map(name).ok_or(SensorError::MapMissing { name })?;
        let counts: Array<&MapData, u64> =
            Array::try_from(map).map_err(|source| SensorError::MapUpdate { name, source })?;
        counts.get(&PORT_REFUSED, 0).map_err(|source| SensorError::MapUpdate { name, source })
    }
}

fn attach(program: &mut CgroupSockAddr, folder: File) -> std::result::Result<CgroupSockAddrLink, String> {
    // A link is one of many by nature; the flag for "many" is for attachments without a link, and refused here.
    let link = program.attach(folder, CgroupAttachMode::Single).and_then(|id| program.take_link(id));
    link.map_err(|error| load::refusal(&error))
}
