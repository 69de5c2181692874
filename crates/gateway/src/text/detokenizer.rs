//! Token ids to text, as they come.

use std::sync::Arc;

use super::model::TextModel;

/// Turns a stream of ids into text, never half a character.
pub struct Detokenizer {
    model: Arc<TextModel>,
    ids: Vec<u32>,
    emitted_bytes: usize,
    skip_special: bool,
}

impl Detokenizer {
    /// Text that follows `prompt_ids`.
    pub fn new(model: Arc<TextModel>, prompt_ids: &[u32], skip_special: bool) -> Self {
        let emitted_bytes = model.decode(prompt_ids, skip_special).len();
        Self {
            model,
            ids: prompt_ids.to_vec(),
            emitted_bytes,
            skip_special,
        }
    }

    /// Text that `ids` complete.
    pub fn push(&mut self, ids: &[u32]) -> String {
        self.ids.extend_from_slice(ids);
        let text = self.model.decode(&self.ids, self.skip_special);
        if text.ends_with('\u{fffd}') {
            return String::new();
        }
        let new = text
            .get(self.emitted_bytes..)
            .unwrap_or_default()
            .to_owned();
        self.emitted_bytes = text.len();
        new
    }

    /// What was held back.
    pub fn finish(&mut self) -> String {
        let text = self.model.decode(&self.ids, self.skip_special);
        let new = text
            .get(self.emitted_bytes..)
            .unwrap_or_default()
            .to_owned();
        self.emitted_bytes = text.len();
        new
    }
}
