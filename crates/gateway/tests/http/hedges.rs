//! A second replica, or upstream, beside one that says nothing for long.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use scalellm_fake_engine::{Faults, LoadNumbers, Settings};
use scalellm_gateway::{Config, UpstreamConfig};
use serde_json::json;
use tokio::sync::Notify;

use super::foreign::{DONE, HI, WHOLE, ask};
use super::support::{Reply, Stack, engine, request, send, streamed_text, user};
use super::upstream::{Act, Mock, answer, before, json as whole, stream, stream_head};

const HEDGES: &str = "scalellm_hedges_total";
const WON: &str = "scalellm_hedges_won_total";

const SOON: Duration = Duration::from_millis(20);

fn soon(config: &mut Config) {
    config.faults.hedge_after_s = SOON.as_secs_f64();
}

/// It is chosen before others, and takes so long to say anything.
fn first(ttft_ms: f64) -> Settings {
    Settings {
        ttft_ms,
        ..engine()
    }
}

/// It seems to have much to do.
fn second(settings: Settings) -> Settings {
    Settings {
        load: LoadNumbers {
            running: Some(50),
            waiting: Some(50),
            backlog_tokens: Some(1_000_000),
            ..LoadNumbers::default()
        },
        ..settings
    }
}

/// It dies of its first output.
fn dying(settings: Settings) -> Settings {
    Settings {
        faults: Faults {
            poison_id: Some(u32::from(b'x')),
            ..Faults::default()
        },
        ..settings
    }
}

#[tokio::test]
async fn the_second_replica_answers_while_the_first_says_nothing() {
    let stack = Stack::start(vec![first(1e7), second(engine())], soon).await;
    for n in 1..=5 {
        let ask = json!({"prompt": "x", "max_tokens": 20, "stream": true,
                         "stream_options": {"include_usage": true}});
        let events = stack.complete(ask).await.events();
        assert_eq!(streamed_text(&events, 0), "abcdefghij".repeat(2));
        let usage = &events.last().unwrap()["usage"];
        assert_eq!(usage["completion_tokens"], 20);
        assert_eq!(usage.get("replays"), None);
        assert_eq!(stack.metric(HEDGES, "").await, f64::from(n));
    }
    assert_eq!(stack.metric(WON, "").await, 5.0);
    // The first is told to forget them.
    let in_flight = "scalellm_replica_in_flight_requests";
    stack.wait_metric(in_flight, "", 0.0).await;
    assert_eq!(stack.metric("scalellm_replays_total", "").await, 0.0);
}

#[tokio::test]
async fn each_choice_of_a_request_has_its_own() {
    let stack = Stack::start(vec![first(1e7), second(engine())], soon).await;
    let reply = stack
        .complete(json!({"prompt": "x", "max_tokens": 5, "n": 3}))
        .await
        .ok();
    let texts = reply["choices"].as_array().unwrap().iter();
    assert!(texts.clone().all(|choice| choice["text"] == "abcde"));
    assert_eq!(texts.count(), 3);
    assert_eq!(reply["usage"]["completion_tokens"], 15);
    assert_eq!(stack.metric(WON, "").await, 3.0);
}

#[tokio::test]
async fn nothing_is_asked_for_twice_unless_wanted() {
    let stack = Stack::start(vec![first(150.0), second(engine())], |_| {}).await;
    stack.chat(json!({"messages": user("x")})).await.ok();
    assert_eq!(stack.metric(HEDGES, "").await, 0.0);
}

#[tokio::test]
async fn an_overload_is_not_multiplied() {
    let slow = Settings {
        ttft_ms: 30.0,
        ..engine()
    };
    let stack = Stack::start(vec![slow.clone(), slow], |config| {
        config.faults.hedge_after_s = 0.001;
        config.faults.hedge_share = 0.0;
    })
    .await;
    for _ in 0..20 {
        let ask = json!({"prompt": "x", "max_tokens": 1});
        stack.complete(ask).await.ok();
    }
    let hedges = stack.metric(HEDGES, "").await;
    // A burst, which is whole again after a minute.
    assert!((1.0..=12.0).contains(&hedges), "{hedges}");
}

#[tokio::test]
async fn a_second_replica_that_dies_leaves_the_first_as_it_was() {
    let stack = Stack::start(vec![first(300.0), second(dying(engine()))], soon).await;
    let reply = stack
        .complete(json!({"prompt": "x", "max_tokens": 5}))
        .await
        .ok();
    assert_eq!(reply["choices"][0]["text"], "abcde");
    assert_eq!(stack.metric(HEDGES, "").await, 1.0);
    assert_eq!(stack.metric(WON, "").await, 0.0);
    assert_eq!(stack.metric("scalellm_replays_total", "").await, 0.0);
    let ready = "state=\"ready\"";
    stack
        .wait_metric("scalellm_replica_state{", ready, 1.0)
        .await;
}

#[tokio::test]
async fn a_first_replica_that_dies_leaves_the_second_as_it_was() {
    let late = Settings {
        ttft_ms: 400.0,
        ..engine()
    };
    let stack = Stack::start(vec![dying(first(200.0)), second(late)], |config| {
        soon(config);
        config.faults.replay = false;
        config.faults.max_replays = 0;
    })
    .await;
    let ask = json!({"prompt": "x", "max_tokens": 5});
    let reply = stack.complete(ask).await.ok();
    assert_eq!(reply["choices"][0]["text"], "abcde");
    assert_eq!(stack.metric(HEDGES, "").await, 1.0);
    assert_eq!(stack.metric("scalellm_replays_total", "").await, 0.0);
    let ready = "state=\"ready\"";
    stack
        .wait_metric("scalellm_replica_state{", ready, 1.0)
        .await;
}

const ASKED: &str = r#"{"stream":true}"#;

/// A gateway before a server that does this, whose turn it is, and one that does that.
async fn elsewhere(first: Vec<Act>, second: Vec<Act>) -> (Mock, Mock, Stack) {
    let first = Mock::start(move |_| first.clone()).await;
    let second = Mock::start(move |_| second.clone()).await;
    let upstreams = vec![first.upstream(), second.upstream()];
    let stack = Stack::start(Vec::new(), |config| {
        before(upstreams)(config);
        soon(config);
    })
    .await;
    (first, second, stack)
}

async fn explained(stack: &Stack) -> Reply {
    let headers = [("x-scalellm-route", "1")];
    let body = Bytes::from(ASKED);
    send(
        stack.address(),
        request("POST", "/v1/chat/completions", &headers, body),
    )
    .await
}

#[tokio::test]
async fn the_second_upstream_answers_while_the_first_says_nothing() {
    // A head alone is no beginning of an answer.
    for says in [vec![Act::Hang], vec![stream_head(), Act::Hang]] {
        let (hung, _second, stack) = elsewhere(says, stream(&[HI, DONE])).await;
        let reply = explained(&stack).await;
        assert_eq!(reply.text(), [HI, DONE].concat());
        assert!(reply.header("x-scalellm-route").ends_with("reason=hedge"));
        hung.wait_closed().await;
        assert_eq!(stack.metric(HEDGES, "").await, 1.0);
        assert_eq!(stack.metric(WON, "").await, 1.0);
        let failures = "scalellm_upstream_failures_total";
        assert_eq!(stack.metric(failures, "").await, 0.0);
        // The next ones do not wait for it, for a moment.
        for _ in 0..3 {
            assert_eq!(ask(&stack, ASKED).await.text(), [HI, DONE].concat());
        }
        assert_eq!(hung.seen().len(), 1);
        assert_eq!(stack.metric(HEDGES, "").await, 1.0);
    }
}

/// Begins when told.
fn late(gate: &Arc<Notify>, says: Vec<Act>) -> Vec<Act> {
    [vec![Act::Wait(Arc::clone(gate))], says].concat()
}

#[tokio::test]
async fn the_first_upstream_may_still_be_the_first_to_answer() {
    let gate = Arc::new(Notify::new());
    let (_first, hung, stack) = elsewhere(late(&gate, stream(&[HI, DONE])), vec![Act::Hang]).await;
    let (reply, ()) = tokio::join!(explained(&stack), async {
        stack.wait_metric(HEDGES, "", 1.0).await;
        gate.notify_one();
    });
    assert_eq!(reply.text(), [HI, DONE].concat());
    assert!(reply.header("x-scalellm-route").ends_with("reason=load"));
    hung.wait_closed().await;
    assert_eq!(stack.metric(WON, "").await, 0.0);
}

#[tokio::test]
async fn where_one_upstream_fails_the_other_is_waited_for() {
    let refuses = || vec![answer("500 Oh", "", "oh")];
    let gate = Arc::new(Notify::new());
    let (_first, second, stack) = elsewhere(late(&gate, stream(&[HI, DONE])), refuses()).await;
    let (reply, ()) = tokio::join!(ask(&stack, ASKED), async {
        let failures = "scalellm_upstream_failures_total";
        stack.wait_metric(failures, "", 1.0).await;
        gate.notify_one();
    });
    assert_eq!(reply.text(), [HI, DONE].concat());
    assert_eq!(second.seen().len(), 1);
    let gate = Arc::new(Notify::new());
    let (first, second, stack) = elsewhere(late(&gate, refuses()), refuses()).await;
    let (reply, ()) = tokio::join!(ask(&stack, ASKED), async {
        stack.wait_metric(HEDGES, "", 1.0).await;
        gate.notify_one();
    });
    reply.error(502);
    assert_eq!((first.seen().len(), second.seen().len()), (1, 1));
}

#[tokio::test]
async fn what_the_client_did_wrong_ends_both() {
    let strict = vec![answer("422 Unprocessable", "", "{}")];
    let (hung, _second, stack) = elsewhere(vec![Act::Hang], strict).await;
    assert_eq!(ask(&stack, ASKED).await.status, 422);
    hung.wait_closed().await;
}

#[tokio::test]
async fn what_says_nothing_before_its_end_is_not_late() {
    let gate = Arc::new(Notify::new());
    let (_first, second, stack) = elsewhere(late(&gate, vec![whole(WHOLE)]), vec![Act::Hang]).await;
    let (reply, ()) = tokio::join!(ask(&stack, "{}"), async {
        tokio::time::sleep(5 * SOON).await;
        gate.notify_one();
    });
    assert_eq!(reply.text(), WHOLE);
    assert_eq!(second.seen().len(), 0);
}

#[tokio::test]
async fn a_fallback_is_for_failures_and_not_for_waits() {
    let gate = Arc::new(Notify::new());
    let says = late(&gate, stream(&[HI, DONE]));
    let first = Mock::start(move |_| says.clone()).await;
    let fallback = Mock::start(|_| stream(&[HI, DONE])).await;
    let upstreams = vec![
        first.upstream(),
        UpstreamConfig {
            fallback: true,
            ..fallback.upstream()
        },
    ];
    let stack = Stack::start(Vec::new(), |config| {
        before(upstreams)(config);
        soon(config);
    })
    .await;
    let (reply, ()) = tokio::join!(ask(&stack, ASKED), async {
        tokio::time::sleep(5 * SOON).await;
        gate.notify_one();
    });
    assert_eq!(reply.text(), [HI, DONE].concat());
    assert_eq!(fallback.seen().len(), 0);
}
