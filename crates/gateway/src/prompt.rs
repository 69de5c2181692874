//! Between a request's text and its prompt's token ids: template, tokenising and back, where it is quick or on the
//! threads for text.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::StatusCode;

use crate::app::App;
use crate::error::{ApiError, ApiResult};
use crate::fleet::{Limits, Model};
use crate::record::RequestRecord;
use crate::request::chat::{ChatPrompt, Conversation};
use crate::request::{Params, Prompt};
use crate::stages::Stage;
use crate::text::{TextError, TextModel};
use crate::text_pool::{Pace, Pause};

/// Ids of a conversation.
///
/// # Errors
/// 400 for messages that the template or the tokenizer refuses; 500 when the template itself fails; 503 when the
/// threads' queue is full.
pub async fn of_conversation(
    app: &App,
    record: &RequestRecord,
    model: &Arc<Model>,
    conversation: Conversation,
) -> ApiResult<Vec<u32>> {
    let bytes = record.body_bytes();
    let text_model = Arc::clone(&model.text);
    let job = move |pause: &mut Pause| {
        let start = Instant::now();
        let rendered = text_model.render_chat(&conversation.messages, &conversation.options);
        let template_took = start.elapsed();
        let ids = rendered.and_then(|text| {
            let mut pause = || pause.take();
            text_model.encode_with_pauses(&text, conversation.add_special_tokens, &mut pause)
        });
        (ids, template_took)
    };
    let (ids, _) = worked(app, record, &model.paces.chat, bytes, job).await?;
    ids.map_err(|error| match error {
        // Only a template's own refusal is about the messages.
        TextError::Template(_) | TextError::TemplateSyntax { .. } => {
            ApiError::internal(format!("model {:?}: {error}", &*model.name))
        }
        _ => refused("messages", &error),
    })
}

/// Ids of a chat request's prompt.
///
/// # Errors
/// As [`of_conversation`].
pub async fn of_chat(
    app: &App,
    record: &RequestRecord,
    model: &Arc<Model>,
    prompt: ChatPrompt,
) -> ApiResult<Vec<u32>> {
    match prompt {
        ChatPrompt::Ids(ids) => Ok(ids),
        ChatPrompt::Conversation(conversation) => {
            of_conversation(app, record, model, *conversation).await
        }
    }
}

/// Ids of each of `prompts`.
///
/// # Errors
/// 400 for text that the tokenizer refuses; 503 when the threads' queue is full.
pub async fn of_prompts(
    app: &App,
    record: &RequestRecord,
    model: &Arc<Model>,
    prompts: Vec<Prompt>,
    add_special_tokens: bool,
) -> ApiResult<Vec<Vec<u32>>> {
    if prompts
        .iter()
        .all(|prompt| matches!(prompt, Prompt::Ids(_)))
    {
        return prompts
            .into_iter()
            .map(|prompt| ids_of(&model.text, prompt, add_special_tokens, &mut || ()))
            .collect();
    }
    let text_model = Arc::clone(&model.text);
    let bytes = record.body_bytes();
    let job = move |pause: &mut Pause| {
        let ids: ApiResult<Vec<_>> = prompts
            .into_iter()
            .map(|prompt| {
                ids_of(&text_model, prompt, add_special_tokens, &mut || {
                    pause.take()
                })
            })
            .collect();
        (ids, Duration::ZERO)
    };
    worked(app, record, &model.paces.prompts, bytes, job)
        .await?
        .0
}

/// Texts of each of `prompts`, which come back with them.
///
/// # Errors
/// 503 when the threads' queue is full.
pub async fn texts_of(
    app: &App,
    record: &RequestRecord,
    model: &Arc<Model>,
    prompts: Vec<Vec<u32>>,
    skip_special_tokens: bool,
) -> ApiResult<Vec<(Vec<u32>, String)>> {
    let text_model = Arc::clone(&model.text);
    let bytes = record.body_bytes();
    let job = move |_: &mut Pause| {
        let texts = prompts.into_iter().map(|ids| {
            let text = text_model.decode(&ids, skip_special_tokens);
            (ids, text)
        });
        (texts.collect(), Duration::ZERO)
    };
    Ok(worked(app, record, &model.paces.back, bytes, job).await?.0)
}

/// How each of `ids` reads, with the ids themselves.
///
/// # Errors
/// 503 when the threads' queue is full.
pub async fn names_of(
    app: &App,
    record: &RequestRecord,
    model: &Arc<Model>,
    ids: Vec<u32>,
) -> ApiResult<(Vec<u32>, Vec<String>)> {
    let text_model = Arc::clone(&model.text);
    let bytes = record.body_bytes();
    let job = move |_: &mut Pause| {
        let names = ids.iter().map(|id| text_model.token_text(*id).0).collect();
        ((ids, names), Duration::ZERO)
    };
    Ok(worked(app, record, &model.paces.back, bytes, job).await?.0)
}

fn ids_of(
    text_model: &TextModel,
    prompt: Prompt,
    add_special_tokens: bool,
    pause: &mut dyn FnMut(),
) -> ApiResult<Vec<u32>> {
    match prompt {
        Prompt::Ids(ids) => Ok(ids),
        Prompt::Text(text) => text_model
            .encode_with_pauses(&text, add_special_tokens, pause)
            .map_err(|e| refused("prompt", &e)),
    }
}

/// Runs a job on about `bytes` of text that tells how long its template took; the rest of its time, less its pauses,
/// is tokenising.
async fn worked<T: Send + 'static>(
    app: &App,
    record: &RequestRecord,
    pace: &Pace,
    bytes: usize,
    job: impl FnOnce(&mut Pause) -> (T, Duration) + Send + 'static,
) -> ApiResult<(T, Duration)> {
    let start = Instant::now();
    let ran = app.text_pool.run_paced(pace, bytes, job).await;
    let (done, worked) = ran.inspect_err(|error| {
        if error.status == StatusCode::SERVICE_UNAVAILABLE {
            app.metrics.rejected("text_queue");
        }
    })?;
    let template = done.1;
    record.update(|progress| {
        let times = &mut progress.times;
        times.add(Stage::TextQueue, start.elapsed().saturating_sub(worked));
        times.add(Stage::Template, template);
        times.add(Stage::Tokenise, worked.saturating_sub(template));
    });
    Ok(done)
}

fn refused(param: &str, error: &TextError) -> Box<ApiError> {
    ApiError::field(param, format!("{param}: {error}"))
}

/// Checks a prompt and the ids among the parameters against the model; returns how many tokens may be generated.
///
/// # Errors
/// 400 that names the field and both lengths.
pub fn check(field: &str, ids: &[u32], params: &Params, limits: Limits) -> ApiResult<u32> {
    if ids.is_empty() {
        return Err(ApiError::field(
            field,
            format!("{field}: got a prompt of no tokens, allowed is 1 or more"),
        ));
    }
    let vocab_size = limits.vocab_size;
    let is_unknown = |id: &u32| *id >= vocab_size;
    for (name, bad) in [
        // The largest of many is found in a fraction of the time of the first that is unknown; by a fold, as that
        // becomes vector instructions.
        (
            field,
            Some(ids.iter().fold(0, |most, id| most.max(*id))).filter(is_unknown),
        ),
        (
            "stop_token_ids",
            params.stop_token_ids.iter().copied().find(is_unknown),
        ),
        (
            "logit_bias",
            params.logit_bias.iter().map(|(id, _)| *id).find(is_unknown),
        ),
    ] {
        if let Some(id) = bad {
            let message =
                format!("{name}: got the token id {id}, allowed are ids below {vocab_size}");
            return Err(ApiError::field(name, message));
        }
    }
    let longest = limits.max_model_len;
    let prompt_tokens = u32::try_from(ids.len()).unwrap_or(u32::MAX);
    let room = longest.saturating_sub(prompt_tokens);
    if room == 0 {
        let message = format!(
            "{field}: the prompt has {prompt_tokens} tokens, allowed are at most {} (max_model_len {longest} less one to generate)",
            longest.saturating_sub(1)
        );
        return Err(ApiError::context_length(field, message));
    }
    let max_tokens = match params.max_tokens {
        Some(max_tokens) if max_tokens > room => {
            let message = format!(
                "max_tokens: the prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}, together {}; \
                 allowed is at most max_model_len, {longest}",
                u64::from(prompt_tokens) + u64::from(max_tokens)
            );
            return Err(ApiError::context_length("max_tokens", message));
        }
        Some(max_tokens) => max_tokens,
        None => params.default_max_tokens.unwrap_or(room).min(room),
    };
    if params.min_tokens > max_tokens {
        let message = format!(
            "min_tokens: got {}, allowed is at most {max_tokens}, the tokens there is room for",
            params.min_tokens
        );
        return Err(ApiError::field("min_tokens", message));
    }
    Ok(max_tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_told_with_both_numbers() {
        let limits = Limits {
            max_model_len: 10,
            vocab_size: 100,
        };
        let params = |max_tokens| Params {
            max_tokens,
            ..Params::default()
        };
        let ids = [1; 6];
        assert_eq!(check("prompt", &ids, &params(None), limits).unwrap(), 4);
        assert_eq!(check("prompt", &ids, &params(Some(4)), limits).unwrap(), 4);
        let error = check("prompt", &ids, &params(Some(5)), limits).unwrap_err();
        assert!(
            error
                .message
                .contains("6 tokens and max_tokens is 5, together 11"),
            "{}",
            error.message
        );
        assert!(
            error.message.contains("max_model_len, 10"),
            "{}",
            error.message
        );
        let error = check("prompt", &[1; 10], &params(None), limits).unwrap_err();
        assert_eq!(error.code, Some("context_length_exceeded"));
        assert!(check("prompt", &[], &params(None), limits).is_err());
        assert!(
            check("prompt", &[100], &params(None), limits)
                .unwrap_err()
                .message
                .contains("100")
        );
        let stop = Params {
            stop_token_ids: vec![100],
            ..Params::default()
        };
        assert_eq!(
            check("prompt", &ids, &stop, limits)
                .unwrap_err()
                .param
                .as_deref(),
            Some("stop_token_ids")
        );
    }
}
