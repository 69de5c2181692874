//! What every level's kernel computes: the sums of one panel and one tile of rows.

use super::activations::Tile;
use super::layout::{CHANNELS, Format};

/// The most rows that a tile of any level has.
pub(super) const MAX_ROWS: usize = 13;

/// A sum for each row of a tile and channel of a panel.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Sums(pub(super) [[f32; CHANNELS]; MAX_ROWS]);

impl Sums {
    /// The first R rows, of which there are at most `MAX_ROWS`.
    #[inline(always)]
    pub(super) fn rows<const R: usize>(&self) -> &[[f32; CHANNELS]; R] {
        &self.0.as_chunks::<R>().0[0]
    }

    #[inline(always)]
    pub(super) fn rows_mut<const R: usize>(&mut self) -> &mut [[f32; CHANNELS]; R] {
        &mut self.0.as_chunks_mut::<R>().0[0]
    }
}

/// Adds what a row's groups contribute, pair by pair, always in the same order:
///
/// ```text
/// level 3                 +
/// level 2         +               +
/// level 1     +       +       +       +
/// level 0   0   1   2   3   4   5   6   7   groups
/// ```
///
/// A level holds the last left side that waits for its right side; the top of the tree is the sum.
pub(super) struct Tree<'a>(pub(super) &'a mut [Sums]);

impl Tree<'_> {
    /// Levels of the tree that adds a power of two of groups.
    pub(super) fn depth(groups: usize) -> usize {
        groups.ilog2() as usize + 1
    }

    /// The sum of all groups.
    pub(super) fn top(&self) -> &Sums {
        &self.0[self.0.len() - 1]
    }

    /// Add what `group` contributes to a row.
    #[inline(always)]
    pub(super) fn add(&mut self, group: usize, row: usize, mut values: [f32; CHANNELS]) {
        let level = group.trailing_ones() as usize;
        for left in &self.0[..level] {
            for (lane, value) in values.iter_mut().enumerate() {
                *value += left.0[row][lane];
            }
        }
        self.0[level].0[row] = values;
    }
}

/// One group of a panel, and of one tile of rows.
pub(super) struct Work<'a> {
    pub(super) format: Format,
    pub(super) group: usize,
    pub(super) block: &'a [u8],
    pub(super) tile: Tile<'a>,
    /// What will be read from memory soon: fetched into a cache meanwhile.
    pub(super) ahead: &'a [u8],
}
