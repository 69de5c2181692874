//! Sums, and the silu of gated linears (the SwiGLU of Shazeer, 2020).

use half::bf16;

use crate::bfloat::{round, widen};
use crate::cpu::Cpu;
use crate::exp::exp;
use crate::rows::{Rows, RowsMut};
use crate::share;
use crate::vectorise::vectorised;

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

/// x / (1 + e^-x), which the epilogue of a gated linear applies.
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
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
    fn silu_keeps_what_is_not_finite_so() {
        assert_eq!(silu(0.0), 0.0);
        assert_eq!(silu(f32::INFINITY), f32::INFINITY);
        assert!(!silu(f32::NEG_INFINITY).is_finite());
        assert!(silu(f32::NAN).is_nan());
        assert_eq!(silu(200.0), 200.0);
        assert!(silu(-200.0).abs() < 1e-30);
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
