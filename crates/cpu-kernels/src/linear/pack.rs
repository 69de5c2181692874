//! Weights into a layout, panels in parallel: quantised if it says so, or int4 as a checkpoint has it.

use half::bf16;

use super::activations::{nearest, scales_for};
use super::layout::{BF16_SCALES, CHANNELS, F32_SCALES, Format, Layout, ZERO_BITS};
use crate::bfloat::widen;
use crate::cpu::Cpu;
use crate::rows::{Rows, RowsMut};
use crate::vectorise::vectorised;

/// Pack a weight of `[n, k]` bf16 into `out`, of `layout.bytes()`.
///
/// # Panics
/// If a size is not the layout's, or its format has zeros.
pub fn pack(cpu: &Cpu, layout: &Layout, weight: Rows<bf16>, out: &mut [u8]) {
    let shape = (weight.rows(), weight.cols());
    assert_eq!(shape, (layout.n(), layout.k()), "shape of the weight");
    let group_k = layout.group_k();
    by_panel(cpu, layout, out, |panel, blocks| {
        let mut channel = vec![0.0; layout.k()];
        for lane in 0..CHANNELS {
            match layout.channel(panel, lane) {
                Some(row) => {
                    for (to, &from) in channel.iter_mut().zip(weight.row(row)) {
                        *to = widen(from);
                    }
                }
                None => channel.fill(0.0),
            }
            let scales = scales_for(magnitude(&channel));
            for (channel, block) in channel.chunks(group_k).zip(&mut *blocks) {
                write_lane(cpu.level, layout.format(), channel, scales, lane, block);
            }
        }
    });
}

/// A weight of int4 numbers: (number - zero) * scale.
pub struct Int4<'a> {
    /// `[n, k]`, of 0 to 15.
    pub numbers: Rows<'a, u8>,
    /// `[n, layout.scale_groups()]`; an f32 is rounded to 20 bits.
    pub scales: Rows<'a, f32>,
    /// As many, of 0 to 15.
    pub zeros: Rows<'a, u8>,
}

/// Pack `weight` as it is into `out`, of `layout.bytes()`.
///
/// # Panics
/// If a size is not the layout's, or its format is not int4 with zeros.
pub fn pack_int4(cpu: &Cpu, layout: &Layout, weight: &Int4, out: &mut [u8]) {
    let Format::Int4 { group, zeros: true } = layout.format() else {
        panic!("{:?} has no zeros", layout.format());
    };
    let Int4 {
        numbers,
        scales,
        zeros,
    } = weight;
    let (n, k, parts) = (layout.n(), layout.k(), layout.offsets());
    let shapes = [
        (numbers.rows(), numbers.cols()),
        (scales.rows(), scales.cols()),
        (zeros.rows(), zeros.cols()),
    ];
    let of_parts = (n, layout.scale_groups());
    assert_eq!(shapes, [(n, k), of_parts, of_parts], "shapes of the weight");
    by_panel(cpu, layout, out, |panel, blocks| {
        for lane in 0..CHANNELS {
            let Some(row) = layout.channel(panel, lane) else {
                continue; // its scale stays 0
            };
            let numbers = numbers.row(row).chunks(layout.group_k());
            let heads = scales.row(row).iter().zip(zeros.row(row));
            let mut heads = heads.map(|(scale, &zero)| with_zero(*scale, zero));
            for (numbers, block) in numbers.zip(&mut *blocks) {
                let size = block.len() / parts;
                for (numbers, block) in numbers.chunks(group).zip(block.chunks_mut(size)) {
                    let (to, values) = block.split_at_mut(F32_SCALES);
                    let head = heads.next().unwrap_or_default();
                    to[lane * 4..][..4].copy_from_slice(&head.to_ne_bytes());
                    for (inputs, step) in numbers.chunks(8).zip(values.chunks_mut(CHANNELS * 4)) {
                        let mut whole = [0; 8];
                        whole[..inputs.len()].copy_from_slice(inputs);
                        put_nibbles(whole, lane, step);
                    }
                }
            }
        }
    });
}

/// An f32's bits, rounded to the nearest (half up) that leave room for a zero, and the zero.
fn with_zero(scale: f32, zero: u8) -> u32 {
    let rounded = scale.to_bits().wrapping_add(ZERO_BITS / 2 + 1);
    rounded & !ZERO_BITS | u32::from(zero) & ZERO_BITS
}

/// Call `fill(panel, its blocks by group)` for every panel; blocks are zeros.
fn by_panel(
    cpu: &Cpu,
    layout: &Layout,
    out: &mut [u8],
    fill: impl Fn(usize, &mut [&mut [u8]]) + Sync,
) {
    assert_eq!(out.len(), layout.bytes(), "bytes of the packed weight");
    let (panels, size) = (layout.panels(), layout.block_bytes());
    let out = RowsMut::of(out, size);
    cpu.team.run(panels, |panel, _| {
        // SAFETY: a block belongs to one panel, and a panel to one task.
        let block = |group| unsafe { out.part(group * panels + panel, 0, size) };
        let mut blocks: Vec<_> = (0..layout.k_groups()).map(block).collect();
        blocks.iter_mut().for_each(|block| block.fill(0));
        fill(panel, &mut blocks);
    });
}

vectorised! {
    fn write_lane(
        format: Format,
        channel: &[f32],
        scales: (f32, f32),
        lane: usize,
        block: &mut [u8],
    ) {
        match format {
            Format::Bf16 => bf16_lane(channel, lane, block),
            Format::Int8 => int8_lane(channel, scales, lane, block),
            Format::Int4 { group, zeros: false } => int4_lane(channel, group, lane, block),
            Format::Int4 { zeros: true, .. } => panic!("zeros are the checkpoint's: pack_int4"),
        }
    }
}

/// The largest magnitude; NaN if there is one.
#[inline(always)]
fn magnitude(x: &[f32]) -> f32 {
    let bits = x
        .iter()
        .fold(0, |max, x| max.max(x.to_bits() & 0x7fff_ffff));
    f32::from_bits(bits)
}

#[inline(always)]
fn bf16_lane(channel: &[f32], lane: usize, block: &mut [u8]) {
    for (index, &weight) in channel.iter().enumerate() {
        let at = ((index / 2 * CHANNELS + lane) * 2 + index % 2) * 2;
        block[at..at + 2].copy_from_slice(&bf16::from_f32(weight).to_ne_bytes());
    }
}

#[inline(always)]
fn int8_lane(channel: &[f32], (scale, inverse): (f32, f32), lane: usize, block: &mut [u8]) {
    let (scales, values) = block.split_at_mut(F32_SCALES);
    scales[lane * 4..][..4].copy_from_slice(&scale.to_ne_bytes());
    for step in values.chunks_mut(CHANNELS * 4) {
        step[lane * 4..][..4].fill(128);
    }
    for (index, &weight) in channel.iter().enumerate() {
        let at = (index / 4 * CHANNELS + lane) * 4 + index % 4;
        values[at] = nearest(weight, inverse) as u8 ^ 0x80;
    }
}

#[inline(always)]
fn int4_lane(channel: &[f32], group: usize, lane: usize, block: &mut [u8]) {
    let size = BF16_SCALES + group * CHANNELS / 2;
    for (channel, block) in channel.chunks(group).zip(block.chunks_mut(size)) {
        let (scales, values) = block.split_at_mut(BF16_SCALES);
        let scale = int4_scale(channel);
        scales[lane * 2..][..2].copy_from_slice(&scale.to_ne_bytes());
        let scale = scale.to_f32();
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        for (inputs, step) in channel.chunks(8).zip(values.chunks_mut(CHANNELS * 4)) {
            let mut quantised = [8; 8];
            for (to, &weight) in quantised.iter_mut().zip(inputs) {
                let rounded = (weight * inverse).round_ties_even().clamp(-8.0, 7.0);
                *to = (rounded as i8 + 8) as u8;
            }
            put_nibbles(quantised, lane, step);
        }
        // Padding of the last group, beyond k.
        for step in values
            .chunks_mut(CHANNELS * 4)
            .skip(channel.len().div_ceil(8))
        {
            step[lane * 4..][..4].fill(0x88);
        }
    }
}

/// A lane's eight inputs of a step, of 0 to 15.
#[inline(always)]
fn put_nibbles(inputs: [u8; 8], lane: usize, step: &mut [u8]) {
    for (index, to) in step[lane * 4..][..4].iter_mut().enumerate() {
        *to = inputs[index] & 0x0f | inputs[index + 4] << 4;
    }
}

/// The weight of largest magnitude becomes -8, which the other sign does not have.
#[inline(always)]
fn int4_scale(weights: &[f32]) -> bf16 {
    let most = magnitude(weights);
    let largest = weights.iter().rfind(|weight| weight.abs() == most);
    let largest = *largest.unwrap_or(&most);
    let (scale, _) = scales_for(largest.abs());
    if scale == 0.0 {
        return bf16::ZERO;
    }
    bf16::from_f32(scale_sign(largest) * largest.abs() / 8.0)
}

fn scale_sign(largest: f32) -> f32 {
    if largest > 0.0 { -1.0 } else { 1.0 }
}
