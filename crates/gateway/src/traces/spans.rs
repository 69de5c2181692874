//! A request's times as OpenTelemetry spans, in OTLP's JSON (<https://opentelemetry.io/docs/specs/otlp/>).
//!
//! ```text
//! gateway   POST /v1/chat/completions                  the client's span is its parent, where there is one
//! gateway     |- accept, parse, ... route, link_out    one after the other, as they are measured
//! engine      |- generate                              by the engine's clock, as it told with its first and last output
//! engine      |    '- queue, prefill, decode
//! gateway     '- link_back, decode
//! ```
//!
//! `scalellm profile --otlp` lays out the same stages for a load of its own.

use std::collections::BTreeMap;

use scalellm_engine_link::proto;
use serde_json::{Map, Value, json};

use super::context::{TraceContext, new_span};
use crate::gen_ai::Operation;
use crate::recent::EndedRequest;
use crate::stages::Stage;

/// Span kinds.
const INTERNAL: u8 = 1;
const SERVER: u8 = 2;
/// A span's status.
const ERROR: u8 = 2;

/// An `ExportTraceServiceRequest` with the spans of these requests, and how many there are.
#[must_use]
pub fn document<'a>(requests: impl IntoIterator<Item = &'a EndedRequest>) -> (Value, usize) {
    let mut gateway = Vec::new();
    let mut engines: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
    for request in requests {
        let Some(context) = &request.trace else {
            continue;
        };
        gateway_spans(request, context, &mut gateway);
        let replica = request.replica.as_deref().unwrap_or_default();
        engine_spans(request, context, engines.entry(replica).or_default());
    }
    let version = attribute("service.version", env!("CARGO_PKG_VERSION"));
    let of_gateway = vec![attribute("service.name", "scalellm-gateway"), version];
    let mut number = gateway.len();
    let mut resources = vec![resource(of_gateway, gateway)];
    for (replica, spans) in engines {
        if !spans.is_empty() {
            number += spans.len();
            let of_engine = vec![
                attribute("service.name", "scalellm-engine"),
                attribute("service.instance.id", replica),
            ];
            resources.push(resource(of_engine, spans));
        }
    }
    (json!({"resourceSpans": resources}), number)
}

fn resource(attributes: Vec<Value>, spans: Vec<Value>) -> Value {
    json!({
        "resource": {"attributes": attributes},
        "scopeSpans": [{"scope": {"name": "scalellm"}, "spans": spans}],
    })
}

fn gateway_spans(request: &EndedRequest, context: &TraceContext, spans: &mut Vec<Value>) {
    let stages = &request.times;
    let mut root = Span {
        name: format!("POST {}", request.route),
        kind: SERVER,
        start_us: request.started_us,
        took_us: stages.get_us(Stage::Total).unwrap_or(0),
        attributes: about(request),
    }
    .json(context.trace, context.span, context.parent);
    if request.status >= 500 {
        root["status"] = json!({"code": ERROR});
    }
    spans.push(root);
    let mut child = |name: &str, start_us: u64, took_us: u64| {
        let span = Span {
            name: name.to_owned(),
            kind: INTERNAL,
            start_us,
            took_us,
            attributes: Vec::new(),
        };
        spans.push(span.json(context.trace, new_span(), Some(context.span)));
    };
    let mut at_us = request.started_us;
    for stage in Stage::ALL {
        if stage == Stage::First {
            break;
        }
        let took_us = stages.get_us(stage).unwrap_or(0);
        // The engine's are its own spans.
        if took_us > 0 && !stage.is_engines() {
            child(stage.name(), at_us, took_us);
        }
        at_us += took_us;
    }
    if let (Some(first_us), Some(last_us)) = (stages.get_us(Stage::First), request.last_tokens_us)
        && last_us > first_us
    {
        let start_us = request.started_us + first_us;
        child(Stage::Decode.name(), start_us, last_us - first_us);
    }
}

fn engine_spans(request: &EndedRequest, context: &TraceContext, spans: &mut Vec<Value>) {
    let Some(first) = &request.engine_first else {
        return;
    };
    // A request that was given up has no last output.
    let last = request.engine_last.as_ref().unwrap_or(first);
    let end_us = last.finished_us.max(first.first_token_us);
    let whole = new_span();
    let mut part = |name: &str, kind: u8, from_us: u64, to_us: u64, attributes| {
        let span = Span {
            name: name.to_owned(),
            kind,
            start_us: from_us,
            took_us: to_us.saturating_sub(from_us),
            attributes,
        };
        let (id, parent) = match kind {
            SERVER => (whole, context.span),
            _ => (new_span(), whole),
        };
        spans.push(span.json(context.trace, id, Some(parent)));
    };
    let counts = vec![
        attribute("scalellm.steps", last.steps),
        attribute("scalellm.preemptions", last.preemptions),
    ];
    part("generate", SERVER, first.received_us, end_us, counts);
    let scheduled_us = first.first_scheduled_us;
    part(
        "queue",
        INTERNAL,
        first.received_us,
        scheduled_us,
        Vec::new(),
    );
    let token_us = first.first_token_us;
    part(
        "prefill",
        INTERNAL,
        scheduled_us,
        token_us,
        phases(&first.prefill),
    );
    if end_us > token_us {
        part("decode", INTERNAL, token_us, end_us, phases(&last.decode));
    }
}

/// Names of the semantic conventions where there are some (<https://opentelemetry.io/docs/specs/semconv/gen-ai/>).
fn about(request: &EndedRequest) -> Vec<Value> {
    let operation = Operation::of_route(request.route);
    let failed = request.status >= 400;
    let mut found = vec![
        attribute("http.request.method", "POST"),
        attribute("http.route", request.route),
        attribute("http.response.status_code", request.status),
        attribute("gen_ai.provider.name", "scalellm"),
        attribute("gen_ai.request.model", &*request.model),
        attribute("gen_ai.usage.input_tokens", request.prompt_tokens),
        attribute(
            "gen_ai.usage.cache_read.input_tokens",
            request.cached_tokens,
        ),
        attribute("gen_ai.usage.output_tokens", request.output_tokens),
        attribute("scalellm.request_id", &*request.id),
        attribute("scalellm.replays", request.replays),
    ];
    found.extend(operation.map(|one| attribute("gen_ai.operation.name", one.name())));
    found.extend(failed.then(|| attribute("error.type", request.status.to_string())));
    let replica = request.replica.as_deref();
    found.extend(replica.map(|replica| attribute("scalellm.replica", replica)));
    if let Some(us) = request.times.get_us(Stage::First) {
        found.push(attribute("scalellm.ttft_ms", us as f64 / 1e3));
    }
    if let Some(finish) = request.finish {
        let reasons = json!({"arrayValue": {"values": [{"stringValue": finish}]}});
        found.push(json!({"key": "gen_ai.response.finish_reasons", "value": reasons}));
    }
    found
}

fn phases(phases: &[proto::PhaseTime]) -> Vec<Value> {
    phases
        .iter()
        .map(|phase| attribute(&format!("scalellm.phase_us.{}", phase.name), phase.us))
        .collect()
}

struct Span {
    name: String,
    kind: u8,
    start_us: u64,
    took_us: u64,
    attributes: Vec<Value>,
}

impl Span {
    fn json(self, trace: u128, id: u64, parent: Option<u64>) -> Value {
        let nanos = |us: u64| (u128::from(us) * 1000).to_string();
        let mut span = Map::new();
        let mut put = |name: &str, value: Value| span.insert(name.to_owned(), value);
        put("traceId", format!("{trace:032x}").into());
        put("spanId", format!("{id:016x}").into());
        if let Some(parent) = parent {
            put("parentSpanId", format!("{parent:016x}").into());
        }
        put("name", self.name.into());
        put("kind", self.kind.into());
        put("startTimeUnixNano", nanos(self.start_us).into());
        put(
            "endTimeUnixNano",
            nanos(self.start_us.saturating_add(self.took_us)).into(),
        );
        put("attributes", self.attributes.into());
        Value::Object(span)
    }
}

/// OTLP's JSON has integers of 64 bits as text.
fn attribute(key: &str, value: impl Into<Value>) -> Value {
    let value = match value.into() {
        Value::Number(number) if number.is_f64() => json!({"doubleValue": number}),
        Value::Number(number) => json!({"intValue": number.to_string()}),
        other => json!({"stringValue": other}),
    };
    json!({"key": key, "value": value})
}
