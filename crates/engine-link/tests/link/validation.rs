//! Every field of a Submit out of its range, over the wire: the loop must never see it.

use std::time::Duration;

use scalellm_engine_link::proto::{
    self, LogitBias, RefusalCode, Sampling, Submit, to_engine::Message,
};

use crate::raw::{Raw, good, request};
use crate::support::{Engine, MAX_MODEL_LEN, VOCAB_SIZE, tcp};

type Change = Box<dyn Fn(&mut Submit)>;

fn sampling(change: impl Fn(&mut Sampling) + 'static) -> Change {
    Box::new(move |submit| change(submit.sampling.get_or_insert_default()))
}

fn field(change: impl Fn(&mut Submit) + 'static) -> Change {
    Box::new(change)
}

fn floats(
    name: &'static str,
    bad: &[f32],
    set: fn(&mut Sampling, f32),
) -> Vec<(&'static str, Change)> {
    let always = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    bad.iter()
        .chain(&always)
        .map(|&value| (name, sampling(move |s| set(s, value))))
        .collect()
}

fn bad_submits() -> Vec<(&'static str, Change)> {
    let mut cases: Vec<(&'static str, Change)> = vec![
        (
            "prompt_tokens",
            field(|s| (s.prompt_tokens, s.prompt_ids) = (0, vec![])),
        ),
        ("prompt_tokens", field(|s| s.prompt_tokens = MAX_MODEL_LEN)),
        ("prompt_tokens", field(|s| s.prompt_tokens = u32::MAX)),
        ("prompt_ids", field(|s| s.prompt_tokens = 2)),
        ("prompt_ids[1]", field(|s| s.prompt_ids[1] = VOCAB_SIZE)),
        ("prompt_ids[2]", field(|s| s.prompt_ids[2] = u32::MAX)),
        ("resume_ids[0]", field(|s| s.resume_ids = vec![VOCAB_SIZE])),
        ("resume_ids", field(|s| s.resume_ids = vec![1; 10])),
        ("max_tokens", field(|s| s.max_tokens = 0)),
        ("max_tokens", field(|s| s.max_tokens = MAX_MODEL_LEN - 2)),
        ("max_tokens", field(|s| s.max_tokens = u32::MAX)),
        ("min_tokens", field(|s| s.min_tokens = 11)),
        (
            "stop_token_ids[0]",
            field(|s| s.stop_token_ids = vec![VOCAB_SIZE]),
        ),
        (
            "stop_token_ids",
            field(|s| s.stop_token_ids = vec![1; 1_025]),
        ),
        ("trace_id", field(|s| s.trace_id = "x".repeat(129))),
        ("trace_id", field(|s| s.trace_id = "a\nb".into())),
        ("cache_salt", field(|s| s.cache_salt = vec![0; 65])),
        ("priority", field(|s| s.priority = 1_000_001)),
        ("priority", field(|s| s.priority = i32::MIN)),
        ("deadline_ms", field(|s| s.deadline_ms = Some(0))),
        ("deadline_ms", field(|s| s.deadline_ms = Some(u32::MAX))),
        ("arrival_us", field(|s| s.arrival_us = u64::MAX)),
        ("choice", field(|s| s.choice = 1_024)),
        ("prompt_logprobs", field(|s| s.prompt_logprobs = Some(21))),
        ("sampling.logprobs", sampling(|s| s.logprobs = Some(21))),
        (
            "sampling.logit_bias",
            sampling(|s| {
                s.logit_bias = vec![
                    LogitBias {
                        token_id: 1,
                        bias: 0.0
                    };
                    1_025
                ]
            }),
        ),
        (
            "sampling.logit_bias[0].token_id",
            sampling(|s| {
                s.logit_bias = vec![LogitBias {
                    token_id: VOCAB_SIZE,
                    bias: 0.0,
                }]
            }),
        ),
    ];
    cases.extend(floats("sampling.temperature", &[-0.1, 100.5], |s, v| {
        s.temperature = Some(v)
    }));
    cases.extend(floats("sampling.top_p", &[0.0, -0.5, 1.01], |s, v| {
        s.top_p = Some(v)
    }));
    cases.extend(floats("sampling.min_p", &[-0.1, 1.1], |s, v| {
        s.min_p = Some(v)
    }));
    cases.extend(floats(
        "sampling.repetition_penalty",
        &[0.0, -1.0, 101.0],
        |s, v| s.repetition_penalty = Some(v),
    ));
    cases.extend(floats("sampling.presence_penalty", &[-2.1, 2.1], |s, v| {
        s.presence_penalty = Some(v)
    }));
    cases.extend(floats(
        "sampling.frequency_penalty",
        &[-2.1, 2.1],
        |s, v| s.frequency_penalty = Some(v),
    ));
    cases.extend(floats(
        "sampling.logit_bias[0].bias",
        &[-100.5, 101.0],
        |s, v| {
            s.logit_bias = vec![LogitBias {
                token_id: 1,
                bias: v,
            }];
        },
    ));
    cases
}

#[tokio::test]
async fn every_field_out_of_range_is_refused_by_name() {
    let engine = Engine::start(&tcp());
    let mut raw = Raw::connect(&engine.address(), "s", None).await;
    raw.welcome().await;
    for (index, (field, change)) in (1..).zip(bad_submits()) {
        let mut submit = good(index);
        change(&mut submit);
        raw.send(Message::Submit(Box::new(submit))).await;
        let refusal = raw.numbered().await.refusals.remove(0);
        assert_eq!(
            (refusal.field.as_str(), refusal.code()),
            (field, RefusalCode::Invalid),
            "{}",
            refusal.message
        );
        assert_eq!(refusal.request, request(index, 0));
        assert!(
            refusal.message.starts_with(field) && refusal.message.contains("allowed"),
            "{}",
            refusal.message
        );
    }
    for unnamed in [None, request(0, 0)] {
        raw.send(Message::Submit(Box::new(Submit {
            request: unnamed,
            ..good(1)
        })))
        .await;
        assert_eq!(raw.numbered().await.refusals[0].field, "request");
    }
    assert!(
        engine.handle.poll(Duration::ZERO).is_empty(),
        "the loop saw none of them"
    );
}

#[tokio::test]
async fn the_ends_of_every_range_are_taken() {
    let engine = Engine::start(&tcp());
    let mut raw = Raw::connect(&engine.address(), "s", None).await;
    raw.welcome().await;
    let low = Sampling {
        temperature: Some(0.0),
        top_p: Some(1e-6),
        top_k: Some(0),
        min_p: Some(0.0),
        repetition_penalty: Some(0.01),
        presence_penalty: Some(-2.0),
        frequency_penalty: Some(-2.0),
        logit_bias: vec![LogitBias {
            token_id: 0,
            bias: -100.0,
        }],
        seed: 0,
        logprobs: Some(0),
    };
    let high = Sampling {
        temperature: Some(100.0),
        top_p: Some(1.0),
        top_k: Some(u32::MAX),
        min_p: Some(1.0),
        repetition_penalty: Some(100.0),
        presence_penalty: Some(2.0),
        frequency_penalty: Some(2.0),
        logit_bias: vec![
            LogitBias {
                token_id: VOCAB_SIZE - 1,
                bias: 100.0
            };
            1_024
        ],
        seed: u64::MAX,
        logprobs: Some(20),
    };
    for (id, sampling) in [(1, low), (2, high)] {
        let submit = Submit {
            sampling: Some(sampling),
            max_tokens: MAX_MODEL_LEN - 3,
            min_tokens: MAX_MODEL_LEN - 3,
            stop_token_ids: vec![VOCAB_SIZE - 1; 1_024],
            resume_ids: vec![VOCAB_SIZE - 1; 100],
            trace_id: "x".repeat(128),
            cache_salt: vec![255; 64],
            priority: -1_000_000,
            deadline_ms: Some(1),
            choice: 1_023,
            prompt_logprobs: Some(20),
            ..good(id)
        };
        raw.send(Message::Submit(Box::new(submit))).await;
        let got = engine.submission().await;
        let sampling = got.submit.sampling.expect("carried");
        assert_eq!(
            sampling.top_k,
            Some(0),
            "a top_k of the whole vocabulary is none"
        );
        raw.send(Message::Cancel(proto::Cancel {
            request: request(id, 0),
        }))
        .await;
        engine.command().await;
    }
}
