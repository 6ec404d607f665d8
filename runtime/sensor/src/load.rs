//! Loads the BPF object, creates its maps for this host, and attaches each program on its own.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use aya::maps::{Array, HashMap, Map, MapData, PerfEventArray};
use aya::programs::{FEntry, KProbe, Program, ProgramError, ProgramFd, RawTracePoint};
use aya::{Ebpf, EbpfLoader};
use warmswap_events::{
    CACHE_LANES, ClassAccount, Control, Counters, DISTRIBUTIONS, Histogram, Layout, Places, REQUEST_ROWS, global, map,
};

use crate::SensorConfig;
use crate::at_exit::AtExit;
use crate::btf::Btf;
use crate::catalog::{Hook, PROBES, Probe, ProbeStatus, marks_by_registers};
use crate::error::SensorError;
use crate::layout::{Need, layout_of, syscall_table};
use crate::mapped::MappedArray;
use crate::probe_log::{self, ProbeLog};
use crate::ring::Ring;
use crate::sampling::{Sampler, Tap};
use crate::walk::Walk;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/warmswap-probes"));

/// Which probes to try.
#[derive(Clone, Copy)]
pub(crate) struct Wanted<'a> {
    pub(crate) disabled: &'a [String],
}

/// The loaded object with its maps. Dropping it detaches and unloads everything.
pub(crate) struct Loaded {
    // Dropped first: links and programs go before the maps they use.
    pub(crate) object: Ebpf,
    pub(crate) probes: Vec<ProbeStatus>,
    /// `None` when input is off and marks do not need it.
    pub(crate) at_exit: Option<AtExit>,
    /// Over tasks and over connections.
    pub(crate) walks: Vec<Walk>,
    /// Over the open files of all tasks, for connections that are there already.
    pub(crate) adopt: Option<Walk>,
    /// `None` when latencies are not measured.
    pub(crate) sampler: Option<Sampler>,
    pub(crate) cpus: usize,
    pub(crate) counters: MappedArray<Counters>,
    pub(crate) histograms: Arc<MappedArray<Histogram>>,
    /// By slot, when it was asked last; see `probes::network`.
    pub(crate) asked: Array<MapData, u64>,
    /// By slot, since when it is watched.
    pub(crate) since: Arc<MappedArray<u64>>,
    pub(crate) control: Arc<MappedArray<Control>>,
    pub(crate) account: MappedArray<ClassAccount>,
    pub(crate) watched: HashMap<MapData, u64, u32>,
    pub(crate) watched_block: HashMap<MapData, u64, u32>,
    pub(crate) urgent: Option<Ring>,
    pub(crate) wakers: Option<PerfEventArray<MapData>>,
    pub(crate) bulk: Option<Ring>,
    /// Only when asked for.
    pub(crate) log: Option<ProbeLog>,
}

impl Loaded {
    /// See [`crate::Sensor::requests_measured`].
    pub(crate) fn requests_measured(&self) -> Duration {
        self.sampler.as_ref().map_or(Duration::ZERO, Sampler::measured)
    }
}

/// `Layout` belongs to another crate, so aya's marker needs a type of ours.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct LayoutGlobal(Layout);

// SAFETY: repr(C) of u32 only, so without padding.
unsafe impl aya::Pod for LayoutGlobal {}

pub(crate) const RING_URGENT_BYTES: u32 = 64 * 1024;

const CPUS_POSSIBLE: &str = "/sys/devices/system/cpu/possible";

/// One more than the highest CPU number that can appear.
pub(crate) fn cpus_possible() -> Result<u32, SensorError> {
    let text =
        std::fs::read_to_string(CPUS_POSSIBLE).map_err(|source| SensorError::Cpus { path: CPUS_POSSIBLE, source })?;
    let highest = text.trim().rsplit([',', '-']).next().and_then(|number| number.parse::<u32>().ok());
    let bad = || std::io::Error::new(std::io::ErrorKind::InvalidData, format!("{:?} is no list of CPUs", text.trim()));
    highest.map(|highest| highest + 1).ok_or_else(|| SensorError::Cpus { path: CPUS_POSSIBLE, source: bad() })
}

pub(crate) fn load(config: &SensorConfig) -> Result<Loaded, SensorError> {
    if OBJECT.is_empty() {
        return Err(SensorError::NoPrograms);
    }
    let btf = Btf::of_kernel()?;
    let layout = LayoutGlobal(layout_of(&btf));
    let cpus = cpus_possible()?;
    let slots = config.watched_max + 1;
    let own_tgid = std::process::id();
    let syscalls = syscall_table();
    let log = config.probe_log;
    let log_level = probe_log::level(log);

    let mut object = EbpfLoader::new()
        // The programs carry no relocations against kernel types: offsets are globals.
        .btf(None)
        .override_global(global::LAYOUT, &layout, true)
        .override_global(global::CPUS, &cpus, true)
        .override_global(global::OWN_TGID, &own_tgid, true)
        .override_global(global::BULK_RING_BYTES, &config.bulk_ring_bytes, true)
        .override_global(global::SYSCALLS, &syscalls[..], true)
        .override_global(probe_log::LEVEL, &log_level, true)
        .map_max_entries(map::COUNTERS, slots * cpus)
        .map_max_entries(map::HISTOGRAMS, slots * DISTRIBUTIONS)
        .map_max_entries(map::ASKED, slots)
        .map_max_entries(map::SINCE, slots)
        .map_max_entries(map::CACHE, cpus * CACHE_LANES)
        .map_max_entries(map::WATCHED, slots)
        .map_max_entries(map::WATCHED_BLOCK, slots)
        .map_max_entries(map::RING_URGENT, RING_URGENT_BYTES)
        .map_max_entries(map::RING_BULK, config.bulk_ring_bytes)
        .map_max_entries(map::SAID, probe_log::said_max(log))
        .map_max_entries(probe_log::RING, probe_log::ring_bytes(log))
        .load(OBJECT)
        .map_err(|source| SensorError::Load { source: Box::new(source) })?;

    let wanted = Wanted { disabled: &config.disabled };
    // aya's own reader, for the type ids of typed tracepoints and of the walk over tasks.
    let types = aya::Btf::from_sys_fs().inspect_err(|error| tracing::info!(%error, "no types of the kernel")).ok();
    let control = Arc::new(mapped(&mut object, map::CONTROL, 1)?);
    let histograms = Arc::new(mapped(&mut object, map::HISTOGRAMS, (slots * DISTRIBUTIONS) as usize)?);
    let since = Arc::new(mapped(&mut object, map::SINCE, slots as usize)?);
    let kernel = Kernel { btf: &btf, layout: &layout.0, types: types.as_ref(), typed: config.typed, control: &control };
    let tap = |program, tracepoint, requests| Tap {
        program,
        tracepoint,
        control: Arc::clone(&control),
        requests,
        histograms: Arc::clone(&histograms),
        watched_since: Arc::clone(&since),
        slots: slots as usize,
        very_many: config.sampled_above,
    };
    let Attached { probes, at_exit, walks, adopt, sampler } = attach_all(&mut object, &kernel, wanted, &tap);

    let (slots, cpus) = (slots as usize, cpus as usize);
    Ok(Loaded {
        probes,
        at_exit,
        walks,
        adopt,
        sampler,
        cpus,
        counters: mapped(&mut object, map::COUNTERS, slots * cpus)?,
        histograms,
        asked: array(&mut object, map::ASKED)?,
        since,
        control,
        account: mapped(&mut object, map::ACCOUNT, warmswap_events::CLASSES)?,
        watched: hash(&mut object, map::WATCHED)?,
        watched_block: hash(&mut object, map::WATCHED_BLOCK)?,
        urgent: Some(ring(&mut object, map::RING_URGENT, RING_URGENT_BYTES)?),
        wakers: Some(wakers(&mut object)?),
        bulk: Some(ring(&mut object, map::RING_BULK, config.bulk_ring_bytes)?),
        log: if log { Some(ProbeLog::of(&mut object)?) } else { None },
        object,
    })
}

fn mapped<T: crate::mapped::Words>(
    object: &mut Ebpf,
    name: &'static str,
    length: usize,
) -> Result<MappedArray<T>, SensorError> {
    match object.map(name) {
        Some(Map::Array(data)) => {
            MappedArray::new(data.fd().as_fd(), length).map_err(|source| SensorError::MapMemory { name, source })
        }
        _ => Err(SensorError::MapMissing { name }),
    }
}

fn ring(object: &mut Ebpf, name: &'static str, bytes: u32) -> Result<Ring, SensorError> {
    match object.map(name) {
        Some(Map::RingBuf(data)) => {
            Ring::new(data.fd().as_fd(), bytes as usize).map_err(|source| SensorError::MapMemory { name, source })
        }
        _ => Err(SensorError::MapMissing { name }),
    }
}

fn array(object: &mut Ebpf, name: &'static str) -> Result<Array<MapData, u64>, SensorError> {
    let map = object.take_map(name).ok_or(SensorError::MapMissing { name })?;
    Array::try_from(map).map_err(|source| SensorError::MapUpdate { name, source })
}

fn wakers(object: &mut Ebpf) -> Result<PerfEventArray<MapData>, SensorError> {
    let name = map::WAKERS;
    let map = object.take_map(name).ok_or(SensorError::MapMissing { name })?;
    PerfEventArray::try_from(map).map_err(|source| SensorError::MapUpdate { name, source })
}

fn hash(object: &mut Ebpf, name: &'static str) -> Result<HashMap<MapData, u64, u32>, SensorError> {
    let map = object.take_map(name).ok_or(SensorError::MapMissing { name })?;
    HashMap::try_from(map).map_err(|source| SensorError::MapUpdate { name, source })
}

/// What is known of the kernel as probes attach.
struct Kernel<'a> {
    btf: &'a Btf,
    layout: &'a Layout,
    types: Option<&'a aya::Btf>,
    /// See [`SensorConfig::typed`].
    typed: bool,
    control: &'a MappedArray<Control>,
}

impl Kernel<'_> {
    fn types(&self) -> Result<&aya::Btf, String> {
        self.types.ok_or_else(|| "the types of this kernel cannot be read".to_owned())
    }

    /// For typed tracepoints; `None` when they are not to be had or not wanted.
    fn types_of_arguments(&self) -> Option<&aya::Btf> {
        self.types.filter(|_| self.typed)
    }
}

/// What became of the probes, and those that do not only wait.
#[derive(Default)]
struct Attached {
    probes: Vec<ProbeStatus>,
    at_exit: Option<AtExit>,
    walks: Vec<Walk>,
    adopt: Option<Walk>,
    sampler: Option<Sampler>,
}

/// Makes a [`Tap`] of a program, its tracepoint unless it is typed, and the requests that wait.
type MakeTap<'a> = &'a dyn Fn(OwnedFd, Option<CString>, MappedArray<Places>) -> Tap;

fn attach_all(object: &mut Ebpf, kernel: &Kernel<'_>, wanted: Wanted<'_>, tap: MakeTap<'_>) -> Attached {
    let Attached { probes: mut done, mut at_exit, mut walks, mut adopt, mut sampler } = Attached::default();
    for probe in PROBES {
        let result = match probe.hook {
            _ if wanted.disabled.iter().any(|name| name == probe.name) => {
                Err("switched off by the configuration".to_owned())
            }
            _ if let Some(on) = depends_on(probe.name).filter(|on| !is_on(&done, on)) => {
                Err(format!("{on}, which it depends on, is off"))
            }
            Hook::WhileInputIsRead => attach_input(object, kernel, probe, &mut at_exit),
            Hook::Marks => attach_marks(object, kernel, &mut at_exit),
            Hook::Tasks => attach_tasks(object, kernel, probe).map(|walk| {
                walks.push(walk);
                hook_name(probe.hook)
            }),
            Hook::Connections => attach_connections(object, kernel, probe).map(|(sweep, adopter)| {
                walks.push(sweep);
                adopt = Some(adopter);
                hook_name(probe.hook)
            }),
            Hook::Segments(tracepoint) => {
                attach_segments(object, kernel, probe, tracepoint, tap).map(|(started, hook)| {
                    sampler = Some(started);
                    hook
                })
            }
            hook => attach(object, kernel, probe, &done).map(|()| hook_name(hook)),
        };
        if let Err(reason) = &result {
            tracing::info!(probe = probe.name, %reason, "probe is off");
        }
        done.push(ProbeStatus {
            name: probe.name,
            class: probe.class,
            attached: result.is_ok(),
            reason: result.as_ref().err().cloned(),
            hook: result.unwrap_or_else(|_| hook_name(probe.hook)),
        });
    }
    Attached { probes: done, at_exit, walks, adopt, sampler }
}

fn is_on(done: &[ProbeStatus], probe: &str) -> bool {
    done.iter().any(|status| status.name == probe && status.attached)
}

fn hook_name(hook: Hook) -> String {
    match hook {
        Hook::Tracepoint(name) | Hook::Segments(name) => format!("tracepoint {name}"),
        Hook::Function(name) => format!("fentry {name}"),
        Hook::Tasks => "iterator over tasks".to_owned(),
        Hook::Connections => "iterator over connections".to_owned(),
        Hook::Bind => "cgroup bind, of services".to_owned(),
        Hook::WhileInputIsRead => "tracepoint sys_exit, while input can be read".to_owned(),
        Hook::Marks => "prctl".to_owned(),
        Hook::PartOf(whole) => format!("part of {whole}"),
    }
}

fn attach_input(
    object: &mut Ebpf,
    kernel: &Kernel<'_>,
    probe: &Probe,
    at_exit: &mut Option<AtExit>,
) -> Result<String, String> {
    met((probe.needs)(kernel.layout))?;
    let loaded = at_exit.insert(AtExit::load(object, kernel.types_of_arguments())?);
    Ok(format!("{}{}", hook_name(probe.hook), if loaded.is_typed() { ", typed" } else { "" }))
}

/// Where marks are seen, the cheapest first: only calls that no kernel knows; `prctl` alone; the end of every system call.
fn attach_marks(object: &mut Ebpf, kernel: &Kernel<'_>, at_exit: &mut Option<AtExit>) -> Result<String, String> {
    const UNKNOWN: &str = "task_prctl_unknown";
    const FUNCTION: &str = "__x64_sys_prctl";
    if kernel.typed
        && kernel.btf.has_tracepoint(UNKNOWN)
        && let Some(Program::RawTracePoint(program)) = object.program_mut("unknown_prctl")
    {
        match attach_tracepoint(program, UNKNOWN) {
            Ok(()) => return Ok(hook_name(Hook::Tracepoint(UNKNOWN))),
            Err(reason) => tracing::info!(reason, "marks: no {UNKNOWN}"),
        }
    }
    met(marks_by_registers(kernel.layout))?;
    if kernel.typed
        && let Some(Program::KProbe(program)) = object.program_mut("prctl")
    {
        match attach_function(program, FUNCTION) {
            Ok(()) => return Ok(format!("kprobe {FUNCTION}")),
            Err(reason) => tracing::info!(reason, "marks: no kprobe"),
        }
    }
    let loaded = match at_exit {
        Some(loaded) => loaded,
        None => at_exit.insert(AtExit::load(object, kernel.types_of_arguments())?),
    };
    loaded.keep(object)?;
    if let [.., marks_at_exit] = kernel.control.words(0) {
        marks_at_exit.store(1, std::sync::atomic::Ordering::Relaxed);
    }
    Ok("tracepoint sys_exit".to_owned())
}

/// The walk over tasks, and what happens to them between two.
fn attach_tasks(object: &mut Ebpf, kernel: &Kernel<'_>, probe: &Probe) -> Result<Walk, String> {
    const HAPPENS: [(&str, &str); 3] = [
        ("task_moved", "cgroup_attach_task"),
        ("task_ends", "sched_process_exit"),
        ("task_gone", "sched_process_free"),
    ];
    met((probe.needs)(kernel.layout))?;
    let walk = attach_walk(object, kernel, "walk", "task", None)?;
    let all = HAPPENS.iter().try_for_each(|(name, tracepoint)| match object.program_mut(name) {
        Some(Program::BtfTracePoint(program)) => {
            program.load(tracepoint, kernel.types()?).map_err(|error| refusal(&error))?;
            program.attach().map(drop).map_err(|error| refusal(&error))
        }
        _ => Err(format!("the object has no program {name}")),
    });
    if all.is_err() {
        for (name, _) in HAPPENS {
            if let Some(Program::BtfTracePoint(program)) = object.program_mut(name) {
                // Or those before the refused one would go on being called. Fails for what is not loaded.
                let _ = program.unload();
            }
        }
    }
    all.map(|()| walk)
}

/// The sweep through connections, and what finds those that are there already.
fn attach_connections(object: &mut Ebpf, kernel: &Kernel<'_>, probe: &Probe) -> Result<(Walk, Walk), String> {
    met((probe.needs)(kernel.layout))?;
    let sweep = attach_walk(object, kernel, "sweep", "bpf_map_elem", Some(map::CONNECTIONS))?;
    Ok((sweep, attach_walk(object, kernel, "adopt", "task_file", None)?))
}

fn attach_walk(
    object: &mut Ebpf,
    kernel: &Kernel<'_>,
    name: &str,
    over: &str,
    map: Option<&str>,
) -> Result<Walk, String> {
    let map = match map.and_then(|name| object.map(name)) {
        Some(Map::HashMap(data)) => Some(data.fd().as_fd().try_clone_to_owned().map_err(|error| error.to_string())?),
        _ => None,
    };
    let Some(Program::Iter(program)) = object.program_mut(name) else {
        return Err(format!("the object has no program {name}"));
    };
    program.load(over, kernel.types()?).map_err(|error| refusal(&error))?;
    let program = program.fd().map_err(|error| refusal(&error))?;
    let attached = Walk::attach(program.as_fd(), map.as_ref().map(AsFd::as_fd));
    attached.map_err(|error| format!("the kernel refused the iterator: {error}"))
}

/// `Err` is the first that is not.
fn met(needs: impl IntoIterator<Item = Need>) -> Result<(), String> {
    needs.into_iter().find_map(|need| need.unmet()).map_or(Ok(()), Err)
}

/// The probe without which this one would count what never ends.
fn depends_on(probe: &str) -> Option<&'static str> {
    match probe {
        "tcp-traffic" => Some("tcp-state"),
        "request-latency" => Some("tcp-traffic"),
        _ => None,
    }
}

/// The typed program, or else the raw one.
fn attach_segments(
    object: &mut Ebpf,
    kernel: &Kernel<'_>,
    probe: &Probe,
    tracepoint: &str,
    tap: MakeTap<'_>,
) -> Result<(Sampler, String), String> {
    met((probe.needs)(kernel.layout))?;
    if !kernel.btf.has_tracepoint(tracepoint) {
        return Err(format!("this kernel has no tracepoint {tracepoint}"));
    }
    let hook = hook_name(probe.hook);
    let start = |object: &mut Ebpf, program, tracepoint| {
        let requests = mapped(object, map::REQUESTS, REQUEST_ROWS as usize).map_err(|error| error.to_string())?;
        Sampler::start(tap(program, tracepoint, requests)).map_err(|error| format!("it cannot be attached: {error}"))
    };
    if let Some(program) = load_typed(object, kernel, probe, tracepoint) {
        match start(object, program, None) {
            Ok(sampler) => return Ok((sampler, format!("{hook}, typed"))),
            Err(reason) => tracing::info!(probe = probe.name, reason, "typed variant refused, trying the raw one"),
        }
    }
    let name = (probe.program)(kernel.layout);
    let Some(Program::RawTracePoint(program)) = object.program_mut(name) else {
        return Err(format!("the object has no program {name}"));
    };
    program.load().map_err(|error| refusal(&error))?;
    let program = duplicate(program.fd())?;
    Ok((start(object, program, CString::new(tracepoint).ok())?, hook))
}

/// Another descriptor of a program that is loaded.
fn duplicate(program: Result<&ProgramFd, ProgramError>) -> Result<OwnedFd, String> {
    let program = program.map_err(|error| refusal(&error))?;
    program.as_fd().try_clone_to_owned().map_err(|error| error.to_string())
}

fn load_typed(object: &mut Ebpf, kernel: &Kernel<'_>, probe: &Probe, tracepoint: &str) -> Option<OwnedFd> {
    let (types, name) = (kernel.types_of_arguments()?, probe.typed?);
    let Program::BtfTracePoint(program) = object.program_mut(name)? else { return None };
    match program.load(tracepoint, types) {
        Ok(()) => duplicate(program.fd()).ok(),
        Err(error) => {
            tracing::info!(probe = probe.name, reason = refusal(&error), "typed variant refused, trying the raw one");
            None
        }
    }
}

/// `Err` is the reason why the probe is off.
fn attach(object: &mut Ebpf, kernel: &Kernel<'_>, probe: &Probe, done: &[ProbeStatus]) -> Result<(), String> {
    met((probe.needs)(kernel.layout))?;
    if let Hook::PartOf(whole) = probe.hook {
        return if is_on(done, whole) { Ok(()) } else { Err(format!("{whole}, which it is a part of, is off")) };
    }
    if let Hook::Tracepoint(name) = probe.hook
        && !kernel.btf.has_tracepoint(name)
    {
        return Err(format!("this kernel has no tracepoint {name}"));
    }
    let name = (probe.program)(kernel.layout);
    let program = object.program_mut(name).ok_or_else(|| format!("the object has no program {name}"))?;
    match (probe.hook, program) {
        (Hook::Tracepoint(name), Program::RawTracePoint(program)) => attach_tracepoint(program, name),
        (Hook::Function(name), Program::FEntry(program)) => attach_entry(program, name, kernel.types()?),
        // To a service, when there is one.
        (Hook::Bind, Program::CgroupSockAddr(program)) => program.load().map_err(|error| refusal(&error)),
        _ => Err(format!("the object's {name} is a program of another type")),
    }
}

fn attach_entry(program: &mut FEntry, name: &str, types: &aya::Btf) -> Result<(), String> {
    program.load(name, types).map_err(|error| refusal(&error))?;
    program.attach().map(drop).map_err(|error| refusal(&error))
}

fn attach_function(program: &mut KProbe, name: &str) -> Result<(), String> {
    program.load().map_err(|error| refusal(&error))?;
    program.attach(name, 0).map(drop).map_err(|error| refusal(&error))
}

fn attach_tracepoint(program: &mut RawTracePoint, name: &str) -> Result<(), String> {
    program.load().map_err(|error| refusal(&error))?;
    program.attach(name).map(drop).map_err(|error| refusal(&error))
}

/// How the lines begin that the verifier adds to every log.
const STATISTICS: [&str; 3] = ["processed ", "verification time", "stack depth"];

/// The kernel's answer in one line: the last words of the verifier are the ones that say why.
pub(crate) fn refusal(error: &ProgramError) -> String {
    match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            let why = log
                .lines()
                .rev()
                .map(str::trim)
                .find(|line| !line.is_empty() && !STATISTICS.iter().any(|word| line.starts_with(word)))
                .unwrap_or("no reason given")
                .to_owned();
            tracing::debug!(%log, "the verifier's log");
            format!("the kernel refused the program ({io_error}): {why}")
        }
        other => {
            let mut text = other.to_string();
            let mut source = std::error::Error::source(other);
            while let Some(cause) = source {
                text = format!("{text}: {cause}");
                source = cause.source();
            }
            text
        }
    }
}
