//! Chooses one id per row of scores, by largest value or with noise.
//!
//! Noise comes in one of two forms that a row's own parameters choose:
//!
//!  - truncated (top_k, top_p or min_p): noise for the ids that are left;
//!  - untruncated: the vocabulary in groups of 512; noise picks a group by its whole probability,
//!    then an id within it. The distribution is the same as with noise for every id, as the largest
//!    of a group's perturbed scores is distributed like its log-sum-exp with one noise (Gumbel's
//!    max-stability).

use std::f32::consts::LOG2_E;

use super::noise::{bits, gumbel, gumbel_at_most};
use super::peak::{SCORES, above, count, find_peaks, first_of_peak, reached_by};
use super::top_p::Kept;
use crate::cpu::Cpu;
use crate::exp::exp2;
use crate::level::Level;
use crate::rows::{Rows, RowsMut};
use crate::vectorise::vectorised;

/// Ids of one group.
const GROUP: usize = 512;
/// Noise counters of ids; those of groups start at 0.
pub(super) const TOKEN_STREAM: u64 = 1 << 40;
/// Temperatures below are zero: the largest score is taken.
pub(super) const GREEDY_BELOW: f64 = 1e-5;

/// How a row's token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    pub temperature: f64,
    /// Keeps so many of the most likely ids, and ties with the last; 0 for all.
    pub top_k: usize,
    /// Keeps the fewest most likely ids, of those that `top_k` left, that reach this mass.
    pub top_p: f64,
    /// Keeps ids of at least this probability relative to the most likely one's.
    pub min_p: f64,
    /// Of `row_key`.
    pub key: u64,
}

/// One task's memory.
struct Own<'a> {
    peaks: &'a mut [f32],
    others: &'a mut [f32],
    masses: &'a mut [f32],
    candidates: &'a mut [u64],
}

/// Draw a token for every row of `scores` [n, vocab] as `rows` [n] say, into `tokens` [n].
///
/// A row whose scores hold NaN or infinity, or nothing but minus infinity, gets `None`. The lowest
/// id is taken on ties.
///
/// # Panics
/// If shapes do not fit, or the vocabulary is empty.
pub fn draw(cpu: &mut Cpu, scores: Rows<f32>, rows: &[Draw], tokens: &mut [Option<u32>]) {
    assert_eq!(
        (scores.rows(), rows.len()),
        (rows.len(), tokens.len()),
        "rows"
    );
    let vocab = scores.cols();
    assert!(
        rows.is_empty() || (1..=u32::MAX as usize).contains(&vocab),
        "{vocab} scores"
    );
    let peaks = count(vocab);
    let groups = vocab.div_ceil(GROUP);
    let threads = cpu.team.threads();
    let (team, level) = (&cpu.team, cpu.level);
    let [candidates, numbers] = cpu
        .scratch
        .parts([8 * vocab * threads, 4 * (2 * peaks + groups) * threads]);
    // SAFETY: scratch is aligned to 64 bytes, as long as asked, and any bytes are numbers.
    let candidates =
        unsafe { RowsMut::<u64>::from_raw(candidates.as_mut_ptr().cast(), threads, vocab, vocab) };
    let width = 2 * peaks + groups;
    // SAFETY: as above.
    let numbers =
        unsafe { RowsMut::<f32>::from_raw(numbers.as_mut_ptr().cast(), threads, width, width) };
    let tokens = RowsMut::of(tokens, 1);
    team.run(rows.len(), |row, thread| {
        // SAFETY: one task at a time has this thread's numbers.
        let (candidates, numbers) = unsafe {
            (
                candidates.part(thread, 0, vocab),
                numbers.part(thread, 0, width),
            )
        };
        let (peaks, numbers) = numbers.split_at_mut(peaks);
        let (others, masses) = numbers.split_at_mut(peaks.len());
        let own = Own {
            peaks,
            others,
            masses,
            candidates,
        };
        let (draw, scores) = (&rows[row], scores.row(row));
        // SAFETY: each row is taken once.
        let token = unsafe { tokens.part(row, 0, 1) };
        token[0] = None;
        if find_peaks(level, scores, own.peaks) {
            let (id, best) = first_of_peak(scores, own.peaks);
            let id = if draw.temperature < GREEDY_BELOW {
                id
            } else {
                let scaled = Scaled::new(best, draw.temperature as f32);
                add_masses(level, scores, scaled, own.masses);
                if draw.top_k > 0 || draw.top_p < 1.0 || draw.min_p > 0.0 {
                    truncated(level, scores, draw, scaled, id, own)
                } else {
                    by_group(scores, draw, scaled, own.masses)
                }
            };
            token[0] = Some(id as u32);
        }
    });
}

/// (score - best) / temperature: at most 0.
#[derive(Clone, Copy)]
pub(super) struct Scaled {
    best: f32,
    temperature: f32,
    /// To the base of 2.
    factor: f32,
}

impl Scaled {
    pub(super) fn new(best: f32, temperature: f32) -> Self {
        Self {
            best,
            temperature,
            factor: LOG2_E / temperature,
        }
    }

    #[inline(always)]
    pub(super) fn of(self, score: f32) -> f32 {
        (score - self.best) / self.temperature
    }

    /// e^scaled.
    #[inline(always)]
    fn mass(self, score: f32) -> f32 {
        exp2((score - self.best) * self.factor)
    }

    /// e^scaled where that is above `place`, else 0.
    #[inline(always)]
    fn mass_above(self, score: f32, place: f32) -> f32 {
        let mass = self.mass(score);
        if self.of(score) > place { mass } else { 0.0 }
    }

    /// A score below which none has a scaled one of at least `least`, but for rounding, which is
    /// allowed for.
    fn score(self, least: f64) -> f32 {
        let score = least * f64::from(self.temperature) + f64::from(self.best);
        let slack = 1e-6 * (score.abs() + f64::from(self.best.abs()) + 1.0);
        (score - slack) as f32
    }
}

vectorised! {
    /// Each group's sum of e^scaled.
    fn add_masses(scores: &[f32], scaled: Scaled, masses: &mut [f32]) {
        for (scores, mass) in scores.chunks(GROUP).zip(masses) {
            let mut lanes = [0.0_f32; 16];
            let (whole, rest) = scores.as_chunks::<16>();
            for chunk in whole {
                for (lane, &score) in lanes.iter_mut().zip(chunk) {
                    *lane += scaled.mass(score);
                }
            }
            for (lane, &score) in lanes.iter_mut().zip(rest) {
                *lane += scaled.mass(score);
            }
            *mass = lanes.iter().sum();
        }
    }
}

fn by_group(scores: &[f32], draw: &Draw, scaled: Scaled, masses: &[f32]) -> usize {
    let mut group = Largest::default();
    for (index, &mass) in masses.iter().enumerate() {
        group.offer(index, f64::from(mass).ln(), bits(draw.key, index as u64));
    }
    let first = group.id * GROUP;
    let mut id = Largest::default();
    for (index, &score) in (first..).zip(&scores[first..scores.len().min(first + GROUP)]) {
        let noise = bits(draw.key, index as u64 + TOKEN_STREAM);
        id.offer(index, scaled.of(score).into(), noise);
    }
    id.id
}

/// `first` is the most likely id, which is kept whatever the row says.
///
/// Where top_p ends is not looked for: an id is drawn from all that it might keep, and of the mass
/// of those before it in order it can be told whether it is kept. If it is not, neither is any
/// after it, and one of those before it is drawn with the same noise: what a draw among the kept
/// ones alone would have given. So a row takes 1 + ln(1 / top_p) draws, by expectation.
fn truncated(
    level: Level,
    scores: &[f32],
    draw: &Draw,
    scaled: Scaled,
    first: usize,
    own: Own,
) -> usize {
    let vocab = scores.len();
    let least = draw.min_p.ln();
    let row = Noisy {
        level,
        scores,
        peaks: own.peaks,
        scaled,
        key: draw.key,
        least,
    };
    if draw.top_k > 0 {
        let from = reached_by(own.peaks, draw.top_k.min(vocab), own.others);
        let found = Kept::gather(scores, own.peaks, from, own.candidates);
        return row.best(first, from, found.top(draw.top_k, draw.top_p, scaled));
    }
    let total: f64 = own.masses.iter().map(|&mass| f64::from(mass)).sum();
    let wanted = draw.top_p * total;
    if draw.top_p < 1.0 && wanted <= 1.0 {
        return first; // whose mass is 1
    }
    // Ids with less than (1 - top_p) / vocab each cannot be needed to reach top_p.
    let needed = (total * (1.0 - draw.top_p).max(0.0) / vocab as f64).ln();
    let mut from = scaled.score(needed.max(least) - 1e-3);
    let mut kept = Kept::ALL;
    loop {
        let id = row.best(first, from, kept);
        if id == first || draw.top_p >= 1.0 {
            return id;
        }
        let place = scaled.of(scores[id]);
        from = scaled.score(place.into());
        if mass_before(level, scores, own.peaks, scaled, from, id) < wanted {
            return id;
        }
        kept = Kept::before(id, place);
    }
}

/// A row, and the noise of its ids.
struct Noisy<'a> {
    level: Level,
    scores: &'a [f32],
    peaks: &'a [f32],
    scaled: Scaled,
    key: u64,
    /// No id whose scaled score is below it is drawn, but for the first.
    least: f64,
}

impl Noisy<'_> {
    /// The id of the largest sum of score and noise among `first` and those that are kept, which
    /// have scores of at least `from`.
    fn best(&self, first: usize, from: f32, kept: Kept) -> usize {
        let mut best = Largest::default();
        best.offer(first, 0.0, bits(self.key, first as u64 + TOKEN_STREAM));
        for (peak, first, scores) in above(self.scores, self.peaks, from) {
            let most = most_bits(self.level, self.key, first as u64 + TOKEN_STREAM);
            if f64::from(self.scaled.of(peak)) + gumbel_at_most(most) <= best.value {
                continue;
            }
            for (id, &score) in (first..).zip(scores) {
                let scaled = self.scaled.of(score);
                if kept.has(id, score, scaled) && f64::from(scaled) >= self.least {
                    let noise = bits(self.key, id as u64 + TOKEN_STREAM);
                    best.offer(id, scaled.into(), noise);
                }
            }
        }
        best.id
    }
}

vectorised! {
    /// The mass of all ids before `id`, by falling scaled score and, on ties, rising id. None of
    /// them has a score below `from`.
    fn mass_before(scores: &[f32], peaks: &[f32], scaled: Scaled, from: f32, id: usize) -> f64 {
        let place = scaled.of(scores[id]);
        let groups = scores.chunks(GROUP).zip(peaks.chunks(GROUP / SCORES));
        let mut mass = 0.0;
        for (group, (scores, peaks)) in groups.enumerate() {
            let mut lanes = [0.0_f32; 16];
            for (_, first, scores) in above(scores, peaks, from) {
                let lower_ids = id.saturating_sub(group * GROUP + first);
                let (lower, higher) = scores.split_at(lower_ids.min(scores.len()));
                add_above(&mut lanes, lower, scaled, place.next_down());
                add_above(&mut lanes, higher, scaled, place);
            }
            mass += f64::from(lanes.iter().sum::<f32>());
        }
        mass
    }
}

/// Add the mass of those whose scaled score is above `place`.
#[inline(always)]
fn add_above(lanes: &mut [f32; 16], scores: &[f32], scaled: Scaled, place: f32) {
    let (whole, rest) = scores.as_chunks::<16>();
    for chunk in whole {
        for (lane, &score) in lanes.iter_mut().zip(chunk) {
            *lane += scaled.mass_above(score, place);
        }
    }
    for (lane, &score) in lanes.iter_mut().zip(rest) {
        *lane += scaled.mass_above(score, place);
    }
}

vectorised! {
    /// The most that any of `SCORES` counters from `first` on gets: none has larger noise.
    fn most_bits(key: u64, first: u64) -> u64 {
        (first..first + SCORES as u64).fold(0, |most, counter| most.max(bits(key, counter)))
    }
}

/// The largest sum of a score and its noise so far.
pub(super) struct Largest {
    pub(super) id: usize,
    value: f64,
}

impl Default for Largest {
    fn default() -> Self {
        Self {
            id: 0,
            value: f64::NEG_INFINITY,
        }
    }
}

impl Largest {
    /// Noise is only computed where it could matter.
    #[inline(always)]
    pub(super) fn offer(&mut self, id: usize, score: f64, bits: u64) {
        if score + gumbel_at_most(bits) > self.value {
            let value = score + gumbel(bits);
            if value > self.value {
                *self = Self { id, value };
            }
        }
    }
}
