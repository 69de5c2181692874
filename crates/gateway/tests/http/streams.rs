//! Streamed answers: framing, order, and equality with the whole answer.

use scalellm_fake_engine::{Output, Settings};
use serde_json::{Value, json};

use crate::support::{Reply, Stack, engine, ids, says, streamed_text, user};

#[tokio::test]
async fn a_chat_stream_has_role_text_finish_and_usage() {
    let stack = Stack::one(says("hello there")).await;
    let ask =
        json!({"messages": user("x"), "stream": true, "stream_options": {"include_usage": true}});
    let reply = stack.chat(ask).await;
    let events = reply.events();
    assert_eq!(
        events[0]["choices"][0]["delta"],
        json!({"role": "assistant", "content": ""})
    );
    assert!(
        events
            .iter()
            .all(|event| event["object"] == "chat.completion.chunk"
                && event["id"] == events[0]["id"])
    );
    assert_eq!(streamed_text(&events, 0), "hello there");
    let (usage, parts) = events.split_last().unwrap();
    assert!(
        parts
            .iter()
            .all(|event| event["usage"].is_null() && event.get("usage").is_some())
    );
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 12);
    assert!(usage["stages_ms"]["decode"].is_number() && usage["stages_ms"]["total"].is_number());
    assert_eq!(parts.last().unwrap()["choices"][0]["finish_reason"], "stop");
    let finished = parts
        .iter()
        .filter(|event| !event["choices"][0]["finish_reason"].is_null())
        .count();
    assert_eq!(finished, 1);
    let timing = reply.header("server-timing");
    assert!(
        timing.contains("prefill;dur=")
            && timing.contains("first;dur=")
            && !timing.contains("total"),
        "{timing}"
    );
    assert_eq!(reply.header("cache-control"), "no-cache");
}

#[tokio::test]
async fn without_options_no_chunk_speaks_of_usage() {
    let stack = Stack::one(engine()).await;
    let events = stack
        .complete(json!({"prompt": "x", "max_tokens": 4, "stream": true}))
        .await
        .events();
    assert!(events.iter().all(|event| event.get("usage").is_none()));
    assert_eq!(streamed_text(&events, 0), "abcd");
    assert_eq!(
        events.last().unwrap()["choices"][0]["finish_reason"],
        "length"
    );
}

#[tokio::test]
async fn n_choices_stream_side_by_side() {
    let stack = Stack::one(Settings {
        output: Output::Noise,
        tbt_ms: 1.0,
        ..engine()
    })
    .await;
    let ask = json!({"messages": user("x"), "n": 3, "seed": 5, "max_tokens": 12});
    let mut streaming = ask.clone();
    streaming["stream"] = true.into();
    let whole = stack.chat(ask).await.ok();
    let events = stack.chat(streaming).await.events();
    for choice in 0..3 {
        assert_eq!(
            streamed_text(&events, choice),
            whole["choices"][choice as usize]["message"]["content"]
        );
        let roles = events.iter().filter(|event| {
            event["choices"][0]["index"] == choice
                && event["choices"][0]["delta"]["role"].is_string()
        });
        assert_eq!(roles.count(), 1);
    }
}

#[tokio::test]
async fn stop_strings_never_leak_into_a_stream() {
    let stack = Stack::one(Settings {
        tbt_ms: 1.0,
        ..engine()
    })
    .await;
    let ask = json!({"prompt": "x", "max_tokens": 50, "stop": "fgh", "stream": true,
                     "stream_options": {"include_usage": true}});
    let events = stack.complete(ask).await.events();
    assert_eq!(streamed_text(&events, 0), "abcde");
    let last = &events[events.len() - 2]["choices"][0];
    assert_eq!(
        (&last["finish_reason"], &last["stop_reason"]),
        (&json!("stop"), &json!("fgh"))
    );
    assert_eq!(events.last().unwrap()["usage"]["completion_tokens"], 8);
    stack
        .wait_metric("scalellm_replica_running_requests{", "", 0.0)
        .await;
}

#[tokio::test]
async fn logprobs_follow_their_text() {
    let stack = Stack::one(engine()).await;
    let ask = json!({"messages": user("x"), "max_tokens": 6, "logprobs": true, "stop": "zz", "stream": true});
    let events = stack.chat(ask).await.events();
    let tokens: String = events
        .iter()
        .flat_map(|event| {
            event["choices"][0]["logprobs"]["content"]
                .as_array()
                .cloned()
                .unwrap_or_default()
        })
        .map(|token| token["token"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(tokens, "abcdef");
    let ask = json!({"prompt": "xy", "max_tokens": 3, "logprobs": 1, "echo": true, "stream": true});
    let events = stack.complete(ask).await.events();
    assert_eq!(streamed_text(&events, 0), "xyabc");
    let offsets: Vec<Value> = events
        .iter()
        .flat_map(|event| {
            event["choices"][0]["logprobs"]["text_offset"]
                .as_array()
                .cloned()
                .unwrap_or_default()
        })
        .collect();
    assert_eq!(offsets, [0, 1, 2, 3, 4]);
}

#[tokio::test]
async fn token_ids_are_streamed_on_request() {
    let stack = Stack::one(engine()).await;
    let ask = json!({"prompt": "xy", "max_tokens": 3, "return_token_ids": true, "stream": true});
    let events = stack.complete(ask).await.events();
    assert_eq!(
        events[0]["choices"][0]["prompt_token_ids"],
        json!(ids("xy"))
    );
    let got: Vec<Value> = events
        .iter()
        .flat_map(|event| {
            event["choices"][0]["token_ids"]
                .as_array()
                .cloned()
                .unwrap_or_default()
        })
        .collect();
    assert_eq!(got, ids("abc"));
}

#[tokio::test]
async fn half_a_character_is_never_sent() {
    let text = "\u{1f600}\u{e9}\u{4e2d}x";
    let stack = Stack::one(Settings {
        tbt_ms: 1.0,
        ..says(text)
    })
    .await;
    let events = stack
        .chat(json!({"messages": user("x"), "stream": true}))
        .await
        .events();
    assert_eq!(streamed_text(&events, 0), text);
    assert!(
        events
            .iter()
            .all(|event| !event.to_string().contains('\u{fffd}'))
    );
}

#[tokio::test]
async fn sixty_four_streams_at_once_are_all_whole() {
    let stack = Stack::one(Settings {
        output: Output::Echo,
        tbt_ms: 2.0,
        ttft_ms: 5.0,
        ..engine()
    })
    .await;
    let one = |index: usize| {
        let stack = &stack;
        async move {
            let prompt = format!("stream {index:04} ");
            let ask = json!({"prompt": prompt, "max_tokens": 36, "stream": true});
            let reply: Reply = stack.complete(ask).await;
            assert_eq!(streamed_text(&reply.events(), 0), prompt.repeat(3));
        }
    };
    futures_util::future::join_all((0..64).map(one)).await;
    assert_eq!(
        stack.metric("scalellm_output_tokens_total{", "").await,
        64.0 * 36.0
    );
}
