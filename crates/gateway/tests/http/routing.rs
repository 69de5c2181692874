//! Which replica gets a request, and what the gateway says of it.

use bytes::Bytes;
use scalellm_fake_engine::{LoadNumbers, Settings};
use scalellm_gateway::{Config, Gateway, ModelConfig};
use serde_json::{Value, json};

use crate::support::{LONG, Reply, Stack, engine, request, send, with_model};

/// Prompts cost something, and their beginnings are remembered.
fn remembering() -> Settings {
    Settings {
        prefill_ms_per_token: 0.05,
        block_size: 4,
        prefix_cache: true,
        ..engine()
    }
}

async fn ask(gateway: &Gateway, headers: &[(&str, &str)], fields: Value) -> Reply {
    let body = Bytes::from(with_model(fields).to_string());
    let reply = send(
        gateway.address(),
        request("POST", "/v1/completions", headers, body),
    )
    .await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply
}

/// The fields of `x-scalellm-route`.
async fn route(
    gateway: &Gateway,
    headers: &[(&str, &str)],
    fields: Value,
) -> Vec<(String, String)> {
    let mut with_ask = vec![("x-scalellm-route", "1")];
    with_ask.extend_from_slice(headers);
    let reply = ask(gateway, &with_ask, fields).await;
    let fields = reply.header("x-scalellm-route").to_owned();
    fields
        .split("; ")
        .map(|field| {
            let (name, value) = field.split_once('=').unwrap();
            (name.to_owned(), value.to_owned())
        })
        .collect()
}

fn value<'a>(route: &'a [(String, String)], name: &str) -> &'a str {
    &route.iter().find(|(field, _)| field == name).unwrap().1
}

/// Until the gateway has heard of so many cached blocks.
async fn wait_blocks(gateway: &Gateway, blocks: usize) {
    let start = std::time::Instant::now();
    loop {
        let get = request("GET", "/metrics", &[], Bytes::new());
        let text = send(gateway.address(), get).await.text();
        if text.contains(&format!(
            "scalellm_prefix_blocks{{model=\"bytes\"}} {blocks}\n"
        )) {
            return;
        }
        assert!(start.elapsed() < LONG, "{text}");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_second_turn_goes_to_the_replica_that_has_the_first() {
    let stack = Stack::start(vec![remembering(), remembering(), remembering()], |_| {}).await;
    let prompt = "One two three four five six seven eight.";
    let first = json!({"prompt": prompt, "max_tokens": 4, "return_token_ids": true});
    let first_route = route(&stack.gateway, &[], first).await;
    assert_eq!(value(&first_route, "policy"), "prefix");
    assert_eq!(value(&first_route, "reason"), "cold");
    assert_eq!(value(&first_route, "cached_tokens"), "0");
    // 40 tokens of prompt and 4 of output, in blocks of 4.
    wait_blocks(&stack.gateway, 11).await;
    for _ in 0..3 {
        let second = json!({"prompt": format!("{prompt}abcd And?"), "max_tokens": 1});
        let second_route = route(&stack.gateway, &[], second).await;
        assert_eq!(
            value(&second_route, "replica"),
            value(&first_route, "replica")
        );
        assert_eq!(value(&second_route, "reason"), "prefix");
        assert!(
            value(&second_route, "cached_tokens")
                .parse::<u32>()
                .unwrap()
                >= 44
        );
        let predicted_ms: f64 = value(&second_route, "predicted_ms").parse().unwrap();
        assert!(predicted_ms.is_finite());
    }
    let labels = "model=\"bytes\",policy=\"prefix\",reason=\"prefix\"";
    assert_eq!(stack.metric("scalellm_routed_total{", labels).await, 3.0);
}

#[tokio::test]
async fn a_gateway_that_comes_later_learns_what_is_cached() {
    let stack = Stack::start(vec![remembering(), remembering()], |_| {}).await;
    let body = json!({"prompt": "A beginning that many share, and", "max_tokens": 1});
    let first = route(&stack.gateway, &[], body.clone()).await;
    let model = ModelConfig {
        name: "bytes".to_owned(),
        aliases: Vec::new(),
        path: stack.folder.0.clone(),
        replicas: vec![stack.socket(0), stack.socket(1)],
        routing: "prefix".to_owned(),
        ..ModelConfig::default()
    };
    let config = Config {
        port: 0,
        models: vec![model],
        ..Config::default()
    };
    let mut second = Gateway::start(config).await.unwrap();
    wait_blocks(&second, 8).await;
    let later = route(&second, &[], body).await;
    assert_eq!(value(&later, "replica"), value(&first, "replica"));
    assert_eq!(value(&later, "reason"), "prefix");
    second.stop();
    second.ended().await;
}

#[tokio::test]
async fn another_gateways_load_counts() {
    let busy = Settings {
        load: LoadNumbers {
            running: Some(30),
            backlog_tokens: Some(50_000),
            ..LoadNumbers::default()
        },
        ..remembering()
    };
    let stack = Stack::start(vec![busy, remembering()], |_| {}).await;
    stack
        .wait_metric("scalellm_replica_backlog_tokens{", "", 50_000.0)
        .await;
    for _ in 0..3 {
        let route = route(
            &stack.gateway,
            &[],
            json!({"prompt": "hello", "max_tokens": 1}),
        )
        .await;
        assert_eq!(value(&route, "replica"), stack.name(1).await);
    }
}

#[tokio::test]
async fn the_route_is_told_to_those_who_ask() {
    let stack = Stack::one(engine()).await;
    let body = json!({"prompt": "hello", "max_tokens": 1});
    let silent = ask(&stack.gateway, &[], body.clone()).await;
    assert!(!silent.headers.contains_key("x-scalellm-route"));
    let told = route(&stack.gateway, &[], body.clone()).await;
    assert_eq!(value(&told, "reason"), "only");
    let mut streamed = body;
    streamed["stream"] = true.into();
    let told = route(&stack.gateway, &[], streamed).await;
    assert_eq!(value(&told, "replica"), stack.name(0).await);
}

#[tokio::test]
async fn a_session_stays_where_it_is() {
    let four = vec![remembering(), remembering(), remembering(), remembering()];
    let stack = Stack::start(four, |config| {
        config.models[0].routing = "session".to_owned();
    })
    .await;
    let body = |more: Value| {
        let mut body = json!({"prompt": "hello", "max_tokens": 1});
        let fields = body.as_object_mut().unwrap();
        fields.extend(more.as_object().unwrap().clone());
        body
    };
    let mut homes = std::collections::BTreeSet::new();
    for session in ["a", "b", "c", "d", "e", "f", "g", "h"] {
        let header = [("x-session-id", session)];
        let by_header = route(&stack.gateway, &header, body(json!({"user": "else"}))).await;
        let by_user = route(&stack.gateway, &[], body(json!({"user": session}))).await;
        let key = json!({"prompt_cache_key": session, "user": "else"});
        let by_key = route(&stack.gateway, &[], body(key)).await;
        assert_eq!(value(&by_header, "reason"), "session");
        assert_eq!(value(&by_header, "replica"), value(&by_user, "replica"));
        assert_eq!(value(&by_header, "replica"), value(&by_key, "replica"));
        homes.insert(value(&by_header, "replica").to_owned());
    }
    assert!(homes.len() > 1, "{homes:?}");
}

#[tokio::test]
async fn tenants_of_other_salts_do_not_find_each_others_prefixes() {
    let stack = Stack::start(vec![remembering(), remembering()], |_| {}).await;
    let body = |salt: &str| json!({"prompt": "A secret beginning of some length", "max_tokens": 1, "cache_salt": salt});
    route(&stack.gateway, &[], body("one")).await;
    wait_blocks(&stack.gateway, 8).await;
    let other = route(&stack.gateway, &[], body("two")).await;
    assert_eq!(value(&other, "reason"), "cold");
    let same = route(&stack.gateway, &[], body("one")).await;
    assert_eq!(value(&same, "reason"), "prefix");
}
