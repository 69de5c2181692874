//! Text on one side, token ids on the other: tokenizer, chat template, stream of ids back to text.
//!
//! ```text
//! messages --render_chat--> prompt --encode--> ids  ==> engine
//! client  <--OutputText-- Detokenizer + StopMatcher <== ids
//! ```
//!
//! Encoding and rendering are CPU work of up to many milliseconds: call them off the async threads.

mod bytes;
mod detokenizer;
mod encoder;
mod error;
mod folder;
mod json;
mod model;
mod output;
mod piece_cache;
mod pieces;
mod python;
mod rewrite;
mod steps;
mod stop;
mod stream;
mod strings;
mod template;
mod values;
mod vocabulary;
mod words;

pub use detokenizer::Detokenizer;
pub use error::TextError;
pub use model::{MAX_TEXT_BYTES, TextModel, tokenizer_digest};
pub use output::{OutputText, Piece};
pub use piece_cache::CacheCounts;
pub use stop::StopMatcher;
pub use template::ChatOptions;

#[cfg(test)]
mod tests;
