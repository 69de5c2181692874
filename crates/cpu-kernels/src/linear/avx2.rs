//! The kernels with AVX2 and FMA.
//!
//! A tile is up to 3 rows. Integer products go by 16 channels: weights are widened to 16 bits and
//! multiplied with `vpmaddwd`, which is exact where `vpmaddubsw` saturates; a channel has two sums,
//! of inputs 0, 1 and 2, 3 of each step, added up at the end of a group. bf16 products go by 32
//! channels and are widened to f32.

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _mm_and_si128, _mm_load_si128, _mm_set1_epi8, _mm_set1_epi32,
    _mm_srli_epi16, _mm256_add_epi32, _mm256_add_ps, _mm256_and_si256, _mm256_andnot_si256,
    _mm256_castsi256_ps, _mm256_cvtepi8_epi16, _mm256_cvtepi32_ps, _mm256_cvtepu8_epi16,
    _mm256_cvtepu16_epi32, _mm256_fmadd_ps, _mm256_hadd_epi32, _mm256_load_ps, _mm256_load_si256,
    _mm256_madd_epi16, _mm256_mul_ps, _mm256_permute4x64_epi64, _mm256_set1_epi32, _mm256_set1_ps,
    _mm256_setzero_ps, _mm256_setzero_si256, _mm256_slli_epi32, _mm256_store_ps,
};

use super::layout::{CHANNELS, F32_SCALES, Format, ZERO_BITS, int4_scales};
use super::tile::{Tree, Work};

/// Rows of a tile.
pub(super) const ROWS: usize = 3;

/// Bytes of a step.
const STEP: usize = CHANNELS * 4;

/// Sums of 16 channels for each row: of int8 products, two for each channel.
type Pairs<const R: usize> = [[__m256i; 4]; R];
/// Sums of 16 channels for each row.
type Halves<const R: usize> = [[__m256; 2]; R];

/// # Safety
/// The processor has what `Level::Avx2` names.
pub(super) unsafe fn product(work: &Work, tree: &mut Tree) {
    match work.tile.rows {
        // SAFETY: as promised by the caller.
        1 => unsafe { tile::<1>(work, tree) },
        // SAFETY: as above.
        2 => unsafe { tile::<2>(work, tree) },
        // SAFETY: as above.
        3 => unsafe { tile::<3>(work, tree) },
        rows => unreachable!("{rows} rows in a tile"),
    }
}

#[target_feature(enable = "avx2,fma")]
fn tile<const R: usize>(work: &Work, tree: &mut Tree) {
    match work.format {
        Format::Bf16 => {
            let sums = bf16::<R>(work);
            for half in 0..2 {
                let mut part = [[_mm256_setzero_ps(); 2]; R];
                for (row, part) in part.iter_mut().enumerate() {
                    *part = [sums[row][half * 2], sums[row][half * 2 + 1]];
                }
                add(tree, work.group, half, &part);
            }
        }
        Format::Int8 => {
            for half in 0..2 {
                add(tree, work.group, half, &int8::<R>(work, half));
            }
        }
        Format::Int4 { group: span, zeros } => {
            for half in 0..2 {
                let sums = if zeros {
                    int4::<R, true>(work, half, span)
                } else {
                    int4::<R, false>(work, half, span)
                };
                add(tree, work.group, half, &sums);
            }
        }
    }
}

/// Add what a group contributes to half of a panel's channels.
#[inline]
#[target_feature(enable = "avx2")]
fn add<const R: usize>(tree: &mut Tree, group: usize, half: usize, sums: &Halves<R>) {
    let level = group.trailing_ones() as usize;
    for (row, sums) in sums.iter().enumerate() {
        for (quarter, &sum) in sums.iter().enumerate() {
            let at = half * 16 + quarter * 8;
            let mut sum = sum;
            for left in &tree.0[..level] {
                let left: &[f32] = &left.0[row][at..at + 8];
                // SAFETY: 8 floats, at a multiple of 32 bytes from an address aligned to 64.
                sum = _mm256_add_ps(sum, unsafe { _mm256_load_ps(left.as_ptr()) });
            }
            let to: &mut [f32] = &mut tree.0[level].0[row][at..at + 8];
            // SAFETY: as above.
            unsafe { _mm256_store_ps(to.as_mut_ptr(), sum) };
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn bf16<const R: usize>(work: &Work) -> [[__m256; 4]; R] {
    let (weights, values) = (work.block, work.tile.values);
    let steps = weights.len() / STEP;
    assert_eq!(values.len(), steps * R * 4, "activations of a group");
    let high = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
    let mut sums = [[_mm256_setzero_ps(); 4]; R];
    for step in 0..steps {
        for quarter in 0..4 {
            // SAFETY: `step` is below the number of steps of `weights`, a block aligned to 64.
            let w = unsafe {
                _mm256_load_si256(weights.as_ptr().add(step * STEP + quarter * 32).cast())
            };
            let even = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(w));
            let odd = _mm256_castsi256_ps(_mm256_and_si256(w, high));
            for (row, sums) in sums.iter_mut().enumerate() {
                // SAFETY: `values` has R units for each step.
                let x = unsafe { unit(values.as_ptr().add((step * R + row) * 4)) }.cast_unsigned();
                let x = [x << 16, x & 0xffff_0000].map(f32::from_bits);
                let sum = _mm256_fmadd_ps(_mm256_set1_ps(x[0]), even, sums[quarter]);
                sums[quarter] = _mm256_fmadd_ps(_mm256_set1_ps(x[1]), odd, sum);
            }
        }
    }
    sums
}

/// # Safety
/// 4 bytes are at `from`.
#[inline(always)]
unsafe fn unit(from: *const u8) -> i32 {
    // SAFETY: as promised by the caller.
    unsafe { from.cast::<i32>().read_unaligned() }
}

/// Add the products of a step's weights, 4 channels a vector, with R units of activations at `x`.
///
/// # Safety
/// R units are at `x`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn dot<const R: usize>(sums: &mut Pairs<R>, weights: [__m128i; 4], x: *const u8) {
    for (row, sums) in sums.iter_mut().enumerate() {
        // SAFETY: as promised by the caller.
        let x = _mm256_cvtepi8_epi16(_mm_set1_epi32(unsafe { unit(x.add(row * 4)) }));
        for (quarter, sum) in sums.iter_mut().enumerate() {
            let w = _mm256_cvtepu8_epi16(weights[quarter]);
            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(w, x));
        }
    }
}

/// 64 bytes: the weights of 16 channels in a step.
///
/// # Safety
/// They are there, aligned to 64.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load(from: *const u8) -> [__m128i; 4] {
    // SAFETY: as promised by the caller.
    unsafe {
        [
            _mm_load_si128(from.cast()),
            _mm_load_si128(from.add(16).cast()),
            _mm_load_si128(from.add(32).cast()),
            _mm_load_si128(from.add(48).cast()),
        ]
    }
}

/// Both sums of each channel and the row's offset, `zeros` times if there are any, as floats.
#[inline]
#[target_feature(enable = "avx2")]
fn whole<const R: usize>(
    sums: &Pairs<R>,
    offsets: &[i32; R],
    zeros: Option<[__m256i; 2]>,
) -> Halves<R> {
    let mut out = [[_mm256_setzero_ps(); 2]; R];
    for (row, out) in out.iter_mut().enumerate() {
        let sums = &sums[row];
        let offset = _mm256_set1_epi32(offsets[row]);
        for (half, out) in out.iter_mut().enumerate() {
            let mixed = _mm256_hadd_epi32(sums[half * 2], sums[half * 2 + 1]);
            let sum = _mm256_permute4x64_epi64::<0b11_01_10_00>(mixed);
            // A sum of 128 int8 fits in 16 bits; above a zero there are only zeros.
            let offset = zeros.map_or(offset, |zeros| _mm256_madd_epi16(zeros[half], offset));
            *out = _mm256_cvtepi32_ps(_mm256_add_epi32(sum, offset));
        }
    }
    out
}

/// Times the scale of each row's activations.
#[inline]
#[target_feature(enable = "avx2")]
fn scaled<const R: usize>(mut sums: Halves<R>, scales: &[f32]) -> Halves<R> {
    let scales = &scales.as_chunks::<R>().0[0];
    for (row, sums) in sums.iter_mut().enumerate() {
        let scale = _mm256_set1_ps(scales[row]);
        for sum in sums {
            *sum = _mm256_mul_ps(*sum, scale);
        }
    }
    sums
}

#[inline]
#[target_feature(enable = "avx2")]
fn int8<const R: usize>(work: &Work, half: usize) -> Halves<R> {
    let (weights, values) = (&work.block[F32_SCALES..], work.tile.values);
    let steps = weights.len() / STEP;
    assert_eq!(values.len(), steps * R * 4, "activations of a group");
    let mut sums = [[_mm256_setzero_si256(); 4]; R];
    for step in 0..steps {
        // SAFETY: `step` is below the number of steps of `weights`, which begin 128 bytes into a
        // block aligned to 64, and `values` has R units for each.
        unsafe {
            let w = load(weights.as_ptr().add(step * STEP + half * 64));
            dot(&mut sums, w, values.as_ptr().add(step * R * 4));
        }
    }
    let offsets = &work.tile.offsets.as_chunks::<R>().0[0];
    scaled(whole(&sums, offsets, None), work.tile.scales)
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn int4<const R: usize, const ZEROS: bool>(work: &Work, half: usize, span: usize) -> Halves<R> {
    let pairs = span / 8;
    let head = int4_scales(ZEROS);
    let size = head + pairs * STEP;
    let (weights, values) = (work.block, work.tile.values);
    let parts = weights.len() / size;
    let offsets = work.tile.offsets.as_chunks::<R>().0;
    assert_eq!(values.len(), parts * span * R, "activations of a group");
    assert_eq!(offsets.len(), parts, "offsets of a group");
    let low = _mm_set1_epi8(0x0f);
    let zero_bits = _mm256_set1_epi32(ZERO_BITS.cast_signed());
    let mut total = [[_mm256_setzero_ps(); 2]; R];
    for (part, offsets) in offsets.iter().enumerate() {
        let mut sums = [[_mm256_setzero_si256(); 4]; R];
        let mut scales = [_mm256_setzero_ps(); 2];
        let mut zeros = None;
        // SAFETY: `part` is below the number of parts of `weights`, each `head` bytes of scales and
        // `pairs` steps in a block aligned to 64; `values` has 2 R units for each step.
        unsafe {
            let block = weights.as_ptr().add(part * size);
            for step in 0..pairs {
                let w = load(block.add(head + step * STEP + half * 64));
                let x = values.as_ptr().add((part * pairs + step) * 2 * R * 4);
                let mut nibbles = w;
                for w in &mut nibbles {
                    *w = _mm_and_si128(*w, low);
                }
                dot(&mut sums, nibbles, x);
                for (to, w) in nibbles.iter_mut().zip(w) {
                    *to = _mm_and_si128(_mm_srli_epi16::<4>(w), low);
                }
                dot(&mut sums, nibbles, x.add(R * 4));
            }
            if ZEROS {
                let both = [0, 1]
                    .map(|quarter| _mm256_load_si256(block.add(half * 64 + quarter * 32).cast()));
                zeros = Some(both.map(|both| _mm256_and_si256(both, zero_bits)));
                scales = both.map(|both| _mm256_castsi256_ps(_mm256_andnot_si256(zero_bits, both)));
            } else {
                for (quarter, scale) in scales.iter_mut().enumerate() {
                    let bits = _mm_load_si128(block.add(half * 32 + quarter * 16).cast());
                    let bits = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits));
                    *scale = _mm256_castsi256_ps(bits);
                }
            }
        }
        let sums = whole(&sums, offsets, zeros);
        for (row, total) in total.iter_mut().enumerate() {
            for (quarter, total) in total.iter_mut().enumerate() {
                *total = _mm256_fmadd_ps(sums[row][quarter], scales[quarter], *total);
            }
        }
    }
    scaled(total, work.tile.scales)
}
