//! Which ids top_k and top_p keep.

use super::draw::Scaled;
use super::peak::at_least;

/// Which ids are kept.
#[derive(Clone, Copy)]
pub(super) struct Kept {
    /// The last, by falling scaled score and, on ties, rising id.
    last: u64,
    /// What scores less is not: scaled, it may equal the last all the same.
    least: f32,
}

impl Kept {
    pub(super) const ALL: Self = Self {
        last: u64::MAX,
        least: f32::NEG_INFINITY,
    };

    #[inline(always)]
    pub(super) fn has(self, id: usize, score: f32, scaled: f32) -> bool {
        candidate(id, scaled) <= self.last && score >= self.least
    }

    /// Those before `id`, which is not the first.
    pub(super) fn before(id: usize, scaled: f32) -> Self {
        Self {
            last: candidate(id, scaled) - 1,
            ..Self::ALL
        }
    }

    /// Those that score at least `from`, in `candidates`.
    pub(super) fn gather<'a>(
        scores: &[f32],
        peaks: &[f32],
        from: f32,
        candidates: &'a mut [u64],
    ) -> Candidates<'a> {
        let mut found = 0;
        at_least(scores, peaks, from, |id, score| {
            candidates[found] = ranked(id, score);
            found += 1;
        });
        Candidates(&mut candidates[..found])
    }

    /// As `gather`, of ids and scores.
    pub(super) fn among<'a>(scores: &[(f32, u32)], candidates: &'a mut [u64]) -> Candidates<'a> {
        for (into, &(score, id)) in candidates.iter_mut().zip(scores) {
            *into = ranked(id as usize, score);
        }
        Candidates(&mut candidates[..scores.len()])
    }
}

/// A candidate in one number: ascending numbers are descending scores, and ascending ids on ties.
#[inline(always)]
fn candidate(id: usize, scaled: f32) -> u64 {
    u64::from(scaled.abs().to_bits()) << 32 | id as u64
}

/// The same of a score that is not scaled, which may be of either sign.
#[inline(always)]
fn ranked(id: usize, score: f32) -> u64 {
    let bits = (score + 0.0).to_bits(); // zeros are equal
    let rising = bits ^ if bits >> 31 == 1 { u32::MAX } else { 1 << 31 };
    u64::from(!rising) << 32 | id as u64
}

/// The score that `ranked` was given.
fn score_of(ranked: u64) -> f32 {
    let rising = !((ranked >> 32) as u32);
    f32::from_bits(rising ^ if rising >> 31 == 1 { 1 << 31 } else { u32::MAX })
}

/// e^scaled.
fn mass(candidate: u64) -> f64 {
    (-f64::from(f32::from_bits((candidate >> 32) as u32))).exp()
}

/// Ids in no order, each as `ranked` gives it.
pub(super) struct Candidates<'a>(&'a mut [u64]);

impl Candidates<'_> {
    /// Of the k best, and ties with the last, the fewest that reach `share` of their mass: what
    /// else is among the candidates makes no difference.
    pub(super) fn top(self, k: usize, share: f64, scaled: Scaled) -> Kept {
        let kept = keep_top_k(self.0, k);
        let least = score_of(kept.iter().copied().max().unwrap_or(0));
        for one in &mut *kept {
            *one = candidate(*one as u32 as usize, scaled.of(score_of(*one)));
        }
        if share >= 1.0 {
            let last = kept.iter().copied().max().unwrap_or(0);
            return Kept { last, least };
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
        let last = kept.get(count.max(1) - 1).copied().unwrap_or(0);
        Kept { last, least }
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
