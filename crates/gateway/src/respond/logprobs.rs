//! Log-probabilities in the three forms that clients know.

use scalellm_engine_link::proto::TokenLogprobs;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::text::TextModel;

/// Names tokens as the client wants them.
#[derive(Clone, Copy)]
pub struct TokenNames<'a> {
    pub text: &'a TextModel,
    pub as_ids: bool,
    /// Special tokens are left out of the text.
    pub skip_special: bool,
}

impl TokenNames<'_> {
    /// Whether the token is left out of the text.
    fn is_hidden(&self, id: u32) -> bool {
        self.skip_special
            && self.text.decode(&[id], true).is_empty()
            && !self.text.decode(&[id], false).is_empty()
    }

    fn name(&self, id: u32) -> (String, Vec<u8>) {
        let (text, bytes) = self.text.token_text(id);
        if self.as_ids {
            (format!("token_id:{id}"), bytes)
        } else {
            (text, bytes)
        }
    }
}

/// OpenAI's chat form.
#[derive(Debug, Default, Serialize)]
pub struct ChatLogprobs {
    content: Vec<ChatToken>,
    refusal: Option<()>,
}

#[derive(Debug, Serialize)]
struct ChatToken {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
    top_logprobs: Vec<ChatTopToken>,
}

#[derive(Debug, Serialize)]
struct ChatTopToken {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

/// JSON has no infinity; OpenAI sends this for what is next to impossible.
const IMPOSSIBLE: f32 = -9999.0;

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() {
        logprob.max(IMPOSSIBLE)
    } else {
        IMPOSSIBLE
    }
}

/// A JSON number with the f32's own digits: `json!` would widen it and print digits that it does not have.
fn number(logprob: f32) -> Value {
    logprob
        .to_string()
        .parse::<f64>()
        .map_or(Value::Null, Value::from)
}

fn tops(token: &TokenLogprobs) -> impl Iterator<Item = (u32, f32)> + '_ {
    token
        .top_ids
        .iter()
        .copied()
        .zip(token.top_logprobs.iter().copied().map(finite))
}

impl ChatLogprobs {
    pub fn extend(&mut self, tokens: &[TokenLogprobs], names: TokenNames<'_>) {
        self.content.extend(tokens.iter().map(|token| {
            let (text, bytes) = names.name(token.token_id);
            let top_logprobs = tops(token)
                .map(|(id, logprob)| {
                    let (token, bytes) = names.name(id);
                    ChatTopToken {
                        token,
                        logprob,
                        bytes,
                    }
                })
                .collect();
            ChatToken {
                token: text,
                logprob: finite(token.logprob),
                bytes,
                top_logprobs,
            }
        }));
    }
}

/// OpenAI's form for text completions: four lists of equal length.
#[derive(Debug, Default, Serialize)]
pub struct CompletionLogprobs {
    /// Where each token begins, in characters of the choice's text.
    text_offset: Vec<usize>,
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<String>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
}

impl CompletionLogprobs {
    /// Adds tokens; `offset` is where the first begins, and is moved past the last.
    pub fn extend(&mut self, tokens: &[TokenLogprobs], names: TokenNames<'_>, offset: &mut usize) {
        for token in tokens {
            let (text, top) = (token.token_id, top_map(token, names));
            self.push(text, Some(finite(token.logprob)), Some(top), names, offset);
        }
    }

    /// Adds a prompt whose first token nothing predicted.
    pub fn extend_prompt(
        &mut self,
        ids: &[u32],
        logprobs: &[TokenLogprobs],
        names: TokenNames<'_>,
        offset: &mut usize,
    ) {
        for (position, id) in ids.iter().enumerate() {
            match logprobs.get(position).filter(|_| position > 0) {
                Some(token) => {
                    self.push(
                        *id,
                        Some(finite(token.logprob)),
                        Some(top_map(token, names)),
                        names,
                        offset,
                    );
                }
                None => self.push(*id, None, None, names, offset),
            }
        }
    }

    fn push(
        &mut self,
        id: u32,
        logprob: Option<f32>,
        top: Option<Map<String, Value>>,
        names: TokenNames<'_>,
        offset: &mut usize,
    ) {
        self.text_offset.push(*offset);
        let (name, bytes) = names.name(id);
        if !names.is_hidden(id) {
            // Where characters begin: one that is spread over several tokens counts with the first.
            *offset += bytes.iter().filter(|byte| **byte & 0xc0 != 0x80).count();
        }
        self.tokens.push(name);
        self.token_logprobs.push(logprob);
        self.top_logprobs.push(top);
    }
}

/// The alternatives, with the token itself among them. Of those that read the same the likeliest counts.
fn top_map(token: &TokenLogprobs, names: TokenNames<'_>) -> Map<String, Value> {
    let mut map = Map::new();
    for (id, logprob) in tops(token).chain([(token.token_id, finite(token.logprob))]) {
        map.entry(names.name(id).0)
            .or_insert_with(|| number(logprob));
    }
    map
}

/// vLLM's `prompt_logprobs`: for each position null, or alternatives by token id.
#[must_use]
pub fn prompt_logprobs(ids: &[u32], logprobs: &[TokenLogprobs], names: TokenNames<'_>) -> Value {
    let position = |(position, id): (usize, &u32)| match logprobs
        .get(position)
        .filter(|_| position > 0)
    {
        None => Value::Null,
        Some(token) => {
            let entry = |id: u32, logprob: f32, rank: usize| json!({"logprob": number(finite(logprob)), "rank": rank, "decoded_token": names.name(id).0});
            let mut map: Map<String, Value> = Map::new();
            map.insert(
                id.to_string(),
                entry(*id, token.logprob, token.rank as usize),
            );
            for (index, (top, logprob)) in tops(token).enumerate() {
                map.entry(top.to_string())
                    .or_insert_with(|| entry(top, logprob, index + 1));
            }
            Value::Object(map)
        }
    };
    ids.iter().enumerate().map(position).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_the_same_typed_and_untyped() {
        for logprob in [-1.839_466_1_f32, -1.933_216_1, 0.0, -1e-7, IMPOSSIBLE, -0.1] {
            let typed: f64 = serde_json::to_string(&logprob).unwrap().parse().unwrap();
            assert_eq!(number(logprob), json!(typed), "{logprob}");
        }
        assert_eq!(number(-1.839_466_1).to_string(), "-1.8394661");
    }
}
