//! Answers of `/v1/completions`.

use std::sync::Arc;

use axum::response::Response;
use scalellm_engine_link::proto::TokenLogprobs;
use serde::Serialize;
use serde_json::Value;

use super::collect::{Collected, collect};
use super::logprobs::{CompletionLogprobs, prompt_logprobs};
use super::sse::{Format, Frames};
use super::{Head, StopReasonBody, UsageBody, finish_fields, json};
use crate::choice::ChoiceEvent;
use crate::error::ApiResult;
use crate::generation::Generation;
use crate::record::RequestRecord;
use crate::stages::Stage;

/// A prompt as the answer repeats it.
pub struct EchoedPrompt {
    pub ids: Arc<[u32]>,
    /// With `echo`, what stands before the output.
    pub text: Option<String>,
}

#[derive(Serialize)]
struct Body<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<BodyChoice<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageBody>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stages_ms: Option<Value>,
}

/// A choice, whole or a streamed part: the two have the same form.
#[derive(Serialize)]
struct BodyChoice<'a> {
    index: usize,
    text: String,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReasonBody>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
}

/// Waits for the whole answer.
///
/// # Errors
/// The request's error.
pub async fn whole(
    mut generation: Generation,
    head: &Head,
    prompts: &[EchoedPrompt],
    record: &RequestRecord,
) -> ApiResult<Response> {
    let collected = collect(&mut generation).await?;
    let usage = generation.usage();
    Ok(record.timed(Stage::Serialise, || {
        let choices = collected.into_iter().enumerate();
        json(&Body {
            id: &head.id,
            object: "text_completion",
            created: head.created,
            model: &head.model_name,
            choices: choices
                .map(|(index, c)| whole_choice(index, c, head, prompts))
                .collect(),
            usage: Some(Some(usage.into())),
            stages_ms: None,
        })
    }))
}

fn whole_choice<'a>(
    index: usize,
    collected: Collected,
    head: &Head,
    prompts: &'a [EchoedPrompt],
) -> BodyChoice<'a> {
    let prompt = &prompts[collected.prompt];
    let names = head.names();
    let mut offset = 0;
    let logprobs = logprobs_of(
        head,
        Some(prompt),
        &collected.prompt_logprobs,
        &collected.logprobs,
        &mut offset,
        true,
    );
    let (finish_reason, stop_reason) = finish_fields(collected.finish);
    let mut text = prompt.text.clone().unwrap_or_default();
    text.push_str(&collected.text);
    BodyChoice {
        index,
        text,
        logprobs,
        finish_reason,
        stop_reason,
        prompt_logprobs: head
            .params
            .prompt_logprobs
            .filter(|_| !head.params.prompt_logprobs_for_echo)
            .map(|_| prompt_logprobs(&prompt.ids, &collected.prompt_logprobs, names)),
        token_ids: head.params.return_token_ids.then_some(collected.token_ids),
        prompt_token_ids: head.params.return_token_ids.then_some(&*prompt.ids),
    }
}

/// The logprobs of an answer or a part of it; `prompt` where it begins with an echoed prompt.
fn logprobs_of(
    head: &Head,
    prompt: Option<&EchoedPrompt>,
    of_prompt: &[TokenLogprobs],
    of_output: &[TokenLogprobs],
    offset: &mut usize,
    even_if_empty: bool,
) -> Option<CompletionLogprobs> {
    head.params.logprobs?;
    let names = head.names();
    let echoed = prompt.filter(|prompt| prompt.text.is_some());
    if echoed.is_none() && of_output.is_empty() && !even_if_empty {
        return None;
    }
    let mut logprobs = CompletionLogprobs::default();
    if let Some(prompt) = echoed {
        logprobs.extend_prompt(&prompt.ids, of_prompt, names, offset);
    }
    logprobs.extend(of_output, names, offset);
    Some(logprobs)
}

/// Frames of a streamed answer.
pub struct CompletionStream {
    head: Head,
    prompts: Vec<EchoedPrompt>,
    /// Of each choice: `None` before its first frame, then where its next token begins.
    offsets: Vec<Option<usize>>,
}

impl CompletionStream {
    #[must_use]
    pub fn new(head: Head, prompts: Vec<EchoedPrompt>) -> CompletionStream {
        let offsets = vec![None; prompts.len() * head.params.n as usize];
        CompletionStream {
            head,
            prompts,
            offsets,
        }
    }

    fn push(
        &self,
        choices: Vec<BodyChoice<'_>>,
        usage: Option<Option<UsageBody>>,
        stages_ms: Option<Value>,
        out: &mut Frames,
    ) {
        let Head {
            id,
            created,
            model_name,
            ..
        } = &self.head;
        let object = "text_completion";
        out.push(&Body {
            id,
            object,
            created: *created,
            model: model_name,
            choices,
            usage,
            stages_ms,
        });
    }
}

impl Format for CompletionStream {
    fn events(&mut self, generation: &Generation, events: Vec<ChoiceEvent>, out: &mut Frames) {
        let params = Arc::clone(&self.head.params);
        for event in events {
            let prompt = &self.prompts[generation.prompt_of(event.choice)];
            let is_first = self.offsets[event.choice].is_none();
            let says_prompt = is_first && (prompt.text.is_some() || params.return_token_ids);
            if !says_prompt && !event.is_visible(params.return_token_ids) {
                continue;
            }
            let mut offset = self.offsets[event.choice].unwrap_or(0);
            let begins = Some(prompt).filter(|_| is_first);
            let logprobs = logprobs_of(
                &self.head,
                begins,
                &event.prompt_logprobs,
                &event.logprobs,
                &mut offset,
                false,
            );
            let mut text = begins
                .and_then(|prompt| prompt.text.clone())
                .unwrap_or_default();
            text.push_str(&event.text);
            let (finish_reason, stop_reason) = finish_fields(event.finish);
            let choice = BodyChoice {
                index: event.choice,
                text,
                logprobs,
                finish_reason,
                stop_reason,
                prompt_logprobs: None,
                token_ids: params.return_token_ids.then_some(event.token_ids),
                prompt_token_ids: begins
                    .filter(|_| params.return_token_ids)
                    .map(|prompt| &*prompt.ids),
            };
            let usage = match (params.include_usage, params.continuous_usage) {
                (false, _) => None,
                (true, false) => Some(None),
                (true, true) => Some(Some(generation.usage().into())),
            };
            self.push(vec![choice], usage, None, out);
            self.offsets[event.choice] = Some(offset);
        }
    }

    fn end(&mut self, generation: &Generation, record: &RequestRecord, out: &mut Frames) {
        if self.head.params.include_usage {
            let usage = Some(Some(generation.usage().into()));
            self.push(
                Vec::new(),
                usage,
                Some(record.times_so_far().to_json()),
                out,
            );
        }
    }
}
