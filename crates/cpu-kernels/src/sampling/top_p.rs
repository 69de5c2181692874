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
}

/// A candidate in one number: ascending numbers are descending scores, and ascending ids on ties.
#[inline(always)]
fn candidate(id: usize, scaled: f32) -> u64 {
    u64::from(scaled.abs().to_bits()) << 32 | id as u64
}

fn mass_of(candidates: &[u64]) -> f64 {
    let scaled = |candidate: u64| -f64::from(f32::from_bits((candidate >> 32) as u32));
    candidates
        .iter()
        .map(|&candidate| scaled(candidate).exp())
        .sum()
}

/// Ids in no order.
pub(super) struct Candidates<'a>(&'a mut [u64]);

impl Candidates<'_> {
    /// Of the k best, and ties with the last, the fewest that reach `share` of their mass.
    pub(super) fn top(self, k: usize, share: f64) -> Kept {
        let kept = keep_top_k(self.0, k);
        if share < 1.0 {
            let mass = share * mass_of(kept);
            return keep_mass(kept, mass);
        }
        Kept(kept.iter().copied().max().unwrap_or(0))
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

/// The best ones, until those before the next have at least `mass`; at least one.
fn keep_mass(candidates: &mut [u64], mass: f64) -> Kept {
    // All before `low` are kept and have `before`; none from `high` on is.
    let (mut low, mut high) = (0, candidates.len());
    let mut before = 0.0;
    while low < high {
        let middle = low + (high - low) / 2;
        candidates[low..high].select_nth_unstable(middle - low);
        // The middle one is kept if those before it have less than `mass`.
        let reached = before + mass_of(&candidates[low..middle]);
        if reached < mass {
            before = reached + mass_of(&candidates[middle..=middle]);
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    let kept = &candidates[..low.max(1).min(candidates.len())];
    Kept(kept.iter().copied().max().unwrap_or(0))
}
