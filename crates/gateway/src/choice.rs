//! One choice of a request: engine outputs in, text and finish out.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use scalellm_engine_link::proto::{self, FinishReason};

use crate::app::App;
use crate::attempt::Attempt;
use crate::error::{ApiError, ApiResult};
use crate::fleet::Model;
use crate::request::Params;
use crate::text::{OutputText, Piece};

/// Why a choice ended, in OpenAI's words.
#[derive(Debug, Clone, PartialEq)]
pub struct Finish {
    pub reason: &'static str,
    pub stop_reason: Option<StopReason>,
}

/// What exactly stopped it, as vLLM's `stop_reason`; the end-of-sequence token is not told.
#[derive(Debug, Clone, PartialEq)]
pub enum StopReason {
    Text(String),
    Token(u32),
}

/// What is new of one choice.
#[derive(Debug, Default)]
pub struct ChoiceEvent {
    pub choice: usize,
    pub text: String,
    /// Output ids received, those whose text is still held back included.
    pub token_ids: Vec<u32>,
    /// Of the output tokens whose text is out.
    pub logprobs: Vec<proto::TokenLogprobs>,
    pub prompt_logprobs: Vec<proto::TokenLogprobs>,
    pub finish: Option<Finish>,
}

impl ChoiceEvent {
    /// Whether a stream has something to say of it.
    #[must_use]
    pub fn is_visible(&self, with_ids: bool) -> bool {
        !self.text.is_empty()
            || !self.logprobs.is_empty()
            || self.finish.is_some()
            || !self.prompt_logprobs.is_empty()
            || (with_ids && !self.token_ids.is_empty())
    }
}

pub struct Choice {
    pub index: usize,
    /// Which of the request's prompts it continues.
    pub prompt: usize,
    pub cached_tokens: u32,
    /// Output tokens, up to and with the one that completes a stop string.
    pub output_tokens: u32,
    /// The engine's, up to its first token.
    pub first_times: Option<Box<proto::StageTimes>>,
    /// The engine's, of the whole; absent when it was not the engine that ended the choice.
    pub last_times: Option<Box<proto::StageTimes>>,
    /// The replica that ran it last; `None` before the first.
    pub replica: Option<usize>,
    /// For how long no replica took it.
    pub waited: Duration,
    /// Replicas that it outlived.
    pub replays: u32,
    /// `None` once finished: the engine has forgotten it, or was told to.
    attempt: Option<Attempt>,
    text: OutputText,
    include_stop: bool,
    /// Only the prompt is wanted (`max_tokens` 0 with `echo`).
    prompt_only: bool,
    /// Logprobs of tokens whose text is held back.
    held: VecDeque<proto::TokenLogprobs>,
}

impl Choice {
    #[must_use]
    pub fn new(
        index: usize,
        prompt: usize,
        ids: &[u32],
        attempt: Attempt,
        model: &Model,
        params: &Params,
    ) -> Choice {
        let text = OutputText::new(
            &model.text,
            ids,
            params.stop.clone(),
            params.skip_special_tokens,
            params.include_stop,
        )
        .with_min_tokens(params.min_tokens as usize);
        Choice {
            index,
            prompt,
            cached_tokens: 0,
            output_tokens: 0,
            first_times: None,
            last_times: None,
            replica: attempt.replica(),
            waited: attempt.waited(),
            replays: 0,
            attempt: Some(attempt),
            text,
            include_stop: params.include_stop,
            prompt_only: params.max_tokens == Some(0),
            held: VecDeque::new(),
        }
    }

    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.attempt.is_none()
    }

    /// The next output of the engine. Must not be called on a finished choice.
    pub fn poll_output(
        &mut self,
        app: &App,
        model: &Arc<Model>,
        cx: &mut Context<'_>,
    ) -> Poll<ApiResult<proto::Output>> {
        match &mut self.attempt {
            Some(attempt) => {
                let output = ready!(attempt.poll_output(app, model, cx));
                (self.replica, self.waited) = (attempt.replica(), attempt.waited());
                self.replays = attempt.replays();
                Poll::Ready(output)
            }
            None => Poll::Pending,
        }
    }

    /// Turns an output into text; ends the choice if the engine or a stop string did. What the engine gave before it
    /// gave up comes with the error.
    pub fn take(&mut self, output: proto::Output) -> (ChoiceEvent, Option<Box<ApiError>>) {
        let reason = output.finish_reason();
        if let Some(times) = output.times.map(Box::new) {
            if reason != FinishReason::Unspecified {
                self.last_times = Some(times.clone());
            }
            self.first_times.get_or_insert(times);
        }
        self.cached_tokens = self.cached_tokens.max(output.cached_tokens);
        let mut event = ChoiceEvent {
            choice: self.index,
            prompt_logprobs: output.prompt_logprobs,
            ..Default::default()
        };
        let failure = failure(reason, &output.error);
        if self.prompt_only {
            if failure.is_none() {
                self.end(&mut event, Vec::new(), "length", None);
            }
            return (event, failure);
        }
        let mut ids = output.token_ids;
        self.held.extend(output.logprobs);
        // The token that ended the output is counted and reported, but is not part of the text.
        let ended_by_token = matches!(reason, FinishReason::Eos | FinishReason::StopToken);
        let hidden = usize::from(ended_by_token && !self.include_stop);
        let piece = self.text.push(&ids[..ids.len().saturating_sub(hidden)]);
        let settled = piece.tokens.end;
        if let Some(stop) = self.show(&mut event, piece) {
            // What came after the token that completed the stop string was never wanted.
            ids.truncate(settled.saturating_sub(self.output_tokens as usize));
            self.end(&mut event, ids, "stop", Some(StopReason::Text(stop)));
            return (event, None);
        }
        match reason {
            FinishReason::Eos => self.finish(&mut event, ids, "stop", None),
            FinishReason::StopToken => {
                let token = StopReason::Token(output.stop_token_id);
                self.finish(&mut event, ids, "stop", Some(token));
            }
            FinishReason::Length => self.finish(&mut event, ids, "length", None),
            _ => {
                self.output_tokens += ids.len() as u32;
                event.token_ids = ids;
            }
        }
        (event, failure)
    }

    /// Ends it from outside; what the engine may still be doing for it is cancelled.
    pub fn stop(&mut self) {
        self.attempt = None;
        self.held.clear();
    }

    /// Moves released text and its tokens' logprobs into the event; returns the stop string that was met.
    fn show(&mut self, event: &mut ChoiceEvent, piece: Piece) -> Option<String> {
        event.text.push_str(&piece.text);
        let released = piece.tokens.len().min(self.held.len());
        event.logprobs.extend(self.held.drain(..released));
        piece.stopped
    }

    /// No more ids come: lets out what was held back, unless that completes a stop string.
    fn finish(
        &mut self,
        event: &mut ChoiceEvent,
        ids: Vec<u32>,
        reason: &'static str,
        stop_reason: Option<StopReason>,
    ) {
        let piece = self.text.finish();
        match self.show(event, piece) {
            Some(stop) => self.end(event, ids, "stop", Some(StopReason::Text(stop))),
            None => {
                event.logprobs.extend(self.held.drain(..));
                self.end(event, ids, reason, stop_reason);
            }
        }
    }

    fn end(
        &mut self,
        event: &mut ChoiceEvent,
        ids: Vec<u32>,
        reason: &'static str,
        stop_reason: Option<StopReason>,
    ) {
        self.output_tokens += ids.len() as u32;
        event.token_ids = ids;
        event.finish = Some(Finish {
            reason,
            stop_reason,
        });
        self.stop();
    }
}

/// The error of a request that its engine gave up.
fn failure(reason: FinishReason, error: &str) -> Option<Box<ApiError>> {
    match reason {
        FinishReason::Deadline => Some(ApiError::deadline(
            "the engine reached the request's deadline",
        )),
        FinishReason::Error => {
            let message = format!("the engine failed on this request: {error}");
            Some(ApiError::internal(message))
        }
        _ => None,
    }
}
