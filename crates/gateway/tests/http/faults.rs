//! Engines that die, hang, refuse, or talk nonsense.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::BodyExt;
use scalellm_fake_engine::{Faults, Garbage, Refuse, Settings};
use scalellm_gateway::Config;
use serde_json::json;

use crate::support::{
    Reply, Stack, engine, open, request, start_engine, streamed_text, with_model,
};

fn faulty(faults: Faults) -> Settings {
    Settings {
        faults,
        tbt_ms: 50.0,
        ..engine()
    }
}

fn without_replays(config: &mut Config) {
    config.faults.replay = false;
}

#[tokio::test]
async fn without_replays_a_death_ends_its_streams_with_an_error_event_at_once() {
    let dying = faulty(Faults {
        die_after_outputs: Some(5),
        ..Faults::default()
    });
    let mut stack = Stack::start(vec![dying], without_replays).await;
    let start = Instant::now();
    let events = stack
        .complete(json!({"prompt": "x", "max_tokens": 500, "stream": true}))
        .await
        .events();
    assert!(
        start.elapsed() < Duration::from_secs(10),
        "{:?}",
        start.elapsed()
    );
    let error = &events.last().unwrap()["error"];
    assert_eq!(
        (&error["type"], &error["code"]),
        (&json!("server_error"), &json!("engine_lost"))
    );
    assert!("abcdefghij".starts_with(&streamed_text(&events, 0)));
    stack
        .wait_metric("scalellm_requests_total{", "status=\"502\"", 1.0)
        .await;

    // The pool's other session may learn a moment later that its engine is gone.
    stack
        .wait_metric("scalellm_replica_state{", "state=\"ready\"", 0.0)
        .await;
    let refused = stack.complete(json!({"prompt": "x"})).await;
    assert_eq!(refused.error(503)["code"], "no_replica");
    assert_eq!(refused.header("retry-after"), "1");

    stack.engines[0] = None;
    stack.engines[0] = Some(start_engine(&stack.socket(0), engine()));
    stack.wait_ready().await;
    stack.complete(json!({"prompt": "x"})).await.ok();
}

#[tokio::test]
async fn without_replays_a_death_before_the_answer_is_a_502() {
    let dying = faulty(Faults {
        die_after_outputs: Some(3),
        ..Faults::default()
    });
    let stack = Stack::start(vec![dying], without_replays).await;
    assert_eq!(
        stack
            .complete(json!({"prompt": "x", "max_tokens": 500}))
            .await
            .error(502)["code"],
        "engine_lost"
    );
}

#[tokio::test]
async fn nothing_is_lost_where_another_replica_can_start_anew() {
    let dying = Settings {
        ttft_ms: 60_000.0,
        ..engine()
    };
    let mut stack = Stack::start(vec![dying, engine()], |_| {}).await;
    let address = stack.address();
    let ask = with_model(json!({"prompt": "x", "max_tokens": 4}));
    let asking: Vec<_> = (0..6)
        .map(|_| {
            let body = Bytes::from(ask.to_string());
            tokio::spawn(async move {
                let (response, _connection) =
                    open(address, request("POST", "/v1/completions", &[], body)).await;
                Reply::read(response).await
            })
        })
        .collect();
    stack
        .wait_metric("scalellm_replica_in_flight_requests{", "e0", 3.0)
        .await;
    stack.engines[0] = None;
    for reply in asking {
        assert_eq!(reply.await.unwrap().ok()["choices"][0]["text"], "abcd");
    }
    assert!(stack.metric("scalellm_replays_total{", "gone").await >= 1.0);
}

#[tokio::test]
async fn a_hung_engine_ends_its_requests_and_is_avoided() {
    let hanging = faulty(Faults {
        hang_after_steps: Some(3),
        ..Faults::default()
    });
    let stack = Stack::start(vec![hanging], |config| {
        config.replica_hung_after_s = 1.0;
        config.faults.replay = false;
    })
    .await;
    let events = stack
        .complete(json!({"prompt": "x", "max_tokens": 500, "stream": true}))
        .await
        .events();
    assert_eq!(events.last().unwrap()["error"]["code"], "engine_lost");
    assert_eq!(
        stack
            .metric("scalellm_replica_state{", "state=\"hung\"")
            .await,
        1.0
    );
    assert_eq!(
        stack.complete(json!({"prompt": "x"})).await.error(503)["code"],
        "no_replica"
    );
}

#[tokio::test]
async fn a_refusal_sends_the_request_elsewhere_once() {
    for refuse in [Refuse::Draining, Refuse::Full] {
        let refusing = Settings {
            faults: Faults {
                refuse: Some(refuse),
                ..Faults::default()
            },
            ..engine()
        };
        let stack = Stack::start(vec![refusing.clone(), engine()], |_| {}).await;
        for _ in 0..4 {
            stack.complete(json!({"prompt": "x", "n": 2})).await.ok();
        }
        drop(stack);
        let stack = Stack::start(vec![refusing.clone(), refusing], |_| {}).await;
        let reply = stack.complete(json!({"prompt": "x"})).await;
        reply.error(503);
        assert_eq!(reply.header("retry-after"), "1");
    }
}

#[tokio::test]
async fn an_engine_with_another_tokenizer_gets_no_ids() {
    let other = Settings {
        tokenizer_digest: "0123".to_owned(),
        max_model_len: 10,
        ..engine()
    };
    let stack = Stack::start(vec![other.clone(), engine()], |_| {}).await;
    for _ in 0..4 {
        let beyond_the_others = json!({"prompt": "x", "max_tokens": 20});
        stack.complete(beyond_the_others).await.ok();
    }
    assert_eq!(stack.metric("scalellm_retries_total ", "").await, 0.0);
    let stack = Stack::one(other).await;
    let error = stack.complete(json!({"prompt": "x"})).await.error(503);
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("another tokenizer"), "{message}");
    stack.get("/ready").await.error(503);
}

#[tokio::test]
async fn an_engines_error_is_told() {
    let failing = Faults {
        error_after: Some(2),
        ..Faults::default()
    };
    let stack = Stack::one(faulty(failing)).await;
    assert_eq!(
        stack.complete(json!({"prompt": "x"})).await.error(500)["code"],
        "internal_error"
    );
    let events = stack
        .complete(json!({"prompt": "x", "stream": true}))
        .await
        .events();
    assert_eq!(events.last().unwrap()["error"]["code"], "internal_error");
}

#[tokio::test]
async fn an_engines_nonsense_harms_nobody() {
    for garbage in [Garbage::Ids, Garbage::TooManyIds] {
        let stack = Stack::one(faulty(Faults {
            garbage: Some(garbage),
            ..Faults::default()
        }))
        .await;
        let reply = stack
            .complete(json!({"prompt": "x", "max_tokens": 4, "logprobs": 1}))
            .await;
        assert!(matches!(reply.status, 200 | 500 | 502), "{}", reply.text());
        assert_eq!(stack.get("/health").await.status, 200);
    }
}

#[tokio::test]
async fn a_deadline_is_a_504_or_an_error_event() {
    let slow = Settings {
        ttft_ms: 30.0,
        tbt_ms: 30.0,
        ..engine()
    };
    let stack = Stack::one(slow).await;
    let ask = json!({"prompt": "x", "max_tokens": 1500, "deadline_ms": 1500});
    let reply = stack.complete(ask.clone()).await;
    let error = reply.error(504);
    assert_eq!(
        (&error["type"], &error["code"]),
        (&json!("timeout_error"), &json!("deadline_exceeded"))
    );
    let mut streaming = ask;
    streaming["stream"] = true.into();
    let events = stack.complete(streaming).await.events();
    assert_eq!(events.last().unwrap()["error"]["code"], "deadline_exceeded");
    stack
        .wait_metric("scalellm_replica_running_requests{", "", 0.0)
        .await;
}

#[tokio::test]
async fn without_any_engine_requests_are_told_to_come_back() {
    let mut stack = Stack::one(engine()).await;
    stack.engines[0] = None;
    stack
        .wait_metric("scalellm_replica_state{", "state=\"ready\"", 0.0)
        .await;
    let body = Bytes::from(with_model(json!({"prompt": "x", "stream": true})).to_string());
    let (response, _connection) = open(
        stack.address(),
        request("POST", "/v1/completions", &[], body),
    )
    .await;
    assert_eq!(response.status(), 503);
    assert_eq!(response.headers()["retry-after"], "1");
    response.into_body().collect().await.unwrap();
}
