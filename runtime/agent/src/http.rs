//! The API of `api.rs`, served. Everything that waits for a container runs on a blocking thread.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Serialize;
use serde_json::json;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream};
use warmswap_handover::{Supervisor, Version};
use warmswap_model::{ImageRef, ServiceFile, ServiceName, Trigger, with_causes};
use warmswap_policy::{Admission, Request};
use warmswap_sensor::{Classes, Subscription};

use crate::api::{
    AgentStatus, ApiError, EventAccount, ForecastAnswer, NewsKind, RunRequest, ServiceStatus, TraceLine, UpdateLine,
    UpdateRequest,
};
use crate::conditions::AgentConditions;
use crate::containers::Whose;
use crate::service::{self, ServiceHandle, Update};
use crate::shared::{AgentError, Shared};
use crate::{lock, metrics};

/// Events that may wait for a slow reader of a trace.
const TRACE_QUEUE: usize = 65_536;
const STOP_TIME_MAX: Duration = Duration::from_secs(60);

#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) shared: Arc<Shared>,
    pub(crate) stop: Arc<tokio::sync::Notify>,
}

pub(crate) fn router(server: Server) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/services", post(run))
        .route("/v1/services/{name}/update", post(update))
        .route("/v1/services/{name}/rollback", post(rollback))
        .route("/v1/services/{name}/stop", post(stop))
        .route("/v1/services/{name}/forecast", get(forecast))
        .route("/v1/services/{name}/history", get(history))
        .route("/v1/services/{name}/windows", get(windows))
        .route("/v1/stop", post(stop_all))
        .route("/v1/trace", get(trace))
        .route("/v1/live", get(live))
        .route("/metrics", get(metrics_page))
        .fallback(|| async { Failure::from(AgentError::Refused("no such request; see `warmswap --help`".into())) })
        .with_state(server)
}

/// An error as an answer.
struct Failure(StatusCode, String);

impl From<AgentError> for Failure {
    fn from(error: AgentError) -> Self {
        let status = match &error {
            AgentError::NoSuchService(_) => StatusCode::NOT_FOUND,
            AgentError::Refused(_) | AgentError::ServiceFile(_) => StatusCode::BAD_REQUEST,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self(status, with_causes(&error))
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.0, Json(ApiError { error: self.1 })).into_response()
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, AgentError> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(Failure::from),
        Err(error) => Err(Failure(StatusCode::INTERNAL_SERVER_ERROR, format!("the request failed inside: {error}"))),
    }
}

fn parse<T: serde::de::DeserializeOwned>(body: &Bytes) -> Result<T, Failure> {
    serde_json::from_slice(body)
        .map_err(|error| Failure(StatusCode::BAD_REQUEST, format!("the request is not understood: {error}")))
}

fn name_of(name: String) -> Result<ServiceName, Failure> {
    ServiceName::new(name).map_err(|error| Failure(StatusCode::BAD_REQUEST, error.to_string()))
}

async fn status(State(server): State<Server>) -> Result<Json<AgentStatus>, Failure> {
    Ok(Json(blocking(move || Ok(agent_status(&server.shared))).await?))
}

async fn metrics_page(State(server): State<Server>) -> Result<Response, Failure> {
    let page = blocking(move || Ok(metrics::render(&agent_status(&server.shared)))).await?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], page).into_response())
}

fn agent_status(shared: &Shared) -> AgentStatus {
    let probes = shared.observatory.with_sensor(|sensor| {
        let off = sensor.probes().iter().filter(|probe| !probe.attached);
        let off = off.map(|probe| (probe.name.to_string(), probe.reason.clone().unwrap_or_default())).collect();
        let attached = sensor.probes().iter().filter(|probe| probe.attached).count();
        (attached, off, event_accounts(sensor))
    });
    let (probes_attached, probes_off, events) = probes.unwrap_or_else(|| {
        (0, vec![("all".to_owned(), "the sensor could not be loaded; see the agent's log".to_owned())], Vec::new())
    });
    AgentStatus {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        uptime_s: shared.began.elapsed().as_secs_f64(),
        backend: shared.backend.name().to_owned(),
        services: shared.services().iter().map(|handle| service_status(shared, handle)).collect(),
        probes_attached,
        probes_off,
        events,
    }
}

pub(crate) fn event_accounts(sensor: &warmswap_sensor::Sensor) -> Vec<EventAccount> {
    sensor
        .accounting()
        .classes
        .into_iter()
        .map(|(class, totals)| EventAccount {
            class,
            emitted: totals.emitted,
            consumed: totals.consumed,
            discarded: totals.discarded,
            dropped: totals.dropped,
            shed: totals.shed,
        })
        .collect()
}

fn service_status(shared: &Shared, handle: &ServiceHandle) -> ServiceStatus {
    let snapshot = lock(&handle.snapshot).clone();
    let file = lock(&handle.file).0.clone();
    let activity = lock(&handle.state).activity;
    let last = shared.observatory.windows(&handle.name, 1).pop();
    let p99_us =
        last.as_ref().and_then(|window| window.durations.request_latency.quantile_ns(0.99)).map(|ns| ns as f64 / 1e3);
    ServiceStatus {
        name: handle.name.clone(),
        owner: snapshot.owner,
        image: snapshot.image.0.display().to_string(),
        previous_image: snapshot.previous.map(|previous| previous.image.0.display().to_string()),
        generations: snapshot.members,
        listeners: file.listen.iter().map(|(name, listen)| (name.clone(), listen.describe())).collect(),
        activity: (activity != warmswap_policy::Activity::Serving).then(|| format!("{activity:?}").to_lowercase()),
        trouble: snapshot.trouble,
        usage: last.as_ref().map(|window| window.usage).unwrap_or_default(),
        requests_per_s: last.as_ref().map_or(0.0, |window| {
            window.durations.request_latency.count() as f64 * 1e3 / f64::from(window.length_ms.max(1))
        }),
        p99_us,
        handovers: snapshot.handovers,
    }
}

fn parse_file(request: &RunRequest) -> Result<(ServiceFile, std::path::PathBuf), AgentError> {
    let file = ServiceFile::parse(&request.path.display().to_string(), &request.text)?;
    let folder = request.path.parent().map_or_else(|| "/".into(), std::path::Path::to_path_buf);
    Ok((file, folder))
}

async fn run(State(server): State<Server>, body: Bytes) -> Result<Json<ServiceStatus>, Failure> {
    let request: RunRequest = parse(&body)?;
    let status = blocking(move || {
        let (file, folder) = parse_file(&request)?;
        let shared = &server.shared;
        let _starting = shared.start(&file.name)?;
        let journal = shared.journal_path(&file.name);
        if journal.exists() {
            return Err(AgentError::Refused(format!(
                "{} was left by an earlier agent and could not be taken over; the agent's log says why, `warmswap stop \
                 --all` ends it",
                file.name
            )));
        }
        let prepared = service::digest(shared, &file.image.resolved(&folder))?;
        let conditions = Arc::new(AgentConditions { shared: Arc::clone(shared) });
        let supervisor = Supervisor::start(Arc::clone(&shared.backend), conditions, file, folder, &journal)?;
        let handle = service::spawn(shared, supervisor, prepared.digest)?;
        shared.add(Arc::clone(&handle));
        shared.live.tell(NewsKind::Came, handle.name.as_str(), "service started".into());
        Ok(service_status(shared, &handle))
    })
    .await?;
    Ok(Json(status))
}

async fn update(State(server): State<Server>, Path(name): Path<String>, body: Bytes) -> Result<Response, Failure> {
    let name = name_of(name)?;
    let request: UpdateRequest = parse(&body)?;
    let lines = blocking(move || {
        let shared = &server.shared;
        let handle = shared.service(&name)?;
        let file = request.file.as_ref().map(parse_file).transpose()?;
        let image = match (&request.image, &file) {
            (Some(image), _) => ImageRef(image.clone()),
            (None, Some((file, folder))) => file.image.resolved(folder),
            (None, None) => lock(&handle.snapshot).image.clone(),
        };
        begin_update(shared, &handle, image, file, request.fault)
    })
    .await?;
    Ok(stream(lines))
}

async fn rollback(State(server): State<Server>, Path(name): Path<String>) -> Result<Response, Failure> {
    let name = name_of(name)?;
    let lines = blocking(move || {
        let shared = &server.shared;
        let handle = shared.service(&name)?;
        // While a handover is in progress its own undo is the way back; its watcher sees the verdict.
        if lock(&handle.state).accept(&Request::Rollback) == Admission::Accept {
            return await_verdict(shared, &handle);
        }
        let previous = lock(&handle.snapshot).previous.clone();
        let Some(Version { image, file, folder }) = previous else {
            return Err(AgentError::Refused(format!("{name} has no earlier image to go back to")));
        };
        begin_update(shared, &handle, image, Some((file, folder)), None)
    })
    .await?;
    Ok(stream(lines))
}

/// The verdict of the handover in progress, for somebody who did not start it.
fn await_verdict(shared: &Shared, handle: &ServiceHandle) -> Result<UnboundedReceiver<UpdateLine>, AgentError> {
    let began = Instant::now();
    while lock(&handle.state).target.is_some() {
        if began.elapsed() > STOP_TIME_MAX {
            let name = &handle.name;
            return Err(AgentError::Refused(format!(
                "{name} is still going back; `warmswap status {name}` shows how far"
            )));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let (sender, lines) = unbounded_channel();
    if let Some(report) = shared.history.reports(&handle.name)?.pop() {
        let _ = sender.send(UpdateLine::Report(Box::new(report))); // the other end is in our hands
    }
    Ok(lines)
}

fn begin_update(
    shared: &Shared,
    handle: &ServiceHandle,
    image: ImageRef,
    file: Option<(ServiceFile, std::path::PathBuf)>,
    fault: Option<crate::api::Fault>,
) -> Result<UnboundedReceiver<UpdateLine>, AgentError> {
    let folder = file.as_ref().map_or_else(|| lock(&handle.file).1.clone(), |(_, folder)| folder.clone());
    let digest = service::digest(shared, &image.resolved(&folder))?.digest;
    let name = &handle.name;
    match lock(&handle.state).accept(&Request::Update { digest }) {
        Admission::Accept => {}
        Admission::Ignore => {
            return Err(AgentError::Refused(format!(
                "{name} is being handed over to this image already; `warmswap status {name}` shows how far, \
                 `warmswap history {name}` how it ended"
            )));
        }
        Admission::Deny { reason } => return Err(AgentError::Refused(format!("{name}: {reason}"))),
    }
    let (watcher, lines) = unbounded_channel();
    handle.update(Update { image, file, trigger: Trigger::Request, fault, watcher: Some(watcher) });
    Ok(lines)
}

async fn stop(State(server): State<Server>, Path(name): Path<String>) -> Result<Json<serde_json::Value>, Failure> {
    let name = name_of(name)?;
    blocking(move || {
        let handle = server.shared.service(&name)?;
        stop_service(&handle);
        wait_until_stopped(&server.shared, &[handle])
    })
    .await?;
    Ok(Json(json!({})))
}

async fn stop_all(State(server): State<Server>) -> Result<Json<serde_json::Value>, Failure> {
    let shared = Arc::clone(&server.shared);
    let result = blocking(move || {
        let handles = shared.services();
        handles.iter().for_each(|handle| stop_service(handle));
        wait_until_stopped(&shared, &handles)
    })
    .await;
    server.stop.notify_one();
    result.map(|()| Json(json!({})))
}

fn stop_service(handle: &ServiceHandle) {
    if lock(&handle.state).accept(&Request::Stop) == Admission::Accept {
        handle.stop();
    }
}

fn wait_until_stopped(shared: &Shared, handles: &[Arc<ServiceHandle>]) -> Result<(), AgentError> {
    let began = Instant::now();
    for handle in handles {
        while shared.service(&handle.name).is_ok() {
            if began.elapsed() > STOP_TIME_MAX {
                let name = &handle.name;
                return Err(AgentError::Refused(format!("{name} has not ended within {} s", STOP_TIME_MAX.as_secs())));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    Ok(())
}

async fn forecast(State(server): State<Server>, Path(name): Path<String>) -> Result<Json<ForecastAnswer>, Failure> {
    let name = name_of(name)?;
    let answer = blocking(move || {
        let shared = &server.shared;
        let handle = shared.service(&name)?;
        let forecaster = lock(&shared.forecaster);
        Ok(ForecastAnswer {
            demand: forecaster.demand(&name),
            report: forecaster.explain(&name),
            recent: shared.observatory.windows(&name, usize::MAX),
            bands: lock(&shared.bands).get(&name).cloned().unwrap_or_default(),
            minutes: lock(&shared.minutes).answer(&shared.history, &name)?,
            tuner: lock(&handle.snapshot).tuner.clone(),
            service: name,
        })
    })
    .await?;
    Ok(Json(answer))
}

async fn history(State(server): State<Server>, Path(name): Path<String>) -> Result<Response, Failure> {
    let name = name_of(name)?;
    let reports = blocking(move || {
        let reports = server.shared.history.reports(&name)?;
        if reports.is_empty() {
            server.shared.service(&name)?; // tells a quiet service from one that never was
        }
        Ok(reports)
    })
    .await?;
    Ok(Json(reports).into_response())
}

async fn windows(
    State(server): State<Server>,
    Path(name): Path<String>,
    Query(query): Query<HashMap<String, String>>,
) -> Result<Response, Failure> {
    let name = name_of(name)?;
    let seconds: u64 = match query.get("seconds").map(|text| text.parse()) {
        None => 60,
        Some(Ok(seconds)) => seconds,
        Some(Err(_)) => return Err(Failure(StatusCode::BAD_REQUEST, "seconds must be a whole number".into())),
    };
    let windows = blocking(move || {
        let now = crate::clock::unix_ms();
        Ok(server.shared.history.windows(&name, now.saturating_sub(seconds.saturating_mul(1000))..now + 1)?)
    })
    .await?;
    Ok(Json(windows).into_response())
}

async fn trace(
    State(server): State<Server>,
    Query(query): Query<HashMap<String, String>>,
) -> Result<Response, Failure> {
    let bad = |problem: String| Failure(StatusCode::BAD_REQUEST, problem);
    let classes = match query.get("class") {
        Some(names) => Classes::parse(names).map_err(|error| bad(error.to_string()))?,
        None => Classes::ALL,
    };
    let only = query.get("service").map(|name| name_of(name.clone())).transpose()?;
    let seconds = query.get("seconds").map(|text| text.parse::<f64>()).transpose();
    let seconds = seconds.map_err(|error| bad(format!("seconds: {error}")))?;
    let wants = Subscription { classes, everywhere: false, capacity: TRACE_QUEUE };
    let shared = Arc::clone(&server.shared);
    let events = shared.observatory.with_sensor(|sensor| sensor.subscribe(wants));
    let events = match events {
        Some(Ok(events)) => events,
        Some(Err(error)) => return Err(bad(with_causes(&error))),
        None => return Err(bad("there are no probes on this host; `warmswap check` says why".into())),
    };
    let (lines, received) = unbounded_channel();
    let length = seconds.map(Duration::try_from_secs_f64).transpose();
    let length = length.map_err(|error| bad(format!("seconds: {error}")))?;
    let until = length.and_then(|length| Instant::now().checked_add(length));
    if let Some(only) = &only {
        server.shared.service(only)?;
    }
    let user = query.get("user").map(|text| text.parse::<u32>()).transpose();
    let user = user.map_err(|_| bad("user must be a number: the id of a user".into()))?;
    let only = Only { service: only, container: query.get("container").cloned(), user };
    std::thread::spawn(move || {
        while until.is_none_or(|until| Instant::now() < until) {
            // A time-out, so that a reader who left is noticed while nothing happens.
            let Ok(event) = events.receiver().recv_timeout(Duration::from_millis(100)) else {
                if lines.is_closed() {
                    break;
                }
                continue;
            };
            let (service, generation, container) = match shared.whose(event.cgroup) {
                Some(Whose::Service(service, generation)) => (Some(service), generation, None),
                Some(Whose::Other(container)) => (None, None, Some(container)),
                None => (None, None, None),
            };
            let line = TraceLine { service, generation, container, event };
            if only.wants(&line) && lines.send(line).is_err() {
                break;
            }
        }
    });
    Ok(stream(received))
}

/// Whose events somebody wants.
struct Only {
    service: Option<ServiceName>,
    /// A name, or the beginning of an id.
    container: Option<String>,
    user: Option<u32>,
}

impl Only {
    fn wants(&self, line: &TraceLine) -> bool {
        let service = self.service.is_none() || self.service == line.service;
        let user = self.user.is_none() || self.user == line.event.uid;
        let container = self.container.as_ref();
        service
            && user
            && container.is_none_or(|what| line.container.as_ref().is_some_and(|container| container.is(what)))
    }
}

async fn live(State(server): State<Server>, Query(query): Query<HashMap<String, String>>) -> Result<Response, Failure> {
    let cost = match query.get("cost").map(String::as_str) {
        None | Some("false") => false,
        Some("true") => true,
        Some(_) => return Err(Failure(StatusCode::BAD_REQUEST, "cost must be true or false".into())),
    };
    let lines = blocking(move || Ok(server.shared.live.listen(&server.shared, cost))).await?;
    Ok(documents(ReceiverStream::new(lines)))
}

fn stream<T: Serialize + Send + 'static>(lines: UnboundedReceiver<T>) -> Response {
    documents(UnboundedReceiverStream::new(lines))
}

/// One JSON document a line, as they come.
fn documents<T: Serialize>(lines: impl tokio_stream::Stream<Item = T> + Send + 'static) -> Response {
    let lines = lines.map(|line| {
        let mut bytes = serde_json::to_vec(&line).unwrap_or_default();
        bytes.push(b'\n');
        Ok::<Bytes, Infallible>(bytes.into())
    });
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}
