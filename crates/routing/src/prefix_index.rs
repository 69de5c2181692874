//! Which replica has which blocks in its prefix cache.

use std::collections::{HashMap, VecDeque};

use crate::hash::BlockHash;

/// Blocks that are remembered: 2 million, about 100 MB. Further ones are passed over, so that a prefix is at worst
/// thought to be shorter than it is.
pub const MAX_BLOCKS: usize = 1 << 21;
/// Replicas beyond this are thought to have nothing cached.
pub const MAX_REPLICAS: usize = 128;
/// Blocks that are expected and not reported yet.
const MAX_EXPECTED: usize = 1 << 17;

/// A mirror of the engines' prefix caches, fed by their KV events, and of what they are about to compute.
///
/// ```text
///   stored    hash -> the replicas that hold it, one bit each
///   expected  hash -> the replica it was sent to, until when it is believed to come
/// ```
#[derive(Debug)]
pub struct PrefixIndex {
    stored: HashMap<BlockHash, u128>,
    expected: HashMap<BlockHash, Expected>,
    /// By the time it was made; `until_ms` is that of the entry, or the entry has been renewed.
    expiry: VecDeque<(f64, BlockHash)>,
    max_blocks: usize,
}

#[derive(Debug, Clone, Copy)]
struct Expected {
    replica: usize,
    until_ms: f64,
}

impl Default for PrefixIndex {
    fn default() -> PrefixIndex {
        PrefixIndex::with_max_blocks(MAX_BLOCKS)
    }
}

impl PrefixIndex {
    #[must_use]
    pub fn with_max_blocks(max_blocks: usize) -> PrefixIndex {
        PrefixIndex {
            stored: HashMap::new(),
            expected: HashMap::new(),
            expiry: VecDeque::new(),
            max_blocks,
        }
    }

    /// A replica has these blocks now.
    pub fn store(&mut self, replica: usize, hashes: impl IntoIterator<Item = BlockHash>) {
        let Some(bit) = bit(replica) else { return };
        for hash in hashes {
            let room = self.stored.len() < self.max_blocks;
            if let Some(holders) = self.stored.get_mut(&hash) {
                *holders |= bit;
            } else if room {
                self.stored.insert(hash, bit);
            }
        }
    }

    /// A replica has these blocks no more.
    pub fn remove(&mut self, replica: usize, hashes: impl IntoIterator<Item = BlockHash>) {
        let Some(bit) = bit(replica) else { return };
        for hash in hashes {
            if let Some(holders) = self.stored.get_mut(&hash) {
                *holders &= !bit;
                if *holders == 0 {
                    self.stored.remove(&hash);
                }
            }
        }
    }

    /// Nothing is known of a replica's cache any more.
    pub fn clear(&mut self, replica: usize) {
        if let Some(bit) = bit(replica) {
            self.stored.retain(|_, holders| {
                *holders &= !bit;
                *holders != 0
            });
            self.expected
                .retain(|_, expected| expected.replica != replica);
        }
    }

    /// A prompt was sent to a replica: until `until_ms` its blocks are believed to be there, or to come.
    pub fn expect(&mut self, replica: usize, hashes: &[BlockHash], now_ms: f64, until_ms: f64) {
        let Some(bit) = bit(replica) else { return };
        while let Some((until_ms, hash)) = self.expiry.front().copied() {
            if until_ms > now_ms && self.expiry.len() <= MAX_EXPECTED {
                break;
            }
            self.expiry.pop_front();
            if self
                .expected
                .get(&hash)
                .is_some_and(|e| e.until_ms <= until_ms)
            {
                self.expected.remove(&hash);
            }
        }
        let room = MAX_EXPECTED.saturating_sub(self.expiry.len());
        for hash in hashes.iter().take(room) {
            if self
                .stored
                .get(hash)
                .is_some_and(|holders| holders & bit != 0)
            {
                continue;
            }
            self.expected.insert(*hash, Expected { replica, until_ms });
            self.expiry.push_back((until_ms, *hash));
        }
    }

    /// How many blocks from the first each of `replicas` has, in their order.
    #[must_use]
    pub fn leading(&self, hashes: &[BlockHash], replicas: &[usize], now_ms: f64) -> Vec<usize> {
        let mut blocks = vec![0; replicas.len()];
        let mut alive = replicas
            .iter()
            .filter_map(|r| bit(*r))
            .fold(0, |a, b| a | b);
        for (at, hash) in hashes.iter().enumerate() {
            if alive == 0 {
                break;
            }
            let mut holders = self.stored.get(hash).copied().unwrap_or(0);
            if holders & alive != alive
                && let Some(expected) = self.expected.get(hash)
                && expected.until_ms > now_ms
            {
                holders |= bit(expected.replica).unwrap_or(0);
            }
            alive &= holders;
            for (count, replica) in blocks.iter_mut().zip(replicas) {
                if bit(*replica).is_some_and(|bit| alive & bit != 0) {
                    *count = at + 1;
                }
            }
        }
        blocks
    }

    /// Blocks that at least one replica has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.stored.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.stored.is_empty()
    }
}

fn bit(replica: usize) -> Option<u128> {
    (replica < MAX_REPLICAS).then(|| 1 << replica)
}
