//! Replicas whose breakers are open: tried, closed again, or open for longer.

use std::time::{Duration, Instant};

use scalellm_fake_engine::{Faults, Settings};
use scalellm_gateway::Config;
use serde_json::json;
use tokio::task::JoinSet;

use crate::support::{LONG, Reply, Stack, request, says, send, with_model};

/// A replica that fails its first requests, and one that is well and slower: whoever fails at once looks like the
/// better choice.
async fn stack(faults: Faults, change: impl FnOnce(&mut Config)) -> Stack {
    let failing = Settings {
        faults: Faults {
            error_after: Some(1),
            ..faults
        },
        ..says("first")
    };
    let well = Settings {
        ttft_ms: 30.0,
        ..says("other")
    };
    Stack::start(vec![failing, well], |config| {
        config.faults.breaker_window_s = 3_600.0;
        config.faults.breaker_failures = 3;
        change(config);
    })
    .await
}

async fn ask(stack: &Stack) -> Reply {
    stack
        .complete(json!({"prompt": "x", "max_tokens": 20}))
        .await
}

/// What a request was answered.
fn said(reply: &Reply) -> String {
    let body = reply.ok();
    body["choices"][0]["text"].as_str().unwrap().to_owned()
}

/// Asks until the failing replica fails or answers; whether it answers, and when it was asked.
async fn until_the_first_is_asked(stack: &Stack) -> (bool, Instant) {
    let start = Instant::now();
    loop {
        let asked = Instant::now();
        let reply = ask(stack).await;
        if reply.status == 500 || said(&reply) == "first" {
            return (reply.status == 200, asked);
        }
        assert!(start.elapsed() < LONG, "the replica is not tried");
    }
}

async fn fail(stack: &Stack, times: usize) -> Instant {
    let mut last = Instant::now();
    for _ in 0..times {
        let (answered, asked) = until_the_first_is_asked(stack).await;
        assert!(!answered);
        last = asked;
    }
    last
}

/// The failing replica's breaker, and how often any has opened.
async fn open(stack: &Stack) -> (f64, f64) {
    let first = stack.metric("scalellm_breaker_open{", "e0").await;
    let opened = stack.metric("scalellm_breakers_opened_total ", "").await;
    (first, opened)
}

#[tokio::test]
async fn a_replica_is_tried_after_a_while_and_after_twice_that_and_then_trusted() {
    let faults = Faults {
        error_requests: Some(4),
        ..Faults::default()
    };
    let pause = Duration::from_millis(300);
    let stack = stack(faults, |config| {
        config.faults.breaker_open_s = pause.as_secs_f64();
        config.faults.breaker_probes = 1;
    })
    .await;
    fail(&stack, 2).await;
    assert_eq!(open(&stack).await, (0.0, 0.0));
    // The breaker opens after a request was sent, and closes before its answer is here.
    let opened = fail(&stack, 1).await;
    assert_eq!(open(&stack).await, (1.0, 1.0));
    let opened_again = fail(&stack, 1).await;
    assert!(opened.elapsed() >= pause);
    assert_eq!(open(&stack).await, (1.0, 2.0));
    let (answered, _) = until_the_first_is_asked(&stack).await;
    assert!(answered && opened_again.elapsed() >= 2 * pause);
    assert_eq!(open(&stack).await, (0.0, 2.0));
    for _ in 0..3 {
        assert!(until_the_first_is_asked(&stack).await.0);
    }
}

#[tokio::test]
async fn no_more_than_a_few_requests_try_a_replica_at_once() {
    let faults = Faults {
        hang_after_steps: Some(3),
        ..Faults::default()
    };
    let pause = Duration::from_secs(2);
    let stack = stack(faults, |config| {
        config.faults.breaker_open_s = pause.as_secs_f64();
        config.faults.breaker_probes = 2;
    })
    .await;
    fail(&stack, 3).await;
    tokio::time::sleep(pause).await;
    let mut asking = JoinSet::new();
    for _ in 0..10 {
        let body = with_model(json!({"prompt": "x", "max_tokens": 20})).to_string();
        let asked = request("POST", "/v1/completions", &[], body.into());
        asking.spawn(send(stack.address(), asked));
    }
    for _ in 0..8 {
        let reply = asking.join_next().await.unwrap().unwrap();
        assert_eq!(said(&reply), "other");
    }
    stack
        .wait_metric("scalellm_replica_in_flight_requests{", "e0", 2.0)
        .await;
    assert_eq!(open(&stack).await, (1.0, 1.0));
}
