//! What `/admin/v1/profile` tells of requests whose times are known.

use scalellm_fake_engine::{LoadNumbers, Settings};
use serde_json::{Value, json};

use crate::support::{Stack, engine, user};

const TTFT_MS: f64 = 40.0;
const TBT_MS: f64 = 10.0;

fn timed() -> Settings {
    Settings {
        ttft_ms: TTFT_MS,
        tbt_ms: TBT_MS,
        ..engine()
    }
}

async fn told(stack: &Stack, query: &str) -> Value {
    stack.get(&format!("/admin/v1/profile{query}")).await.ok()
}

/// The record of the one request that was made; it ends a moment after its client has read all.
async fn only_request(stack: &Stack) -> Value {
    stack
        .wait_metric("scalellm_generations_in_flight ", "", 0.0)
        .await;
    loop {
        let requests = told(stack, "?from=0").await["requests"].clone();
        if let Some(request) = requests.as_array().unwrap().first() {
            return request.clone();
        }
    }
}

fn sum(of: &Value) -> f64 {
    of.as_object()
        .unwrap()
        .values()
        .map(|us| us.as_f64().unwrap())
        .sum()
}

#[tokio::test]
async fn the_stages_before_the_first_token_add_up_to_its_wait() {
    let stack = Stack::one(timed()).await;
    let ask = json!({"messages": user("x"), "max_tokens": 8, "stream": true});
    stack.chat(ask).await.events();
    let request = only_request(&stack).await;
    assert_eq!(
        (
            &request["route"],
            &request["output_tokens"],
            &request["status"]
        ),
        (&json!("/v1/chat/completions"), &json!(8), &json!(200))
    );
    let us = |name: &str| request["stages_us"][name].as_f64().unwrap();
    let before_first = [
        "accept",
        "auth",
        "body",
        "parse",
        "admission",
        "text_queue",
        "template",
        "tokenise",
        "route",
        "link_out",
        "queue",
        "prefill",
        "emit",
        "link_back",
    ];
    let parts: f64 = before_first.into_iter().map(us).sum();
    let first = &request["first"];
    let parts = parts + first["detokenise_us"].as_f64().unwrap();
    // Microseconds are cut from each part; what the runtime took between two parts is in none.
    assert!(parts <= us("first") + 20.0, "{request}");
    assert!(parts >= TTFT_MS * 1e3, "{request}");
    assert!(
        first["handed_us"].as_f64().unwrap() >= us("first"),
        "{request}"
    );
    assert!(
        first["written_us"].as_f64() >= first["handed_us"].as_f64(),
        "{request}"
    );
}

#[tokio::test]
async fn the_engines_phases_add_up_to_its_times() {
    let stack = Stack::one(timed()).await;
    let ask = json!({"messages": user("x"), "max_tokens": 8, "stream": true});
    stack.chat(ask).await.events();
    let request = only_request(&stack).await;
    let engine = &request["engine"];
    let at = |name: &str| engine[name].as_f64().unwrap();
    let prefill = at("first_token_us") - at("first_scheduled_us");
    assert_eq!(sum(&engine["prefill_us"]), prefill, "{engine}");
    assert_eq!(prefill, request["stages_us"]["prefill"].as_f64().unwrap());
    let decode = at("finished_us") - at("first_token_us");
    assert_eq!(sum(&engine["decode_us"]), decode, "{engine}");
    assert!(
        prefill >= TTFT_MS * 1e3 && decode >= 7.0 * TBT_MS * 1e3 * 0.5,
        "{engine}"
    );
    assert_eq!(engine["steps"], 8);
    let steps = told(&stack, "?steps_after_us=0").await["replicas"][0]["steps"].clone();
    assert_eq!(steps.as_array().unwrap().len(), 8);
    assert!(steps[0]["phases_us"]["forward"].as_f64().unwrap() >= TTFT_MS * 1e3 * 0.9);
}

#[tokio::test]
async fn only_what_is_asked_for_is_told_and_only_requests_for_models_are_kept() {
    let stack = Stack::one(engine()).await;
    stack.get("/v1/models").await.ok();
    for _ in 0..3 {
        stack
            .complete(json!({"prompt": "x", "max_tokens": 1}))
            .await
            .ok();
    }
    stack
        .complete(json!({"prompt": "x", "max_tokens": 0}))
        .await
        .error(400);
    while told(&stack, "").await["next"] != 3 {}
    let nothing = told(&stack, "").await;
    assert_eq!(
        (&nothing["requests"], &nothing["replicas"]),
        (&json!([]), &json!([]))
    );
    let last = told(&stack, "?from=2").await["requests"].clone();
    assert_eq!(
        (last.as_array().unwrap().len(), &last[0]["sequence"]),
        (1, &json!(2))
    );
}

#[tokio::test]
async fn an_engine_that_is_gone_is_a_problem_and_no_error() {
    let mut stack = Stack::one(engine()).await;
    drop(stack.engines[0].take());
    let body = told(&stack, "?steps_after_us=0").await;
    assert!(body["replicas"][0]["problem"].is_string(), "{body}");
}

#[tokio::test]
async fn how_evenly_experts_are_used_is_in_the_metrics_and_in_each_step() {
    let sparse = Settings {
        load: LoadNumbers {
            expert_choices: vec![3, 0, 2, 1],
            expert_ranks: 2,
            ..LoadNumbers::default()
        },
        ..timed()
    };
    let stack = Stack::one(sparse).await;
    let ask = json!({"prompt": "x", "max_tokens": 4});
    stack.complete(ask).await.ok();
    let experts =
        told(&stack, "?steps_after_us=0").await["replicas"][0]["steps"][0]["experts"].clone();
    let one = json!({"layers": 1, "read": 3, "busiest": 3, "choices": [3, 0, 2, 1], "ranks": 2});
    assert_eq!(experts, one);
    let name = |name: &str| format!("scalellm_replica_{name}{{");
    for (family, labels, value) in [
        ("expert_layers_total", "", 4.0),
        ("experts_read_total", "", 12.0),
        ("expert_busiest_choices_total", "", 12.0),
        ("expert_choices_total", "expert=\"2\",rank=\"1\"", 8.0),
        ("expert_choices_total", "rank=\"0\"", 12.0),
    ] {
        stack.wait_metric(&name(family), labels, value).await;
    }
}

#[tokio::test]
async fn a_model_without_experts_has_none_to_tell_of() {
    let stack = Stack::one(timed()).await;
    stack
        .complete(json!({"prompt": "x", "max_tokens": 1}))
        .await
        .ok();
    let step = told(&stack, "?steps_after_us=0").await["replicas"][0]["steps"][0].clone();
    assert_eq!(step.get("experts"), None);
    assert!(
        !stack
            .get("/metrics")
            .await
            .text()
            .contains("scalellm_replica_expert_layers_total{")
    );
}
