//! Which prefix blocks an engine holds, from its KV events, in order and without gaps.

use std::sync::Arc;

use crate::proto;

/// Names a block and everything before it, as `KvEvents` in engine.proto says.
pub type BlockHash = [u8; 16];

/// Keeps a mirror of an engine's prefix cache. Called by the task that reads the engine's frames: must not wait.
pub trait KvSink: Send + Sync {
    /// Blocks that are cached now, and that are not any more.
    fn change(&self, stored: Vec<BlockHash>, removed: Vec<BlockHash>);
    /// Nothing is known of the cache: the connection is new, or an event was lost. A snapshot follows.
    fn clear(&self);
}

/// Brings a sink into step with one engine.
pub(super) struct KvView {
    sink: Arc<dyn KvSink>,
    /// Epoch and number of the last event applied; without it everything waits for a snapshot.
    applied: Option<(u64, u64)>,
}

impl KvView {
    pub(super) fn new(sink: Arc<dyn KvSink>) -> KvView {
        KvView {
            sink,
            applied: None,
        }
    }

    /// Forgets everything: another session or another engine follows.
    pub(super) fn reset(&mut self) {
        self.applied = None;
        self.sink.clear();
    }

    /// Applies one event. Returns false if there is a gap before it: then a snapshot must be asked for.
    pub(super) fn apply(&mut self, events: &proto::KvEvents) -> bool {
        if events.snapshot {
            self.sink.clear();
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
        // What is not 16 bytes names no block.
        let stored = events.stored.iter().map(|stored| &stored.hash);
        let stored = stored.filter_map(|hash| hash.as_slice().try_into().ok());
        let removed = events.removed.iter();
        let removed = removed.filter_map(|hash| hash.as_slice().try_into().ok());
        self.sink.change(stored.collect(), removed.collect());
        self.applied = Some((events.epoch, events.sequence));
        true
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use parking_lot::Mutex;

    use super::*;

    #[derive(Default)]
    struct Blocks(Mutex<BTreeSet<u8>>);

    impl KvSink for Blocks {
        fn change(&self, stored: Vec<BlockHash>, removed: Vec<BlockHash>) {
            let mut blocks = self.0.lock();
            blocks.extend(stored.iter().map(|hash| hash[0]));
            blocks.retain(|block| removed.iter().all(|hash| hash[0] != *block));
        }

        fn clear(&self) {
            self.0.lock().clear();
        }
    }

    impl Blocks {
        fn all(&self) -> Vec<u8> {
            self.0.lock().iter().copied().collect()
        }
    }

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
        let blocks = Arc::new(Blocks::default());
        let mut view = KvView::new(blocks.clone());
        assert!(
            view.apply(&event(5, false, &[9], &[])),
            "before the first snapshot events are passed over"
        );
        assert!(blocks.all().is_empty());
        assert!(view.apply(&event(5, true, &[1, 2], &[])));
        assert!(view.apply(&event(6, false, &[3], &[1])));
        assert!(
            view.apply(&event(6, false, &[1], &[])),
            "a repeated event is passed over"
        );
        assert_eq!(blocks.all(), [2, 3]);
        assert!(!view.apply(&event(8, false, &[4], &[])), "7 is missing");
        assert!(blocks.all().is_empty());
        assert!(view.apply(&event(9, false, &[], &[])));
        assert!(view.apply(&event(9, true, &[4], &[])));
        assert_eq!(blocks.all(), [4]);
    }

    #[test]
    fn another_epoch_is_a_gap() {
        let blocks = Arc::new(Blocks::default());
        let mut view = KvView::new(blocks.clone());
        assert!(view.apply(&event(1, true, &[1], &[])));
        let mut other = event(2, false, &[2], &[]);
        other.epoch = 8;
        assert!(!view.apply(&other));
        assert!(blocks.all().is_empty());
    }

    #[test]
    fn a_hash_of_another_length_names_no_block() {
        let blocks = Arc::new(Blocks::default());
        let mut view = KvView::new(blocks.clone());
        let mut odd = event(1, true, &[1], &[]);
        odd.stored[0].hash.pop();
        assert!(view.apply(&odd));
        assert!(blocks.all().is_empty());
    }
}
