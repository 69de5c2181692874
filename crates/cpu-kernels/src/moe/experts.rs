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
                finish(cpu, &expert.down, None, &sums, found);
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
mod tests {
    use super::*;
    use crate::linear::{Format, Layout, pack, select, selected};
    use crate::ranks::Sizes;
    use crate::ranks::tests::on_ranks;
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
                Among::Nobody,
                TOP,
                true,
                RowsMut::of(&mut out, HIDDEN),
            )
            .unwrap();
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

    /// One expert's matrices as a rank has them.
    struct Part {
        layouts: (Layout, Layout),
        bytes: (Vec<Aligned>, Vec<Aligned>),
    }

    impl Part {
        fn expert(&self) -> Expert<'_> {
            let held = |layout: Layout, memory| Packed::new(layout, bytes(memory, layout.bytes()));
            Expert {
                gate_up: held(self.layouts.0, &self.bytes.0).unwrap(),
                down: held(self.layouts.1, &self.bytes.1).unwrap(),
            }
        }

        /// What `rank` of `count` has where they divide each expert.
        fn divided(&self, cpu: &Cpu, rank: usize, count: usize) -> Self {
            let columns = INNER / count;
            let (gate, whole) = (rank * columns..(rank + 1) * columns, self.expert());
            let ranges = [gate.clone(), gate.start + INNER..gate.end + INNER];
            let gate_up = selected(&self.layouts.0, &ranges).unwrap();
            let mut memory = vec![Aligned([0; 64]); gate_up.bytes().div_ceil(64)];
            let out = bytes_mut(&mut memory, gate_up.bytes());
            select(cpu, &whole.gate_up, &ranges, out).unwrap();
            let groups = 8 / count;
            let down = whole
                .down
                .groups(rank * groups, (rank + 1) * groups)
                .unwrap();
            let each = self.layouts.1.bytes() / count / 64;
            let down_bytes = self.bytes.1[rank * each..(rank + 1) * each].to_vec();
            Self {
                layouts: (gate_up, *down.layout()),
                bytes: (memory, down_bytes),
            }
        }
    }

    #[test]
    fn ranks_that_divide_experts_either_way_get_the_bits_of_one() {
        const TOKENS: usize = 9;
        let mut rng = StdRng::seed_from_u64(6);
        let mut cpu = Cpu::new(1, 0).unwrap();
        let layouts = (
            Layout::new(Format::Int8, 2 * INNER, HIDDEN, 1, true).unwrap(),
            Layout::new(Format::Int8, HIDDEN, INNER, 8, false).unwrap(),
        );
        let parts: Vec<_> = (0..EXPERTS)
            .map(|_| Part {
                layouts,
                bytes: (
                    packed(&cpu, &layouts.0, &random(&mut rng, 2 * INNER * HIDDEN)),
                    packed(&cpu, &layouts.1, &random(&mut rng, HIDDEN * INNER)),
                ),
            })
            .collect();
        let x = random(&mut rng, TOKENS * HIDDEN);
        // The last expert is nobody's choice.
        let mut logits = random(&mut rng, TOKENS * EXPERTS);
        logits
            .chunks_mut(EXPERTS)
            .for_each(|row| row[EXPERTS - 1] = bf16::NEG_INFINITY);
        let run = |cpu: &mut Cpu, parts: &[Part], among: Among| {
            let experts: Vec<_> = parts.iter().map(Part::expert).collect();
            let mut out = vec![bf16::NAN; x.len()];
            mix(
                cpu,
                &mut Workspace::default(),
                Rows::of(&x, HIDDEN),
                Rows::of(&logits, EXPERTS),
                &experts,
                among,
                TOP,
                true,
                RowsMut::of(&mut out, HIDDEN),
            )
            .unwrap();
            out
        };
        let expected = run(&mut cpu, &parts, Among::Nobody);
        for ranks in [2, 4] {
            let sizes = Sizes {
                ranks,
                letter_bytes: 0,
                slot_bytes: TOKENS * TOP * HIDDEN * 4,
            };
            let found = on_ranks(sizes, |ranks| {
                let mut cpu = Cpu::new(1, 0).unwrap();
                let (rank, count) = (ranks.rank(), ranks.count());
                let mine: Vec<_> = parts
                    .iter()
                    .map(|part| part.divided(&cpu, rank, count))
                    .collect();
                let inner = run(&mut cpu, &mine, Among::Inner(ranks));
                let each = EXPERTS / count;
                let mine = &parts[rank * each..(rank + 1) * each];
                (inner, run(&mut cpu, mine, Among::Experts(ranks)))
            });
            for (inner, whole) in found {
                assert!(inner == expected && whole == expected, "{ranks} ranks");
            }
        }
    }
}
