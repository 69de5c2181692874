//! Prompts that were there when replicas died: refused for a while, so that none can kill every replica in turn.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// The longest refused makes place for a further one.
const MAX_REFUSED: usize = 4096;

/// Of one model, by fingerprint: a keyed hash that nobody outside can aim at.
#[derive(Debug)]
pub struct RefusedPrompts {
    hasher: RandomState,
    /// Oldest first, so that the first to end is the first.
    refused: Mutex<Vec<(u64, Instant)>>,
    /// So that requests hash their prompts only while any is refused.
    count: AtomicUsize,
    refused_for: Duration,
}

impl RefusedPrompts {
    #[must_use]
    pub fn new(refused_for: Duration) -> RefusedPrompts {
        RefusedPrompts {
            hasher: RandomState::new(),
            refused: Mutex::default(),
            count: AtomicUsize::new(0),
            refused_for,
        }
    }

    pub fn refuse(&self, prompt: &[u32], now: Instant) {
        let fingerprint = self.hasher.hash_one(prompt);
        let mut refused = self.refused.lock();
        refused.retain(|(known, until)| *known != fingerprint && *until > now);
        if refused.len() >= MAX_REFUSED {
            refused.remove(0);
        }
        refused.push((fingerprint, now + self.refused_for));
        self.count.store(refused.len(), Relaxed);
    }

    /// How long the prompt will go on being refused, if it is.
    #[must_use]
    pub fn left(&self, prompt: &[u32], now: Instant) -> Option<Duration> {
        if self.len() == 0 {
            return None;
        }
        let fingerprint = self.hasher.hash_one(prompt);
        let mut refused = self.refused.lock();
        refused.retain(|(_, until)| *until > now);
        self.count.store(refused.len(), Relaxed);
        let (_, until) = refused.iter().find(|(known, _)| *known == fingerprint)?;
        Some(until.duration_since(now))
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.count.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_is_refused_for_its_time() {
        let prompts = RefusedPrompts::new(Duration::from_secs(600));
        let now = Instant::now();
        assert_eq!(prompts.left(&[1, 2], now), None);
        prompts.refuse(&[1, 2], now);
        prompts.refuse(&[1, 2], now + Duration::from_secs(1));
        assert_eq!(prompts.len(), 1);
        assert_eq!(prompts.left(&[1], now), None);
        let later = now + Duration::from_secs(600);
        assert_eq!(prompts.left(&[1, 2], later), Some(Duration::from_secs(1)));
        assert_eq!(prompts.left(&[1, 2], later + Duration::from_secs(1)), None);
        assert_eq!(prompts.len(), 0);
    }

    #[test]
    fn the_table_is_bounded() {
        let prompts = RefusedPrompts::new(Duration::from_secs(600));
        let now = Instant::now();
        for id in 0..=MAX_REFUSED as u32 {
            prompts.refuse(&[id], now);
        }
        assert_eq!(prompts.len(), MAX_REFUSED);
        assert_eq!(prompts.left(&[0], now), None);
        assert!(prompts.left(&[1], now).is_some());
    }
}
