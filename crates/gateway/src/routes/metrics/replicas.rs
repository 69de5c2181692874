//! What is told of each replica of our own: its engine's load as last seen, and what became of it.

use std::sync::Arc;

use scalellm_engine_link::proto::ExpertUse;
use scalellm_engine_link::{Replica, ReplicaState};

use crate::fleet::{Fleet, Model, state_name};
use crate::metrics::{label, samples};

type Value = fn(&Replica) -> f64;

const REPLICA_GAUGES: [(&str, &str, &str, Value); 16] = [
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

/// A replica with its model, and the labels that name it.
struct Told<'a> {
    labels: String,
    model: &'a Model,
    /// Its place among the model's replicas.
    index: usize,
    replica: &'a Arc<Replica>,
}

pub fn write(out: &mut String, fleet: &Fleet) {
    let told: Vec<Told> = fleet.models.iter().flat_map(|model| of(model)).collect();
    for (name, kind, help, value) in REPLICA_GAUGES {
        let name = format!("scalellm_replica_{name}");
        let values = told
            .iter()
            .map(|one| (one.labels.clone(), value(one.replica)));
        samples(out, &name, kind, help, values);
    }
    let help = "1 for the state that the replica is in.";
    let states = told.iter().flat_map(|one| {
        STATES.map(|state| {
            let labels = format!("{},state=\"{}\"", one.labels, state_name(state));
            (labels, u8::from(one.replica.state() == state))
        })
    });
    samples(out, "scalellm_replica_state", "gauge", help, states);
    let help = "Of a step: fixed, for a token, a position attended to, and a request; fitted to the last steps.";
    let costs = told.iter().flat_map(step_costs);
    samples(out, "scalellm_replica_step_cost_ms", "gauge", help, costs);
    write_expert_use(out, &told);
    let help =
        "1 while the replica gets no requests, or a few to try it, because it failed others.";
    let breakers = told.iter().map(|one| {
        let open = !one.model.faults.is_closed(one.index);
        (one.labels.clone(), u8::from(open))
    });
    samples(out, "scalellm_breaker_open", "gauge", help, breakers);
}

fn of(model: &Model) -> impl Iterator<Item = Told<'_>> {
    model
        .replicas
        .iter()
        .enumerate()
        .map(|(index, replica)| Told {
            labels: format!(
                "model={},replica={}",
                label(&model.name),
                label(&replica.address().to_string())
            ),
            model,
            index,
            replica,
        })
}

/// What a step costs, as the engine fits it to its last steps; nothing before it has.
fn step_costs(one: &Told) -> Vec<(String, f32)> {
    let Some(cost) = one.replica.load().step_cost else {
        return Vec::new();
    };
    [
        ("step", cost.fixed_ms),
        ("token", cost.token_ms),
        ("attended", cost.attended_ms),
        ("request", cost.request_ms),
    ]
    .map(|(of, ms)| (format!("{},of=\"{of}\"", one.labels), ms))
    .into()
}

/// How evenly tokens choose a mixture's experts (docs/parallelism.md).
fn write_expert_use(out: &mut String, told: &[Told]) {
    type Count = fn(&ExpertUse) -> u64;
    let used: Vec<(&str, ExpertUse)> = told
        .iter()
        .filter_map(|one| Some((one.labels.as_str(), one.replica.load().expert_use.clone()?)))
        .collect();
    let families: [(&str, &str, Count); 3] = [
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
    for (name, help, count) in families {
        let name = format!("scalellm_replica_{name}");
        let values = used
            .iter()
            .map(|(labels, used)| ((*labels).to_owned(), count(used)));
        samples(out, &name, "counter", help, values);
    }
    let choices = used.iter().flat_map(|(labels, used)| {
        let (ranks, experts) = (used.ranks as usize, used.choices.len());
        used.choices.iter().enumerate().map(move |(expert, count)| {
            // Without a division every rank has its part of each.
            let rank = expert * ranks / experts;
            (
                format!("{labels},expert=\"{expert}\",rank=\"{rank}\""),
                count,
            )
        })
    });
    let name = "scalellm_replica_expert_choices_total";
    let help = "Choices of an expert by a token, and which rank has it.";
    samples(out, name, "counter", help, choices);
}
