//! The body of `/v1/completions`.

use serde_json::Value;

use super::Prompt;
use super::fields::{Fields, missing, token_ids, wrong};
use super::params::{Params, completion_logprobs};
use super::unsupported::refuse_completions;
use crate::error::{ApiError, ApiResult};

/// Prompts of one request, times `n`, at most.
pub const MAX_CHOICES: usize = 1024;
/// OpenAI's default length of a completion.
const DEFAULT_MAX_TOKENS: u32 = 16;

#[derive(Debug)]
pub struct CompletionRequest {
    pub model: Option<String>,
    pub prompts: Vec<Prompt>,
    /// The field that the prompts came in.
    pub prompt_field: &'static str,
    pub add_special_tokens: bool,
    pub echo: bool,
    pub params: Params,
    pub warning: Option<String>,
}

impl CompletionRequest {
    /// # Errors
    /// 400 with the first field that is wrong.
    pub fn parse(body: &[u8]) -> ApiResult<CompletionRequest> {
        let mut fields = Fields::parse(body)?;
        let model = fields.string("model")?;
        refuse_completions(&mut fields)?;
        let mut params = Params::take(&mut fields)?;
        params.logprobs = completion_logprobs(&mut fields)?;
        params.default_max_tokens = Some(DEFAULT_MAX_TOKENS);
        let echo = fields.bool("echo")?.unwrap_or(false);
        if echo && params.logprobs.is_some() && params.prompt_logprobs.is_none() {
            params.prompt_logprobs = params.logprobs;
            params.prompt_logprobs_for_echo = true;
        }
        let add_special_tokens = fields.bool("add_special_tokens")?.unwrap_or(true);
        if params.max_tokens == Some(0) && !echo {
            let message =
                "max_tokens: got 0, allowed is an integer of 1 or more, or 0 with echo true";
            return Err(ApiError::field("max_tokens", message));
        }
        if params.min_tokens > DEFAULT_MAX_TOKENS && params.max_tokens.is_none() {
            let message = format!(
                "min_tokens: got {}, allowed is at most max_tokens, {DEFAULT_MAX_TOKENS} by default",
                params.min_tokens
            );
            return Err(ApiError::field("min_tokens", message));
        }
        let (prompt_field, prompts) = match fields.ids("prompt_token_ids", usize::MAX)? {
            Some(ids) => {
                fields.take("prompt");
                ("prompt_token_ids", vec![Prompt::Ids(ids)])
            }
            None => {
                let given = fields.take("prompt");
                let given = given.ok_or_else(|| missing("prompt", ALLOWED))?;
                ("prompt", prompts(given)?)
            }
        };
        let choices = prompts.len() * params.n as usize;
        if choices > MAX_CHOICES {
            let message = format!(
                "prompt: got {} prompts with n {}, allowed are at most {MAX_CHOICES} choices",
                prompts.len(),
                params.n
            );
            return Err(ApiError::field("prompt", message));
        }
        Ok(CompletionRequest {
            model,
            prompts,
            prompt_field,
            add_special_tokens,
            echo,
            params,
            warning: fields.unknown(),
        })
    }
}

const ALLOWED: &str = "a string, a list of strings, a list of token ids, or a list of such lists";

fn prompts(value: Value) -> ApiResult<Vec<Prompt>> {
    match value {
        Value::String(text) => Ok(vec![Prompt::Text(text)]),
        Value::Array(items) => match items.first() {
            None => Err(ApiError::field(
                "prompt",
                format!("prompt: got an empty list, allowed is {ALLOWED}"),
            )),
            Some(Value::Number(_)) => Ok(vec![Prompt::Ids(token_ids(
                "prompt",
                Value::Array(items),
                usize::MAX,
            )?)]),
            Some(_) if items.len() > MAX_CHOICES => {
                let message = format!(
                    "prompt: got {} prompts, allowed are at most {MAX_CHOICES}",
                    items.len()
                );
                Err(ApiError::field("prompt", message))
            }
            Some(_) => items
                .into_iter()
                .enumerate()
                .map(|(index, item)| one(index, item))
                .collect(),
        },
        other => Err(wrong("prompt", &other, ALLOWED)),
    }
}

fn one(index: usize, item: Value) -> ApiResult<Prompt> {
    let place = format!("prompt[{index}]");
    match item {
        Value::String(text) => Ok(Prompt::Text(text)),
        list @ Value::Array(_) => Ok(Prompt::Ids(token_ids(&place, list, usize::MAX)?)),
        other => Err(wrong(&place, &other, "a string or a list of token ids")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(prompt: &str) -> ApiResult<Vec<Prompt>> {
        let body = format!(r#"{{"model": "m", "prompt": {prompt}}}"#);
        CompletionRequest::parse(body.as_bytes()).map(|request| request.prompts)
    }

    #[test]
    fn all_four_forms_of_a_prompt_are_understood() {
        let text = |t: &str| Prompt::Text(t.to_owned());
        assert_eq!(parse(r#""a""#).unwrap(), [text("a")]);
        assert_eq!(parse(r#"["a", "b"]"#).unwrap(), [text("a"), text("b")]);
        assert_eq!(parse("[1, 2]").unwrap(), [Prompt::Ids(vec![1, 2])]);
        assert_eq!(
            parse("[[1], [2, 3]]").unwrap(),
            [Prompt::Ids(vec![1]), Prompt::Ids(vec![2, 3])]
        );
        assert_eq!(
            parse(r#"["a", [2]]"#).unwrap(),
            [text("a"), Prompt::Ids(vec![2])]
        );
    }

    #[test]
    fn other_forms_are_refused_by_place() {
        for (prompt, field) in [
            ("3", "prompt"),
            ("[]", "prompt"),
            ("[1, -1]", "prompt[1]"),
            ("[[1], 2]", "prompt[1]"),
            ("[{}]", "prompt[0]"),
        ] {
            assert_eq!(
                parse(prompt).unwrap_err().param.as_deref(),
                Some(field),
                "{prompt}"
            );
        }
    }
}
