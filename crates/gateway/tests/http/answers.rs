//! Answers that are not streamed.

use scalellm_fake_engine::{Output, Settings};
use serde_json::json;

use crate::support::{EOS, Stack, engine, ids, says, user};

#[tokio::test]
async fn a_chat_turn_is_answered() {
    let stack = Stack::one(Settings {
        cached_tokens: 2,
        ..says("It is 4.")
    })
    .await;
    let reply = stack.chat(json!({"messages": user("2+2?")})).await;
    let body = reply.ok();
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["model"], "bytes");
    assert_eq!(
        body["id"],
        format!("chatcmpl-{}", reply.header("x-request-id"))
    );
    let choice = &body["choices"][0];
    assert_eq!(
        choice["message"],
        json!({"role": "assistant", "content": "It is 4.", "refusal": null})
    );
    assert_eq!(
        (&choice["finish_reason"], &choice["stop_reason"]),
        (&json!("stop"), &json!(null))
    );
    assert_eq!(
        body["usage"],
        json!({"prompt_tokens": 6, "completion_tokens": 9, "total_tokens": 15,
               "prompt_tokens_details": {"cached_tokens": 2}})
    );
    let timing = reply.header("server-timing");
    for stage in [
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
        "first",
        "decode",
        "detokenise",
        "serialise",
        "total",
    ] {
        assert!(
            timing.contains(&format!("{stage};dur=")),
            "{stage} is not in {timing}"
        );
    }
}

/// Streams, because they are serialised while the engine decodes.
#[tokio::test]
async fn no_time_is_in_two_stages() {
    let stack = Stack::one(engine()).await;
    let ask = json!({"messages": user("x"), "max_tokens": 1000, "stream": true, "logprobs": true,
                     "top_logprobs": 20, "stream_options": {"include_usage": true}});
    let events = stack.chat(ask).await.events();
    let stages = events.last().unwrap()["stages_ms"]
        .as_object()
        .unwrap()
        .clone();
    let total = stages["total"].as_f64().unwrap();
    let sum: f64 = stages
        .iter()
        .filter(|(stage, _)| !["first", "total"].contains(&stage.as_str()))
        .map(|(_, ms)| ms.as_f64().unwrap())
        .sum();
    // Each stage is rounded to a microsecond for each of its parts.
    assert!(sum <= total + 0.1, "{sum} of {total}: {stages:?}");
}

#[tokio::test]
async fn lengths_default_as_in_openai_and_vllm() {
    let stack = Stack::one(engine()).await;
    let completion = stack.complete(json!({"prompt": "abc"})).await.ok();
    assert_eq!(completion["usage"]["completion_tokens"], 16);
    assert_eq!(completion["choices"][0]["finish_reason"], "length");
    let chat = stack.chat(json!({"messages": user("abc")})).await.ok();
    assert_eq!(chat["usage"]["total_tokens"], 2048);
    let chat = stack
        .chat(json!({"messages": user("abc"), "max_completion_tokens": 3}))
        .await
        .ok();
    assert_eq!(chat["choices"][0]["message"]["content"], "abc");
}

#[tokio::test]
async fn every_form_of_prompt_is_completed() {
    let stack = Stack::one(Settings {
        output: Output::Echo,
        ..engine()
    })
    .await;
    for (prompt, texts) in [
        (json!("xyz"), vec!["xyz"]),
        (json!(["xyz", "uvw"]), vec!["xyz", "uvw"]),
        (json!(ids("xyz")), vec!["xyz"]),
        (json!([ids("xyz"), ids("uvw")]), vec!["xyz", "uvw"]),
    ] {
        let body = stack
            .complete(json!({"prompt": prompt, "max_tokens": 3}))
            .await
            .ok();
        let got: Vec<&str> = body["choices"]
            .as_array()
            .unwrap()
            .iter()
            .map(|choice| choice["text"].as_str().unwrap())
            .collect();
        assert_eq!(got, texts);
        assert_eq!(body["usage"]["prompt_tokens"], 3 * texts.len());
    }
    let body = stack
        .complete(json!({"prompt_token_ids": ids("pq"), "max_tokens": 2}))
        .await
        .ok();
    assert_eq!(body["choices"][0]["text"], "pq");
    let body = stack
        .chat(json!({"prompt_token_ids": ids("pq"), "max_tokens": 2}))
        .await
        .ok();
    assert_eq!(body["choices"][0]["message"]["content"], "pq");
}

#[tokio::test]
async fn n_choices_share_a_seed_and_differ() {
    let stack = Stack::one(Settings {
        output: Output::Noise,
        ..engine()
    })
    .await;
    let ask =
        json!({"prompt": ["a", "b"], "n": 3, "seed": 7, "max_tokens": 8, "return_token_ids": true});
    let body = stack.complete(ask.clone()).await.ok();
    let choices = body["choices"].as_array().unwrap();
    let indices: Vec<u64> = choices
        .iter()
        .map(|choice| choice["index"].as_u64().unwrap())
        .collect();
    assert_eq!(indices, [0, 1, 2, 3, 4, 5]);
    let drawn: Vec<String> = choices[..3]
        .iter()
        .map(|choice| choice["token_ids"].to_string())
        .collect();
    assert!(drawn[0] != drawn[1] && drawn[1] != drawn[2] && drawn[0] != drawn[2]);
    assert_eq!(body["usage"]["completion_tokens"], 48);
    assert_eq!(body["usage"]["prompt_tokens"], 2);
    let again = stack.complete(ask).await.ok();
    assert_eq!(again["choices"], body["choices"]);
    let unseeded = json!({"prompt": "a", "max_tokens": 8, "return_token_ids": true});
    let first = stack.complete(unseeded.clone()).await.ok();
    assert_ne!(
        first["choices"],
        stack.complete(unseeded).await.ok()["choices"]
    );
}

#[tokio::test]
async fn stop_strings_end_a_choice_and_are_counted() {
    let stack = Stack::one(engine()).await;
    for (include, text) in [(false, "abcd"), (true, "abcdefg")] {
        let body = stack
            .complete(
                json!({"prompt": "x", "max_tokens": 100, "stop": ["zz", "efg"],
                             "include_stop_str_in_output": include, "return_token_ids": true}),
            )
            .await
            .ok();
        let choice = &body["choices"][0];
        assert_eq!(choice["text"], text);
        assert_eq!(
            (&choice["finish_reason"], &choice["stop_reason"]),
            (&json!("stop"), &json!("efg"))
        );
        assert_eq!(body["usage"]["completion_tokens"], 7);
        assert_eq!(choice["token_ids"], json!(ids("abcdefg")));
    }
    stack
        .wait_metric("scalellm_replica_in_flight_requests{", "", 0.0)
        .await;
    stack
        .wait_metric("scalellm_replica_running_requests{", "", 0.0)
        .await;
    let late = json!({"prompt": "x", "max_tokens": 100, "stop": "c", "min_tokens": 5});
    assert_eq!(
        stack.complete(late).await.ok()["choices"][0]["text"],
        "abcdefghijab"
    );
}

#[tokio::test]
async fn stop_tokens_are_told_by_id() {
    let settings = Settings {
        output: Output::Fixed {
            ids: vec![97, 98, EOS + 3, 99],
        },
        ..engine()
    };
    let stack = Stack::one(settings).await;
    let ask = json!({"prompt": "x", "max_tokens": 4});
    assert_eq!(stack.complete(ask).await.ok()["choices"][0]["text"], "abc");
    let shown = json!({"prompt": "x", "max_tokens": 4, "skip_special_tokens": false});
    assert_eq!(
        stack.complete(shown).await.ok()["choices"][0]["text"],
        "ab<|system|>c"
    );
}

#[tokio::test]
async fn chat_logprobs_name_tokens_and_bytes() {
    let stack = Stack::one(engine()).await;
    let ask = json!({"messages": user("x"), "max_tokens": 3, "logprobs": true, "top_logprobs": 2});
    let body = stack.chat(ask).await.ok();
    let content = body["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    let tokens: Vec<&str> = content
        .iter()
        .map(|token| token["token"].as_str().unwrap())
        .collect();
    assert_eq!(tokens, ["a", "b", "c"]);
    assert_eq!(content[0]["bytes"], json!([97]));
    assert_eq!(content[0]["top_logprobs"].as_array().unwrap().len(), 2);
    let plain = stack
        .chat(json!({"messages": user("x"), "max_tokens": 3}))
        .await
        .ok();
    assert_eq!(plain["choices"][0]["logprobs"], json!(null));
}

#[tokio::test]
async fn completion_logprobs_are_lists_of_one_length() {
    let stack = Stack::one(engine()).await;
    let ask =
        json!({"prompt": "xy", "max_tokens": 3, "logprobs": 1, "return_tokens_as_token_ids": true});
    let logprobs = &stack.complete(ask).await.ok()["choices"][0]["logprobs"];
    assert_eq!(
        logprobs["tokens"],
        json!(["token_id:97", "token_id:98", "token_id:99"])
    );
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2]));
    assert_eq!(logprobs["token_logprobs"], json!([-0.5, -0.5, -0.5]));
    assert!(logprobs["top_logprobs"][0]["token_id:97"].is_number());
}

#[tokio::test]
async fn echo_repeats_the_prompt_with_its_logprobs() {
    let stack = Stack::one(engine()).await;
    let body = stack
        .complete(json!({"prompt": "xy", "max_tokens": 2, "echo": true, "logprobs": 0}))
        .await
        .ok();
    let choice = &body["choices"][0];
    assert_eq!(choice["text"], "xyab");
    assert_eq!(choice["logprobs"]["tokens"], json!(["x", "y", "a", "b"]));
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 1, 2, 3]));
    assert_eq!(choice["logprobs"]["token_logprobs"][0], json!(null));
    assert!(choice["logprobs"]["token_logprobs"][1].is_number());
    assert_eq!(choice.get("prompt_logprobs"), None);
    let scored = stack
        .complete(json!({"prompt": "xy", "max_tokens": 0, "echo": true, "logprobs": 0}))
        .await
        .ok();
    assert_eq!(scored["choices"][0]["text"], "xy");
    assert_eq!(
        scored["choices"][0]["logprobs"]["tokens"],
        json!(["x", "y"])
    );
    assert_eq!(scored["usage"]["completion_tokens"], 0);
}

#[tokio::test]
async fn text_offsets_count_characters_that_are_in_the_text() {
    let stack = Stack::one(says("\u{fc}b")).await;
    let mut prompt = ids("a");
    prompt.push(EOS + 1);
    prompt.extend(ids("\u{1f600}"));
    for (skip, text, offsets) in [
        (true, "a\u{1f600}\u{fc}b", [0, 1, 1, 2, 2, 2, 2, 3, 3]),
        (
            false,
            "a<|user|>\u{1f600}\u{fc}b",
            [0, 1, 9, 10, 10, 10, 10, 11, 11],
        ),
    ] {
        let ask = json!({"prompt": prompt, "max_tokens": 3, "echo": true, "logprobs": 0,
                         "skip_special_tokens": skip});
        let choice = &stack.complete(ask).await.ok()["choices"][0];
        assert_eq!(choice["text"], text);
        assert_eq!(choice["logprobs"]["text_offset"], json!(offsets));
    }
}

/// Every byte of a character reads as U+FFFD.
#[tokio::test]
async fn of_tokens_that_read_the_same_the_likeliest_counts() {
    let stack = Stack::one(Settings {
        output: Output::Fixed { ids: vec![0xe0] },
        ..engine()
    })
    .await;
    let ask = json!({"prompt": "x", "max_tokens": 1, "logprobs": 5});
    let choice = &stack.complete(ask).await.ok()["choices"][0];
    assert_eq!(
        choice["logprobs"]["top_logprobs"],
        json!([{"\u{fffd}": -0.5}])
    );
}

#[tokio::test]
async fn prompt_logprobs_and_token_ids_come_as_in_vllm() {
    let stack = Stack::one(engine()).await;
    let ask = json!({"messages": user("x"), "max_tokens": 2, "prompt_logprobs": 1, "return_token_ids": true});
    let body = stack.chat(ask).await.ok();
    assert_eq!(body["prompt_token_ids"], json!([EOS + 1, 120, EOS + 2]));
    assert_eq!(body["choices"][0]["token_ids"], json!([97, 98]));
    let positions = body["prompt_logprobs"].as_array().unwrap();
    assert_eq!((positions.len(), &positions[0]), (3, &json!(null)));
    assert_eq!(positions[1]["120"]["decoded_token"], "x");
}

#[tokio::test]
async fn a_character_of_several_tokens_comes_whole() {
    let stack = Stack::one(says("gr\u{fc}\u{df}e \u{1f600}!")).await;
    let body = stack.chat(json!({"messages": user("x")})).await.ok();
    assert_eq!(
        body["choices"][0]["message"]["content"],
        "gr\u{fc}\u{df}e \u{1f600}!"
    );
}
