//! From events to what the client reads: JSON bodies and server-sent events.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::choice::{Finish, StopReason};
use crate::fleet::Model;
use crate::generation::Usage;
use crate::request::Params;
use logprobs::TokenNames;

pub mod chat;
pub mod collect;
pub mod completions;
pub mod logprobs;
pub mod sse;

const WARNING: HeaderName = HeaderName::from_static("x-scalellm-warning");

/// What every part of one answer repeats.
#[derive(Clone)]
pub struct Head {
    pub id: String,
    pub created: u64,
    /// The model's name as the client gave it.
    pub model_name: String,
    pub model: Arc<Model>,
    pub params: Arc<Params>,
}

impl Head {
    #[must_use]
    pub fn new(
        prefix: &str,
        request_id: &str,
        model_name: String,
        model: Arc<Model>,
        params: Arc<Params>,
    ) -> Head {
        let created = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        Head {
            id: format!("{prefix}-{request_id}"),
            created,
            model_name,
            model,
            params,
        }
    }

    /// How logprobs name tokens.
    fn names(&self) -> TokenNames<'_> {
        TokenNames {
            text: &self.model.text,
            as_ids: self.params.tokens_as_ids,
            skip_special: self.params.skip_special_tokens,
        }
    }
}

#[derive(Serialize)]
pub struct UsageBody {
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
    prompt_tokens_details: PromptTokensDetails,
    /// Told only where there were any.
    #[serde(skip_serializing_if = "Option::is_none")]
    replays: Option<u32>,
}

#[derive(Serialize)]
struct PromptTokensDetails {
    cached_tokens: u64,
}

impl From<Usage> for UsageBody {
    fn from(usage: Usage) -> UsageBody {
        UsageBody {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details: PromptTokensDetails {
                cached_tokens: usage.cached_tokens,
            },
            replays: (usage.replays > 0).then_some(usage.replays),
        }
    }
}

/// vLLM's `stop_reason`: a stop string, a stop token, or null.
#[derive(Serialize)]
#[serde(untagged)]
pub enum StopReasonBody {
    Text(String),
    Token(u32),
}

/// The two fields that a finish fills.
#[must_use]
pub fn finish_fields(finish: Option<Finish>) -> (Option<&'static str>, Option<StopReasonBody>) {
    match finish {
        None => (None, None),
        Some(Finish {
            reason,
            stop_reason,
        }) => (
            Some(reason),
            stop_reason.map(|reason| match reason {
                StopReason::Text(text) => StopReasonBody::Text(text),
                StopReason::Token(id) => StopReasonBody::Token(id),
            }),
        ),
    }
}

/// A JSON answer.
pub fn json(body: &impl Serialize) -> Response {
    let bytes = serde_json::to_vec(body).unwrap_or_default();
    (
        [(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        )],
        bytes,
    )
        .into_response()
}

/// Adds the header that names the unknown fields.
pub fn warn(response: &mut Response, warning: Option<String>) {
    if let Some(value) = warning.and_then(|text| HeaderValue::from_str(&text).ok()) {
        response.headers_mut().insert(WARNING, value);
    }
}
