//! A weight divided over ranks gives the bits of the whole one.

use std::ops::Range;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::tests::{FORMATS, pack_any};
use super::*;
use crate::ranks::Sizes;
use crate::ranks::tests::on_ranks;
use crate::rows::Rows;
use crate::scratch::Scratch;

const ROWS: usize = 15;

fn one(range: Range<usize>) -> Vec<Range<usize>> {
    vec![range]
}

fn random(count: usize) -> Vec<bf16> {
    let mut rng = StdRng::seed_from_u64(3);
    (0..count)
        .map(|_| bf16::from_f32(rng.random_range(-1.0..1.0)))
        .collect()
}

fn with_packed<T>(cpu: &Cpu, layout: Layout, body: impl FnOnce(&Packed) -> T) -> T {
    let mut scratch = Scratch::default();
    let [bytes] = scratch.parts([layout.bytes()]);
    let weight = random(layout.n() * layout.k());
    pack_any(cpu, &layout, Rows::of(&weight, layout.k()), bytes);
    body(&Packed::new(layout, bytes).unwrap())
}

fn product_of(cpu: &mut Cpu, x: Rows<bf16>, weight: &Packed, bias: Option<&[bf16]>) -> Vec<bf16> {
    let columns = weight.layout().columns();
    let mut out = vec![bf16::NAN; x.rows() * columns];
    let rows = RowsMut::of(&mut out, columns);
    let out_rows = if weight.layout().gated() {
        Output::SiluMul(rows)
    } else {
        Output::Bf16(rows)
    };
    linear(cpu, x, weight, bias, out_rows);
    out
}

#[test]
fn groups_of_several_ranks_add_up_to_the_bits_of_one() {
    let (n, k) = (70, 512);
    let (x, bias) = (random(ROWS * k), random(n));
    for level in Level::available() {
        for format in FORMATS {
            let mut cpu = Cpu::at_level(level, 1, 0).unwrap();
            let layout = Layout::new(format, n, k, 8, false).unwrap();
            with_packed(&Cpu::new(1, 0).unwrap(), layout, |weight| {
                let whole = product_of(&mut cpu, Rows::of(&x, k), weight, Some(&bias));
                for ranks in [1, 2, 4, 8] {
                    let sizes = Sizes {
                        ranks,
                        letter_bytes: 0,
                        slot_bytes: ROWS * n * 4,
                    };
                    let found = on_ranks(sizes, |ranks| {
                        let mut cpu = Cpu::at_level(level, 2, 0).unwrap();
                        let groups = 8 / ranks.count();
                        let first = ranks.rank() * groups;
                        let mine = weight.groups(first, first + groups).unwrap();
                        let width = mine.layout().k();
                        let start = x[ranks.rank() * width..].as_ptr();
                        // SAFETY: columns `rank * width ..` of rows of k.
                        let x = unsafe { Rows::from_raw(start, ROWS, width, k) };
                        let mut out = vec![bf16::NAN; ROWS * n];
                        let to = Output::Bf16(RowsMut::of(&mut out, n));
                        reduced(&mut cpu, ranks, x, &mine, Some(&bias), to).unwrap();
                        out
                    });
                    assert!(
                        found.iter().all(|found| *found == whole),
                        "{format:?} {ranks}"
                    );
                }
            });
        }
    }
}

#[test]
fn selected_rows_are_rows_of_the_whole() {
    let (n, k) = (100, 70);
    let x = random(ROWS * k);
    let pieces = [
        one(32..96),
        one(64..100),
        vec![5..9, 0..5, 40..77],
        one(99..100),
    ];
    for format in FORMATS {
        let mut cpu = Cpu::new(2, 0).unwrap();
        let layout = Layout::new(format, n, k, 1, false).unwrap();
        with_packed(&Cpu::new(1, 0).unwrap(), layout, |weight| {
            let whole = product_of(&mut cpu, Rows::of(&x, k), weight, None);
            for ranges in &pieces {
                let chosen: Vec<usize> = ranges.iter().cloned().flatten().collect();
                let mut scratch = Scratch::default();
                let to = selected(&layout, ranges).unwrap();
                let [bytes] = scratch.parts([to.bytes()]);
                select(&cpu, weight, ranges, bytes).unwrap();
                let part = Packed::new(to, bytes).unwrap();
                let found = product_of(&mut cpu, Rows::of(&x, k), &part, None);
                for (found, whole) in found.chunks(chosen.len()).zip(whole.chunks(n)) {
                    let expected: Vec<_> = chosen.iter().map(|&row| whole[row]).collect();
                    assert_eq!(found, expected, "{format:?} {ranges:?}");
                }
            }
        });
    }
}

#[test]
fn selected_rows_of_gate_and_up_are_columns_of_the_whole() {
    let (columns, k) = (72, 64);
    let x = random(ROWS * k);
    for format in FORMATS {
        let mut cpu = Cpu::new(1, 0).unwrap();
        let layout = Layout::new(format, 2 * columns, k, 1, true).unwrap();
        with_packed(&Cpu::new(1, 0).unwrap(), layout, |weight| {
            let whole = product_of(&mut cpu, Rows::of(&x, k), weight, None);
            for part in [0..18, 18..36, 32..72] {
                let up = part.start + columns..part.end + columns;
                let ranges = [part.clone(), up];
                let to = selected(&layout, &ranges).unwrap();
                let mut scratch = Scratch::default();
                let [bytes] = scratch.parts([to.bytes()]);
                select(&cpu, weight, &ranges, bytes).unwrap();
                let selected = Packed::new(to, bytes).unwrap();
                let found = product_of(&mut cpu, Rows::of(&x, k), &selected, None);
                for (found, whole) in found.chunks(part.len()).zip(whole.chunks(columns)) {
                    assert_eq!(found, &whole[part.clone()], "{format:?} {part:?}");
                }
            }
        });
    }
}

#[test]
fn rows_that_are_not_there_are_refused() {
    let layout = Layout::new(Format::Int8, 64, 64, 1, false).unwrap();
    assert!(selected(&layout, &one(0..65)).is_err());
    assert!(selected(&layout, &one(5..5)).is_err());
    assert!(selected(&layout, &[]).is_err());
    let groups = Layout::new(Format::Int8, 64, 64, 8, false).unwrap();
    assert!(selected(&groups, &one(0..32)).is_err());
}
