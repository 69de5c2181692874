//! The limits of every field of a Submit. What passes here cannot make the loop or a kernel read out of range.

use std::fmt::Display;
use std::ops::RangeInclusive;

use super::EngineInfo;
use crate::proto::{self, Refusal, RefusalCode};

pub const MAX_TRACE_ID_BYTES: usize = 128;
pub const MAX_CACHE_SALT_BYTES: usize = 64;
pub const MAX_STOP_TOKEN_IDS: usize = 1_024;
pub const MAX_LOGIT_BIASES: usize = 1_024;
pub const MAX_LOGPROBS: u32 = 20;
pub const MAX_CHOICE: u32 = 1_023;
pub const PRIORITIES: RangeInclusive<i32> = -1_000_000..=1_000_000;
pub const MAX_DEADLINE_MS: u32 = 7 * 24 * 3_600 * 1_000;
pub const MAX_TEMPERATURE: f32 = 100.0;
pub const MAX_REPETITION_PENALTY: f32 = 100.0;

fn invalid(field: &str, got: impl Display, allowed: impl Display) -> Refusal {
    Refusal {
        request: None,
        code: RefusalCode::Invalid as i32,
        field: field.to_owned(),
        message: format!("{field} is {got}; allowed is {allowed}"),
    }
}

/// Checks everything but the ids that later PromptChunks bring (see [`validate_ids`]). The refusal names the field,
/// what it got and what is allowed; its `request` is left to the caller.
pub fn validate(submit: &proto::Submit, info: &EngineInfo) -> Result<(), Refusal> {
    lengths(submit, info)?;
    validate_ids("prompt_ids", &submit.prompt_ids, info.vocab_size)?;
    validate_ids("resume_ids", &submit.resume_ids, info.vocab_size)?;
    at_most(
        "stop_token_ids",
        "ids",
        submit.stop_token_ids.len(),
        MAX_STOP_TOKEN_IDS,
    )?;
    validate_ids("stop_token_ids", &submit.stop_token_ids, info.vocab_size)?;
    at_most(
        "trace_id",
        "bytes",
        submit.trace_id.len(),
        MAX_TRACE_ID_BYTES,
    )?;
    if submit.trace_id.chars().any(char::is_control) {
        return Err(invalid(
            "trace_id",
            format!("{:?}", submit.trace_id),
            "text without control characters",
        ));
    }
    at_most(
        "cache_salt",
        "bytes",
        submit.cache_salt.len(),
        MAX_CACHE_SALT_BYTES,
    )?;
    if !PRIORITIES.contains(&submit.priority) {
        let allowed = format!("{} to {}", PRIORITIES.start(), PRIORITIES.end());
        return Err(invalid("priority", submit.priority, allowed));
    }
    if let Some(deadline_ms) = submit.deadline_ms
        && !(1..=MAX_DEADLINE_MS).contains(&deadline_ms)
    {
        return Err(invalid(
            "deadline_ms",
            deadline_ms,
            format!("1 to {MAX_DEADLINE_MS}"),
        ));
    }
    if i64::try_from(submit.arrival_us).is_err() {
        return Err(invalid(
            "arrival_us",
            submit.arrival_us,
            format!("0 to {}", i64::MAX),
        ));
    }
    if submit.choice > MAX_CHOICE {
        return Err(invalid(
            "choice",
            submit.choice,
            format!("0 to {MAX_CHOICE}"),
        ));
    }
    alternatives("prompt_logprobs", submit.prompt_logprobs, info)?;
    sampling(
        submit
            .sampling
            .as_ref()
            .unwrap_or(&proto::Sampling::default()),
        info,
    )
}

/// Ids below the vocabulary's size.
pub fn validate_ids(field: &str, ids: &[u32], vocab_size: u32) -> Result<(), Refusal> {
    match ids.iter().position(|&id| id >= vocab_size) {
        None => Ok(()),
        Some(at) => Err(invalid(
            &format!("{field}[{at}]"),
            ids[at],
            format!("0 to {}", vocab_size - 1),
        )),
    }
}

fn lengths(submit: &proto::Submit, info: &EngineInfo) -> Result<(), Refusal> {
    if submit.request.is_none_or(|request| request.id == 0) {
        return Err(invalid(
            "request",
            "missing or has id 0",
            "an id from 1, unique in the session",
        ));
    }
    let max_model_len = info.max_model_len;
    if submit.prompt_tokens == 0 || submit.prompt_tokens >= max_model_len {
        let allowed = format!(
            "1 to {} (max_model_len is {max_model_len})",
            max_model_len - 1
        );
        return Err(invalid("prompt_tokens", submit.prompt_tokens, allowed));
    }
    if submit.prompt_ids.len() > submit.prompt_tokens as usize {
        return Err(too_many_ids(submit.prompt_ids.len(), submit.prompt_tokens));
    }
    let room = max_model_len - submit.prompt_tokens;
    if submit.max_tokens == 0 || submit.max_tokens > room {
        let allowed = format!(
            "1 to {room} ({} prompt tokens, max_model_len is {max_model_len})",
            submit.prompt_tokens
        );
        return Err(invalid("max_tokens", submit.max_tokens, allowed));
    }
    if submit.min_tokens > submit.max_tokens {
        return Err(invalid(
            "min_tokens",
            submit.min_tokens,
            format!("0 to max_tokens, {}", submit.max_tokens),
        ));
    }
    if submit.resume_ids.len() >= submit.max_tokens as usize {
        let got = format!("{} ids long", submit.resume_ids.len());
        return Err(invalid(
            "resume_ids",
            got,
            format!("fewer than max_tokens, {}", submit.max_tokens),
        ));
    }
    Ok(())
}

/// More ids than `prompt_tokens` announced.
pub(super) fn too_many_ids(got: usize, announced: u32) -> Refusal {
    invalid(
        "prompt_ids",
        format!("at least {got} ids long"),
        format!("the announced {announced}"),
    )
}

fn sampling(sampling: &proto::Sampling, info: &EngineInfo) -> Result<(), Refusal> {
    within(
        "sampling.temperature",
        sampling.temperature,
        0.0..=MAX_TEMPERATURE,
    )?;
    within("sampling.top_p", sampling.top_p, f32::MIN_POSITIVE..=1.0)?;
    within("sampling.min_p", sampling.min_p, 0.0..=1.0)?;
    within(
        "sampling.repetition_penalty",
        sampling.repetition_penalty,
        0.01..=MAX_REPETITION_PENALTY,
    )?;
    within(
        "sampling.presence_penalty",
        sampling.presence_penalty,
        -2.0..=2.0,
    )?;
    within(
        "sampling.frequency_penalty",
        sampling.frequency_penalty,
        -2.0..=2.0,
    )?;
    at_most(
        "sampling.logit_bias",
        "entries",
        sampling.logit_bias.len(),
        MAX_LOGIT_BIASES,
    )?;
    for (at, entry) in sampling.logit_bias.iter().enumerate() {
        if entry.token_id >= info.vocab_size {
            let field = format!("sampling.logit_bias[{at}].token_id");
            return Err(invalid(
                &field,
                entry.token_id,
                format!("0 to {}", info.vocab_size - 1),
            ));
        }
        if !(-100.0..=100.0).contains(&entry.bias) {
            return Err(invalid(
                &format!("sampling.logit_bias[{at}].bias"),
                entry.bias,
                "-100 to 100",
            ));
        }
    }
    alternatives("sampling.logprobs", sampling.logprobs, info)
}

/// NaN lies in no range.
fn within(field: &str, value: Option<f32>, range: RangeInclusive<f32>) -> Result<(), Refusal> {
    match value {
        Some(value) if !range.contains(&value) => Err(invalid(
            field,
            value,
            format!("{} to {}", range.start(), range.end()),
        )),
        _ => Ok(()),
    }
}

fn at_most(field: &str, unit: &str, got: usize, limit: usize) -> Result<(), Refusal> {
    if got > limit {
        return Err(invalid(
            field,
            format!("{got} {unit} long"),
            format!("at most {limit}"),
        ));
    }
    Ok(())
}

fn alternatives(field: &str, count: Option<u32>, info: &EngineInfo) -> Result<(), Refusal> {
    let limit = MAX_LOGPROBS.min(info.vocab_size);
    match count {
        Some(count) if count > limit => Err(invalid(field, count, format!("0 to {limit}"))),
        _ => Ok(()),
    }
}
