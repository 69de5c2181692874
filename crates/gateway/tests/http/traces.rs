//! Spans of requests, as a collector gets them.

use std::time::{Duration, Instant};

use bytes::Bytes;
use scalellm_fake_engine::Settings;
use scalellm_gateway::Config;
use serde_json::{Value, json};

use crate::support::{LONG, Stack, engine, request, send, with_model};
use crate::upstream::{Act, Mock, Seen, answer, before, json as says, stream};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

fn to(collector: &Mock) -> impl FnOnce(&mut Config) {
    let endpoint = format!("http://{}", collector.address);
    move |config| config.otlp_endpoint = Some(endpoint)
}

/// A completion with this `traceparent`.
async fn ask(stack: &Stack, traceparent: &str, fields: Value) {
    let body = Bytes::from(with_model(fields).to_string());
    let headers: &[(&str, &str)] = &[("traceparent", traceparent)];
    let headers = if traceparent.is_empty() { &[] } else { headers };
    let reply = send(
        stack.address(),
        request("POST", "/v1/completions", headers, body),
    )
    .await;
    assert_eq!(reply.status, 200, "{}", reply.text());
}

/// What was posted, once `until` is content.
async fn posted(collector: &Mock, until: impl Fn(&[Seen]) -> bool) -> Vec<Seen> {
    let start = Instant::now();
    loop {
        let seen = collector.seen();
        if until(&seen) {
            return seen;
        }
        assert!(start.elapsed() < LONG, "{seen:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Spans with their services, in the order they came.
fn spans(seen: &[Seen]) -> Vec<(String, Value)> {
    let mut found = Vec::new();
    for post in seen {
        assert!(
            post.head.starts_with("POST /v1/traces HTTP/1.1\r\n"),
            "{}",
            post.head
        );
        assert_eq!(post.header("content-type").unwrap(), "application/json");
        let document: Value = serde_json::from_str(&post.body).unwrap();
        for resource in document["resourceSpans"].as_array().unwrap() {
            let service = of(&resource["resource"], "service.name");
            for span in resource["scopeSpans"][0]["spans"].as_array().unwrap() {
                found.push((
                    service["stringValue"].as_str().unwrap().to_owned(),
                    span.clone(),
                ));
            }
        }
    }
    found
}

/// The value of an attribute.
fn of<'a>(span: &'a Value, key: &str) -> &'a Value {
    let attributes = span["attributes"].as_array().unwrap();
    let found = attributes.iter().find(|one| one["key"] == key);
    &found.unwrap_or_else(|| panic!("no {key} in {span}"))["value"]
}

fn nanos(span: &Value, end: &str) -> u128 {
    span[end].as_str().unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_requests_stages_hang_below_the_clients_span() {
    let collector = Mock::start(|_| vec![says("{}")]).await;
    let paced = Settings {
        tbt_ms: 2.0,
        ..engine()
    };
    let stack = Stack::start(vec![paced], to(&collector)).await;
    let fields = json!({"prompt": "abc", "max_tokens": 5, "stream": true});
    ask(&stack, &format!("00-{TRACE}-{PARENT}-01"), fields).await;
    let all = spans(&posted(&collector, |seen| !seen.is_empty()).await);
    let named = |service: &str, name: &str| {
        let mut found = all
            .iter()
            .filter(|(s, span)| s == service && span["name"] == name);
        let span = found
            .next()
            .unwrap_or_else(|| panic!("no {name} of {service} in {all:?}"));
        assert!(found.next().is_none(), "{name} of {service} came twice");
        &span.1
    };
    assert!(all.iter().all(|(_, span)| span["traceId"] == TRACE));
    let root = named("scalellm-gateway", "POST /v1/completions");
    assert_eq!(
        (&root["parentSpanId"], &root["kind"]),
        (&json!(PARENT), &json!(2))
    );
    assert_eq!(
        of(root, "gen_ai.request.model"),
        &json!({"stringValue": "bytes"})
    );
    assert_eq!(
        of(root, "gen_ai.operation.name"),
        &json!({"stringValue": "text_completion"})
    );
    assert_eq!(
        of(root, "gen_ai.usage.input_tokens"),
        &json!({"intValue": "3"})
    );
    assert_eq!(
        of(root, "gen_ai.usage.output_tokens"),
        &json!({"intValue": "5"})
    );
    assert_eq!(
        of(root, "http.response.status_code"),
        &json!({"intValue": "200"})
    );
    let reasons = &of(root, "gen_ai.response.finish_reasons")["arrayValue"]["values"];
    assert_eq!(reasons[0]["stringValue"], "length");
    let whole = named("scalellm-engine", "generate");
    assert_eq!(whole["kind"], 2);
    let of_engine = ["queue", "prefill", "decode"];
    for (service, span) in &all {
        let (start, end) = (
            nanos(span, "startTimeUnixNano"),
            nanos(span, "endTimeUnixNano"),
        );
        assert!(start <= end, "{span}");
        let (name, parent) = (span["name"].as_str().unwrap(), &span["parentSpanId"]);
        if service == "scalellm-engine" && of_engine.contains(&name) {
            assert_eq!(parent, &whole["spanId"], "{name}");
            assert!(nanos(whole, "startTimeUnixNano") <= start, "{name}");
            assert!(end <= nanos(whole, "endTimeUnixNano"), "{name}");
        } else if name != "POST /v1/completions" {
            assert_eq!(parent, &root["spanId"], "{name}");
            assert!(nanos(root, "startTimeUnixNano") <= start, "{name}");
        }
    }
    for stage in ["tokenise", "link_out", "decode"] {
        named("scalellm-gateway", stage);
    }
    for part in of_engine {
        named("scalellm-engine", part);
    }
}

#[tokio::test]
async fn a_client_that_does_not_sample_is_not_traced() {
    let collector = Mock::start(|_| vec![says("{}")]).await;
    let stack = Stack::start(vec![engine()], to(&collector)).await;
    let fields = || json!({"prompt": "abc", "max_tokens": 1});
    ask(&stack, &format!("00-{TRACE}-{PARENT}-00"), fields()).await;
    stack.get("/health").await;
    ask(&stack, "", fields()).await;
    stack
        .wait_metric("scalellm_traces_exported_total", "", 1.0)
        .await;
    let all = spans(&collector.seen());
    assert!(!all.is_empty() && all.iter().all(|(_, span)| span["traceId"] != TRACE));
    assert!(all[0].1.get("parentSpanId").is_none());
}

#[tokio::test]
async fn an_upstream_is_asked_below_the_gateways_span() {
    let collector = Mock::start(|_| vec![says("{}")]).await;
    let elsewhere = Mock::start(|_| stream(&["data: {}\n\n", "data: [DONE]\n\n"])).await;
    let (one, two) = (to(&collector), before(vec![elsewhere.upstream()]));
    let stack = Stack::start(Vec::new(), |config| {
        one(config);
        two(config);
    })
    .await;
    let fields = json!({"model": "chat", "prompt": "x", "stream": true});
    ask(&stack, &format!("00-{TRACE}-{PARENT}-01"), fields).await;
    let all = spans(&posted(&collector, |seen| !seen.is_empty()).await);
    let root = &all[0].1;
    let sent = elsewhere.seen()[0].header("traceparent").unwrap();
    let span = root["spanId"].as_str().unwrap();
    assert_eq!(sent, format!("00-{TRACE}-{span}-01"));
    assert!(all.iter().any(|(_, span)| span["name"] == "upstream"));
    assert!(all.iter().all(|(service, _)| service == "scalellm-gateway"));
}

#[tokio::test]
async fn what_a_collector_refuses_for_now_is_sent_again_and_what_it_never_takes_is_dropped() {
    let busy = std::sync::atomic::AtomicBool::new(true);
    let collector = Mock::start(move |seen| {
        let first = busy.swap(false, std::sync::atomic::Ordering::Relaxed);
        let status = match first {
            true => "503 Service Unavailable",
            false if seen.body.contains("\"never\"") => "400 Bad Request",
            false => "200 OK",
        };
        vec![answer(status, "", "{}")]
    })
    .await;
    let mut stack = Stack::start(vec![engine()], to(&collector)).await;
    let once = || json!({"prompt": "abc", "max_tokens": 1});
    ask(&stack, "", once()).await;
    stack
        .wait_metric("scalellm_traces_exported_total", "", 1.0)
        .await;
    let seen = collector.seen();
    assert_eq!((seen.len(), &seen[0].body), (2, &seen[1].body));
    let never = Bytes::from(with_model(once()).to_string());
    let headers = [("x-request-id", "never")];
    let asked = request("POST", "/v1/completions", &headers, never);
    assert_eq!(send(stack.address(), asked).await.status, 200);
    stack
        .wait_metric("scalellm_traces_dropped_total", "", 1.0)
        .await;
    // What is there at the end still goes out.
    ask(&stack, "", once()).await;
    stack.gateway.drain();
    stack.gateway.ended().await;
    assert_eq!(collector.seen().len(), 4);
}

#[tokio::test]
async fn nobody_waits_for_a_collector_that_does_not_answer() {
    let collector = Mock::start(|_| vec![Act::Hang]).await;
    let stack = Stack::start(vec![engine()], to(&collector)).await;
    for _ in 0..10 {
        ask(&stack, "", json!({"prompt": "abc", "max_tokens": 1})).await;
    }
    posted(&collector, |seen| !seen.is_empty()).await;
    ask(&stack, "", json!({"prompt": "abc", "max_tokens": 1})).await;
    assert_eq!(
        stack.metric("scalellm_traces_exported_total", "").await,
        0.0
    );
}
