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
//! Meanwhile the next panel is fetched into the second-level cache, spread evenly over the steps.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _MM_HINT_T1, _mm_prefetch, _mm512_add_ps, _mm512_and_si512,
    _mm512_castsi512_si256, _mm512_cvtepi32_ps, _mm512_cvtepu16_epi32, _mm512_dpbf16_ps,
    _mm512_dpbusd_epi32, _mm512_extracti64x4_epi64, _mm512_fmadd_ps, _mm512_load_ps,
    _mm512_load_si512, _mm512_mul_ps, _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_setzero_ps, _mm512_slli_epi32, _mm512_srli_epi16, _mm512_store_ps,
};

use super::layout::{BF16_SCALES, CHANNELS, F32_SCALES, Format};
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

/// What to fetch while a block is computed: `bytes` more at each step.
#[derive(Clone, Copy)]
struct Ahead {
    start: *const u8,
    bytes: usize,
}

impl Ahead {
    /// This tile's part of the next panel's block.
    fn new(work: &Work, group: usize, steps: usize) -> Self {
        let block = work.weight.block(group, work.next);
        let part = block.len() / work.parts;
        Self {
            start: block[part * work.part..].as_ptr(),
            bytes: part.div_ceil(steps),
        }
    }

    #[inline(always)]
    fn fetch(self, step: usize) {
        let at = self.start.wrapping_add(step * self.bytes);
        // SAFETY: fetching has no effect but on caches, whatever the address.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(at.cast());
            _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(64).cast());
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
    match work.weight.layout().format() {
        Format::Bf16 => of_rows!(BF16, 1 2 3 4 5 6 7 8 9 10 11 12 13),
        Format::Int8 => of_rows!(INT8, 1 2 3 4 5 6 7 8 9 10 11 12 13),
        Format::Int4 { .. } => of_rows!(INT4, 1 2 3 4 5 6),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")]
fn tile<const R: usize, const FORMAT: u8>(work: &Work, tree: &mut Tree) {
    for group in 0..work.weight.layout().k_groups() {
        let mut sums = match FORMAT {
            BF16 => bf16::<R>(work, group),
            INT8 => int8::<R>(work, group),
            _ => int4::<R>(work, group),
        };
        let level = group.trailing_ones() as usize;
        for left in &tree.0[..level] {
            for (sums, left) in sums.iter_mut().zip(&left.0) {
                for (sum, left) in sums.iter_mut().zip(left.as_chunks::<16>().0) {
                    // SAFETY: 16 floats at 64 bytes.
                    *sum = _mm512_add_ps(*sum, unsafe { _mm512_load_ps(left.as_ptr()) });
                }
            }
        }
        for (sums, to) in sums.into_iter().zip(&mut tree.0[level].0) {
            for (sum, to) in sums.into_iter().zip(to.as_chunks_mut::<16>().0) {
                // SAFETY: as above.
                unsafe { _mm512_store_ps(to.as_mut_ptr(), sum) };
            }
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
    unsafe { [0, 64].map(|offset| _mm512_load_si512(from.add(offset).cast())) }
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
fn bf16<const R: usize>(work: &Work, group: usize) -> Vectors<__m512, R> {
    let (weights, values) = (work.block(group), work.values(group));
    let steps = weights.len() / PAIR;
    assert_eq!(values.len(), steps * R * 4, "activations of a group");
    let ahead = Ahead::new(work, group, steps);
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    for step in 0..steps {
        ahead.fetch(step);
        // SAFETY: `step` is below the number of pairs of `weights`, a block aligned to 64, and
        // `values` has R units for each; vectors of integers and of bf16 are the same bits.
        unsafe {
            let w = pair(weights.as_ptr().add(step * PAIR));
            let w: [__m512bh; 2] = w.map(|w| std::mem::transmute::<__m512i, __m512bh>(w));
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
fn int8<const R: usize>(work: &Work, group: usize) -> Vectors<__m512, R> {
    let (weights, values) = (&work.block(group)[F32_SCALES..], work.values(group));
    let (scales, offsets) = (work.scales(group), work.offsets(group));
    let steps = weights.len() / PAIR;
    assert_eq!(values.len(), steps * R * 4, "activations of a group");
    let ahead = Ahead::new(work, group, steps);
    let mut sums = [[_mm512_set1_epi32(0); 2]; R];
    for (sums, &offset) in sums.iter_mut().zip(offsets) {
        *sums = [_mm512_set1_epi32(offset); 2];
    }
    for step in 0..steps {
        ahead.fetch(step);
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
    scaled(sums, scales)
}

/// Integer sums as floats, times the scale of the row's activations.
#[inline]
#[target_feature(enable = "avx512f")]
fn scaled<const R: usize>(sums: Vectors<__m512i, R>, scales: &[f32]) -> Vectors<__m512, R> {
    let mut out = [[_mm512_setzero_ps(); 2]; R];
    for ((out, sums), &scale) in out.iter_mut().zip(sums).zip(scales) {
        let scale = _mm512_set1_ps(scale);
        *out = sums.map(|sum| _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale));
    }
    out
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn int4<const R: usize>(work: &Work, group: usize) -> Vectors<__m512, R> {
    let Format::Int4 { group: span } = work.weight.layout().format() else {
        unreachable!("int4 weights")
    };
    let pairs = span / 8;
    let size = BF16_SCALES + pairs * PAIR;
    let (weights, values) = (work.block(group), work.values(group));
    let parts = weights.len() / size;
    let offsets = work.offsets(group);
    assert_eq!(values.len(), parts * span * R, "activations of a group");
    assert_eq!(offsets.len(), parts * R, "offsets of a group");
    let ahead = Ahead::new(work, group, parts * pairs);
    let low = _mm512_set1_epi8(0x0f);
    let mut total = [[_mm512_setzero_ps(); 2]; R];
    for part in 0..parts {
        let mut sums = [[_mm512_set1_epi32(0); 2]; R];
        for (sums, &offset) in sums.iter_mut().zip(&offsets[part * R..]) {
            *sums = [_mm512_set1_epi32(offset); 2];
        }
        // SAFETY: `part` is below the number of parts of `weights`, each 64 bytes of scales and
        // `pairs` pairs in a block aligned to 64; `values` has 2 R units for each pair.
        unsafe {
            let block = weights.as_ptr().add(part * size);
            for step in 0..pairs {
                ahead.fetch(part * pairs + step);
                let w = pair(block.add(BF16_SCALES + step * PAIR));
                let x = values.as_ptr().add((part * pairs + step) * 2 * R * 4);
                let halves = [
                    w.map(|w| _mm512_and_si512(w, low)),
                    w.map(|w| _mm512_and_si512(_mm512_srli_epi16::<4>(w), low)),
                ];
                for (half, w) in halves.iter().enumerate() {
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let x = broadcast(x.add((half * R + row) * 4));
                        sums[0] = _mm512_dpbusd_epi32(sums[0], w[0], x);
                        sums[1] = _mm512_dpbusd_epi32(sums[1], w[1], x);
                    }
                }
            }
            let scales = _mm512_load_si512(block.cast());
            let scales = [
                _mm512_castsi512_si256(scales),
                _mm512_extracti64x4_epi64::<1>(scales),
            ]
            .map(|half| {
                let bits = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half));
                std::mem::transmute::<__m512i, __m512>(bits)
            });
            for (total, sums) in total.iter_mut().zip(sums) {
                for ((total, sum), scale) in total.iter_mut().zip(sums).zip(scales) {
                    *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, *total);
                }
            }
        }
    }
    for (total, &scale) in total.iter_mut().zip(work.scales(group)) {
        *total = total.map(|total| _mm512_mul_ps(total, _mm512_set1_ps(scale)));
    }
    total
}
