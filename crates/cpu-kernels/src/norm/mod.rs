//! RMSNorm (Zhang and Sennrich, 2019), alone and with the residual stream's addition.

use half::bf16;

use crate::bfloat::{round, rounded, widen};
use crate::cpu::Cpu;
use crate::rows::{Rows, RowsMut};
use crate::share;
use crate::vectorise::vectorised;

/// Sums kept side by side, added in one order at the end whatever the level.
const LANES: usize = 16;

/// `out = x / sqrt(mean(x^2) + eps) * weight`: [T, d], [d] -> [T, d].
///
/// The mean is taken in f32, and a row is rounded to bf16 before the weight is applied.
///
/// # Panics
/// If shapes do not fit.
pub fn rms_norm(cpu: &Cpu, x: Rows<bf16>, weight: &[bf16], eps: f32, out: RowsMut<bf16>) {
    assert_eq!(
        (x.rows(), x.cols()),
        (out.rows(), out.cols()),
        "out's shape"
    );
    assert_eq!(x.cols(), weight.len(), "weight's length");
    share::rows(cpu, x.rows(), x.cols(), |row| {
        // SAFETY: each row is taken once.
        let out = unsafe { out.part(row, 0, x.cols()) };
        normalise(cpu.level, x.row(row), weight, eps, out);
    });
}

/// `residual += x`, rounded to bf16, then `out` as of `rms_norm(residual)`: all [T, d].
///
/// # Panics
/// If shapes do not fit.
pub fn add_rms_norm(
    cpu: &Cpu,
    x: Rows<bf16>,
    residual: RowsMut<bf16>,
    weight: &[bf16],
    eps: f32,
    out: RowsMut<bf16>,
) {
    let shape = (x.rows(), x.cols());
    assert_eq!(
        shape,
        (residual.rows(), residual.cols()),
        "residual's shape"
    );
    assert_eq!(shape, (out.rows(), out.cols()), "out's shape");
    assert_eq!(x.cols(), weight.len(), "weight's length");
    share::rows(cpu, x.rows(), 2 * x.cols(), |row| {
        // SAFETY: each row is taken once.
        let residual = unsafe { residual.part(row, 0, x.cols()) };
        // SAFETY: as above.
        let out = unsafe { out.part(row, 0, x.cols()) };
        accumulate(cpu.level, x.row(row), residual);
        normalise(cpu.level, residual, weight, eps, out);
    });
}

vectorised! {
    fn accumulate(x: &[bf16], sum: &mut [bf16]) {
        for (sum, &x) in sum.iter_mut().zip(x) {
            *sum = round(widen(*sum) + widen(x));
        }
    }
}

vectorised! {
    fn normalise(x: &[bf16], weight: &[bf16], eps: f32, out: &mut [bf16]) {
        let scale = inverse_rms(x, eps);
        for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
            *out = round(rounded(widen(x) * scale) * widen(weight));
        }
    }
}

/// As `rms_norm`, of one row.
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
