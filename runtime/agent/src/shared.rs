//! What the threads of the agent share, and the errors they report.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use warmswap_backend::{Backend, BackendError};
use warmswap_forecast::Forecaster;
use warmswap_handover::HandoverError;
use warmswap_history::{BlobKind, History, HistoryError};
use warmswap_model::{CgroupId, PerResource, ServiceFile, ServiceName};
use warmswap_policy::{Rails, Tuner};

use crate::api::Band;
use crate::containers::{Containers, Whose};
use crate::live::LiveHub;
use crate::lock;
use crate::minutes::Minutes;
use crate::observatory::Observatory;
use crate::service::ServiceHandle;

#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error(transparent)]
    Handover(#[from] HandoverError),
    #[error(transparent)]
    History(#[from] HistoryError),
    #[error(transparent)]
    ServiceFile(#[from] warmswap_model::ServiceFileError),
    #[error("there is no service {0}; `warmswap status` lists them")]
    NoSuchService(ServiceName),
    #[error("{0}")]
    Refused(String),
    #[error("cannot {action}")]
    System {
        action: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot {action} {}", path.display())]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

/// Folders of one agent.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// Sockets, mounts, journals: gone after a reboot, like the containers.
    pub run_dir: PathBuf,
    /// History, models, image layers, logs.
    pub state_dir: PathBuf,
}

pub(crate) struct Shared {
    pub(crate) config: AgentConfig,
    pub(crate) began: Instant,
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) history: History,
    pub(crate) observatory: Observatory,
    pub(crate) containers: Containers,
    pub(crate) live: LiveHub,
    pub(crate) forecaster: Mutex<Forecaster>,
    pub(crate) minutes: Mutex<Minutes>,
    pub(crate) bands: Mutex<BTreeMap<ServiceName, Vec<Band>>>,
    pub(crate) leases: Mutex<BTreeMap<ServiceName, PerResource<f64>>>,
    starting: Mutex<BTreeSet<ServiceName>>,
    services: Mutex<BTreeMap<ServiceName, Arc<ServiceHandle>>>,
}

/// A name that nobody else can start a service under while this lives.
pub(crate) struct Starting<'a> {
    shared: &'a Shared,
    name: ServiceName,
}

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        lock(&self.shared.starting).remove(&self.name);
    }
}

impl Shared {
    pub(crate) fn new(
        config: AgentConfig,
        backend: Arc<dyn Backend>,
        history: History,
        observatory: Observatory,
        forecaster: Forecaster,
    ) -> Self {
        Self {
            config,
            began: Instant::now(),
            backend,
            history,
            observatory,
            containers: Containers::new(),
            live: LiveHub::default(),
            forecaster: Mutex::new(forecaster),
            minutes: Mutex::new(Minutes::new()),
            bands: Mutex::default(),
            leases: Mutex::default(),
            starting: Mutex::default(),
            services: Mutex::default(),
        }
    }

    pub(crate) fn journal_folder(&self) -> PathBuf {
        self.config.run_dir.join("journal")
    }

    pub(crate) fn journal_path(&self, service: &ServiceName) -> PathBuf {
        self.journal_folder().join(format!("{service}.jsonl"))
    }

    pub(crate) fn service(&self, name: &ServiceName) -> Result<Arc<ServiceHandle>, AgentError> {
        lock(&self.services).get(name).cloned().ok_or_else(|| AgentError::NoSuchService(name.clone()))
    }

    pub(crate) fn services(&self) -> Vec<Arc<ServiceHandle>> {
        lock(&self.services).values().cloned().collect()
    }

    pub(crate) fn add(&self, handle: Arc<ServiceHandle>) {
        lock(&self.services).insert(handle.name.clone(), handle);
    }

    /// Whose a cgroup is, or the nearest one around it that is anybody's.
    pub(crate) fn whose(&self, cgroup: CgroupId) -> Option<Whose> {
        self.containers.lineage(cgroup).into_iter().find_map(|around| self.observatory.whose(around))
    }

    /// Claims a name for a service that is to be started, so that two starts of one name cannot pass each other.
    pub(crate) fn start(&self, name: &ServiceName) -> Result<Starting<'_>, AgentError> {
        if !lock(&self.starting).insert(name.clone()) {
            return Err(AgentError::Refused(format!("{name} is being started; `warmswap status` shows when it runs")));
        }
        let starting = Starting { shared: self, name: name.clone() };
        if self.service(name).is_ok() {
            return Err(AgentError::Refused(format!(
                "{name} runs already; `warmswap update {name} --file FILE` hands it over, `warmswap stop {name}` ends it"
            )));
        }
        Ok(starting)
    }

    pub(crate) fn remove(&self, name: &ServiceName) {
        lock(&self.services).remove(name);
        lock(&self.leases).remove(name);
        lock(&self.forecaster).forget(name);
        lock(&self.minutes).forget(name);
    }

    /// The last CPU, when there are two or more: a shadow warms up beside the active, not in its way.
    pub(crate) fn shadow_cpus(&self) -> Option<Vec<u32>> {
        let cpus = self.backend.capacity().ok()?.cpus;
        (cpus >= 2).then(|| vec![cpus - 1])
    }

    pub(crate) fn tuner(&self, file: &ServiceFile) -> Tuner {
        let saved = self.history.get_blob(BlobKind::Tuner, file.name.as_str()).unwrap_or_else(|error| {
            tracing::warn!("the tuner of {} begins anew: {error}", file.name);
            None
        });
        let saved = saved.and_then(|bytes| match serde_json::from_slice(&bytes) {
            Ok(saved) => Some(saved),
            Err(error) => {
                tracing::warn!(
                    "the tuner of {} begins anew, what is saved is not one of this version: {error}",
                    file.name
                );
                None
            }
        });
        Tuner::restore(saved, &file.reserve, Rails::new(&file.reserve, &file.resources))
    }

    pub(crate) fn keep_tuner(&self, service: &ServiceName, tuner: &Tuner) {
        let kept = serde_json::to_vec(tuner).map_err(|error| error.to_string()).and_then(|bytes| {
            self.history.put_blob(BlobKind::Tuner, service.as_str(), &bytes).map_err(|error| error.to_string())
        });
        if let Err(problem) = kept {
            tracing::warn!("what the tuner of {service} learned is not kept: {problem}");
        }
    }
}
