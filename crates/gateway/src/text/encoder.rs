//! Text to token ids, piece by piece where that is the same, so that a text seen before is not encoded again.

use tokenizers::{Encoding, Token, Tokenizer};

use super::error::TextError;
use super::piece_cache::{CacheCounts, PieceCache};
use super::pieces::{Cuts, Piece};
use super::words::Words;

/// Memory for the ids of texts seen before, where nothing else is said.
pub(super) const CACHE_BYTES: usize = 64 << 20;

pub(super) struct Encoder {
    tokenizer: Tokenizer,
    /// `None` where texts are encoded as a whole.
    in_pieces: Option<InPieces>,
    cache: PieceCache,
}

struct InPieces {
    cuts: Cuts,
    /// `None` where the library finds them.
    words: Option<Words>,
    /// The model's own tokens before a text.
    first: Vec<u32>,
    /// And after it.
    last: Vec<u32>,
}

impl Encoder {
    pub(super) fn new(tokenizer: Tokenizer) -> Self {
        Self {
            in_pieces: InPieces::new(&tokenizer),
            tokenizer,
            cache: PieceCache::new(CACHE_BYTES),
        }
    }

    /// Forget every text; at most `bytes` are held from now on.
    pub(super) fn limit_cache(&mut self, bytes: usize) {
        self.cache = PieceCache::new(bytes);
    }

    pub(super) fn cache_counts(&self) -> CacheCounts {
        self.cache.counts()
    }

    pub(super) fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Ids of `text`, the same as the tokenizer's own; `between` is called after each piece that was encoded.
    pub(super) fn encode(
        &self,
        text: &str,
        add_special: bool,
        between: &mut dyn FnMut(),
    ) -> Result<Vec<u32>, TextError> {
        let Some(in_pieces) = &self.in_pieces else {
            return self.encode_whole(text, add_special);
        };
        let mut ids = Vec::with_capacity(text.len() / 4 + 8);
        if add_special {
            ids.extend_from_slice(&in_pieces.first);
        }
        in_pieces.cuts.each(text, |piece| {
            let text = match piece {
                Piece::Token(id) => {
                    ids.push(id);
                    return Ok(());
                }
                Piece::Text(text) => text,
            };
            if let Some(known) = self.cache.get(text) {
                ids.extend_from_slice(&known);
                return Ok(());
            }
            let before = ids.len();
            let by_words = match &in_pieces.words {
                Some(words) => words.encode(&self.tokenizer, text, &mut ids)?,
                None => false,
            };
            if !by_words {
                ids.extend(self.encode_whole(text, false)?);
            }
            self.cache.insert(text, &ids[before..]);
            between();
            Ok(())
        })?;
        if add_special {
            ids.extend_from_slice(&in_pieces.last);
        }
        Ok(ids)
    }

    fn encode_whole(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        let encoding = self
            .tokenizer
            .encode_fast(text, add_special)
            .map_err(|e| TextError::Encode(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }
}

impl InPieces {
    fn new(tokenizer: &Tokenizer) -> Option<Self> {
        let cuts = Cuts::new(tokenizer)?;
        let around = |add_special| {
            let mark = Token::new(u32::MAX, "x".to_owned(), (0, 1));
            let text = Encoding::from_tokens(vec![mark], 0);
            let ids = tokenizer.post_process(text, None, add_special).ok()?;
            let mut parts = ids.get_ids().split(|id| *id == u32::MAX);
            match (parts.next(), parts.next(), parts.next()) {
                (Some(first), Some(last), None) => Some((first.to_vec(), last.to_vec())),
                _ => None,
            }
        };
        let (first, last) = around(true)?;
        let nothing_around = around(false)? == (Vec::new(), Vec::new());
        nothing_around.then(|| Self {
            words: cuts.words(),
            cuts,
            first,
            last,
        })
    }
}
