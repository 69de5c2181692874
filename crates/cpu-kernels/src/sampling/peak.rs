//! The largest of each 64 scores of a row.

use crate::vectorise::vectorised;

/// Scores of one peak.
pub(super) const SCORES: usize = 64;

/// Peaks of a row of `vocab` scores.
pub(super) fn count(vocab: usize) -> usize {
    vocab.div_ceil(SCORES)
}

vectorised! {
    /// Write the largest of each 64 scores; false if there is NaN or infinity among them, or
    /// nothing but minus infinity.
    pub(super) fn find_peaks(scores: &[f32], peaks: &mut [f32]) -> bool {
        let mut finite = true;
        let mut best = f32::NEG_INFINITY;
        for (scores, peak) in scores.chunks(SCORES).zip(peaks) {
            let mut lanes = [f32::NEG_INFINITY; 16];
            let mut below = [true; 16];
            let (whole, rest) = scores.as_chunks::<16>();
            for chunk in whole {
                for ((lane, below), &score) in lanes.iter_mut().zip(&mut below).zip(chunk) {
                    *lane = if score > *lane { score } else { *lane };
                    *below &= score < f32::INFINITY;
                }
            }
            for ((lane, below), &score) in lanes.iter_mut().zip(&mut below).zip(rest) {
                *lane = if score > *lane { score } else { *lane };
                *below &= score < f32::INFINITY;
            }
            *peak = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
            finite &= below.into_iter().all(|below| below);
            best = best.max(*peak);
        }
        finite && best > f32::NEG_INFINITY
    }
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

/// Call `each` with the ids, ascending, and scores of at least `least`.
pub(super) fn at_least(
    scores: &[f32],
    peaks: &[f32],
    least: f32,
    mut each: impl FnMut(usize, f32),
) {
    for (group, _) in peaks.iter().enumerate().filter(|&(_, &peak)| peak >= least) {
        let first = group * SCORES;
        for (id, &score) in (first..).zip(&scores[first..scores.len().min(first + SCORES)]) {
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
