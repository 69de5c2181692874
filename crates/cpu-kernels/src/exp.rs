//! The exponential, in a form that vectorises.

use std::f32::consts::{LN_2, LOG2_E};

/// ln 2 in two parts: the first has so few bits that its products with whole numbers are exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// Adding it leaves a number rounded to a whole one in the lowest bits.
const WHOLE: f32 = 12_582_912.0;
/// Below it the result is rounded to zero (no denormal numbers), above it to infinity.
const LEAST: f32 = -87.336_54;
const MOST: f32 = 88.722_83;

/// e^x, within 2 units in the last place; 0 where the result were denormal.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let clamped = x.clamp(LEAST, MOST);
    let shifted = clamped * LOG2_E + WHOLE;
    let whole = shifted - WHOLE;
    let rest = clamped - whole * LN_2_HIGH - whole * LN_2_LOW;
    let mut sum = 1.987_569_1e-4;
    for coefficient in [
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        0.166_666_65,
        0.5,
    ] {
        sum = sum * rest + coefficient;
    }
    let sum = sum * (rest * rest) + rest + 1.0;
    // 2^whole in two factors, as 2^128 alone is not a number of this type.
    let power = (shifted.to_bits() as i32) - (WHOLE.to_bits() as i32);
    let half = power >> 1;
    let scale = |power: i32| f32::from_bits(((power + 127) as u32) << 23);
    let result = sum * scale(half) * scale(power - half);
    let result = if x < LEAST { 0.0 } else { result };
    let result = if x > MOST { f32::INFINITY } else { result };
    if x.is_nan() { x } else { result }
}

/// Of the polynomial in r that is close to 2^r for r from -1/2 to 1/2, r^6 first.
pub(crate) const fn exp2_coefficients() -> [f32; 7] {
    [
        1.535_336_2e-4,
        1.339_887_5e-3,
        9.618_438e-3,
        5.550_332_5e-2,
        0.240_226_48,
        LN_2,
        1.0,
    ]
}

/// 2^x for x at most 0; 0 where the result were denormal.
#[inline(always)]
pub(crate) fn exp2(x: f32) -> f32 {
    let clamped = x.max(-126.0);
    let shifted = clamped + WHOLE;
    let rest = clamped - (shifted - WHOLE);
    let mut sum = 0.0;
    for coefficient in exp2_coefficients() {
        sum = sum * rest + coefficient;
    }
    let power = (shifted.to_bits() as i32) - (WHOLE.to_bits() as i32);
    let result = sum * f32::from_bits(((power + 127) as u32) << 23);
    let result = if x < -126.0 { 0.0 } else { result };
    if x.is_nan() { x } else { result }
}

/// tanh(x), within 3e-7.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (exp(2.0 * x) + 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst = 0.0_f64;
        for step in -870_000..=887_000 {
            let x = step as f32 * 1e-4;
            let right = f64::from(x).exp();
            let unit = f64::from(f32::EPSILON) * 2_f64.powi(right.log2().floor() as i32);
            worst = worst.max((f64::from(exp(x)) - right).abs() / unit);
        }
        assert!(worst <= 2.0, "{worst} units");
    }

    #[test]
    fn exp2_is_within_two_units_in_the_last_place() {
        let mut worst = 0.0_f64;
        for step in -1_260_000..=0 {
            let x = step as f32 * 1e-4;
            let right = f64::from(x).exp2();
            worst = worst.max((f64::from(exp2(x)) / right - 1.0).abs());
        }
        assert!(worst <= 2.0 * f64::from(f32::EPSILON), "{worst:e}");
        assert_eq!(
            (exp2(0.0), exp2(-1000.0), exp2(f32::NEG_INFINITY)),
            (1.0, 0.0, 0.0)
        );
        assert!(exp2(f32::NAN).is_nan());
    }

    #[test]
    fn exp_of_extremes() {
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1000.0), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(89.0), f32::INFINITY);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn tanh_is_close_everywhere() {
        for step in -2000..=2000 {
            let x = step as f32 * 0.01;
            assert!((tanh(x) - x.tanh()).abs() <= 3e-7, "{x}");
        }
        assert_eq!((tanh(f32::INFINITY), tanh(f32::NEG_INFINITY)), (1.0, -1.0));
    }
}
