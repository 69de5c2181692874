//! The largest of each 64 scores of a row.

use crate::vectorise::vectorised;

/// Scores of one peak.
pub(super) const SCORES: usize = 64;
const LANES: usize = 16;

/// Peaks of a row of `vocab` scores.
pub(super) fn count(vocab: usize) -> usize {
    vocab.div_ceil(SCORES)
}

vectorised! {
    /// Write the largest of each 64 scores; false if there is NaN or infinity among them, or
    /// nothing but minus infinity.
    pub(super) fn find_peaks(scores: &[f32], peaks: &mut [f32]) -> bool {
        let mut unusable = [0; LANES];
        let (whole, rest) = scores.as_chunks::<SCORES>();
        for (scores, peak) in whole.iter().zip(&mut *peaks) {
            *peak = largest(scores, &mut unusable);
        }
        if let Some(peak) = peaks.get_mut(whole.len()) {
            let mut last = [f32::NEG_INFINITY; SCORES];
            last[..rest.len()].copy_from_slice(rest);
            *peak = largest(&last, &mut unusable);
        }
        unusable == [0; LANES] && peaks.iter().any(|&peak| peak > f32::NEG_INFINITY)
    }
}

/// The largest score; lanes of `unusable` that had NaN or infinity become 1.
#[inline(always)]
fn largest(scores: &[f32; SCORES], unusable: &mut [u32; LANES]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in scores.as_chunks::<LANES>().0 {
        for ((lane, unusable), &score) in lanes.iter_mut().zip(&mut *unusable).zip(chunk) {
            *lane = larger(*lane, score);
            *unusable |= u32::from(score.is_nan() | (score == f32::INFINITY));
        }
    }
    // Halves by halves: a chain through all lanes would take as long as all the rest.
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            lanes[lane] = larger(lanes[lane], lanes[lane + width]);
        }
    }
    lanes[0]
}

/// The lowest id of the largest score, and the score.
pub(super) fn first_of_peak(scores: &[f32], peaks: &[f32]) -> (usize, f32) {
    let best = peaks.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let first = peaks.iter().position(|&peak| peak == best).unwrap_or(0) * SCORES;
    let place = scores[first..]
        .iter()
        .position(|&score| score == best)
        .unwrap_or(0);
    (first + place, best)
}

/// Peaks of at least `least`, with the first id of each and its scores.
pub(super) fn above<'a>(
    scores: &'a [f32],
    peaks: &'a [f32],
    least: f32,
) -> impl Iterator<Item = (f32, usize, &'a [f32])> {
    let groups = peaks.iter().zip(scores.chunks(SCORES)).enumerate();
    groups
        .filter(move |(_, (peak, _))| **peak >= least)
        .map(|(group, (&peak, scores))| (peak, group * SCORES, scores))
}

/// Call `each` with the ids, ascending, and scores of at least `least`.
pub(super) fn at_least(
    scores: &[f32],
    peaks: &[f32],
    least: f32,
    mut each: impl FnMut(usize, f32),
) {
    for (_, first, scores) in above(scores, peaks, least) {
        for (id, &score) in (first..).zip(scores) {
            if score >= least {
                each(id, score);
            }
        }
    }
}

/// A number that at least `k` scores reach, and most others do not: the k-th largest peak.
pub(super) fn reached_by(peaks: &[f32], k: usize, scratch: &mut [f32]) -> f32 {
    if k > peaks.len() {
        return f32::NEG_INFINITY;
    }
    scratch.copy_from_slice(peaks);
    *scratch
        .select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a))
        .1
}
