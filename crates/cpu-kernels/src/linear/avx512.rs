//! The kernels with AVX-512 VNNI and BF16.
//!
//! A tile is up to 13 rows by two vectors of 16 channels, whose 26 sums stay in registers. A step
//! loads two vectors of weights and broadcasts a unit of each row's activations:
//!
//! ```text
//!            weights  w0 w1
//! x[row 0]            +  +      sums[0][0], sums[0][1]
//! x[row 1]            +  +      ...
//! ```
//!
//! Meanwhile the block after this one is fetched into the second-level cache.

use std::arch::x86_64::{
    __m256i, __m512, __m512bh, __m512i, _MM_HINT_T1, _mm_prefetch, _mm512_add_ps, _mm512_and_si512,
    _mm512_andnot_si512, _mm512_castsi512_ps, _mm512_castsi512_si256, _mm512_cvtepi32_ps,
    _mm512_cvtepu16_epi32, _mm512_dpbf16_ps, _mm512_dpbusd_epi32, _mm512_extracti64x4_epi64,
    _mm512_fmadd_ps, _mm512_load_ps, _mm512_load_si512, _mm512_madd_epi16, _mm512_mul_ps,
    _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_slli_epi32,
    _mm512_srli_epi16, _mm512_store_ps,
};

use super::layout::{CHANNELS, F32_SCALES, Format, ZERO_BITS, int4_scales};
use super::tile::{MAX_ROWS, Tree, Work};

/// Rows of a tile of bf16 or int8 weights.
pub(super) const ROWS: usize = MAX_ROWS;
/// Rows of a tile of int4 weights, which need a float beside each integer sum.
pub(super) const INT4_ROWS: usize = 6;

/// Two vectors, for a panel's channels, of each row.
type Vectors<T, const R: usize> = [[T; 2]; R];

/// Bytes of a step's or scale group's two vectors.
const PAIR: usize = CHANNELS * 4;

const BF16: u8 = 0;
const INT8: u8 = 1;
const INT4: u8 = 2;
const INT4_ZEROS: u8 = 3;

/// Fetches memory while a block is computed, evenly over its steps.
struct Ahead<'a> {
    rest: &'a [u8],
    /// Steps from one fetch to the next, lines fetched at each, and steps until the next.
    every: usize,
    lines: usize,
    wait: usize,
}

impl<'a> Ahead<'a> {
    #[inline(always)]
    fn new(work: &Work<'a>, steps: usize) -> Self {
        let lines = work.ahead.len().div_ceil(64).max(1);
        Self {
            rest: work.ahead,
            every: (steps / lines).max(1),
            lines: lines.div_ceil(steps),
            wait: 1,
        }
    }

    #[inline(always)]
    fn step(&mut self) {
        self.wait -= 1;
        if self.wait == 0 {
            self.wait = self.every;
            for _ in 0..self.lines {
                let at = self.rest.as_ptr().cast();
                // SAFETY: fetching has no effect but on caches, whatever the address.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(at) };
                self.rest = self.rest.get(64..).unwrap_or_default();
            }
        }
    }
}

/// # Safety
/// The processor has what `Level::Avx512` names.
pub(super) unsafe fn product(work: &Work, tree: &mut Tree) {
    macro_rules! of_rows {
        ($format:expr, $($rows:literal)*) => {
            match work.tile.rows {
                // SAFETY: as promised by the caller.
                $($rows => unsafe { tile::<$rows, { $format }>(work, tree) },)*
                rows => unreachable!("{rows} rows in a tile"),
            }
        };
    }
    match work.format {
        Format::Bf16 => of_rows!(BF16, 1 2 3 4 5 6 7 8 9 10 11 12 13),
        Format::Int8 => of_rows!(INT8, 1 2 3 4 5 6 7 8 9 10 11 12 13),
        Format::Int4 { zeros: false, .. } => of_rows!(INT4, 1 2 3 4 5 6),
        Format::Int4 { zeros: true, .. } => of_rows!(INT4_ZEROS, 1 2 3 4 5 6),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")]
fn tile<const R: usize, const FORMAT: u8>(work: &Work, tree: &mut Tree) {
    let mut sums = match FORMAT {
        BF16 => bf16::<R>(work),
        INT8 => int8::<R>(work),
        INT4 => int4::<R, false>(work),
        _ => int4::<R, true>(work),
    };
    let level = work.group.trailing_ones() as usize;
    for left in &tree.0[..level] {
        let left = left.rows::<R>();
        for (row, sums) in sums.iter_mut().enumerate() {
            let left = &left[row];
            // SAFETY: 32 floats at 64 bytes.
            unsafe {
                sums[0] = _mm512_add_ps(sums[0], _mm512_load_ps(left.as_ptr()));
                sums[1] = _mm512_add_ps(sums[1], _mm512_load_ps(left[16..].as_ptr()));
            }
        }
    }
    for (row, to) in tree.0[level].rows_mut::<R>().iter_mut().enumerate() {
        // SAFETY: as above.
        unsafe {
            _mm512_store_ps(to.as_mut_ptr(), sums[row][0]);
            _mm512_store_ps(to[16..].as_mut_ptr(), sums[row][1]);
        }
    }
}

/// Two vectors at the beginning of `from`.
///
/// # Safety
/// `PAIR` bytes are there, aligned to 64.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn pair(from: *const u8) -> [__m512i; 2] {
    // SAFETY: as promised by the caller.
    unsafe {
        [
            _mm512_load_si512(from.cast()),
            _mm512_load_si512(from.add(64).cast()),
        ]
    }
}

/// The unit of activations at `from`, in all lanes.
///
/// # Safety
/// 4 bytes are there.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn broadcast(from: *const u8) -> __m512i {
    // SAFETY: as promised by the caller.
    _mm512_set1_epi32(unsafe { from.cast::<i32>().read_unaligned() })
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn bf16<const R: usize>(work: &Work) -> Vectors<__m512, R> {
    let (weights, values) = (work.block, work.tile.values);
    let steps = weights.len() / PAIR;
    assert_eq!(values.len(), steps * R * 4, "activations of a group");
    let mut ahead = Ahead::new(work, steps);
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    for step in 0..steps {
        ahead.step();
        // SAFETY: `step` is below the number of pairs of `weights`, a block aligned to 64, and
        // `values` has R units for each; vectors of integers and of bf16 are the same bits.
        unsafe {
            let w = pair(weights.as_ptr().add(step * PAIR));
            let w = std::mem::transmute::<[__m512i; 2], [__m512bh; 2]>(w);
            for (row, sums) in sums.iter_mut().enumerate() {
                let x = broadcast(values.as_ptr().add((step * R + row) * 4));
                let x = std::mem::transmute::<__m512i, __m512bh>(x);
                sums[0] = _mm512_dpbf16_ps(sums[0], w[0], x);
                sums[1] = _mm512_dpbf16_ps(sums[1], w[1], x);
            }
        }
    }
    sums
}

#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn int8<const R: usize>(work: &Work) -> Vectors<__m512, R> {
    let (weights, values) = (&work.block[F32_SCALES..], work.tile.values);
    let offsets = &work.tile.offsets.as_chunks::<R>().0[0];
    let steps = weights.len() / PAIR;
    assert_eq!(values.len(), steps * R * 4, "activations of a group");
    let mut ahead = Ahead::new(work, steps);
    let mut sums = [[_mm512_set1_epi32(0); 2]; R];
    for (row, sums) in sums.iter_mut().enumerate() {
        *sums = [_mm512_set1_epi32(offsets[row]); 2];
    }
    for step in 0..steps {
        ahead.step();
        // SAFETY: `step` is below the number of pairs of `weights`, which begin 128 bytes into a
        // block aligned to 64, and `values` has R units for each.
        unsafe {
            let w = pair(weights.as_ptr().add(step * PAIR));
            for (row, sums) in sums.iter_mut().enumerate() {
                let x = broadcast(values.as_ptr().add((step * R + row) * 4));
                sums[0] = _mm512_dpbusd_epi32(sums[0], w[0], x);
                sums[1] = _mm512_dpbusd_epi32(sums[1], w[1], x);
            }
        }
    }
    let scales = &work.tile.scales.as_chunks::<R>().0[0];
    let mut out = [[_mm512_setzero_ps(); 2]; R];
    for (row, out) in out.iter_mut().enumerate() {
        let scale = _mm512_set1_ps(scales[row]);
        out[0] = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[row][0]), scale);
        out[1] = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[row][1]), scale);
    }
    out
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn int4<const R: usize, const ZEROS: bool>(work: &Work) -> Vectors<__m512, R> {
    let Format::Int4 { group: span, .. } = work.format else {
        unreachable!("int4 weights")
    };
    let pairs = span / 8;
    let head = int4_scales(ZEROS);
    let size = head + pairs * PAIR;
    let (weights, values) = (work.block, work.tile.values);
    let parts = weights.len() / size;
    let offsets = work.tile.offsets.as_chunks::<R>().0;
    assert_eq!(values.len(), parts * span * R, "activations of a group");
    assert_eq!(offsets.len(), parts, "offsets of a group");
    let mut ahead = Ahead::new(work, parts * pairs);
    let low = _mm512_set1_epi8(0x0f);
    let zero_bits = _mm512_set1_epi32(ZERO_BITS.cast_signed());
    let mut total = [[_mm512_setzero_ps(); 2]; R];
    for part in 0..parts {
        let mut sums = [[_mm512_set1_epi32(0); 2]; R];
        let offsets = &offsets[part];
        // SAFETY: `part` is below the number of parts of `weights`, each `head` bytes of scales and
        // `pairs` pairs in a block aligned to 64; `values` has 2 R units for each pair.
        unsafe {
            let block = weights.as_ptr().add(part * size);
            if ZEROS {
                let zeros = pair(block).map(|scale| _mm512_and_si512(scale, zero_bits));
                for (row, sums) in sums.iter_mut().enumerate() {
                    // A sum of 128 int8 fits in 16 bits; above a zero there are only zeros.
                    let offset = _mm512_set1_epi32(offsets[row]);
                    *sums = zeros.map(|zero| _mm512_madd_epi16(zero, offset));
                }
            } else {
                for (row, sums) in sums.iter_mut().enumerate() {
                    *sums = [_mm512_set1_epi32(offsets[row]); 2];
                }
            }
            for step in 0..pairs {
                ahead.step();
                let w = pair(block.add(head + step * PAIR));
                let x = values.as_ptr().add((part * pairs + step) * 2 * R * 4);
                let halves = [
                    [_mm512_and_si512(w[0], low), _mm512_and_si512(w[1], low)],
                    [
                        _mm512_and_si512(_mm512_srli_epi16::<4>(w[0]), low),
                        _mm512_and_si512(_mm512_srli_epi16::<4>(w[1]), low),
                    ],
                ];
                for (half, w) in halves.iter().enumerate() {
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let x = broadcast(x.add((half * R + row) * 4));
                        sums[0] = _mm512_dpbusd_epi32(sums[0], w[0], x);
                        sums[1] = _mm512_dpbusd_epi32(sums[1], w[1], x);
                    }
                }
            }
            let scales = if ZEROS {
                pair(block).map(|scale| _mm512_castsi512_ps(_mm512_andnot_si512(zero_bits, scale)))
            } else {
                let scales = _mm512_load_si512(block.cast());
                [
                    wide(_mm512_castsi512_si256(scales)),
                    wide(_mm512_extracti64x4_epi64::<1>(scales)),
                ]
            };
            for (row, total) in total.iter_mut().enumerate() {
                let sums = [
                    _mm512_cvtepi32_ps(sums[row][0]),
                    _mm512_cvtepi32_ps(sums[row][1]),
                ];
                total[0] = _mm512_fmadd_ps(sums[0], scales[0], total[0]);
                total[1] = _mm512_fmadd_ps(sums[1], scales[1], total[1]);
            }
        }
    }
    let scales = &work.tile.scales.as_chunks::<R>().0[0];
    for (row, total) in total.iter_mut().enumerate() {
        let scale = _mm512_set1_ps(scales[row]);
        total[0] = _mm512_mul_ps(total[0], scale);
        total[1] = _mm512_mul_ps(total[1], scale);
    }
    total
}

/// 16 bf16 as f32.
#[inline]
#[target_feature(enable = "avx512f")]
fn wide(x: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x)))
}
