//! A model's checks of requests and answers, where servers elsewhere compute it.

use bytes::Bytes;
use scalellm_gateway::{ModelConfig, UpstreamConfig};
use serde_json::{Value, json};

use crate::safety::with_hooks;
use crate::support::{Reply, Stack, request, send, user};
use crate::upstream::{Act, Mock, chunk, json as json_answer, last_chunk, stream, stream_head};

const MASKED: &str = "[[safety]]\nhook = 'personal_data'\n[[safety]]\nhook = 'words'\nwords = ['secret']\non = 'response'\naction = 'stop'";

async fn gateway(upstream: UpstreamConfig, hooks: &str) -> Stack {
    Stack::start(Vec::new(), |config| {
        config.models = vec![ModelConfig {
            name: "chat".to_owned(),
            upstreams: vec![upstream],
            ..ModelConfig::default()
        }];
        with_hooks(hooks)(config);
    })
    .await
}

async fn ask(stack: &Stack, path: &str, mut body: Value) -> Reply {
    body["model"] = "chat".into();
    let body = Bytes::from(body.to_string());
    send(stack.address(), request("POST", path, &[], body)).await
}

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";
const DONE: &str = "data: [DONE]\n\n";

fn event(choices: Value) -> String {
    format!(
        "data: {}\n\n",
        json!({"id": "x", "model": "chat", "choices": choices})
    )
}

fn says(index: u64, text: &str) -> String {
    event(json!([{"index": index, "delta": {"content": text}, "finish_reason": null}]))
}

fn ends(index: u64) -> String {
    event(json!([{"index": index, "delta": {}, "finish_reason": "stop"}]))
}

/// What all deltas say of one choice, by the pointer to it, and its finish.
fn told(reply: &Reply, index: u64, pointer: &str) -> (String, Value) {
    let mut text = String::new();
    let mut finish = Value::Null;
    for event in reply.events() {
        for choice in event["choices"].as_array().into_iter().flatten() {
            if choice["index"] == index {
                text += choice
                    .pointer(pointer)
                    .and_then(Value::as_str)
                    .unwrap_or_default();
                if !choice["finish_reason"].is_null() {
                    assert!(finish.is_null());
                    finish = choice["finish_reason"].clone();
                }
            }
        }
    }
    (text, finish)
}

#[tokio::test]
async fn a_request_is_masked_before_it_leaves() {
    let mock = Mock::start(|_| vec![json_answer(r#"{"choices":[]}"#)]).await;
    let stack = gateway(mock.upstream(), MASKED).await;
    let parts = json!([{"type": "text", "text": "or a@b.example"}, {"type": "image_url", "image_url": {"url": "data:,a@b.example"}}]);
    let call = json!([{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"to\": \"a@b.example\"}"}}]);
    let messages = json!([{"role": "user", "content": "a@b.example"}, {"role": "user", "content": parts},
                          {"role": "assistant", "content": null, "tool_calls": call}]);
    ask(
        &stack,
        CHAT,
        json!({"messages": messages, "deadline_ms": 50000, "seed": 1}),
    )
    .await
    .ok();
    ask(
        &stack,
        TEXT,
        json!({"prompt": ["a@b.example", "4111111111111111"], "suffix": null}),
    )
    .await
    .ok();
    ask(&stack, TEXT, json!({"prompt": [1, 2]}))
        .await
        .error(400);
    let sent: Vec<Value> = mock
        .seen()
        .iter()
        .map(|seen| serde_json::from_str(&seen.body).unwrap())
        .collect();
    assert_eq!(sent.len(), 2);
    assert_eq!(sent[0]["messages"][0]["content"], "[EMAIL]");
    assert_eq!(sent[0]["messages"][1]["content"][0]["text"], "or [EMAIL]");
    assert_eq!(
        sent[0]["messages"][1]["content"][1]["image_url"]["url"],
        "data:,a@b.example"
    );
    assert_eq!(
        sent[0]["messages"][2]["tool_calls"][0]["function"]["arguments"],
        "{\"to\": \"[EMAIL]\"}"
    );
    assert!(sent[0].get("deadline_ms").is_none() && sent[0]["seed"] == 1);
    assert_eq!(sent[1]["prompt"], json!(["[EMAIL]", "[CARD]"]));
}

#[tokio::test]
async fn a_request_that_nothing_is_masked_in_passes_as_it_is() {
    let mock = Mock::start(|_| vec![json_answer(r#"{"choices":[]}"#)]).await;
    let stack = gateway(mock.upstream(), MASKED).await;
    let body = r#"{ "model":"chat", "messages":[{"content":"\u0061"}], "x": 1.50 }"#;
    send(
        stack.address(),
        request("POST", CHAT, &[], Bytes::from(body)),
    )
    .await
    .ok();
    assert_eq!(mock.seen()[0].body, body);
}

#[tokio::test]
async fn whole_answers_are_checked() {
    let choices = json!([
        {"index": 0, "message": {"role": "assistant", "content": "a@b.example", "reasoning_content": "of a@b.example",
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{\"a\":\"a@b.example\"}"}}]},
         "logprobs": {"content": [{"token": "a@"}]}, "token_ids": [7], "finish_reason": "tool_calls"},
        {"index": 1, "message": {"role": "assistant", "content": "a secret is"}, "finish_reason": "length"},
        {"index": 2, "text": "+49 30 123456", "finish_reason": "stop"}]);
    let whole = json!({"id": "x", "model": "chat", "choices": choices, "usage": {"prompt_tokens": 1, "completion_tokens": 2}}).to_string();
    let mock = Mock::start(move |_| vec![json_answer(&whole)]).await;
    let stack = gateway(mock.upstream(), MASKED).await;
    let body = ask(&stack, CHAT, json!({"messages": user("x"), "n": 3}))
        .await
        .ok();
    let message = &body["choices"][0]["message"];
    assert_eq!(message["content"], "[EMAIL]");
    assert_eq!(message["reasoning_content"], "of [EMAIL]");
    assert_eq!(
        message["tool_calls"][0]["function"]["arguments"],
        "{\"a\":\"[EMAIL]\"}"
    );
    assert!(body["choices"][0]["logprobs"].is_null() && body["choices"][0]["token_ids"].is_null());
    assert_eq!(body["choices"][0]["finish_reason"], "tool_calls");
    assert_eq!(body["choices"][1]["message"]["content"], "a ");
    assert_eq!(body["choices"][1]["finish_reason"], "content_filter");
    assert_eq!(body["choices"][1]["stop_reason"], "words");
    assert_eq!(body["choices"][2]["text"], "[PHONE]");
    assert_eq!(body["usage"]["completion_tokens"], 2);
}

#[tokio::test]
async fn a_stream_is_checked_across_its_events() {
    let call = |arguments: &str| {
        event(
            json!([{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": arguments}}]}}]),
        )
    };
    let text = [
        event(json!([{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": {"content": []}}])),
        ": a comment\n\n".to_owned(),
        says(0, "Mail a@b.ex"), says(1, "+49 30 1"), says(0, "ample"), says(1, "23456"),
        call("{\"to\": \"a@b."), call("example"), call("\"}"),
        says(0, " now, a@b"), ends(0), ends(1),
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":9}}\n\n".to_owned(),
        DONE.to_owned(),
    ]
    .concat();
    let mock = Mock::start(move |_| {
        // In parts of a few bytes, cut anywhere.
        let parts: Vec<Act> = text
            .as_bytes()
            .chunks(7)
            .map(|part| chunk(std::str::from_utf8(part).unwrap()))
            .collect();
        [vec![stream_head()], parts, vec![last_chunk()]].concat()
    })
    .await;
    let stack = gateway(mock.upstream(), MASKED).await;
    let fields = json!({"messages": user("x"), "n": 2, "stream": true, "stream_options": {"include_usage": true}});
    let reply = ask(&stack, CHAT, fields).await;
    let reply = Reply {
        body: Bytes::from(reply.text().replace(": a comment\n\n", "")),
        headers: without_charset(reply.headers),
        ..reply
    };
    assert_eq!(
        told(&reply, 0, "/delta/content"),
        ("Mail [EMAIL] now, a@b".to_owned(), json!("stop"))
    );
    assert_eq!(told(&reply, 1, "/delta/content").0, "[PHONE]");
    assert_eq!(
        told(&reply, 0, "/delta/tool_calls/0/function/arguments").0,
        "{\"to\": \"[EMAIL]\"}"
    );
    let text = reply.text();
    assert!(
        !text.contains("a@b.") && text.contains("\"completion_tokens\":9"),
        "{text}"
    );
    assert!(text.ends_with(DONE));
}

/// As `Reply::events` expects it.
fn without_charset(mut headers: hyper::HeaderMap) -> hyper::HeaderMap {
    headers.insert("content-type", "text/event-stream".parse().unwrap());
    headers
}

#[tokio::test]
async fn a_choice_that_is_stopped_does_not_end_the_others() {
    let text = [
        says(0, "a sec"),
        says(1, "b"),
        says(0, "ret, "),
        says(0, "more"),
        says(1, "c"),
        ends(1),
    ]
    .concat();
    // Never told to be done: once all choices have ended nothing more is waited for.
    let mock = Mock::start(move |_| vec![stream_head(), chunk(&text), Act::Hang]).await;
    let stack = gateway(mock.upstream(), MASKED).await;
    let fields = json!({"messages": user("x"), "n": 2, "stream": true, "stream_options": {"include_usage": true}});
    let reply = ask(&stack, CHAT, fields).await;
    mock.wait_closed().await;
    let reply = Reply {
        headers: without_charset(reply.headers.clone()),
        ..reply
    };
    assert_eq!(
        told(&reply, 0, "/delta/content"),
        ("a ".to_owned(), json!("content_filter"))
    );
    assert_eq!(
        told(&reply, 1, "/delta/content"),
        ("bc".to_owned(), json!("stop"))
    );
    assert!(
        reply.events().last().unwrap()["usage"]["completion_tokens"]
            .as_u64()
            .unwrap()
            > 0
    );
    assert!(reply.text().ends_with(DONE));
}

#[tokio::test]
async fn a_stream_of_text_completions_without_an_end_is_let_out_whole() {
    let part = |text: &str| event(json!([{"index": 0, "text": text}]));
    let parts = [part("write to a@b."), part("exam"), DONE.to_owned()];
    let mock = Mock::start(move |_| stream(&parts.each_ref().map(String::as_str))).await;
    let stack = gateway(mock.upstream(), MASKED).await;
    let reply = ask(&stack, TEXT, json!({"prompt": "x", "stream": true})).await;
    let reply = Reply {
        headers: without_charset(reply.headers.clone()),
        ..reply
    };
    assert_eq!(told(&reply, 0, "/text").0, "write to [EMAIL]");
}

#[tokio::test]
async fn an_answer_that_is_refused_or_cannot_be_read_ends_with_an_error() {
    let hooks = "[[safety]]\nhook = 'words'\nwords = ['secret']";
    for (parts, code) in [
        (vec![says(0, "a sec"), says(0, "ret ")], "content_filter"),
        (
            vec!["data: {\"choices\": [3]}\n\n".to_owned()],
            "upstream_failed",
        ),
        (vec!["data: secret\n\n".to_owned()], "upstream_failed"),
        (
            vec![
                event(json!([{"index": 0, "delta": 3, "finish_reason": "x"}])),
                says(0, "secret"),
                "data: []\n\n".to_owned(),
            ],
            "upstream_failed",
        ),
    ] {
        let mock = Mock::start(move |_| {
            let parts: Vec<Act> = parts.iter().map(|part| chunk(part)).collect();
            [vec![stream_head()], parts, vec![Act::Hang]].concat()
        })
        .await;
        let stack = gateway(mock.upstream(), hooks).await;
        let reply = ask(&stack, CHAT, json!({"messages": user("x"), "stream": true})).await;
        assert!(!reply.text().contains("sec"), "{}", reply.text());
        let reply = Reply {
            headers: without_charset(reply.headers.clone()),
            ..reply
        };
        assert_eq!(reply.events().last().unwrap()["error"]["code"], code);
        mock.wait_closed().await;
    }
    let mock = Mock::start(|_| {
        vec![json_answer(
            r#"{"choices":[{"message":{"content":"a secret"}}]}"#,
        )]
    })
    .await;
    let stack = gateway(mock.upstream(), hooks).await;
    let error = ask(&stack, CHAT, json!({"messages": user("x")}))
        .await
        .error(400);
    assert_eq!(error["code"], "content_filter");
}
