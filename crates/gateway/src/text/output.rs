//! One choice's output: ids in, text for the client out.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use super::detokenizer::Detokenizer;
use super::model::TextModel;
use super::stop::StopMatcher;

/// What one push released.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// Text for the client; may be empty.
    pub text: String,
    /// Output tokens (counted from 0) that are settled now: their text is out entirely, or cut by the stop string.
    pub tokens: Range<usize>,
    /// The stop string that this push met; nothing comes after it.
    pub stopped: Option<String>,
}

/// Detokenises one choice of a request and ends it at a stop string.
pub struct OutputText {
    detokenizer: Detokenizer,
    stop: StopMatcher,
    min_tokens: usize,
    /// Output tokens pushed, and settled.
    pushed: usize,
    settled: usize,
    /// Bytes of text that came from the detokeniser.
    text_bytes: usize,
    /// Tokens whose text waits behind a possible stop string: (tokens up to here, where their text ends).
    waiting: VecDeque<(usize, usize)>,
    stopped: bool,
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
        Self {
            detokenizer: Detokenizer::new(Arc::clone(model), prompt_ids, skip_special),
            stop: StopMatcher::new(stop, include_stop),
            min_tokens: 0,
            pushed: 0,
            settled: 0,
            text_bytes: 0,
            waiting: VecDeque::new(),
            stopped: false,
        }
    }

    /// Stop strings that are complete within the first `tokens` output tokens do not stop.
    #[must_use]
    pub fn with_min_tokens(mut self, tokens: usize) -> Self {
        self.min_tokens = tokens;
        self
    }

    /// Whether a stop string was met.
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Text that `ids` release. Ids after the one that completes a stop string are dropped.
    pub fn push(&mut self, ids: &[u32]) -> Piece {
        let start = self.settled;
        let mut piece = Piece::default();
        let mut new = String::new();
        for &id in ids {
            if self.stopped {
                break;
            }
            new.clear();
            self.detokenizer.push_token(id, &mut new);
            self.pushed += 1;
            self.stop.arm(self.pushed > self.min_tokens);
            self.take(&new, &mut piece);
        }
        piece.tokens = start..self.settled;
        piece
    }

    /// What was held back, once no more ids come; it may yet complete a stop string.
    pub fn finish(&mut self) -> Piece {
        let start = self.settled;
        let mut piece = Piece::default();
        if !self.stopped {
            let rest = self.detokenizer.finish();
            self.take(&rest, &mut piece);
            self.stop.finish(&mut piece.text);
            self.settled = self.pushed;
            self.waiting.clear();
        }
        piece.tokens = start..self.settled;
        piece
    }

    fn take(&mut self, new: &str, piece: &mut Piece) {
        self.text_bytes += new.len();
        piece.stopped = self.stop.push(new, &mut piece.text);
        if piece.stopped.is_some() {
            self.stopped = true;
            self.settled = self.pushed;
            self.waiting.clear();
            return;
        }
        if self.detokenizer.is_settled() {
            match self.waiting.back_mut() {
                Some((tokens, end)) if *end == self.text_bytes => *tokens = self.pushed,
                _ => self.waiting.push_back((self.pushed, self.text_bytes)),
            }
        }
        let released = self.text_bytes - self.stop.held_bytes();
        while let Some(&(tokens, end)) = self.waiting.front() {
            if end > released {
                break;
            }
            self.settled = tokens;
            self.waiting.pop_front();
        }
    }
}
