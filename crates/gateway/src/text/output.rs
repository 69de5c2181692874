//! One request's output: ids in, text for the client out.

use std::ops::Range;
use std::sync::Arc;

use super::detokenizer::Detokenizer;
use super::model::TextModel;

/// What one push released.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// Text for the client; may be empty.
    pub text: String,
    /// Output tokens (counted from 0) whose text is now out entirely.
    pub tokens: Range<usize>,
    /// The stop string that ended the output, the first time it is met.
    pub stopped: Option<String>,
}

/// Detokenises one choice of a request and ends it at a stop string.
pub struct OutputText {
    detokenizer: Detokenizer,
    tokens: usize,
}

impl OutputText {
    /// `prompt_ids` may be the whole prompt or its tail; empty stop strings are ignored.
    pub fn new(
        model: &Arc<TextModel>,
        prompt_ids: &[u32],
        stop: Vec<String>,
        skip_special: bool,
        include_stop: bool,
    ) -> Self {
        let _ = (stop, include_stop);
        Self {
            detokenizer: Detokenizer::new(Arc::clone(model), prompt_ids, skip_special),
            tokens: 0,
        }
    }

    /// Stop strings that are complete within the first `tokens` output tokens do not stop.
    #[must_use]
    pub fn with_min_tokens(self, tokens: usize) -> Self {
        let _ = tokens;
        self
    }

    /// Text that `ids` release. After a stop nothing more comes.
    pub fn push(&mut self, ids: &[u32]) -> Piece {
        let start = self.tokens;
        self.tokens += ids.len();
        Piece {
            text: self.detokenizer.push(ids),
            tokens: start..self.tokens,
            stopped: None,
        }
    }

    /// What was held back, once no more ids come.
    pub fn finish(&mut self) -> Piece {
        Piece {
            text: self.detokenizer.finish(),
            tokens: self.tokens..self.tokens,
            stopped: None,
        }
    }
}
