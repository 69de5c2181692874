//! What servers that tell nothing of their caches are believed to have: the prefixes of what they were sent lately.

use std::collections::HashSet;
use std::mem::swap;

use crate::hash::hash_after;

/// A prefix ends after each so many bytes of a prompt: some 128 tokens, which take no server long to compute.
const CHUNK_BYTES: usize = 512;
/// The beginning that stands for a longer prompt, so that none takes long to hash.
const MAX_BYTES: usize = 512 << 10;
/// Prefixes of what one server was sent that are remembered, in 0.6 MB: of 16 MiB of prompts, some 4 million tokens, more
/// than most caches hold.
pub const MAX_PREFIXES: usize = 1 << 15;

/// The prefixes of one prompt, each longer than the one before.
#[derive(Debug, Default)]
pub struct Prefixes {
    all: Vec<Prefix>,
    /// Of the whole prompt.
    bytes: usize,
}

#[derive(Debug, Clone, Copy)]
struct Prefix {
    /// Stands for all its bytes.
    hash: u64,
    bytes: usize,
}

impl Prefixes {
    /// Of a prompt whose `head` is the same as another's or not, and whose `text` may begin as another's. Prompts of
    /// different `kind` share nothing.
    #[must_use]
    pub fn new(kind: u64, head: &[u8], text: &[u8]) -> Prefixes {
        let [head, text] = [head, text].map(|bytes| &bytes[..bytes.len().min(MAX_BYTES)]);
        let mut prefix = Prefix {
            hash: hash_after(kind, head),
            bytes: head.len(),
        };
        let chunks = text.chunks_exact(CHUNK_BYTES);
        let mut all = Vec::with_capacity(chunks.len() + 1);
        if head.len() >= CHUNK_BYTES {
            all.push(prefix);
        }
        all.extend(chunks.map(|chunk| {
            prefix.hash = hash_after(prefix.hash, chunk);
            prefix.bytes += chunk.len();
            prefix
        }));
        Prefixes {
            all,
            bytes: head.len() + text.len(),
        }
    }

    /// Nothing of it is long enough to be remembered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }
}

/// The prefixes that one server was sent lately, the older half of which is forgotten at once.
#[derive(Debug)]
pub struct SentPrefixes {
    newer: HashSet<u64>,
    older: HashSet<u64>,
    max: usize,
}

impl Default for SentPrefixes {
    fn default() -> SentPrefixes {
        SentPrefixes::with_max(MAX_PREFIXES)
    }
}

impl SentPrefixes {
    #[must_use]
    pub fn with_max(max: usize) -> SentPrefixes {
        SentPrefixes {
            newer: HashSet::new(),
            older: HashSet::new(),
            max,
        }
    }

    /// Which share of the prompt it was sent before: from 0 to 1.
    #[must_use]
    pub fn share(&self, prompt: &Prefixes) -> f64 {
        let sent = prompt.all.partition_point(|prefix| self.has(prefix.hash));
        let longest = sent.checked_sub(1).map(|last| prompt.all[last].bytes);
        longest.map_or(0.0, |bytes| bytes as f64 / prompt.bytes as f64)
    }

    /// It is sent this prompt now.
    pub fn remember(&mut self, prompt: &Prefixes) {
        // The shortest last: whatever is forgotten, those that are longer went before, and `share` can search by halves.
        for prefix in prompt.all.iter().rev() {
            if self.newer.len() >= self.max / 2 {
                swap(&mut self.newer, &mut self.older);
                self.newer.clear();
            }
            self.newer.insert(prefix.hash);
        }
    }

    /// It has nothing any more.
    pub fn clear(&mut self) {
        self.newer.clear();
        self.older.clear();
    }

    fn has(&self, hash: u64) -> bool {
        self.newer.contains(&hash) || self.older.contains(&hash)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(seed: u8, chunks: usize) -> Vec<u8> {
        vec![seed; chunks * CHUNK_BYTES]
    }

    fn prompt(parts: &[(u8, usize)]) -> Prefixes {
        let parts = parts.iter().map(|(seed, chunks)| text(*seed, *chunks));
        Prefixes::new(0, &[], &parts.collect::<Vec<_>>().concat())
    }

    #[test]
    fn what_begins_as_something_sent_is_known_so_far() {
        let mut sent = SentPrefixes::default();
        assert_eq!(sent.share(&prompt(&[(1, 4)])), 0.0);
        sent.remember(&prompt(&[(1, 4), (2, 4)]));
        assert_eq!(sent.share(&prompt(&[(1, 4)])), 1.0);
        assert_eq!(sent.share(&prompt(&[(1, 4), (3, 12)])), 0.25);
        assert_eq!(sent.share(&prompt(&[(2, 4)])), 0.0);
        sent.clear();
        assert_eq!(sent.share(&prompt(&[(1, 4)])), 0.0);
    }

    #[test]
    fn a_head_is_known_as_a_whole() {
        let mut sent = SentPrefixes::default();
        let head = text(7, 3);
        sent.remember(&Prefixes::new(0, &head, &text(1, 1)));
        assert_eq!(sent.share(&Prefixes::new(0, &head, &text(1, 2))), 0.8);
        assert_eq!(sent.share(&Prefixes::new(0, &head, &text(2, 1))), 0.75);
        assert_eq!(sent.share(&Prefixes::new(0, b"", &text(1, 1))), 0.0);
        assert_eq!(sent.share(&Prefixes::new(1, &head, &text(1, 1))), 0.0);
        let (mut changed, last) = (head, 3 * CHUNK_BYTES - 1);
        changed[last] = 0;
        assert_eq!(sent.share(&Prefixes::new(0, &changed, &text(1, 1))), 0.0);
    }

    #[test]
    fn short_prompts_have_no_prefix_and_long_ones_no_more_than_others() {
        let short = Prefixes::new(0, &[0; CHUNK_BYTES - 1], &[0; CHUNK_BYTES - 1]);
        assert!(short.is_empty());
        assert_eq!(SentPrefixes::default().share(&short), 0.0);
        let long = Prefixes::new(0, &[], &vec![0; 4 * MAX_BYTES]);
        assert_eq!(long.all.len(), MAX_BYTES / CHUNK_BYTES);
        let mut sent = SentPrefixes::default();
        sent.remember(&long);
        assert_eq!(sent.share(&long), 1.0);
    }

    #[test]
    fn the_oldest_are_forgotten() {
        let mut sent = SentPrefixes::with_max(100);
        let hot = prompt(&[(0, 10)]);
        for seed in 1..=255 {
            sent.remember(&hot);
            sent.remember(&prompt(&[(seed, 10)]));
            assert!(sent.newer.len() + sent.older.len() <= 100);
            assert_eq!(sent.share(&hot), 1.0);
        }
        assert_eq!(sent.share(&prompt(&[(255, 10)])), 1.0);
        assert_eq!(sent.share(&prompt(&[(1, 10)])), 0.0);
    }

    proptest! {
        /// Without this a search by halves would find nothing certain.
        #[test]
        fn nothing_is_known_without_what_is_before_it(
            prompts in prop::collection::vec(prop::collection::vec((0_u8..3, 1_usize..6), 1..5), 1..60),
        ) {
            let mut sent = SentPrefixes::with_max(20);
            let prompts: Vec<_> = prompts.iter().map(|parts| prompt(parts)).collect();
            for new in &prompts {
                sent.remember(new);
                for any in &prompts {
                    prop_assert!(any.all.is_sorted_by_key(|prefix| !sent.has(prefix.hash)));
                }
            }
        }
    }
}
