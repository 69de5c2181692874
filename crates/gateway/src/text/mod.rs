//! Text on one side, token ids on the other: tokenizer, chat template, stream of ids back to text.
//!
//! ```text
//! messages --render_chat--> prompt --encode--> ids  ==> engine
//! client  <--OutputText-- Detokenizer + StopMatcher <== ids
//! ```
//!
//! Encoding and rendering are CPU work of up to many milliseconds: call them off the async threads.

mod detokenizer;
mod error;
mod model;
mod output;
mod template;

pub use detokenizer::Detokenizer;
pub use error::TextError;
pub use model::{TextModel, tokenizer_digest};
pub use output::{OutputText, Piece};
pub use template::ChatOptions;
