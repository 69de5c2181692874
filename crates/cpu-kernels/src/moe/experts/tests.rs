//! Experts against a reference, alone, together and on several ranks.

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
        let dot =
            |a: &[f64], row: &[bf16]| -> f64 { a.iter().zip(row).map(|(a, b)| a * wide(b)).sum() };
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
