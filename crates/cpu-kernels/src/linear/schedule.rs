//! How a product is divided among threads.
//!
//! ```text
//!              panels of the weight
//! chunk 0  |  0   1   2   3   4   5  |      rows of x that stay in a core's second-level cache
//! chunk 1  |  6   7   8   9  10  11  |
//!            '---- thread 0's ---' ...
//! ```
//!
//! A piece is a panel with all tiles of a chunk of rows, so that a weight is read from memory once
//! for every chunk. Each thread has a run of pieces of its own and computes them in order: it knows
//! which weights it reads next, and fetches them meanwhile. Who is done with its own takes from the
//! end of the longest run that is left, so that a thread which loses its core, or comes late,
//! delays only the piece that it holds.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::activations::Tiles;
use super::layout::Layout;

/// Activations of a chunk.
const CHUNK_BYTES: usize = 512 << 10;

pub(super) struct Schedule {
    panels: usize,
    tiles: usize,
    chunk: usize,
    runs: Vec<Run>,
}

/// What a thread computes at once, and the panel that it will probably compute next.
pub(super) struct Piece {
    pub(super) panel: usize,
    pub(super) tiles: Range<usize>,
    pub(super) next: Option<usize>,
}

impl Schedule {
    /// For tiles whose activations take `bytes` together, on `threads` threads.
    pub(super) fn new(layout: &Layout, tiles: Tiles, bytes: usize, threads: usize) -> Self {
        let panels = layout.panels();
        let tiles = tiles.count();
        let chunks = bytes.div_ceil(CHUNK_BYTES).clamp(1, tiles);
        let chunk = tiles.div_ceil(chunks);
        let pieces = panels * tiles.div_ceil(chunk);
        assert!(u32::try_from(pieces).is_ok(), "{pieces} pieces");
        let end = |thread: usize| pieces * thread / threads;
        Self {
            panels,
            tiles,
            chunk,
            runs: (0..threads)
                .map(|thread| Run::new(end(thread)..end(thread + 1)))
                .collect(),
        }
    }

    /// A piece that nobody has taken, for `thread`; none if all are.
    pub(super) fn take(&self, thread: usize) -> Option<Piece> {
        let (index, next) = self.take_index(thread)?;
        let first = index / self.panels * self.chunk;
        Some(Piece {
            panel: index % self.panels,
            tiles: first..(first + self.chunk).min(self.tiles),
            next: next.map(|next| next % self.panels),
        })
    }

    /// The piece taken, and the one that the same thread will probably take next.
    fn take_index(&self, thread: usize) -> Option<(usize, Option<usize>)> {
        let own = &self.runs[thread];
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
        let runs = self.runs.iter();
        let longest = runs.max_by_key(|run| run.left().len());
        longest.unwrap_or(&self.runs[0])
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
    use crate::linear::layout::Format;

    fn schedule(panels: usize, rows: usize, bytes: usize, threads: usize) -> Schedule {
        let layout = Layout::new(Format::Int8, 32 * panels, 64, 1, false).unwrap();
        Schedule::new(&layout, Tiles::new(rows, 13), bytes, threads)
    }

    #[test]
    fn threads_take_every_panel_and_tile_once_and_their_own_in_order() {
        for (panels, rows, bytes) in [(1, 1, 64), (7, 64, 64), (64, 512, 3 << 20)] {
            for threads in [1, 2, 3, 8] {
                let schedule = schedule(panels, rows, bytes, threads);
                let mut taken = vec![0; panels * rows.div_ceil(13)];
                let mut thread = 0;
                // By turns, but the first is as fast as all others together.
                while let Some(piece) = schedule.take(thread) {
                    for tile in piece.tiles {
                        taken[piece.panel * rows.div_ceil(13) + tile] += 1;
                    }
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
        let schedule = schedule(6, 1, 64, 2);
        let taken = |thread| {
            let piece: Piece = schedule.take(thread).unwrap();
            (piece.panel, piece.next)
        };
        assert_eq!(taken(0), (0, Some(1)));
        assert_eq!(taken(1), (3, Some(4)));
        assert_eq!(taken(0), (1, Some(2)));
        assert_eq!(taken(0), (2, Some(5)));
        assert_eq!(taken(0), (5, Some(4)));
        assert_eq!(taken(1), (4, None));
        assert!(schedule.take(0).is_none() && schedule.take(1).is_none());
    }
}
