//! `POST /tokenize`, `/detokenize`: vLLM's shapes.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::app::App;
use crate::error::{ApiError, ApiResult};
use crate::record::RequestRecord;
use crate::request::Prompt;
use crate::request::text::{DetokenizeRequest, TokenizePrompt, TokenizeRequest};
use crate::respond;
use crate::{auth, body, prompt};

pub async fn tokenize(
    State(app): State<Arc<App>>,
    Extension(record): Extension<Arc<RequestRecord>>,
    request: Request,
) -> Response {
    encode(&app, &record, request)
        .await
        .unwrap_or_else(|error| error.into_response())
}

pub async fn detokenize(
    State(app): State<Arc<App>>,
    Extension(record): Extension<Arc<RequestRecord>>,
    request: Request,
) -> Response {
    decode(&app, &record, request)
        .await
        .unwrap_or_else(|error| error.into_response())
}

async fn encode(
    app: &Arc<App>,
    record: &Arc<RequestRecord>,
    request: Request,
) -> ApiResult<Response> {
    let asked = body::parsed(app, record, request, TokenizeRequest::parse).await?;
    let model = Arc::clone(app.live().fleet.find_or_only(asked.model.as_deref())?);
    auth::may_use(record, &model)?;
    let tokens = match asked.prompt {
        TokenizePrompt::Conversation(conversation) => {
            prompt::of_conversation(app, record, &model, *conversation).await?
        }
        TokenizePrompt::Text {
            text,
            add_special_tokens,
        } => {
            let prompts = vec![Prompt::Text(text)];
            prompt::of_prompts(app, record, &model, prompts, add_special_tokens)
                .await?
                .swap_remove(0)
        }
    };
    let (tokens, strings) = if asked.return_token_strs {
        let (tokens, strings) = prompt::names_of(app, record, &model, tokens).await?;
        (tokens, Some(strings))
    } else {
        (tokens, None)
    };
    let max_model_len = model.limits().map(|limits| limits.max_model_len);
    let mut response = respond::json(&json!({
        "count": tokens.len(),
        "max_model_len": max_model_len,
        "tokens": tokens,
        "token_strs": strings,
    }));
    respond::warn(&mut response, asked.warning);
    Ok(response)
}

async fn decode(
    app: &Arc<App>,
    record: &Arc<RequestRecord>,
    request: Request,
) -> ApiResult<Response> {
    let asked = body::parsed(app, record, request, DetokenizeRequest::parse).await?;
    let model = Arc::clone(app.live().fleet.find_or_only(asked.model.as_deref())?);
    auth::may_use(record, &model)?;
    let vocab_size = model.text.vocab_size();
    if let Some(id) = asked.tokens.iter().find(|id| **id as usize >= vocab_size) {
        let message = format!("tokens: got the token id {id}, allowed are ids below {vocab_size}");
        return Err(ApiError::field("tokens", message));
    }
    let text = prompt::texts_of(app, record, &model, vec![asked.tokens], false)
        .await?
        .swap_remove(0)
        .1;
    let mut response = respond::json(&json!({"prompt": text}));
    respond::warn(&mut response, asked.warning);
    Ok(response)
}
