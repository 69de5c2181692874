//! A tile of keys and values, and what it does to one row.

use std::f32::consts::LOG2_E;
use std::ops::Range;

use half::bf16;

use super::attend::Scoring;
use crate::bfloat::{ROUND, round, widen};
use crate::exp::{exp2, tanh};

/// Keys that are taken together, beginning at a multiple of it in the sequence.
pub(super) const TILE: usize = 64;
/// Keys of one vector.
pub(super) const LANES: usize = 16;
/// Vectors of a tile.
pub(super) const VECTORS: usize = TILE / LANES;
/// Rows that are computed together.
pub(super) const ROWS: usize = 6;
/// Numbers of a row's state before its weighted values.
pub(super) const HEADER: usize = 2 * LANES;

/// Where a tile lies, for one kv head: pairs of bf16, read as u32.
///
/// Vectors that no row of the task may see hold nothing.
#[derive(Clone, Copy, Default)]
pub(super) struct Tile<'a> {
    /// [head_dim / 2] pairs of dimensions of 16 keys, every `key_stride`.
    pub keys: [&'a [u32]; VECTORS],
    pub key_stride: usize,
    /// [8][head_dim] pairs of tokens.
    pub values: [&'a [u32]; VECTORS],
    /// What the numbers of each key and value are multiplied with, if they are whole numbers.
    pub scales: Option<(&'a [f32; TILE], &'a [f32; TILE])>,
}

/// A tile of int8 as it lies in the cache, for one kv head.
///
/// Vectors that no row of the task may see hold nothing.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Default)]
pub(super) struct WholeTile<'a> {
    /// [head_dim / 2] pairs of dimensions of 16 keys, every `key_stride`.
    pub keys: [&'a [[i8; 2]]; VECTORS],
    pub key_stride: usize,
    /// [8][head_dim] pairs of tokens.
    pub values: [&'a [[i8; 2]]; VECTORS],
    /// What the numbers of 16 keys, and of 16 values, are multiplied with.
    pub scales: [(&'a [f32], &'a [f32]); VECTORS],
}

/// A tile as the level's kernels want it.
pub(super) enum AnyTile<'a> {
    Bf16(Tile<'a>),
    #[cfg(target_arch = "x86_64")]
    Int8(WholeTile<'a>),
}

/// Weights of a tile's keys for each row, in pairs of 16 bits.
#[cfg(target_arch = "x86_64")]
pub(super) type Weights = [[u32; TILE / 2]; ROWS];

/// Up to `ROWS` rows, the keys of a tile that each sees, and their states side by side.
pub(super) struct Group<'a> {
    pub queries: [&'a [bf16]; ROWS],
    /// The same as whole numbers, and what 1 of them stands for; empty where the cache is bf16.
    pub whole: [(&'a [i16], f32); ROWS],
    /// Empty if a row sees none of the tile.
    pub seen: [Range<usize>; ROWS],
    pub states: &'a mut [f32],
}

impl Group<'_> {
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.states.len() / (HEADER + self.queries[0].len())
    }
}

/// A row's softmax so far.
///
/// ```text
/// | largest score, in base 2; 15 unused | sums of weights [16] | weighted values [head_dim] |
/// ```
pub(super) struct State<'a> {
    pub largest: &'a mut f32,
    pub sums: &'a mut [f32; LANES],
    pub values: &'a mut [f32],
}

impl<'a> State<'a> {
    #[inline(always)]
    pub fn of(numbers: &'a mut [f32]) -> Self {
        let (header, values) = numbers.split_at_mut(HEADER);
        let (largest, sums) = header.as_chunks_mut::<LANES>().0.split_at_mut(1);
        Self {
            largest: &mut largest[0][0],
            sums: &mut sums[0],
            values,
        }
    }

    #[inline(always)]
    pub fn clear(&mut self) {
        *self.largest = f32::NEG_INFINITY;
        self.sums.fill(0.0);
        self.values.fill(0.0);
    }
}

/// A query as int16; returns what 1 of them stands for. Its products with int8 stay below 2^31.
#[inline(always)]
pub(super) fn quantise_query(query: &[bf16], whole: &mut [i16]) -> f32 {
    let most = if query.len() > 512 { 16383.0 } else { 32767.0 };
    let mut lanes = [0.0_f32; LANES];
    for chunk in query.chunks(LANES) {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = lane.max(widen(x).abs());
        }
    }
    let largest = lanes.iter().fold(0.0_f32, |most, &x| most.max(x));
    let factor = if largest > 0.0 { most / largest } else { 0.0 };
    for (whole, &x) in whole.iter_mut().zip(query) {
        *whole = (widen(x) * factor + ROUND).to_bits() as i16;
    }
    largest / most
}

/// Add a tile's keys to a group's states.
#[inline(always)]
pub(super) fn add_tile(group: &mut Group, tile: &Tile, scoring: &Scoring) {
    let stride = HEADER + group.queries[0].len();
    for (row, state) in group.states.chunks_exact_mut(stride).enumerate() {
        if !group.seen[row].is_empty() {
            let seen = group.seen[row].clone();
            add_to_row(
                group.queries[row],
                tile,
                seen,
                scoring,
                &mut State::of(state),
            );
        }
    }
}

#[inline(always)]
fn add_to_row(
    query: &[bf16],
    tile: &Tile,
    seen: Range<usize>,
    scoring: &Scoring,
    state: &mut State,
) {
    let mut weights = [f32::NEG_INFINITY; TILE];
    let vectors = seen.start / LANES..seen.end.div_ceil(LANES);
    for vector in vectors.clone() {
        let scores = products(query, tile.keys[vector], tile.key_stride);
        weights[vector * LANES..][..LANES].copy_from_slice(&scores);
    }
    if let Some((scales, _)) = tile.scales {
        weights
            .iter_mut()
            .zip(scales)
            .for_each(|(weight, scale)| *weight *= scale);
    }
    weights
        .iter_mut()
        .for_each(|weight| *weight *= scoring.factor());
    if let Some(cap) = scoring.softcap {
        weights
            .iter_mut()
            .for_each(|weight| *weight = cap * LOG2_E * tanh(*weight / cap));
    }
    for (key, weight) in weights.iter_mut().enumerate() {
        *weight = if seen.contains(&key) {
            *weight
        } else {
            f32::NEG_INFINITY
        };
    }
    let largest = weights.iter().fold(*state.largest, |most, &x| most.max(x));
    let shrink = exp2(*state.largest - largest);
    *state.largest = largest;
    weights
        .iter_mut()
        .for_each(|weight| *weight = exp2(*weight - largest));
    state.sums.iter_mut().for_each(|sum| *sum *= shrink);
    for chunk in weights.as_chunks::<LANES>().0 {
        state
            .sums
            .iter_mut()
            .zip(chunk)
            .for_each(|(sum, weight)| *sum += weight);
    }
    if let Some((_, scales)) = tile.scales {
        weights
            .iter_mut()
            .zip(scales)
            .for_each(|(weight, scale)| *weight *= scale);
    }
    state.values.iter_mut().for_each(|value| *value *= shrink);
    let dim = state.values.len();
    for vector in vectors {
        let weights = weights[vector * LANES..][..LANES].as_chunks::<2>().0;
        for (&[a, b], pairs) in weights.iter().zip(tile.values[vector].chunks_exact(dim)) {
            let (a, b) = (widen(round(a)), widen(round(b)));
            for (sum, &pair) in state.values.iter_mut().zip(pairs) {
                *sum += a * low(pair);
                *sum += b * high(pair);
            }
        }
    }
}

/// A query's products with 16 keys.
#[inline(always)]
fn products(query: &[bf16], keys: &[u32], stride: usize) -> [f32; LANES] {
    let mut sums = [0.0; LANES];
    for (&[a, b], pairs) in query.as_chunks::<2>().0.iter().zip(keys.chunks(stride)) {
        let (a, b) = (widen(a), widen(b));
        for (sum, &pair) in sums.iter_mut().zip(&pairs[..LANES]) {
            *sum += a * low(pair);
            *sum += b * high(pair);
        }
    }
    sums
}

/// The first bf16 of a pair (the layout is little-endian, as the cache's owner is this machine).
#[inline(always)]
fn low(pair: u32) -> f32 {
    f32::from_bits(if cfg!(target_endian = "little") {
        pair << 16
    } else {
        pair & 0xffff_0000
    })
}

/// The second bf16 of a pair.
#[inline(always)]
fn high(pair: u32) -> f32 {
    f32::from_bits(if cfg!(target_endian = "little") {
        pair & 0xffff_0000
    } else {
        pair << 16
    })
}

/// A pair of whole numbers as a pair of bf16, which holds all of int8's.
#[inline(always)]
pub(super) fn widen_pair([a, b]: [i8; 2]) -> u32 {
    let (a, b) = (f32::from(a).to_bits(), f32::from(b).to_bits());
    if cfg!(target_endian = "little") {
        a >> 16 | b
    } else {
        b >> 16 | a
    }
}

/// Add the state of a later split to that of the ones before it.
#[inline(always)]
pub(super) fn add_split(sum: &mut State, later: &State) {
    if *later.largest == f32::NEG_INFINITY {
        return;
    }
    let largest = sum.largest.max(*later.largest);
    let (before, after) = (exp2(*sum.largest - largest), exp2(*later.largest - largest));
    *sum.largest = largest;
    let add = |sum: &mut f32, later: &f32| *sum = *sum * before + later * after;
    sum.sums
        .iter_mut()
        .zip(&*later.sums)
        .for_each(|(sum, later)| add(sum, later));
    sum.values
        .iter_mut()
        .zip(&*later.values)
        .for_each(|(sum, later)| add(sum, later));
}

/// The weighted mean: zeros are positive, as keys that weigh nothing may leave either.
#[inline(always)]
pub(super) fn finish(state: &State, out: &mut [bf16]) {
    let total: f32 = state.sums.iter().sum();
    for (out, value) in out.iter_mut().zip(&*state.values) {
        *out = round(value / total + 0.0);
    }
}
