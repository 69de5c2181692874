//! Which prefix blocks an engine holds, from its KV events.

use std::collections::HashSet;

use crate::proto;

/// A mirror of one engine's prefix cache; bounded by the engine's number of blocks.
#[derive(Debug, Default)]
pub(super) struct KvView {
    /// Epoch and number of the last event applied; without it everything waits for a snapshot.
    applied: Option<(u64, u64)>,
    blocks: HashSet<[u8; 16]>,
}

impl KvView {
    /// Forgets everything: another session or another engine follows.
    pub(super) fn reset(&mut self) {
        self.applied = None;
        self.blocks.clear();
    }

    /// Applies one event. Returns false if there is a gap before it: then a snapshot must be asked for.
    pub(super) fn apply(&mut self, events: &proto::KvEvents) -> bool {
        if events.snapshot {
            self.blocks.clear();
        } else {
            match self.applied {
                Some((epoch, sequence)) if epoch == events.epoch && events.sequence <= sequence => {
                    return true;
                }
                Some((epoch, sequence))
                    if epoch == events.epoch && events.sequence == sequence + 1 => {}
                Some(_) => {
                    self.reset();
                    return false;
                }
                // The snapshot has been asked for and will hold this event too.
                None => return true,
            }
        }
        for stored in &events.stored {
            if let Ok(hash) = stored.hash.as_slice().try_into() {
                self.blocks.insert(hash);
            }
        }
        for removed in &events.removed {
            if let Ok(hash) = <[u8; 16]>::try_from(removed.as_slice()) {
                self.blocks.remove(&hash);
            }
        }
        self.applied = Some((events.epoch, events.sequence));
        true
    }

    /// How many of `hashes`, from the first, are cached.
    pub(super) fn leading(&self, hashes: &[[u8; 16]]) -> usize {
        hashes
            .iter()
            .take_while(|hash| self.blocks.contains(*hash))
            .count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(sequence: u64, snapshot: bool, stored: &[u8], removed: &[u8]) -> proto::KvEvents {
        proto::KvEvents {
            epoch: 7,
            sequence,
            snapshot,
            stored: stored
                .iter()
                .map(|&b| proto::KvStored {
                    parent: vec![],
                    hash: vec![b; 16],
                })
                .collect(),
            removed: removed.iter().map(|&b| vec![b; 16]).collect(),
        }
    }

    #[test]
    fn a_gap_empties_the_view_until_the_snapshot() {
        let mut view = KvView::default();
        assert!(
            view.apply(&event(5, false, &[9], &[])),
            "before the first snapshot events are passed over"
        );
        assert_eq!(view.leading(&[[9; 16]]), 0);
        assert!(view.apply(&event(5, true, &[1, 2], &[])));
        assert!(view.apply(&event(6, false, &[3], &[1])));
        assert!(
            view.apply(&event(6, false, &[1], &[])),
            "a repeated event is passed over"
        );
        assert_eq!(view.leading(&[[2; 16], [3; 16], [1; 16]]), 2);
        assert!(!view.apply(&event(8, false, &[4], &[])), "7 is missing");
        assert_eq!(view.leading(&[[2; 16]]), 0);
        assert!(view.apply(&event(9, false, &[], &[])));
        assert!(view.apply(&event(9, true, &[4], &[])));
        assert_eq!(view.leading(&[[4; 16]]), 1);
    }

    #[test]
    fn another_epoch_is_a_gap() {
        let mut view = KvView::default();
        assert!(view.apply(&event(1, true, &[1], &[])));
        let mut other = event(2, false, &[2], &[]);
        other.epoch = 8;
        assert!(!view.apply(&other));
        assert_eq!(view.leading(&[[1; 16]]), 0);
    }
}
