//! Rotary position embedding (Su et al., 2021), in the half-split form of checkpoints.
//!
//! ```text
//! head   [ x_0 ... x_{r/2-1} | x_{r/2} ... x_{r-1} | rest ]
//! pair   (x_i, x_{i+r/2}) is turned by the angle position * frequency_i; rest is left alone
//! ```

use half::bf16;

use crate::bfloat::{round, widen};
use crate::cpu::Cpu;
use crate::rows::RowsMut;
use crate::share;

/// cos and sin of every pair's angle, times `factor`: [T], [r / 2] -> f32 [T, r], cos then sin.
///
/// # Panics
/// If shapes do not fit.
pub fn angles(cpu: &Cpu, positions: &[i64], frequencies: &[f32], factor: f32, out: RowsMut<f32>) {
    let pairs = frequencies.len();
    assert_eq!(
        (out.rows(), out.cols()),
        (positions.len(), 2 * pairs),
        "out's shape"
    );
    // A sine takes as long as some 20 simple operations.
    share::rows(cpu, positions.len(), 40 * pairs, |row| {
        // SAFETY: each row is taken once.
        let (cos, sin) = unsafe { out.part(row, 0, 2 * pairs) }.split_at_mut(pairs);
        for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(frequencies) {
            let angle = positions[row] as f32 * frequency;
            *cos = angle.cos() * factor;
            *sin = angle.sin() * factor;
        }
    });
}

/// Turn a head [d] by its position's `angles` [r], r <= d.
#[inline(always)]
pub(crate) fn turn(head: &mut [bf16], angles: &[f32]) {
    let half = angles.len() / 2;
    let (cos, sin) = angles.split_at(half);
    let (first, second) = head[..2 * half].split_at_mut(half);
    for (((first, second), &cos), &sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        let (a, b) = (widen(*first), widen(*second));
        *first = round(a * cos - b * sin);
        *second = round(b * cos + a * sin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn angles_are_those_of_position_times_frequency() {
        let cpu = Cpu::new(2, 0).unwrap();
        let positions = [0, 1, 77, 40_000];
        let frequencies = [1.0, 0.25, 0.001];
        let mut out = vec![f32::NAN; 24];
        angles(
            &cpu,
            &positions,
            &frequencies,
            1.5,
            RowsMut::of(&mut out, 6),
        );
        for (row, position) in out.chunks(6).zip(positions) {
            for (pair, frequency) in frequencies.iter().enumerate() {
                let angle = f64::from(position as f32 * frequency);
                assert!((f64::from(row[pair]) - 1.5 * angle.cos()).abs() < 1e-6);
                assert!((f64::from(row[3 + pair]) - 1.5 * angle.sin()).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn turning_keeps_lengths_and_leaves_the_rest_alone() {
        let before: Vec<bf16> = (0..10).map(|i| bf16::from_f32(i as f32 - 4.0)).collect();
        let mut head = before.clone();
        let angle = 0.7_f32;
        let turned = [[angle.cos(); 3], [angle.sin(); 3]].concat();
        turn(&mut head, &turned);
        for i in 0..3 {
            let (a, b) = (before[i].to_f32(), before[i + 3].to_f32());
            let first = bf16::from_f32(a * angle.cos() - b * angle.sin());
            let second = bf16::from_f32(b * angle.cos() + a * angle.sin());
            assert_eq!((head[i], head[i + 3]), (first, second));
        }
        assert_eq!(head[6..], before[6..]);
    }
}
