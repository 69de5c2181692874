//! Everything but generation.

use serde_json::{Value, json};

use crate::support::{EOS, Stack, engine, ids, user};

#[tokio::test]
async fn models_are_listed_and_described() {
    let stack = Stack::start(vec![engine()], |config| {
        config.models[0].aliases.push("org/name".to_owned());
    })
    .await;
    let list = stack.get("/v1/models").await.ok();
    assert_eq!(list["object"], "list");
    let names: Vec<&Value> = list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|card| &card["id"])
        .collect();
    assert_eq!(names, ["bytes", "alias", "org/name"]);
    let card = stack.get("/v1/models/alias").await.ok();
    assert_eq!(
        (&card["object"], &card["root"], &card["max_model_len"]),
        (&json!("model"), &json!("bytes"), &json!(2048))
    );
    for path in ["/v1/models/org/name", "/v1/models/org%2Fname"] {
        assert_eq!(stack.get(path).await.ok()["id"], "org/name");
    }
    let error = stack.get("/v1/models/other").await.error(404);
    assert_eq!(error["code"], "model_not_found");
    assert!(error["message"].as_str().unwrap().contains("bytes"));
}

/// A model whose engine runs, and one whose engine was never started.
async fn half_a_fleet(blueprints: [Option<&str>; 2]) -> Stack {
    Stack::start(vec![engine()], |config| {
        let mut other = config.models[0].clone();
        other.name = "other".to_owned();
        other.aliases.clear();
        other.replicas = vec![format!("{}.none", other.replicas[0])];
        config.models.push(other);
        for (model, state) in config.models.iter_mut().zip(blueprints) {
            if let Some(state) = state {
                let path = model.path.join(format!("{}.json", model.name));
                std::fs::write(&path, state).unwrap();
                model.blueprint_file = Some(path);
            }
        }
    })
    .await
}

#[tokio::test]
async fn a_gateway_is_ready_when_all_its_models_are_or_any_if_that_is_asked() {
    let stack = half_a_fleet([None, None]).await;
    let error = stack.get("/ready").await.error(503);
    assert!(error["message"].as_str().unwrap().contains("other"));
    stack.get("/ready?models=all").await.error(503);
    assert_eq!(stack.get("/ready?models=any").await.ok()["status"], "ready");
    let error = stack.get("/ready?models=some").await.error(400);
    assert!(error["message"].as_str().unwrap().contains("any"));
}

#[tokio::test]
async fn each_models_shape_is_told() {
    let one = half_a_fleet([Some(r#"{"mode":"static"}"#), None]).await;
    assert_eq!(
        one.get("/admin/v1/blueprint").await.ok(),
        json!({"mode": "static", "model": "bytes"})
    );
    let two = half_a_fleet([Some("{}"), Some("{}")]).await;
    assert_eq!(
        two.get("/admin/v1/blueprint").await.ok(),
        json!({"models": [{"model": "bytes"}, {"model": "other"}]})
    );
    let broken = half_a_fleet([Some("[]"), None]).await;
    broken.get("/admin/v1/blueprint").await.error(503);
    let none = half_a_fleet([None, None]).await;
    none.get("/admin/v1/blueprint").await.error(404);
}

#[tokio::test]
async fn text_goes_to_ids_and_back() {
    let stack = Stack::one(engine()).await;
    let text = "h\u{e9}llo";
    let encoded = stack
        .post("/tokenize", &json!({"model": "bytes", "prompt": text}))
        .await
        .ok();
    assert_eq!(
        encoded,
        json!({"count": 6, "max_model_len": 2048, "tokens": ids(text), "token_strs": null})
    );
    let decoded = stack
        .post("/detokenize", &json!({"tokens": ids(text)}))
        .await
        .ok();
    assert_eq!(decoded, json!({"prompt": text}));
    let chat = stack
        .post(
            "/tokenize",
            &json!({"messages": user("hi"), "return_token_strs": true}),
        )
        .await
        .ok();
    assert_eq!(chat["tokens"], json!([EOS + 1, 104, 105, EOS + 2]));
    assert_eq!(
        chat["token_strs"],
        json!(["<|user|>", "h", "i", "<|assistant|>"])
    );
    let open = json!({"messages": user("hi"), "add_generation_prompt": false});
    assert_eq!(stack.post("/tokenize", &open).await.ok()["count"], 3);
}

#[tokio::test]
async fn bad_text_requests_name_the_field() {
    let stack = Stack::one(engine()).await;
    for (path, body, param) in [
        ("/tokenize", json!({}), "prompt"),
        ("/tokenize", json!({"prompt": 3}), "prompt"),
        (
            "/tokenize",
            json!({"prompt": "a", "messages": user("a")}),
            "messages",
        ),
        (
            "/tokenize",
            json!({"prompt": "a", "add_special_tokens": "x"}),
            "add_special_tokens",
        ),
        ("/detokenize", json!({}), "tokens"),
        ("/detokenize", json!({"tokens": [-1]}), "tokens[0]"),
        ("/detokenize", json!({"tokens": [9999]}), "tokens"),
    ] {
        assert_eq!(
            stack.post(path, &body).await.error(400)["param"],
            param,
            "{path} {body}"
        );
    }
    assert_eq!(
        stack
            .post("/tokenize", &json!({"model": "x", "prompt": "a"}))
            .await
            .error(404)["param"],
        "model"
    );
}

#[tokio::test]
async fn health_readiness_and_version_are_told() {
    let mut stack = Stack::one(engine()).await;
    assert_eq!(stack.get("/health").await.ok()["status"], "ok");
    assert_eq!(
        stack.get("/ready").await.ok()["models"][0]["replicas"][0]["state"],
        "ready"
    );
    assert_eq!(
        stack.get("/version").await.ok()["version"],
        env!("CARGO_PKG_VERSION")
    );
    assert!(stack.get("/").await.text().contains("/v1/chat/completions"));
    stack.engines[0] = None;
    stack
        .wait_metric("scalellm_replica_state{", "state=\"ready\"", 0.0)
        .await;
    let unready = stack.get("/ready").await;
    assert_eq!(unready.error(503)["code"], "no_replica");
    assert!(!unready.text().contains("unix:"), "{}", unready.text());
    assert_eq!(unready.header("retry-after"), "1");
    assert_eq!(stack.get("/health").await.status, 200);
}

#[tokio::test]
async fn metrics_count_what_was_done() {
    let stack = Stack::one(engine()).await;
    stack
        .complete(json!({"prompt": "abc", "max_tokens": 5}))
        .await
        .ok();
    stack.complete(json!({"prompt": 7})).await.error(400);
    stack
        .wait_metric(
            "scalellm_requests_total{",
            "route=\"/v1/completions\",status=\"200\"",
            1.0,
        )
        .await;
    stack
        .wait_metric(
            "scalellm_requests_total{",
            "route=\"/v1/completions\",status=\"400\"",
            1.0,
        )
        .await;
    assert_eq!(
        stack
            .metric("scalellm_prompt_tokens_total{", "model=\"bytes\"")
            .await,
        3.0
    );
    assert_eq!(
        stack
            .metric("scalellm_output_tokens_total{", "model=\"bytes\"")
            .await,
        5.0
    );
    assert_eq!(
        stack
            .metric("gen_ai_server_time_to_first_token_seconds_count{", "bytes")
            .await,
        1.0
    );
    assert_eq!(
        stack
            .metric(
                "gen_ai_server_time_per_output_token_seconds_count{",
                "bytes"
            )
            .await,
        1.0
    );
    assert_eq!(
        stack
            .metric("scalellm_stage_seconds_count{", "stage=\"queue\"")
            .await,
        1.0
    );
    stack.get("/health").await.ok();
    assert_eq!(
        stack
            .metric("scalellm_stage_seconds_count{", "stage=\"total\"")
            .await,
        1.0,
        "probes and bad bodies are not among the requests for a model"
    );
    assert_eq!(
        stack
            .metric("scalellm_replica_kv_blocks_total{", "bytes")
            .await,
        65_536.0
    );
    assert_eq!(
        stack.metric("scalellm_generations_in_flight ", "").await,
        0.0
    );
    let text = stack.get("/metrics").await.text();
    for family in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let name = family.split(' ').next().unwrap();
        assert_eq!(
            text.matches(&format!("# TYPE {name} ")).count(),
            1,
            "{name} is declared twice"
        );
    }
}

#[tokio::test]
async fn unknown_routes_and_methods_get_the_envelope() {
    let stack = Stack::one(engine()).await;
    assert_eq!(
        stack.get("/v1/nothing").await.error(404)["code"],
        "unknown_url"
    );
    let reply = stack.get("/v1/chat/completions").await;
    assert_eq!(reply.error(405)["code"], "method_not_allowed");
    assert_eq!(reply.header("allow"), "POST");
    assert!(reply.header("server-timing").contains("total;dur="));
}
