//! Talks to the agent: HTTP with JSON over its unix socket (see `warmswap_agent::api`).

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use warmswap_agent::api::{ApiError, LOCK_NAME, SOCKET_NAME};

/// How long an agent may take to answer a question that needs no container.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(15);
/// How long it may take to end services, which it does itself within a minute.
const STOP_TIME_MAX: Duration = Duration::from_secs(90);
/// How long an agent may take to open its socket.
const START_TIME_MAX: Duration = Duration::from_secs(60);

pub(crate) struct Client {
    runtime: tokio::runtime::Runtime,
    socket: PathBuf,
}

impl Client {
    /// # Errors
    /// When no agent listens in `run_dir`.
    pub(crate) fn connect(run_dir: &Path) -> Result<Self> {
        let client = Self::unconnected(run_dir)?;
        if !client.answers() {
            bail!(
                "no agent answers on {}; start one with `warmswap agent`, or a service with `warmswap run FILE`",
                client.socket.display()
            );
        }
        Ok(client)
    }

    fn unconnected(run_dir: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { runtime, socket: run_dir.join(SOCKET_NAME) })
    }

    fn answers(&self) -> bool {
        std::os::unix::net::UnixStream::connect(&self.socket).is_ok()
    }

    /// The agent of `run_dir`, started in the background when there is none.
    pub(crate) fn connect_or_start(run_dir: &Path, state_dir: &Path) -> Result<Self> {
        let client = Self::unconnected(run_dir)?;
        if client.answers() {
            return Ok(client);
        }
        let log = state_dir.join("agent.log");
        eprintln!("starting the agent; its log is {}", log.display());
        let mut agent = start_agent(run_dir, state_dir, &log)?;
        client.wait_until_answers(&mut agent, &log)?;
        Ok(client)
    }

    /// The agent that somebody has just started.
    pub(crate) fn wait_for_agent(run_dir: &Path, agent: &mut std::process::Child, log: &Path) -> Result<Self> {
        let client = Self::unconnected(run_dir)?;
        client.wait_until_answers(agent, log)?;
        Ok(client)
    }

    fn wait_until_answers(&self, agent: &mut std::process::Child, log: &Path) -> Result<()> {
        let began = Instant::now();
        while !self.answers() {
            if let Some(status) = agent.try_wait()? {
                let text = std::fs::read_to_string(log).unwrap_or_default();
                let last = text.lines().last().unwrap_or("it printed nothing");
                bail!("the agent ended at once ({status}): {last}");
            }
            if began.elapsed() > START_TIME_MAX {
                bail!("the agent did not answer within {} s; see {}", START_TIME_MAX.as_secs(), log.display());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// After a request to stop: until the agent has let go of its run folder, at most half a minute.
    pub(crate) fn wait_until_gone(&self) {
        let began = Instant::now();
        let run_dir = self.socket.parent().unwrap_or_else(|| Path::new("/"));
        let held = || lock_of_agent(run_dir).is_err();
        while (self.answers() || held()) && began.elapsed() < Duration::from_secs(30) {
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn get<A: DeserializeOwned>(&self, path: &str) -> Result<A> {
        self.whole(Method::GET, path, Bytes::new(), Some(ANSWER_TIME_MAX))
    }

    pub(crate) fn post<A: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<A> {
        self.whole(Method::POST, path, serde_json::to_vec(body)?.into(), None)
    }

    /// Asks for the end of a service, or of everything. Whether the agent still works is asked first: it answers that at
    /// once, while ending takes its time.
    pub(crate) fn stop(&self, path: &str) -> Result<()> {
        let _: serde_json::Value = self.get("/v1/status")?;
        let _: serde_json::Value = self.whole(Method::POST, path, "{}".into(), Some(STOP_TIME_MAX))?;
        Ok(())
    }

    /// Calls `each` with every line of the answer; stops when it returns false.
    pub(crate) fn lines<A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
        mut each: impl FnMut(A) -> Result<bool>,
    ) -> Result<()> {
        let body = serde_json::to_vec(body)?;
        self.runtime.block_on(async {
            let response = self.send(method, path, body.into()).await?;
            let mut response = accepted(response).await?.into_body();
            let mut pending = Vec::new();
            while let Some(frame) = response.frame().await {
                let frame = frame.context("the agent went away in the middle of its answer")?;
                let Ok(data) = frame.into_data() else { continue };
                pending.extend_from_slice(&data);
                while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = pending.drain(..=end).collect();
                    if line.trim_ascii().is_empty() {
                        continue;
                    }
                    let answer = serde_json::from_slice(&line).context("the agent's answer is not understood")?;
                    if !each(answer)? {
                        return Ok(());
                    }
                }
            }
            Ok(())
        })
    }

    fn whole<A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        time_max: Option<Duration>,
    ) -> Result<A> {
        let answer = async {
            let response = accepted(self.send(method, path, body).await?).await?;
            let bytes = response.into_body().collect().await?.to_bytes();
            serde_json::from_slice(&bytes).context("the agent's answer is not understood")
        };
        self.runtime.block_on(async {
            match time_max {
                None => answer.await,
                Some(time_max) => match tokio::time::timeout(time_max, answer).await {
                    Ok(answer) => answer,
                    Err(_) => Err(self.hangs(time_max).await),
                },
            }
        })
    }

    async fn hangs(&self, time_max: Duration) -> anyhow::Error {
        let stream = tokio::net::UnixStream::connect(&self.socket).await;
        let pid = stream.ok().and_then(|stream| stream.peer_cred().ok()?.pid());
        let pid = pid.map_or_else(|| "PID".to_owned(), |pid| pid.to_string());
        anyhow!(
            "the agent (process {pid}) has not answered for {} s; if it hangs, end it with `kill -9 {pid}`: services go on \
             without it, and the next agent takes them over",
            time_max.as_secs()
        )
    }

    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<Response<Incoming>> {
        let stream = tokio::net::UnixStream::connect(&self.socket)
            .await
            .with_context(|| format!("cannot reach the agent on {}", self.socket.display()))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "agent")
            .header("content-type", "application/json")
            .body(Full::new(body))?;
        Ok(sender.send_request(request).await?)
    }
}

/// The lock of the run folder's agent; none when there has been no agent.
pub(crate) fn lock_of_agent(run_dir: &Path) -> Result<Option<File>, TryLockError> {
    let Ok(file) = File::open(run_dir.join(LOCK_NAME)) else { return Ok(None) };
    file.try_lock().map(|()| Some(file))
}

async fn accepted(response: Response<Incoming>) -> Result<Response<Incoming>> {
    if response.status().is_success() {
        return Ok(response);
    }
    let status = response.status();
    let bytes = response.into_body().collect().await?.to_bytes();
    match serde_json::from_slice::<ApiError>(&bytes) {
        Ok(answer) => Err(anyhow!(answer.error)),
        Err(_) => Err(anyhow!("the agent answered {status}: {}", String::from_utf8_lossy(&bytes))),
    }
}

/// Starts an agent that outlives this program.
pub(crate) fn start_agent(run_dir: &Path, state_dir: &Path, log: &Path) -> Result<std::process::Child> {
    use std::os::unix::process::CommandExt;
    std::fs::create_dir_all(state_dir).with_context(|| format!("cannot create {}", state_dir.display()))?;
    let log_file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("cannot write {}", log.display()))?;
    std::process::Command::new(std::env::current_exe()?)
        .arg("--run-dir")
        .arg(run_dir)
        .arg("--state-dir")
        .arg(state_dir)
        .arg("agent")
        .stdin(std::process::Stdio::null())
        .stdout(log_file.try_clone()?)
        .stderr(log_file)
        .process_group(0)
        .spawn()
        .context("cannot start the agent")
}
