//! Counters and histograms, in Prometheus' text format.

use std::collections::BTreeMap;
use std::fmt::{Display, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parking_lot::Mutex;

use crate::fault_metrics::FaultMetrics;
use crate::gen_ai::{self, ModelTimes};
use crate::stages::{Stage, StageTimes};

/// Upper bounds of the buckets of every histogram, in seconds.
const BOUNDS_S: [f64; 20] = [
    0.000_01, 0.000_03, 0.000_1, 0.000_3, 0.001, 0.002_5, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2,
    0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0,
];

#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; BOUNDS_S.len() + 1],
    sum_us: AtomicU64,
}

impl Histogram {
    pub fn observe_us(&self, us: u64) {
        let seconds = us as f64 / 1e6;
        let bucket = BOUNDS_S.partition_point(|bound| *bound < seconds);
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.sum_us.fetch_add(us, Relaxed);
    }

    /// Whether nothing was observed yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.buckets.iter().all(|bucket| bucket.load(Relaxed) == 0)
    }

    pub fn write(&self, out: &mut String, name: &str, labels: &str) {
        let separator = if labels.is_empty() { "" } else { "," };
        let mut count = 0;
        for (bucket, bound) in self.buckets.iter().zip(
            BOUNDS_S
                .iter()
                .map(f64::to_string)
                .chain(["+Inf".to_owned()]),
        ) {
            count += bucket.load(Relaxed);
            let _ = writeln!(
                out,
                "{name}_bucket{{{labels}{separator}le=\"{bound}\"}} {count}"
            );
        }
        let _ = writeln!(
            out,
            "{name}_sum{{{labels}}} {}",
            self.sum_us.load(Relaxed) as f64 / 1e6
        );
        let _ = writeln!(out, "{name}_count{{{labels}}} {count}");
    }
}

/// What the hooks of a model did, by hook and action.
#[derive(Debug, Default)]
pub struct SafetyCounts(Mutex<BTreeMap<(String, &'static str), u64>>);

impl SafetyCounts {
    pub fn count(&self, hook: &str, action: &'static str) {
        let mut counts = self.0.lock();
        *counts.entry((hook.to_owned(), action)).or_insert(0) += 1;
    }

    fn write(&self, out: &mut String, name: &str, model: &str) {
        for ((hook, action), count) in self.0.lock().iter() {
            let (model, hook) = (label(model), label(hook));
            let _ = writeln!(
                out,
                "{name}{{model={model},hook={hook},action=\"{action}\"}} {count}"
            );
        }
    }
}

/// What is counted for each served model.
#[derive(Debug, Default)]
pub struct ModelMetrics {
    pub prompt_tokens: AtomicU64,
    pub cached_tokens: AtomicU64,
    pub output_tokens: AtomicU64,
    pub times: ModelTimes,
    /// From a replica's giving a choice back, as it ends, to the next output.
    pub hand_over_pause: Histogram,
    pub safety: SafetyCounts,
}

#[derive(Debug)]
pub struct Metrics {
    /// By route and status; both from fixed, short lists.
    requests: Mutex<BTreeMap<(&'static str, u16), u64>>,
    /// Requests refused before they reached an engine, by reason.
    rejected: Mutex<BTreeMap<&'static str, u64>>,
    pub connections: AtomicU64,
    pub connections_open: AtomicU64,
    pub clients_stalled: AtomicU64,
    pub faults: FaultMetrics,
    stages: [Histogram; Stage::ALL.len()],
    /// Those that were ever served: what was counted stays.
    models: Mutex<Vec<(String, Arc<ModelMetrics>)>>,
}

impl Metrics {
    #[must_use]
    pub fn new() -> Metrics {
        Metrics {
            requests: Mutex::default(),
            rejected: Mutex::default(),
            connections: AtomicU64::new(0),
            connections_open: AtomicU64::new(0),
            clients_stalled: AtomicU64::new(0),
            faults: FaultMetrics::default(),
            stages: std::array::from_fn(|_| Histogram::default()),
            models: Mutex::default(),
        }
    }

    /// The counts of a model, by its name.
    #[must_use]
    pub fn model(&self, name: &str) -> Arc<ModelMetrics> {
        let mut models = self.models.lock();
        if let Some((_, counts)) = models.iter().find(|(known, _)| known == name) {
            return Arc::clone(counts);
        }
        let counts = Arc::default();
        models.push((name.to_owned(), Arc::clone(&counts)));
        counts
    }

    pub fn request_ended(&self, route: &'static str, status: u16) {
        *self.requests.lock().entry((route, status)).or_insert(0) += 1;
    }

    /// Takes in the times of a request that was for a model; probes would drown them.
    pub fn observe_stages(&self, times: &StageTimes) {
        for (stage, us) in times.passed() {
            self.stages[stage as usize].observe_us(us);
        }
    }

    pub fn rejected(&self, reason: &'static str) {
        *self.rejected.lock().entry(reason).or_insert(0) += 1;
    }

    /// All of it but the replicas' and the queues' gauges, which the route adds.
    pub fn write(&self, out: &mut String) {
        let help = "Requests that ended, by route and status.";
        let ended = self.requests.lock().clone();
        let ended = ended.into_iter().map(|((route, status), count)| {
            let labels = format!("route=\"{route}\",status=\"{status}\"");
            (labels, count)
        });
        samples(out, "scalellm_requests_total", "counter", help, ended);
        let help = "Requests refused before they reached an engine, by reason.";
        let rejected = self.rejected.lock().clone();
        let rejected = rejected
            .into_iter()
            .map(|(reason, count)| (format!("reason=\"{reason}\""), count));
        samples(out, "scalellm_rejected_total", "counter", help, rejected);
        for (name, kind, help, value) in [
            (
                "scalellm_connections_total",
                "counter",
                "Connections accepted.",
                &self.connections,
            ),
            (
                "scalellm_connections_open",
                "gauge",
                "Connections open now.",
                &self.connections_open,
            ),
            (
                "scalellm_clients_stalled_total",
                "counter",
                "Clients dropped for not reading.",
                &self.clients_stalled,
            ),
        ] {
            sample(out, name, kind, help, value.load(Relaxed));
        }
        self.faults.write(out);
        let models = self.models.lock().clone();
        type Count = fn(&ModelMetrics) -> &AtomicU64;
        let counts: [(&str, &str, Count); 3] = [
            ("scalellm_prompt_tokens_total", "Tokens of prompts.", |m| {
                &m.prompt_tokens
            }),
            (
                "scalellm_cached_tokens_total",
                "Tokens of prompts taken from the prefix cache.",
                |m| &m.cached_tokens,
            ),
            ("scalellm_output_tokens_total", "Tokens generated.", |m| {
                &m.output_tokens
            }),
        ];
        for (name, help, count) in counts {
            let values = models.iter().map(|(model, metrics)| {
                let labels = format!("model={}", label(model));
                (labels, count(metrics).load(Relaxed))
            });
            samples(out, name, "counter", help, values);
        }
        gen_ai::write(
            out,
            models
                .iter()
                .map(|(name, model)| (name.as_str(), &model.times)),
        );
        let name = "scalellm_hand_over_pause_seconds";
        let help = "From a replica's giving a choice back, as it ends, to the choice's next token.";
        family(out, name, "histogram", help);
        for (model, metrics) in &models {
            let labels = format!("model={}", label(model));
            metrics.hand_over_pause.write(out, name, &labels);
        }
        let name = "scalellm_safety_decisions_total";
        let help = "What safety hooks did; a text may be masked several times.";
        family(out, name, "counter", help);
        for (model, metrics) in &models {
            metrics.safety.write(out, name, model);
        }
        family(
            out,
            "scalellm_stage_seconds",
            "histogram",
            "Time of each stage of the life of a request that named a model.",
        );
        for stage in Stage::ALL {
            self.stages[stage as usize].write(
                out,
                "scalellm_stage_seconds",
                &format!("stage=\"{}\"", stage.name()),
            );
        }
    }
}

/// Writes a family's HELP and TYPE lines.
pub fn family(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// Writes a family: the labels of each of its samples, as they stand in braces, and its value.
pub fn samples<V: Display>(
    out: &mut String,
    name: &str,
    kind: &str,
    help: &str,
    values: impl IntoIterator<Item = (String, V)>,
) {
    family(out, name, kind, help);
    for (labels, value) in values {
        let _ = writeln!(out, "{name}{{{labels}}} {value}");
    }
}

/// Writes a family of one sample, without labels.
pub fn sample(out: &mut String, name: &str, kind: &str, help: &str, value: impl Display) {
    family(out, name, kind, help);
    let _ = writeln!(out, "{name} {value}");
}

/// A label's value, quoted.
#[must_use]
pub fn label(value: &str) -> String {
    format!(
        "\"{}\"",
        value
            .replace('\\', "\\\\")
            .replace('"', "\\\"")
            .replace('\n', "\\n")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_counts_cumulatively() {
        let histogram = Histogram::default();
        for us in [10, 900, 1000, 70_000_000] {
            histogram.observe_us(us);
        }
        let mut out = String::new();
        histogram.write(&mut out, "h", "a=\"b\"");
        for line in [
            "h_bucket{a=\"b\",le=\"0.00001\"} 1",
            "h_bucket{a=\"b\",le=\"0.001\"} 3",
            "h_bucket{a=\"b\",le=\"60\"} 3",
            "h_bucket{a=\"b\",le=\"+Inf\"} 4",
            "h_sum{a=\"b\"} 70.00191",
            "h_count{a=\"b\"} 4",
        ] {
            assert!(out.lines().any(|l| l == line), "{line} is not in\n{out}");
        }
    }

    #[test]
    fn labels_are_escaped() {
        assert_eq!(label("a\"b\\c\nd"), r#""a\"b\\c\nd""#);
    }
}
