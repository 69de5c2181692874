//! The experts of a sparse layer: each token is computed by those it was routed to, and no other.
//!
//! ```text
//! x [T, hidden] --route--> pairs (token, choice), grouped by expert
//! expert e's pairs: gather -> gate and up -> silu(gate) * up -> down     [pairs, hidden] bf16
//! out[token] = sum over its choices, best first, of weight * what came for the pair      in f32
//! ```
//!
//! Several ranks either divide each expert, and add up what they got for a pair, or divide the
//! experts, and read what the pair's rank got. The bits are those of one rank in both.

use std::time::Instant;

use half::bf16;

use super::{Groups, Used, route};
use crate::bfloat::{round, widen};
use crate::cpu::Cpu;
use crate::linear::{Output, Packed, finish, linear, partial};
use crate::ranks::{RankLost, Ranks};
use crate::rows::{Rows, RowsMut};
use crate::scratch::Scratch;
use crate::share;

/// One expert's weights.
#[derive(Clone, Copy)]
pub struct Expert<'a> {
    /// Gated: [2 * inner, hidden].
    pub gate_up: Packed<'a>,
    /// [hidden, inner]
    pub down: Packed<'a>,
}

/// Who else computes the layer.
pub enum Among<'a> {
    Nobody,
    /// Every rank has its part of every expert: columns of gate and up, groups of down.
    Inner(&'a mut Ranks),
    /// Every rank has its share of whole experts, in the order of ranks.
    Experts(&'a mut Ranks),
}

/// Memory between the steps of `mix`, kept from call to call.
#[derive(Default)]
pub struct Workspace {
    scratch: Scratch,
    groups: Groups,
    /// Where each pair's result lies, by token * top + choice.
    places: Vec<u32>,
    used: Used,
}

impl Workspace {
    #[must_use]
    pub fn used(&self) -> &Used {
        &self.used
    }
}

/// The layer's output [T, hidden] for `x` [T, hidden] and the router's `logits` [T, experts].
///
/// # Errors
/// If a rank has ended.
///
/// # Panics
/// If shapes do not fit, or a slot of the ranks is too small.
#[expect(clippy::too_many_arguments, reason = "one operation of a plan")]
pub fn mix(
    cpu: &mut Cpu,
    workspace: &mut Workspace,
    x: Rows<bf16>,
    logits: Rows<bf16>,
    experts: &[Expert],
    mut among: Among,
    top: usize,
    normalise: bool,
    out: RowsMut<bf16>,
) -> Result<(), RankLost> {
    let (tokens, hidden) = (x.rows(), x.cols());
    assert_eq!((out.rows(), out.cols()), (tokens, hidden), "out's shape");
    let held = experts.len();
    let (first, all) = match &among {
        Among::Nobody | Among::Inner(_) => (0, held),
        Among::Experts(ranks) => (ranks.rank() * held, ranks.count() * held),
    };
    assert_eq!(
        (logits.rows(), logits.cols()),
        (tokens, all),
        "logits' shape"
    );
    if tokens == 0 {
        return Ok(());
    }
    let inner = experts[0].gate_up.layout().columns();
    let pairs = tokens * top;
    let Workspace {
        scratch,
        groups,
        places,
        used,
    } = workspace;
    let sizes = [
        4 * pairs,
        4 * pairs,
        2 * pairs * hidden,
        2 * pairs * inner,
        2 * pairs * hidden,
    ];
    let [weights, chosen, gathered, between, computed] = scratch.parts(sizes);
    let (weights, chosen) = (numbers::<f32>(weights), numbers::<u32>(chosen));
    let (gathered, between) = (numbers::<bf16>(gathered), numbers::<bf16>(between));
    let computed = numbers::<bf16>(computed);

    route(
        cpu,
        logits,
        normalise,
        RowsMut::of(weights, top),
        RowsMut::of(chosen, top),
    );
    groups.regroup(chosen, all);
    used.count(groups, all, held);
    places.clear();
    places.resize(pairs, 0);
    for (place, &pair) in (0..).zip(&groups.pairs) {
        places[pair as usize] = place;
    }
    {
        let mine = groups.of(first).start..groups.of(first + held - 1).end;
        let gathered = RowsMut::of(gathered, hidden);
        share::rows(cpu, mine.len(), hidden, |index| {
            let place = mine.start + index;
            let token = groups.pairs[place] as usize / top;
            // SAFETY: each place is taken once.
            unsafe { gathered.part(place, 0, hidden) }.copy_from_slice(x.row(token));
        });
    }
    let gathered = Rows::of(gathered, hidden);
    let hit = experts.iter().zip(first..);
    let hit = hit.map(|(expert, index)| (expert, groups.of(index)));
    let hit = hit.filter(|(_, range)| !range.is_empty());
    // [pairs, hidden]: what others get of this rank.
    let (sums, found) = match &mut among {
        Among::Nobody => (None, RowsMut::of(computed, hidden)),
        Among::Inner(ranks) => (
            Some(ranks.mine(pairs, hidden)),
            RowsMut::of(computed, hidden),
        ),
        Among::Experts(ranks) => (None, ranks.mine(pairs, hidden)),
    };
    for (expert, range) in hit.clone() {
        let middle = &mut between[range.start * inner..range.end * inner];
        let silu = Output::SiluMul(RowsMut::of(middle, inner));
        let rows = gathered.between(range.clone());
        linear(cpu, rows, &expert.gate_up, None, silu);
        let middle = Rows::of(middle, inner);
        match &sums {
            // SAFETY: an expert's rows are its own.
            Some(sums) => partial(cpu, middle, &expert.down, &unsafe { sums.between(range) }),
            None => {
                // SAFETY: as above.
                let found = Output::Bf16(unsafe { found.between(range) });
                linear(cpu, middle, &expert.down, None, found);
            }
        }
    }
    let results = match among {
        Among::Nobody => vec![found.read()],
        Among::Inner(ranks) => {
            ranks.meet()?;
            let began = Instant::now();
            let sums = ranks.parts::<f32>(pairs, hidden);
            for (expert, range) in hit {
                let sums: Vec<_> = sums
                    .iter()
                    .map(|rows| rows.between(range.clone()))
                    .collect();
                // SAFETY: an expert's rows are its own.
                let found = unsafe { found.between(range) };
                finish(cpu, &expert.down, None, &sums, Output::Bf16(found));
            }
            ranks.count_time(began);
            vec![found.read()]
        }
        Among::Experts(ranks) => {
            ranks.meet()?;
            ranks.parts(pairs, hidden)
        }
    };
    share::rows(cpu, tokens, 2 * top * hidden, |token| {
        // SAFETY: each token is taken once.
        let out = unsafe { out.part(token, 0, hidden) };
        let choices = token * top..(token + 1) * top;
        let terms = choices.map(|choice| {
            let computed = results[chosen[choice] as usize / held];
            (weights[choice], computed.row(places[choice] as usize))
        });
        let terms: Vec<(f32, &[bf16])> = terms.collect();
        for (column, out) in out.iter_mut().enumerate() {
            let terms = terms.iter();
            let sum: f32 = terms.map(|(weight, row)| weight * widen(row[column])).sum();
            *out = round(sum);
        }
    });
    Ok(())
}

/// Bytes of `Scratch` as numbers: aligned to 64, and any bytes are a number.
fn numbers<T: Number>(bytes: &mut [u8]) -> &mut [T] {
    let count = bytes.len() / size_of::<T>();
    // SAFETY: plain numbers in memory that is aligned for all of them.
    unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), count) }
}

/// Types of which every bit pattern is a value.
trait Number {}
impl Number for f32 {}
impl Number for u32 {}
impl Number for bf16 {}

#[cfg(test)]
mod tests;
