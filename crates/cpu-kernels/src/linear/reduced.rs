//! Row-parallel products: each rank multiplies with some of the groups along k.
//!
//! ```text
//! rank 0                rank 1
//! g0+g1  +  g2+g3       g4+g5  +  g6+g7     partial: f32, without scales and bias
//!        \_________   _________/
//!                  \ /
//!                   +                       finish: the top of the same tree, then as one rank
//! ```
//!
//! A power of two of ranks has a whole subtree each, so that a row's bits are those of one rank.

use std::time::Instant;

use half::bf16;

use super::epilogue::{Finish, Output};
use super::layout::{CHANNELS, Packed};
use super::product;
use crate::cpu::Cpu;
use crate::ranks::{MOST, RankLost, Ranks};
use crate::rows::{Rows, RowsMut};
use crate::share;
use crate::vectorise::vectorised;

/// As `linear`, of which each rank computes the groups of `weight`; all get the whole of `out`,
/// which is bf16, with a residual or without.
///
/// # Errors
/// If a rank has ended.
///
/// # Panics
/// If a size does not fit, the weight is gated, or a slot of the ranks is too small.
pub fn reduced(
    cpu: &mut Cpu,
    ranks: &mut Ranks,
    x: Rows<bf16>,
    weight: &Packed,
    bias: Option<&[bf16]>,
    out: Output,
) -> Result<(), RankLost> {
    let (rows, columns) = (x.rows(), weight.layout().columns());
    partial(cpu, x, weight, &ranks.mine(rows, columns));
    ranks.meet()?;
    let began = Instant::now();
    finish(cpu, weight, bias, &ranks.parts(rows, columns), out);
    ranks.count_time(began);
    Ok(())
}

/// The sum of a weight's groups, [rows, n].
///
/// # Panics
/// If a size does not fit, or the weight is gated.
pub(crate) fn partial(cpu: &mut Cpu, x: Rows<bf16>, weight: &Packed, out: &RowsMut<f32>) {
    let columns = weight.layout().columns();
    assert!(!weight.layout().gated(), "a gated weight is no row's");
    assert_eq!((out.rows(), out.cols()), (x.rows(), columns), "out's shape");
    product(cpu, x, weight, |panel, _, first, rows, sums| {
        let column = panel * CHANNELS;
        let count = CHANNELS.min(columns - column);
        for (row, sums) in (first..).zip(&sums.0[..rows]) {
            // SAFETY: `product` hands every panel and tile of rows out once.
            unsafe { out.part(row, column, count) }.copy_from_slice(&sums[..count]);
        }
    });
}

/// Add the ranks' partial sums up; the channels' scales are those of `weight`, any rank's part.
///
/// # Panics
/// If a size does not fit.
pub(crate) fn finish(
    cpu: &Cpu,
    weight: &Packed,
    bias: Option<&[bf16]>,
    parts: &[Rows<f32>],
    out: Output,
) {
    let (rows, columns) = out.shape();
    assert!(
        parts.len().is_power_of_two() && parts.len() <= MOST,
        "ranks"
    );
    let finish = Finish::new(weight, rows, bias, out);
    share::rows(cpu, rows, columns * parts.len(), |row| {
        finish_row(cpu.level, &finish, parts, row, columns);
    });
}

vectorised! {
    fn finish_row(finish: &Finish, parts: &[Rows<f32>], row: usize, columns: usize) {
        for panel in 0..columns.div_ceil(CHANNELS) {
            let column = panel * CHANNELS;
            let count = CHANNELS.min(columns - column);
            let mut sums = [[0.0_f32; CHANNELS]; MOST];
            for (sums, part) in sums.iter_mut().zip(parts) {
                sums[..count].copy_from_slice(&part.row(row)[column..column + count]);
            }
            let mut left = parts.len();
            while left > 1 {
                left /= 2;
                for index in 0..left {
                    let right = sums[2 * index + 1];
                    let mut sum = sums[2 * index];
                    for (sum, right) in sum.iter_mut().zip(right) {
                        *sum += right;
                    }
                    sums[index] = sum;
                }
            }
            // SAFETY: each row is one task's.
            unsafe { finish.store(panel, row, &sums[..1]) }
        }
    }
}
