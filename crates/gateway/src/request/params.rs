//! How to generate: the fields that chat and text completions share.

use scalellm_engine_link::listener::PRIORITIES;
use serde_json::{Map, Value};

use super::fields::{Fields, FloatRange, as_integer, got, wrong};
use super::unsupported::refuse_common;
use crate::error::{ApiError, ApiResult};

pub const MAX_LOGPROBS: u32 = 20;
const MAX_N: u32 = 128;
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 1024;
const MAX_STOP_IDS: usize = 128;
const MAX_BIASES: usize = 1024;
const MAX_SALT_BYTES: usize = 64;
const MAX_DEADLINE_MS: u32 = 24 * 3600 * 1000;
/// Bounds fields whose real limit the model sets.
const MAX_TOKENS: u32 = 1 << 30;

/// Checked parameters; `None` is the engine's default.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Params {
    pub n: u32,
    pub max_tokens: Option<u32>,
    pub min_tokens: u32,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub logit_bias: Vec<(u32, f32)>,
    pub seed: Option<u64>,
    pub stop: Vec<String>,
    pub include_stop: bool,
    pub stop_token_ids: Vec<u32>,
    pub ignore_eos: bool,
    pub skip_special_tokens: bool,
    /// Alternatives for each output token.
    pub logprobs: Option<u32>,
    pub prompt_logprobs: Option<u32>,
    /// `prompt_logprobs` was not asked for by itself: `echo` needs it for the logprobs of the prompt.
    pub prompt_logprobs_for_echo: bool,
    pub return_token_ids: bool,
    /// Logprobs name tokens `token_id:7` instead of by text.
    pub tokens_as_ids: bool,
    pub priority: i32,
    pub deadline_ms: Option<u32>,
    pub cache_salt: Vec<u8>,
    /// Requests with the same one are likely to begin alike: they go to one replica where that is the policy.
    pub session: Option<String>,
    pub stream: bool,
    pub include_usage: bool,
    pub continuous_usage: bool,
    /// Longest output when `max_tokens` is absent; `None` fills the model's length.
    pub default_max_tokens: Option<u32>,
}

impl Params {
    /// Takes every shared field but `logprobs`, whose type differs between the endpoints.
    pub fn take(fields: &mut Fields) -> ApiResult<Params> {
        refuse_common(fields)?;
        let stream = fields.bool("stream")?.unwrap_or(false);
        let (include_usage, continuous_usage) = stream_options(fields, stream)?;
        let params = Params {
            n: fields.u32("n", 1, MAX_N)?.unwrap_or(1),
            max_tokens: max_tokens(fields)?,
            min_tokens: fields.u32("min_tokens", 0, MAX_TOKENS)?.unwrap_or(0),
            temperature: fields.float("temperature", FloatRange::closed(0.0, 2.0))?,
            top_p: fields.float("top_p", FloatRange::above(0.0, 1.0))?,
            // -1 is vLLM's way to say off.
            top_k: fields
                .int("top_k", -1, i64::from(u32::MAX))?
                .map(|k| u32::try_from(k).unwrap_or(0)),
            min_p: fields.float("min_p", FloatRange::closed(0.0, 1.0))?,
            repetition_penalty: fields
                .float("repetition_penalty", FloatRange::closed(0.01, 10.0))?,
            presence_penalty: fields.float("presence_penalty", FloatRange::closed(-2.0, 2.0))?,
            frequency_penalty: fields.float("frequency_penalty", FloatRange::closed(-2.0, 2.0))?,
            logit_bias: logit_bias(fields)?,
            seed: fields
                .int("seed", i64::MIN, i64::MAX)?
                .map(i64::cast_unsigned),
            stop: stops(fields)?,
            include_stop: fields.bool("include_stop_str_in_output")?.unwrap_or(false),
            stop_token_ids: fields
                .ids("stop_token_ids", MAX_STOP_IDS)?
                .unwrap_or_default(),
            ignore_eos: fields.bool("ignore_eos")?.unwrap_or(false),
            skip_special_tokens: fields.bool("skip_special_tokens")?.unwrap_or(true),
            logprobs: None,
            prompt_logprobs: fields.u32("prompt_logprobs", 0, MAX_LOGPROBS)?,
            prompt_logprobs_for_echo: false,
            return_token_ids: fields.bool("return_token_ids")?.unwrap_or(false),
            tokens_as_ids: fields.bool("return_tokens_as_token_ids")?.unwrap_or(false),
            priority: fields
                .int(
                    "priority",
                    (*PRIORITIES.start()).into(),
                    (*PRIORITIES.end()).into(),
                )?
                .and_then(|p| i32::try_from(p).ok())
                .unwrap_or(0),
            deadline_ms: fields.u32("deadline_ms", 1, MAX_DEADLINE_MS)?,
            cache_salt: cache_salt(fields)?,
            session: session(fields)?,
            stream,
            include_usage,
            continuous_usage,
            default_max_tokens: None,
        };
        if params.stream && params.prompt_logprobs.is_some() {
            let message =
                "prompt_logprobs: got a number with stream true, allowed is null when streaming";
            return Err(ApiError::field("prompt_logprobs", message));
        }
        if let Some(max_tokens) = params.max_tokens
            && params.min_tokens > max_tokens
        {
            let message = format!(
                "min_tokens: got {}, allowed is at most max_tokens, {max_tokens}",
                params.min_tokens
            );
            return Err(ApiError::field("min_tokens", message));
        }
        informative(fields)?;
        Ok(params)
    }
}

/// `prompt_cache_key`, OpenAI's word for what is likely to begin alike, or `user`.
fn session(fields: &mut Fields) -> ApiResult<Option<String>> {
    let user = fields.string("user")?;
    Ok(fields.string("prompt_cache_key")?.or(user))
}

/// Fields that say something about the request and change nothing of its answer.
fn informative(fields: &mut Fields) -> ApiResult<()> {
    for name in ["safety_identifier", "service_tier", "request_id"] {
        fields.string(name)?;
    }
    fields.object("metadata")?;
    for name in ["store", "parallel_tool_calls"] {
        fields.bool(name)?;
    }
    Ok(())
}

fn max_tokens(fields: &mut Fields) -> ApiResult<Option<u32>> {
    let old = fields.u32("max_tokens", 0, MAX_TOKENS)?;
    let new = fields.u32("max_completion_tokens", 0, MAX_TOKENS)?;
    match (old, new) {
        (Some(old), Some(new)) if old != new => Err(ApiError::field(
            "max_completion_tokens",
            format!(
                "max_completion_tokens: got {new}, allowed is the same as max_tokens, {old}, or one of them alone"
            ),
        )),
        (old, new) => Ok(new.or(old)),
    }
}

fn stream_options(fields: &mut Fields, stream: bool) -> ApiResult<(bool, bool)> {
    let Some(options) = fields.take("stream_options") else {
        return Ok((false, false));
    };
    let Value::Object(options) = options else {
        return Err(wrong("stream_options", &options, "an object"));
    };
    if !stream {
        let message =
            "stream_options: got an object without stream true, allowed is null unless streaming";
        return Err(ApiError::field("stream_options", message));
    }
    let flag = |name: &str| match options.get(name) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(other) => Err(wrong(
            &format!("stream_options.{name}"),
            other,
            "true or false",
        )),
    };
    let continuous = flag("continuous_usage_stats")?;
    Ok((flag("include_usage")? || continuous, continuous))
}

fn stops(fields: &mut Fields) -> ApiResult<Vec<String>> {
    let items = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::Array(items)) => items,
        Some(text @ Value::String(_)) => vec![text],
        Some(other) => return Err(wrong("stop", &other, "a string or a list of strings")),
    };
    if items.len() > MAX_STOPS {
        let message = format!(
            "stop: got {} strings, allowed are at most {MAX_STOPS}",
            items.len()
        );
        return Err(ApiError::field("stop", message));
    }
    let allowed = format!("a string of 1 to {MAX_STOP_BYTES} bytes");
    items
        .into_iter()
        .map(|item| match item {
            Value::String(text) if (1..=MAX_STOP_BYTES).contains(&text.len()) => Ok(text),
            other => Err(wrong("stop", &other, &allowed)),
        })
        .collect()
}

fn logit_bias(fields: &mut Fields) -> ApiResult<Vec<(u32, f32)>> {
    let biases: Map<String, Value> = fields.object("logit_bias")?.unwrap_or_default();
    if biases.len() > MAX_BIASES {
        let message = format!(
            "logit_bias: got {} entries, allowed are at most {MAX_BIASES}",
            biases.len()
        );
        return Err(ApiError::field("logit_bias", message));
    }
    biases
        .into_iter()
        .map(|(key, value)| {
            let id = key.parse::<u32>().map_err(|_| {
                let message = format!(
                    "logit_bias: got the key {}, allowed are token ids",
                    crate::error::shown(&key)
                );
                ApiError::field("logit_bias", message)
            })?;
            let bias = value
                .as_f64()
                .filter(|bias| (-100.0..=100.0).contains(bias))
                .ok_or_else(|| {
                    let message = format!(
                        "logit_bias: got {} for {id}, allowed is a number from -100 to 100",
                        got(&value)
                    );
                    ApiError::field("logit_bias", message)
                })?;
            Ok((id, bias as f32))
        })
        .collect()
}

fn cache_salt(fields: &mut Fields) -> ApiResult<Vec<u8>> {
    let salt = fields.string("cache_salt")?.unwrap_or_default();
    if salt.len() > MAX_SALT_BYTES {
        let message = format!(
            "cache_salt: got {} bytes, allowed are at most {MAX_SALT_BYTES}",
            salt.len()
        );
        return Err(ApiError::field("cache_salt", message));
    }
    Ok(salt.into_bytes())
}

/// The logprobs of text completions: a number of alternatives.
pub fn completion_logprobs(fields: &mut Fields) -> ApiResult<Option<u32>> {
    fields.u32("logprobs", 0, MAX_LOGPROBS)
}

/// The logprobs of chat completions: a switch, and a number of alternatives beside it.
pub fn chat_logprobs(fields: &mut Fields) -> ApiResult<Option<u32>> {
    let wanted = fields.bool("logprobs")?.unwrap_or(false);
    let top = fields.take("top_logprobs");
    let count = match &top {
        None => None,
        Some(value) => Some(
            as_integer(value)
                .and_then(|v| u32::try_from(v).ok())
                .filter(|v| *v <= MAX_LOGPROBS)
                .ok_or_else(|| {
                    wrong(
                        "top_logprobs",
                        value,
                        &format!("an integer from 0 to {MAX_LOGPROBS}"),
                    )
                })?,
        ),
    };
    match (wanted, count) {
        (false, Some(count)) if count > 0 => Err(ApiError::field(
            "top_logprobs",
            format!(
                "top_logprobs: got {count} without logprobs true, allowed is null unless logprobs is true"
            ),
        )),
        (false, _) => Ok(None),
        (true, count) => Ok(Some(count.unwrap_or(0))),
    }
}
