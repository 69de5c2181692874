//! Log-probabilities of the model's own distribution.

use parking_lot::Mutex;

use super::peak::{at_least, count, find_peaks, first_of_peak, reached_by};
use crate::cpu::Cpu;
use crate::exp::exp;
use crate::level::Level;
use crate::rows::{Rows, RowsMut};
use crate::vectorise::vectorised;

/// Stands for minus infinity, which JSON cannot carry.
const LEAST: f32 = -9999.0;

/// A token's log-probability and what it competed with.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenLogprobs {
    pub logprob: f32,
    /// 1 is the most likely.
    pub rank: u32,
    /// The most likely tokens, best first, the lowest id on ties.
    pub ids: Vec<u32>,
    pub logprobs: Vec<f32>,
}

/// Of `tokens` [n] under log-softmax of `logits` [n, vocab], with the `alternatives[row]` most
/// likely tokens of each row, into `found` [n].
///
/// # Panics
/// If shapes do not fit, or a token is beyond the vocabulary.
pub fn logprobs(
    cpu: &mut Cpu,
    logits: Rows<f32>,
    tokens: &[u32],
    alternatives: &[usize],
    found: &mut [TokenLogprobs],
) {
    let (rows, vocab) = (logits.rows(), logits.cols());
    assert_eq!(
        (tokens.len(), alternatives.len(), found.len()),
        (rows, rows, rows),
        "rows"
    );
    assert!(
        tokens.iter().all(|&token| (token as usize) < vocab),
        "tokens of the vocabulary"
    );
    let (team, level) = (&cpu.team, cpu.level);
    let (threads, width) = (team.threads(), 2 * count(vocab));
    let [numbers] = cpu.scratch.parts([4 * width * threads]);
    // SAFETY: scratch is aligned and as long as asked, and any bytes are numbers.
    let numbers =
        unsafe { RowsMut::<f32>::from_raw(numbers.as_mut_ptr().cast(), threads, width, width) };
    let found: Vec<_> = found.iter_mut().map(Mutex::new).collect();
    team.run(rows, |row, thread| {
        // SAFETY: one task at a time has this thread's numbers.
        let (peaks, others) = unsafe { numbers.part(thread, 0, width) }.split_at_mut(width / 2);
        let of_row = of_row(
            level,
            logits.row(row),
            tokens[row],
            alternatives[row],
            peaks,
            others,
        );
        **found[row].lock() = of_row;
    });
}

fn of_row(
    level: Level,
    logits: &[f32],
    token: u32,
    alternatives: usize,
    peaks: &mut [f32],
    others: &mut [f32],
) -> TokenLogprobs {
    find_peaks(level, logits, peaks);
    let best = first_of_peak(logits, peaks).1;
    let normaliser = best + (sum_of_powers(level, logits, best).ln()) as f32;
    let logprob = |logit: f32| (logit - normaliser).max(LEAST);
    let chosen = logits[token as usize];
    let mut rank = 1;
    at_least(logits, peaks, chosen, |_, logit| {
        rank += u32::from(logit > chosen)
    });
    let mut most: Vec<(u32, f32)> = Vec::new();
    if alternatives > 0 {
        let alternatives = alternatives.min(logits.len());
        let least = reached_by(peaks, alternatives, others);
        at_least(logits, peaks, least, |id, logit| {
            most.push((id as u32, logit))
        });
        most.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        most.truncate(alternatives);
    }
    TokenLogprobs {
        logprob: logprob(chosen),
        rank,
        ids: most.iter().map(|&(id, _)| id).collect(),
        logprobs: most.iter().map(|&(_, logit)| logprob(logit)).collect(),
    }
}

vectorised! {
    /// The sum of e^(logit - best).
    fn sum_of_powers(logits: &[f32], best: f32) -> f64 {
        let mut sum = 0.0;
        for chunk in logits.chunks(512) {
            let mut lanes = [0.0_f32; 16];
            let (whole, rest) = chunk.as_chunks::<16>();
            for chunk in whole {
                for (lane, &logit) in lanes.iter_mut().zip(chunk) {
                    *lane += exp(logit - best);
                }
            }
            for (lane, &logit) in lanes.iter_mut().zip(rest) {
                *lane += exp(logit - best);
            }
            sum += f64::from(lanes.iter().sum::<f32>());
        }
        sum
    }
}
