//! The agent in Prometheus text format.

use std::fmt::Write as _;

use warmswap_model::Resource;

use crate::api::AgentStatus;

/// One page of metrics.
pub(crate) fn render(status: &AgentStatus) -> String {
    let mut page = Page::default();
    page.family("warmswap_up_seconds", "gauge", "Time since the agent started.");
    page.sample("warmswap_up_seconds", &[], status.uptime_s);
    page.family("warmswap_probes", "gauge", "Probes by whether they are attached.");
    page.sample("warmswap_probes", &[("state", "attached")], status.probes_attached as f64);
    page.sample("warmswap_probes", &[("state", "off")], status.probes_off.len() as f64);
    page.family(
        "warmswap_events_total",
        "counter",
        "Events by class and by what became of them: emitted = consumed + discarded + dropped. Classes that only \
         `warmswap trace` reads are emitted while one runs.",
    );
    for class in &status.events {
        for (fate, count) in [
            ("emitted", class.emitted),
            ("consumed", class.consumed),
            ("discarded", class.discarded),
            ("dropped", class.dropped),
        ] {
            page.sample("warmswap_events_total", &[("class", &class.class), ("fate", fate)], count as f64);
        }
    }
    page.family(
        "warmswap_events_shed_total",
        "counter",
        "Of the dropped: events that gave way to classes of more value as the ring filled.",
    );
    for class in &status.events {
        page.sample("warmswap_events_shed_total", &[("class", &class.class)], class.shed as f64);
    }
    page.family(
        "warmswap_service_usage",
        "gauge",
        "Use in the last second: cpu %, memory MB, network Mbps, disk MB/s.",
    );
    for service in &status.services {
        for resource in Resource::ALL {
            let labels = [("service", service.name.as_str()), ("resource", resource.name())];
            page.sample("warmswap_service_usage", &labels, service.usage[resource]);
        }
    }
    page.family("warmswap_service_generation", "gauge", "Generation that owns the service; 0 when none does.");
    for service in &status.services {
        let generation = service.owner.map_or(0, |owner| owner.0);
        page.sample("warmswap_service_generation", &[("service", service.name.as_str())], f64::from(generation));
    }
    page.family("warmswap_service_requests_per_second", "gauge", "Requests answered, as the probes saw them.");
    for service in &status.services {
        let labels = [("service", service.name.as_str())];
        page.sample("warmswap_service_requests_per_second", &labels, service.requests_per_s);
    }
    page.family("warmswap_service_latency_p99_seconds", "gauge", "99th percentile from request to answer.");
    for service in &status.services {
        if let Some(us) = service.p99_us {
            page.sample("warmswap_service_latency_p99_seconds", &[("service", service.name.as_str())], us / 1e6);
        }
    }
    page.family("warmswap_handovers_total", "counter", "Handovers since the agent started.");
    for service in &status.services {
        page.sample("warmswap_handovers_total", &[("service", service.name.as_str())], service.handovers as f64);
    }
    page.text
}

#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let labels: Vec<String> = labels.iter().map(|(key, value)| format!("{key}=\"{}\"", escape(value))).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.text, "{name}{labels} {value}");
    }
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_values_are_escaped_and_families_come_before_their_samples() {
        let mut page = Page::default();
        page.family("a", "gauge", "help");
        page.sample("a", &[("l", "x\"\\\n")], 1.5);
        assert_eq!(page.text, "# HELP a help\n# TYPE a gauge\na{l=\"x\\\"\\\\\\n\"} 1.5\n");
    }
}
