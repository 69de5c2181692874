//! The body of `/v1/chat/completions`.

use serde_json::{Map, Value};

use super::fields::Fields;
use super::messages;
use super::params::{Params, chat_logprobs};
use super::unsupported::refuse_chat;
use crate::error::{ApiError, ApiResult};
use crate::text::ChatOptions;

/// A conversation and how its template is rendered.
#[derive(Debug, Clone)]
pub struct Conversation {
    pub messages: Value,
    pub options: ChatOptions,
    /// Put the tokenizer's own special tokens around the rendered prompt; templates bring theirs.
    pub add_special_tokens: bool,
}

#[derive(Debug)]
pub enum ChatPrompt {
    Conversation(Box<Conversation>),
    /// `prompt_token_ids`, in place of messages.
    Ids(Vec<u32>),
}

#[derive(Debug)]
pub struct ChatRequest {
    pub model: Option<String>,
    pub prompt: ChatPrompt,
    pub params: Params,
    pub warning: Option<String>,
}

impl ChatRequest {
    /// # Errors
    /// 400 with the first field that is wrong.
    pub fn parse(body: &[u8]) -> ApiResult<ChatRequest> {
        let mut fields = Fields::parse(body)?;
        let model = fields.string("model")?;
        refuse_chat(&mut fields)?;
        let mut params = Params::take(&mut fields)?;
        params.logprobs = chat_logprobs(&mut fields)?;
        if params.max_tokens == Some(0) {
            return Err(ApiError::field(
                "max_tokens",
                "max_tokens: got 0, allowed is an integer of 1 or more",
            ));
        }
        let ids = fields.ids("prompt_token_ids", usize::MAX)?;
        let prompt = match ids {
            Some(ids) => {
                fields.take("messages");
                take_options(&mut fields)?;
                ChatPrompt::Ids(ids)
            }
            None => ChatPrompt::Conversation(Box::new(take_conversation(&mut fields)?)),
        };
        Ok(ChatRequest {
            model,
            prompt,
            params,
            warning: fields.unknown(),
        })
    }
}

/// Takes `messages` and everything that says how to render them.
pub fn take_conversation(fields: &mut Fields) -> ApiResult<Conversation> {
    let messages = fields
        .take("messages")
        .ok_or_else(|| super::fields::missing("messages", "a list of messages"))?;
    let messages = messages::check(messages)?;
    let (options, add_special_tokens) = take_options(fields)?;
    if options.continue_final_message && options.add_generation_prompt {
        let message = "continue_final_message: got true with add_generation_prompt true, allowed is one of them";
        return Err(ApiError::field("continue_final_message", message));
    }
    Ok(Conversation {
        messages,
        options,
        add_special_tokens,
    })
}

fn take_options(fields: &mut Fields) -> ApiResult<(ChatOptions, bool)> {
    // A template is a program: the operator's is run, a client's never.
    fields.refuse(
        "chat_template",
        "null: the server's operator chooses the template",
        |_| false,
    )?;
    let continue_final_message = fields.bool("continue_final_message")?.unwrap_or(false);
    let mut kwargs: Map<String, Value> = fields.object("chat_template_kwargs")?.unwrap_or_default();
    if let Some(effort) = fields.string("reasoning_effort")? {
        kwargs.entry("reasoning_effort").or_insert(effort.into());
    }
    let options = ChatOptions {
        add_generation_prompt: fields
            .bool("add_generation_prompt")?
            .unwrap_or(!continue_final_message),
        continue_final_message,
        template: None,
        tools: None,
        kwargs,
    };
    Ok((options, fields.bool("add_special_tokens")?.unwrap_or(false)))
}
