//! Products at their edges: numbers that are none, tiny or huge, the longest sums, equal logits, sizes refused.

use super::tests::{Aligned, FORMATS, Operands, cpus, plain};
use super::*;
use crate::rows::Rows;

#[test]
fn what_is_not_finite_stays_in_its_row() {
    for format in FORMATS {
        for bad in [bf16::NAN, bf16::INFINITY, bf16::NEG_INFINITY] {
            for mut cpu in cpus() {
                let case = plain(format, 20, 40, 128, 8);
                let mut operands = Operands::normal(&case);
                let clean = operands.run(&case, &mut cpu, true);
                operands.x[7 * 128 + 100] = bad;
                let found = operands.run(&case, &mut cpu, true);
                for row in 0..20 {
                    let (found, clean) = (&found[row * 40..][..40], &clean[row * 40..][..40]);
                    if row == 7 {
                        assert!(found.iter().all(|x| !x.is_finite()));
                    } else {
                        assert_eq!(found, clean);
                    }
                }
            }
        }
    }
}

#[test]
fn zeros_tiny_and_huge_values_do_no_harm() {
    for format in FORMATS {
        let tiny = [
            bf16::ZERO,
            bf16::NEG_ZERO,
            bf16::from_bits(1),
            bf16::MIN_POSITIVE,
        ];
        for value in tiny {
            for mut cpu in cpus() {
                let case = plain(format, 3, 33, 64, 1);
                let mut operands = Operands::normal(&case);
                operands.x.fill(value);
                let found = operands.run(&case, &mut cpu, true);
                assert!(found.iter().all(|x| x.abs() < 1e-30), "{format:?} {value}");
                operands = Operands::normal(&case);
                operands.w.fill(value);
                let found = operands.run(&case, &mut cpu, true);
                assert!(found.iter().all(|x| x.abs() < 1e-30), "{format:?} {value}");
            }
        }
        for mut cpu in cpus() {
            let case = plain(format, 3, 33, 64, 1);
            let mut operands = Operands::normal(&case);
            operands.x.fill(bf16::from_f32(1e30));
            operands.w.fill(bf16::ONE);
            for found in operands.run(&case, &mut cpu, true) {
                assert!((found / 64e30 - 1.0).abs() < 0.01, "{format:?} {found}");
            }
        }
    }
}

#[test]
fn the_longest_sums_fit() {
    for mut cpu in cpus() {
        let case = plain(Format::Int8, 1, 1, 1 << 17, 1);
        for sign in [bf16::ONE, bf16::NEG_ONE] {
            let mut operands = Operands::normal(&case);
            operands.x.fill(sign);
            operands.w.fill(bf16::ONE);
            let expected = sign.to_f32() * 131_072.0;
            let found = operands.run(&case, &mut cpu, true)[0];
            assert!((found / expected - 1.0).abs() < 1e-6);
        }
    }
}

#[test]
fn the_most_likely_id_is_the_first_of_the_largest_logits() {
    for format in FORMATS {
        for mut cpu in cpus() {
            let case = plain(format, 29, 300, 64, 1);
            let mut operands = Operands::normal(&case);
            // Every logit twice.
            operands.w.copy_within(..150 * 64, 150 * 64);
            operands.x[3 * 64..4 * 64].fill(bf16::NAN);
            operands.x[5 * 64..6 * 64].fill(bf16::ZERO);
            let logits = operands.run(&case, &mut cpu, true);
            let mut bytes = operands.packed(&case, &cpu);
            let packed = Packed::new(case.layout(), bytes.bytes()).unwrap();
            let mut found = [(0.0, 7); 29];
            greedy(&mut cpu, Rows::of(&operands.x, 64), &packed, &mut found);
            for (row, (logit, id)) in found.into_iter().enumerate() {
                let logits = &logits[row * 300..][..300];
                let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let first = logits.iter().position(|&logit| logit == largest);
                assert_eq!(
                    (logit, id as usize),
                    (largest, first.unwrap_or(0)),
                    "row {row}"
                );
            }
            greedy(&mut cpu, Rows::of(&operands.x[..0], 64), &packed, &mut []);
        }
    }
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    let new = |n, k, groups, gated| Layout::new(Format::Int8, n, k, groups, gated);
    assert_eq!(new(0, 4, 1, false), Err(LinearError::Size { n: 0, k: 4 }));
    assert!(new(4, (1 << 17) + 1, 1, false).is_err());
    assert_eq!(
        new(4, 12, 8, false),
        Err(LinearError::Groups { groups: 8, k: 12 })
    );
    assert!(new(4, 12, 3, false).is_err());
    assert_eq!(new(5, 12, 1, true), Err(LinearError::Gated(5)));
    let int4 = Layout::new(
        Format::Int4 {
            group: 16,
            zeros: true,
        },
        4,
        64,
        1,
        false,
    );
    assert_eq!(int4, Err(LinearError::ScaleGroup(16)));
    let layout = new(32, 64, 1, false).unwrap();
    let mut bytes = Aligned::new(layout.bytes() + 64);
    let bytes = bytes.bytes();
    let expected = layout.bytes();
    let found = expected + 64;
    assert_eq!(
        Packed::new(layout, bytes).err(),
        Some(LinearError::Bytes { expected, found })
    );
    let shifted = Packed::new(layout, &bytes[1..=expected]).err();
    assert_eq!(shifted, Some(LinearError::Alignment));
}
