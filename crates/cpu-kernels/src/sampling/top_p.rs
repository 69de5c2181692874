//! Which ids top_k and top_p keep.
//!
//! ```text
//! scores     |------------|-----|=======|-----------------| best
//!            from        low  high ... 8 thresholds at a time
//! mass above t            >= mass < mass
//! ```
//!
//! Where many ids may be kept, passes over the scores narrow down where the last one lies; only ids
//! between two thresholds are then put in order.

use std::ops::RangeInclusive;

use super::draw::Scaled;
use super::peak::{SCORES, above, at_least};
use crate::level::Level;
use crate::vectorise::vectorised;

/// Peaks of which all scores are put in order at once.
const FEW_PEAKS: usize = 48;
/// Passes over the scores at most, and thresholds of each.
const PASSES: usize = 3;
const THRESHOLDS: usize = 8;
const LANES: usize = 16;
/// Groups whose masses are added in f32 before they go to f64.
const GROUPS: usize = 8;

/// The last id that is kept, by falling score and, on ties, rising id.
#[derive(Clone, Copy)]
pub(super) struct Kept(u64);

impl Kept {
    pub(super) const ALL: Self = Self(u64::MAX);

    #[inline(always)]
    pub(super) fn has(self, id: usize, scaled: f32) -> bool {
        candidate(id, scaled) <= self.0
    }

    /// Those whose score is in a range, in `candidates`.
    pub(super) fn gather<'a>(
        scores: &[f32],
        peaks: &[f32],
        scaled: Scaled,
        range: RangeInclusive<f32>,
        candidates: &'a mut [u64],
    ) -> Candidates<'a> {
        let mut found = 0;
        at_least(scores, peaks, *range.start(), |id, score| {
            if score <= *range.end() {
                candidates[found] = candidate(id, scaled.of(score));
                found += 1;
            }
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

/// Of the ids that score at least `from`, the fewest of the best that reach `mass`; at least one.
pub(super) fn last_by_mass(
    level: Level,
    scores: &[f32],
    peaks: &[f32],
    scaled: Scaled,
    from: f32,
    mass: f64,
    candidates: &mut [u64],
) -> Kept {
    // All that score more than `high` are kept, and have `before`; none below `low` is.
    let (mut low, mut high, mut before) = (from, scaled.best(), 0.0);
    for _ in 0..PASSES {
        if above(scores, peaks, low).nth(FEW_PEAKS).is_none() {
            break;
        }
        let step = (high - low) / (THRESHOLDS + 1) as f32;
        let thresholds: [f32; THRESHOLDS] = std::array::from_fn(|n| low + step * (n + 1) as f32);
        let masses = masses_above(level, scores, peaks, scaled, &thresholds);
        // They fall as thresholds rise.
        let reach = masses.iter().take_while(|&&above| above >= mass).count();
        if reach > 0 {
            low = thresholds[reach - 1];
        }
        if reach < THRESHOLDS {
            (high, before) = (thresholds[reach], masses[reach]);
        }
    }
    let between = Kept::gather(scores, peaks, scaled, low..=high, candidates);
    if between.0.is_empty() {
        return Kept(candidate(u32::MAX as usize, scaled.of(high)));
    }
    keep_mass(between.0, mass - before)
}

vectorised! {
    /// The mass of the scores above each threshold, the lowest first.
    fn masses_above(
        scores: &[f32],
        peaks: &[f32],
        scaled: Scaled,
        thresholds: &[f32; THRESHOLDS],
    ) -> [f64; THRESHOLDS] {
        let mut masses = [0.0; THRESHOLDS];
        let mut lanes = [[0.0_f32; LANES]; THRESHOLDS];
        let mut groups = 0;
        for (_, _, scores) in above(scores, peaks, thresholds[0]) {
            let mut padded = [f32::NEG_INFINITY; SCORES];
            padded[..scores.len()].copy_from_slice(scores);
            for chunk in padded.as_chunks::<LANES>().0 {
                let mass = chunk.map(|score| scaled.mass(score));
                for (lanes, &threshold) in lanes.iter_mut().zip(thresholds) {
                    for ((lane, &score), &mass) in lanes.iter_mut().zip(chunk).zip(&mass) {
                        *lane += if score > threshold { mass } else { 0.0 };
                    }
                }
            }
            groups += 1;
            if groups % GROUPS == 0 {
                flush(&mut lanes, &mut masses);
            }
        }
        flush(&mut lanes, &mut masses);
        masses
    }
}

#[inline(always)]
fn flush(lanes: &mut [[f32; LANES]; THRESHOLDS], masses: &mut [f64; THRESHOLDS]) {
    for (lanes, mass) in lanes.iter_mut().zip(masses) {
        *mass += f64::from(lanes.iter().sum::<f32>());
        *lanes = [0.0; LANES];
    }
}
