//! bf16 to f32 and back, without branches, so that loops over them vectorise.

use half::bf16;

/// 1.5 * 2^23: a float added to this is rounded to an integer, ties to even, in its low bits.
pub(crate) const ROUND: f32 = 12_582_912.0;

#[inline(always)]
pub(crate) fn widen(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// To the nearest, ties to even; NaN stays NaN.
#[inline(always)]
pub(crate) fn round(x: f32) -> bf16 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    let chosen = if x.is_nan() { quiet } else { nearest };
    bf16::from_bits(chosen as u16)
}

/// The value after rounding to bf16.
#[inline(always)]
pub(crate) fn rounded(x: f32) -> f32 {
    widen(round(x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_and_widening_agree_with_the_library() {
        let mut bits = 0_u32;
        loop {
            let x = f32::from_bits(bits);
            assert_eq!(round(x).is_nan(), x.is_nan());
            if !x.is_nan() {
                assert_eq!(round(x), bf16::from_f32(x), "{x:e}");
                assert_eq!(widen(round(x)), round(x).to_f32());
            }
            let Some(next) = bits.checked_add(9973) else {
                return;
            };
            bits = next;
        }
    }
}
