//! RMSNorm (Zhang and Sennrich, 2019).

use half::bf16;

use crate::bfloat::{round, rounded, widen};
use crate::cpu::Cpu;
use crate::rows::{Rows, RowsMut};
use crate::share;
use crate::vectorise::vectorised;

/// Sums kept side by side, added in one order at the end whatever the level.
const LANES: usize = 16;

/// What a norm does to rows of d numbers.
#[derive(Clone, Copy)]
pub struct RmsNorm<'a> {
    /// [d]
    pub weight: &'a [bf16],
    pub eps: f32,
}

/// `out = x / sqrt(mean(x^2) + eps) * weight`: [T, d] -> [T, d].
///
/// The mean is taken in f32, and a row is rounded to bf16 before the weight is applied.
///
/// # Panics
/// If shapes do not fit.
pub fn rms_norm(cpu: &Cpu, x: Rows<bf16>, norm: RmsNorm, out: RowsMut<bf16>) {
    assert_eq!(
        (x.rows(), x.cols()),
        (out.rows(), out.cols()),
        "out's shape"
    );
    assert_eq!(x.cols(), norm.weight.len(), "weight's length");
    share::rows(cpu, x.rows(), x.cols(), |row| {
        // SAFETY: each row is taken once.
        let out = unsafe { out.part(row, 0, x.cols()) };
        row_of(cpu.level, x.row(row), norm, out);
    });
}

vectorised! {
    fn row_of(x: &[bf16], norm: RmsNorm, out: &mut [bf16]) {
        normalise(x, norm, out);
    }
}

/// As `rms_norm`, of one row.
#[inline(always)]
pub(crate) fn normalise(x: &[bf16], norm: RmsNorm, out: &mut [bf16]) {
    let scale = inverse_rms(x, norm.eps);
    for ((out, &x), &weight) in out.iter_mut().zip(x).zip(norm.weight) {
        *out = round(rounded(widen(x) * scale) * widen(weight));
    }
}

/// As `normalise`, where the row is.
#[inline(always)]
pub(crate) fn normalise_in_place(x: &mut [bf16], weight: &[bf16], eps: f32) {
    let scale = inverse_rms(x, eps);
    for (x, &weight) in x.iter_mut().zip(weight) {
        *x = round(rounded(widen(*x) * scale) * widen(weight));
    }
}

/// 1 / sqrt(mean(x^2) + eps).
#[inline(always)]
fn inverse_rms(x: &[bf16], eps: f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for chunk in whole {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += widen(x) * widen(x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += widen(x) * widen(x);
    }
    let sum: f32 = lanes.iter().sum();
    1.0 / (sum / x.len() as f32 + eps).sqrt()
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;
    use crate::level::Level;

    fn numbers(random: &mut StdRng, count: usize, size: f32) -> Vec<bf16> {
        (0..count)
            .map(|_| bf16::from_f32(random.random_range(-size..size)))
            .collect()
    }

    #[test]
    fn rows_are_close_to_the_reference_and_the_same_bits_alone_and_at_every_level() {
        let mut random = StdRng::seed_from_u64(1);
        for (rows, cols, size) in [(0, 8, 1.0), (1, 1, 1.0), (3, 19, 1e-3), (70, 1024, 1e4)] {
            let x = numbers(&mut random, rows * cols, size);
            let weight = numbers(&mut random, cols, 2.0);
            let mut all = Vec::new();
            for level in Level::available() {
                let cpu = Cpu::at_level(level, 2, 0).unwrap();
                let mut out = vec![bf16::NAN; rows * cols];
                let norm = RmsNorm {
                    weight: &weight,
                    eps: 1e-6,
                };
                rms_norm(&cpu, Rows::of(&x, cols), norm, RowsMut::of(&mut out, cols));
                for (x, found) in x.chunks(cols).zip(out.chunks(cols)) {
                    let squares: f64 = x.iter().map(|x| x.to_f64().powi(2)).sum();
                    let scale = 1.0 / (squares / cols as f64 + 1e-6).sqrt();
                    for ((x, weight), found) in x.iter().zip(&weight).zip(found) {
                        let right = x.to_f64() * scale * weight.to_f64();
                        assert!((found.to_f64() - right).abs() <= right.abs() / 120.0);
                    }
                    let mut alone = vec![bf16::NAN; cols];
                    let out = RowsMut::of(&mut alone, cols);
                    rms_norm(&cpu, Rows::of(x, cols), norm, out);
                    assert_eq!(alone, found);
                }
                all.push(out);
            }
            assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
        }
    }
}
