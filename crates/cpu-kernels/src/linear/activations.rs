//! A batch's activations as the kernels read them: normalised, in tiles of rows, interleaved.
//!
//! ```text
//! tile      rows of the batch that a kernel keeps sums for in registers; sizes differ by at most 1
//! values    per tile: [groups][steps][rows of the tile] units of 4 bytes
//!           a unit is 4 int8 or 2 bf16 neighbours along k
//! scales    per tile: [groups][rows of the tile] f32, the int8 value times this is the activation
//! offsets   per tile: [groups][offsets][rows of the tile] i32, -128 or -8 times the sum of the
//!           int8 values: what unsigned weights add too much; -1 times where weights have zeros
//! ```
//!
//! A group of a row with something infinite or NaN in it has NaN as its scale. Groups whose largest
//! magnitude is below 2^-100 count as zeros.

use half::bf16;

use super::layout::{Format, Layout};
use crate::bfloat::ROUND;
use crate::level::Level;
use crate::norm::{RmsNorm, normalise};
use crate::rows::{Rows, RowsMut};
use crate::team::Team;
use crate::vectorise::vectorised;

/// What a weight is multiplied with: rows, or their norms, which are then written nowhere.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    /// [rows, k]
    pub rows: Rows<'a, bf16>,
    pub norm: Option<RmsNorm<'a>>,
}

impl<'a> From<Rows<'a, bf16>> for Input<'a> {
    fn from(rows: Rows<'a, bf16>) -> Self {
        Self { rows, norm: None }
    }
}

impl Input<'_> {
    pub(super) fn check(&self, layout: &Layout) {
        assert_eq!(self.rows.cols(), layout.k(), "inputs of the weight");
        if let Some(norm) = self.norm {
            assert_eq!(norm.weight.len(), layout.k(), "length of the norm's weight");
        }
    }

    /// Bytes that a thread needs for a row's norm, in lines of its own.
    pub(super) fn room(&self) -> usize {
        let bytes = self.norm.map_or(0, |norm| size_of_val(norm.weight));
        bytes.next_multiple_of(64)
    }

    /// A row as it is multiplied, in `room` if it has to be computed.
    #[inline(always)]
    fn row<'b>(&'b self, index: usize, room: &'b mut [bf16]) -> &'b [bf16] {
        let x = self.rows.row(index);
        let Some(norm) = self.norm else { return x };
        let room = &mut room[..x.len()];
        normalise(x, norm, room);
        room
    }
}

/// Inputs that are quantised at a time.
const CHUNK: usize = 32;
/// Elements that are prepared sooner than another thread would begin to help.
const SMALL: usize = 16 << 10;
/// What a unit of interleaved activations takes.
const UNIT_BYTES: usize = 4;
/// Below this the reciprocal of a scale would come near overflow.
const TINY: f32 = 1.0 / (1_u128 << 100) as f32;
/// How the rows of a batch are divided.
#[derive(Clone, Copy)]
pub(super) struct Tiles {
    count: usize,
    /// Rows of a tile, of which the first `larger` have one more.
    size: usize,
    larger: usize,
}

impl Tiles {
    pub(super) fn new(rows: usize, most: usize) -> Self {
        let count = rows.div_ceil(most);
        Self {
            count,
            size: rows.checked_div(count).unwrap_or(0),
            larger: rows.checked_rem(count).unwrap_or(0),
        }
    }

    pub(super) fn count(self) -> usize {
        self.count
    }

    /// First row and number of rows of a tile.
    #[inline]
    pub(super) fn tile(self, index: usize) -> (usize, usize) {
        let first = index * self.size + index.min(self.larger);
        (first, self.size + usize::from(index < self.larger))
    }
}

/// All tiles of a batch.
pub(super) struct Activations<'a> {
    tiles: Tiles,
    groups: usize,
    sizes: Sizes,
    values: &'a [u8],
    scales: &'a [f32],
    offsets: &'a [i32],
}

/// One group of a tile.
pub(super) struct Tile<'a> {
    pub(super) rows: usize,
    /// `[steps][rows][4]`
    pub(super) values: &'a [u8],
    /// `[rows]`
    pub(super) scales: &'a [f32],
    /// `[offsets][rows]`
    pub(super) offsets: &'a [i32],
}

/// What a row takes in each group: bytes of values, scales, offsets.
#[derive(Clone, Copy)]
struct Sizes {
    values: usize,
    scales: usize,
    offsets: usize,
}

impl Sizes {
    fn new(layout: &Layout) -> Self {
        let (values, scales) = match layout.format() {
            Format::Bf16 => (layout.block_k() * 2, 0),
            Format::Int8 | Format::Int4 { .. } => (layout.block_k(), 1),
        };
        Self {
            values,
            scales,
            offsets: layout.offsets(),
        }
    }
}

/// Bytes that the values, scales and offsets of some rows take.
pub(super) fn sizes(layout: &Layout, rows: usize) -> [usize; 3] {
    let sizes = Sizes::new(layout);
    let rows = rows * layout.k_groups();
    [
        rows * sizes.values,
        rows * sizes.scales * 4,
        rows * sizes.offsets * 4,
    ]
}

impl<'a> Activations<'a> {
    /// Normalise (if asked to), quantise (for integer weights) and interleave `x`, tiles in
    /// parallel, into memory of `sizes` bytes; `rooms`: `Input::room` for each thread. All are
    /// aligned to 64.
    pub(super) fn prepare(
        team: &Team,
        level: Level,
        layout: &Layout,
        x: Input,
        tiles: Tiles,
        rooms: &mut [u8],
        [values, scales, offsets]: [&'a mut [u8]; 3],
    ) -> Self {
        let (sizes, groups) = (Sizes::new(layout), layout.k_groups());
        // SAFETY: any bytes are valid numbers.
        let (scales, offsets) =
            unsafe { (scales.align_to_mut::<f32>().1, offsets.align_to_mut().1) };
        {
            let values = flat(values);
            let scales = flat(scales);
            let offsets = flat(offsets);
            let room = x.room() / size_of::<bf16>();
            // SAFETY: any bytes are valid numbers.
            let rooms = RowsMut::of(unsafe { rooms.align_to_mut::<bf16>().1 }, room);
            let task = |index: usize, thread: usize| {
                let (first, rows) = tiles.tile(index / groups);
                let group = index % groups;
                let at = |size| first * size * groups + group * rows * size;
                // SAFETY: groups of tiles own disjoint ranges, and each is one task.
                let part = unsafe {
                    Part {
                        first,
                        rows,
                        group,
                        values: values.part(0, at(sizes.values), rows * sizes.values),
                        scales: scales.part(0, at(sizes.scales), rows * sizes.scales),
                        offsets: offsets.part(0, at(sizes.offsets), rows * sizes.offsets),
                    }
                };
                // SAFETY: a thread is in one task at a time, and has a room of its own.
                let room = match room {
                    0 => &mut [],
                    room => unsafe { rooms.part(thread, 0, room) },
                };
                fill(level, layout, &x, part, room);
            };
            let tasks = tiles.count() * groups;
            if x.rows.rows() * x.rows.cols() < SMALL {
                (0..tasks).for_each(|index| task(index, 0));
            } else {
                team.run(tasks, task);
            }
        }
        Self {
            tiles,
            groups,
            sizes,
            values,
            scales,
            offsets,
        }
    }

    #[inline]
    pub(super) fn tile(&self, index: usize, group: usize) -> Tile<'a> {
        let (first, rows) = self.tiles.tile(index);
        let at = |size| first * size * self.groups + group * rows * size;
        let Sizes {
            values,
            scales,
            offsets,
        } = self.sizes;
        Tile {
            rows,
            values: &self.values[at(values)..][..rows * values],
            scales: &self.scales[at(scales)..][..rows * scales],
            offsets: &self.offsets[at(offsets)..][..rows * offsets],
        }
    }
}

/// A view of one row, for parts in parallel.
fn flat<T: Copy>(data: &mut [T]) -> RowsMut<'_, T> {
    let len = data.len();
    // SAFETY: one row that is exactly `data`.
    unsafe { RowsMut::from_raw(data.as_mut_ptr(), 1, len, len) }
}

/// One group of a tile.
struct Part<'a> {
    first: usize,
    rows: usize,
    group: usize,
    values: &'a mut [u8],
    scales: &'a mut [f32],
    offsets: &'a mut [i32],
}

vectorised! {
fn fill(layout: &Layout, x: &Input, part: Part, room: &mut [bf16]) {
    match layout.format() {
        Format::Bf16 => interleave(layout, x, part, room),
        Format::Int8 => quantise(layout, x, part, room, layout.group_k(), 128),
        Format::Int4 { group, zeros } => {
            quantise(layout, x, part, room, group, if zeros { 1 } else { 8 });
        }
    }
}
}

/// The units of one row of a tile, one after another.
struct Units<'a> {
    units: &'a mut [[u8; UNIT_BYTES]],
    next: usize,
    rows: usize,
}

impl Units<'_> {
    /// # Panics
    /// If there are not as many units left.
    #[inline(always)]
    fn put(&mut self, units: &[[u8; UNIT_BYTES]]) {
        let after = self.next + units.len() * self.rows;
        assert!(after < self.units.len() + self.rows, "units of a row");
        for (index, unit) in units.iter().enumerate() {
            // SAFETY: at most `after - rows`, which is inside.
            unsafe { *self.units.get_unchecked_mut(self.next + index * self.rows) = *unit };
        }
        self.next = after;
    }

    /// Zeros up to the end.
    fn pad(&mut self) {
        while self.next < self.units.len() {
            self.put(&[[0; UNIT_BYTES]]);
        }
    }
}

/// `span` inputs share an offset, which is minus `excess` times the sum of their int8 values.
#[inline(always)]
fn quantise(layout: &Layout, x: &Input, part: Part, room: &mut [bf16], span: usize, excess: i32) {
    let (group_k, rows) = (layout.group_k(), part.rows);
    for row in 0..rows {
        let x = &x.row(part.first + row, room)[part.group * group_k..][..group_k];
        let (scale, inverse) = scale_of(x);
        part.scales[row] = scale;
        let mut units = Units {
            units: part.values.as_chunks_mut().0,
            next: row,
            rows,
        };
        for (index, x) in x.chunks(span).enumerate() {
            let mut sums = [0; CHUNK];
            let (whole, rest) = x.as_chunks();
            for x in whole {
                units.put(round(x, inverse, &mut sums).as_chunks().0);
            }
            if !rest.is_empty() {
                let last = round(&padded(rest), inverse, &mut sums);
                units.put(&last.as_chunks().0[..rest.len().div_ceil(UNIT_BYTES)]);
            }
            let sum = sums
                .iter()
                .fold(0, |sum: i32, &lane| sum.wrapping_add(lane));
            part.offsets[index * rows + row] = sum.wrapping_mul(-excess);
        }
        units.pad();
    }
}

#[inline(always)]
fn padded(chunk: &[bf16]) -> [bf16; CHUNK] {
    let mut whole = [bf16::ZERO; CHUNK];
    whole[..chunk.len()].copy_from_slice(chunk);
    whole
}

/// The scale of int8 values, and what to multiply with to get them.
#[inline(always)]
fn scale_of(x: &[bf16]) -> (f32, f32) {
    // Magnitudes of floats are ordered as their bits are, and NaN is above infinity.
    let largest = x.iter().fold(0, |max, x| max.max(x.to_bits() & 0x7fff));
    scales_for(bf16::from_bits(largest).to_f32())
}

/// The scale of int8 values of at most `largest`, and its reciprocal.
pub(super) fn scales_for(largest: f32) -> (f32, f32) {
    if !largest.is_finite() {
        (f32::NAN, 0.0)
    } else if largest < TINY {
        (0.0, 0.0)
    } else {
        (largest / 127.0, 127.0 / largest)
    }
}

/// `x * inverse` as the nearest integer, ties to even; 0 for NaN.
#[inline(always)]
pub(super) fn nearest(x: f32, inverse: f32) -> i8 {
    (x * inverse + ROUND).to_bits() as i8
}

/// Int8 values, also added to `sums` lane by lane.
#[inline(always)]
fn round(x: &[bf16; CHUNK], inverse: f32, sums: &mut [i32; CHUNK]) -> [u8; CHUNK] {
    let mut quantised = [0; CHUNK];
    for (lane, to) in quantised.iter_mut().enumerate() {
        let wide = f32::from_bits(u32::from(x[lane].to_bits()) << 16);
        let rounded = (wide * inverse + ROUND).to_bits();
        *to = rounded as u8;
        let integer = rounded.wrapping_sub(ROUND.to_bits()).cast_signed();
        sums[lane] = sums[lane].wrapping_add(integer);
    }
    quantised
}

#[inline(always)]
fn interleave(layout: &Layout, x: &Input, part: Part, room: &mut [bf16]) {
    let (group_k, rows) = (layout.group_k(), part.rows);
    for row in 0..rows {
        let x = &x.row(part.first + row, room)[part.group * group_k..][..group_k];
        let mut units = Units {
            units: part.values.as_chunks_mut().0,
            next: row,
            rows,
        };
        let (whole, rest) = x.as_chunks();
        for x in whole {
            units.put(&pairs(x));
        }
        units.put(&pairs(&padded(rest))[..rest.len().div_ceil(2)]);
    }
}

/// Units of two bf16.
#[inline(always)]
fn pairs(x: &[bf16; CHUNK]) -> [[u8; UNIT_BYTES]; CHUNK / 2] {
    let mut units = [[0; UNIT_BYTES]; CHUNK / 2];
    for (index, unit) in units.iter_mut().enumerate() {
        let ([a0, a1], [b0, b1]) = (x[index * 2].to_ne_bytes(), x[index * 2 + 1].to_ne_bytes());
        *unit = [a0, a1, b0, b1];
    }
    units
}
