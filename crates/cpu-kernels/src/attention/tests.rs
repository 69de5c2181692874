use half::bf16;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::cpu::Cpu;
use crate::level::Level;
use crate::rows::{Rows, RowsMut};

/// One sequence's queries, keys and values, each [tokens][heads or kv heads][head_dim].
struct Sequence {
    query: Vec<bf16>,
    key: Vec<bf16>,
    value: Vec<bf16>,
    tokens: usize,
}

#[derive(Clone, Copy)]
struct Shape {
    group: usize,
    layout: KvLayout,
    scoring: Scoring,
}

impl Shape {
    fn new(group: usize, kv_heads: usize, dim: usize, dtype: KvType) -> Self {
        let layout = KvLayout::new(16, kv_heads, dim, dtype).unwrap();
        let scale = (dim as f32).sqrt().recip();
        Self {
            group,
            layout,
            scoring: Scoring {
                scale,
                window: None,
                softcap: None,
            },
        }
    }

    fn query_cols(&self) -> usize {
        self.group * self.layout.kv_heads() * self.layout.head_dim()
    }

    fn kv_cols(&self) -> usize {
        self.layout.kv_heads() * self.layout.head_dim()
    }

    fn sequence(&self, tokens: usize, size: f32, random: &mut StdRng) -> Sequence {
        let mut numbers = |cols: usize| -> Vec<bf16> {
            let any = |_| bf16::from_f32(random.random_range(-size..size));
            (0..tokens * cols).map(any).collect()
        };
        let (query, kv) = (self.query_cols(), self.kv_cols());
        Sequence {
            query: numbers(query),
            key: numbers(kv),
            value: numbers(kv),
            tokens,
        }
    }
}

/// What every row of every sequence gets, when step i computes `steps[i][s]` tokens of sequence s.
///
/// Memory that nothing was stored in holds NaN.
fn outputs(cpu: &mut Cpu, shape: &Shape, of: &[Sequence], steps: &[Vec<usize>]) -> Vec<Vec<bf16>> {
    let block_tokens = shape.layout.block_tokens();
    let blocks_each = of
        .iter()
        .map(|s| s.tokens.div_ceil(block_tokens))
        .max()
        .unwrap_or(0);
    let blocks = blocks_each * of.len() + 1;
    let mut memory = vec![u32::MAX; blocks * shape.layout.bytes_per_block() / 4];
    // SAFETY: the vector is as long, and lives as long.
    let mut cache = unsafe { Cache::from_raw(shape.layout, memory.as_mut_ptr().cast(), blocks) };
    // Blocks of a sequence are neither neighbours nor in order.
    let block = |s: usize, i: usize| ((blocks_each - 1 - i) * of.len() + s) as i32;
    let tables: Vec<i32> = (0..of.len())
        .flat_map(|s| (0..blocks_each).map(move |i| block(s, i)))
        .collect();
    let (query_cols, kv_cols) = (shape.query_cols(), shape.kv_cols());
    let cols = query_cols + 2 * kv_cols;
    let mut done = vec![0; of.len()];
    let mut found: Vec<Vec<bf16>> = of.iter().map(|_| Vec::new()).collect();
    for counts in steps {
        let mut spans = Vec::new();
        let mut qkv = Vec::new();
        for (s, &count) in counts.iter().enumerate().filter(|&(_, &count)| count > 0) {
            let first_row = qkv.len() / cols;
            spans.push(Span {
                first_row,
                start: done[s],
                count,
                table_first: s * blocks_each,
            });
            for token in done[s]..done[s] + count {
                qkv.extend_from_slice(&of[s].query[token * query_cols..][..query_cols]);
                qkv.extend_from_slice(&of[s].key[token * kv_cols..][..kv_cols]);
                qkv.extend_from_slice(&of[s].value[token * kv_cols..][..kv_cols]);
            }
        }
        let rows = qkv.len() / cols;
        let batch = Batch::new(&spans, &tables, block_tokens, blocks).unwrap();
        let still = [1.0, 0.0].repeat(rows);
        let angles = Rows::of(&still, 2);
        store(
            cpu,
            RowsMut::of(&mut qkv, cols),
            None,
            angles,
            &mut cache,
            &batch,
        );
        let mut out = vec![bf16::NAN; rows * query_cols];
        // SAFETY: queries are the first columns of every row.
        let query = unsafe { Rows::from_raw(qkv.as_ptr(), rows, query_cols, cols) };
        attend(
            cpu,
            query,
            &cache,
            &batch,
            shape.scoring,
            RowsMut::of(&mut out, query_cols),
        );
        for (s, &count) in counts.iter().enumerate() {
            found[s].extend(out.drain(..count * query_cols));
            done[s] += count;
        }
    }
    found
}

/// The same of one sequence, in f64.
fn reference(shape: &Shape, of: &Sequence) -> Vec<f64> {
    let (dim, group) = (shape.layout.head_dim(), shape.group);
    let (query_cols, kv_cols) = (shape.query_cols(), shape.kv_cols());
    let mut out = vec![0.0; of.tokens * query_cols];
    for token in 0..of.tokens {
        let first = shape
            .scoring
            .window
            .map_or(0, |window| (token + 1).saturating_sub(window));
        for head in 0..group * shape.layout.kv_heads() {
            let query = &of.query[token * query_cols + head * dim..][..dim];
            let at = |token: usize| token * kv_cols + head / group * dim;
            let score = |key: usize| -> f64 {
                let pairs = query.iter().zip(&of.key[at(key)..][..dim]);
                let product: f64 = pairs.map(|(q, k)| q.to_f64() * k.to_f64()).sum();
                let score = product * f64::from(shape.scoring.scale);
                match shape.scoring.softcap.map(f64::from) {
                    Some(cap) => cap * (score / cap).tanh(),
                    None => score,
                }
            };
            let scores: Vec<f64> = (first..=token).map(score).collect();
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
            let total: f64 = weights.iter().sum();
            for (key, weight) in (first..=token).zip(weights) {
                for d in 0..dim {
                    out[token * query_cols + head * dim + d] +=
                        weight / total * of.value[at(key) + d].to_f64();
                }
            }
        }
    }
    out
}

fn largest_error(found: &[bf16], right: &[f64]) -> f64 {
    assert_eq!(found.len(), right.len());
    let errors = found
        .iter()
        .zip(right)
        .map(|(found, right)| (found.to_f64() - right).abs());
    // A comparison with NaN is false: it counts as the largest of all.
    errors.fold(0.0, |most, error| if error <= most { most } else { error })
}

fn all_at_once(of: &[Sequence]) -> Vec<Vec<usize>> {
    vec![of.iter().map(|s| s.tokens).collect()]
}

#[test]
fn the_longest_head_of_the_largest_numbers_does_not_overflow() {
    for level in Level::available() {
        let mut cpu = Cpu::at_level(level, 1, 0).unwrap();
        for dim in [512, 1024] {
            let shape = Shape::new(1, 1, dim, KvType::Int8);
            let both =
                |a: f32, b: f32| [vec![bf16::from_f32(a); dim], vec![bf16::from_f32(b); dim]];
            let of = [Sequence {
                query: both(2.0, 2.0).concat(),
                key: both(2.0, -2.0).concat(),
                value: both(3.0, -5.0).concat(),
                tokens: 2,
            }];
            let found = outputs(&mut cpu, &shape, &of, &all_at_once(&of));
            assert!(
                found[0].iter().all(|x| (x.to_f32() - 3.0).abs() < 0.02),
                "{level}, {dim}"
            );
        }
    }
}

#[test]
fn every_row_is_close_to_the_reference() {
    let mut random = StdRng::seed_from_u64(1);
    for level in Level::available() {
        let mut cpu = Cpu::at_level(level, 2, 0).unwrap();
        for (group, kv_heads, dim) in [(2, 2, 128), (1, 3, 64), (3, 1, 96), (7, 1, 16), (2, 1, 18)]
        {
            for (dtype, close) in [(KvType::Bf16, 0.012), (KvType::Int8, 0.03)] {
                for (window, softcap) in [(None, None), (Some(37), None), (None, Some(3.0))] {
                    let mut shape = Shape::new(group, kv_heads, dim, dtype);
                    shape.scoring = Scoring {
                        window,
                        softcap,
                        ..shape.scoring
                    };
                    let of = [1, 16, 75].map(|tokens| shape.sequence(tokens, 2.0, &mut random));
                    let found = outputs(&mut cpu, &shape, &of, &all_at_once(&of));
                    for (found, of) in found.iter().zip(&of) {
                        let error = largest_error(found, &reference(&shape, of));
                        let what = format!("{level} {dtype:?} {dim} {window:?} {softcap:?}");
                        assert!(error < close, "{what}: {error}");
                    }
                }
            }
        }
    }
}

#[test]
fn long_sequences_are_close_to_the_reference() {
    let mut random = StdRng::seed_from_u64(2);
    let shape = Shape::new(2, 1, 32, KvType::Bf16);
    let of = [shape.sequence(1300, 3.0, &mut random)];
    let right = reference(&shape, &of[0]);
    for level in Level::available() {
        let mut cpu = Cpu::at_level(level, 2, 0).unwrap();
        let found = outputs(&mut cpu, &shape, &of, &all_at_once(&of));
        let error = largest_error(&found[0], &right);
        assert!(error < 0.02, "{level}: {error}");
    }
}

#[test]
fn rows_of_one_group_may_begin_to_see_behind_a_tile_that_others_see() {
    let mut random = StdRng::seed_from_u64(6);
    for level in Level::available() {
        let mut cpu = Cpu::at_level(level, 1, 0).unwrap();
        for (dtype, close) in [(KvType::Bf16, 0.02), (KvType::Int8, 0.03)] {
            let mut shape = Shape::new(1, 1, 32, dtype);
            shape.scoring.window = Some(40);
            let of = [shape.sequence(150, 2.0, &mut random)];
            let found = outputs(&mut cpu, &shape, &of, &all_at_once(&of));
            let error = largest_error(&found[0], &reference(&shape, &of[0]));
            assert!(error < close, "{level} {dtype:?}: {error}");
        }
    }
}

#[test]
fn bits_depend_neither_on_chunks_nor_on_neighbours_nor_on_threads() {
    let mut random = StdRng::seed_from_u64(3);
    for level in Level::available() {
        for (dim, dtype, window, tokens) in [
            (16, KvType::Bf16, None, 1100),
            (16, KvType::Int8, Some(600), 1100),
            (18, KvType::Bf16, Some(100), 300),
            (64, KvType::Bf16, Some(70), 300),
        ] {
            let mut shape = Shape::new(3, 2, dim, dtype);
            shape.scoring.window = window;
            let of = [tokens, 40, 131].map(|tokens| shape.sequence(tokens, 4.0, &mut random));
            let mut alone = Cpu::at_level(level, 1, 0).unwrap();
            let whole = outputs(&mut alone, &shape, &of, &all_at_once(&of));
            let mut steps: Vec<Vec<usize>> = Vec::new();
            let mut left = of.each_ref().map(|s| s.tokens);
            while left.iter().any(|&left| left > 0) {
                let counts = left.each_mut().map(|left| {
                    let most = [1, 2, 5, 21, 22, 130][random.random_range(0..6)];
                    let count = random.random_range(0..=most).min(*left);
                    *left -= count;
                    count
                });
                steps.push(counts.to_vec());
            }
            let mut three = Cpu::at_level(level, 3, 0).unwrap();
            let chunked = outputs(&mut three, &shape, &of, &steps);
            assert!(whole == chunked, "{level} {dim} {dtype:?} {window:?}");
        }
    }
}

#[test]
fn large_scores_and_one_certain_key_do_not_overflow() {
    let mut random = StdRng::seed_from_u64(4);
    for level in Level::available() {
        let mut cpu = Cpu::at_level(level, 1, 0).unwrap();
        let shape = Shape::new(1, 1, 16, KvType::Bf16);
        let of = [shape.sequence(100, 1e4, &mut random)];
        let found = outputs(&mut cpu, &shape, &of, &all_at_once(&of));
        let error = largest_error(&found[0], &reference(&shape, &of[0]));
        assert!(error < 40.0, "{level}: {error}");
    }
}

#[test]
fn an_empty_step_does_nothing() {
    let mut cpu = Cpu::new(2, 0).unwrap();
    let shape = Shape::new(2, 2, 16, KvType::Bf16);
    assert!(outputs(&mut cpu, &shape, &[], &[vec![]]).is_empty());
}

#[test]
fn norms_and_rotary_are_applied_before_storing() {
    let mut random = StdRng::seed_from_u64(5);
    let (dim, turned, group) = (32, 16, 2);
    for level in Level::available() {
        let cpu = Cpu::at_level(level, 2, 0).unwrap();
        let layout = KvLayout::new(16, 1, dim, KvType::Bf16).unwrap();
        let mut any = |n: usize| -> Vec<bf16> {
            (0..n)
                .map(|_| bf16::from_f32(random.random_range(-2.0..2.0)))
                .collect()
        };
        let (query_weight, key_weight) = (any(dim), any(dim));
        let mut qkv = any((group + 2) * dim);
        let before = qkv.clone();
        let angles: Vec<f32> = (0..turned / 2)
            .map(|i| (i as f32).cos())
            .chain((0..turned / 2).map(|i| (i as f32).sin()))
            .collect();
        let mut memory = vec![0_u32; layout.bytes_per_block() / 4];
        // SAFETY: the vector is as long, and lives as long.
        let mut cache = unsafe { Cache::from_raw(layout, memory.as_mut_ptr().cast(), 1) };
        let spans = [Span {
            first_row: 0,
            start: 3,
            count: 1,
            table_first: 0,
        }];
        let batch = Batch::new(&spans, &[0], 16, 1).unwrap();
        let norms = HeadNorms {
            query: &query_weight,
            key: &key_weight,
            eps: 1e-6,
        };
        let rows = RowsMut::of(&mut qkv, (group + 2) * dim);
        store(
            &cpu,
            rows,
            Some(norms),
            Rows::of(&angles, turned),
            &mut cache,
            &batch,
        );
        let right = |head: usize, weight: &[bf16]| -> Vec<f64> {
            let x: Vec<f64> = before[head * dim..][..dim]
                .iter()
                .map(|x| x.to_f64())
                .collect();
            let mean = x.iter().map(|x| x * x).sum::<f64>() / dim as f64;
            let scaled = x.iter().zip(weight);
            let mut x: Vec<f64> = scaled
                .map(|(x, w)| x / (mean + 1e-6).sqrt() * w.to_f64())
                .collect();
            for i in 0..turned / 2 {
                let (a, b) = (x[i], x[i + turned / 2]);
                let (cos, sin) = ((i as f64).cos(), (i as f64).sin());
                x[i] = a * cos - b * sin;
                x[i + turned / 2] = b * cos + a * sin;
            }
            x
        };
        for head in 0..group {
            let error = largest_error(&qkv[head * dim..][..dim], &right(head, &query_weight));
            assert!(error < 0.04, "{level} query {head}: {error}");
        }
        let half = |i: usize| {
            let pair = memory[i / 2];
            bf16::from_bits(if i.is_multiple_of(2) {
                pair as u16
            } else {
                (pair >> 16) as u16
            })
        };
        let key: Vec<bf16> = (0..dim)
            .map(|d| half((d / 2 * 16 + 3) * 2 + d % 2))
            .collect();
        assert!(
            largest_error(&key, &right(group, &key_weight)) < 0.04,
            "{level} key"
        );
        let value: Vec<bf16> = (0..dim)
            .map(|d| half(16 * dim + (dim + d) * 2 + 1))
            .collect();
        assert_eq!(value, before[(group + 1) * dim..], "{level} value");
        assert_eq!(
            qkv[group * dim..],
            before[group * dim..],
            "keys and values stay as they were"
        );
    }
}
