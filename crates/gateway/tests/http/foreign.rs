//! Models that servers elsewhere compute.

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::BodyExt;
use rustls::pki_types::PrivatePkcs8KeyDer;
use scalellm_gateway::{ModelConfig, UpstreamConfig};
use serde_json::json as value;
use tokio::sync::Notify;
use tokio_rustls::TlsAcceptor;

use super::support::{LONG, Reply, Stack, open, request, says, send, user};
use super::upstream::{Act, Mock, before, chunk, json, last_chunk, stream, stream_head, upstream};

pub const WHOLE: &str = r#"{"id":"x","model":"chat","choices":[{"message":{"content":"hi"}}],"usage":{"prompt_tokens":5,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":3}}}"#;
pub const HI: &str =
    "data: {\"model\":\"chat\",\"choices\":[{\"delta\":{\"content\":\"hi\"}}]}\n\n";
const USAGE: &str = "data: {\"model\":\"chat\",\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":2}}\n\n";
pub const DONE: &str = "data: [DONE]\n\n";

/// A gateway before upstreams alone.
pub async fn gateway(upstreams: Vec<UpstreamConfig>) -> Stack {
    Stack::start(Vec::new(), before(upstreams)).await
}

pub async fn ask(stack: &Stack, body: &str) -> Reply {
    let body = Bytes::from(body.to_owned());
    send(
        stack.address(),
        request("POST", "/v1/chat/completions", &[], body),
    )
    .await
}

#[tokio::test]
async fn a_request_passes_as_it_is_with_the_gateways_own_headers() {
    let mock = Mock::start(|_| vec![json(WHOLE)]).await;
    let folder = super::support::Folder::new();
    let key = folder.0.join("key");
    std::fs::write(&key, "up-secret\n").unwrap();
    let stack = Stack::start(Vec::new(), |config| {
        before(vec![UpstreamConfig {
            api_key_file: Some(key),
            ..mock.upstream()
        }])(config);
        config.api_keys = vec!["client-secret".to_owned()];
    })
    .await;
    let body =
        r#"{ "model": "chat",  "messages": [], "temperature": 0.70, "unheard_of": {"a": [1]} }"#;
    let headers = [
        ("authorization", "Bearer client-secret"),
        ("traceparent", "00-1-2-01"),
        ("cookie", "c=1"),
    ];
    let reply = send(
        stack.address(),
        request("POST", "/v1/chat/completions", &headers, Bytes::from(body)),
    )
    .await;
    assert_eq!(reply.text(), WHOLE);
    assert_eq!(reply.header("content-type"), "application/json");
    let timing = reply.header("server-timing");
    assert!(
        timing.contains("upstream;dur=") && timing.contains("total;dur="),
        "{timing}"
    );
    let seen = mock.seen().remove(0);
    assert_eq!(seen.body, body);
    assert!(
        seen.head
            .starts_with("POST /v1/chat/completions HTTP/1.1\r\n"),
        "{}",
        seen.head
    );
    assert_eq!(seen.header("authorization").unwrap(), "Bearer up-secret");
    assert_eq!(seen.header("traceparent").unwrap(), "00-1-2-01");
    assert_eq!(
        seen.header("x-request-id").unwrap(),
        reply.header("x-request-id")
    );
    assert_eq!(seen.header("cookie"), None);
    let refused = send(
        stack.address(),
        request("POST", "/v1/chat/completions", &[], Bytes::from(body)),
    )
    .await;
    refused.error(401);
    assert_eq!(
        stack.metric("scalellm_prompt_tokens_total", "chat").await,
        5.0
    );
    assert_eq!(
        stack.metric("scalellm_cached_tokens_total", "chat").await,
        3.0
    );
    assert_eq!(
        stack.metric("scalellm_output_tokens_total", "chat").await,
        2.0
    );
}

#[tokio::test]
async fn a_stream_passes_as_it_is_and_is_metered() {
    let mock = Mock::start(|_| stream(&[": hello\n\n", HI, USAGE, DONE])).await;
    let stack = gateway(vec![mock.upstream()]).await;
    let reply = ask(&stack, r#"{"model":"chat","stream":true}"#).await;
    assert_eq!(reply.text(), [": hello\n\n", HI, DONE].concat());
    assert_eq!(
        reply.header("content-type"),
        "text/event-stream; charset=utf-8"
    );
    assert!(
        mock.seen()[0]
            .body
            .contains(r#""stream_options":{"include_usage":true}"#)
    );
    let asked = r#"{"model":"chat","stream":true,"stream_options":{"include_usage":true}}"#;
    assert_eq!(
        ask(&stack, asked).await.text(),
        [": hello\n\n", HI, USAGE, DONE].concat()
    );
    assert_eq!(mock.seen()[1].body, asked);
    assert_eq!(
        stack.metric("scalellm_output_tokens_total", "chat").await,
        4.0
    );
    assert_eq!(
        stack
            .metric("gen_ai_server_time_to_first_token_seconds_count", "chat")
            .await,
        2.0
    );
    assert_eq!(
        stack.metric("scalellm_upstream_estimated_total", "").await,
        0.0
    );
}

#[tokio::test]
async fn a_stream_may_come_byte_by_byte() {
    let text = [HI, USAGE, HI, DONE].concat();
    let mock = Mock::start(move |_| {
        let bytes = text
            .bytes()
            .map(|byte| chunk(&char::from(byte).to_string()));
        [stream_head()]
            .into_iter()
            .chain(bytes)
            .chain([last_chunk()])
            .collect()
    })
    .await;
    let stack = gateway(vec![mock.upstream()]).await;
    let reply = ask(&stack, r#"{"model":"chat","stream":true}"#).await;
    assert_eq!(reply.text(), [HI, HI, DONE].concat());
}

#[tokio::test]
async fn an_event_reaches_the_client_before_the_next_one_comes() {
    let gate = Arc::new(Notify::new());
    let for_mock = Arc::clone(&gate);
    let mock = Mock::start(move |_| {
        let wait = Act::Wait(Arc::clone(&for_mock));
        vec![stream_head(), chunk(HI), wait, chunk(DONE), last_chunk()]
    })
    .await;
    let stack = gateway(vec![mock.upstream()]).await;
    let body = Bytes::from(r#"{"model":"chat","stream":true}"#);
    let (response, _connection) = open(
        stack.address(),
        request("POST", "/v1/chat/completions", &[], body),
    )
    .await;
    let mut body = response.into_body();
    let first = tokio::time::timeout(LONG, body.frame())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert_eq!(first.into_data().unwrap(), HI);
    gate.notify_one();
    assert_eq!(body.collect().await.unwrap().to_bytes(), DONE);
}

#[tokio::test]
async fn the_model_has_another_name_there() {
    let there = WHOLE.replace(r#""model":"chat""#, r#""model":"org/real""#);
    let whole = there.clone();
    let events = HI.replace("\"chat\"", "\"org/real\"");
    let mock = Mock::start(move |seen| match seen.body.contains("\"stream\":true") {
        true => stream(&[&events, DONE]),
        false => vec![json(&whole)],
    })
    .await;
    let config = UpstreamConfig {
        model: Some("org/real".to_owned()),
        ..mock.upstream()
    };
    let stack = gateway(vec![config]).await;
    assert_eq!(ask(&stack, r#"{"model":"chat"}"#).await.text(), WHOLE);
    assert_eq!(mock.seen()[0].body, r#"{"model":"org/real"}"#);
    // The only model need not be named.
    assert_eq!(ask(&stack, "{}").await.text(), WHOLE);
    assert_eq!(mock.seen()[1].body, r#"{"model":"org/real"}"#);
    let reply = ask(&stack, r#"{"model":"chat","stream":true}"#).await;
    assert_eq!(reply.text(), [HI, DONE].concat());
    // A stream without usage is counted by its events.
    assert_eq!(
        stack.metric("scalellm_upstream_estimated_total", "").await,
        1.0
    );
}

#[tokio::test]
async fn connections_are_used_again() {
    let mock = Mock::start(|seen| match seen.body.contains("\"stream\":true") {
        true => stream(&[HI, DONE]),
        false => vec![json(WHOLE)],
    })
    .await;
    let stack = gateway(vec![mock.upstream()]).await;
    for body in [r#"{"model":"chat"}"#, r#"{"model":"chat","stream":true}"#].repeat(4) {
        assert_eq!(ask(&stack, body).await.status, 200);
    }
    assert_eq!(mock.connections(), 1);
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_request_there() {
    for acts in [vec![Act::Hang], vec![stream_head(), chunk(HI), Act::Hang]] {
        let mock = Mock::start(move |_| acts.clone()).await;
        let stack = gateway(vec![mock.upstream()]).await;
        let body = Bytes::from(r#"{"model":"chat","stream":true}"#);
        let asking = open(
            stack.address(),
            request("POST", "/v1/chat/completions", &[], body),
        );
        tokio::select! {
            (response, connection) = asking => drop((response, connection)),
            () = async { while mock.seen().is_empty() { tokio::task::yield_now().await } } => {}
        }
        mock.wait_closed().await;
        stack
            .wait_metric("scalellm_requests_total", "status=\"499\"", 1.0)
            .await;
        assert_eq!(
            stack
                .metric("scalellm_upstream_in_flight_requests", "")
                .await,
            0.0
        );
    }
}

#[tokio::test]
async fn a_stream_without_end_waits_for_a_client_that_does_not_read() {
    let event = format!("1000\r\ndata: {}\n\n\r\n", "x".repeat(0x1000 - 8));
    let mock = Mock::start(move |_| vec![stream_head(), Act::Forever(event.clone().into())]).await;
    let stack = Stack::start(Vec::new(), |config| {
        before(vec![mock.upstream()])(config);
        config.write_timeout_s = 0.3;
    })
    .await;
    let body = Bytes::from(r#"{"model":"chat","stream":true}"#);
    let (response, connection) = open(
        stack.address(),
        request("POST", "/v1/chat/completions", &[], body),
    )
    .await;
    mock.wait_closed().await;
    assert_eq!(
        stack.metric("scalellm_clients_stalled_total", "").await,
        1.0
    );
    // What sockets hold; the gateway itself holds next to nothing.
    assert!(mock.sent_bytes() < 64 << 20, "{}", mock.sent_bytes());
    drop((response, connection));
}

#[tokio::test]
async fn models_of_both_kinds_stand_side_by_side() {
    let mock = Mock::start(|_| vec![json(WHOLE)]).await;
    let stack = Stack::start(vec![says("own")], |config| {
        config.models.push(ModelConfig {
            name: "chat".to_owned(),
            aliases: vec!["gpt".to_owned()],
            upstreams: vec![mock.upstream()],
            ..ModelConfig::default()
        });
    })
    .await;
    let listed = stack.get("/v1/models").await.ok();
    let names: Vec<&str> = listed["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|card| card["id"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["bytes", "alias", "chat", "gpt"]);
    assert_eq!(stack.get("/v1/models/gpt").await.ok()["root"], "chat");
    let own = stack
        .chat(value!({"messages": user("x"), "max_tokens": 9}))
        .await
        .ok();
    assert_eq!(own["choices"][0]["message"]["content"], "own");
    assert_eq!(ask(&stack, r#"{"model":"chat"}"#).await.text(), WHOLE);
    let error = stack
        .post("/tokenize", &value!({"model": "chat", "prompt": "x"}))
        .await
        .error(400);
    assert_eq!(
        (error["param"].as_str(), error["code"].as_str()),
        (Some("model"), Some("unsupported_field"))
    );
    ask(&stack, r#"{"model":"other"}"#).await.error(404);
    ask(&stack, "{}").await.error(400);
}

#[tokio::test]
async fn upstreams_answer_while_no_replica_does() {
    let mock = Mock::start(|_| vec![json(WHOLE)]).await;
    let mut stack = Stack::start(vec![says("own")], |config| {
        config.models[0].upstreams = vec![mock.upstream()];
    })
    .await;
    assert_eq!(
        stack.chat(value!({"messages": user("x")})).await.ok()["choices"][0]["message"]["content"],
        "own"
    );
    stack.engines[0] = None;
    stack
        .wait_metric("scalellm_replica_state{", "state=\"ready\"", 0.0)
        .await;
    let reply = stack.chat(value!({"messages": user("x")})).await.ok();
    assert_eq!(reply["choices"][0]["message"]["content"], "hi");
    assert_eq!(stack.get("/ready").await.status, 200);
}

#[tokio::test]
async fn requests_are_shared_by_weight() {
    let mocks = [
        Mock::start(|_| vec![json(WHOLE)]).await,
        Mock::start(|_| vec![json(WHOLE)]).await,
    ];
    let heavy = UpstreamConfig {
        weight: 3,
        ..mocks[0].upstream()
    };
    let stack = gateway(vec![heavy, mocks[1].upstream()]).await;
    for _ in 0..8 {
        ask(&stack, "{}").await.ok();
    }
    assert_eq!([mocks[0].seen().len(), mocks[1].seen().len()], [6, 2]);
}

#[tokio::test]
async fn a_session_keeps_its_upstream_and_the_choice_is_told() {
    let mocks = [
        Mock::start(|_| vec![json(WHOLE)]).await,
        Mock::start(|_| vec![json(WHOLE)]).await,
    ];
    let stack = gateway(mocks.iter().map(Mock::upstream).collect()).await;
    let asked = async |headers: &[(&str, &str)]| {
        let body = Bytes::from_static(b"{}");
        let request = request("POST", "/v1/chat/completions", headers, body);
        send(stack.address(), request).await
    };
    for _ in 0..6 {
        let reply = asked(&[("x-session-id", "one")]).await;
        reply.ok();
        assert!(!reply.headers.contains_key("x-scalellm-route"));
    }
    let mut seen = mocks.each_ref().map(|mock| mock.seen().len());
    seen.sort_unstable();
    assert_eq!(seen, [0, 6]);
    let reply = asked(&[("x-session-id", "one"), ("x-scalellm-route", "1")]).await;
    let route = reply.header("x-scalellm-route");
    assert!(route.starts_with("replica=upstream-"), "{route}");
    assert!(
        route.ends_with("; policy=upstreams; reason=session"),
        "{route}"
    );
    let reply = asked(&[("x-scalellm-route", "1")]).await;
    assert!(reply.header("x-scalellm-route").ends_with("; reason=load"));
    for (reason, count) in [("session", 7.0), ("load", 1.0)] {
        let chosen = stack.metric("scalellm_routed_total{", reason).await;
        assert_eq!(chosen, count, "{reason}");
    }
}

#[tokio::test]
async fn an_upstream_may_speak_tls() {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let folder = super::support::Folder::new();
    let ca_file = folder.0.join("ca.pem");
    std::fs::write(&ca_file, made.cert.pem()).unwrap();
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())
        .unwrap();
    let mock = Mock::serve(
        |_| stream(&[HI, DONE]),
        Some(TlsAcceptor::from(Arc::new(tls))),
    )
    .await;
    let url = format!("https://localhost:{}/v1", mock.address.port());
    let believed = UpstreamConfig {
        ca_file: Some(ca_file),
        ..upstream(&url)
    };
    let stack = gateway(vec![believed]).await;
    let reply = ask(&stack, r#"{"model":"chat","stream":true}"#).await;
    assert_eq!(reply.text(), [HI, DONE].concat());
    let stack = gateway(vec![upstream(&url)]).await;
    let error = ask(&stack, "{}").await.error(502);
    // Why is in the log: it may tell names of the inside.
    let message = error["message"].as_str().unwrap();
    assert!(
        message.ends_with("it cannot be reached") && !message.contains("localhost"),
        "{message}"
    );
    assert_eq!(mock.seen().len(), 1);
}
