use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::noise::{bits, gumbel};
use super::*;
use crate::cpu::Cpu;
use crate::level::Level;
use crate::rows::Rows;

const PLAIN: Draw = Draw {
    temperature: 1.0,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
    key: 0,
};

fn cpus() -> Vec<Cpu> {
    Level::available()
        .into_iter()
        .map(|level| Cpu::at_level(level, 2, 0).unwrap())
        .collect()
}

fn drawn(cpu: &mut Cpu, scores: &[f32], vocab: usize, rows: &[Draw]) -> Vec<Option<u32>> {
    let mut tokens = vec![None; rows.len()];
    draw(cpu, Rows::of(scores, vocab), rows, &mut tokens);
    tokens
}

/// What `truncated` does, by sorting everything: the ids that are kept.
fn kept(scores: &[f32], draw: &Draw) -> Vec<usize> {
    let best = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // Zeros of either sign are equal.
    let scaled = |id: &usize| f64::from((scores[*id] - best) / draw.temperature as f32) + 0.0;
    let mut ids: Vec<usize> = (0..scores.len()).collect();
    ids.sort_by(|a, b| scaled(b).total_cmp(&scaled(a)));
    if draw.top_k > 0 && draw.top_k < ids.len() {
        let mut falling: Vec<f32> = scores.to_vec();
        falling.sort_by(|a, b| b.total_cmp(a));
        ids.retain(|id| scores[*id] >= falling[draw.top_k - 1]);
    }
    let total: f64 = ids.iter().map(|id| scaled(id).exp()).sum();
    let mut before = 0.0;
    let first = ids[0];
    ids.retain(|id| {
        let reached = draw.top_p >= 1.0 || before < draw.top_p * total;
        before += scaled(id).exp();
        *id == first || (reached && scaled(id) >= draw.min_p.ln())
    });
    ids
}

fn chosen(scores: &[f32], draw: &Draw) -> usize {
    let best = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let noisy = |id: &usize| {
        let scaled = f64::from((scores[*id] - best) / draw.temperature as f32);
        scaled + gumbel(bits(draw.key, *id as u64 + (1 << 40)))
    };
    let kept = kept(scores, draw);
    *kept
        .iter()
        .max_by(|a, b| noisy(a).total_cmp(&noisy(b)))
        .unwrap()
}

#[test]
fn truncated_rows_get_what_sorting_everything_gives() {
    let mut random = StdRng::seed_from_u64(1);
    for vocab in [1, 7, 64, 700, 5000] {
        for spread in [0.0, 0.01, 1.0, 8.0, 60.0] {
            // Coarse scores make ties.
            let score = |x: f32| {
                if vocab == 700 {
                    (x * 4.0).round() / 4.0
                } else {
                    x
                }
            };
            let mut number = || score(random.random_range(-1.0_f32..=1.0) * spread);
            let mut scores = Vec::new();
            let mut rows = Vec::new();
            for (row, top_k) in [0, 1, 2, 50, 300, 9999].into_iter().enumerate() {
                for (other, top_p) in [0.0, 0.1, 0.7, 0.999, 1.0].into_iter().enumerate() {
                    for min_p in [0.0, 0.3] {
                        let key = row_key(spread.to_bits().into(), row as u64, other as u64);
                        let temperature = [0.3, 1.0, 1.7][other % 3];
                        scores.extend((0..vocab).map(|_| number()));
                        rows.push(Draw {
                            temperature,
                            top_k,
                            top_p,
                            min_p,
                            key,
                        });
                    }
                }
            }
            // Without any of the three the other form of noise is used.
            let cut = |draw: &Draw| draw.top_k > 0 || draw.top_p < 1.0 || draw.min_p > 0.0;
            for mut cpu in cpus() {
                let found = drawn(&mut cpu, &scores, vocab, &rows);
                for (row, draw) in rows.iter().enumerate().filter(|(_, draw)| cut(draw)) {
                    let right = chosen(&scores[row * vocab..][..vocab], draw) as u32;
                    assert_eq!(found[row], Some(right), "{vocab} {spread} {draw:?}");
                }
            }
        }
    }
}

#[test]
fn untruncated_rows_draw_each_id_as_often_as_its_probability() {
    let vocab = 1100;
    let scores: Vec<f32> = (0..vocab)
        .map(|id| if id % 550 == 7 { 7.0 } else { 0.0 })
        .collect();
    let rows: Vec<Draw> = (0..4000)
        .map(|index| Draw {
            key: row_key(5, 0, index),
            ..PLAIN
        })
        .collect();
    let all = scores.repeat(rows.len());
    for mut cpu in cpus() {
        let found = drawn(&mut cpu, &all, vocab, &rows);
        let of = |id: u32| found.iter().filter(|&&found| found == Some(id)).count() as f64;
        let each = 7_f64.exp() / (2.0 * 7_f64.exp() + 1098.0) * rows.len() as f64;
        for id in [7, 557] {
            assert!(
                (of(id) - each).abs() < 5.0 * each.sqrt(),
                "{id}: {} not {each}",
                of(id)
            );
        }
        assert!(
            found.iter().flatten().any(|&id| id > 1024),
            "the last group too"
        );
    }
}

#[test]
fn greedy_rows_take_the_lowest_id_of_the_largest() {
    for mut cpu in cpus() {
        for vocab in [1, 63, 64, 65, 1000] {
            for place in [0, vocab / 2, vocab - 1] {
                let mut scores = vec![-3.0; vocab];
                scores[place..].fill(f32::NEG_INFINITY);
                scores[place] = -1.0;
                scores[vocab - 1] = -1.0;
                let greedy = Draw {
                    temperature: 0.0,
                    ..PLAIN
                };
                assert_eq!(
                    drawn(&mut cpu, &scores, vocab, &[greedy]),
                    [Some(place as u32)]
                );
            }
        }
    }
}

#[test]
fn rows_without_a_finite_largest_score_have_no_token() {
    for mut cpu in cpus() {
        for bad in [f32::NAN, f32::INFINITY] {
            for place in [0, 99] {
                let mut scores = vec![1.0; 200];
                scores[place] = bad;
                assert_eq!(drawn(&mut cpu, &scores, 100, &[PLAIN, PLAIN])[0], None);
                assert!(drawn(&mut cpu, &scores, 100, &[PLAIN, PLAIN])[1].is_some());
            }
        }
        let nothing = [f32::NEG_INFINITY; 100];
        assert_eq!(drawn(&mut cpu, &nothing, 100, &[PLAIN]), [None]);
        assert_eq!(drawn(&mut cpu, &[], 100, &[]), []);
    }
}

#[test]
fn ids_that_are_masked_are_never_drawn() {
    for mut cpu in cpus() {
        let mut scores = vec![f32::NEG_INFINITY; 2000];
        scores[1234] = 5.0;
        let cut = Draw {
            top_p: 0.9,
            ..PLAIN
        };
        let few = Draw { top_k: 10, ..PLAIN };
        for draw in [PLAIN, cut, few] {
            assert_eq!(
                drawn(&mut cpu, &scores, 2000, &[draw]),
                [Some(1234)],
                "{draw:?}"
            );
        }
    }
}

#[test]
fn logprobs_are_of_the_softmax_with_ranks_and_alternatives() {
    let mut random = StdRng::seed_from_u64(2);
    let vocab = 777;
    let mut scores: Vec<f32> = (0..3 * vocab)
        .map(|_| random.random_range(-9.0..9.0))
        .collect();
    scores[5] = f32::NEG_INFINITY;
    for mut cpu in cpus() {
        let mut found = vec![TokenLogprobs::default(); 3];
        let tokens = [5, 100, 776];
        logprobs(
            &mut cpu,
            Rows::of(&scores, vocab),
            &tokens,
            &[0, 20, 1000],
            &mut found,
        );
        assert_eq!((found[0].logprob, found[0].rank), (-9999.0, vocab as u32));
        for (row, found) in found.iter().enumerate() {
            let scores = &scores[row * vocab..][..vocab];
            let total: f64 = scores.iter().map(|&x| f64::from(x).exp()).sum();
            let right = |id: u32| f64::from(scores[id as usize]) - total.ln();
            if row > 0 {
                assert!((f64::from(found.logprob) - right(tokens[row])).abs() < 1e-5);
            }
            let mut order: Vec<u32> = (0..vocab as u32).collect();
            order.sort_by(|a, b| scores[*b as usize].total_cmp(&scores[*a as usize]));
            assert_eq!(found.ids, order[..[0, 20, vocab][row]]);
            let place = order.iter().position(|&id| id == tokens[row]).unwrap();
            assert_eq!(found.rank as usize, place + 1);
            for (&id, &logprob) in found.ids.iter().zip(&found.logprobs) {
                assert!((f64::from(logprob) - right(id)).abs() < 1e-5);
            }
        }
    }
}
