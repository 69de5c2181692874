//! Who computes which pieces of a job, and what a thread will probably compute next.
//!
//! ```text
//! pieces   0  1  2  3 | 4  5  6  7
//!          '--------'   '--------'
//!          thread 0's   thread 1's, in order; then from the end of the longest run left
//! ```
//!
//! Each thread has a run of pieces of its own and takes them in order: it knows what it reads next,
//! and can fetch that meanwhile. Who is done with its own takes from the end of the longest run
//! that is left, so that a thread which loses its core, or comes late, delays only the piece that
//! it holds.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// A run of pieces for each thread.
pub(crate) struct Runs(Vec<Run>);

impl Runs {
    /// # Panics
    /// If there are 2^32 pieces or more.
    pub(crate) fn new(pieces: usize, threads: usize) -> Self {
        assert!(u32::try_from(pieces).is_ok(), "{pieces} pieces");
        let end = |thread: usize| pieces * thread / threads;
        let run = |thread| Run::new(end(thread)..end(thread + 1));
        Self((0..threads).map(run).collect())
    }

    /// A piece that nobody has taken, for `thread`, and the one that it will probably take next;
    /// none if all are.
    pub(crate) fn take(&self, thread: usize) -> Option<(usize, Option<usize>)> {
        let own = &self.0[thread];
        if let Some((index, left)) = own.take(End::First) {
            let next = (!left.is_empty()).then_some(left.start);
            return Some((index, next.or_else(|| self.longest().left().last())));
        }
        loop {
            let longest = self.longest();
            if let Some((index, left)) = longest.take(End::Last) {
                return Some((index, left.last()));
            }
            if longest.left().is_empty() {
                return None;
            }
        }
    }

    fn longest(&self) -> &Run {
        let longest = self.0.iter().max_by_key(|run| run.left().len());
        longest.unwrap_or(&self.0[0])
    }
}

enum End {
    First,
    Last,
}

/// Pieces in a row that are left: the first in the low half, the end in the high half. Alone in the
/// cache lines that a core fetches together.
#[repr(align(128))]
struct Run(AtomicU64);

impl Run {
    fn new(pieces: Range<usize>) -> Self {
        Self(AtomicU64::new(Self::packed(pieces)))
    }

    fn packed(pieces: Range<usize>) -> u64 {
        pieces.start as u64 | (pieces.end as u64) << 32
    }

    fn range(packed: u64) -> Range<usize> {
        (packed & u64::from(u32::MAX)) as usize..(packed >> 32) as usize
    }

    fn left(&self) -> Range<usize> {
        Self::range(self.0.load(Ordering::Relaxed))
    }

    /// Take one piece; it, and what is left.
    ///
    /// What pieces are made of was written before any thread came, and what they make is read after
    /// all have gone: nothing else hangs on the order of these accesses.
    fn take(&self, end: End) -> Option<(usize, Range<usize>)> {
        let mut packed = self.0.load(Ordering::Relaxed);
        loop {
            let left = Self::range(packed);
            if left.is_empty() {
                return None;
            }
            let (taken, after) = match end {
                End::First => (left.start, left.start + 1..left.end),
                End::Last => (left.end - 1, left.start..left.end - 1),
            };
            let new = Self::packed(after.clone());
            let (this, other) = (Ordering::Relaxed, Ordering::Relaxed);
            match self.0.compare_exchange_weak(packed, new, this, other) {
                Ok(_) => return Some((taken, after)),
                Err(now) => packed = now,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_take_every_piece_once_and_their_own_in_order() {
        for pieces in [0, 1, 7, 320] {
            for threads in [1, 2, 3, 8] {
                let runs = Runs::new(pieces, threads);
                let mut taken = vec![0; pieces];
                let mut thread = 0;
                // By turns, but the first is as fast as all others together.
                while let Some((piece, _)) = runs.take(thread) {
                    taken[piece] += 1;
                    thread = if thread == 0 { threads - 1 } else { thread - 1 };
                }
                assert!(
                    taken.iter().all(|&times| times == 1),
                    "{threads}: {taken:?}"
                );
            }
        }
    }

    #[test]
    fn who_is_done_takes_the_last_of_the_longest_run_and_knows_what_comes_next() {
        let runs = Runs::new(6, 2);
        assert_eq!(runs.take(0), Some((0, Some(1))));
        assert_eq!(runs.take(1), Some((3, Some(4))));
        assert_eq!(runs.take(0), Some((1, Some(2))));
        assert_eq!(runs.take(0), Some((2, Some(5))));
        assert_eq!(runs.take(0), Some((5, Some(4))));
        assert_eq!(runs.take(1), Some((4, None)));
        assert!(runs.take(0).is_none() && runs.take(1).is_none());
    }
}
