//! Answers of `/v1/chat/completions`.

use std::sync::Arc;

use axum::response::Response;
use serde::Serialize;
use serde_json::Value;

use super::collect::{Collected, collect};
use super::logprobs::{ChatLogprobs, TokenNames, prompt_logprobs};
use super::sse::{Format, Frames};
use super::{Head, StopReasonBody, UsageBody, finish_fields, json};
use crate::choice::ChoiceEvent;
use crate::error::ApiResult;
use crate::generation::{Generation, PreparedPrompt};
use crate::record::RequestRecord;
use crate::stages::Stage;

#[derive(Serialize)]
struct Body<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<BodyChoice>,
    usage: UsageBody,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
}

#[derive(Serialize)]
struct BodyChoice {
    index: usize,
    message: Message,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReasonBody>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct Message {
    role: &'static str,
    content: String,
    refusal: Option<()>,
}

/// Waits for the whole answer.
///
/// # Errors
/// The request's error.
pub async fn whole(
    mut generation: Generation,
    head: &Head,
    prompt: &PreparedPrompt,
    record: &RequestRecord,
) -> ApiResult<Response> {
    let collected = collect(&mut generation).await?;
    let usage = generation.usage();
    Ok(record.timed(Stage::Serialise, || {
        let names = head.names();
        let of_prompt = collected
            .first()
            .filter(|_| head.params.prompt_logprobs.is_some());
        let body = Body {
            id: &head.id,
            object: "chat.completion",
            created: head.created,
            model: &head.model_name,
            prompt_logprobs: of_prompt
                .map(|choice| prompt_logprobs(&prompt.ids, &choice.prompt_logprobs, names)),
            prompt_token_ids: head.params.return_token_ids.then_some(&*prompt.ids),
            choices: collected
                .into_iter()
                .enumerate()
                .map(|(index, c)| choice(index, c, head, names))
                .collect(),
            usage: usage.into(),
        };
        json(&body)
    }))
}

fn choice(index: usize, collected: Collected, head: &Head, names: TokenNames<'_>) -> BodyChoice {
    let (finish_reason, stop_reason) = finish_fields(collected.finish);
    let logprobs = head.params.logprobs.map(|_| {
        let mut logprobs = ChatLogprobs::default();
        logprobs.extend(&collected.logprobs, names);
        logprobs
    });
    BodyChoice {
        index,
        message: Message {
            role: "assistant",
            content: collected.text,
            refusal: None,
        },
        logprobs,
        finish_reason,
        stop_reason,
        token_ids: head.params.return_token_ids.then_some(collected.token_ids),
    }
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [ChunkChoice],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageBody>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stages_ms: Option<Value>,
}

#[derive(Serialize)]
struct ChunkChoice {
    index: usize,
    delta: Delta,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<StopReasonBody>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

#[derive(Default, Serialize)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

/// Frames of a streamed answer: each choice's role first, then its text.
pub struct ChatStream {
    head: Head,
    prompt_ids: Arc<[u32]>,
    started: Vec<bool>,
    any_started: bool,
}

impl ChatStream {
    #[must_use]
    pub fn new(head: Head, prompt: PreparedPrompt) -> ChatStream {
        let started = vec![false; head.params.n as usize];
        ChatStream {
            head,
            prompt_ids: prompt.ids,
            started,
            any_started: false,
        }
    }

    fn push(
        &self,
        generation: &Generation,
        choice: ChunkChoice,
        prompt_ids: Option<&[u32]>,
        out: &mut Frames,
    ) {
        let params = &self.head.params;
        let usage = match (params.include_usage, params.continuous_usage) {
            (false, _) => None,
            (true, false) => Some(None),
            (true, true) => Some(Some(generation.usage().into())),
        };
        out.push(&self.chunk(&[choice], usage, prompt_ids, None));
    }

    fn chunk<'a>(
        &'a self,
        choices: &'a [ChunkChoice],
        usage: Option<Option<UsageBody>>,
        prompt_token_ids: Option<&'a [u32]>,
        stages_ms: Option<Value>,
    ) -> Chunk<'a> {
        let Head {
            id,
            created,
            model_name,
            ..
        } = &self.head;
        let object = "chat.completion.chunk";
        Chunk {
            id,
            object,
            created: *created,
            model: model_name,
            choices,
            usage,
            prompt_token_ids,
            stages_ms,
        }
    }
}

impl Format for ChatStream {
    fn events(&mut self, generation: &Generation, events: Vec<ChoiceEvent>, out: &mut Frames) {
        let params = Arc::clone(&self.head.params);
        for event in events {
            let index = event.choice;
            if !self.started[index] {
                self.started[index] = true;
                let delta = Delta {
                    role: Some("assistant"),
                    content: Some(String::new()),
                };
                let role = ChunkChoice {
                    index,
                    delta,
                    logprobs: None,
                    finish_reason: None,
                    stop_reason: None,
                    token_ids: None,
                };
                let first =
                    !std::mem::replace(&mut self.any_started, true) && params.return_token_ids;
                self.push(generation, role, first.then_some(&*self.prompt_ids), out);
            }
            if !event.is_visible(params.return_token_ids) {
                continue;
            }
            let names = self.head.names();
            let logprobs = params
                .logprobs
                .filter(|_| !event.logprobs.is_empty())
                .map(|_| {
                    let mut logprobs = ChatLogprobs::default();
                    logprobs.extend(&event.logprobs, names);
                    logprobs
                });
            let (finish_reason, stop_reason) = finish_fields(event.finish);
            let content = (!event.text.is_empty() || finish_reason.is_none()).then_some(event.text);
            let chunk = ChunkChoice {
                index,
                delta: Delta {
                    role: None,
                    content,
                },
                logprobs,
                finish_reason,
                stop_reason,
                token_ids: params.return_token_ids.then_some(event.token_ids),
            };
            self.push(generation, chunk, None, out);
        }
    }

    fn end(&mut self, generation: &Generation, record: &RequestRecord, out: &mut Frames) {
        if self.head.params.include_usage {
            let usage = Some(Some(generation.usage().into()));
            out.push(&self.chunk(&[], usage, None, Some(record.times_so_far().to_json())));
        }
    }
}
