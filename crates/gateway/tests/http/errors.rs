//! Bad input: every field named, with what it got and what is allowed.

use std::path::PathBuf;

use bytes::Bytes;
use scalellm_gateway::{Config, Gateway, ModelConfig};
use serde_json::{Value, json};

use crate::support::{Folder, Stack, engine, request, send, user};

#[tokio::test]
async fn each_bad_field_of_both_endpoints_is_named() {
    let stack = Stack::one(engine()).await;
    let table: Vec<(&str, Vec<Value>)> = vec![
        (
            "n",
            vec![json!(0), json!(129), json!("1"), json!(1.5), json!(true)],
        ),
        (
            "max_tokens",
            vec![json!(-1), json!("5"), json!(5000), json!([])],
        ),
        ("min_tokens", vec![json!(-1), json!(100), json!("x")]),
        (
            "temperature",
            vec![json!(-0.1), json!(2.1), json!("hot"), json!([])],
        ),
        ("top_p", vec![json!(0), json!(1.1), json!("x")]),
        ("top_k", vec![json!(-2), json!(1.5), json!("x")]),
        ("min_p", vec![json!(-0.1), json!(1.1)]),
        ("repetition_penalty", vec![json!(0), json!(-1), json!(11)]),
        ("presence_penalty", vec![json!(2.5), json!("x")]),
        ("frequency_penalty", vec![json!(-2.5)]),
        (
            "logit_bias",
            vec![
                json!([]),
                json!({"x": 1}),
                json!({"1": 101}),
                json!({"1": "a"}),
                json!({"9999": 1}),
            ],
        ),
        ("seed", vec![json!("x"), json!(1.5), json!(1e30)]),
        (
            "stop",
            vec![
                json!(3),
                json!(["a", 3]),
                json!(""),
                json!([""]),
                json!(vec!["a"; 17]),
                json!("x".repeat(1025)),
            ],
        ),
        (
            "stop_token_ids",
            vec![json!(3), json!([9999]), json!(vec![1; 129])],
        ),
        ("stop_token_ids[1]", vec![json!([1, -1]), json!([1, "x"])]),
        ("ignore_eos", vec![json!(1), json!("true")]),
        ("skip_special_tokens", vec![json!(0)]),
        ("include_stop_str_in_output", vec![json!(0)]),
        ("return_token_ids", vec![json!("x")]),
        ("prompt_logprobs", vec![json!(21), json!(-1), json!(true)]),
        ("priority", vec![json!(1.5), json!(1_i64 << 40)]),
        ("deadline_ms", vec![json!(0), json!(-5), json!("soon")]),
        ("cache_salt", vec![json!(3), json!("s".repeat(65))]),
        ("stream", vec![json!("yes"), json!(1)]),
        ("stream_options", vec![json!({}), json!("x")]),
        ("user", vec![json!(3)]),
        ("metadata", vec![json!("x")]),
        ("best_of", vec![json!(2)]),
        (
            "response_format",
            vec![json!({"type": "json_object"}), json!("text")],
        ),
        ("use_beam_search", vec![json!(true)]),
        ("guided_regex", vec![json!("a+")]),
        ("suffix", vec![json!("end")]),
        ("logprobs", vec![json!("x"), json!([])]),
        ("model", vec![json!(3)]),
    ];
    for (param, values) in table {
        let field = param.split('[').next().unwrap();
        for value in values {
            for (path, base) in [
                (
                    "/v1/completions",
                    json!({"model": "bytes", "prompt": "x", "max_tokens": 8}),
                ),
                (
                    "/v1/chat/completions",
                    json!({"model": "bytes", "messages": user("x"), "max_tokens": 8}),
                ),
            ] {
                let mut body = base;
                body[field] = value.clone();
                let error = stack.post(path, &body).await.error(400);
                assert_eq!(error["param"], param, "{path} {body}: {error}");
                let message = error["message"].as_str().unwrap();
                assert!(message.starts_with(param), "{message}");
                assert!(message.contains("allowed"), "{message}");
                assert!(message.len() < 400, "{message}");
            }
        }
    }
}

#[tokio::test]
async fn fields_of_one_endpoint_are_named() {
    let stack = Stack::one(engine()).await;
    for (path, body, param) in [
        ("/v1/completions", json!({"model": "bytes"}), "prompt"),
        (
            "/v1/completions",
            json!({"model": "bytes", "prompt": ""}),
            "prompt",
        ),
        (
            "/v1/completions",
            json!({"model": "bytes", "prompt": [[]]}),
            "prompt",
        ),
        (
            "/v1/completions",
            json!({"model": "bytes", "prompt": [9999]}),
            "prompt",
        ),
        (
            "/v1/completions",
            json!({"model": "bytes", "prompt_token_ids": [9999]}),
            "prompt_token_ids",
        ),
        (
            "/v1/completions",
            json!({"model": "bytes", "prompt": ["a", 1]}),
            "prompt[1]",
        ),
        (
            "/v1/completions",
            json!({"model": "bytes", "prompt": "x", "echo": "x"}),
            "echo",
        ),
        (
            "/v1/completions",
            json!({"model": "bytes", "prompt": "x", "logprobs": 21}),
            "logprobs",
        ),
        (
            "/v1/completions",
            json!({"model": "bytes", "prompt": vec!["x"; 1025]}),
            "prompt",
        ),
        (
            "/v1/completions",
            json!({"model": "bytes", "prompt": vec!["x"; 100], "n": 20}),
            "prompt",
        ),
        (
            "/v1/chat/completions",
            json!({"model": "bytes"}),
            "messages",
        ),
        (
            "/v1/chat/completions",
            json!({"model": "bytes", "messages": []}),
            "messages",
        ),
        (
            "/v1/chat/completions",
            json!({"model": "bytes", "messages": [{"role": "x"}]}),
            "messages[0].role",
        ),
        (
            "/v1/chat/completions",
            json!({"model": "bytes", "messages": user("x"), "top_logprobs": 2}),
            "top_logprobs",
        ),
        (
            "/v1/chat/completions",
            json!({"model": "bytes", "messages": user("x"), "tools": [{}]}),
            "tools",
        ),
        (
            "/v1/chat/completions",
            json!({"model": "bytes", "messages": user("x"), "audio": {}}),
            "audio",
        ),
        (
            "/v1/chat/completions",
            json!({"model": "bytes", "messages": user("x"), "max_tokens": 3, "max_completion_tokens": 4}),
            "max_completion_tokens",
        ),
        (
            "/v1/chat/completions",
            json!({"messages": user("x"), "chat_template": "x"}),
            "chat_template",
        ),
    ] {
        let error = stack.post(path, &body).await.error(400);
        assert_eq!(error["param"], param, "{error}");
    }
    let nameless = json!({"messages": user("x"), "max_tokens": 1});
    let reply = stack.post("/v1/chat/completions", &nameless).await;
    assert_eq!(reply.ok()["model"], "bytes");
    let unknown = json!({"model": "gpt", "messages": user("x")});
    assert_eq!(
        stack
            .post("/v1/chat/completions", &unknown)
            .await
            .error(404)["code"],
        "model_not_found"
    );
}

#[tokio::test]
async fn too_long_a_prompt_is_told_both_numbers() {
    let stack = Stack::one(engine()).await;
    let error = stack
        .complete(json!({"prompt": "x".repeat(3000)}))
        .await
        .error(400);
    assert_eq!(error["code"], "context_length_exceeded");
    let message = error["message"].as_str().unwrap();
    assert!(
        message.contains("3000") && message.contains("2048"),
        "{message}"
    );
    let error = stack
        .complete(json!({"prompt": "x".repeat(2000), "max_tokens": 100}))
        .await
        .error(400);
    let message = error["message"].as_str().unwrap();
    assert!(
        message.contains("2000") && message.contains("100") && message.contains("2048"),
        "{message}"
    );
}

#[tokio::test]
async fn bodies_that_are_no_json_are_told_where() {
    let stack = Stack::one(engine()).await;
    for (body, says) in [
        (&b"{\"model\": \"bytes\", \"prompt\": "[..], "line 1 column"),
        (b"{\"model\": \"\xff\"}", "byte 11"),
        (b"", "empty"),
        (b"[]", "JSON object"),
        (b"{\"n\": NaN}", "line 1"),
    ] {
        let reply = send(
            stack.address(),
            request("POST", "/v1/completions", &[], Bytes::copy_from_slice(body)),
        )
        .await;
        let error = reply.error(400);
        assert_eq!(error["code"], "invalid_body");
        assert!(error["message"].as_str().unwrap().contains(says), "{error}");
    }
}

#[tokio::test]
async fn unknown_fields_are_ignored_with_a_warning() {
    let stack = Stack::one(engine()).await;
    let reply = stack
        .complete(json!({"prompt": "x", "max_tokens": 2, "frobnicate": 1, "a\r\nb": 2}))
        .await;
    reply.ok();
    let warning = reply.header("x-scalellm-warning");
    assert!(
        warning.contains("frobnicate") && warning.contains("a??b"),
        "{warning}"
    );
    let mut many = json!({"prompt": "x", "max_tokens": 2});
    for index in 0..2000 {
        many[format!("unknown_field_{index:0300}")] = 1.into();
    }
    let reply = stack.complete(many).await;
    reply.ok();
    assert!(reply.header("x-scalellm-warning").len() < 1000);
    assert!(
        stack
            .complete(json!({"prompt": "x", "max_tokens": 2}))
            .await
            .headers
            .get("x-scalellm-warning")
            .is_none()
    );
}

#[tokio::test]
async fn values_that_mean_the_default_are_accepted() {
    let stack = Stack::one(engine()).await;
    let reply = stack
        .chat(json!({
            "messages": user("x"), "max_tokens": 2, "tools": [], "tool_choice": "auto", "n": 1, "best_of": 1,
            "response_format": {"type": "text"}, "logprobs": false, "top_logprobs": null, "stop": null, "seed": null,
            "logit_bias": {}, "user": "u", "metadata": {"a": "b"}, "store": false, "service_tier": "auto",
            "parallel_tool_calls": true, "guided_json": null, "use_beam_search": false, "stream": false,
            "stream_options": null, "temperature": 1, "top_k": -1, "modalities": ["text"], "reasoning_effort": "low",
            "frequency_penalty": 0.0, "prompt_cache_key": "k", "chat_template_kwargs": {"x": 1},
        }))
        .await;
    reply.ok();
    assert_eq!(reply.header("x-scalellm-warning"), "");
}

#[tokio::test]
async fn only_a_templates_refusal_is_the_clients_error() {
    let loops = "{% for m in messages if m.content == 'loop' %}{% for i in range(100000) %}\
                 {% for j in range(100000) %}x{% endfor %}{% endfor %}{% endfor %}";
    let fails = "{% if messages[0].content == 'fail' %}{{ messages[0].nothing.at.all }}{% endif %}";
    let refuses = "{% if messages[0].content == 'refuse' %}{{ raise_exception('roles must alternate') }}{% endif %}x";
    let folder = Folder::new();
    let file = folder.0.join("template.jinja");
    std::fs::write(&file, format!("{loops}{fails}{refuses}")).unwrap();
    let stack = Stack::start(vec![engine()], |config| {
        config.models[0].chat_template = Some(file);
    })
    .await;
    let error = stack
        .chat(json!({"messages": user("refuse")}))
        .await
        .error(400);
    assert_eq!(error["param"], "messages");
    assert!(
        error["message"]
            .as_str()
            .unwrap()
            .contains("roles must alternate")
    );
    for (content, says) in [("loop", "did not end"), ("fail", "default:1")] {
        let error = stack
            .chat(json!({"messages": user(content)}))
            .await
            .error(500);
        assert_eq!(
            (&error["type"], &error["param"]),
            (&json!("server_error"), &Value::Null)
        );
        let message = error["message"].as_str().unwrap();
        assert!(
            message.starts_with("model \"bytes\": the chat template failed: ")
                && message.contains(says),
            "{message}"
        );
    }
    stack
        .chat(json!({"messages": user("x"), "max_tokens": 2}))
        .await
        .ok();
}

#[tokio::test]
async fn a_template_that_does_not_compile_ends_the_start() {
    let stack = Stack::one(engine()).await;
    let config = |chat_template: Option<PathBuf>| Config {
        port: 0,
        models: vec![ModelConfig {
            name: "bytes".to_owned(),
            aliases: Vec::new(),
            path: stack.folder.0.clone(),
            replicas: vec![stack.socket(0)],
            chat_template,
            ..ModelConfig::default()
        }],
        ..Config::default()
    };
    let folder = Folder::new();
    let (good, bad) = (folder.0.join("good.jinja"), folder.0.join("bad.jinja"));
    std::fs::write(&good, "x").unwrap();
    std::fs::write(&bad, "x\n{% for m in messages %}").unwrap();
    let error = Gateway::start(config(Some(bad.clone())))
        .await
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("bad.jinja") && error.contains("default:2"),
        "{error}"
    );
    std::fs::copy(&bad, stack.folder.0.join("chat_template.jinja")).unwrap();
    let error = Gateway::start(config(None))
        .await
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("does not compile") && !error.contains('\n'),
        "{error}"
    );
    // The operator's template takes the place of the broken one.
    Gateway::start(config(Some(good))).await.unwrap();
}

#[tokio::test]
async fn large_bodies_are_read_as_small_ones_are() {
    let stack = Stack::one(engine()).await;
    let large = "x".repeat(200_000);
    let reply = stack
        .complete(json!({"prompt": "x", "max_tokens": 2, "padding": large}))
        .await;
    reply.ok();
    assert!(reply.header("x-scalellm-warning").contains("padding"));
    assert!(reply.header("server-timing").contains("parse;dur="));
    let error = stack
        .complete(json!({"prompt": "x", "temperature": 3, "padding": large}))
        .await
        .error(400);
    assert_eq!(error["param"], "temperature");
    let cut = Bytes::from(format!("{{\"padding\": \"{large}"));
    let error = send(
        stack.address(),
        request("POST", "/v1/completions", &[], cut),
    )
    .await
    .error(400);
    assert_eq!(error["code"], "invalid_body");
}
