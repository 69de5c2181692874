//! Replicas that fail with requests on them, and the requests that go on all the same.

use std::time::Duration;

use bytes::Bytes;
use scalellm_fake_engine::{Faults, Output, Settings};
use scalellm_gateway::Config;
use serde_json::{Value, json};

use crate::support::{
    EOS, LONG, Reply, Stack, engine, open, request, send, start_engine, streamed_text, with_model,
};

fn fast(settings: Settings) -> Settings {
    Settings {
        tbt_ms: 5.0,
        ..settings
    }
}

fn dying(after_outputs: u64) -> Settings {
    fast(Settings {
        faults: Faults {
            die_after_outputs: Some(after_outputs),
            ..Faults::default()
        },
        ..engine()
    })
}

/// Fails before anything else would, so that a test tells why.
fn patient(config: &mut Config) {
    config.faults.replay_wait_s = 50.0;
}

/// Asks in the background.
fn asks(stack: &Stack, fields: Value) -> tokio::task::JoinHandle<Reply> {
    let address = stack.address();
    let body = Bytes::from(with_model(fields).to_string());
    tokio::spawn(async move { send(address, request("POST", "/v1/completions", &[], body)).await })
}

/// Everything of an answer that a replay must not change.
fn told(reply: &Reply) -> Value {
    let mut body = reply.ok();
    for field in ["id", "created"] {
        body[field] = Value::Null;
    }
    body["usage"]["replays"] = Value::Null;
    body
}

/// Waits for the death of the first engine and starts another one in its place.
async fn restart(stack: &mut Stack, settings: Settings) {
    stack
        .wait_metric("scalellm_replica_state{", "state=\"ready\"", 0.0)
        .await;
    stack.engines[0] = None;
    stack.engines[0] = Some(start_engine(&stack.socket(0), settings));
}

#[tokio::test]
async fn a_stream_goes_on_at_another_replica_where_it_was() {
    let stack = Stack::start(vec![dying(30), fast(engine())], patient).await;
    let ask = json!({"prompt": "x", "max_tokens": 40, "stream": true,
                     "stream_options": {"include_usage": true}});
    let mut replays = 0;
    for _ in 0..4 {
        let events = stack.complete(ask.clone()).await.events();
        assert_eq!(streamed_text(&events, 0), "abcdefghij".repeat(4));
        let usage = &events.last().unwrap()["usage"];
        assert_eq!(usage["completion_tokens"], 40);
        replays += usage["replays"].as_u64().unwrap_or(0);
    }
    assert_eq!(replays, 1);
    assert_eq!(stack.metric("scalellm_replays_total{", "gone").await, 1.0);
    assert_eq!(stack.metric("scalellm_replays_waiting ", "").await, 0.0);
    let pauses = stack
        .metric("scalellm_replay_pause_seconds_count{", "")
        .await;
    assert_eq!(pauses, 1.0);
}

/// What a request may ask for, each with a sampled text, so that a wrong seed, choice or index shows.
fn demanding() -> Vec<Value> {
    [
        json!({"logprobs": 2}),
        json!({"n": 3, "seed": 7}),
        json!({"min_tokens": 30, "max_tokens": 60}),
        json!({"stop": ["\u{1}\u{2}never"], "return_token_ids": true}),
        json!({"echo": true, "logprobs": 1}),
        json!({"prompt": ["one", "another"]}),
    ]
    .into_iter()
    .map(|mut fields| {
        let given = fields.as_object_mut().unwrap();
        given.entry("prompt").or_insert("x".into());
        given.entry("max_tokens").or_insert(40.into());
        given.entry("seed").or_insert(5.into());
        fields
    })
    .collect()
}

#[tokio::test]
async fn a_replayed_answer_is_the_undisturbed_one() {
    let noisy = Settings {
        output: Output::Noise,
        cached_tokens: 1,
        // So that all choices are there when it dies.
        ttft_ms: 20.0,
        ..fast(engine())
    };
    let undisturbed = Stack::start(vec![noisy.clone()], |_| {}).await;
    for ask in demanding() {
        let expected = told(&undisturbed.complete(ask.clone()).await);
        for after in [1, 17, 30] {
            let first = Settings {
                faults: Faults {
                    die_after_outputs: Some(after),
                    ..Faults::default()
                },
                ..noisy.clone()
            };
            let mut stack = Stack::start(vec![first], patient).await;
            let asking = asks(&stack, ask.clone());
            restart(&mut stack, noisy.clone()).await;
            let reply = asking.await.unwrap();
            assert_eq!(told(&reply), expected, "{ask} after {after}");
            let replays: u32 = reply.header("x-scalellm-replays").parse().unwrap();
            assert!(replays >= 1);
            assert_eq!(reply.ok()["usage"]["replays"], replays);
        }
    }
}

#[tokio::test]
async fn a_change_of_the_configuration_waits_for_a_request_that_waits() {
    let mut stack = Stack::start(vec![dying(13)], patient).await;
    let asking = asks(&stack, json!({"prompt": "x", "max_tokens": 40}));
    stack
        .wait_metric("scalellm_replica_state{", "state=\"ready\"", 0.0)
        .await;
    stack.engines[0] = None;
    let added = json!({"model": "bytes", "address": stack.socket(1)});
    let body = Bytes::from(added.to_string());
    let change = request("POST", "/admin/v1/replicas", &[], body);
    send(stack.address(), change).await.ok();
    stack.engines[0] = Some(start_engine(&stack.socket(0), fast(engine())));
    let text = asking.await.unwrap().ok()["choices"][0]["text"].clone();
    assert_eq!(text, "abcdefghij".repeat(4));
}

#[tokio::test]
async fn a_stop_string_across_the_replay_is_met() {
    // The first half of the stop string is held back when the engine dies.
    let mut stack = Stack::start(vec![dying(13)], patient).await;
    let asking = asks(
        &stack,
        json!({"prompt": "x", "max_tokens": 40, "stop": ["bcde"], "min_tokens": 8, "stream": true}),
    );
    restart(&mut stack, fast(engine())).await;
    let events = asking.await.unwrap().events();
    assert_eq!(streamed_text(&events, 0), "abcdefghija");
    assert_eq!(events.last().unwrap()["choices"][0]["stop_reason"], "bcde");
}

#[tokio::test]
async fn the_end_of_sequence_counts_from_the_first_attempt() {
    let ends = |settings: Settings| Settings {
        eos_after: Some(25),
        ..settings
    };
    let mut stack = Stack::start(vec![ends(dying(20))], patient).await;
    let asking = asks(
        &stack,
        json!({"prompt": "x", "max_tokens": 60, "return_token_ids": true}),
    );
    restart(&mut stack, ends(fast(engine()))).await;
    let choice = &asking.await.unwrap().ok()["choices"][0];
    assert_eq!(choice["finish_reason"], "stop");
    let given = choice["token_ids"].as_array().unwrap();
    assert_eq!((given.len(), &given[25]), (26, &json!(EOS)));
}

#[tokio::test]
async fn a_drained_request_goes_on_elsewhere() {
    let draining = fast(Settings {
        faults: Faults {
            cancel_after: Some(5),
            ..Faults::default()
        },
        ..engine()
    });
    // It has got on there, so that it is not counted among what failed it.
    let stack = Stack::start(vec![draining, fast(engine())], |config| {
        config.faults.max_replays = 0;
    })
    .await;
    for _ in 0..4 {
        let reply = stack
            .complete(json!({"prompt": "x", "max_tokens": 20}))
            .await;
        assert_eq!(reply.ok()["choices"][0]["text"], "abcdefghij".repeat(2));
    }
    assert!(stack.metric("scalellm_replays_total{", "drained").await >= 1.0);
    assert_eq!(
        stack.metric("scalellm_breakers_opened_total ", "").await,
        0.0
    );
}

#[tokio::test]
async fn what_a_hung_engine_says_later_is_not_heard() {
    let hanging = fast(Settings {
        faults: Faults {
            hang_after_steps: Some(10),
            hang_ms: Some(2_500),
            ..Faults::default()
        },
        ..engine()
    });
    let stack = Stack::start(vec![hanging], |config| {
        config.replica_hung_after_s = 1.0;
        patient(config);
    })
    .await;
    // Alone, it comes back to the engine that hung, in the same start.
    let reply = stack
        .complete(json!({"prompt": "x", "max_tokens": 60}))
        .await;
    assert_eq!(reply.ok()["choices"][0]["text"], "abcdefghij".repeat(6));
    assert_eq!(reply.header("x-scalellm-replays"), "1");
    assert_eq!(stack.metric("scalellm_replays_total{", "hung").await, 1.0);
}

#[tokio::test]
async fn only_an_equal_engine_goes_on() {
    let other = |weights: &str, numerics: &str| {
        fast(Settings {
            weights_digest: weights.to_owned(),
            numerics_digest: numerics.to_owned(),
            ..engine()
        })
    };
    for replacement in [
        other("fake", "other"),
        other("other", "fake"),
        other("", ""),
    ] {
        let mut stack = Stack::start(vec![dying(5)], patient).await;
        let asking = asks(
            &stack,
            json!({"prompt": "x", "max_tokens": 40, "stream": true}),
        );
        restart(&mut stack, replacement).await;
        let events = asking.await.unwrap().events();
        let error = &events.last().unwrap()["error"];
        assert_eq!(error["code"], "engine_lost");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("other weights"), "{message}");
        assert!("abcdefghij".starts_with(&streamed_text(&events, 0)));
        let failed = stack.metric("scalellm_replays_failed_total{", "other_engine");
        assert_eq!(failed.await, 1.0);
        // What has not begun may.
        stack.complete(json!({"prompt": "x"})).await.ok();
    }
}

#[tokio::test]
async fn the_wait_for_a_replica_has_a_bound() {
    for ask in [
        json!({"prompt": "x", "max_tokens": 40}),
        json!({"prompt": "x", "max_tokens": 40, "deadline_ms": 1_000}),
    ] {
        let is_late = ask.get("deadline_ms").is_some();
        let stack = Stack::start(vec![dying(5)], |config| {
            config.faults.replay_wait_s = if is_late { 50.0 } else { 0.2 };
        })
        .await;
        let reply = stack.complete(ask).await;
        if is_late {
            assert_eq!(reply.error(504)["code"], "deadline_exceeded");
        } else {
            let message = reply.error(502)["message"].to_string();
            assert!(message.contains("replay_wait_s, 0.2 s"), "{message}");
        }
        assert_eq!(stack.metric("scalellm_replays_waiting ", "").await, 0.0);
    }
}

#[tokio::test]
async fn a_prompt_that_kills_two_replicas_is_refused() {
    let mortal = Settings {
        faults: Faults {
            poison_id: Some(u32::from(b'!')),
            ..Faults::default()
        },
        ..fast(engine())
    };
    let mut stack = Stack::start(vec![mortal.clone(); 3], patient).await;
    let innocent = asks(&stack, json!({"prompt": "x", "max_tokens": 1500}));
    let poison = json!({"prompt": "die!", "max_tokens": 4});
    let killed = stack.complete(poison.clone()).await;
    assert_eq!(killed.error(500)["code"], "replica_deaths");
    assert_eq!(
        stack
            .metric("scalellm_replays_failed_total{", "deaths")
            .await,
        1.0
    );
    let again = stack.complete(poison).await;
    assert_eq!(again.error(503)["code"], "prompt_refused");
    assert_eq!(again.header("retry-after"), "600");
    assert_eq!(stack.metric("scalellm_refused_prompts{", "").await, 1.0);
    let alive = || {
        let engines = stack.engines.iter().flatten();
        engines.filter(|engine| !engine.is_over()).count()
    };
    // The gateway sees that a replica's connection ends before the replica has ended.
    tokio::time::timeout(LONG, async {
        while alive() > 1 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("two replicas die");
    assert_eq!(alive(), 1, "the third replica lives");
    stack.complete(json!({"prompt": "x"})).await.ok();
    assert_eq!(
        innocent.await.unwrap().ok()["choices"][0]["text"],
        "abcdefghij".repeat(150)
    );
    stack.engines.clear();
}

#[tokio::test]
async fn replays_have_a_limit() {
    let mut stack = Stack::start(vec![dying(20), dying(20)], |config| {
        config.faults.max_replays = 1;
        patient(config);
    })
    .await;
    let reply = stack
        .complete(json!({"prompt": "x", "max_tokens": 60}))
        .await;
    let message = reply.error(502)["message"].to_string();
    assert!(message.contains("max_replays, 1"), "{message}");
    assert_eq!(reply.header("x-scalellm-replays"), "1");
    stack.engines.clear();
}

#[tokio::test]
async fn a_replica_that_fails_what_it_gets_is_left_alone_and_tried_again() {
    let failing = Settings {
        faults: Faults {
            error_after: Some(1),
            ..Faults::default()
        },
        ..engine()
    };
    // The slower one: whoever fails at once looks like the better choice.
    let working = Settings {
        ttft_ms: 30.0,
        ..engine()
    };
    let stack = Stack::start(vec![failing.clone(), working], |config| {
        config.faults.breaker_window_s = 3_600.0;
        config.faults.breaker_open_s = 3_600.0;
        config.faults.breaker_failures = 3;
    })
    .await;
    let mut failed = 0;
    while failed < 3 {
        failed += usize::from(stack.complete(json!({"prompt": "x"})).await.status == 500);
    }
    for _ in 0..10 {
        stack.complete(json!({"prompt": "x"})).await.ok();
    }
    assert_eq!(stack.metric("scalellm_breaker_open{", "e0").await, 1.0);
    assert_eq!(stack.metric("scalellm_breaker_open{", "e1").await, 0.0);
    assert_eq!(
        stack.metric("scalellm_breakers_opened_total ", "").await,
        1.0
    );

    // Requests that can only fail by what they ask for open nothing.
    let stack = Stack::start(vec![failing.clone(), failing], |_| {}).await;
    for _ in 0..20 {
        let ask = json!({"prompt": "x", "logit_bias": {"1": -100}});
        stack.complete(ask).await.error(500);
        stack
            .complete(json!({"prompt": "x", "n": 1000}))
            .await
            .error(400);
    }
    assert_eq!(
        stack.metric("scalellm_breakers_opened_total ", "").await,
        0.0
    );
}

#[tokio::test]
async fn a_client_that_leaves_during_the_pause_leaves_nothing() {
    let stack = Stack::start(vec![dying(5)], patient).await;
    let body = Bytes::from(
        with_model(json!({"prompt": "x", "max_tokens": 40, "stream": true})).to_string(),
    );
    let (response, connection) = open(
        stack.address(),
        request("POST", "/v1/completions", &[], body),
    )
    .await;
    stack
        .wait_metric("scalellm_replays_waiting ", "", 1.0)
        .await;
    drop((response, connection));
    stack
        .wait_metric("scalellm_replays_waiting ", "", 0.0)
        .await;
    stack
        .wait_metric("scalellm_generations_in_flight ", "", 0.0)
        .await;
}
