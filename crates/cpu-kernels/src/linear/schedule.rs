//! How a product is divided into pieces.
//!
//! ```text
//!              panels of the weight
//! chunk 0  |  0   1   2   3   4   5  |      rows of x that stay in a core's second-level cache
//! chunk 1  |  6   7   8   9  10  11  |
//! ```
//!
//! A piece is a panel with all tiles of a chunk of rows, so that a weight is read from memory once
//! for every chunk. Threads take them as `runs` says.

use std::ops::Range;

use super::activations::Tiles;
use super::layout::Layout;
use crate::runs::Runs;

/// Activations of a chunk.
const CHUNK_BYTES: usize = 512 << 10;

pub(super) struct Schedule {
    panels: usize,
    tiles: usize,
    chunk: usize,
    runs: Runs,
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
        Self {
            panels,
            tiles,
            chunk,
            runs: Runs::new(panels * tiles.div_ceil(chunk), threads),
        }
    }

    /// A piece that nobody has taken, for `thread`; none if all are.
    pub(super) fn take(&self, thread: usize) -> Option<Piece> {
        let (index, next) = self.runs.take(thread)?;
        let first = index / self.panels * self.chunk;
        Some(Piece {
            panel: index % self.panels,
            tiles: first..(first + self.chunk).min(self.tiles),
            next: next.map(|next| next % self.panels),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear::layout::Format;

    #[test]
    fn pieces_are_every_panel_and_tile_once() {
        for (panels, rows, bytes) in [(1, 1, 64), (7, 64, 64), (64, 512, 3 << 20)] {
            let layout = Layout::new(Format::Int8, 32 * panels, 64, 1, false).unwrap();
            let schedule = Schedule::new(&layout, Tiles::new(rows, 13), bytes, 2);
            let mut taken = vec![0; panels * rows.div_ceil(13)];
            while let Some(piece) = schedule.take(1) {
                for tile in piece.tiles {
                    taken[piece.panel * rows.div_ceil(13) + tile] += 1;
                }
            }
            assert!(taken.iter().all(|&times| times == 1), "{taken:?}");
        }
    }
}
