//! What a user can see of it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use warmswap_tests::{LENIENT, Requirement, Store, eventually, needs, within};

const PATIENCE: Duration = Duration::from_secs(120);

/// One page of the API, as any HTTP client gets it.
fn get(socket: &Path, page: &str) -> std::io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    write!(stream, "GET {page} HTTP/1.1\r\nHost: warmswap\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Class → fate → count, from `warmswap_events_total{class="exec",fate="emitted"} 17`.
fn event_counts(page: &str) -> BTreeMap<String, BTreeMap<String, f64>> {
    let mut counts: BTreeMap<String, BTreeMap<String, f64>> = BTreeMap::new();
    for line in page.lines().filter_map(|line| line.strip_prefix("warmswap_events_total{")) {
        let parts: Vec<&str> = line.split('"').collect();
        let [_, class, _, fate, count] = parts[..] else { panic!("{line}") };
        let count = count.trim_start_matches('}').trim().parse().unwrap();
        counts.entry(class.to_owned()).or_default().insert(fate.to_owned(), count);
    }
    counts
}

#[test]
fn every_view_shows_the_service() {
    needs!("every_view_shows_the_service", Requirement::Containers, Requirement::Bpf);
    let name = "scenario-observe";
    let store = Store::start(name, LENIENT).unwrap();
    let ground = store.ground();
    let load = store.load().unwrap();

    let findings = ground.json(&["check"]).unwrap();
    let findings = findings.as_array().unwrap();
    for area in ["containers", "probes"] {
        assert!(findings.iter().any(|finding| finding["area"] == area && finding["ok"] == true), "{findings:?}");
    }
    for finding in findings.iter().filter(|finding| finding["ok"] == false) {
        assert!(!finding["detail"].as_str().unwrap().is_empty(), "{finding}");
    }

    let seen = within(PATIENCE, || {
        let status = ground.json(&["status"]).ok()?;
        let service = &status["services"][0];
        let busy = service["requests_per_s"].as_f64()? > 0.0 && service["usage"]["memory"].as_f64()? > 0.0;
        busy.then(|| status.clone())
    });
    let status = seen.unwrap_or_else(|| panic!("the probes saw no request: {:?}", store.status()));
    assert!(status["probes_attached"].as_u64().unwrap() > 0, "{status}");
    assert_eq!(status["services"][0]["name"], name);
    assert_eq!(status["services"][0]["listeners"][0][1], store.address().to_string());
    assert_eq!(status["services"][0]["generations"][0]["cooperates"], true);

    // Clients that come and go.
    let lines = ground.json(&["trace", "--service", name, "--class", "tcp", "--seconds", "3"]).unwrap();
    let lines: Vec<Value> = match lines {
        Value::Array(lines) => lines,
        line => vec![line],
    };
    assert!(!lines.is_empty());
    let port = u64::from(store.address().port());
    for line in &lines {
        assert_eq!((&line["service"], &line["event"]["class"]), (&name.into(), &"tcp".into()), "{line}");
        // The kernel has given the port of a closed connection back.
        let closed = line["event"]["new"] == "close";
        assert!(closed || line["event"]["local_port"].as_u64() == Some(port), "{line}");
    }

    let known = within(PATIENCE, || {
        let answer = ground.json(&["forecast", name]).ok()?;
        (answer["report"]["samples"].as_u64()? >= 3 && !answer["demand"].is_null()).then_some(answer)
    });
    let answer = known.unwrap_or_else(|| panic!("no forecast: {:?}", ground.json(&["forecast", name])));
    for resource in ["cpu", "memory", "network", "disk"] {
        let band = &answer["report"]["resources"][resource]["band"];
        let (q05, q50, q95) =
            (band["q05"].as_f64().unwrap(), band["q50"].as_f64().unwrap(), band["q95"].as_f64().unwrap());
        assert!(q05 <= q50 && q50 <= q95, "{resource}: {band}");
    }
    let result = load.stop().unwrap();
    assert!(result.totals.is_clean(), "watching does no harm: {:?}", result.totals);
    store.finish().unwrap();
}

#[test]
fn every_event_is_accounted_for() {
    needs!("every_event_is_accounted_for", Requirement::Containers, Requirement::Bpf);
    let store = Store::start("scenario-account", LENIENT).unwrap();
    let load = store.load().unwrap();
    // Most classes are only emitted while somebody listens.
    let mut trace = store.ground().command().unwrap();
    trace.args(["trace", "--json", "--count", "1000000", "--seconds", "600"]).stdout(Stdio::null());
    let mut trace = trace.spawn().unwrap();
    let socket = store.ground().run_dir().join("agent.sock");
    let emitted = |class: &str| event_counts(&get(&socket, "/metrics").unwrap())[class]["emitted"];
    eventually("the trace sees connections", PATIENCE, || emitted("tcp") > 0.0);
    assert!(store.update("v2").unwrap().said.success(), "{}", store.log());
    assert!(load.stop().unwrap().totals.is_clean());

    // The trace is cut off in the middle, on purpose.
    trace.kill().unwrap();
    trace.wait().unwrap();

    let answer = get(&socket, "/metrics").unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    for line in [
        "warmswap_handovers_total{service=\"scenario-account\"} 1",
        "warmswap_service_generation{service=\"scenario-account\"} 2",
    ] {
        assert!(answer.contains(line), "{line}\n{answer}");
    }
    let counts = event_counts(&answer);
    for class in ["exec", "exit", "tcp", "mark"] {
        assert!(counts.get(class).is_some_and(|fates| fates["emitted"] > 0.0), "{class}: {counts:?}");
    }
    // Others on this machine cause events too, so that some are always on their way; now and then none is.
    eventually("emitted = consumed + discarded + dropped for every class", PATIENCE, || {
        let counts = event_counts(&get(&socket, "/metrics").unwrap());
        counts.values().all(|fates| fates["emitted"] == fates["consumed"] + fates["discarded"] + fates["dropped"])
    });
    let page = get(&socket, "/no-such-page").unwrap();
    assert!(page.starts_with("HTTP/1.1 4") && page.contains("error"), "{page}");
    store.finish().unwrap();
}
