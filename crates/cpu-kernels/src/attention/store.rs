//! What happens to a step's queries, keys and values before attention.

use half::bf16;

use super::ahead::{Ahead, LINE};
use super::batch::{Batch, Span};
use super::layout::{Cache, KvType};
use crate::bfloat::{ROUND, widen};
use crate::cpu::Cpu;
use crate::level::Level;
use crate::norm::normalise_in_place;
use crate::rotary::turn;
use crate::rows::{Rows, RowsMut};
use crate::runs::Runs;
use crate::vectorise::vectorised;

/// RMS norms of every head's query and key (Qwen3 has them), weights [head_dim].
#[derive(Clone, Copy)]
pub struct HeadNorms<'a> {
    pub query: &'a [bf16],
    pub key: &'a [bf16],
    pub eps: f32,
}

/// The tokens of one span that fall into one block.
struct Unit<'a> {
    span: &'a Span,
    first: usize,
    end: usize,
}

/// Norm, rotary and cache of a step: `qkv` [T, (heads + 2 kv_heads) * head_dim], queries first.
///
/// Queries are changed in place; keys and values go into the cache, `qkv` keeps them as they were.
/// `angles` [T, r] are of `rotary::angles`, r <= head_dim. A block whose first token is stored is
/// zeroed before, so that nothing of a former owner is ever multiplied.
///
/// # Panics
/// If shapes do not fit.
pub fn store(
    cpu: &Cpu,
    qkv: RowsMut<bf16>,
    norms: Option<HeadNorms>,
    angles: Rows<f32>,
    cache: &mut Cache,
    batch: &Batch,
) {
    let layout = *cache.layout();
    let (dim, kv_heads) = (layout.head_dim(), layout.kv_heads());
    let heads = (qkv.cols() / dim).saturating_sub(2 * kv_heads);
    let group = heads / kv_heads;
    assert!(
        group > 0 && qkv.cols() == (group + 2) * kv_heads * dim,
        "{} columns",
        qkv.cols()
    );
    assert!(
        angles.cols() <= dim && angles.cols().is_multiple_of(2),
        "angles of each pair"
    );
    assert!(
        batch.rows() <= qkv.rows() && batch.rows() <= angles.rows(),
        "rows"
    );
    if let Some(norms) = norms {
        assert_eq!(
            (norms.query.len(), norms.key.len()),
            (dim, dim),
            "norms of a head"
        );
    }
    batch.check(cache);
    let units = units(batch.spans(), layout.block_tokens());
    let cache = &*cache;
    let place_of = |index: usize| {
        let (unit, head) = (&units[index / kv_heads], index % kv_heads);
        let part = cache.head(batch.block(unit.span, unit.first), head);
        (unit, head, part)
    };
    let threads = cpu.team.threads();
    let pieces = Runs::new(units.len() * kv_heads, threads);
    let piece = |index: usize, next: Option<usize>| {
        let (unit, head, part) = place_of(index);
        if let Some((_, _, next)) = next.map(place_of) {
            // One token's pairs of a key are in as many lines as there are pairs.
            let bytes = layout.bytes_per_head();
            Ahead::new([(next.cast_const(), bytes)]).fetch(bytes.div_ceil(LINE));
        }
        if unit.first.is_multiple_of(layout.block_tokens()) {
            // SAFETY: no other piece has this head of this block.
            unsafe { part.write_bytes(0, layout.bytes_per_head()) };
        }
        let mut key = [bf16::ZERO; 1024];
        let key = &mut key[..dim];
        for position in unit.first..unit.end {
            let row = unit.span.first_row + position - unit.span.start;
            let angles = angles.row(row);
            for query in head * group..(head + 1) * group {
                // SAFETY: only this piece has this head of this row.
                let query = unsafe { qkv.part(row, query * dim, dim) };
                place(cpu.level, query, norms.map(|n| (n.query, n.eps)), angles);
            }
            // SAFETY: nobody writes keys and values of `qkv`.
            let new = |head: usize| &*unsafe { qkv.part(row, head * dim, dim) };
            key.copy_from_slice(new(heads + head));
            place(cpu.level, key, norms.map(|n| (n.key, n.eps)), angles);
            let slot = position % layout.block_tokens();
            let value = new(heads + kv_heads + head);
            // SAFETY: `part` is a head's part of a block of this layout, and only this piece's.
            unsafe {
                match layout.dtype() {
                    KvType::Bf16 => write_bf16(part, layout.block_tokens(), slot, key, value),
                    KvType::Int8 => {
                        write_int8(cpu.level, part, layout.block_tokens(), slot, key, value);
                    }
                }
            }
        }
    };
    cpu.team.run(threads, |_, thread| {
        while let Some((index, next)) = pieces.take(thread) {
            piece(index, next);
        }
    });
}

fn units(spans: &[Span], block_tokens: usize) -> Vec<Unit<'_>> {
    let mut units = Vec::with_capacity(spans.len());
    for span in spans {
        let mut first = span.start;
        while first < span.end() {
            let end = span.end().min((first / block_tokens + 1) * block_tokens);
            units.push(Unit { span, first, end });
            first = end;
        }
    }
    units
}

vectorised! {
    fn place(head: &mut [bf16], norm: Option<(&[bf16], f32)>, angles: &[f32]) {
        if let Some((weight, eps)) = norm {
            normalise_in_place(head, weight, eps);
        }
        turn(head, angles);
    }
}

/// # Safety
/// `part` is a head's part of a bf16 block with a token `slot`, and nobody else's.
unsafe fn write_bf16(
    part: *mut u8,
    block_tokens: usize,
    slot: usize,
    key: &[bf16],
    value: &[bf16],
) {
    let dim = key.len();
    let keys = part.cast::<[bf16; 2]>();
    for (pair, numbers) in key.as_chunks::<2>().0.iter().enumerate() {
        // SAFETY: pair < head_dim / 2 and slot < block_tokens.
        unsafe { *keys.add(pair * block_tokens + slot) = *numbers };
    }
    // SAFETY: behind `block_tokens * dim` keys lie as many values.
    let values = unsafe {
        part.cast::<bf16>()
            .add(block_tokens * dim + slot / 2 * dim * 2)
    };
    for (place, number) in value.iter().enumerate() {
        // SAFETY: the row of this pair of tokens has 2 * dim numbers.
        unsafe { *values.add(2 * place + slot % 2) = *number };
    }
}

/// # Safety
/// `part` is a head's part of an int8 block with a token `slot`, and nobody else's.
unsafe fn write_int8(
    level: Level,
    part: *mut u8,
    block_tokens: usize,
    slot: usize,
    key: &[bf16],
    value: &[bf16],
) {
    let dim = key.len();
    let numbers = block_tokens * dim;
    let mut whole = [0_i8; 2 * 1024];
    let (whole_key, whole_value) = whole[..2 * dim].split_at_mut(dim);
    let key_scale = quantise(level, key, whole_key);
    let value_scale = quantise(level, value, whole_value);
    // SAFETY: the scales lie behind both kinds of numbers, `block_tokens` of each.
    unsafe {
        let scales = part.add(2 * numbers).cast::<f32>();
        *scales.add(slot) = key_scale;
        *scales.add(block_tokens + slot) = value_scale;
    }
    let keys = part.cast::<[i8; 2]>();
    for (pair, &numbers) in whole_key.as_chunks::<2>().0.iter().enumerate() {
        // SAFETY: pair < head_dim / 2 and slot < block_tokens.
        unsafe { *keys.add(pair * block_tokens + slot) = numbers };
    }
    // SAFETY: behind `numbers` keys lie as many values.
    let values = unsafe { part.cast::<i8>().add(numbers + slot / 2 * dim * 2) };
    for (place, &number) in whole_value.iter().enumerate() {
        // SAFETY: the row of this pair of tokens has 2 * dim numbers.
        unsafe { *values.add(2 * place + slot % 2) = number };
    }
}

vectorised! {
    /// Numbers to the nearest whole ones, ties to even; returns what 1 of them stands for, so that
    /// the largest became 127.
    fn quantise(numbers: &[bf16], whole: &mut [i8]) -> f32 {
        let mut lanes = [0.0_f32; 16];
        let (chunks, rest) = numbers.as_chunks::<16>();
        for chunk in chunks {
            for (lane, &x) in lanes.iter_mut().zip(chunk) {
                *lane = lane.max(widen(x).abs());
            }
        }
        for (lane, &x) in lanes.iter_mut().zip(rest) {
            *lane = lane.max(widen(x).abs());
        }
        let scale = lanes.iter().fold(0.0_f32, |most, &x| most.max(x)) / 127.0;
        if scale > 0.0 {
            for (whole, &x) in whole.iter_mut().zip(numbers) {
                *whole = (widen(x) / scale + ROUND).to_bits() as i8;
            }
        } else {
            whole.fill(0);
        }
        scale
    }
}
