//! How a product is divided into tasks.
//!
//! ```text
//!              panels of the weight
//!             run 0   run 1   run 2
//! chunk 0  |   t0   |  t1   |  t2   |      rows of x that stay in a core's second-level cache
//! chunk 1  |   t3   |  t4   |  t5   |
//! ```
//!
//! A task computes a run of panels, each with all tiles of a chunk of rows, so that a weight is
//! read from memory once for every chunk. For few rows a run is as long as makes taking it from
//! the team's counter cheap.

use super::activations::Tiles;
use super::layout::Layout;

/// Activations of a chunk.
const CHUNK_BYTES: usize = 512 << 10;
/// Weights of a run for few rows.
const RUN_BYTES: usize = 256 << 10;
/// Tiles above which a panel alone is work enough.
const FEW_TILES: usize = 1;

pub(super) struct Schedule {
    panels: usize,
    run: usize,
    runs: usize,
    tiles: usize,
    chunk: usize,
    threads: usize,
}

/// What a task computes: ranges of panels and of tiles.
pub(super) struct Task {
    pub(super) panels: std::ops::Range<usize>,
    pub(super) tiles: std::ops::Range<usize>,
    /// The first panel of the run that this thread will probably take next.
    next: usize,
}

impl Task {
    /// The panel that this thread will probably compute after `panel`.
    pub(super) fn after(&self, panel: usize) -> usize {
        let after = panel + 1;
        if after < self.panels.end {
            after
        } else {
            self.next
        }
    }
}

impl Schedule {
    /// For tiles whose activations take `bytes` together, on `threads` threads.
    pub(super) fn new(layout: &Layout, tiles: Tiles, bytes: usize, threads: usize) -> Self {
        let panels = layout.panels();
        let panel_bytes = layout.k_groups() * layout.block_bytes();
        let tiles = tiles.count();
        let run = if tiles > FEW_TILES {
            1
        } else {
            (RUN_BYTES / panel_bytes).clamp(1, panels.div_ceil(8 * threads))
        };
        let chunks = bytes.div_ceil(CHUNK_BYTES).clamp(1, tiles);
        Self {
            panels,
            run,
            runs: panels.div_ceil(run),
            tiles,
            chunk: tiles.div_ceil(chunks),
            threads,
        }
    }

    /// The most tiles of a task.
    pub(super) fn chunk(&self) -> usize {
        self.chunk
    }

    pub(super) fn tasks(&self) -> usize {
        self.runs * self.tiles.div_ceil(self.chunk)
    }

    pub(super) fn task(&self, index: usize) -> Task {
        let first = index % self.runs * self.run;
        let tile = index / self.runs * self.chunk;
        let after = first + self.threads * self.run;
        Task {
            panels: first..(first + self.run).min(self.panels),
            tiles: tile..(tile + self.chunk).min(self.tiles),
            next: if after < self.panels { after } else { 0 },
        }
    }
}
