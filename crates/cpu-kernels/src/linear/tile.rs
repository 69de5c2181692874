//! What every level's kernel computes: the sums of one panel and one tile of rows.

use super::activations::Tile;
use super::layout::{CHANNELS, Packed, TREE_DEPTH};

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
#[derive(Clone)]
pub(super) struct Tree(pub(super) [Sums; TREE_DEPTH]);

impl Tree {
    pub(super) fn new() -> Self {
        Self([Sums([[0.0; CHANNELS]; MAX_ROWS]); TREE_DEPTH])
    }

    /// After the last of `groups` groups: a power of two.
    #[inline]
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

/// One group of a panel, and one tile of rows.
pub(super) struct Work<'a> {
    pub(super) weight: Packed<'a>,
    pub(super) panel: usize,
    pub(super) group: usize,
    pub(super) tile: Tile<'a>,
    /// What will be read from memory soon: fetched into a cache meanwhile.
    pub(super) ahead: &'a [u8],
}

impl<'a> Work<'a> {
    #[inline]
    pub(super) fn block(&self) -> &'a [u8] {
        self.weight.block(self.group, self.panel)
    }

    /// The tile's activations of the group.
    #[inline]
    pub(super) fn values(&self) -> &'a [u8] {
        let size = self.tile.values.len() / self.weight.layout().k_groups();
        &self.tile.values[self.group * size..][..size]
    }

    /// The scales of the tile's rows in the group.
    #[inline]
    pub(super) fn scales(&self) -> &'a [f32] {
        &self.tile.scales[self.group * self.tile.rows..][..self.tile.rows]
    }

    /// The offsets of the tile's rows in the group: `[offsets][rows]`.
    #[inline]
    pub(super) fn offsets(&self) -> &'a [i32] {
        let size = self.weight.layout().offsets() * self.tile.rows;
        &self.tile.offsets[self.group * size..][..size]
    }
}
