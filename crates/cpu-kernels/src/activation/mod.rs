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
