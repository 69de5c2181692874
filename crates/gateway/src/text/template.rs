//! Chat templates.

use serde_json::{Map, Value};

/// How a conversation is rendered.
#[derive(Clone, Debug, Default)]
pub struct ChatOptions {
    /// End with the header of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Leave the last message open, for the model to continue.
    pub continue_final_message: bool,
    /// A template, or the name of one of the model's templates; `None` is the model's default.
    pub template: Option<String>,
    /// JSON schemas of the tools.
    pub tools: Option<Value>,
    /// Further variables of the template.
    pub kwargs: Map<String, Value>,
}
