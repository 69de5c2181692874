//! What a fake engine remembers of prompts: hashes alone, the least recently used forgotten first.

use std::collections::{BTreeMap, HashMap};

use scalellm_engine_link::{BlockHash, proto};

pub(crate) struct PrefixCache {
    max_blocks: usize,
    blocks: HashMap<BlockHash, Block>,
    by_use: BTreeMap<u64, BlockHash>,
    uses: u64,
    stored: Vec<proto::KvStored>,
    removed: Vec<Vec<u8>>,
}

struct Block {
    parent: Option<BlockHash>,
    used: u64,
}

impl PrefixCache {
    pub(crate) fn new(max_blocks: usize) -> PrefixCache {
        PrefixCache {
            max_blocks,
            blocks: HashMap::new(),
            by_use: BTreeMap::new(),
            uses: 0,
            stored: Vec::new(),
            removed: Vec::new(),
        }
    }

    /// How many of `hashes`, from the first, are there.
    pub(crate) fn leading(&self, hashes: &[BlockHash]) -> usize {
        let known = |hash: &&BlockHash| self.blocks.contains_key(*hash);
        hashes.iter().take_while(known).count()
    }

    /// Remembers a sequence's blocks, which are in use now.
    pub(crate) fn store(&mut self, hashes: &[BlockHash]) {
        // The end is forgotten before the beginning, and what does not fit never was.
        let kept = &hashes[..hashes.len().min(self.max_blocks)];
        for (at, hash) in kept.iter().enumerate().rev() {
            self.uses += 1;
            let parent = at.checked_sub(1).map(|before| hashes[before]);
            let block = Block {
                parent,
                used: self.uses,
            };
            match self.blocks.insert(*hash, block) {
                Some(before) => drop(self.by_use.remove(&before.used)),
                None => self.stored.push(event(hash, parent)),
            }
            self.by_use.insert(self.uses, *hash);
        }
        while self.blocks.len() > self.max_blocks
            && let Some((_, hash)) = self.by_use.pop_first()
        {
            self.blocks.remove(&hash);
            self.removed.push(hash.to_vec());
        }
    }

    /// What changed since the last call.
    pub(crate) fn take_changes(&mut self) -> Option<(Vec<proto::KvStored>, Vec<Vec<u8>>)> {
        let changes = (
            std::mem::take(&mut self.stored),
            std::mem::take(&mut self.removed),
        );
        (!changes.0.is_empty() || !changes.1.is_empty()).then_some(changes)
    }

    pub(crate) fn snapshot(&self) -> Vec<proto::KvStored> {
        let all = self.blocks.iter();
        all.map(|(hash, block)| event(hash, block.parent)).collect()
    }
}

fn event(hash: &BlockHash, parent: Option<BlockHash>) -> proto::KvStored {
    proto::KvStored {
        parent: parent.map_or_else(Vec::new, |parent| parent.to_vec()),
        hash: hash.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hashes(bytes: &[u8]) -> Vec<BlockHash> {
        bytes.iter().map(|byte| [*byte; 16]).collect()
    }

    #[test]
    fn the_least_recently_used_end_goes_first() {
        let mut cache = PrefixCache::new(4);
        cache.store(&hashes(&[1, 2, 3]));
        cache.store(&hashes(&[7, 8]));
        let (stored, removed) = cache.take_changes().expect("changes");
        assert_eq!((stored.len(), removed), (5, vec![vec![3; 16]]));
        assert_eq!(cache.leading(&hashes(&[1, 2, 3])), 2);
        cache.store(&hashes(&[1, 2]));
        assert!(cache.take_changes().is_none(), "nothing is new");
        cache.store(&hashes(&[9]));
        assert_eq!(cache.leading(&hashes(&[7, 8])), 1);
        assert_eq!(cache.snapshot().len(), 4);
    }
}
