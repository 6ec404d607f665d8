//! A forecast with its reasons, for people.

use serde::{Deserialize, Serialize};
use warmswap_model::{Champion, PerResource, Quantiles, Resource, ServiceName};

use crate::{Irregular, Validation};

/// One service's forecast and why it is that one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ForecastReport {
    pub service: ServiceName,
    pub horizon_s: f64,
    /// Windows seen.
    pub samples: u64,
    pub irregular: Irregular,
    /// See [`warmswap_model::DemandVector::confidence`].
    pub confidence: f64,
    pub lstm: LstmState,
    pub trained: Option<TrainedReport>,
    pub resources: PerResource<ResourceReport>,
}

/// Whether the LSTM may serve this service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum LstmState {
    /// No weights yet.
    NotTrained,
    /// Weights are installed, and their forecasts are compared before they may serve.
    Proving { scored: u32, needed: u32 },
    /// It serves every series on which its recent loss is the lowest.
    Competes,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TrainedReport {
    /// Optimiser steps over all trainings.
    pub steps: u64,
    /// End of the newest window trained on, Unix ms.
    pub until_unix_ms: u64,
    pub validation: Validation,
}

/// One resource, in its unit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ResourceReport {
    pub unit: String,
    /// The newest value.
    pub last: f64,
    /// The champion's quantiles.
    pub band: Quantiles,
    pub champion: Champion,
    /// One sentence on why.
    pub why: String,
    pub candidates: Vec<CandidateReport>,
    /// Of the bands that were served.
    pub coverage90: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CandidateReport {
    pub candidate: Champion,
    pub band: Option<Quantiles>,
    /// Mean pinball loss over the five levels, recent, in the resource's unit.
    pub loss: Option<f64>,
    pub coverage90: Option<f64>,
    /// Forecasts compared with what came.
    pub scored: u32,
    pub may_serve: bool,
}

impl ResourceReport {
    pub(crate) fn new(
        resource: Resource,
        last: f64,
        band: Quantiles,
        champion: Champion,
        candidates: Vec<CandidateReport>,
        coverage90: Option<f64>,
    ) -> Self {
        let why = why(resource, champion, &candidates);
        Self { unit: resource.unit().to_owned(), last, band, champion, why, candidates, coverage90 }
    }
}

fn why(resource: Resource, champion: Champion, candidates: &[CandidateReport]) -> String {
    let unit = resource.unit();
    let loss_of = |candidate: &CandidateReport| candidate.loss.filter(|_| candidate.may_serve);
    let own = candidates.iter().find(|c| c.candidate == champion).and_then(loss_of);
    let best_other = candidates
        .iter()
        .filter(|c| c.candidate != champion)
        .filter_map(|c| Some((loss_of(c)?, c.candidate.name())))
        .min_by(|a, b| a.0.total_cmp(&b.0));
    let who = champion.name();
    match (own, best_other) {
        (Some(own), Some((other, other_name))) => {
            format!("{who} has a recent loss of {own:.3} {unit}, {other_name} of {other:.3}")
        }
        (Some(own), None) => format!("{who} has a recent loss of {own:.3} {unit}; nobody else has evidence yet"),
        (None, _) => format!("{who} serves until there is evidence"),
    }
}
