//! A tile of keys and up to six rows, with dot products of bf16 pairs.
//!
//! ```text
//! scores    6 rows x 4 vectors of 16 keys in registers, a query's pair broadcast
//! weights   2^(score - largest so far), rounded to bf16
//! values    6 rows x 4 vectors of 16 dimensions in registers, or 2 x 8, a weight's pair broadcast
//! ```
//!
//! A score's and a value's chain of additions is the same whatever rows are beside it: pairs of
//! dimensions, or of keys, in ascending order. Keys that a row may not see have weight zero, and
//! adding their products changes no number but the sign of a zero, which the end undoes.

use std::arch::x86_64::*;
use std::f32::consts::LOG2_E;
use std::ops::Range;

use half::bf16;

use super::ahead::Ahead;
use super::attend::Scoring;
use super::tile::{Group, HEADER, LANES, ROWS, TILE, Tile, VECTORS, Weights};
use crate::exp::exp2_coefficients;

/// Heads that these kernels take.
pub(super) fn fits(dim: usize) -> bool {
    dim.is_multiple_of(LANES)
}

/// As `tile::add_tile`, for heads that fit.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) fn add_tile(
    group: &mut Group,
    tile: &Tile,
    ahead: &mut Ahead<VECTORS>,
    scoring: &Scoring,
) {
    match group.len() {
        1 => add::<1>(group, tile, ahead, scoring),
        2 => add::<2>(group, tile, ahead, scoring),
        3 => add::<3>(group, tile, ahead, scoring),
        4 => add::<4>(group, tile, ahead, scoring),
        5 => add::<5>(group, tile, ahead, scoring),
        _ => add::<ROWS>(group, tile, ahead, scoring),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn add<const R: usize>(
    group: &mut Group,
    tile: &Tile,
    ahead: &mut Ahead<VECTORS>,
    scoring: &Scoring,
) {
    let dim = group.queries[0].len();
    assert!(
        fits(dim) && group.states.len() == R * (HEADER + dim),
        "states"
    );
    assert!(
        group.queries[..R].iter().all(|query| query.len() == dim),
        "queries"
    );
    let vectors = seen_vectors(&group.seen[..R]);
    for vector in vectors.clone() {
        assert!(
            tile.keys[vector].len() >= (dim / 2 - 1) * tile.key_stride + LANES,
            "keys"
        );
        assert!(tile.values[vector].len() >= LANES / 2 * dim, "values");
    }
    // Vectors that no row sees are computed as if they were the first seen one, and not used.
    let keys = std::array::from_fn(|vector| {
        let used = if vectors.contains(&vector) {
            vector
        } else {
            vectors.start
        };
        tile.keys[used].as_ptr()
    });
    let queries = std::array::from_fn(|row| group.queries[row].as_ptr());
    let mut weights: Weights = [[0; TILE / 2]; ROWS];
    let mut shrink = [0.0; R];
    // SAFETY: lengths were checked above.
    unsafe {
        let scores = scores::<R>(&queries, &keys, tile.key_stride, dim, ahead);
        for (row, mut scores) in scores.into_iter().enumerate() {
            let state = &mut group.states[row * (HEADER + dim)..];
            shrink[row] = soften(&mut scores, group.seen[row].clone(), scoring, state);
            round(&scores, &mut weights[row]);
        }
        let products = Products {
            weights: &weights,
            shrink: &shrink,
            values: std::array::from_fn(|vector| tile.values[vector].as_ptr()),
            vectors,
            dim,
            sums: group.states.as_mut_ptr(),
        };
        let mut place = 0;
        // Few rows leave registers for more dimensions, which are then read in their order.
        while R <= 2 && place + 8 * LANES <= dim {
            products.add::<8>(place, ahead);
            place += 8 * LANES;
        }
        while place + 4 * LANES <= dim {
            products.add::<4>(place, ahead);
            place += 4 * LANES;
        }
        while place < dim {
            products.add::<1>(place, ahead);
            place += LANES;
        }
    }
}

/// Products of R queries with 64 keys.
///
/// # Safety
/// `queries` are of `dim` numbers, `keys` of `dim / 2` rows of 16 pairs every `stride`.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn scores<const R: usize>(
    queries: &[*const bf16; R],
    keys: &[*const u32; VECTORS],
    stride: usize,
    dim: usize,
    ahead: &mut Ahead<VECTORS>,
) -> [[__m512; VECTORS]; R] {
    let mut sums = [[_mm512_setzero_ps(); VECTORS]; R];
    for pair in 0..dim / 2 {
        ahead.fetch(VECTORS);
        // SAFETY: within what the caller promised.
        unsafe {
            let mut loaded = [_mm512_setzero_si512(); VECTORS];
            for vector in 0..VECTORS {
                loaded[vector] = _mm512_loadu_si512(keys[vector].add(pair * stride).cast());
            }
            for row in 0..R {
                let query = queries[row].add(2 * pair).cast::<i32>().read_unaligned();
                let query = pairs(_mm512_set1_epi32(query));
                for vector in 0..VECTORS {
                    let sum = sums[row][vector];
                    sums[row][vector] = _mm512_dpbf16_ps(sum, pairs(loaded[vector]), query);
                }
            }
        }
    }
    sums
}

/// The vectors of keys that any row sees.
pub(super) fn seen_vectors(seen: &[Range<usize>]) -> Range<usize> {
    let first = seen.iter().map(|seen| seen.start).min().unwrap_or(0);
    let end = seen.iter().map(|seen| seen.end).max().unwrap_or(0);
    first / LANES..end.div_ceil(LANES)
}

/// A row's scores become weights, zero outside of `seen`, which are added to its state's sums; by
/// how much what the state held before shrinks.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
#[inline]
pub(super) fn soften(
    scores: &mut [__m512; VECTORS],
    seen: Range<usize>,
    scoring: &Scoring,
    state: &mut [f32],
) -> f32 {
    let below = |key: usize| (1_u128 << key) - 1;
    let seen = (below(seen.end) & !below(seen.start.min(seen.end))) as u64;
    let mask = |vector: usize| (seen >> (vector * LANES)) as __mmask16;
    let mut most = _mm512_set1_ps(f32::NEG_INFINITY);
    for (vector, score) in scores.iter_mut().enumerate() {
        *score = _mm512_mul_ps(*score, _mm512_set1_ps(scoring.factor()));
        if let Some(cap) = scoring.softcap {
            *score = capped(*score, cap);
        }
        *score = _mm512_mask_mov_ps(_mm512_set1_ps(f32::NEG_INFINITY), mask(vector), *score);
        most = _mm512_max_ps(most, *score);
    }
    let before = state[0];
    let largest = before.max(_mm512_reduce_max_ps(most));
    state[0] = largest;
    // A row that has seen no key at all subtracts nothing, so that its weights become zero.
    let base = if largest == f32::NEG_INFINITY {
        0.0
    } else {
        largest
    };
    let base = _mm512_set1_ps(base);
    let shrink = exp2(_mm512_sub_ps(_mm512_set1_ps(before), base));
    let mut sum = _mm512_mul_ps(load(&state[LANES..]), shrink);
    for (vector, score) in scores.iter_mut().enumerate() {
        *score = _mm512_maskz_mov_ps(mask(vector), exp2(_mm512_sub_ps(*score, base)));
        sum = _mm512_add_ps(sum, *score);
    }
    // SAFETY: the header has 16 sums.
    unsafe { _mm512_storeu_ps(state[LANES..2 * LANES].as_mut_ptr(), sum) };
    _mm512_cvtss_f32(shrink)
}

/// Weights as pairs of bf16.
#[target_feature(enable = "avx512f,avx512bf16,avx512vl")]
#[inline]
fn round(weights: &[__m512; VECTORS], pairs: &mut [u32; TILE / 2]) {
    for (vector, &weight) in weights.iter().enumerate() {
        let into = &mut pairs[vector * LANES / 2..][..LANES / 2];
        // SAFETY: `into` has 32 bytes; both are 256 plain bits.
        unsafe {
            let bits = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(weight));
            _mm256_storeu_si256(into.as_mut_ptr().cast(), bits);
        }
    }
}

/// Weighted values to be added to R states.
struct Products<'a, const R: usize> {
    weights: &'a Weights,
    shrink: &'a [f32; R],
    values: [*const u32; VECTORS],
    vectors: Range<usize>,
    dim: usize,
    sums: *mut f32,
}

impl<const R: usize> Products<'_, R> {
    /// Of N vectors of dimensions at `place`.
    ///
    /// # Safety
    /// `sums` are R states of `dim` dimensions, of which N vectors are at `place`; `values` of
    /// every vector of keys in `vectors` have 8 rows of `dim` pairs.
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn add<const N: usize>(&self, place: usize, ahead: &mut Ahead<VECTORS>) {
        let dim = self.dim;
        let at = |row: usize, n: usize| row * (HEADER + dim) + HEADER + place + n * LANES;
        let mut sums = [[_mm512_setzero_ps(); N]; R];
        for (row, sums) in sums.iter_mut().enumerate() {
            let shrink = _mm512_set1_ps(self.shrink[row]);
            for (n, sum) in sums.iter_mut().enumerate() {
                // SAFETY: within the state, as the caller promised.
                let before = unsafe { _mm512_loadu_ps(self.sums.add(at(row, n))) };
                *sum = _mm512_mul_ps(before, shrink);
            }
        }
        for vector in self.vectors.clone() {
            for pair in 0..LANES / 2 {
                ahead.fetch(N);
                let mut loaded = [_mm512_setzero_si512(); N];
                for (n, loaded) in loaded.iter_mut().enumerate() {
                    let offset = pair * dim + place + n * LANES;
                    // SAFETY: within the values, as the caller promised.
                    *loaded = unsafe { _mm512_loadu_si512(self.values[vector].add(offset).cast()) };
                }
                for (weights, sums) in self.weights.iter().zip(&mut sums) {
                    let weight = weights[vector * LANES / 2 + pair] as i32;
                    let weight = pairs(_mm512_set1_epi32(weight));
                    for (sum, &loaded) in sums.iter_mut().zip(&loaded) {
                        *sum = _mm512_dpbf16_ps(*sum, pairs(loaded), weight);
                    }
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (n, &sum) in sums.iter().enumerate() {
                // SAFETY: as above.
                unsafe { _mm512_storeu_ps(self.sums.add(at(row, n)), sum) };
            }
        }
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 plain bits.
    unsafe { std::mem::transmute(bits) }
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn load(numbers: &[f32]) -> __m512 {
    let numbers = &numbers[..LANES];
    // SAFETY: there are 16.
    unsafe { _mm512_loadu_ps(numbers.as_ptr()) }
}

/// 2^x for x <= 0, zero below -150.
#[target_feature(enable = "avx512f")]
#[inline]
fn exp2(x: __m512) -> __m512 {
    let x = _mm512_max_ps(_mm512_set1_ps(-160.0), x);
    let whole = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
    let rest = _mm512_sub_ps(x, whole);
    let [first, others @ ..] = exp2_coefficients();
    let mut sum = _mm512_set1_ps(first);
    for coefficient in others {
        sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(coefficient));
    }
    _mm512_scalef_ps(sum, whole)
}

/// cap * tanh(score / cap), in base 2.
#[target_feature(enable = "avx512f")]
#[inline]
fn capped(score: __m512, cap: f32) -> __m512 {
    let one = _mm512_set1_ps(1.0);
    // tanh(|x|) = (1 - e^-2|x|) / (1 + e^-2|x|)
    let size = _mm512_mul_ps(_mm512_abs_ps(score), _mm512_set1_ps(-2.0 * LOG2_E / cap));
    let power = exp2(size);
    let tanh = _mm512_div_ps(_mm512_sub_ps(one, power), _mm512_add_ps(one, power));
    let tanh = _mm512_mul_ps(tanh, _mm512_set1_ps(cap * LOG2_E));
    let sign = _mm512_and_si512(_mm512_castps_si512(score), _mm512_set1_epi32(i32::MIN));
    _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(tanh), sign))
}
