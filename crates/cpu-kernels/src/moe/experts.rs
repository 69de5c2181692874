//! The experts of a sparse layer: each token is computed by those it was routed to, and no other.
//!
//! ```text
//! x [T, hidden] --route--> pairs (token, choice), grouped by expert
//! expert e's pairs: gather -> gate and up -> silu(gate) * up -> down     [pairs, hidden] bf16
//! out[token] = sum over its choices, best first, of weight * what came for the pair      in f32
//! ```

use half::bf16;

use super::{Groups, route};
use crate::bfloat::{round, widen};
use crate::cpu::Cpu;
use crate::linear::{Output, Packed, linear};
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

/// Memory between the steps of `mix`, kept from call to call.
#[derive(Default)]
pub struct Workspace {
    scratch: Scratch,
    groups: Groups,
    /// Where each pair's result lies, by token * top + choice.
    places: Vec<u32>,
}

/// The layer's output [T, hidden] for `x` [T, hidden] and the router's `logits` [T, experts].
///
/// # Panics
/// If shapes do not fit.
#[expect(clippy::too_many_arguments, reason = "one operation of a plan")]
pub fn mix(
    cpu: &mut Cpu,
    workspace: &mut Workspace,
    x: Rows<bf16>,
    logits: Rows<bf16>,
    experts: &[Expert],
    top: usize,
    normalise: bool,
    out: RowsMut<bf16>,
) {
    let (tokens, hidden) = (x.rows(), x.cols());
    assert_eq!((out.rows(), out.cols()), (tokens, hidden), "out's shape");
    assert_eq!(
        (logits.rows(), logits.cols()),
        (tokens, experts.len()),
        "logits' shape"
    );
    if tokens == 0 {
        return;
    }
    let inner = experts[0].gate_up.layout().columns();
    let pairs = tokens * top;
    let Workspace {
        scratch,
        groups,
        places,
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
    groups.regroup(chosen, experts.len());
    places.clear();
    places.resize(pairs, 0);
    for (place, &pair) in (0..).zip(&groups.pairs) {
        places[pair as usize] = place;
    }
    {
        let gathered = RowsMut::of(gathered, hidden);
        share::rows(cpu, pairs, hidden, |place| {
            let token = groups.pairs[place] as usize / top;
            // SAFETY: each place is taken once.
            unsafe { gathered.part(place, 0, hidden) }.copy_from_slice(x.row(token));
        });
    }
    for (index, expert) in experts.iter().enumerate() {
        let range = groups.of(index);
        if range.is_empty() {
            continue;
        }
        let rows = Rows::of(&gathered[range.start * hidden..range.end * hidden], hidden);
        let middle = &mut between[range.start * inner..range.end * inner];
        let silu = Output::SiluMul(RowsMut::of(middle, inner));
        linear(cpu, rows, &expert.gate_up, None, silu);
        let found = &mut computed[range.start * hidden..range.end * hidden];
        let found = Output::Bf16(RowsMut::of(found, hidden));
        linear(cpu, Rows::of(middle, inner), &expert.down, None, found);
    }
    let computed = Rows::of(computed, hidden);
    share::rows(cpu, tokens, 2 * top * hidden, |token| {
        // SAFETY: each token is taken once.
        let out = unsafe { out.part(token, 0, hidden) };
        let choices = token * top..(token + 1) * top;
        let (weights, places) = (&weights[choices.clone()], &places[choices]);
        for (column, out) in out.iter_mut().enumerate() {
            let terms = weights.iter().zip(places);
            let sum: f32 = terms
                .map(|(weight, &place)| weight * widen(computed.row(place as usize)[column]))
                .sum();
            *out = round(sum);
        }
    });
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
mod tests {
    use super::*;
    use crate::linear::{Format, Layout, pack};
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    const HIDDEN: usize = 32;
    const INNER: usize = 24;
    const EXPERTS: usize = 4;
    const TOP: usize = 2;

    fn random(rng: &mut StdRng, count: usize) -> Vec<bf16> {
        (0..count)
            .map(|_| bf16::from_f32(rng.random_range(-1.0..1.0)))
            .collect()
    }

    struct Layer {
        weights: Vec<(Vec<bf16>, Vec<bf16>)>,
        packed: Vec<(Vec<Aligned>, Vec<Aligned>)>,
        layouts: (Layout, Layout),
    }

    #[derive(Clone, Copy)]
    #[repr(C, align(64))]
    struct Aligned([u8; 64]);

    fn packed(cpu: &Cpu, layout: &Layout, weight: &[bf16]) -> Vec<Aligned> {
        let mut memory = vec![Aligned([0; 64]); layout.bytes().div_ceil(64)];
        pack(
            cpu,
            layout,
            Rows::of(weight, layout.k()),
            bytes_mut(&mut memory, layout.bytes()),
        );
        memory
    }

    fn bytes_mut(memory: &mut [Aligned], count: usize) -> &mut [u8] {
        // SAFETY: plain bytes, `count` of them at most.
        unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr().cast(), count) }
    }

    fn bytes(memory: &[Aligned], count: usize) -> &[u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(memory.as_ptr().cast(), count) }
    }

    impl Layer {
        fn new(cpu: &Cpu, rng: &mut StdRng) -> Self {
            let gate_up = Layout::new(Format::Bf16, 2 * INNER, HIDDEN, 1, true).unwrap();
            let down = Layout::new(Format::Bf16, HIDDEN, INNER, 1, false).unwrap();
            let weights: Vec<_> = (0..EXPERTS)
                .map(|_| (random(rng, 2 * INNER * HIDDEN), random(rng, HIDDEN * INNER)))
                .collect();
            let packed = weights
                .iter()
                .map(|(a, b)| (packed(cpu, &gate_up, a), packed(cpu, &down, b)))
                .collect();
            Self {
                weights,
                packed,
                layouts: (gate_up, down),
            }
        }

        fn run(&self, cpu: &mut Cpu, x: &[bf16], logits: &[bf16]) -> Vec<bf16> {
            let (gate_up, down) = self.layouts;
            let experts: Vec<_> = self
                .packed
                .iter()
                .map(|(a, b)| Expert {
                    gate_up: Packed::new(gate_up, bytes(a, gate_up.bytes())).unwrap(),
                    down: Packed::new(down, bytes(b, down.bytes())).unwrap(),
                })
                .collect();
            let mut out = vec![bf16::ZERO; x.len()];
            mix(
                cpu,
                &mut Workspace::default(),
                Rows::of(x, HIDDEN),
                Rows::of(logits, EXPERTS),
                &experts,
                TOP,
                true,
                RowsMut::of(&mut out, HIDDEN),
            );
            out
        }

        /// In f64, without grouping.
        fn expected(&self, x: &[bf16], logits: &[bf16]) -> Vec<f64> {
            let wide = |x: &bf16| f64::from(x.to_f32());
            let dot = |a: &[f64], row: &[bf16]| -> f64 {
                a.iter().zip(row).map(|(a, b)| a * wide(b)).sum()
            };
            let mut order: Vec<usize> = (0..EXPERTS).collect();
            order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap().then(a.cmp(&b)));
            let likelihoods: Vec<f64> = order[..TOP]
                .iter()
                .map(|&e| wide(&logits[e]).exp())
                .collect();
            let total: f64 = likelihoods.iter().sum();
            let x: Vec<f64> = x.iter().map(wide).collect();
            let mut out = vec![0.0; HIDDEN];
            for (&expert, likelihood) in order.iter().zip(likelihoods) {
                let (gate_up, down) = &self.weights[expert];
                let row = |index: usize| dot(&x, &gate_up[index * HIDDEN..][..HIDDEN]);
                let middle: Vec<f64> = (0..INNER)
                    .map(|i| row(i) / (1.0 + (-row(i)).exp()) * row(INNER + i))
                    .collect();
                for (column, out) in out.iter_mut().enumerate() {
                    *out += likelihood / total * dot(&middle, &down[column * INNER..][..INNER]);
                }
            }
            out
        }
    }

    #[test]
    fn tokens_get_what_their_experts_say_alone_and_together() {
        let mut rng = StdRng::seed_from_u64(5);
        let mut cpu = Cpu::new(2, 0).unwrap();
        let layer = Layer::new(&cpu, &mut rng);
        for tokens in [0, 1, 3, 17] {
            let x = random(&mut rng, tokens * HIDDEN);
            let logits = random(&mut rng, tokens * EXPERTS);
            let found = layer.run(&mut cpu, &x, &logits);
            for token in 0..tokens {
                let x = &x[token * HIDDEN..][..HIDDEN];
                let logits = &logits[token * EXPERTS..][..EXPERTS];
                let found = &found[token * HIDDEN..][..HIDDEN];
                assert_eq!(layer.run(&mut cpu, x, logits), found);
                for (found, expected) in found.iter().zip(layer.expected(x, logits)) {
                    let error = (f64::from(found.to_f32()) - expected).abs();
                    assert!(
                        error < 0.03 * (1.0 + expected.abs()),
                        "{found} for {expected}"
                    );
                }
            }
        }
    }
}
