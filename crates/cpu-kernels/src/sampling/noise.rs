//! Counter-based noise: a pure function of a row's key and a counter.
//!
//! The bits are splitmix64's (Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
//! 2014): its finaliser over a Weyl sequence that starts at a hash of the row's key.

use std::f64::consts::LN_2;

const WEYL: u64 = 0x9e37_79b9_7f4a_7c15;

/// Start of a row's sequence, from its request's seed, which of its choices it is, and how many
/// tokens came before.
#[must_use]
pub fn row_key(seed: u64, choice: u64, index: u64) -> u64 {
    let key = finalise(seed.wrapping_add(WEYL));
    let key = finalise(key ^ choice.wrapping_mul(WEYL));
    finalise(key.wrapping_add(index.wrapping_add(1).wrapping_mul(WEYL)))
}

#[inline(always)]
fn finalise(bits: u64) -> u64 {
    let bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// What Gumbel noise is made of, 52 bits: larger ones give larger noise.
#[inline(always)]
pub(super) fn bits(key: u64, counter: u64) -> u64 {
    finalise(key.wrapping_add(counter.wrapping_add(1).wrapping_mul(WEYL))) >> 12
}

/// Standard Gumbel noise.
pub(super) fn gumbel(bits: u64) -> f64 {
    // 52 bits and a half: never 0 or 1, and exact.
    let uniform = (bits as f64 + 0.5) * 2_f64.powi(-52);
    -(-uniform.ln()).ln()
}

/// No less than `gumbel(bits)`, at the price of a count of bits: -ln(u) >= 1 - u, and 1 - u is at
/// least the power of two below it.
#[inline(always)]
pub(super) fn gumbel_at_most(bits: u64) -> f64 {
    let ones = (!(bits << 12)).leading_zeros().min(52);
    f64::from(ones + 1) * LN_2 + 1e-9
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY_OF_ZEROS: u64 = 0x568a_9b0b_1a2c_05ec;
    const KEY_OF_OTHERS: u64 = 0xe374_6454_77cf_1e92;
    const NOISE: f64 = -1.950_668_721_017_438_3;
    const NOISE_OF_TOKEN: f64 = -0.233_574_419_655_678_13;

    #[test]
    fn the_bound_holds_and_is_close_for_large_noise() {
        for counter in 0..100_000 {
            let bits = bits(7, counter);
            let (noise, bound) = (gumbel(bits), gumbel_at_most(bits));
            assert!(noise <= bound, "{noise} {bound}");
            assert!(noise < 3.0 || bound < noise + 0.8, "{noise} {bound}");
        }
        for bits in [0, 1, (1 << 52) - 1, (1 << 52) - 2, 1 << 51] {
            assert!(gumbel(bits) <= gumbel_at_most(bits));
        }
    }

    #[test]
    fn keys_and_noise_are_those_of_the_python_engine() {
        assert_eq!(row_key(0, 0, 0), KEY_OF_ZEROS);
        assert_eq!(row_key(u64::MAX, 3, 17), KEY_OF_OTHERS);
        assert!((gumbel(bits(KEY_OF_OTHERS, 5)) - NOISE).abs() < 1e-12);
        assert!((gumbel(bits(KEY_OF_OTHERS, (1 << 40) + 9)) - NOISE_OF_TOKEN).abs() < 1e-12);
    }
}
