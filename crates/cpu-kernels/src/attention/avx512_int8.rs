//! A tile of int8 keys and values and up to six rows, with dot products of whole numbers.
//!
//! ```text
//! query     q = round(query * 32767 / largest |query|), int16, once for each row of a unit
//! scores    sum over pairs of dimensions of q * key: exact in 32 bits, then times both scales
//! weights   w = round(weight * value's scale * 32767 / the tile's largest such product), int16
//! values    sum over the tile's keys of w * value: exact in 32 bits, then added to the state
//! ```
//!
//! Numbers of the cache are widened to int16 on their way from memory into a register and never
//! written anywhere. int16 is finer than the bf16 that queries and weights are elsewhere. Sums of a
//! tile are exact, so that no order matters but that of the tiles.

use std::arch::x86_64::*;
use std::ops::Range;

use super::ahead::Ahead;
use super::attend::Scoring;
use super::avx512::{load, seen_vectors, soften};
use super::tile::{Group, HEADER, LANES, ROWS, TILE, VECTORS, Weights, WholeTile};

/// The largest whole number of a weight: 64 products with int8 stay below 2^31.
const MOST: f32 = 32767.0;

/// As `tile::add_tile`, for heads that `avx512::fits` takes, of int8.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")]
pub(super) fn add_tile(
    group: &mut Group,
    tile: &WholeTile,
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

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")]
fn add<const R: usize>(
    group: &mut Group,
    tile: &WholeTile,
    ahead: &mut Ahead<VECTORS>,
    scoring: &Scoring,
) {
    let dim = group.queries[0].len();
    assert!(
        dim.is_multiple_of(LANES) && group.states.len() == R * (HEADER + dim),
        "states"
    );
    assert!(
        group.whole[..R].iter().all(|query| query.0.len() == dim),
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
    let used = |vector: usize| {
        if vectors.contains(&vector) {
            vector
        } else {
            vectors.start
        }
    };
    let keys = std::array::from_fn(|vector| tile.keys[used(vector)].as_ptr());
    let queries = std::array::from_fn(|row| group.whole[row].0.as_ptr());
    let mut weights: Weights = [[0; TILE / 2]; ROWS];
    let mut of_states = [(0.0, 0.0); R];
    // SAFETY: lengths were checked above.
    unsafe {
        let sums = products::<R>(&queries, &keys, tile.key_stride, dim, ahead);
        for (row, sums) in sums.iter().enumerate() {
            let mut scores = [_mm512_setzero_ps(); VECTORS];
            for vector in 0..VECTORS {
                let scale = _mm512_set1_ps(group.whole[row].1);
                let scale = _mm512_mul_ps(load(tile.scales[used(vector)].0), scale);
                scores[vector] = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[vector]), scale);
            }
            let state = &mut group.states[row * (HEADER + dim)..];
            let shrink = soften(&mut scores, group.seen[row].clone(), scoring, state);
            for (vector, weights) in scores.iter_mut().enumerate() {
                *weights = _mm512_mul_ps(*weights, load(tile.scales[used(vector)].1));
            }
            of_states[row] = (shrink, quantise_weights(&scores, &mut weights[row]));
        }
        let values = Values {
            weights: &weights,
            of_states: &of_states,
            values: std::array::from_fn(|vector| tile.values[vector].as_ptr()),
            vectors,
            dim,
            sums: group.states.as_mut_ptr(),
        };
        let mut place = 0;
        // Few rows leave registers for more dimensions, which are then read in their order.
        while R <= 2 && place + 8 * LANES <= dim {
            values.add::<8>(place, ahead);
            place += 8 * LANES;
        }
        while place + 4 * LANES <= dim {
            values.add::<4>(place, ahead);
            place += 4 * LANES;
        }
        while place < dim {
            values.add::<1>(place, ahead);
            place += LANES;
        }
    }
    ahead.fetch(2 * VECTORS);
}

/// Exact products of R queries with 64 keys.
///
/// # Safety
/// `queries` are of `dim` numbers, `keys` of `dim / 2` rows of 16 pairs every `stride`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn products<const R: usize>(
    queries: &[*const i16; R],
    keys: &[*const [i8; 2]; VECTORS],
    stride: usize,
    dim: usize,
    ahead: &mut Ahead<VECTORS>,
) -> [[__m512i; VECTORS]; R] {
    let mut sums = [[_mm512_setzero_si512(); VECTORS]; R];
    for pair in 0..dim / 2 {
        ahead.fetch(VECTORS / 2);
        let mut loaded = [_mm512_setzero_si512(); VECTORS];
        for (keys, loaded) in keys.iter().zip(&mut loaded) {
            // SAFETY: within what the caller promised.
            *loaded = unsafe { widened(keys.add(pair * stride)) };
        }
        for row in 0..R {
            // SAFETY: as above.
            let query = unsafe { queries[row].add(2 * pair).cast::<i32>().read_unaligned() };
            let query = _mm512_set1_epi32(query);
            for vector in 0..VECTORS {
                sums[row][vector] = _mm512_dpwssd_epi32(sums[row][vector], loaded[vector], query);
            }
        }
    }
    sums
}

/// 16 pairs as int16.
///
/// # Safety
/// There are 16.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
unsafe fn widened(pairs: *const [i8; 2]) -> __m512i {
    // SAFETY: by the caller's promise.
    _mm512_cvtepi8_epi16(unsafe { _mm256_loadu_si256(pairs.cast()) })
}

/// Weights of a tile's keys as pairs of int16, and what 1 of them stands for.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn quantise_weights(weights: &[__m512; VECTORS], whole: &mut [u32; TILE / 2]) -> f32 {
    let most = weights
        .iter()
        .fold(_mm512_setzero_ps(), |most, &x| _mm512_max_ps(most, x));
    let largest = _mm512_reduce_max_ps(most);
    let factor = if largest > 0.0 { MOST / largest } else { 0.0 };
    // Beyond f32 the factor is none: such weights are next to nothing.
    let factor = _mm512_set1_ps(if factor.is_finite() { factor } else { 0.0 });
    for (vector, &weight) in weights.iter().enumerate() {
        let rounded = _mm512_cvtps_epi32(_mm512_mul_ps(weight, factor));
        let into = &mut whole[vector * LANES / 2..][..LANES / 2];
        // SAFETY: `into` has 32 bytes.
        unsafe { _mm256_storeu_si256(into.as_mut_ptr().cast(), _mm512_cvtepi32_epi16(rounded)) };
    }
    largest / MOST
}

/// Weighted values to be added to R states.
struct Values<'a, const R: usize> {
    weights: &'a Weights,
    /// By how much each shrinks before, and what 1 of its weights stands for.
    of_states: &'a [(f32, f32); R],
    values: [*const [i8; 2]; VECTORS],
    vectors: Range<usize>,
    dim: usize,
    sums: *mut f32,
}

impl<const R: usize> Values<'_, R> {
    /// Of N vectors of dimensions at `place`.
    ///
    /// # Safety
    /// `sums` are R states of `dim` dimensions, of which N vectors are at `place`; `values` of
    /// every vector of keys in `vectors` have 8 rows of `dim` pairs.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn add<const N: usize>(&self, place: usize, ahead: &mut Ahead<VECTORS>) {
        let dim = self.dim;
        let mut sums = [[_mm512_setzero_si512(); N]; R];
        for vector in self.vectors.clone() {
            for pair in 0..LANES / 2 {
                ahead.fetch(N.div_ceil(2));
                let mut loaded = [_mm512_setzero_si512(); N];
                for (n, loaded) in loaded.iter_mut().enumerate() {
                    let offset = pair * dim + place + n * LANES;
                    // SAFETY: within the values, as the caller promised.
                    *loaded = unsafe { widened(self.values[vector].add(offset)) };
                }
                for (weights, sums) in self.weights.iter().zip(&mut sums) {
                    let weight = _mm512_set1_epi32(weights[vector * LANES / 2 + pair] as i32);
                    for (sum, &loaded) in sums.iter_mut().zip(&loaded) {
                        *sum = _mm512_dpwssd_epi32(*sum, loaded, weight);
                    }
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            let (shrink, scale) = self.of_states[row];
            let (shrink, scale) = (_mm512_set1_ps(shrink), _mm512_set1_ps(scale));
            for (n, &sum) in sums.iter().enumerate() {
                let at = row * (HEADER + dim) + HEADER + place + n * LANES;
                let sum = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale);
                // SAFETY: within the state, as the caller promised.
                unsafe {
                    let before = _mm512_loadu_ps(self.sums.add(at));
                    _mm512_storeu_ps(self.sums.add(at), _mm512_fmadd_ps(before, shrink, sum));
                }
            }
        }
    }
}
