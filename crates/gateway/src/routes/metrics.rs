//! `GET /metrics`

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use scalellm_accounts::Class;
use scalellm_engine_link::proto::ExpertUse;
use scalellm_engine_link::{Replica, ReplicaState};

use crate::app::App;
use crate::fleet::{Fleet, state_name};
use crate::foreign::Upstream;
use crate::metrics::{family, label};
use crate::text::CacheCounts;

type Gauge = (
    &'static str,
    &'static str,
    &'static str,
    fn(&Replica) -> f64,
);

const REPLICA_GAUGES: [Gauge; 16] = [
    (
        "running_requests",
        "gauge",
        "Requests in the engine's batch.",
        |r| r.load().running.into(),
    ),
    (
        "waiting_requests",
        "gauge",
        "Requests that wait in the engine.",
        |r| r.load().waiting.into(),
    ),
    (
        "backlog_tokens",
        "gauge",
        "Prompt tokens accepted and not computed.",
        |r| r.load().backlog_tokens as f64,
    ),
    ("kv_blocks_used", "gauge", "KV blocks in use.", |r| {
        r.load().kv_blocks_used.into()
    }),
    ("kv_blocks_total", "gauge", "KV blocks there are.", |r| {
        r.load().kv_blocks_total.into()
    }),
    ("step_seconds", "gauge", "Time of the last step.", |r| {
        f64::from(r.load().step_ms) / 1e3
    }),
    (
        "step_overhead_seconds",
        "gauge",
        "Of the last step, outside the model.",
        |r| f64::from(r.load().overhead_ms) / 1e3,
    ),
    (
        "step_age_seconds",
        "gauge",
        "Since the engine's loop last came round.",
        |r| f64::from(r.load().step_age_ms) / 1e3,
    ),
    ("steps_total", "counter", "Steps of the engine.", |r| {
        r.load().steps as f64
    }),
    (
        "preemptions_total",
        "counter",
        "Requests preempted by the engine.",
        |r| r.load().preemptions as f64,
    ),
    (
        "prefix_hit_tokens_total",
        "counter",
        "Prompt tokens found in the prefix cache.",
        |r| r.load().prefix_hit_tokens as f64,
    ),
    (
        "prefix_query_tokens_total",
        "counter",
        "Prompt tokens looked for in the prefix cache.",
        |r| r.load().prefix_query_tokens as f64,
    ),
    (
        "draft_tokens_total",
        "counter",
        "Tokens that speculation guessed.",
        |r| r.load().draft_tokens as f64,
    ),
    (
        "accepted_draft_tokens_total",
        "counter",
        "Guessed tokens that were right.",
        |r| r.load().accepted_draft_tokens as f64,
    ),
    (
        "in_flight_requests",
        "gauge",
        "Requests of this gateway on the replica.",
        |r| r.in_flight() as f64,
    ),
    (
        "in_flight_tokens",
        "gauge",
        "Prompt tokens sent and not answered.",
        |r| r.in_flight_tokens() as f64,
    ),
];

const STATES: [ReplicaState; 5] = [
    ReplicaState::Connecting,
    ReplicaState::Ready,
    ReplicaState::Hung,
    ReplicaState::Draining,
    ReplicaState::Lost,
];

pub async fn metrics(State(app): State<Arc<App>>) -> Response {
    let live = app.live();
    let fleet = &live.fleet;
    let mut out = String::with_capacity(64 << 10);
    for (name, help, value) in [
        (
            "scalellm_requests_in_flight",
            "HTTP requests whose response has not ended.",
            app.in_flight(),
        ),
        (
            "scalellm_generations_in_flight",
            "Places of running requests, of max_in_flight for each model.",
            fleet
                .served
                .iter()
                .map(|served| served.admission.taken())
                .sum(),
        ),
        (
            "scalellm_tasks",
            "Tasks of the gateway: a few, and one for each connection.",
            tokio::runtime::Handle::current()
                .metrics()
                .num_alive_tasks(),
        ),
        (
            "scalellm_body_memory_bytes",
            "Memory held by request bodies, of max_body_memory_bytes.",
            app.body_memory.taken_bytes(),
        ),
        (
            "scalellm_text_queue",
            "Prompts that wait for a thread, of text_queue.",
            app.text_pool.queued(),
        ),
    ] {
        family(&mut out, name, "gauge", help);
        let _ = writeln!(out, "{name} {value}");
    }
    write_queues(&mut out, fleet);
    write_text_cache(&mut out, fleet);
    write_routing(&mut out, fleet);
    write_accounts(&mut out, &app);
    write_traces(&mut out, &app);
    write_upstreams(&mut out, fleet);
    app.metrics.write(&mut out);
    let replicas: Vec<(String, &Arc<Replica>)> = fleet
        .models
        .iter()
        .flat_map(|model| {
            model
                .replicas
                .iter()
                .map(move |replica| (&model.name, replica))
        })
        .map(|(model, replica)| {
            (
                format!(
                    "model={},replica={}",
                    label(model),
                    label(&replica.address().to_string())
                ),
                replica,
            )
        })
        .collect();
    for (name, kind, help, value) in REPLICA_GAUGES {
        let name = format!("scalellm_replica_{name}");
        family(&mut out, &name, kind, help);
        for (labels, replica) in &replicas {
            let _ = writeln!(out, "{name}{{{labels}}} {}", value(replica));
        }
    }
    family(
        &mut out,
        "scalellm_replica_state",
        "gauge",
        "1 for the state that the replica is in.",
    );
    for (labels, replica) in &replicas {
        for state in STATES {
            let is = u8::from(replica.state() == state);
            let _ = writeln!(
                out,
                "scalellm_replica_state{{{labels},state=\"{}\"}} {is}",
                state_name(state)
            );
        }
    }
    write_step_costs(&mut out, &replicas);
    write_expert_use(&mut out, &replicas);
    write_faults(&mut out, fleet);
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, kind)], out).into_response()
}

/// What a step costs, as each engine fits it to its last steps.
fn write_step_costs(out: &mut String, replicas: &[(String, &Arc<Replica>)]) {
    let name = "scalellm_replica_step_cost_ms";
    family(
        out,
        name,
        "gauge",
        "Of a step: fixed, for a token, a position attended to, and a request; fitted to the last steps.",
    );
    for (labels, replica) in replicas {
        let Some(cost) = replica.load().step_cost else {
            continue;
        };
        for (of, ms) in [
            ("step", cost.fixed_ms),
            ("token", cost.token_ms),
            ("attended", cost.attended_ms),
            ("request", cost.request_ms),
        ] {
            let _ = writeln!(out, "{name}{{{labels},of=\"{of}\"}} {ms}");
        }
    }
}

/// How evenly tokens choose a mixture's experts (docs/parallelism.md).
fn write_expert_use(out: &mut String, replicas: &[(String, &Arc<Replica>)]) {
    type Value = fn(&ExpertUse) -> u64;
    let used: Vec<(&str, ExpertUse)> = replicas
        .iter()
        .filter_map(|(labels, replica)| Some((labels.as_str(), replica.load().expert_use?)))
        .collect();
    let families: [(&str, &str, Value); 3] = [
        (
            "expert_layers_total",
            "Sparse layers computed, of all steps.",
            |used| used.layers,
        ),
        (
            "experts_read_total",
            "Experts that any token of a step chose, layer by layer.",
            |used| used.read,
        ),
        (
            "expert_busiest_choices_total",
            "Choices of each layer's busiest rank, or expert where ranks do not divide these.",
            |used| used.busiest,
        ),
    ];
    for (name, help, value) in families {
        let name = format!("scalellm_replica_{name}");
        family(out, &name, "counter", help);
        for (labels, used) in &used {
            let _ = writeln!(out, "{name}{{{labels}}} {}", value(used));
        }
    }
    let name = "scalellm_replica_expert_choices_total";
    let help = "Choices of an expert by a token, and which rank has it.";
    family(out, name, "counter", help);
    for (labels, used) in &used {
        let (ranks, experts) = (used.ranks as usize, used.choices.len());
        for (expert, choices) in used.choices.iter().enumerate() {
            // Without a division every rank has its part of each.
            let rank = expert * ranks / experts;
            let _ = writeln!(
                out,
                "{name}{{{labels},expert=\"{expert}\",rank=\"{rank}\"}} {choices}"
            );
        }
    }
}

fn write_queues(out: &mut String, fleet: &Fleet) {
    let name = "scalellm_queued_requests";
    family(
        out,
        name,
        "gauge",
        "Requests that wait for their turn, of max_queued for each model.",
    );
    for served in &fleet.served {
        for class in Class::ALL {
            let _ = writeln!(
                out,
                "{name}{{model={},class=\"{}\"}} {}",
                label(&served.name),
                class.name(),
                served.admission.queued(class)
            );
        }
    }
}

fn write_text_cache(out: &mut String, fleet: &Fleet) {
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
        family(out, name, kind, help);
        for model in &fleet.models {
            let value = value(&model.text.cache_counts());
            let _ = writeln!(out, "{name}{{model={}}} {value}", label(&model.name));
        }
    }
}

fn write_routing(out: &mut String, fleet: &Fleet) {
    let name = "scalellm_routed_total";
    family(
        out,
        name,
        "counter",
        "Choices of a replica, by the model's policy and why it chose so.",
    );
    for model in &fleet.models {
        let policy = model.routing.policy().name();
        for (reason, count) in model.routing.counts().filter(|(_, count)| *count > 0) {
            let model = label(&model.name);
            let reason = reason.name();
            let _ = writeln!(
                out,
                "{name}{{model={model},policy=\"{policy}\",reason=\"{reason}\"}} {count}"
            );
        }
    }
    let name = "scalellm_prefix_blocks";
    family(
        out,
        name,
        "gauge",
        "Different blocks known to be in the replicas' prefix caches.",
    );
    for model in &fleet.models {
        let blocks = model.routing.cached_blocks();
        let _ = writeln!(out, "{name}{{model={}}} {blocks}", label(&model.name));
    }
}

fn write_upstreams(out: &mut String, fleet: &Fleet) {
    type Value = fn(&Upstream) -> u64;
    let families: [(&str, &str, &str, Value); 6] = [
        (
            "up",
            "gauge",
            "1 while the upstream can take requests.",
            |u| u.is_usable().into(),
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
        family(out, &name, kind, help);
        for model in &fleet.foreign {
            for upstream in &model.upstreams {
                let (model, url) = (label(&model.served.name), label(&upstream.name));
                let _ = writeln!(
                    out,
                    "{name}{{model={model},upstream={url}}} {}",
                    value(upstream)
                );
            }
        }
    }
}

fn write_faults(out: &mut String, fleet: &Fleet) {
    let name = "scalellm_breaker_open";
    let help =
        "1 while the replica gets no requests, or a few to try it, because it failed others.";
    family(out, name, "gauge", help);
    for model in &fleet.models {
        for (index, replica) in model.replicas.iter().enumerate() {
            let (open, address) = (!model.faults.is_closed(index), replica.address());
            let labels = format!(
                "model={},replica={}",
                label(&model.served.name),
                label(&address.to_string())
            );
            let _ = writeln!(out, "{name}{{{labels}}} {}", u8::from(open));
        }
    }
    let name = "scalellm_refused_prompts";
    let help = "Prompts that are refused because they were present at deaths of replicas.";
    family(out, name, "gauge", help);
    for model in &fleet.models {
        let refused = model.faults.refused_prompts.len();
        let _ = writeln!(
            out,
            "{name}{{model={}}} {refused}",
            label(&model.served.name)
        );
    }
}

fn write_traces(out: &mut String, app: &App) {
    let Some(traces) = &app.traces else {
        return;
    };
    let counts = traces.counts();
    for (name, help, count) in [
        (
            "scalellm_traces_exported_total",
            "Requests whose trace the collector has taken.",
            &counts.exported,
        ),
        (
            "scalellm_traces_dropped_total",
            "Requests whose trace is lost: too many waited, or the collector did not take it.",
            &counts.dropped,
        ),
    ] {
        family(out, name, "counter", help);
        let _ = writeln!(out, "{name} {}", count.load(Relaxed));
    }
}

fn write_accounts(out: &mut String, app: &App) {
    let Some(accounts) = &app.accounts else {
        return;
    };
    let counts = accounts.counts();
    for (name, kind, help, value) in [
        (
            "scalellm_accounts_database_up",
            "gauge",
            "1 while the database of keys and usage answers.",
            u64::from(counts.database_up),
        ),
        (
            "scalellm_accounts_database_failures_total",
            "counter",
            "Questions that it did not answer.",
            counts.database_failures,
        ),
        (
            "scalellm_accounts_keys",
            "gauge",
            "Keys in use lately.",
            counts.keys_known as u64,
        ),
        (
            "scalellm_usage_waiting",
            "gauge",
            "Ended requests whose usage is not written yet.",
            counts.usage_waiting as u64,
        ),
        (
            "scalellm_usage_written_total",
            "counter",
            "Ended requests whose usage is written.",
            counts.usage_written,
        ),
        (
            "scalellm_usage_lost_total",
            "counter",
            "Ended requests whose usage is lost: too much waited.",
            counts.usage_lost,
        ),
    ] {
        family(out, name, kind, help);
        let _ = writeln!(out, "{name} {value}");
    }
}
