//! Where a text may be cut so that its pieces' ids, one after the other, are the whole text's ids.
//!
//! ```text
//! <|im_start|>user\nA long question ...    <|im_end|>\n
//! [  token   ][ text          ][ text    ][  token   ][text]
//! ```
//!
//! Added tokens are found before anything else is done to a text, and what lies between two of them is normalized,
//! split and encoded by itself: cutting there is always right. Within such a text a cut is right where no word of the
//! pre-tokenizer goes across, which is known for byte-level BPE with one of the [`LOCAL_PATTERNS`].

use aho_corasick::{AhoCorasick, MatchKind};
use serde_json::Value;
use tokenizers::{ModelWrapper, Tokenizer};

use super::words::Words;

/// Texts are cut at the first place that is right once they are this long: long enough that the cache's upkeep does
/// not show, short enough that others wait little for one piece.
const PIECE_BYTES: usize = 4096;

/// Patterns of words none of whose matches has a letter with white space after it, and whose look-ahead is behind
/// white space alone: between an ASCII letter and a space or a line's end one match ends and another begins.
pub(super) const LOCAL_PATTERNS: [&str; 5] = [
    // GPT-2
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    // Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    // Qwen 2 and 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    // GPT-4o
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    // the demo model
    r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
];

/// A part of a text.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    /// An added token's id.
    Token(u32),
    /// Text without one of the tokens that are looked for first; never empty.
    Text(&'a str),
}

/// What is known of one tokenizer.
pub(super) struct Cuts {
    /// Tokens that are found before a text is normalized, and the id of each pattern; `None` where there are none.
    tokens: Option<(AhoCorasick, Vec<u32>)>,
    /// Where a text between tokens may be cut: the pattern of its words, and whether it is brought into Unicode's
    /// composed form first.
    in_text: Option<(&'static str, bool)>,
}

impl Cuts {
    /// `None` where a text's ids are not its parts' ids: tokens that take white space around them with them or that
    /// depend on what is beside them, a pre-tokenizer that treats a text's beginning differently, random merges.
    pub(super) fn new(tokenizer: &Tokenizer) -> Option<Self> {
        if matches!(tokenizer.get_model(), ModelWrapper::BPE(bpe) if bpe.dropout.is_some()) {
            return None;
        }
        let pre_tokenizer = serde_json::to_value(tokenizer.get_pre_tokenizer()).ok()?;
        let normalizer = serde_json::to_value(tokenizer.get_normalizer()).ok()?;
        if treats_beginning_differently(&pre_tokenizer) {
            return None;
        }
        let added = tokenizer.get_added_tokens_decoder();
        let (mut contents, mut ids) = (Vec::new(), Vec::new());
        for (id, token) in added.iter().filter(|(_, token)| !token.normalized) {
            if token.lstrip || token.rstrip || token.single_word || token.content.is_empty() {
                return None;
            }
            contents.push(token.content.as_str());
            ids.push(*id);
        }
        let tokens = if contents.is_empty() {
            None
        } else {
            let finder = AhoCorasick::builder()
                .match_kind(MatchKind::LeftmostLongest)
                .build(&contents);
            Some((finder.ok()?, ids))
        };
        // A token that is looked for in normalized text might go across a cut.
        let is_local =
            added.values().all(|token| !token.normalized) && is_local_normalizer(&normalizer);
        let pattern = is_local.then(|| local_pattern(&pre_tokenizer)).flatten();
        Some(Self {
            tokens,
            in_text: pattern.map(|pattern| (pattern, !normalizer.is_null())),
        })
    }

    /// How words are found in a text between tokens, where that is known.
    pub(super) fn words(&self) -> Option<Words> {
        let (pattern, composed) = self.in_text?;
        Words::new(pattern, composed)
    }

    /// Hands `text`'s pieces to `take`, in order, until it fails.
    pub(super) fn each<'a, E>(
        &self,
        text: &'a str,
        mut take: impl FnMut(Piece<'a>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut start = 0;
        if let Some((finder, ids)) = &self.tokens {
            for found in finder.find_iter(text) {
                self.each_of_text(&text[start..found.start()], &mut take)?;
                take(Piece::Token(ids[found.pattern().as_usize()]))?;
                start = found.end();
            }
        }
        self.each_of_text(&text[start..], &mut take)
    }

    fn each_of_text<'a, E>(
        &self,
        mut text: &'a str,
        take: &mut impl FnMut(Piece<'a>) -> Result<(), E>,
    ) -> Result<(), E> {
        while self.in_text.is_some()
            && let Some(cut) = cut(text)
        {
            take(Piece::Text(&text[..cut]))?;
            text = &text[cut..];
        }
        if text.is_empty() {
            Ok(())
        } else {
            take(Piece::Text(text))
        }
    }
}

/// The first place for a cut at [`PIECE_BYTES`] or after.
fn cut(text: &str) -> Option<usize> {
    let from = PIECE_BYTES - 1;
    let mut pairs = text.as_bytes().get(from..)?.windows(2);
    let is_cut = |pair: &[u8]| pair[0].is_ascii_alphabetic() && matches!(pair[1], b' ' | b'\n');
    let before = pairs.position(is_cut)?;
    Some(from + before + 1)
}

/// Whether any part of `pre_tokenizer` puts its mark before the first word of a whole text alone.
fn treats_beginning_differently(pre_tokenizer: &Value) -> bool {
    parts(pre_tokenizer, "pretokenizers")
        .iter()
        .any(|part| part["type"] == "Metaspace" && part["prepend_scheme"] == "first")
}

fn is_local_normalizer(normalizer: &Value) -> bool {
    parts(normalizer, "normalizers")
        .iter()
        .all(|part| part.is_null() || part["type"] == "NFC")
}

/// The pattern of `pre_tokenizer`'s words, if it is one of the [`LOCAL_PATTERNS`] and all that it does to a text.
fn local_pattern(pre_tokenizer: &Value) -> Option<&'static str> {
    let byte_level = |part: &Value, use_regex: bool| {
        part["type"] == "ByteLevel"
            && part["add_prefix_space"] == false
            && part["use_regex"] == use_regex
    };
    match parts(pre_tokenizer, "pretokenizers").as_slice() {
        [one] => byte_level(one, true).then_some(LOCAL_PATTERNS[0]),
        [split, bytes] => {
            let pattern = split["pattern"]["Regex"].as_str()?;
            let is_split = split["type"] == "Split"
                && split["behavior"] == "Isolated"
                && split["invert"] == false
                && byte_level(bytes, false);
            let mut known = LOCAL_PATTERNS.into_iter();
            known.find(|known| is_split && *known == pattern)
        }
        _ => None,
    }
}

/// The parts of a sequence, of sequences in it too, under `name`; or the one that it is.
fn parts<'a>(step: &'a Value, name: &str) -> Vec<&'a Value> {
    match step[name].as_array() {
        Some(steps) => steps.iter().flat_map(|step| parts(step, name)).collect(),
        None => vec![step],
    }
}
