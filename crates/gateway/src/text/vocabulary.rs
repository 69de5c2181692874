//! What each token id adds to a text, laid out flat for the streaming decoder.

use tokenizers::Tokenizer;

use super::error::TextError;
use super::stream::{Entry, Plan};

/// A vocabulary beyond this is taken for damage rather than allocated.
const MAX_TOKEN_ID: u32 = 1 << 24;

/// Every token's piece: its string after the plan's stateless steps (or its raw bytes).
///
/// ```text
/// bytes  | H e l l o | 0xE5 0x8F | < s > | ...
/// ends   |           5           7       10      (ids that do not exist are empty and not KNOWN)
/// ```
pub(super) struct Vocabulary {
    bytes: Vec<u8>,
    ends: Vec<u32>,
    flags: Vec<u8>,
}

const KNOWN: u8 = 1;
const SPECIAL: u8 = 2;

impl Vocabulary {
    /// Lay out `tokenizer`'s tokens for `plan`.
    pub(super) fn new(tokenizer: &Tokenizer, plan: &Plan) -> Result<Self, TextError> {
        let highest = tokenizer.get_vocab(true).into_values().max();
        let Some(highest) = highest else {
            return Err(TextError::Unsupported("its vocabulary is empty".to_owned()));
        };
        if highest > MAX_TOKEN_ID {
            return Err(TextError::Unsupported(format!(
                "token id {highest} is above {MAX_TOKEN_ID}"
            )));
        }
        let count = highest as usize + 1;
        let mut vocabulary = Self {
            bytes: Vec::with_capacity(count * 8),
            ends: Vec::with_capacity(count),
            flags: Vec::with_capacity(count),
        };
        let added = tokenizer.get_added_vocabulary();
        for id in 0..=highest {
            let mut flags = 0;
            if let Some(token) = tokenizer.id_to_token(id) {
                flags |= KNOWN;
                if added.is_special_token(&token) {
                    flags |= SPECIAL;
                }
                match plan.entry(token)? {
                    Entry::Text(text) => vocabulary.bytes.extend_from_slice(text.as_bytes()),
                    Entry::Bytes(bytes) => vocabulary.bytes.extend_from_slice(&bytes),
                }
            }
            let end = u32::try_from(vocabulary.bytes.len())
                .map_err(|_| TextError::Unsupported("its tokens exceed 4 GiB".to_owned()))?;
            vocabulary.ends.push(end);
            vocabulary.flags.push(flags);
        }
        Ok(vocabulary)
    }

    /// One more than the highest id.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The piece of `id`; `None` when it adds nothing: unknown, or special and to be skipped.
    pub(super) fn piece(&self, id: u32, skip_special: bool) -> Option<&[u8]> {
        let index = id as usize;
        let flags = *self.flags.get(index)?;
        if flags & KNOWN == 0 || (skip_special && flags & SPECIAL != 0) {
            return None;
        }
        let start = if index == 0 {
            0
        } else {
            self.ends[index - 1] as usize
        };
        self.bytes.get(start..self.ends[index] as usize)
    }
}
