//! A model whose requests replicas of our own and servers elsewhere share.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use bytes::Bytes;
use scalellm_fake_engine::Settings;
use scalellm_gateway::{Config, UpstreamConfig};
use serde_json::{Value, json as value};

use super::foreign::{HI, WHOLE};
use super::support::{Stack, ids, open, request, says, send, start_engine, user, with_model};
use super::upstream::{Act, Mock, chunk, json, stream_head};

/// One engine and the upstream, of which the replicas weigh so much beside the upstream's 1.
async fn both(
    engine: Settings,
    upstream: UpstreamConfig,
    weight: u32,
    change: impl FnOnce(&mut Config),
) -> Stack {
    Stack::start(vec![engine], |config| {
        config.models[0].upstreams = vec![upstream];
        config.models[0].replicas_weight = Some(weight);
        change(config);
    })
    .await
}

async fn server() -> Mock {
    Mock::start(|_| vec![json(WHOLE)]).await
}

/// Asks, and returns who answered and how that is explained.
async fn routed(stack: &Stack, headers: &[(&str, &str)], body: Value) -> (String, String) {
    let headers = [headers, &[("x-scalellm-route", "1")]].concat();
    let body = Bytes::from(with_model(body).to_string());
    let asked = request("POST", "/v1/chat/completions", &headers, body);
    let reply = send(stack.address(), asked).await;
    reply.ok();
    let route = reply.header("x-scalellm-route");
    let (name, why) = route.split_once("; ").unwrap();
    (name.to_owned(), why.to_owned())
}

#[tokio::test]
async fn replicas_and_upstreams_share_requests_by_weight() {
    let mock = server().await;
    let stack = both(says("own"), mock.upstream(), 3, |_| ()).await;
    let mut answers = Vec::new();
    for _ in 0..8 {
        answers.push(routed(&stack, &[], value!({"messages": user("x")})).await);
    }
    let at = |kind: &'static str| answers.iter().filter(move |(name, _)| name.contains(kind));
    assert_eq!([at("=replica-").count(), at("=upstream-").count()], [6, 2]);
    assert!(at("=replica-").all(|(_, why)| why.starts_with("policy=prefix; reason=only;")));
    assert!(at("=upstream-").all(|(_, why)| why == "policy=upstreams; reason=load"));
    assert_eq!(mock.seen().len(), 2);
    for (policy, count) in [("policy=\"prefix\"", 6.0), ("policy=\"upstreams\"", 2.0)] {
        let chosen = stack.metric("scalellm_routed_total{", policy).await;
        assert_eq!(chosen, count, "{policy}");
    }
    // Four with the end of sequence, and two.
    let tokens = 6.0 * 4.0 + 2.0 * 2.0;
    stack
        .wait_metric("scalellm_output_tokens_total", "bytes", tokens)
        .await;
}

#[tokio::test]
async fn who_has_the_fewest_unanswered_for_its_weight_is_next() {
    let mock = Mock::start(|_| vec![stream_head(), chunk(HI), Act::Hang]).await;
    let engine = Settings {
        max_num_seqs: 4,
        tbt_ms: 1e6,
        ..says("never comes to its end")
    };
    // Places for what the replicas compute at once would be too few for both.
    let few = |config: &mut Config| config.places_per_slot = 1.0;
    let stack = both(engine, mock.upstream(), 2, few).await;
    let mut streams = Vec::new();
    for asked in 1..=6_usize {
        let body = value!({"model": "bytes", "messages": user("x"), "stream": true});
        let body = Bytes::from(body.to_string());
        let asking = request("POST", "/v1/chat/completions", &[], body);
        streams.push(open(stack.address(), asking).await);
        assert!(mock.seen().len() <= asked.div_ceil(3), "{asked}");
    }
    assert_eq!(mock.seen().len(), 2);
    let here = stack.metric("scalellm_routed_total{", "\"prefix\"").await;
    assert_eq!(here, 4.0);
}

#[tokio::test]
async fn while_one_side_is_gone_the_other_takes_all() {
    let mock = server().await;
    let watched = UpstreamConfig {
        health_path: "/models".to_owned(),
        health_interval_s: 0.02,
        ..mock.upstream()
    };
    let mut stack = both(says("own"), watched, 1, |_| ()).await;
    let asked = async |stack: &Stack| {
        let mut said = BTreeSet::new();
        for _ in 0..4 {
            let reply = stack.chat(value!({"messages": user("x")})).await.ok();
            let text = reply["choices"][0]["message"]["content"].as_str();
            said.insert(text.unwrap().to_owned());
        }
        said.into_iter().collect::<Vec<_>>()
    };
    assert_eq!(asked(&stack).await, ["hi", "own"]);
    stack.engines[0] = None;
    let ready = ("scalellm_replica_state{", "state=\"ready\"");
    stack.wait_metric(ready.0, ready.1, 0.0).await;
    assert_eq!(asked(&stack).await, ["hi"]);
    stack.engines[0] = Some(start_engine(&stack.socket(0), says("own")));
    stack.wait_ready().await;
    assert_eq!(asked(&stack).await, ["hi", "own"]);
    drop(mock);
    stack.wait_metric("scalellm_upstream_up{", "", 0.0).await;
    assert_eq!(asked(&stack).await, ["own"]);
}

#[tokio::test]
async fn what_an_upstream_fails_a_replica_answers() {
    let head = "HTTP/1.1 500 Oh\r\ncontent-length: 2\r\n\r\n{}";
    for act in [Act::Close, Act::Send(head.into())] {
        let mock = Mock::start(move |_| vec![act.clone()]).await;
        let stack = both(says("own"), mock.upstream(), 1, |_| ()).await;
        for stream in [false, true] {
            for _ in 0..2 {
                let body = value!({"messages": user("x"), "stream": stream});
                let reply = stack.chat(body).await;
                assert_eq!(reply.status, 200, "{}", reply.text());
                assert!(reply.text().contains("own"), "{}", reply.text());
            }
        }
        assert!(!mock.seen().is_empty());
        assert!(stack.metric("scalellm_retries_total", "").await >= 1.0);
    }
}

#[tokio::test]
async fn another_upstream_comes_before_the_replicas() {
    let failing = Mock::start(|_| vec![Act::Close]).await;
    let mock = server().await;
    let second = mock.upstream();
    let stack = both(says("own"), failing.upstream(), 1, |config| {
        config.models[0].upstreams.push(second);
    })
    .await;
    let mut elsewhere = 0;
    for _ in 0..6 {
        let reply = stack.chat(value!({"messages": user("x")})).await.ok();
        elsewhere += usize::from(reply["choices"][0]["message"]["content"] == "hi");
    }
    assert!(!failing.seen().is_empty());
    assert_eq!(mock.seen().len(), elsewhere);
}

#[tokio::test]
async fn streams_of_an_upstream_that_is_gone_hold_no_places_of_the_replicas() {
    let is_down = Arc::new(AtomicBool::default());
    let down = Arc::clone(&is_down);
    let mock = Mock::start(move |seen| match seen.head.starts_with("GET") {
        true if down.load(Relaxed) => vec![Act::Close],
        true => vec![json(WHOLE)],
        false => vec![stream_head(), chunk(HI), Act::Hang],
    })
    .await;
    let few = |config: &mut Config| config.places_per_slot = 1.0;
    let engine = Settings {
        max_num_seqs: 1,
        ..says("own")
    };
    let watched = UpstreamConfig {
        health_path: "/models".to_owned(),
        health_interval_s: 0.02,
        ..mock.upstream()
    };
    let stack = both(engine, watched, 1, few).await;
    let mut streams = Vec::new();
    let held = ("scalellm_upstream_in_flight_requests{", "");
    while stack.metric(held.0, held.1).await < 3.0 {
        let body = with_model(value!({"messages": user("x"), "stream": true}));
        let asking = request("POST", "/v1/chat/completions", &[], body.to_string().into());
        streams.push(open(stack.address(), asking).await);
    }
    is_down.store(true, Relaxed);
    stack.wait_metric("scalellm_upstream_up{", "", 0.0).await;
    let reply = stack.chat(value!({"messages": user("x")})).await.ok();
    assert_eq!(reply["choices"][0]["message"]["content"], "own");
}

#[tokio::test]
async fn what_only_one_side_can_do_goes_there() {
    let mock = server().await;
    let stack = both(says("own"), mock.upstream(), 1, |_| ()).await;
    let tools = value!([{"type": "function", "function": {"name": "add"}}]);
    for asked in 1..=4 {
        let with_tools = value!({"messages": user("x"), "tools": tools});
        let reply = stack.chat(with_tools).await.ok();
        assert_eq!(reply["choices"][0]["message"]["content"], "hi");
        assert_eq!(mock.seen().len(), asked);
        let with_ids = value!({"prompt_token_ids": ids("x"), "max_tokens": 9});
        let reply = stack.chat(with_ids).await.ok();
        assert_eq!(reply["choices"][0]["message"]["content"], "own");
        for prompt in [value!(ids("x")), value!([ids("x")])] {
            let with_ids = value!({"prompt": prompt, "max_tokens": 9});
            let reply = stack.complete(with_ids).await.ok();
            assert_eq!(reply["choices"][0]["text"], "own");
        }
        let text = value!({"model": "bytes", "prompt": "x"});
        assert_eq!(stack.post("/tokenize", &text).await.ok()["count"], 1);
    }
    assert_eq!(mock.seen().len(), 4);
}

#[tokio::test]
async fn chats_and_sessions_stay_where_they_began() {
    let mock = server().await;
    let stack = both(says("own"), mock.upstream(), 1, |_| ()).await;
    let chat = |name: &str, turns: usize| {
        let said = |turn: usize| format!("{name} says in turn {turn}: ");
        let messages: Vec<_> = (0..turns)
            .map(|turn| value!({"role": "user", "content": said(turn).repeat(15)}))
            .collect();
        value!({"messages": messages})
    };
    for name in ["ann", "bob", "cid", "dot"] {
        let (home, _) = routed(&stack, &[], chat(name, 2)).await;
        for turns in 3..5 {
            let (next, _) = routed(&stack, &[], chat(name, turns)).await;
            assert_eq!(next, home, "{name}, {turns}");
        }
    }
    assert_eq!(mock.seen().len(), 6);
    let mut homes = BTreeSet::new();
    for session in 0..16 {
        let session = session.to_string();
        let headers = [("x-session-id", session.as_str())];
        let first = routed(&stack, &headers, value!({"messages": user("x")})).await;
        let second = routed(&stack, &headers, value!({"messages": user("y")})).await;
        assert_eq!(first.0, second.0);
        homes.insert(first.0);
    }
    assert_eq!(homes.len(), 2);
}
