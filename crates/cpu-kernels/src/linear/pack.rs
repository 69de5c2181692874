//! Weights into a layout: quantised if it says so, and packed; panels in parallel.

use half::bf16;

use super::activations::{nearest, scales_for};
use super::layout::{BF16_SCALES, CHANNELS, F32_SCALES, Format, Layout};
use crate::bfloat::widen;
use crate::cpu::Cpu;
use crate::rows::{Rows, RowsMut};
use crate::vectorise::vectorised;

/// Pack a weight of `[n, k]` bf16 into `out`, of `layout.bytes()`.
///
/// # Panics
/// If a size is not the layout's.
pub fn pack(cpu: &Cpu, layout: &Layout, weight: Rows<bf16>, out: &mut [u8]) {
    let shape = (weight.rows(), weight.cols());
    assert_eq!(shape, (layout.n(), layout.k()), "shape of the weight");
    assert_eq!(out.len(), layout.bytes(), "bytes of the packed weight");
    let (panels, size, group_k) = (layout.panels(), layout.block_bytes(), layout.group_k());
    let out = RowsMut::of(out, size);
    cpu.team.run(panels, |panel, _| {
        // SAFETY: a block belongs to one panel, and a panel to one task.
        let block = |group| unsafe { out.part(group * panels + panel, 0, size) };
        for group in 0..layout.k_groups() {
            block(group).fill(0);
        }
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
            for (group, channel) in channel.chunks(group_k).enumerate() {
                let block = block(group);
                write_lane(cpu.level, layout.format(), channel, scales, lane, block);
            }
        }
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
            Format::Int4 { group } => int4_lane(channel, group, lane, block),
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
            for (index, to) in step[lane * 4..][..4].iter_mut().enumerate() {
                *to = quantised[index] | quantised[index + 4] << 4;
            }
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
