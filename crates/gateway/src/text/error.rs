//! What can go wrong between text and token ids.
//!
//! ```text
//! TextError
//! ├── Missing          a folder or file that is needed is not there
//! ├── SlowTokenizer    only files of a slow tokenizer; says how to convert
//! ├── Damaged          a file is there but cannot be read
//! ├── Unsupported      a tokenizer that cannot be streamed exactly
//! ├── TooLong          text that no context could hold
//! ├── Encode           the tokenizer refused the text
//! ├── NoTemplate       the model has no chat template
//! ├── Messages         messages or template arguments of the wrong shape
//! ├── TemplateSyntax   a chat template does not compile
//! ├── TemplateRaised   the chat template refused the conversation (raise_exception)
//! └── Template         the chat template failed, or ran past its limits
//! ```

use std::path::PathBuf;

/// An error of loading, encoding or rendering; its message is fit for a client.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// A folder or file that is needed is not there.
    #[error("{path}: {what}", path = .path.display())]
    Missing {
        /// What was looked for.
        path: PathBuf,
        /// What it is needed for.
        what: String,
    },
    /// The folder has files of a slow (Python) tokenizer only.
    #[error(
        "{folder} has {found} but no tokenizer.json, which is needed; convert it once with: \
         python -c \"from transformers import AutoTokenizer; \
         AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')\"",
        folder = .folder.display()
    )]
    SlowTokenizer {
        /// The model's folder.
        folder: PathBuf,
        /// The slow tokenizer's file.
        found: &'static str,
    },
    /// A file is there but cannot be read or understood.
    #[error("{path} is damaged: {reason}", path = .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why it cannot be used.
        reason: String,
    },
    /// The tokenizer's decoder has no streaming form that equals whole-text decoding.
    #[error("the tokenizer's decoder cannot be streamed: {0}")]
    Unsupported(String),
    /// Text longer than the limit on one encoding.
    #[error("the text has {bytes} bytes; at most {limit} are tokenized at once")]
    TooLong {
        /// Length of the text.
        bytes: usize,
        /// The most that is allowed.
        limit: usize,
    },
    /// The tokenizer refused the text.
    #[error("the text cannot be tokenized: {0}")]
    Encode(String),
    /// The model has no chat template and none was given.
    #[error(
        "the model has no chat template, so it cannot take chat messages; \
         give one with --chat-template, or use /v1/completions"
    )]
    NoTemplate,
    /// Messages or template arguments of the wrong shape.
    #[error("{0}")]
    Messages(String),
    /// A chat template does not compile.
    #[error("the chat template {name:?} does not compile: {reason}")]
    TemplateSyntax {
        /// The template's name; a model's only one is `default`.
        name: String,
        /// What is wrong, and in which line.
        reason: String,
    },
    /// The chat template refused the conversation, with this reason.
    #[error("the chat template refused the messages: {0}")]
    TemplateRaised(String),
    /// The chat template failed, or ran past its limits.
    #[error("the chat template failed: {0}")]
    Template(String),
}
