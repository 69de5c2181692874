//! What every level's kernel computes: the sums of one panel and one tile of rows.

use super::activations::Tile;
use super::layout::{CHANNELS, Packed, TREE_DEPTH};

/// The most rows that a tile of any level has.
pub(super) const MAX_ROWS: usize = 13;

/// A sum for each row of a tile and channel of a panel.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Sums(pub(super) [[f32; CHANNELS]; MAX_ROWS]);

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
pub(super) struct Tree(pub(super) [Sums; TREE_DEPTH]);

impl Tree {
    pub(super) fn new() -> Self {
        Self([Sums([[0.0; CHANNELS]; MAX_ROWS]); TREE_DEPTH])
    }

    /// After the last of `groups` groups: a power of two.
    pub(super) fn sums(&self, groups: usize) -> &Sums {
        &self.0[groups.ilog2() as usize]
    }

    /// Add what `group` contributes to a row.
    #[inline(always)]
    pub(super) fn add(&mut self, group: usize, row: usize, mut values: [f32; CHANNELS]) {
        let level = group.trailing_ones() as usize;
        for left in &self.0[..level] {
            for (right, left) in values.iter_mut().zip(&left.0[row]) {
                *right += left;
            }
        }
        self.0[level].0[row] = values;
    }
}

/// One panel and one tile of rows.
pub(super) struct Work<'a> {
    pub(super) weight: Packed<'a>,
    pub(super) panel: usize,
    pub(super) tile: Tile<'a>,
    /// The panel that will be wanted next, and which part of how many of it to fetch meanwhile.
    pub(super) next: usize,
    pub(super) part: usize,
    pub(super) parts: usize,
}

impl<'a> Work<'a> {
    pub(super) fn block(&self, group: usize) -> &'a [u8] {
        self.weight.block(group, self.panel)
    }

    /// The tile's activations of a group.
    pub(super) fn values(&self, group: usize) -> &'a [u8] {
        let size = self.tile.values.len() / self.weight.layout().k_groups();
        &self.tile.values[group * size..][..size]
    }

    /// The scales of the tile's rows in a group.
    pub(super) fn scales(&self, group: usize) -> &'a [f32] {
        &self.tile.scales[group * self.tile.rows..][..self.tile.rows]
    }

    /// The offsets of the tile's rows in a group: `[offsets][rows]`.
    pub(super) fn offsets(&self, group: usize) -> &'a [i32] {
        let size = self.weight.layout().offsets() * self.tile.rows;
        &self.tile.offsets[group * size..][..size]
    }
}
