//! The service file: one TOML file describes one service. See `docs/service-file.md`.
//!
//! [`ServiceFile::parse`] works on a text, so that it can be tested and fuzzed without a file system; relative image
//! paths are resolved by whoever read the file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Listen, PerResource, ServiceName, Signal};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceFile {
    pub name: ServiceName,
    /// A root file system folder, an OCI bundle, or an OCI image archive (`docker save` or OCI layout).
    pub image: ImageRef,
    /// Replaces the image's entrypoint and command.
    #[serde(default)]
    pub command: Option<Vec<String>>,
    /// When a program that does not link the SDK counts as ready.
    #[serde(default)]
    pub ready: Readiness,
    /// Tells such a program to finish with the clients it has and end. `None`: what the image says, else SIGTERM.
    #[serde(default)]
    pub stop_signal: Option<Signal>,
    /// A program that does not say `WATCHDOG=1` for so long is dead.
    #[serde(default)]
    pub watchdog_s: Option<f64>,
    /// Added to the image's environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Where the service is reached, by name. The runtime opens these and passes them as `LISTEN_FDS`.
    #[serde(default)]
    pub listen: BTreeMap<String, Listen>,
    #[serde(default)]
    pub resources: Resources,
    #[serde(default)]
    pub reserve: Reserve,
    #[serde(default)]
    pub handover: Handover,
    #[serde(default)]
    pub schedule: Schedule,
}

/// When a program that does not link the SDK counts as ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Readiness {
    /// When it says `READY=1`, or has run for three seconds without a word.
    #[default]
    Guess,
    /// When it says `READY=1`.
    Notify,
}

/// Where an image lies. Kept as written until resolved against the folder of the service file.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ImageRef(pub PathBuf);

impl From<&str> for ImageRef {
    fn from(path: &str) -> Self {
        Self(path.into())
    }
}

impl ImageRef {
    #[must_use]
    pub fn resolved(&self, folder: &Path) -> Self {
        if self.0.is_absolute() { self.clone() } else { Self(folder.join(&self.0)) }
    }
}

/// Ceilings of every generation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Resources {
    /// Percent of one core.
    pub cpu_pct_max: f64,
    /// MiB.
    pub memory_mb_max: f64,
    pub processes_max: u32,
}

impl Default for Resources {
    fn default() -> Self {
        Self { cpu_pct_max: 100.0, memory_mb_max: 512.0, processes_max: 512 }
    }
}

/// Reservation = forecast quantile × percentage. Where the tuner starts, and its guard rails.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Reserve {
    pub percent: PerResource<f64>,
    pub percent_min: f64,
    pub percent_max: f64,
    /// Learn the percentages from outcomes.
    pub tune: bool,
}

impl Default for Reserve {
    fn default() -> Self {
        Self {
            percent: PerResource { cpu: 110.0, memory: 110.0, network: 100.0, disk: 100.0 },
            percent_min: 50.0,
            percent_max: 200.0,
            tune: true,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Handover {
    pub warm_s_max: f64,
    pub sync_s_max: f64,
    pub quiesce_ms_max: f64,
    /// VERIFY lasts at least this long and at least this many requests, and at most ten times this long.
    pub verify_s_min: f64,
    pub verify_requests_min: u64,
    /// How long the old generation may drain after COMMIT.
    pub drain_s_max: f64,
    /// Roll back when a value after is above this multiple of the value before.
    pub p99_ratio_max: f64,
    pub cpu_ratio_max: f64,
    pub memory_latency_ratio_max: f64,
    /// Roll back when throughput after is below this share of the throughput before while clients offer as much.
    pub throughput_ratio_min: f64,
}

impl Default for Handover {
    fn default() -> Self {
        Self {
            warm_s_max: 30.0,
            sync_s_max: 60.0,
            quiesce_ms_max: 10.0,
            verify_s_min: 2.0,
            verify_requests_min: 200,
            drain_s_max: 30.0,
            p99_ratio_max: 2.0,
            cpu_ratio_max: 2.0,
            memory_latency_ratio_max: 2.0,
            throughput_ratio_min: 0.5,
        }
    }
}

/// When warmswap updates without being asked.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Schedule {
    /// Times of day, UTC, `HH:MM`.
    pub daily_utc: Vec<String>,
    /// Update when the image changes.
    pub watch_image: bool,
    /// Update to the same image when memory is forecast to meet its limit within this many seconds.
    pub before_memory_exhaustion_s: Option<u64>,
}

/// Where a service file is wrong. `line` and `column` count from 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file}:{line}:{column}: {problem}")]
pub struct ServiceFileError {
    pub file: String,
    pub line: usize,
    pub column: usize,
    pub problem: String,
}

impl ServiceFile {
    /// Longest file that is read, in bytes.
    pub const LENGTH_MAX: usize = 1 << 20;
    /// Largest number of any field: 30 years in seconds, a PB in MB. Larger ones are slips of the pen.
    pub const NUMBER_MAX: f64 = 1e9;

    /// Parses and validates. `file` is only used in errors.
    pub fn parse(file: &str, text: &str) -> Result<Self, ServiceFileError> {
        let at = |offset: usize, problem: String| {
            let before = &text[..text.floor_char_boundary(offset)];
            let line = before.matches('\n').count() + 1;
            let column = before.len() - before.rfind('\n').map_or(0, |n| n + 1) + 1;
            ServiceFileError { file: file.to_owned(), line, column, problem }
        };
        if text.len() > Self::LENGTH_MAX {
            return Err(at(0, format!("longer than {} bytes", Self::LENGTH_MAX)));
        }
        let parsed: Self = toml::from_str(text).map_err(|error| {
            let offset = error.span().map_or(0, |span| span.start);
            let problem = error.message().trim();
            match key_of_line(text, offset) {
                Some(key) if !problem.contains(key) => at(offset, format!("{key}: {problem}")),
                _ => at(offset, problem.to_owned()),
            }
        })?;
        parsed.validate().map_err(|(field, problem)| at(offset_of(text, field), format!("{field}: {problem}")))?;
        crate::listen::validate(&parsed.listen).map_err(|wrong| {
            at(offset_in_listener(text, &wrong.name, wrong.field), format!("{}: {}", wrong.field, wrong.problem))
        })?;
        Ok(parsed)
    }

    fn validate(&self) -> Result<(), (&'static str, String)> {
        let positive = |field: &'static str, value: f64| match value {
            value if value > 0.0 && value <= Self::NUMBER_MAX => Ok(()),
            _ => Err((field, format!("{value} is not a number above 0 and up to {}", Self::NUMBER_MAX))),
        };
        positive("cpu_pct_max", self.resources.cpu_pct_max)?;
        positive("memory_mb_max", self.resources.memory_mb_max)?;
        if self.resources.memory_mb_max < 4.0 {
            return Err(("memory_mb_max", format!("{} MB cannot hold a process", self.resources.memory_mb_max)));
        }
        if self.resources.processes_max == 0 {
            return Err(("processes_max", "0 processes cannot run a service".into()));
        }
        let reserve = &self.reserve;
        positive("percent_min", reserve.percent_min)?;
        positive("percent_max", reserve.percent_max)?;
        if reserve.percent_min > reserve.percent_max {
            return Err((
                "percent_min",
                format!("{} is above percent_max = {}", reserve.percent_min, reserve.percent_max),
            ));
        }
        for resource in crate::Resource::ALL {
            positive("percent", reserve.percent[resource])?;
        }
        let handover = &self.handover;
        positive("warm_s_max", handover.warm_s_max)?;
        positive("sync_s_max", handover.sync_s_max)?;
        positive("quiesce_ms_max", handover.quiesce_ms_max)?;
        positive("verify_s_min", handover.verify_s_min)?;
        positive("drain_s_max", handover.drain_s_max)?;
        positive("p99_ratio_max", handover.p99_ratio_max)?;
        positive("cpu_ratio_max", handover.cpu_ratio_max)?;
        positive("memory_latency_ratio_max", handover.memory_latency_ratio_max)?;
        if !(0.0..=1.0).contains(&handover.throughput_ratio_min) {
            return Err(("throughput_ratio_min", format!("{} is not within 0 to 1", handover.throughput_ratio_min)));
        }
        if let Some(watchdog_s) = self.watchdog_s {
            positive("watchdog_s", watchdog_s)?;
        }
        if self.command.as_ref().is_some_and(Vec::is_empty) {
            return Err(("command", "an empty list names no program".into()));
        }
        // NUL ends a text for the kernel, and a name ends at the first "=".
        let texts = self.command.iter().flatten().map(|text| ("command", text));
        for (field, text) in texts.chain(self.env.values().map(|text| ("env", text))) {
            if text.contains('\0') {
                return Err((field, format!("{text:?} contains a NUL character, which no program can be given")));
            }
        }
        if let Some(name) = self.env.keys().find(|name| name.is_empty() || name.contains(['=', '\0'])) {
            return Err(("env", format!("{name:?} is no name of a variable: not empty, without \"=\" and NUL")));
        }
        for time in &self.schedule.daily_utc {
            minute_of_day(time).ok_or_else(|| ("daily_utc", format!("{time:?} is no time of day like \"03:30\"")))?;
        }
        Ok(())
    }
}

/// `HH:MM` as minutes since midnight.
fn minute_of_day(time: &str) -> Option<u32> {
    let (hours, minutes) = time.split_once(':')?;
    let two_digits = |s: &str| (s.len() == 2).then(|| s.parse::<u32>().ok()).flatten();
    let (hours, minutes) = (two_digits(hours)?, two_digits(minutes)?);
    (hours < 24 && minutes < 60).then_some(hours * 60 + minutes)
}

impl Schedule {
    /// The scheduled times as minutes since midnight UTC.
    pub fn minutes_utc(&self) -> impl Iterator<Item = u32> + '_ {
        self.daily_utc.iter().filter_map(|time| minute_of_day(time))
    }
}

/// The key that the line around `offset` assigns.
fn key_of_line(text: &str, offset: usize) -> Option<&str> {
    let offset = text.floor_char_boundary(offset);
    let start = text[..offset].rfind('\n').map_or(0, |n| n + 1);
    let line = text[start..].lines().next()?;
    line.split_once('=').map(|(key, _)| key.trim()).filter(|key| !key.is_empty())
}

/// Where a field stands in the text, for an error about its value; the start when it is not there (a default).
fn offset_of(text: &str, field: &str) -> usize {
    let mut offset = 0;
    for line in text.split_inclusive('\n') {
        let trimmed = line.trim_start();
        let key = trimmed.trim_start_matches('[');
        if key.starts_with(field) {
            return offset + (line.len() - trimmed.len());
        }
        offset += line.len();
    }
    0
}

/// Where a field of one listener stands: below its own header, or on the line that begins with its name.
fn offset_in_listener(text: &str, name: &str, field: &str) -> usize {
    // However it is quoted and spaced.
    let plain =
        |line: &str| -> String { line.chars().filter(|c| !c.is_whitespace() && !matches!(c, '"' | '\'')).collect() };
    let header = plain(&format!("[listen.{name}]"));
    let mut end = 0;
    let mut lines = text.split_inclusive('\n').map(|line| {
        end += line.len();
        (end - line.len(), line)
    });
    let Some((begin, _)) = lines.find(|(_, line)| plain(line).starts_with(&header)) else {
        return offset_of(text, name);
    };
    // Up to the next table: what is left out here may stand in another listener.
    let mut own = lines.take_while(|(_, line)| !line.trim_start().starts_with('['));
    own.find(|(_, line)| line.trim_start().starts_with(field)).map_or(begin, |(at, _)| at)
}

#[cfg(test)]
mod tests {
    use crate::Network;

    use super::*;

    const SMALL: &str = "name = \"sessions\"\nimage = \"images/v1\"\n[listen.resp]\naddress = \"127.0.0.1:6380\"\n";

    #[test]
    fn a_small_file_gets_defaults() {
        let file = ServiceFile::parse("s.toml", SMALL).expect("valid");
        assert_eq!(file.name.as_str(), "sessions");
        assert_eq!(file.listen["resp"].network, Network::Host);
        assert_eq!(file.handover, Handover::default());
    }

    #[test]
    fn errors_name_file_line_and_field() {
        let cases = [
            ("name = \"s\"\nimage = 3\n", 2, "image"),
            ("name = \"S!\"\nimage = \"x\"\n", 1, "service name"),
            ("name = \"s\"\nimage = \"x\"\ncolour = 1\n", 3, "colour"),
            ("name = \"s\"\nimage = \"x\"\n[resources]\nmemory_mb_max = 0\n", 4, "memory_mb_max"),
            ("name = \"s\"\nimage = \"x\"\n[listen.a]\naddress = \"nowhere\"\n", 4, "socket address"),
            ("name = \"s\"\nimage = \"x\"\n[schedule]\ndaily_utc = [\"25:00\"]\n", 4, "daily_utc"),
            ("name = \"s\"\nimage = \"x\"\n[handover]\nverify_s_min = 1e300\n", 4, "verify_s_min"),
            ("name = \"s\"\nimage = \"x\"\n[handover]\nwarm_s_max = nan\n", 4, "warm_s_max"),
            ("name = \"s\"\nimage = \"x\"\n[env]\n\"A=B\" = \"x\"\n", 3, "A=B"),
            ("name = \"s\"\nimage = \"x\"\ncommand = [\"a\\u0000\"]\n", 3, "NUL"),
            ("name = \"s\"\nimage = \"x\"\n[listen.a]\naddress = \"127.0.0.1:0\"\n", 4, "port 0"),
            ("name = \"s\"\nimage = \"x\"\n[listen.a]\naddress = \"run/app.sock\"\n", 4, "absolute"),
            ("name = \"s\"\nimage = \"x\"\n[listen.a]\naddress = \"/run/../app\"\n", 4, "absolute"),
            ("name = \"s\"\nimage = \"x\"\n[listen.a]\naddress = \"/run/a\"\ntype = \"raw\"\n", 5, "raw"),
            ("name = \"s\"\nimage = \"x\"\n[listen.a]\naddress = \"/run/a\"\nnetwork = \"service\"\n", 5, "network"),
            ("name = \"s\"\nimage = \"x\"\n[listen.a]\naddress = \"/run/a\"\nmode = \"rw\"\n", 5, "octal"),
            ("name = \"s\"\nimage = \"x\"\n[listen.a]\naddress = \"/run/a\"\nmode = \"01777\"\n", 5, "octal"),
            ("name = \"s\"\nimage = \"x\"\n[listen.a]\naddress = \"/run/a\"\nowner = \":g\"\n", 5, "owner"),
            ("name = \"s\"\nimage = \"x\"\n[listen.a]\naddress = \"[::1]:1\"\nmode = \"0660\"\n", 5, "unix socket"),
            (
                "name = \"s\"\nimage = \"x\"\n[listen.a]\naddress = \"/run/a\"\n[listen.b]\nbacklog = 1\naddress = \"/run/a\"\n",
                7,
                "listener \"a\"",
            ),
            ("name = \"s\"\nimage = \"x\"\n[listen]\na = { address = \"/run/a\", mode = \"x\" }\n", 4, "mode"),
            ("name = \"s\"\nimage = \"x\"\n[listen.a]\n[listen.b]\naddress = \"/run/b\"\n", 3, "address"),
            (
                "name = \"s\"\nimage = \"x\"\n[listen.\"a b\"]\naddress = \"/run/a\"\n[listen.b]\naddress = \"/run/b\"\n",
                3,
                "listener name",
            ),
            (
                "name = \"s\"\nimage = \"x\"\n[listen.a]\naddress = \"/run/a\"\n[listen.b]\naddress = \"/run/b\"\nmode = \"x\"\n",
                7,
                "mode",
            ),
            ("name = \"s\"\nimage = \"x\"\nstop_signal = \"SIGNONE\"\n", 3, "SIGNONE"),
            ("name = \"s\"\nimage = \"x\"\nwatchdog_s = 0\n", 3, "watchdog_s"),
            ("name = \"s\"\nimage = \"x\"\nready = \"soon\"\n", 3, "ready"),
            ("name = \"s\"\n", 1, "image"),
            ("name = ", 1, ""),
        ];
        for (text, line, word) in cases {
            let error = ServiceFile::parse("s.toml", text).expect_err(text);
            assert_eq!(error.line, line, "{text}: {error}");
            assert!(error.to_string().contains(word), "{text}: {error}");
            assert!(error.to_string().starts_with("s.toml:"), "{error}");
        }
    }
}
