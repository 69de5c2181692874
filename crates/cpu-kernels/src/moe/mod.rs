//! Which experts each token goes to (Shazeer et al., 2017).

mod experts;
mod used;

use std::ops::Range;

use half::bf16;

use crate::bfloat::widen;
use crate::cpu::Cpu;
use crate::rows::{Rows, RowsMut};
use crate::share;

pub use experts::{Among, Expert, Workspace, mix};
pub use used::Used;

/// Choose each row's `top` most likely experts, best first, the lowest id on ties.
///
/// `logits` [T, experts] -> `weights` and `chosen` [T, top]; weights are softmax's in f32, made to
/// add up to one if `normalise`.
///
/// # Panics
/// If shapes do not fit, or `top` is above the number of experts.
pub fn route(
    cpu: &Cpu,
    logits: Rows<bf16>,
    normalise: bool,
    weights: RowsMut<f32>,
    chosen: RowsMut<u32>,
) {
    let (rows, experts, top) = (logits.rows(), logits.cols(), weights.cols());
    assert_eq!(
        (weights.rows(), chosen.rows(), chosen.cols()),
        (rows, rows, top),
        "shapes"
    );
    assert!(top <= experts, "{top} of {experts} experts");
    share::rows(cpu, rows, experts * (top + 4), |row| {
        // SAFETY: each row is taken once.
        let weights = unsafe { weights.part(row, 0, top) };
        // SAFETY: as above.
        let chosen = unsafe { chosen.part(row, 0, top) };
        choose(logits.row(row), normalise, weights, chosen);
    });
}

fn choose(logits: &[bf16], normalise: bool, weights: &mut [f32], chosen: &mut [u32]) {
    let best = logits
        .iter()
        .copied()
        .map(widen)
        .fold(f32::NEG_INFINITY, f32::max);
    let total: f32 = logits.iter().map(|&x| (widen(x) - best).exp()).sum();
    for (place, weight) in weights.iter_mut().enumerate() {
        let (taken, rest) = chosen.split_at_mut(place);
        let mut found: Option<(u32, f32)> = None;
        for (id, &x) in (0..).zip(logits) {
            if !taken.contains(&id) && found.is_none_or(|(_, most)| widen(x) > most) {
                found = Some((id, widen(x)));
            }
        }
        let (id, logit) = found.unwrap_or_default();
        rest[0] = id;
        *weight = (logit - best).exp() / total;
    }
    if normalise {
        let sum: f32 = weights.iter().sum();
        weights.iter_mut().for_each(|weight| *weight /= sum);
    }
}

/// A step's (token, choice) pairs in the order of their experts.
///
/// ```text
/// pairs    token * top + choice, those of expert 0 first, a token before later ones
/// starts   expert e's pairs are pairs[starts[e] .. starts[e + 1]]
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Groups {
    pub pairs: Vec<u32>,
    pub starts: Vec<u32>,
}

impl Groups {
    /// Group `chosen` [T, top]; what `self` held is replaced, its memory is used again.
    ///
    /// # Panics
    /// If an expert is not below `experts`, or there are 2^32 pairs.
    pub fn regroup(&mut self, chosen: &[u32], experts: usize) {
        assert!(
            u32::try_from(chosen.len()).is_ok(),
            "{} pairs",
            chosen.len()
        );
        self.starts.clear();
        self.starts.resize(experts + 1, 0);
        for &expert in chosen {
            assert!((expert as usize) < experts, "expert {expert} of {experts}");
            self.starts[expert as usize + 1] += 1;
        }
        for expert in 0..experts {
            self.starts[expert + 1] += self.starts[expert];
        }
        self.pairs.clear();
        self.pairs.resize(chosen.len(), 0);
        // Each start moves up to its expert's end while placing, which is the next one's start.
        for (pair, &expert) in (0..).zip(chosen) {
            let place = &mut self.starts[expert as usize];
            self.pairs[*place as usize] = pair;
            *place += 1;
        }
        self.starts.rotate_right(1);
        self.starts[0] = 0;
    }

    /// Where an expert's pairs are.
    ///
    /// # Panics
    /// If there is no such expert.
    #[must_use]
    pub fn of(&self, expert: usize) -> Range<usize> {
        self.starts[expert] as usize..self.starts[expert + 1] as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_gets_its_most_likely_experts_best_first_and_the_lowest_id_on_ties() {
        let cpu = Cpu::new(2, 0).unwrap();
        let rows = [
            [0.0, 2.0, 1.0, 2.0],
            [3.0, 3.0, 3.0, 3.0],
            [-90.0, 90.0, -90.0, 0.0],
        ];
        let logits = rows.concat();
        let logits: Vec<bf16> = logits.into_iter().map(bf16::from_f32).collect();
        for normalise in [false, true] {
            let (mut weights, mut chosen) = (vec![0.0; 6], vec![9; 6]);
            route(
                &cpu,
                Rows::of(&logits, 4),
                normalise,
                RowsMut::of(&mut weights, 2),
                RowsMut::of(&mut chosen, 2),
            );
            assert_eq!(chosen, [1, 3, 0, 1, 1, 3]);
            for ((row, weights), chosen) in rows.iter().zip(weights.chunks(2)).zip(chosen.chunks(2))
            {
                let power = |id: &u32| f64::from(row[*id as usize]).exp();
                let total: f64 = if normalise {
                    chosen.iter().map(power).sum()
                } else {
                    (0..4).map(|id| power(&id)).sum()
                };
                for (weight, id) in weights.iter().zip(chosen) {
                    assert!((f64::from(*weight) - power(id) / total).abs() < 1e-6);
                }
            }
        }
    }

    #[test]
    fn pairs_are_grouped_by_expert_in_their_order() {
        let mut groups = Groups::default();
        groups.regroup(&[2, 0, 2, 3, 0, 2], 5);
        assert_eq!(groups.pairs, [1, 4, 0, 2, 5, 3]);
        let of: Vec<_> = (0..5).map(|expert| groups.of(expert)).collect();
        assert_eq!(of, [0..2, 2..2, 2..5, 5..6, 6..6]);
        groups.regroup(&[], 2);
        assert_eq!((groups.pairs.len(), groups.of(1)), (0, 0..0));
    }
}
