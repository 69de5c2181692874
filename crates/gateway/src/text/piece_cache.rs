//! Ids of texts that were encoded before, within a limit of bytes.

use std::collections::HashMap;
use std::mem::{size_of, take};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parking_lot::Mutex;

/// What an entry takes besides its text and its ids: its place in the table and what the allocator adds.
const ENTRY_BYTES: usize = 96;

/// Bytes of text that were looked up, and how many of them were found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheCounts {
    pub looked_up_bytes: u64,
    pub found_bytes: u64,
    /// Memory of what is held.
    pub held_bytes: usize,
}

type Generation = HashMap<Box<str>, Arc<[u32]>>;

/// Two generations of entries: new ones and those that were found go to the young one; when that is half the limit,
/// what the old one still has is forgotten and the young one becomes old.
pub(super) struct PieceCache {
    limit_bytes: usize,
    entries: Mutex<Entries>,
    looked_up_bytes: AtomicU64,
    found_bytes: AtomicU64,
}

#[derive(Default)]
struct Entries {
    young: Generation,
    young_bytes: usize,
    old: Generation,
    old_bytes: usize,
}

impl PieceCache {
    /// One that never holds more than `limit_bytes`; 0 holds nothing.
    pub(super) fn new(limit_bytes: usize) -> Self {
        Self {
            limit_bytes,
            entries: Mutex::default(),
            looked_up_bytes: AtomicU64::new(0),
            found_bytes: AtomicU64::new(0),
        }
    }

    pub(super) fn get(&self, text: &str) -> Option<Arc<[u32]>> {
        self.looked_up_bytes.fetch_add(text.len() as u64, Relaxed);
        let (ids, _forgotten) = {
            let mut entries = self.entries.lock();
            match entries.young.get(text) {
                Some(ids) => (Arc::clone(ids), None),
                None => {
                    let (text, ids) = entries.old.remove_entry(text)?;
                    entries.old_bytes -= cost(&text, &ids);
                    let forgotten = self.put(&mut entries, text, Arc::clone(&ids));
                    (ids, forgotten)
                }
            }
        };
        self.found_bytes.fetch_add(text.len() as u64, Relaxed);
        Some(ids)
    }

    pub(super) fn insert(&self, text: &str, ids: &[u32]) {
        let text: Box<str> = text.into();
        let ids = ids.into();
        // Freed once the lock is.
        let _forgotten = self.put(&mut self.entries.lock(), text, ids);
    }

    /// Adds to the young generation; returns what is forgotten for it.
    fn put(&self, entries: &mut Entries, text: Box<str>, ids: Arc<[u32]>) -> Option<Generation> {
        let (half, bytes) = (self.limit_bytes / 2, cost(&text, &ids));
        if bytes > half {
            return None;
        }
        let mut forgotten = None;
        if entries.young_bytes + bytes > half {
            let young = take(&mut entries.young);
            forgotten = Some(std::mem::replace(&mut entries.old, young));
            entries.old_bytes = take(&mut entries.young_bytes);
        }
        // Two threads may have encoded the same text at once.
        if entries.young.insert(text, ids).is_none() {
            entries.young_bytes += bytes;
        }
        forgotten
    }

    pub(super) fn counts(&self) -> CacheCounts {
        let entries = self.entries.lock();
        CacheCounts {
            looked_up_bytes: self.looked_up_bytes.load(Relaxed),
            found_bytes: self.found_bytes.load(Relaxed),
            held_bytes: entries.young_bytes + entries.old_bytes,
        }
    }
}

fn cost(text: &str, ids: &[u32]) -> usize {
    text.len() + size_of_val(ids) + ENTRY_BYTES + size_of::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_keeps_within_its_limit_and_what_is_used() {
        let cache = PieceCache::new(4000);
        cache.insert("used", &[1, 2]);
        for number in 0..1000_u32 {
            cache.insert(&format!("text {number}"), &[number]);
            assert_eq!(cache.get("used").as_deref(), Some(&[1, 2][..]));
            assert!(cache.counts().held_bytes <= 4000);
        }
        assert_eq!(cache.get("text 0"), None);
        assert_eq!(cache.get("text 999").as_deref(), Some(&[999][..]));
        let counts = cache.counts();
        assert_eq!(counts.looked_up_bytes - counts.found_bytes, 6);
    }

    #[test]
    fn a_limit_of_nothing_holds_nothing() {
        let cache = PieceCache::new(0);
        cache.insert("text", &[1]);
        assert_eq!(cache.get("text"), None);
        assert_eq!(cache.counts().held_bytes, 0);
    }
}
