//! The texts of a request, before anything is made of them.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::Value;

use super::answer::leave_out;
use super::chain::flags;
use super::look_back::{LookBack, Rule};
use super::{Check, Hook, Notes, Safety, refused};
use crate::app::App;
use crate::body;
use crate::config::safety::Action;
use crate::error::{ApiError, ApiResult};
use crate::record::RequestRecord;
use crate::request::chat::{ChatPrompt, ChatRequest};
use crate::request::{Params, Prompt};
use crate::served::Served;
use crate::stages::Stage;

/// More text is searched on the threads for text: its milliseconds would hold up the requests that share its thread.
const SEARCHED_IN_PLACE_BYTES: usize = 64 << 10;

/// Checks a chat for a replica of our own.
///
/// # Errors
/// 400 that names the hook which refuses it, 503 without a verdict that is needed.
pub async fn chat(
    app: &App,
    record: &Arc<RequestRecord>,
    served: &Arc<Served>,
    request: &mut ChatRequest,
) -> ApiResult<()> {
    leave_out(served, &mut request.params, &mut request.warning);
    let Some(safety) = of_requests(served) else {
        return Ok(());
    };
    match &mut request.prompt {
        ChatPrompt::Ids(_) => Err(no_text("prompt_token_ids")),
        ChatPrompt::Conversation(conversation) => {
            let mut places = Vec::new();
            in_messages(&mut conversation.messages, &mut places);
            check(app, record, served, safety, places).await.map(|_| ())
        }
    }
}

/// Checks prompts for a replica of our own; `field` is where they came from.
///
/// # Errors
/// As [`chat`].
pub async fn completions(
    app: &App,
    record: &Arc<RequestRecord>,
    served: &Arc<Served>,
    (field, prompts): (&str, &mut [Prompt]),
    params: &mut Params,
    warning: &mut Option<String>,
) -> ApiResult<()> {
    leave_out(served, params, warning);
    let Some(safety) = of_requests(served) else {
        return Ok(());
    };
    let places = prompts.iter_mut().map(|prompt| match prompt {
        Prompt::Text(text) => Ok(text),
        Prompt::Ids(_) => Err(no_text(field)),
    });
    let places = places.collect::<ApiResult<Vec<_>>>()?;
    check(app, record, served, safety, places).await.map(|_| ())
}

/// Checks a request for a server elsewhere; the new body, if hooks have changed it.
///
/// # Errors
/// As [`chat`].
pub async fn relayed(
    app: &App,
    record: &Arc<RequestRecord>,
    served: &Arc<Served>,
    bytes: &Bytes,
) -> ApiResult<Option<Bytes>> {
    let Some(safety) = of_requests(served) else {
        return Ok(None);
    };
    let parse = |bytes: &[u8]| {
        serde_json::from_slice::<Value>(bytes)
            .map_err(|error| ApiError::body(format!("the request body is not valid JSON: {error}")))
    };
    let mut request = body::parse(app, record, bytes, body::Reading::Whole, parse).await?;
    let mut places = Vec::new();
    if let Some(fields) = request.as_object_mut() {
        for (name, value) in fields.iter_mut() {
            match name.as_str() {
                "messages" => in_messages(value, &mut places),
                "prompt" | "suffix" => in_prompt(name, value, &mut places)?,
                "prompt_token_ids" if !value.is_null() => return Err(no_text(name)),
                _ => {}
            }
        }
    }
    let changed = check(app, record, served, safety, places).await?;
    Ok(changed.then(|| Bytes::from(request.to_string())))
}

fn of_requests(served: &Served) -> Option<&Arc<Safety>> {
    served
        .safety
        .as_ref()
        .filter(|safety| safety.checks_requests())
}

/// Token ids have a text, but not one that could be masked.
fn no_text(field: &str) -> Box<ApiError> {
    ApiError::unsupported(
        field,
        format!("{field}: got token ids, allowed is text: requests for this model are checked"),
    )
}

/// The texts of `messages`: their contents and what tools were called with.
fn in_messages<'a>(messages: &'a mut Value, places: &mut Vec<&'a mut String>) {
    for message in messages.as_array_mut().into_iter().flatten() {
        let Some(fields) = message.as_object_mut() else {
            continue;
        };
        for (name, value) in fields.iter_mut() {
            match (name.as_str(), value) {
                ("content" | "refusal" | "reasoning_content", Value::String(text)) => {
                    places.push(text)
                }
                ("content", Value::Array(parts)) => {
                    let parts = parts.iter_mut().filter_map(Value::as_object_mut);
                    places.extend(parts.flat_map(|part| {
                        part.iter_mut().filter_map(|(name, value)| match value {
                            Value::String(text) if name == "text" || name == "refusal" => {
                                Some(text)
                            }
                            _ => None,
                        })
                    }));
                }
                ("tool_calls", Value::Array(calls)) => {
                    let called = calls.iter_mut().filter_map(|call| call.get_mut("function"));
                    places.extend(called.filter_map(arguments));
                }
                ("function_call", call) => places.extend(arguments(call)),
                _ => {}
            }
        }
    }
}

fn arguments(function: &mut Value) -> Option<&mut String> {
    match function.get_mut("arguments") {
        Some(Value::String(text)) => Some(text),
        _ => None,
    }
}

fn in_prompt<'a>(
    field: &str,
    value: &'a mut Value,
    places: &mut Vec<&'a mut String>,
) -> ApiResult<()> {
    match value {
        Value::Null => {}
        Value::String(text) => places.push(text),
        Value::Array(items) => {
            for item in items {
                match item {
                    Value::String(text) => places.push(text),
                    _ => return Err(no_text(field)),
                }
            }
        }
        // The upstream will say what is wrong with it.
        _ => return Err(no_text(field)),
    }
    Ok(())
}

/// Passes the texts at `places` through the hooks; whether one was changed.
async fn check(
    app: &App,
    record: &Arc<RequestRecord>,
    served: &Arc<Served>,
    safety: &Arc<Safety>,
    places: Vec<&mut String>,
) -> ApiResult<bool> {
    let texts = places.iter().map(|place| (**place).clone()).collect();
    // In a box, made where there are hooks: every request would have room for it otherwise.
    let pass = Box::pin(pass(app, record, served, safety, texts));
    let texts = record
        .timed_async(Stage::Safety, pass)
        .await
        .inspect_err(|_| app.metrics.rejected("safety"))?;
    let mut changed = false;
    for (place, text) in places.into_iter().zip(texts) {
        changed |= *place != text;
        *place = text;
    }
    Ok(changed)
}

async fn pass(
    app: &App,
    record: &Arc<RequestRecord>,
    served: &Arc<Served>,
    safety: &Arc<Safety>,
    mut texts: Vec<String>,
) -> ApiResult<Vec<String>> {
    let notes = Notes { record, served };
    let bytes = texts.iter().map(String::len).sum();
    for (index, hook) in safety.hooks.iter().enumerate() {
        if !hook.checks_requests() {
            continue;
        }
        let passes = match &hook.check {
            Check::Limits(limits) => {
                let chars: usize = texts.iter().map(|text| text.chars().count()).sum();
                if let Some(max) = limits.max_request_chars.filter(|max| chars > *max) {
                    notes.decided(hook, Action::Refuse.name(), None);
                    return Err(ApiError::content_filter(format!(
                        "the request has {chars} characters of text, allowed by the safety hook {:?} of this model are at most {max}",
                        hook.name
                    )));
                }
                true
            }
            Check::Text(rules) if bytes <= SEARCHED_IN_PLACE_BYTES => {
                search(hook, rules, &mut texts, notes)
            }
            Check::Text(_) => {
                let (record, served, safety) =
                    (Arc::clone(record), Arc::clone(served), Arc::clone(safety));
                let mut moved = std::mem::take(&mut texts);
                let job = move |_: &mut crate::text_pool::Pause| {
                    let hook = &safety.hooks[index];
                    let Check::Text(rules) = &hook.check else {
                        return (moved, true);
                    };
                    let notes = Notes {
                        record: &record,
                        served: &served,
                    };
                    let passes = search(hook, rules, &mut moved, notes);
                    (moved, passes)
                };
                let passes;
                (texts, passes) = app.text_pool.run(bytes, job).await?;
                passes
            }
            Check::Classifier(classifier) => {
                let flagged = flags(hook, classifier, &texts.join("\n"), notes).await?;
                if flagged {
                    notes.decided(hook, Action::Refuse.name(), None);
                }
                !flagged
            }
        };
        if !passes {
            return Err(refused(hook, "the request"));
        }
    }
    Ok(texts)
}

/// Masks what is found; false if it is to be refused.
fn search(hook: &Hook, rules: &[Rule], texts: &mut [String], notes: Notes<'_>) -> bool {
    for text in texts {
        for rule in rules {
            let mut out = String::with_capacity(text.len());
            let ended = LookBack::default().push(rule, text, true, &mut out, |found| {
                let masks = hook.action == Action::Mask;
                // There is nothing yet that could be stopped.
                let action = if masks { Action::Mask } else { Action::Refuse };
                notes.decided(hook, action.name(), Some(found));
                masks
            });
            if ended {
                return false;
            }
            *text = out;
        }
    }
    true
}
