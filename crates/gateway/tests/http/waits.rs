//! Requests that come while no replica is there, and one may come.

use bytes::Bytes;
use scalellm_fake_engine::{Faults, Refuse, Settings};
use scalellm_gateway::{Config, Gateway};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::support::{Reply, Stack, engine, request, send, start_engine, wait_metric, with_model};

/// Longer than any test has.
fn patient(config: &mut Config) {
    config.faults.replica_wait_s = 600.0;
}

fn asks(stack: &Stack, fields: Value) -> JoinHandle<Reply> {
    let address = stack.address();
    let body = Bytes::from(with_model(fields).to_string());
    tokio::spawn(async move { send(address, request("POST", "/v1/completions", &[], body)).await })
}

/// Ends the last engine, and waits until the gateway knows.
async fn end_last(stack: &mut Stack) {
    let left = stack.engines.len() - 1;
    stack.engines[left] = None;
    stack
        .wait_metric("scalellm_replica_state{", "state=\"ready\"", left as f64)
        .await;
}

#[tokio::test]
async fn a_request_waits_for_the_replica_that_comes() {
    let mut stack = Stack::start(vec![engine()], patient).await;
    end_last(&mut stack).await;
    let body = json!({"prompt": "x", "max_tokens": 4, "n": 2});
    let asking: Vec<_> = (0..3).map(|_| asks(&stack, body.clone())).collect();
    stack
        .wait_metric("scalellm_generations_in_flight", "", 6.0)
        .await;
    stack.engines[0] = Some(start_engine(&stack.socket(0), engine()));
    for reply in asking {
        let answer = reply.await.unwrap().ok();
        assert_eq!(answer["choices"][1]["text"], "abcd");
        assert_eq!(answer["usage"]["replays"], Value::Null);
    }
    assert_eq!(
        stack.metric("scalellm_rejected_total{", "no_replica").await,
        0.0
    );
}

#[tokio::test]
async fn a_gateway_that_knows_no_replica_yet_waits_too() {
    let mut kept = Config::default();
    let mut stack = Stack::start(vec![engine()], |config| {
        patient(config);
        kept = config.clone();
    })
    .await;
    end_last(&mut stack).await;
    let gateway = Gateway::start(kept).await.unwrap();
    let address = gateway.address();
    let body = Bytes::from(with_model(json!({"prompt": "x", "max_tokens": 4})).to_string());
    let asking =
        tokio::spawn(
            async move { send(address, request("POST", "/v1/completions", &[], body)).await },
        );
    wait_metric(address, "scalellm_requests_in_flight", "", 2.0).await;
    stack.engines[0] = Some(start_engine(&stack.socket(0), engine()));
    assert_eq!(asking.await.unwrap().ok()["choices"][0]["text"], "abcd");
}

#[tokio::test]
async fn one_that_every_replica_refuses_as_it_ends_waits_for_the_next() {
    let ending = Settings {
        faults: Faults {
            refuse: Some(Refuse::Draining),
            ..Faults::default()
        },
        ..engine()
    };
    let mut stack = Stack::start(vec![ending, engine()], patient).await;
    end_last(&mut stack).await;
    let asking = asks(&stack, json!({"prompt": "x", "max_tokens": 4}));
    stack
        .wait_metric("scalellm_generations_in_flight", "", 1.0)
        .await;
    stack.engines[1] = Some(start_engine(&stack.socket(1), engine()));
    assert_eq!(asking.await.unwrap().ok()["choices"][0]["text"], "abcd");
}

#[tokio::test]
async fn a_wait_has_its_end() {
    let mut stack = Stack::start(vec![engine()], |config| {
        config.faults.replica_wait_s = 0.2;
    })
    .await;
    end_last(&mut stack).await;
    let late = stack.complete(json!({"prompt": "x"})).await;
    assert_eq!(late.error(503)["code"], "no_replica");
    assert_eq!(late.header("retry-after"), "1");
    assert_eq!(
        stack.metric("scalellm_rejected_total{", "no_replica").await,
        1.0
    );

    let mut stack = Stack::start(vec![engine()], patient).await;
    end_last(&mut stack).await;
    let late = stack
        .complete(json!({"prompt": "x", "deadline_ms": 200}))
        .await;
    assert_eq!(late.error(504)["code"], "deadline_exceeded");
    stack
        .wait_metric("scalellm_generations_in_flight", "", 0.0)
        .await;
}
