//! Draws from the largest logits of each row, when no others are written.

use half::bf16;

use super::draw::{Draw, GREEDY_BELOW, Largest, Scaled, TOKEN_STREAM, draw};
use super::noise::bits;
use super::top_p::Kept;
use crate::cpu::Cpu;
use crate::linear::{self, Output, Packed, Shortlist};
use crate::rows::{Rows, RowsMut};

impl Draw {
    /// How many of the largest scores, and what equals the last of these, decide; `None` for more
    /// than a `Shortlist` has.
    #[must_use]
    pub fn logits_needed(&self) -> Option<usize> {
        match self.top_k {
            _ if self.temperature < GREEDY_BELOW => Some(1),
            top_k @ 1..=Shortlist::MOST => Some(top_k),
            _ => None,
        }
    }
}

/// Draw a token for every row of `x` [n, k], whose products with `weight` are its logits, as `draws`
/// [n] say, into `tokens` [n]: the ones that `draw` gives, but logits are not written.
///
/// # Panics
/// If shapes do not fit, or a draw needs more logits than a `Shortlist` has.
pub fn draw_likely(
    cpu: &mut Cpu,
    x: Rows<bf16>,
    weight: &Packed,
    draws: &[Draw],
    tokens: &mut [Option<u32>],
) {
    assert_eq!(draws.len(), tokens.len(), "a token for each draw");
    let list = |draw: &Draw| Shortlist::new(draw.logits_needed().unwrap_or(0));
    let mut lists: Vec<_> = draws.iter().map(list).collect();
    linear::shortlist(cpu, x, weight, &mut lists);
    let places = RowsMut::of(tokens, 1);
    cpu.team.run(draws.len(), |row, _| {
        // SAFETY: each row is taken once.
        let token = unsafe { places.part(row, 0, 1) };
        token[0] = choose(&lists[row], &draws[row]);
    });
    let n = weight.layout().n();
    for row in (0..lists.len()).filter(|&row| lists[row].overflown()) {
        let mut logits = vec![0.0; n];
        let out = Output::F32(RowsMut::of(&mut logits, n));
        linear::linear(cpu, x.between(row..row + 1), weight, None, out);
        let (draws, tokens) = (&draws[row..=row], &mut tokens[row..=row]);
        draw(cpu, Rows::of(&logits, n), draws, tokens);
    }
}

/// As `draw` chooses, in which nothing depends on logits that are not kept.
fn choose(list: &Shortlist, draw: &Draw) -> Option<u32> {
    if list.unusable() {
        return None;
    }
    let logits = list.logits();
    let &(best, first) = logits.iter().reduce(|a, b| {
        if b.0 > a.0 || (b.0 == a.0 && b.1 < a.1) {
            b
        } else {
            a
        }
    })?;
    if best == f32::NEG_INFINITY {
        return None;
    }
    if draw.temperature < GREEDY_BELOW {
        return Some(first);
    }
    let scaled = Scaled::new(best, draw.temperature as f32);
    let mut candidates = vec![0; logits.len()];
    let kept = Kept::among(logits, &mut candidates).top(draw.top_k, draw.top_p, scaled);
    let least = draw.min_p.ln();
    let noise = |id: u32| bits(draw.key, u64::from(id) + TOKEN_STREAM);
    let mut chosen = Largest::default();
    chosen.offer(first as usize, 0.0, noise(first));
    for &(logit, id) in logits {
        let scaled = scaled.of(logit);
        if kept.has(id as usize, logit, scaled) && f64::from(scaled) >= least {
            chosen.offer(id as usize, scaled.into(), noise(id));
        }
    }
    Some(chosen.id as u32)
}
