//! The forecaster: every tick steps all profiles in one batch.

use std::collections::HashMap;

use warmswap_model::{Champion, DemandVector, FeatureWindow, PerResource, Quantiles, Resource, ServiceName};

use crate::lstm::{Batch, ModelWeights, Network};
use crate::profile::{CANDIDATES, LSTM, Profile};
use crate::report::{CandidateReport, ForecastReport, LstmState, ResourceReport, TrainedReport};
use crate::{ForecastConfig, ImportError, file};

/// Profiles of one step of the network: more rows make it no faster, and what they hold would not stay in the cache.
const PART: usize = 32;

/// Forecasts the demand of many services over one horizon. Time and windows come in as arguments; nothing else is
/// read, so a recording replays to the same forecasts.
#[derive(Debug, Clone)]
pub struct Forecaster {
    config: ForecastConfig,
    slots: HashMap<ServiceName, usize>,
    profiles: Vec<Profile>,
    model: Option<(ModelWeights, Network)>,
    batch: Batch,
    /// Profiles of this tick, kept between ticks for its memory.
    active: Vec<usize>,
    /// Who stood where in the last tick, because it is nearly always the same.
    order: Vec<(ServiceName, usize)>,
}

impl Forecaster {
    #[must_use]
    pub fn new(config: ForecastConfig) -> Self {
        Self {
            config: config.sane(),
            slots: HashMap::new(),
            profiles: Vec::new(),
            model: None,
            batch: Batch::default(),
            active: Vec::new(),
            order: Vec::new(),
        }
    }

    #[must_use]
    pub fn config(&self) -> &ForecastConfig {
        &self.config
    }

    /// One tick at `tick_unix_ms`: takes each service's window in, scores the forecasts that came due, and makes new
    /// ones. A service is named at most once per tick; a second window counts as a duplicate. Allocates nothing unless
    /// a service is new, or they come in another order.
    pub fn observe(&mut self, tick_unix_ms: u64, windows: &[(ServiceName, &FeatureWindow)]) {
        // In parts, so that what a profile holds is still near when its network has made its step.
        for (part, windows) in windows.chunks(PART).enumerate() {
            self.observe_part(tick_unix_ms, part * PART, windows);
        }
    }

    fn observe_part(&mut self, tick_unix_ms: u64, first: usize, windows: &[(ServiceName, &FeatureWindow)]) {
        self.active.clear();
        for (at, (service, window)) in (first..).zip(windows) {
            let slot = match self.order.get(at) {
                Some((name, slot)) if name == service => *slot,
                _ => self.slot(at, service),
            };
            if let (Some((_, next)), Some((_, window))) = (self.order.get(at + 1), windows.get(at + 1 - first)) {
                prefetch(&self.profiles[*next]);
                prefetch(*window);
            }
            if self.profiles[slot].begin(tick_unix_ms, window, &self.config) {
                self.active.push(slot);
            }
        }
        if let Some((_, network)) = &self.model {
            self.batch.resize(self.active.len());
            for (row, slot) in self.active.iter().enumerate() {
                let profile = &self.profiles[*slot];
                self.batch.set(row, &profile.inputs, &profile.hidden, &profile.cell);
            }
            network.step(&mut self.batch);
        }
        for (row, slot) in self.active.iter().enumerate() {
            let profile = &mut self.profiles[*slot];
            if self.model.is_some() {
                self.batch.state_into(row, &mut profile.hidden, &mut profile.cell);
                profile.finish(Some(self.batch.raw(row)), *slot, &self.config);
            } else {
                profile.finish(None, *slot, &self.config);
            }
        }
    }

    /// The slot of a service, a new one when it has none.
    fn slot(&mut self, at: usize, service: &ServiceName) -> usize {
        let next = self.profiles.len();
        let slot = *self.slots.entry(service.clone()).or_insert(next);
        if slot == next {
            self.profiles.push(Profile::new(&self.config));
        }
        self.order.truncate(at);
        if self.order.len() == at {
            self.order.push((service.clone(), slot));
        }
        slot
    }

    /// What the service is expected to need over the horizon that began with its newest window. `None` for a service
    /// that was never observed, and after an import until its first window.
    #[must_use]
    pub fn demand(&self, service: &ServiceName) -> Option<DemandVector> {
        let profile = &self.profiles[*self.slots.get(service)?];
        let served = profile.served()?;
        let at = |resource: Resource| resource as usize;
        Some(DemandVector {
            horizon_s: self.config.horizon_steps as f64 * self.config.step_ms as f64 / 1e3,
            quantiles: PerResource::from_fn(|r| served[at(r)].quantiles()),
            champion: PerResource::from_fn(|r| CANDIDATES[served[at(r)].champion]),
            coverage90: PerResource::from_fn(|r| profile.coverage(at(r))),
            confidence: profile.confidence(),
        })
    }

    /// The LSTM's own bands, calibrated, whether it serves or not. `None` for a resource of which it says nothing.
    #[must_use]
    pub fn lstm(&self, service: &ServiceName) -> PerResource<Option<Quantiles>> {
        let Some(slot) = self.slots.get(service) else { return PerResource::default() };
        let profile = &self.profiles[*slot];
        PerResource::from_fn(|resource| {
            let at = resource as usize;
            let said = profile.say(at, profile.lstm_form(at), &self.config)?;
            Some(Quantiles::from_levels(said.band))
        })
    }

    /// The same with what lies behind it: every candidate's band, loss and coverage, and why the champion is one.
    #[must_use]
    pub fn explain(&self, service: &ServiceName) -> Option<ForecastReport> {
        let profile = &self.profiles[*self.slots.get(service)?];
        let served = profile.served()?;
        let resources = PerResource::from_fn(|resource| {
            let at = resource as usize;
            let own = &served[at];
            let candidates = CANDIDATES
                .iter()
                .enumerate()
                // The LSTM is shown once.
                .filter(|(who, champion)| **champion != Champion::Lstm || *who == profile.lstm_form(at))
                .map(|(who, champion)| {
                    let tracker = profile.tracker(at, who);
                    let band = profile.say(at, who, &self.config).map(|said| Quantiles::from_levels(said.band));
                    CandidateReport {
                        candidate: *champion,
                        band,
                        loss: tracker.loss(),
                        coverage90: tracker.coverage(),
                        scored: tracker.scored,
                        may_serve: band.is_some() && (who == 0 || tracker.scored >= self.config.evidence_min),
                    }
                })
                .collect();
            ResourceReport::new(
                resource,
                profile.last_value(at),
                own.quantiles(),
                CANDIDATES[own.champion],
                candidates,
                profile.coverage(at),
            )
        });
        let scored = profile.tracker(0, LSTM).scored;
        let lstm = match &self.model {
            None => LstmState::NotTrained,
            Some(_) if scored < self.config.evidence_min => {
                LstmState::Proving { scored, needed: self.config.evidence_min }
            }
            Some(_) => LstmState::Competes,
        };
        Some(ForecastReport {
            service: service.clone(),
            horizon_s: self.config.horizon_steps as f64 * self.config.step_ms as f64 / 1e3,
            samples: profile.samples,
            irregular: profile.irregular,
            confidence: profile.confidence(),
            lstm,
            trained: self.model.as_ref().map(|(weights, _)| TrainedReport {
                steps: weights.steps,
                until_unix_ms: weights.trained_until_unix_ms,
                validation: weights.validation,
            }),
            resources,
        })
    }

    /// Puts new weights to work. Their state is filled from the last inputs of every profile. They serve a series only
    /// after `evidence_min` of their own forecasts were compared with what came; weights that were trained on from those
    /// that are installed keep the record of these, because training returns nothing that was worse on held-out data.
    pub fn install(&mut self, weights: ModelWeights) -> Result<(), ImportError> {
        weights.check().map_err(|what| ImportError::BadContent { what: what.to_owned() })?;
        let network = Network::new(&weights);
        let continues = self.model.as_ref().is_some_and(|(now, _)| weights.continues(now));
        for profile in &mut self.profiles {
            profile.empty_state();
            if !continues {
                profile.forget_network();
            }
            self.batch.resize(1);
            for step in 0..profile.replay_len() {
                self.batch.set(0, profile.replay_inputs(step), &profile.hidden, &profile.cell);
                network.step(&mut self.batch);
                self.batch.state_into(0, &mut profile.hidden, &mut profile.cell);
            }
        }
        self.model = Some((weights, network));
        Ok(())
    }

    /// The weights that are installed, to continue training from.
    #[must_use]
    pub fn weights(&self) -> Option<&ModelWeights> {
        self.model.as_ref().map(|(weights, _)| weights)
    }

    /// Stops following a service.
    pub fn forget(&mut self, service: &ServiceName) {
        let Some(slot) = self.slots.remove(service) else { return };
        self.order.clear();
        self.profiles.swap_remove(slot);
        let moved = self.profiles.len();
        for at in self.slots.values_mut() {
            if *at == moved {
                *at = slot;
            }
        }
    }

    /// The services that are followed, in no order.
    pub fn services(&self) -> impl Iterator<Item = &ServiceName> {
        self.slots.keys()
    }

    /// Memory held for all profiles, bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.profiles.iter().map(Profile::bytes).sum()
    }

    /// Weights, scalers, linear models and calibration of every service as one image (see [`crate::ImportError`] for
    /// what is checked when it is read back).
    #[must_use]
    pub fn export(&self) -> Vec<u8> {
        let mut services: Vec<(&ServiceName, &Profile)> =
            self.slots.iter().map(|(service, slot)| (service, &self.profiles[*slot])).collect();
        services.sort_by_key(|(service, _)| *service);
        file::write(&self.config, self.model.as_ref().map(|(weights, _)| weights), &services)
    }

    /// Takes an image up. On an error nothing has changed and the baselines go on serving.
    pub fn import(&mut self, image: &[u8]) -> Result<(), ImportError> {
        let content = file::read(image, &self.config)?;
        let model = content.weights.map(|weights| {
            let network = Network::new(&weights);
            (weights, network)
        });
        self.slots = content.services.iter().enumerate().map(|(slot, (name, _))| (name.clone(), slot)).collect();
        self.profiles = content.services.into_iter().map(|(_, profile)| profile).collect();
        self.model = model;
        self.order.clear();
        Ok(())
    }
}

/// Has the processor fetch what will be needed next: between two ticks other work has taken its place in the caches.
fn prefetch<T>(next: &T) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..size_of::<T>()).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: the address lies within `next`; a prefetch reads nothing that the program sees.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(next).cast::<i8>().add(line)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = next;
}
