//! Which of a request's fields are read, and where they stand.

use std::ops::Range;

use super::invalid;
use crate::error::{ApiError, ApiResult};
use crate::foreign::top_level;

/// Where the values of the fields that matter here stand in the body.
#[derive(Default)]
pub struct Top {
    /// How many there are.
    pub fields: usize,
    pub model: Option<Range<usize>>,
    pub stream: Option<Range<usize>>,
    pub stream_options: Option<Range<usize>>,
    pub deadline_ms: Option<Range<usize>>,
    pub max_tokens: Option<Range<usize>>,
    pub max_completion_tokens: Option<Range<usize>>,
    pub n: Option<Range<usize>>,
    /// Of these it matters only that hooks look at the one that the upstream will.
    pub messages: Option<Range<usize>>,
    pub prompt: Option<Range<usize>>,
    pub prompt_token_ids: Option<Range<usize>>,
    pub suffix: Option<Range<usize>>,
}

impl Top {
    /// # Errors
    /// 400 for what is no JSON object, and for a field given twice: the two ends might not read the same one.
    pub fn read(text: &str) -> ApiResult<Top> {
        let mut top = Top::default();
        let mut twice = None;
        let read = top_level::fields(text, |key, place| {
            top.fields += 1;
            if let Some(field) = top.field(&key)
                && field.replace(place).is_some()
            {
                twice = Some(key.into_owned());
            }
        });
        match (read, twice) {
            (Err(error), _) => Err(invalid(error)),
            (Ok(()), Some(key)) => Err(ApiError::field(
                &key,
                format!("duplicate field: {key} is given twice"),
            )),
            (Ok(()), None) => Ok(top),
        }
    }

    fn field(&mut self, key: &str) -> Option<&mut Option<Range<usize>>> {
        Some(match key {
            "model" => &mut self.model,
            "stream" => &mut self.stream,
            "stream_options" => &mut self.stream_options,
            "deadline_ms" => &mut self.deadline_ms,
            "max_tokens" => &mut self.max_tokens,
            "max_completion_tokens" => &mut self.max_completion_tokens,
            "n" => &mut self.n,
            "messages" => &mut self.messages,
            "prompt" => &mut self.prompt,
            "prompt_token_ids" => &mut self.prompt_token_ids,
            "suffix" => &mut self.suffix,
            _ => return None,
        })
    }
}
