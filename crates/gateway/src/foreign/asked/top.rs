//! Which of a request's fields are read, and where they stand.

use std::ops::Range;

use scalellm_routing::{Prefixes, stable_hash};

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
    tools: Option<Range<usize>>,
    cache_salt: Option<Range<usize>>,
    messages: Option<Range<usize>>,
    prompt: Option<Range<usize>>,
    prompt_token_ids: Option<Range<usize>>,
    /// Of this it matters only that hooks look at the one that the upstream will.
    suffix: Option<Range<usize>>,
}

/// What [`Prompt`] calls `prompt_token_ids`.
const IDS: u64 = 0;

/// Where that stands which the upstream's model reads.
#[derive(Debug, Default, PartialEq)]
pub struct Prompt {
    /// Which field `text` is.
    kind: u64,
    cache_salt: Range<usize>,
    tools: Range<usize>,
    text: Range<usize>,
}

impl Prompt {
    /// It is token ids, in our own field for them or in the place of text.
    #[must_use]
    pub fn is_ids(&self, body: &[u8]) -> bool {
        let text = body.get(self.text.clone()).unwrap_or_default();
        let mut bytes = text.iter().filter(|byte| !byte.is_ascii_whitespace());
        let is_list = bytes.next() == Some(&b'[');
        // Messages are a list of objects, several prompts one of strings.
        self.kind == IDS || is_list && matches!(bytes.next(), Some(b'0'..=b'9' | b'['))
    }

    /// By which another prompt is found to begin as this one, whose places these are in `body`. A chat's template sees
    /// the tools first, or as a whole; prompts of different salts are not to find each other.
    #[must_use]
    pub fn prefixes(&self, body: &[u8]) -> Prefixes {
        let at = |place: &Range<usize>| body.get(place.clone()).unwrap_or_default();
        let kind = self.kind ^ stable_hash(at(&self.cache_salt));
        Prefixes::new(kind, at(&self.tools), at(&self.text))
    }
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

    #[must_use]
    pub fn prompt(&self, text: &str) -> Prompt {
        let kinds = [&self.prompt_token_ids, &self.messages, &self.prompt];
        let place = |place: &Option<Range<usize>>| place.clone().unwrap_or_default();
        let given = (IDS..)
            .zip(kinds.map(place))
            .find(|(_, at)| !matches!(&text[at.clone()], "" | "null"));
        let (kind, text) = given.unwrap_or((IDS + 1, 0..0));
        Prompt {
            kind,
            cache_salt: place(&self.cache_salt),
            tools: place(&self.tools),
            text,
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
            "tools" => &mut self.tools,
            "cache_salt" => &mut self.cache_salt,
            "messages" => &mut self.messages,
            "prompt" => &mut self.prompt,
            "prompt_token_ids" => &mut self.prompt_token_ids,
            "suffix" => &mut self.suffix,
            _ => return None,
        })
    }
}
