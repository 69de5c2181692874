//! Draws without logits are those with logits.

use half::bf16;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::{Draw, draw, draw_likely, row_key};
use crate::cpu::Cpu;
use crate::level::Level;
use crate::linear::{self, Format, Layout, Output, Packed, Shortlist};
use crate::rows::{Rows, RowsMut};
use crate::scratch::Scratch;

const K: usize = 64;

/// What both give for every row of `x`, by `draws`.
fn both(
    cpu: &mut Cpu,
    format: Format,
    weight: &[bf16],
    x: &[bf16],
    draws: &[Draw],
) -> [Vec<Option<u32>>; 2] {
    let n = weight.len() / K;
    let layout = Layout::new(format, n, K, 1, false).unwrap();
    let mut scratch = Scratch::default();
    let [bytes] = scratch.parts([layout.bytes()]);
    linear::pack(cpu, &layout, Rows::of(weight, K), bytes);
    let (weight, x) = (Packed::new(layout, bytes).unwrap(), Rows::of(x, K));
    let mut logits = vec![0.0; draws.len() * n];
    let out = Output::F32(RowsMut::of(&mut logits, n));
    linear::linear(cpu, x, &weight, None, out);
    let mut tokens = [vec![Some(7); draws.len()], vec![None; draws.len()]];
    draw(cpu, Rows::of(&logits, n), draws, &mut tokens[0]);
    draw_likely(cpu, x, &weight, draws, &mut tokens[1]);
    tokens
}

/// Every combination that may be drawn without logits.
fn draws() -> Vec<Draw> {
    let mut found = Vec::new();
    for top_k in [1, 2, 20, Shortlist::MOST] {
        for temperature in [0.0, 0.3, 1.0, 4.0] {
            for top_p in [0.0, 0.3, 0.9, 1.0] {
                for min_p in [0.0, 0.2] {
                    found.push(Draw {
                        temperature,
                        top_k,
                        top_p,
                        min_p,
                        key: row_key(3, 0, found.len() as u64),
                    });
                }
            }
        }
    }
    found
}

fn numbers(random: &mut StdRng, count: usize) -> Vec<bf16> {
    (0..count)
        .map(|_| bf16::from_f32(random.random_range(-1.0..1.0)))
        .collect()
}

fn cpus() -> Vec<Cpu> {
    Level::available()
        .into_iter()
        .map(|level| Cpu::at_level(level, 3, 0).unwrap())
        .collect()
}

#[test]
fn tokens_are_those_of_written_logits() {
    let mut random = StdRng::seed_from_u64(5);
    let draws = draws();
    for format in [
        Format::Bf16,
        Format::Int8,
        Format::Int4 {
            group: 32,
            zeros: false,
        },
    ] {
        for (n, apart) in [
            (5, 5),
            (900, 900),
            (3000, 3000),
            (3000, 1500),
            (3000, 8),
            (64, 1),
        ] {
            let mut weight = numbers(&mut random, n * K);
            for row in apart..n {
                weight.copy_within((row % apart) * K..(row % apart + 1) * K, row * K);
            }
            let mut x = numbers(&mut random, draws.len() * K);
            x[4 * K..5 * K].fill(bf16::ZERO);
            x[6 * K + 3] = bf16::NAN;
            for mut cpu in cpus() {
                let [right, found] = both(&mut cpu, format, &weight, &x, &draws);
                assert_eq!(found, right, "{format:?}, {n} logits, {apart} apart");
                assert_eq!(right[6], None);
            }
        }
    }
}

#[test]
fn scores_that_only_scaling_makes_equal_are_not_ties() {
    let mut random = StdRng::seed_from_u64(7);
    // A column of ones beside numbers of 1e-3: logits a few units in the last place apart, far
    // below one that makes differences to it coarse.
    let n = 600;
    let mut weight = vec![bf16::ZERO; n * K];
    for (row, weight) in weight.chunks_exact_mut(K).enumerate() {
        weight[0] = if row == 5 {
            bf16::from_f32(300.0)
        } else {
            bf16::ONE
        };
        weight[1] = bf16::from_f32(random.random_range(-1.0..1.0) * 2_f32.powi(-16));
    }
    let draws: Vec<Draw> = (0..200)
        .map(|index| Draw {
            temperature: 1000.0,
            top_k: 1 + index % Shortlist::MOST,
            top_p: if index % 2 == 0 { 1.0 } else { 0.7 },
            min_p: 0.0,
            key: row_key(4, 0, index as u64),
        })
        .collect();
    let mut x = vec![bf16::ZERO; draws.len() * K];
    x.chunks_exact_mut(K).for_each(|x| x[..2].fill(bf16::ONE));
    for mut cpu in cpus() {
        let [right, found] = both(&mut cpu, Format::Bf16, &weight, &x, &draws);
        assert_eq!(found, right);
    }
}

#[test]
fn a_row_that_is_not_finite_has_no_token_and_others_keep_theirs() {
    let mut random = StdRng::seed_from_u64(6);
    let weight = numbers(&mut random, 700 * K);
    let draws = draws();
    let clean = numbers(&mut random, draws.len() * K);
    for bad in [bf16::NAN, bf16::INFINITY, bf16::NEG_INFINITY] {
        let mut x = clean.clone();
        x[9 * K] = bad;
        for mut cpu in cpus() {
            let of_clean = both(&mut cpu, Format::Bf16, &weight, &clean, &draws)[1].clone();
            let [right, found] = both(&mut cpu, Format::Bf16, &weight, &x, &draws);
            assert_eq!(found[9], None);
            assert_eq!(found, right);
            assert_eq!(found[..9], of_clean[..9]);
            assert_eq!(found[10..], of_clean[10..]);
        }
    }
}

#[test]
fn lists_say_which_draws_they_are_enough_for() {
    let of = |temperature, top_k| {
        Draw {
            temperature,
            top_k,
            top_p: 0.5,
            min_p: 0.0,
            key: 0,
        }
        .logits_needed()
    };
    assert_eq!(
        [of(0.0, 0), of(0.0, 9), of(1.0, 9)],
        [Some(1), Some(1), Some(9)]
    );
    assert_eq!([of(1.0, 0), of(1.0, Shortlist::MOST + 1)], [None, None]);
}
