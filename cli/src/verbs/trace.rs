//! `warmswap trace`: events of the services, live.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hyper::Method;
use serde_json::json;
use warmswap_agent::api::TraceLine;
use warmswap_model::ServiceName;

use super::Here;
use crate::client::Client;
use crate::output::{say, say_json};

pub(super) struct Filter {
    pub(super) service: Option<ServiceName>,
    pub(super) class: Vec<String>,
    pub(super) count: Option<u64>,
    pub(super) seconds: Option<f64>,
}

pub(super) fn trace(here: &Here, filter: &Filter) -> Result<ExitCode> {
    let client = Client::connect(&here.run_dir)?;
    let length = filter.seconds.map(Duration::try_from_secs_f64).transpose().context("--seconds")?;
    let until = length.and_then(|length| Instant::now().checked_add(length));
    let mut path = String::from("/v1/trace?");
    if let Some(seconds) = filter.seconds {
        path.push_str(&format!("seconds={seconds}&"));
    }
    if let Some(service) = &filter.service {
        path.push_str(&format!("service={service}&"));
    }
    if !filter.class.is_empty() {
        path.push_str(&format!("class={}", filter.class.join(",")));
    }
    let mut seen = 0;
    client.lines(Method::GET, &path, &json!({}), |line: TraceLine| {
        if until.is_some_and(|until| Instant::now() >= until) {
            return Ok(false);
        }
        if here.json {
            say_json(&line)?;
        } else {
            let who = match (&line.service, line.generation) {
                (Some(service), Some(generation)) => format!("{service} {generation}"),
                (Some(service), None) => service.to_string(),
                _ => "–".into(),
            };
            say(&format!("{who:<20} {}", line.event));
        }
        seen += 1;
        Ok(filter.count.is_none_or(|count| seen < count))
    })?;
    Ok(ExitCode::SUCCESS)
}
