//! The kernels in plain Rust: what the others are tested against, and right on any processor.

use half::bf16;

use super::layout::{CHANNELS, F32_SCALES, Format, ZERO_BITS, int4_scales};
use super::tile::{Tree, Work};

/// Rows of a tile.
pub(super) const ROWS: usize = 4;

pub(super) fn product(work: &Work, tree: &mut Tree) {
    for row in 0..work.tile.rows {
        let sums = match work.format {
            Format::Bf16 => bf16_row(work, row),
            Format::Int8 => int8_row(work, row),
            Format::Int4 { group, zeros } => int4_row(work, row, group, zeros),
        };
        tree.add(work.group, row, sums);
    }
}

/// A row's units of four bytes in a group.
fn units<'a>(work: &Work<'a>, row: usize) -> impl Iterator<Item = &'a [u8; 4]> {
    let units = work.tile.values.as_chunks::<4>().0;
    units[row..].iter().step_by(work.tile.rows)
}

fn bf16_row(work: &Work, row: usize) -> [f32; CHANNELS] {
    let mut sums = [0.0; CHANNELS];
    let wide = |a, b| bf16::from_ne_bytes([a, b]).to_f32();
    let steps = work.block.as_chunks::<{ CHANNELS * 4 }>().0;
    for (step, x) in steps.iter().zip(units(work, row)) {
        let (x0, x1) = (wide(x[0], x[1]), wide(x[2], x[3]));
        for (sum, w) in sums.iter_mut().zip(step.as_chunks::<4>().0) {
            *sum = x0.mul_add(wide(w[0], w[1]), *sum);
            *sum = x1.mul_add(wide(w[2], w[3]), *sum);
        }
    }
    sums
}

/// The products of four unsigned weights of each channel with four activations.
fn dot(sums: &mut [i32; CHANNELS], step: &[u8; CHANNELS * 4], x: [u8; 4]) {
    for (sum, w) in sums.iter_mut().zip(step.as_chunks::<4>().0) {
        for (&w, x) in w.iter().zip(x) {
            *sum = sum.wrapping_add(i32::from(w) * i32::from(x as i8));
        }
    }
}

fn int8_row(work: &Work, row: usize) -> [f32; CHANNELS] {
    let mut sums = [work.tile.offsets[row]; CHANNELS];
    let steps = work.block[F32_SCALES..].as_chunks::<{ CHANNELS * 4 }>().0;
    for (step, x) in steps.iter().zip(units(work, row)) {
        dot(&mut sums, step, *x);
    }
    sums.map(|sum| sum as f32 * work.tile.scales[row])
}

fn int4_row(work: &Work, row: usize, span: usize, zeros: bool) -> [f32; CHANNELS] {
    let mut total = [0.0_f32; CHANNELS];
    let mut x = units(work, row);
    let offsets = work.tile.offsets[row..].iter().step_by(work.tile.rows);
    let parts = work.block.chunks(int4_scales(zeros) + span * CHANNELS / 2);
    for (part, &offset) in parts.zip(offsets) {
        let (scales, values) = part.split_at(int4_scales(zeros));
        let (scales, times) = scales_and_offsets(scales, zeros);
        let mut sums = times.map(|times| times.wrapping_mul(offset));
        for pair in values.as_chunks::<{ CHANNELS * 4 }>().0 {
            for half in [pair.map(|w| w & 0x0f), pair.map(|w| w >> 4)] {
                if let Some(x) = x.next() {
                    dot(&mut sums, &half, *x);
                }
            }
        }
        for ((total, sum), scale) in total.iter_mut().zip(sums).zip(scales) {
            *total = (sum as f32).mul_add(scale, *total);
        }
    }
    total.map(|total| total * work.tile.scales[row])
}

/// Of each channel the scale, and how often a row's offset is added: the zero, or once.
fn scales_and_offsets(bytes: &[u8], zeros: bool) -> ([f32; CHANNELS], [i32; CHANNELS]) {
    let (mut scales, mut times) = ([0.0; CHANNELS], [1; CHANNELS]);
    if zeros {
        for (lane, bytes) in bytes.as_chunks().0.iter().enumerate() {
            let bits = u32::from_ne_bytes(*bytes);
            scales[lane] = f32::from_bits(bits & !ZERO_BITS);
            times[lane] = (bits & ZERO_BITS).cast_signed();
        }
    } else {
        for (scale, bytes) in scales.iter_mut().zip(bytes.as_chunks().0) {
            *scale = bf16::from_ne_bytes(*bytes).to_f32();
        }
    }
    (scales, times)
}
