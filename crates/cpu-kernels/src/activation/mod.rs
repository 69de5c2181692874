//! What happens between two linears: silu(gate) * up (the SwiGLU of Shazeer, 2020), and sums.

use half::bf16;

use crate::bfloat::{round, rounded, widen};
use crate::cpu::Cpu;
use crate::exp::exp;
use crate::rows::{Rows, RowsMut};
use crate::share;
use crate::vectorise::vectorised;

/// silu of the first half of each row times its second half: [T, 2n] -> [T, n].
///
/// # Panics
/// If shapes do not fit.
pub fn silu_and_mul(cpu: &Cpu, gate_up: Rows<bf16>, out: RowsMut<bf16>) {
    let n = out.cols();
    assert_eq!(
        (gate_up.rows(), gate_up.cols()),
        (out.rows(), 2 * n),
        "shapes"
    );
    share::rows(cpu, out.rows(), 4 * n, |row| {
        let (gate, up) = gate_up.row(row).split_at(n);
        // SAFETY: each row is taken once.
        silu_times(cpu.level, gate, up, unsafe { out.part(row, 0, n) });
    });
}

/// `out = a + b`, rounded to bf16: all [T, d].
///
/// # Panics
/// If shapes do not fit.
pub fn add(cpu: &Cpu, a: Rows<bf16>, b: Rows<bf16>, out: RowsMut<bf16>) {
    let shape = (out.rows(), out.cols());
    assert_eq!(shape, (a.rows(), a.cols()), "shapes");
    assert_eq!(shape, (b.rows(), b.cols()), "shapes");
    share::rows(cpu, shape.0, shape.1, |row| {
        // SAFETY: each row is taken once.
        sum(cpu.level, a.row(row), b.row(row), unsafe {
            out.part(row, 0, shape.1)
        });
    });
}

/// x / (1 + e^-x).
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

vectorised! {
    fn silu_times(gate: &[bf16], up: &[bf16], out: &mut [bf16]) {
        for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
            *out = round(rounded(silu(widen(gate))) * widen(up));
        }
    }
}

vectorised! {
    fn sum(a: &[bf16], b: &[bf16], out: &mut [bf16]) {
        for ((out, &a), &b) in out.iter_mut().zip(a).zip(b) {
            *out = round(widen(a) + widen(b));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::level::Level;

    #[test]
    fn silu_and_mul_is_close_to_the_reference_from_one_extreme_to_the_other() {
        let n = 1201;
        let gate = (0..n).map(|i| bf16::from_f32((i as f32 - 600.0) / 3.0));
        let row: Vec<bf16> = gate
            .chain((0..n).map(|i| bf16::from_f32(i as f32 / 9.0)))
            .collect();
        let rows = row.repeat(5);
        let mut all = Vec::new();
        for level in Level::available() {
            let cpu = Cpu::at_level(level, 2, 0).unwrap();
            let mut out = vec![bf16::NAN; 5 * n];
            silu_and_mul(&cpu, Rows::of(&rows, 2 * n), RowsMut::of(&mut out, n));
            for (i, found) in out.iter().enumerate() {
                let (gate, up) = (row[i % n].to_f64(), row[n + i % n].to_f64());
                let right = gate / (1.0 + (-gate).exp()) * up;
                let error = (found.to_f64() - right).abs();
                assert!(error <= right.abs() / 120.0 + 1e-30, "{gate} {up}: {found}");
            }
            all.push(out);
        }
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
    }

    #[test]
    fn sums_are_rounded_once() {
        let a: Vec<bf16> = (0..77).map(|i| bf16::from_f32(i as f32 * 0.37)).collect();
        let b: Vec<bf16> = (0..77).map(|i| bf16::from_f32(1000.0 - i as f32)).collect();
        for level in Level::available() {
            let cpu = Cpu::at_level(level, 1, 0).unwrap();
            let mut out = vec![bf16::NAN; 77];
            add(
                &cpu,
                Rows::of(&a, 11),
                Rows::of(&b, 11),
                RowsMut::of(&mut out, 11),
            );
            for ((out, a), b) in out.iter().zip(&a).zip(&b) {
                assert_eq!(*out, bf16::from_f32(a.to_f32() + b.to_f32()));
            }
        }
    }
}
