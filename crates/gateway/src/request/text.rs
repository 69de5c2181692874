//! The bodies of `/tokenize` and `/detokenize`, in vLLM's shapes.

use super::chat::{Conversation, take_conversation};
use super::fields::{Fields, missing};
use crate::error::{ApiError, ApiResult};

#[derive(Debug)]
pub enum TokenizePrompt {
    Text {
        text: String,
        add_special_tokens: bool,
    },
    Conversation(Box<Conversation>),
}

#[derive(Debug)]
pub struct TokenizeRequest {
    /// May be left out where one model is served.
    pub model: Option<String>,
    pub prompt: TokenizePrompt,
    pub return_token_strs: bool,
    pub warning: Option<String>,
}

impl TokenizeRequest {
    /// # Errors
    /// 400 with the first field that is wrong.
    pub fn parse(body: &[u8]) -> ApiResult<TokenizeRequest> {
        let mut fields = Fields::parse(body)?;
        let model = fields.string("model")?;
        let return_token_strs = fields.bool("return_token_strs")?.unwrap_or(false);
        fields.refuse("tools", "an empty list or null", |value| {
            value.as_array().is_some_and(Vec::is_empty)
        })?;
        let prompt = match fields.string("prompt")? {
            Some(text) => {
                if fields.take("messages").is_some() {
                    return Err(ApiError::field(
                        "messages",
                        "messages: got it beside prompt, allowed is one of them",
                    ));
                }
                let add_special_tokens = fields.bool("add_special_tokens")?.unwrap_or(true);
                TokenizePrompt::Text {
                    text,
                    add_special_tokens,
                }
            }
            None => TokenizePrompt::Conversation(Box::new(
                take_conversation(&mut fields).map_err(|error| {
                    let neither = error.message.starts_with("messages: missing");
                    if neither {
                        missing("prompt", "a string, or messages in its place")
                    } else {
                        error
                    }
                })?,
            )),
        };
        Ok(TokenizeRequest {
            model,
            prompt,
            return_token_strs,
            warning: fields.unknown(),
        })
    }
}

#[derive(Debug)]
pub struct DetokenizeRequest {
    pub model: Option<String>,
    pub tokens: Vec<u32>,
    pub warning: Option<String>,
}

impl DetokenizeRequest {
    /// # Errors
    /// 400 with the first field that is wrong.
    pub fn parse(body: &[u8]) -> ApiResult<DetokenizeRequest> {
        let mut fields = Fields::parse(body)?;
        let model = fields.string("model")?;
        let tokens = fields
            .ids("tokens", usize::MAX)?
            .ok_or_else(|| missing("tokens", "a list of token ids"))?;
        Ok(DetokenizeRequest {
            model,
            tokens,
            warning: fields.unknown(),
        })
    }
}
