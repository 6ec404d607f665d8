//! What can go wrong with the sensor as a whole. A single probe that fails is no error: see [`crate::ProbeStatus`].

use warmswap_model::CgroupId;

use crate::btf::BtfError;

#[derive(Debug, thiserror::Error)]
pub enum SensorError {
    #[error("this binary was built without its BPF programs (AYA_BUILD_SKIP); build it again without that variable")]
    NoPrograms,
    #[error(transparent)]
    Btf(#[from] BtfError),
    #[error("cannot read how many CPUs this host can have from {path}")]
    Cpus {
        path: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot load the BPF maps: root (or CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN) and Linux 5.10 are needed")]
    Load {
        #[source]
        source: Box<aya::EbpfError>,
    },
    #[error("the BPF object has no map {name}, or one of another kind")]
    MapMissing { name: &'static str },
    #[error("cannot map the BPF map {name} into memory")]
    MapMemory {
        name: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot change the BPF map {name}")]
    MapUpdate {
        name: &'static str,
        #[source]
        source: aya::maps::MapError,
    },
    #[error("cannot watch cgroup {cgroup}: all {watched_max} places are taken; raise `watched_max`")]
    TooManyWatched { cgroup: CgroupId, watched_max: u32 },
    #[error("programs of cgroup {cgroup} cannot share their ports: {problem}")]
    Ports { cgroup: CgroupId, problem: String },
    #[error("{what} = {value} is not usable: {range}")]
    Config { what: &'static str, value: u64, range: &'static str },
    #[error("cannot read what the probes say")]
    ProbeLog {
        #[source]
        source: aya_log::Error,
    },
    #[error("the kernel does not measure the run time of BPF programs; that needs Linux 5.8 and CAP_SYS_ADMIN")]
    Statistics {
        #[source]
        source: std::io::Error,
    },
    #[error("cannot start the threads that read events")]
    Thread {
        #[source]
        source: std::io::Error,
    },
}
