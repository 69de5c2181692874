//! What an operator changes while requests run.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::BodyExt;
use scalellm_fake_engine::FakeEngine;
use scalellm_gateway::{Config, Gateway, Log};
use serde_json::{Value, json};
use tokio::sync::Notify;

use super::support::{
    Folder, Reply, Stack, engine, open, request, says, send, start_engine, streamed_text, user,
};
use super::upstream::{Act, Mock, before, chunk, json as answer, last_chunk, stream_head};

pub const WHOLE: &str = r#"{"choices":[{"message":{"content":"hi"}}]}"#;
const HI: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"hi\"}}]}\n\n";

async fn admin(gateway: &Gateway, method: &str, path: &str, body: Value) -> Reply {
    let body = if body.is_null() {
        Bytes::new()
    } else {
        Bytes::from(body.to_string())
    };
    send(gateway.address(), request(method, path, &[], body)).await
}

/// Takes a replica out; tells those that are left.
async fn remove(stack: &Stack, model: &str, address: &str) -> Value {
    let path = format!("/admin/v1/replicas?model={model}&address={address}");
    admin(&stack.gateway, "DELETE", &path, Value::Null)
        .await
        .ok()
}

/// A second replica of our own, which says so, beside the first.
async fn add_second(stack: &Stack) -> FakeEngine {
    let address = stack.socket(1);
    let engine = start_engine(&address, says("second"));
    let added = json!({"model": "bytes", "address": address});
    admin(&stack.gateway, "POST", "/admin/v1/replicas", added)
        .await
        .ok();
    stack
        .wait_metric("scalellm_replica_state{", "state=\"ready\"", 2.0)
        .await;
    engine
}

pub fn file(mock: &Mock, more: &str) -> String {
    format!(
        "port = 0\n{more}\n[[models]]\nname = 'chat'\n[[models.upstreams]]\nurl = 'http://{}/v1'\nhealth_path = ''\n",
        mock.address
    )
}

pub async fn from_file(path: &Path) -> Gateway {
    let config = Config::from_toml(&std::fs::read_to_string(path).unwrap()).unwrap();
    Gateway::start_from(config, Some(path.to_owned()), Log::default())
        .await
        .unwrap()
}

#[tokio::test]
async fn a_reload_changes_all_or_nothing() {
    let first = Mock::start(|_| vec![answer(WHOLE)]).await;
    let second = Mock::start(|_| vec![answer(WHOLE)]).await;
    let folder = Folder::new();
    let path = folder.0.join("gateway.toml");
    std::fs::write(&path, file(&first, "")).unwrap();
    let gateway = from_file(&path).await;
    let ask = || async {
        let body = Bytes::from(r#"{"model":"chat"}"#);
        let request = request(
            "POST",
            "/v1/chat/completions",
            &[("authorization", "Bearer new")],
            body,
        );
        send(gateway.address(), request).await.status
    };
    assert_eq!(ask().await, 200);
    for (bad, says) in [
        (
            "max_in_flight = 0",
            "max_in_flight: got 0, allowed is 1 or more",
        ),
        ("prot = 1", "prot"),
        (
            "tls_cert = '/no/such'\ntls_key = '/no/such'",
            "tls_cert: /no/such",
        ),
        ("not toml", "gateway.toml"),
    ] {
        std::fs::write(&path, file(&second, bad)).unwrap();
        let error = admin(&gateway, "POST", "/admin/v1/reload", Value::Null)
            .await
            .error(400);
        assert_eq!(error["code"], "invalid_config");
        assert!(error["message"].as_str().unwrap().contains(says), "{error}");
        assert_eq!(ask().await, 200);
    }
    assert_eq!((first.seen().len(), second.seen().len()), (5, 0));
    std::fs::write(&path, file(&second, "api_keys = ['new']\ntext_queue = 3")).unwrap();
    let applied = admin(&gateway, "POST", "/admin/v1/reload", Value::Null)
        .await
        .ok();
    assert_eq!(
        applied,
        json!({
            "added": [format!("chat: http://{}/v1", second.address)],
            "removed": [format!("chat: http://{}/v1", first.address)],
            "at_next_start": ["text_queue"],
        })
    );
    assert_eq!(ask().await, 200);
    assert_eq!((first.seen().len(), second.seen().len()), (5, 1));
    admin(&gateway, "POST", "/v1/chat/completions", json!({}))
        .await
        .error(401);
    let again = admin(&gateway, "POST", "/admin/v1/reload", Value::Null)
        .await
        .ok();
    assert_eq!(again["added"], json!([]));
    assert_eq!(ask().await, 200);
    assert_eq!(
        second.connections(),
        1,
        "what did not change keeps its connections"
    );
}

#[tokio::test]
async fn a_stream_outlives_its_upstream_in_the_configuration() {
    let gate = Arc::new(Notify::new());
    let wait = Arc::clone(&gate);
    let old = Mock::start(move |_| {
        let done = chunk("data: [DONE]\n\n");
        vec![
            stream_head(),
            chunk(HI),
            Act::Wait(Arc::clone(&wait)),
            chunk(HI),
            done,
            last_chunk(),
        ]
    })
    .await;
    let new = Mock::start(|_| vec![answer(WHOLE)]).await;
    let stack = Stack::start(Vec::new(), before(vec![old.upstream()])).await;
    let body = Bytes::from(r#"{"stream":true}"#);
    let (response, _connection) = open(
        stack.address(),
        request("POST", "/v1/chat/completions", &[], body),
    )
    .await;
    let added =
        json!({"model": "chat", "upstream": {"url": new.upstream().url, "health_path": ""}});
    admin(&stack.gateway, "POST", "/admin/v1/replicas", added)
        .await
        .ok();
    let listed = remove(&stack, "chat", &old.upstream().url).await;
    assert_eq!(
        listed["models"][0]["upstreams"].as_array().unwrap().len(),
        1
    );
    assert_eq!(
        stack.post("/v1/chat/completions", &json!({})).await.text(),
        WHOLE
    );
    gate.notify_one();
    let text = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(text, [HI, HI, "data: [DONE]\n\n"].concat());
}

#[tokio::test]
async fn replicas_come_drain_and_go_while_a_request_runs() {
    let slow = scalellm_fake_engine::Settings {
        tbt_ms: 20.0,
        ..engine()
    };
    let stack = Stack::start(vec![slow], |_| {}).await;
    let first = stack.socket(0);
    let body = json!({"model": "bytes", "prompt": "x", "max_tokens": 10, "stream": true, "ignore_eos": true});
    let (response, _connection) = open(
        stack.address(),
        request(
            "POST",
            "/v1/completions",
            &[],
            Bytes::from(body.to_string()),
        ),
    )
    .await;
    let _engine = add_second(&stack).await;
    let named = json!({"model": "bytes", "address": first});
    let listed = admin(&stack.gateway, "POST", "/admin/v1/replicas/drain", named)
        .await
        .ok();
    assert_eq!(listed["models"][0]["replicas"][0]["drained"], true);
    for _ in 0..3 {
        let reply = stack.chat(json!({"messages": user("x")})).await.ok();
        assert_eq!(reply["choices"][0]["message"]["content"], "second");
    }
    let listed = remove(&stack, "bytes", &first).await;
    assert_eq!(listed["models"][0]["replicas"].as_array().unwrap().len(), 1);
    // The request on the replica that goes is not lost.
    let text = response.into_body().collect().await.unwrap().to_bytes();
    assert!(text.ends_with(b"data: [DONE]\n\n"), "{text:?}");
}

#[tokio::test]
async fn a_request_that_waits_goes_to_what_is_there_when_its_turn_comes() {
    let slow = scalellm_fake_engine::Settings {
        tbt_ms: 10_000.0,
        ..engine()
    };
    let stack = Stack::start(vec![slow], |config| {
        config.max_in_flight = 1;
        // The replica that goes is let go of at once.
        config.drain_timeout_s = 0.0;
    })
    .await;
    let ask = |prompt: &str| {
        let body = json!({"model": "bytes", "prompt": prompt, "stream": true, "ignore_eos": true});
        request(
            "POST",
            "/v1/completions",
            &[],
            Bytes::from(body.to_string()),
        )
    };
    let running = open(stack.address(), ask("x")).await;
    let waiting = tokio::spawn(send(stack.address(), ask("y")));
    stack
        .wait_metric("scalellm_queued_requests{", "", 1.0)
        .await;
    let _engine = add_second(&stack).await;
    remove(&stack, "bytes", &stack.socket(0)).await;
    drop(running);
    let events = waiting.await.unwrap().events();
    assert!(
        streamed_text(&events, 0).starts_with("second"),
        "{events:?}"
    );
}

#[tokio::test]
async fn what_an_operator_gets_wrong_is_told() {
    let mock = Mock::start(|_| vec![answer(WHOLE)]).await;
    let stack = Stack::start(Vec::new(), before(vec![mock.upstream()])).await;
    let url = mock.upstream().url;
    for (method, path, body, status, says) in [
        (
            "POST",
            "/admin/v1/replicas",
            json!({"model": "x", "address": "h:1"}),
            404,
            "served are",
        ),
        (
            "POST",
            "/admin/v1/replicas",
            json!({"model": "chat"}),
            400,
            "address: needed",
        ),
        (
            "POST",
            "/admin/v1/replicas",
            json!({"model": "chat", "address": "h:1"}),
            400,
            "models[0].path: missing",
        ),
        (
            "POST",
            "/admin/v1/replicas",
            json!({"model": "chat", "upstream": {"url": "x"}}),
            400,
            "upstreams[1].url",
        ),
        (
            "POST",
            "/admin/v1/replicas",
            json!({"model": "chat", "upstream": {"url": "http://h", "a": 1}}),
            400,
            "`a`",
        ),
        (
            "POST",
            "/admin/v1/replicas",
            json!({"model": "chat", "upstream": {"url": "http://h", "api_key_file": "/etc/shadow"}}),
            403,
            "upstream.api_key_file: allowed here only where",
        ),
        (
            "POST",
            "/admin/v1/replicas/drain",
            json!({"model": "chat", "address": "h:1"}),
            404,
            "which is none of",
        ),
        (
            "DELETE",
            "/admin/v1/replicas?model=chat",
            Value::Null,
            400,
            "address",
        ),
        (
            "DELETE",
            &format!("/admin/v1/replicas?model=chat&address={url}"),
            Value::Null,
            400,
            "has none",
        ),
        (
            "POST",
            "/admin/v1/reload",
            Value::Null,
            400,
            "not started from a file",
        ),
        (
            "PUT",
            "/admin/v1/log",
            json!({"level": "loud"}),
            400,
            "`loud`, expected one of",
        ),
    ] {
        let error = admin(&stack.gateway, method, path, body)
            .await
            .error(status);
        assert!(error["message"].as_str().unwrap().contains(says), "{error}");
    }
    let set = admin(
        &stack.gateway,
        "PUT",
        "/admin/v1/log",
        json!({"level": "debug"}),
    )
    .await
    .ok();
    assert_eq!(set, json!({"level": "debug"}));
    assert_eq!(
        admin(&stack.gateway, "GET", "/admin/v1/log", Value::Null)
            .await
            .ok(),
        set
    );
    let drained = json!({"model": "chat", "address": url});
    admin(&stack.gateway, "POST", "/admin/v1/replicas/drain", drained)
        .await
        .ok();
    let error = stack
        .post("/v1/chat/completions", &json!({}))
        .await
        .error(503);
    assert!(
        error["message"].as_str().unwrap().contains("is drained"),
        "{error}"
    );
}

#[tokio::test]
async fn the_endpoints_are_described() {
    let mock = Mock::start(|_| vec![answer(WHOLE)]).await;
    let stack = Stack::start(Vec::new(), before(vec![mock.upstream()])).await;
    let document = stack.get("/openapi.json").await.ok();
    for (path, methods) in document["paths"].as_object().unwrap() {
        let options = request("OPTIONS", &path.replace("{id}", "x"), &[], Bytes::new());
        let reply = send(stack.address(), options).await;
        assert_eq!(reply.status, 405, "{path}");
        let allowed = reply.header("allow").to_lowercase();
        for method in methods.as_object().unwrap().keys() {
            assert!(
                allowed.contains(method.as_str()),
                "{method} {path}: {allowed}"
            );
        }
    }
}

#[tokio::test]
async fn an_operators_blueprint_is_checked_and_written_for_the_controller() {
    let folder = Folder::new();
    let state = folder.0.join("blueprint.json");
    let wish = folder.0.join("blueprint.wish.json");
    let path = "/admin/v1/blueprint";
    let stack = Stack::start(vec![engine()], |config| {
        config.models[0].blueprint_file = Some(state.clone());
    })
    .await;
    let put = |body: Value| admin(&stack.gateway, "PUT", path, body);
    let wide = json!({"blueprint": [{"tp": 2, "count": 1}]});
    std::fs::write(&state, json!({"mode": "static"}).to_string()).unwrap();
    let error = put(wide.clone()).await.error(400);
    assert!(error["message"].as_str().unwrap().contains("is static"));
    let candidates = json!({"candidates": [[{"tp": 1, "count": 2}], [{"tp": 2, "count": 1}]]});
    std::fs::write(&state, candidates.to_string()).unwrap();
    for (refused, named) in [
        (
            json!({"blueprint": [{"tp": 4, "count": 1}]}),
            r#"one of [[{"tp":1,"count":2}]"#,
        ),
        (json!({"blueprint": []}), "got []"),
        (json!({"blueprint": [{"tp": "2", "count": 1}]}), "string"),
        (json!({"shape": null}), "unknown field"),
    ] {
        let error = put(refused).await.error(400);
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(named), "{message}");
        assert!(!wish.exists());
    }
    for body in [wide, json!({"blueprint": null})] {
        assert_eq!(put(body.clone()).await.ok(), body);
        let written = std::fs::read(&wish).unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&written).unwrap(), body);
    }
}
