//! A model folder's tokenizer and chat template.

use std::path::Path;

use serde_json::Value;

use super::encoder::Encoder;
use super::error::TextError;
use super::folder::Folder;
use super::piece_cache::CacheCounts;
use super::stream::{Plan, Stream};
use super::template::{ChatOptions, ChatTemplates};
use super::vocabulary::Vocabulary;

pub use super::folder::tokenizer_digest;

/// The longest text that is tokenized at once.
///
/// The tokenizers' work grows in proportion to the text even when it is one giant word (about 1 s for each MB
/// with byte-level BPE, SentencePiece-style BPE and Unigram alike), so a limit on bytes is a limit on time.
pub const MAX_TEXT_BYTES: usize = 8 << 20;

/// Tokenizer and chat template of one model; shared by all its requests.
pub struct TextModel {
    encoder: Encoder,
    plan: Plan,
    vocabulary: Vocabulary,
    templates: ChatTemplates,
    eos_token_ids: Vec<u32>,
    digest: String,
}

impl TextModel {
    /// Read `folder`'s `tokenizer.json` and what belongs to it: special tokens, ends of sequence, chat templates.
    ///
    /// A chat template that does not compile is reported by [`TextModel::check_templates`] or when it is used, not
    /// here: the model can still complete, or be given another template.
    pub fn load(folder: &Path) -> Result<Self, TextError> {
        let folder = Folder::open(folder)?;
        let (mut tokenizer, digest) = folder.tokenizer()?;
        // Requests are never cut or filled up behind the client's back.
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|e| TextError::Unsupported(e.to_string()))?;
        let plan = Plan::new(tokenizer.get_decoder())?;
        let vocabulary = Vocabulary::new(&tokenizer, &plan)?;
        let eos_token_ids = folder.eos_token_ids(|token| tokenizer.token_to_id(token))?;
        let templates = ChatTemplates::new(folder.chat_templates()?, folder.special_tokens()?);
        Ok(Self {
            encoder: Encoder::new(tokenizer),
            plan,
            vocabulary,
            templates,
            eos_token_ids,
            digest,
        })
    }

    /// Token ids of `text`; `add_special` puts the model's own first and last tokens around it.
    ///
    /// Errors: [`TextError::TooLong`] above [`MAX_TEXT_BYTES`].
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        self.encode_with_pauses(text, add_special, &mut || ())
    }

    /// As [`TextModel::encode`], with `pause` called where something shorter may be done in between: after every few
    /// KB of new text where the tokenizer allows it.
    pub fn encode_with_pauses(
        &self,
        text: &str,
        add_special: bool,
        pause: &mut dyn FnMut(),
    ) -> Result<Vec<u32>, TextError> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(TextError::TooLong {
                bytes: text.len(),
                limit: MAX_TEXT_BYTES,
            });
        }
        self.encoder.encode(text, add_special, pause)
    }

    /// Hold the ids of texts seen before in at most `bytes`, from now on.
    pub fn limit_cache(&mut self, bytes: usize) {
        self.encoder.limit_cache(bytes);
    }

    /// How much of the encoded text was seen before.
    pub fn cache_counts(&self) -> CacheCounts {
        self.encoder.cache_counts()
    }

    /// Text of `ids`; ids outside the vocabulary add nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut stream = Stream::new(&self.plan);
        let mut text = String::new();
        for piece in ids.iter().filter_map(|&id| self.piece(id, skip_special)) {
            stream.push(piece, &mut text);
        }
        stream.finish(&mut text);
        text
    }

    /// One token for a logprobs answer: how it reads within a text, and its bytes.
    ///
    /// A token that is part of a character has its true bytes, and U+FFFD as its text. An id outside the
    /// vocabulary is empty.
    pub fn token_text(&self, id: u32) -> (String, Vec<u8>) {
        let Some(piece) = self.piece(id, false) else {
            return (String::new(), Vec::new());
        };
        let bytes = match self.plan.fallback_byte(piece) {
            Some(byte) => vec![byte],
            None if self.plan.is_byte_level() => piece.to_vec(),
            None => {
                let mut text = String::new();
                let mut stream = Stream::within_text(&self.plan);
                stream.push(piece, &mut text);
                stream.finish(&mut text);
                text.into_bytes()
            }
        };
        (String::from_utf8_lossy(&bytes).into_owned(), bytes)
    }

    /// The prompt for `messages`, a JSON array of messages, as transformers' `apply_chat_template` renders it.
    pub fn render_chat(
        &self,
        messages: &Value,
        options: &ChatOptions,
    ) -> Result<String, TextError> {
        self.templates.render(messages, options)
    }

    /// Errors: [`TextError::TemplateSyntax`] for the first of the model's templates that does not compile.
    pub fn check_templates(&self) -> Result<(), TextError> {
        self.templates.check()
    }

    /// Put `source` in the place of the model's own chat templates.
    ///
    /// Errors: [`TextError::TemplateSyntax`] if it does not compile.
    pub fn replace_templates(&mut self, source: String) -> Result<(), TextError> {
        self.templates = self.templates.replaced(source)?;
        Ok(())
    }

    /// Whether the model brought a chat template.
    pub fn has_chat_template(&self) -> bool {
        !self.templates.is_empty()
    }

    /// One more than the highest token id.
    pub fn vocab_size(&self) -> usize {
        self.vocabulary.len()
    }

    /// The id of a token's string, such as `</s>`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.encoder.tokenizer().token_to_id(token)
    }

    /// Ids that end a generation, from `generation_config.json`, `config.json` or the tokenizer's `eos_token`.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
    }

    /// Hex SHA-256 of what decides the ids: engines and gateways with equal digests agree on them.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The library's own tokenizer, to compare with.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn library(&self) -> &tokenizers::Tokenizer {
        self.encoder.tokenizer()
    }

    pub(super) fn plan(&self) -> &Plan {
        &self.plan
    }

    pub(super) fn piece(&self, id: u32, skip_special: bool) -> Option<&[u8]> {
        self.vocabulary.piece(id, skip_special)
    }
}
