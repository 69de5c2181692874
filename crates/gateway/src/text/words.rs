//! Byte-level BPE word by word: an automaton finds a text's words, and a word seen before is not merged again.
//!
//! ```text
//! "Hello  world, hello" --pattern--> |Hello| | world|,| hello| --known, or the library's merges--> ids
//! ```
//!
//! Ids are the tokenizers library's own: it merges every word that is new here, and a pattern's words are found
//! where its regular expressions find them.

use std::collections::HashMap;
use std::ops::Range;

use parking_lot::Mutex;
use regex_automata::hybrid::dfa::{Cache, DFA};
use regex_automata::{Anchored, Input};
use tokenizers::models::bpe::BPE;
use tokenizers::{Model, ModelWrapper, Tokenizer};
use unicode_normalization_alignments::{IsNormalized, is_nfc_quick};

use super::bytes::byte_level_char;
use super::error::TextError;

/// How each of the patterns ends: of white space before a word the last character belongs to the word. An automaton
/// cannot look ahead, so that is done here.
const BLANKS: &str = r"|\s+(?!\S)|\s+";
/// Which of the automaton's patterns matched: `\s+`.
const IS_BLANK: usize = 1;

/// Words known at once to each thread, the bytes of the longest and the ids of all.
const MAX_KNOWN_WORDS: usize = 1 << 16;
const MAX_KNOWN_BYTES: usize = 128;
const MAX_KNOWN_IDS: usize = 1 << 18;

pub(super) struct Words {
    pattern: DFA,
    /// Texts are to be in Unicode's composed form.
    composed: bool,
    /// One for each thread that has encoded at the same time as others.
    idle: Mutex<Vec<Known>>,
}

/// What one thread works with.
struct Known {
    states: Cache,
    /// Where in `ids` a word's are.
    places: HashMap<Box<str>, Range<u32>>,
    ids: Vec<u32>,
    /// A word as byte-level characters.
    word: String,
}

impl Words {
    /// `pattern` is one of those whose words can be found so; `None` if it is not.
    pub(super) fn new(pattern: &str, composed: bool) -> Option<Self> {
        let words = pattern.strip_suffix(BLANKS)?;
        Some(Self {
            pattern: DFA::new_many(&[words, r"\s+"]).ok()?,
            composed,
            idle: Mutex::default(),
        })
    }

    /// Adds the ids of `text`, in which no added token is; says whether it could.
    pub(super) fn encode(
        &self,
        tokenizer: &Tokenizer,
        text: &str,
        ids: &mut Vec<u32>,
    ) -> Result<bool, TextError> {
        let ModelWrapper::BPE(model) = tokenizer.get_model() else {
            return Ok(false);
        };
        let is_composed = !self.composed
            || text.is_ascii()
            || matches!(is_nfc_quick(text.chars()), IsNormalized::Yes);
        if !is_composed {
            return Ok(false);
        }
        let idle = self.idle.lock().pop();
        let mut known = idle.unwrap_or_else(|| Known::new(&self.pattern));
        let before = ids.len();
        let mut start = 0;
        while start < text.len() {
            let Some(end) = self.word_end(&mut known.states, text, start) else {
                ids.truncate(before);
                break;
            };
            known.encode(model, &text[start..end], ids)?;
            start = end;
        }
        self.idle.lock().push(known);
        Ok(start == text.len())
    }

    /// Where the word ends that begins at `start`; `None` if the automaton gives up.
    fn word_end(&self, states: &mut Cache, text: &str, start: usize) -> Option<usize> {
        let input = Input::new(text).range(start..).anchored(Anchored::Yes);
        let found = self.pattern.try_search_fwd(states, &input).ok()??;
        let end = found.offset();
        if found.pattern().as_usize() != IS_BLANK || end == text.len() {
            return Some(end);
        }
        let last = text[start..end].chars().next_back()?.len_utf8();
        Some(if end - start > last { end - last } else { end })
    }
}

impl Known {
    fn new(pattern: &DFA) -> Self {
        Self {
            states: pattern.create_cache(),
            places: HashMap::new(),
            ids: Vec::new(),
            word: String::new(),
        }
    }

    fn encode(&mut self, model: &BPE, word: &str, ids: &mut Vec<u32>) -> Result<(), TextError> {
        if let Some(place) = self.places.get(word) {
            ids.extend_from_slice(&self.ids[place.start as usize..place.end as usize]);
            return Ok(());
        }
        self.word.clear();
        self.word.extend(word.bytes().map(byte_level_char));
        let tokens = model
            .tokenize(&self.word)
            .map_err(|e| TextError::Encode(e.to_string()))?;
        if word.len() <= MAX_KNOWN_BYTES {
            let is_full = self.places.len() >= MAX_KNOWN_WORDS
                || self.ids.len() + tokens.len() > MAX_KNOWN_IDS;
            if is_full {
                self.places.clear();
                self.ids.clear();
            }
            let start = self.ids.len();
            self.ids.extend(tokens.iter().map(|token| token.id));
            // Both are below MAX_KNOWN_IDS.
            let place = start as u32..self.ids.len() as u32;
            self.places.insert(word.into(), place);
        }
        ids.extend(tokens.iter().map(|token| token.id));
        Ok(())
    }
}

#[cfg(test)]
impl Words {
    /// Where the words of `text` end.
    pub(super) fn ends(&self, text: &str) -> Vec<usize> {
        let mut states = self.pattern.create_cache();
        let mut ends = vec![0];
        while ends[ends.len() - 1] < text.len() {
            let start = ends[ends.len() - 1];
            ends.push(self.word_end(&mut states, text, start).unwrap());
        }
        ends.split_off(1)
    }
}
