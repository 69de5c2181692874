//! Token ids to text, as they come.

use std::sync::Arc;

use super::model::TextModel;
use super::stream::Stream;

/// Tokens of the prompt that are looked back at, beyond a run of byte tokens and skipped ones at its end.
const PROMPT_TAIL_TOKENS: usize = 8;

/// Turns a stream of ids into text, never half a character.
///
/// What has come out at any time is a prefix of the whole text's decoding, and all of it after
/// [`finish`](Self::finish); each push costs as much as its own tokens.
pub struct Detokenizer {
    model: Arc<TextModel>,
    stream: Stream,
    skip_special: bool,
}

impl Detokenizer {
    /// Text that follows `prompt_ids` (all of the prompt or its last tokens): the first token keeps its leading
    /// space if there is a prompt, and a character that the prompt begins is completed.
    pub fn new(model: Arc<TextModel>, prompt_ids: &[u32], skip_special: bool) -> Self {
        let mut stream = Stream::new(model.plan());
        let mut unseen = String::new();
        for &id in prompt_tail(&model, prompt_ids, skip_special) {
            if let Some(piece) = model.piece(id, skip_special) {
                stream.push(piece, &mut unseen);
                unseen.clear();
            }
        }
        stream.settle();
        Self {
            model,
            stream,
            skip_special,
        }
    }

    /// Text that `ids` complete; ids outside the vocabulary add nothing.
    pub fn push(&mut self, ids: &[u32]) -> String {
        let mut text = String::new();
        for &id in ids {
            self.push_token(id, &mut text);
        }
        text
    }

    /// Append the text that `id` completes to `out`.
    pub fn push_token(&mut self, id: u32, out: &mut String) {
        if let Some(piece) = self.model.piece(id, self.skip_special) {
            self.stream.push(piece, out);
        }
    }

    /// Whether the text of all pushed tokens is out.
    pub fn is_settled(&self) -> bool {
        self.stream.is_settled()
    }

    /// What was held back; half a character becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        let mut text = String::new();
        self.stream.finish(&mut text);
        text
    }
}

/// The last tokens of the prompt, enough that what comes before them cannot matter.
fn prompt_tail<'a>(model: &TextModel, prompt_ids: &'a [u32], skip_special: bool) -> &'a [u32] {
    let mut anchors = 0;
    let mut start = prompt_ids.len();
    while start > 0 && anchors < PROMPT_TAIL_TOKENS {
        start -= 1;
        let piece = model
            .piece(prompt_ids[start], skip_special)
            .unwrap_or_default();
        if !piece.is_empty() && model.plan().fallback_byte(piece).is_none() {
            anchors += 1;
        }
    }
    &prompt_ids[start..]
}
