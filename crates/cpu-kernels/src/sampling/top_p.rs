//! Which ids top_k and top_p keep.

use super::draw::Scaled;
use super::peak::at_least;

/// The last id that is kept, by falling score and, on ties, rising id.
#[derive(Clone, Copy)]
pub(super) struct Kept(u64);

impl Kept {
    pub(super) const ALL: Self = Self(u64::MAX);

    #[inline(always)]
    pub(super) fn has(self, id: usize, scaled: f32) -> bool {
        candidate(id, scaled) <= self.0
    }

    /// Those before `id`, which is not the first.
    pub(super) fn before(id: usize, scaled: f32) -> Self {
        Self(candidate(id, scaled) - 1)
    }

    /// Those that score at least `from`, in `candidates`.
    pub(super) fn gather<'a>(
        scores: &[f32],
        peaks: &[f32],
        scaled: Scaled,
        from: f32,
        candidates: &'a mut [u64],
    ) -> Candidates<'a> {
        let mut found = 0;
        at_least(scores, peaks, from, |id, score| {
            candidates[found] = candidate(id, scaled.of(score));
            found += 1;
        });
        Candidates(&mut candidates[..found])
    }

    /// As `gather`, of ids and scores.
    pub(super) fn among<'a>(
        scores: &[(f32, u32)],
        scaled: Scaled,
        candidates: &'a mut [u64],
    ) -> Candidates<'a> {
        for (into, &(score, id)) in candidates.iter_mut().zip(scores) {
            *into = candidate(id as usize, scaled.of(score));
        }
        Candidates(&mut candidates[..scores.len()])
    }
}

/// A candidate in one number: ascending numbers are descending scores, and ascending ids on ties.
#[inline(always)]
fn candidate(id: usize, scaled: f32) -> u64 {
    u64::from(scaled.abs().to_bits()) << 32 | id as u64
}

/// e^scaled.
fn mass(candidate: u64) -> f64 {
    (-f64::from(f32::from_bits((candidate >> 32) as u32))).exp()
}

/// Ids in no order.
pub(super) struct Candidates<'a>(&'a mut [u64]);

impl Candidates<'_> {
    /// Of the k best, and ties with the last, the fewest that reach `share` of their mass: what
    /// else is among the candidates makes no difference.
    pub(super) fn top(self, k: usize, share: f64) -> Kept {
        let kept = keep_top_k(self.0, k);
        if share >= 1.0 {
            return Kept(kept.iter().copied().max().unwrap_or(0));
        }
        kept.sort_unstable();
        let wanted = share * kept.iter().copied().map(mass).sum::<f64>();
        let mut before = 0.0;
        let is_kept = |&candidate: &u64| {
            let kept = before < wanted;
            before += mass(candidate);
            kept
        };
        let count = kept.iter().copied().take_while(is_kept).count();
        Kept(kept.get(count.max(1) - 1).copied().unwrap_or(0))
    }
}

/// Those that score no less than the k-th best.
fn keep_top_k(candidates: &mut [u64], k: usize) -> &mut [u64] {
    if k >= candidates.len() {
        return candidates;
    }
    let (_, last, after) = candidates.select_nth_unstable(k - 1);
    let score = *last >> 32;
    let mut kept = k;
    for index in 0..after.len() {
        if candidates[k + index] >> 32 == score {
            candidates.swap(kept, k + index);
            kept += 1;
        }
    }
    &mut candidates[..kept]
}
