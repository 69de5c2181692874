//! What is told of each model, and of the upstreams of those that servers elsewhere compute.

use std::sync::atomic::Ordering::Relaxed;

use scalellm_accounts::Class;

use crate::fleet::Fleet;
use crate::foreign::Upstream;
use crate::metrics::{label, samples};
use crate::routing::UPSTREAMS;
use crate::text::CacheCounts;

pub fn write_queues(out: &mut String, fleet: &Fleet) {
    let help = "Requests that wait for their turn, of max_queued for each model.";
    let queued = fleet.served.iter().flat_map(|served| {
        Class::ALL.map(|class| {
            let labels = format!("model={},class=\"{}\"", label(&served.name), class.name());
            (labels, served.admission.queued(class))
        })
    });
    samples(out, "scalellm_queued_requests", "gauge", help, queued);
}

pub fn write_text_cache(out: &mut String, fleet: &Fleet) {
    type Value = fn(&CacheCounts) -> u64;
    let families: [(&str, &str, &str, Value); 3] = [
        (
            "scalellm_text_cache_bytes",
            "gauge",
            "Memory held by the ids of texts seen before, of text_cache_bytes for each model.",
            |c| c.held_bytes as u64,
        ),
        (
            "scalellm_text_cache_query_bytes_total",
            "counter",
            "Bytes of prompts' text looked for among the texts seen before.",
            |c| c.looked_up_bytes,
        ),
        (
            "scalellm_text_cache_hit_bytes_total",
            "counter",
            "Bytes of prompts' text found among the texts seen before, and not tokenised again.",
            |c| c.found_bytes,
        ),
    ];
    for (name, kind, help, value) in families {
        let values = fleet.models.iter().map(|model| {
            let labels = format!("model={}", label(&model.name));
            (labels, value(&model.text.cache_counts()))
        });
        samples(out, name, kind, help, values);
    }
}

pub fn write_routing(out: &mut String, fleet: &Fleet) {
    let help = "Choices of a replica, by the model's policy and why it chose so.";
    let chosen = fleet.models.iter().flat_map(|model| {
        let policy = model.routing.policy().name();
        let counts = model.routing.counts().filter(|(_, count)| *count > 0);
        counts.map(move |(reason, count)| {
            let (model, reason) = (label(&model.name), reason.name());
            let labels = format!("model={model},policy=\"{policy}\",reason=\"{reason}\"");
            (labels, count)
        })
    });
    let elsewhere = fleet.foreign.iter().flat_map(|model| {
        let counts = model.picker.counts().filter(|(_, count)| *count > 0);
        counts.map(move |(reason, count)| {
            let (model, reason) = (label(&model.served.name), reason.name());
            let labels = format!("model={model},policy=\"{UPSTREAMS}\",reason=\"{reason}\"");
            (labels, count)
        })
    });
    let chosen = chosen.chain(elsewhere);
    samples(out, "scalellm_routed_total", "counter", help, chosen);
    let help = "Different blocks known to be in the replicas' prefix caches.";
    let blocks = fleet.models.iter().map(|model| {
        let labels = format!("model={}", label(&model.name));
        (labels, model.routing.cached_blocks())
    });
    samples(out, "scalellm_prefix_blocks", "gauge", help, blocks);
    let help = "Prompts that are refused because they were present at deaths of replicas.";
    let refused = fleet.models.iter().map(|model| {
        let labels = format!("model={}", label(&model.name));
        (labels, model.faults.refused_prompts.len())
    });
    samples(out, "scalellm_refused_prompts", "gauge", help, refused);
}

pub fn write_upstreams(out: &mut String, fleet: &Fleet) {
    type Value = fn(&Upstream) -> u64;
    let families: [(&str, &str, &str, Value); 8] = [
        (
            "up",
            "gauge",
            "1 while the upstream can take requests.",
            |u| u.is_usable().into(),
        ),
        (
            "breaker_open",
            "gauge",
            "1 while the upstream gets no requests, or a few to try it, because it failed others.",
            |u| (!u.health.is_closed()).into(),
        ),
        (
            "breakers_opened_total",
            "counter",
            "How often that began.",
            |u| u.health.opened.load(Relaxed),
        ),
        (
            "in_flight_requests",
            "gauge",
            "Requests that it has not answered to the end.",
            |u| u.counts.in_flight.load(Relaxed) as u64,
        ),
        ("requests_total", "counter", "Requests sent to it.", |u| {
            u.counts.requests.load(Relaxed)
        }),
        (
            "failures_total",
            "counter",
            "Of them, those that it failed.",
            |u| u.counts.failures.load(Relaxed),
        ),
        (
            "connections_total",
            "counter",
            "Connections opened to it.",
            |u| u.counts.connections.load(Relaxed),
        ),
        (
            "estimated_total",
            "counter",
            "Answers without usage, whose tokens were estimated.",
            |u| u.counts.estimated.load(Relaxed),
        ),
    ];
    for (name, kind, help, value) in families {
        let name = format!("scalellm_upstream_{name}");
        let values = fleet.foreign.iter().flat_map(|model| {
            model.upstreams.iter().map(move |upstream| {
                let (model, url) = (label(&model.served.name), label(&upstream.name));
                (format!("model={model},upstream={url}"), value(upstream))
            })
        });
        samples(out, &name, kind, help, values);
    }
}
