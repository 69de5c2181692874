//! A model folder's tokenizer and chat template.

use std::path::Path;

use serde_json::Value;
use tokenizers::Tokenizer;

use super::error::TextError;
use super::template::ChatOptions;

/// Tokenizer and chat template of one model; shared by all its requests.
pub struct TextModel {
    tokenizer: Tokenizer,
    eos_token_ids: Vec<u32>,
}

impl TextModel {
    /// Read `folder`'s `tokenizer.json` and what belongs to it.
    pub fn load(folder: &Path) -> Result<Self, TextError> {
        let path = folder.join("tokenizer.json");
        let tokenizer = Tokenizer::from_file(&path).map_err(|e| TextError::Damaged {
            path,
            reason: e.to_string(),
        })?;
        Ok(Self {
            tokenizer,
            eos_token_ids: Vec::new(),
        })
    }

    /// Token ids of `text`; `add_special` puts the model's own first and last tokens around it.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        let encoding = self
            .tokenizer
            .encode_fast(text, add_special)
            .map_err(|e| TextError::Encode(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `ids`; ids outside the vocabulary add nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        self.tokenizer.decode(ids, skip_special).unwrap_or_default()
    }

    /// One token for a logprobs answer: how it reads alone, and its bytes.
    pub fn token_text(&self, id: u32) -> (String, Vec<u8>) {
        let text = self.decode(&[id], false);
        let bytes = text.clone().into_bytes();
        (text, bytes)
    }

    /// The prompt for `messages`, a JSON array.
    pub fn render_chat(
        &self,
        messages: &Value,
        options: &ChatOptions,
    ) -> Result<String, TextError> {
        let _ = (messages, options);
        Err(TextError::NoTemplate)
    }

    /// Whether the model brought a chat template.
    pub fn has_chat_template(&self) -> bool {
        false
    }

    /// One more than the highest token id.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// Ids that end a generation.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
    }

    /// Hex SHA-256 of what decides the ids.
    pub fn digest(&self) -> &str {
        ""
    }
}

/// [`TextModel::digest`] of a folder, without loading the tokenizer.
pub fn tokenizer_digest(folder: &Path) -> Result<String, TextError> {
    let _ = folder;
    Ok(String::new())
}
