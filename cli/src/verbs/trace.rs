//! `warmswap trace`: events of services and other containers, live.

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
    /// A name or the beginning of an id.
    pub(super) container: Option<String>,
    /// A name or a number.
    pub(super) user: Option<String>,
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
    if let Some(container) = &filter.container {
        path.push_str(&format!("container={}&", escaped(container)));
    }
    if let Some(user) = &filter.user {
        path.push_str(&format!("user={}&", user_id(user)?));
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
            let who = match (&line.service, line.generation, &line.container) {
                (Some(service), Some(generation), _) => format!("{service} {generation}"),
                (Some(service), None, _) => service.to_string(),
                (None, _, Some(container)) => format!("{} {}", container.tool, container.name),
                _ => "–".into(),
            };
            say(&format!("{who:<20} {}", line.event));
        }
        seen += 1;
        Ok(filter.count.is_none_or(|count| seen < count))
    })?;
    Ok(ExitCode::SUCCESS)
}

/// The number of a user of this host.
fn user_id(user: &str) -> Result<u32> {
    if let Ok(id) = user.parse() {
        return Ok(id);
    }
    let found = nix::unistd::User::from_name(user).with_context(|| format!("cannot look for a user {user:?}"))?;
    let found =
        found.with_context(|| format!("this host has no user {user:?}: give a name of /etc/passwd, or a number"))?;
    Ok(found.uid.as_raw())
}

/// For a query: everything but letters, digits and what is harmless there.
fn escaped(text: &str) -> String {
    let harmless = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.~/".contains(byte);
    text.bytes()
        .map(|byte| if harmless(&byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{escaped, user_id};

    #[test]
    fn users_are_known_by_name_or_number() {
        assert_eq!(user_id("root").unwrap(), 0);
        assert_eq!(user_id("4711").unwrap(), 4711);
        assert!(user_id("nobody here").unwrap_err().to_string().contains("no user"));
    }

    #[test]
    fn names_of_containers_cannot_be_more_than_one_value() {
        assert_eq!(escaped("job/a-1_x"), "job/a-1_x");
        assert_eq!(escaped("a b&c=ü"), "a%20b%26c%3D%C3%BC");
    }
}
