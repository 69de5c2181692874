//! Keys, quotas and usage, over real sockets.

use std::time::{Duration, Instant};

use bytes::Bytes;
use scalellm_fake_engine::{Output, Settings};
use scalellm_gateway::Config;
use serde_json::{Value, json};

use crate::foreign::WHOLE;
use crate::support::{Folder, LONG, Reply, Stack, engine, open, request, says, send, with_model};
use crate::upstream::{Mock, before, json as upstream_json};

pub fn with_database(config: &mut Config) {
    let file = config.models[0].path.join("accounts.db");
    config.database_url = Some(format!("sqlite:{}", file.display()));
    config.usage_interval_s = 0.02;
    // A busy machine must not look like a database that is down.
    config.database_timeout_s = 30.0;
}

async fn stack(settings: Settings) -> Stack {
    Stack::start(vec![settings], with_database).await
}

pub async fn send_as(stack: &Stack, method: &str, path: &str, key: &str, body: &Value) -> Reply {
    let authorization = format!("Bearer {key}");
    let headers = [("authorization", authorization.as_str())];
    let body = Bytes::from(body.to_string());
    send(stack.address(), request(method, path, &headers, body)).await
}

pub async fn complete_as(stack: &Stack, key: &str, fields: Value) -> Reply {
    send_as(stack, "POST", "/v1/completions", key, &with_model(fields)).await
}

/// A new key: its id and its secret.
pub async fn new_key(stack: &Stack, fields: Value) -> (String, String) {
    let made = stack.post("/admin/v1/keys", &fields).await.ok();
    let text = |name: &str| made[name].as_str().unwrap().to_owned();
    (text("id"), text("secret"))
}

/// The one row of `/admin/v1/usage?...` when it says what is awaited.
async fn wait_usage(stack: &Stack, query: &str, is_so: impl Fn(&Value) -> bool) -> Value {
    let start = Instant::now();
    loop {
        let path = format!("/admin/v1/usage?{query}");
        let row = stack.get(&path).await.ok()["data"][0].clone();
        if is_so(&row) {
            return row;
        }
        assert!(start.elapsed() < LONG, "{row}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn everybody_comes_in_until_there_is_a_key() {
    let stack = stack(says("hi")).await;
    let start = Instant::now();
    // Until the database has said that there is none.
    while stack.complete(json!({"prompt": "x"})).await.status == 503 {
        assert!(start.elapsed() < LONG);
    }
    complete_as(&stack, "any", json!({"prompt": "x"}))
        .await
        .ok();
    let (id, secret) = new_key(&stack, json!({"name": "laptop", "tenant": "acme"})).await;
    let error = stack.complete(json!({"prompt": "x"})).await.error(401);
    assert_eq!(error["code"], "invalid_api_key");
    complete_as(&stack, "any", json!({"prompt": "x"}))
        .await
        .error(401);
    complete_as(&stack, &secret, json!({"prompt": "x"}))
        .await
        .ok();
    let listed = stack.get("/admin/v1/keys").await;
    assert!(!listed.text().contains(&secret));
    assert_eq!(listed.ok()["data"][0]["tenant"], "acme");
    let path = format!("/admin/v1/keys/{id}");
    send_as(&stack, "DELETE", &path, "", &json!(null))
        .await
        .ok();
    let error = complete_as(&stack, &secret, json!({"prompt": "x"}))
        .await
        .error(401);
    assert!(error["message"].as_str().unwrap().contains("revoked"));
}

#[tokio::test]
async fn a_key_is_for_its_models() {
    let stack = stack(says("hi")).await;
    let (_, other) = new_key(&stack, json!({"models": ["other"]})).await;
    let error = complete_as(&stack, &other, json!({"prompt": "x"}))
        .await
        .error(403);
    assert_eq!(error["code"], "model_not_allowed");
    let (_, alias) = new_key(&stack, json!({"models": ["alias"]})).await;
    complete_as(&stack, &alias, json!({"prompt": "x"}))
        .await
        .ok();
}

#[tokio::test]
async fn what_an_operator_gets_wrong_is_named() {
    let stack = stack(says("hi")).await;
    for (fields, named) in [
        (json!({"weight": 0}), "weight"),
        (
            json!({"limits": {"tokens_per_day": -1}}),
            "limits.tokens_per_day",
        ),
        (json!({"colour": "red"}), "colour"),
    ] {
        let error = stack.post("/admin/v1/keys", &fields).await.error(400);
        assert!(
            error["message"].as_str().unwrap().contains(named),
            "{error}"
        );
    }
    stack
        .get("/admin/v1/usage?group_by=colour")
        .await
        .error(400);
    let reply = send_as(&stack, "DELETE", "/admin/v1/keys/none", "", &json!(null)).await;
    assert_eq!(reply.error(404)["code"], "key_not_found");
    let plain = Stack::one(says("hi")).await;
    assert_eq!(
        plain.get("/admin/v1/keys").await.error(404)["code"],
        "no_database"
    );
}

#[tokio::test]
async fn quotas_really_refuse() {
    let stack = stack(says("hello")).await;
    let limits = json!({"requests_per_minute": 1000, "tokens_per_month": 100});
    let (_, secret) = new_key(&stack, json!({"limits": limits})).await;
    // Five tokens of prompt, six of output with the end of sequence, though fifty are reserved.
    let ask = json!({"prompt": "abcde", "max_tokens": 45});
    for n in 1..=5 {
        let reply = complete_as(&stack, &secret, ask.clone()).await;
        assert_eq!(reply.ok()["usage"]["total_tokens"], 11);
        assert_eq!(reply.header("x-ratelimit-limit-requests"), "1000");
        assert_eq!(reply.header("x-ratelimit-limit-tokens"), "100");
        let left: i64 = reply
            .header("x-ratelimit-remaining-tokens")
            .parse()
            .unwrap();
        assert!(
            left <= 100 - 11 * (n - 1),
            "{left} left before request {n} is settled"
        );
        assert!(reply.header("x-ratelimit-reset-requests").ends_with('s'));
    }
    let reply = complete_as(&stack, &secret, ask.clone()).await;
    let error = reply.error(429);
    assert_eq!(error["code"], "insufficient_quota");
    assert!(reply.header("retry-after").parse::<u64>().unwrap() > 0);
    let smaller = json!({"prompt": "abcde", "max_tokens": 30});
    complete_as(&stack, &secret, smaller).await.ok();
    let whole = json!({"prompt": "abcde", "max_tokens": 200});
    complete_as(&stack, &secret, whole).await.error(429);
}

#[tokio::test]
async fn requests_per_minute_are_counted_for_each_key() {
    let stack = stack(says("hi")).await;
    let limited = json!({"limits": {"requests_per_minute": 3}});
    let (_, secret) = new_key(&stack, limited.clone()).await;
    let (_, other) = new_key(&stack, limited).await;
    let ask = json!({"prompt": "x"});
    let mut left = Vec::new();
    let refused = loop {
        let reply = complete_as(&stack, &secret, ask.clone()).await;
        if reply.status != 200 {
            break reply;
        }
        assert_eq!(reply.header("x-ratelimit-limit-requests"), "3");
        left.push(reply.header("x-ratelimit-remaining-requests").to_owned());
        assert!(left.len() <= 6, "three in each of two minutes at the most");
    };
    // A new minute may have begun among them.
    assert!(left.ends_with(&["2".to_owned(), "1".to_owned(), "0".to_owned()]));
    let error = refused.error(429);
    assert_eq!(
        (&error["type"], &error["code"]),
        (&json!("rate_limit_error"), &json!("rate_limit_exceeded"))
    );
    let message = error["message"].as_str().unwrap();
    assert!(
        message.contains("requests per minute are limited to 3"),
        "{message}"
    );
    let seconds: u64 = refused.header("retry-after").parse().unwrap();
    assert!((1..=60).contains(&seconds), "{seconds}");
    assert_eq!(refused.header("x-ratelimit-limit-requests"), "3");
    assert_eq!(refused.header("x-ratelimit-remaining-requests"), "0");
    assert!(refused.header("x-ratelimit-reset-requests").ends_with('s'));
    assert_eq!(stack.metric("scalellm_rejected_total{", "quota").await, 1.0);
    let reply = complete_as(&stack, &other, ask).await;
    reply.ok();
    assert_eq!(reply.header("x-ratelimit-remaining-requests"), "2");
}

#[tokio::test]
async fn quotas_and_usage_hold_before_a_server_elsewhere_too() {
    let folder = Folder::new();
    let mock = Mock::start(|_| vec![upstream_json(WHOLE)]).await;
    let file = folder.0.join("accounts.db");
    let stack = Stack::start(Vec::new(), |config| {
        before(vec![mock.upstream()])(config);
        config.database_url = Some(format!("sqlite:{}", file.display()));
        config.usage_interval_s = 0.02;
        config.database_timeout_s = 30.0;
    })
    .await;
    let (id, secret) = new_key(&stack, json!({"limits": {"tokens_per_month": 100}})).await;
    let ask = json!({"model": "chat", "messages": [], "max_tokens": 45});
    // What is reserved before the server counts, by the body's length; it counts 5 and 2 tokens.
    let reserved = i64::try_from(ask.to_string().len()).unwrap() / 4 + 45;
    let fit = (100 - reserved) / 7 + 1;
    for _ in 0..fit {
        let reply = send_as(&stack, "POST", "/v1/chat/completions", &secret, &ask).await;
        assert_eq!(reply.ok()["usage"]["prompt_tokens"], 5);
        assert_eq!(reply.header("x-ratelimit-limit-tokens"), "100");
    }
    let reply = send_as(&stack, "POST", "/v1/chat/completions", &secret, &ask).await;
    assert_eq!(reply.error(429)["code"], "insufficient_quota");
    assert!(reply.header("retry-after").parse::<u64>().unwrap() > 0);
    assert_eq!(reply.header("x-ratelimit-limit-tokens"), "100");
    assert_eq!(mock.seen().len(), usize::try_from(fit).unwrap());
    let query = format!("key={id}&group_by=model");
    let row = wait_usage(&stack, &query, |row| row["prompt_tokens"] == 5 * fit).await;
    assert_eq!(
        (&row["model"], &row["cached_tokens"], &row["output_tokens"]),
        (&json!("chat"), &json!(3 * fit), &json!(2 * fit))
    );
}

#[tokio::test]
async fn concurrency_is_limited_and_given_back_when_the_client_leaves() {
    let endless = Settings {
        tbt_ms: 5.0,
        ..engine()
    };
    let stack = stack(endless).await;
    let (_, secret) = new_key(&stack, json!({"limits": {"concurrency": 1}})).await;
    let authorization = format!("Bearer {secret}");
    let headers = [("authorization", authorization.as_str())];
    let body = with_model(json!({"prompt": "x", "max_tokens": 1000, "stream": true}));
    let body = Bytes::from(body.to_string());
    let streaming = request("POST", "/v1/completions", &headers, body);
    let stream = open(stack.address(), streaming).await;
    assert_eq!(stream.0.status(), 200);
    let ask = json!({"prompt": "x", "max_tokens": 1});
    let error = complete_as(&stack, &secret, ask.clone()).await.error(429);
    assert_eq!(error["code"], "rate_limit_exceeded");
    drop(stream);
    let start = Instant::now();
    while complete_as(&stack, &secret, ask.clone()).await.status != 200 {
        assert!(start.elapsed() < LONG);
    }
}

#[tokio::test]
async fn usage_is_written_while_a_request_runs_and_when_it_ended() {
    let slow = Settings {
        tbt_ms: 5.0,
        output: Output::Fixed {
            ids: crate::support::ids("abcdefghij"),
        },
        ..engine()
    };
    let stack = stack(slow).await;
    let (id, secret) = new_key(&stack, json!({"tenant": "acme"})).await;
    let authorization = format!("Bearer {secret}");
    let headers = [("authorization", authorization.as_str())];
    let body = with_model(json!({"prompt": "abc", "max_tokens": 2000, "stream": true}));
    let streaming = request(
        "POST",
        "/v1/completions",
        &headers,
        Bytes::from(body.to_string()),
    );
    let stream = open(stack.address(), streaming).await;
    let query = format!("key={id}&group_by=tenant,model,outcome");
    let row = wait_usage(&stack, &query, |row| {
        row["output_tokens"].as_i64() > Some(3)
    })
    .await;
    assert_eq!(
        (&row["outcome"], &row["tenant"]),
        (&json!("running"), &json!("acme"))
    );
    assert_eq!(
        (&row["model"], &row["prompt_tokens"]),
        (&json!("bytes"), &json!(3))
    );
    drop(stream);
    wait_usage(&stack, &query, |row| row["outcome"] == "client_left").await;
    let ask = json!({"prompt": "abc", "max_tokens": 7});
    complete_as(&stack, &secret, ask).await.ok();
    let row = wait_usage(&stack, &format!("key={id}"), |row| row["requests"] == 2).await;
    assert!(row["output_tokens"].as_i64() > Some(7), "{row}");
}
