//! Where tiles come from: the cache itself, or int8 made bf16.

use std::ops::Range;

use super::ahead::Ahead;
#[cfg(target_arch = "x86_64")]
use super::avx512;
use super::batch::{Batch, Span};
use super::layout::{Cache, KvType};
#[cfg(target_arch = "x86_64")]
use super::tile::WholeTile;
use super::tile::{AnyTile, LANES, TILE, Tile, VECTORS, widen_pair};
use crate::level::Level;
use crate::vectorise::vectorised;

/// Numbers of f32 that a converted tile takes.
pub(super) fn converted_numbers(dim: usize) -> usize {
    TILE * dim + 2 * TILE
}

/// The keys and values of a batch.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub cache: &'a Cache<'a>,
    pub batch: &'a Batch<'a>,
    pub level: Level,
}

impl Source<'_> {
    /// The tile at position `base`; vectors outside of `seen` are left out. `numbers` are as many
    /// as a converted tile takes.
    pub fn tile<'a>(
        &'a self,
        span: &Span,
        head: usize,
        base: usize,
        seen: Range<usize>,
        numbers: &'a mut [f32],
    ) -> AnyTile<'a> {
        match self.cache.layout().dtype() {
            KvType::Bf16 => AnyTile::Bf16(self.in_place(span, head, base, seen)),
            #[cfg(target_arch = "x86_64")]
            KvType::Int8 if self.dot_products() => {
                AnyTile::Int8(self.whole(span, head, base, seen))
            }
            KvType::Int8 => AnyTile::Bf16(self.converted(span, head, base, seen, numbers)),
        }
    }

    /// Whether queries are multiplied as whole numbers.
    pub fn whole_queries(&self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.dot_products() && self.cache.layout().dtype() == KvType::Int8;
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// The memory of the tile at position `base`, of positions below `end`.
    pub fn ahead(&self, span: &Span, head: usize, base: usize, end: usize) -> Ahead<VECTORS> {
        let layout = self.cache.layout();
        // As many pieces of a head's part of a block as it has vectors of keys; together, all of it.
        let bytes = layout.bytes_per_head() / (layout.block_tokens() / LANES);
        Ahead::new(std::array::from_fn(|vector| {
            let position = base + vector * LANES;
            if position >= end {
                return (std::ptr::null(), 0);
            }
            let (part, slot) = self.place(span, head, position);
            (part.cast_const().wrapping_add(slot / LANES * bytes), bytes)
        }))
    }

    /// Whether there are instructions for it that take heads of this size.
    #[cfg(target_arch = "x86_64")]
    pub fn dot_products(&self) -> bool {
        self.level == Level::Avx512 && avx512::fits(self.cache.layout().head_dim())
    }

    /// Where a vector of keys at `position` lies: its head's part of a block, and its place there.
    fn place(&self, span: &Span, head: usize, position: usize) -> (*mut u8, usize) {
        let part = self.cache.head(self.batch.block(span, position), head);
        (part, position % self.cache.layout().block_tokens())
    }

    /// The tile at position `base`, of bf16; vectors outside of `seen` are left out.
    fn in_place(&self, span: &Span, head: usize, base: usize, seen: Range<usize>) -> Tile<'_> {
        let layout = self.cache.layout();
        let (dim, pairs) = (layout.head_dim(), layout.numbers() / 2);
        let mut tile = Tile {
            key_stride: layout.block_tokens(),
            ..Tile::default()
        };
        for vector in seen.start / LANES..seen.end.div_ceil(LANES) {
            let (part, slot) = self.place(span, head, base + vector * LANES);
            // SAFETY: a head's part of a block is `pairs` pairs of keys, then as many of values,
            // which nobody writes while `attend` runs.
            let part = unsafe { std::slice::from_raw_parts(part.cast(), 2 * pairs) };
            tile.keys[vector] = &part[slot..pairs];
            tile.values[vector] = &part[pairs + slot / 2 * dim..][..LANES / 2 * dim];
        }
        tile
    }

    /// The tile at position `base`, of int8 as it lies; vectors outside of `seen` are left out.
    #[cfg(target_arch = "x86_64")]
    fn whole(&self, span: &Span, head: usize, base: usize, seen: Range<usize>) -> WholeTile<'_> {
        let (block_tokens, dim) = {
            let layout = self.cache.layout();
            (layout.block_tokens(), layout.head_dim())
        };
        let mut tile = WholeTile {
            key_stride: block_tokens,
            ..WholeTile::default()
        };
        for vector in seen.start / LANES..seen.end.div_ceil(LANES) {
            let (part, slot) = self.place(span, head, base + vector * LANES);
            let (keys, values, scales) = self.parts_of_int8(part);
            tile.keys[vector] = &keys[slot..];
            tile.values[vector] = &values[slot / 2 * dim..][..LANES / 2 * dim];
            let (of_keys, of_values) = scales.split_at(block_tokens);
            tile.scales[vector] = (&of_keys[slot..][..LANES], &of_values[slot..][..LANES]);
        }
        tile
    }

    /// Keys, values and the scales of both in a head's part of a block.
    fn parts_of_int8(&self, part: *mut u8) -> (&[[i8; 2]], &[[i8; 2]], &[f32]) {
        let layout = self.cache.layout();
        let pairs = layout.numbers() / 2;
        // SAFETY: a head's part of a block is `pairs` pairs of keys, as many of values, then the
        // scales of both, which nobody writes while `attend` runs.
        unsafe {
            let scales = part.add(4 * pairs).cast::<f32>();
            (
                std::slice::from_raw_parts(part.cast(), pairs),
                std::slice::from_raw_parts(part.cast::<[i8; 2]>().add(pairs), pairs),
                std::slice::from_raw_parts(scales, 2 * layout.block_tokens()),
            )
        }
    }

    /// The tile at position `base`, of int8 made bf16 in `numbers`; vectors outside of `seen` are
    /// left out.
    fn converted<'a>(
        &self,
        span: &Span,
        head: usize,
        base: usize,
        seen: Range<usize>,
        numbers: &'a mut [f32],
    ) -> Tile<'a> {
        let layout = self.cache.layout();
        let (block_tokens, dim) = (layout.block_tokens(), layout.head_dim());
        let (keys, numbers) = numbers.split_at_mut(TILE / 2 * dim);
        let (values, scales) = numbers.split_at_mut(TILE / 2 * dim);
        let (keys, values) = (as_pairs(keys), as_pairs(values));
        let (key_scales, value_scales) = scales.as_chunks_mut::<TILE>().0.split_at_mut(1);
        let (key_scales, value_scales) = (&mut key_scales[0], &mut value_scales[0]);
        let vectors = seen.start / LANES..seen.end.div_ceil(LANES);
        let pairs_of = |vector: usize| vector * LANES / 2 * dim..(vector + 1) * LANES / 2 * dim;
        for vector in vectors.clone() {
            let (part, slot) = self.place(span, head, base + vector * LANES);
            let (old_keys, old_values, scales) = self.parts_of_int8(part);
            let (old_keys, old_values) = (&old_keys[slot..], &old_values[slot / 2 * dim..]);
            let (level, into) = (self.level, pairs_of(vector));
            widen_rows(
                level,
                old_keys,
                block_tokens,
                LANES,
                &mut keys[into.clone()],
            );
            widen_rows(level, old_values, dim, dim, &mut values[into]);
            let into = vector * LANES..(vector + 1) * LANES;
            key_scales[into.clone()].copy_from_slice(&scales[slot..][..LANES]);
            value_scales[into].copy_from_slice(&scales[block_tokens + slot..][..LANES]);
        }
        let mut tile = Tile {
            key_stride: LANES,
            ..Tile::default()
        };
        for vector in vectors {
            tile.keys[vector] = &keys[pairs_of(vector)];
            tile.values[vector] = &values[pairs_of(vector)];
        }
        tile.scales = Some((key_scales, value_scales));
        tile
    }
}

/// The same memory as pairs of bf16.
fn as_pairs(numbers: &mut [f32]) -> &mut [u32] {
    // SAFETY: both are plain numbers of 4 bytes.
    unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), numbers.len()) }
}

vectorised! {
    fn widen_rows(old: &[[i8; 2]], stride: usize, width: usize, new: &mut [u32]) {
        for (old, new) in old.chunks(stride).zip(new.chunks_exact_mut(width)) {
            new.iter_mut().zip(old).for_each(|(new, &pair)| *new = widen_pair(pair));
        }
    }
}
