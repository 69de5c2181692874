//! Products at every level against float64, and the numerics rule bit by bit.

use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::rows::Rows;

/// 64-byte aligned bytes.
pub(super) struct Aligned(crate::scratch::Scratch, usize);

impl Aligned {
    pub fn new(size: usize) -> Self {
        Self(crate::scratch::Scratch::default(), size)
    }

    pub fn bytes(&mut self) -> &mut [u8] {
        let [bytes] = self.0.parts([self.1]);
        bytes
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Case {
    format: Format,
    rows: usize,
    n: usize,
    k: usize,
    k_groups: usize,
    gated: bool,
    bias: bool,
    seed: u64,
}

impl Case {
    pub fn layout(&self) -> Layout {
        Layout::new(self.format, self.n, self.k, self.k_groups, self.gated).unwrap()
    }
}

/// Operands of a case; on a grid that quantisation keeps exactly, or normally distributed.
pub(super) struct Operands {
    pub x: Vec<bf16>,
    pub w: Vec<bf16>,
    pub bias: Vec<bf16>,
}

fn normal(rng: &mut StdRng) -> f32 {
    (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0
}

impl Operands {
    pub fn normal(case: &Case) -> Self {
        let mut rng = StdRng::seed_from_u64(case.seed);
        let mut many = |count: usize| -> Vec<bf16> {
            (0..count)
                .map(|_| bf16::from_f32(normal(&mut rng)))
                .collect()
        };
        Self {
            x: many(case.rows * case.k),
            w: many(case.n * case.k),
            bias: many(case.n),
        }
    }

    /// Integers whose largest magnitude in every scale's range is what the format maps to itself.
    fn exact(case: &Case) -> Self {
        let mut this = Self::normal(case);
        let mut rng = StdRng::seed_from_u64(case.seed ^ 1);
        let group_k = case.k / case.k_groups;
        let mut grid = |values: &mut [bf16], span: usize, low: i32, high: i32, extreme: i32| {
            for (index, value) in values.iter_mut().enumerate() {
                let integer = if index.is_multiple_of(span) {
                    extreme
                } else {
                    rng.random_range(low..=high)
                };
                *value = bf16::from_f32(integer as f32);
            }
        };
        for row in this.x.chunks_mut(group_k) {
            grid(row, group_k, -127, 127, 127);
        }
        for row in this.w.chunks_mut(group_k) {
            match case.format {
                Format::Bf16 | Format::Int8 => grid(row, group_k, -127, 127, -127),
                Format::Int4 {
                    group,
                    zeros: false,
                } => grid(row, group, -8, 7, -8),
                Format::Int4 { group, zeros: true } => {
                    for (index, part) in row.chunks_mut(group).enumerate() {
                        let zero = (index * 7 % 16) as i32;
                        grid(
                            part,
                            group,
                            -zero,
                            15 - zero,
                            if zero > 7 { -zero } else { 15 - zero },
                        );
                    }
                }
            }
        }
        this
    }

    pub fn packed(&self, case: &Case, cpu: &Cpu) -> Aligned {
        let layout = case.layout();
        let mut bytes = Aligned::new(layout.bytes());
        pack_any(cpu, &layout, Rows::of(&self.w, case.k), bytes.bytes());
        bytes
    }

    /// The output as f32 (bf16 widened), computed by `cpu`.
    pub fn run(&self, case: &Case, cpu: &mut Cpu, f32_out: bool) -> Vec<f32> {
        let mut bytes = self.packed(case, cpu);
        let layout = case.layout();
        let packed = Packed::new(layout, bytes.bytes()).unwrap();
        let x = Rows::of(&self.x, case.k);
        run(case, cpu, &packed, x, &self.bias, f32_out)
    }

    /// The output in f64, and how much that of quantised operands may differ.
    fn reference(&self, case: &Case, quantised: bool) -> Vec<(f64, f64)> {
        let columns = case.layout().columns();
        let group_k = case.k / case.k_groups;
        let half = 0.5 / 127.0;
        let mut out = Vec::new();
        for row in 0..case.rows {
            let x = &self.x[row * case.k..][..case.k];
            let product = |channel: usize| {
                let w = &self.w[channel * case.k..][..case.k];
                let (dx, dw) = match case.format {
                    _ if !quantised => (vec![0.0; case.k], vec![0.0; case.k]),
                    Format::Bf16 => (vec![0.0; case.k], vec![0.0; case.k]),
                    Format::Int8 => (errors(x, group_k, half), errors(w, case.k, half)),
                    Format::Int4 { group, .. } => {
                        // One of 8 steps where the larger side is the other one; a rounded scale.
                        // With zeros: half of a step, which is at most 4 / 15 of the largest.
                        let groups = w.chunks(group_k);
                        let dw = groups.flat_map(|w| errors(w, group, 1.1 / 8.0)).collect();
                        (errors(x, group_k, half), dw)
                    }
                };
                let bias = if case.bias {
                    self.bias[channel].to_f64()
                } else {
                    0.0
                };
                let (mut sum, mut error) = (bias, bias.abs() * 3e-6);
                for index in 0..case.k {
                    let (x, w) = (x[index].to_f64(), w[index].to_f64());
                    let (dx, dw) = (dx[index], dw[index]);
                    sum += x * w;
                    // The last part is what sums and scales of f32 lose.
                    error += x.abs() * dw + w.abs() * dx + dx * dw + (x * w).abs() * 3e-6;
                }
                (sum, error)
            };
            for column in 0..columns {
                out.push(if case.gated {
                    let ((gate, dg), (up, du)) = (product(column), product(column + columns));
                    let silu = gate / (1.0 + (-gate).exp());
                    // The slope of silu is below 1.1.
                    let error = 1.1 * dg * (up.abs() + du) + silu.abs() * (du + up.abs() * 3e-6);
                    (silu * up, error)
                } else {
                    product(column)
                });
            }
        }
        out
    }
}

/// For each value a part of the largest magnitude among the `span` that share its scale.
fn errors(values: &[bf16], span: usize, part: f64) -> Vec<f64> {
    let spans = values.chunks(span);
    let largest = |span: &[bf16]| {
        span.iter()
            .fold(0.0_f64, |max, x| max.max(x.to_f64().abs()))
    };
    spans
        .flat_map(|span| vec![largest(span) * part; span.len()])
        .collect()
}

fn run(
    case: &Case,
    cpu: &mut Cpu,
    packed: &Packed,
    x: Rows<bf16>,
    bias: &[bf16],
    f32_out: bool,
) -> Vec<f32> {
    let columns = packed.layout().columns();
    let bias = case.bias.then_some(bias);
    if f32_out && !case.gated {
        let mut out = vec![f32::NAN; x.rows() * columns];
        let view = RowsMut::of(&mut out, columns);
        linear(cpu, x, packed, bias, Output::F32(view));
        return out;
    }
    let mut out = vec![bf16::NAN; x.rows() * columns];
    let view = RowsMut::of(&mut out, columns);
    let out_kind = if case.gated {
        Output::SiluMul(view)
    } else {
        Output::Bf16(view)
    };
    linear(cpu, x, packed, bias, out_kind);
    out.iter().map(|x| x.to_f32()).collect()
}

fn format() -> impl Strategy<Value = Format> {
    prop_oneof![Just(Format::Bf16), Just(Format::Int8), int4(),]
}

fn int4() -> impl Strategy<Value = Format> {
    let group = prop_oneof![Just(32), Just(64), Just(128)];
    (group, any::<bool>()).prop_map(|(group, zeros)| Format::Int4 { group, zeros })
}

fn case() -> impl Strategy<Value = Case> {
    let sizes = (0..45_usize, 1..100_usize, 1..300_usize, 0..4_u32);
    let flags = (any::<bool>(), any::<bool>(), any::<u64>());
    (format(), sizes, flags).prop_map(|(format, sizes, flags)| {
        let (rows, n, k, groups) = sizes;
        let (gated, bias, seed) = flags;
        let k_groups = 1 << groups;
        Case {
            format,
            rows,
            n: if gated { n * 2 } else { n },
            k: k.next_multiple_of(k_groups),
            k_groups,
            gated,
            bias,
            seed,
        }
    })
}

/// As `pack`; with zeros, in the smallest scales of powers of two that reach all numbers.
pub(super) fn pack_any(cpu: &Cpu, layout: &Layout, weight: Rows<bf16>, out: &mut [u8]) {
    let Format::Int4 { group, zeros: true } = layout.format() else {
        return pack(cpu, layout, weight, out);
    };
    let parts = (0..weight.rows()).flat_map(|row| {
        let groups = weight.row(row).chunks(layout.group_k());
        groups.flat_map(|groups| groups.chunks(group))
    });
    let mut numbers = Vec::new();
    let (mut scales, mut zeros) = (Vec::new(), Vec::new());
    for part in parts {
        let extreme =
            |pick: fn(f64, f64) -> f64| part.iter().fold(0.0, |found, w| pick(found, w.to_f64()));
        let (low, high) = (extreme(f64::min), extreme(f64::max));
        let scale = if high > low {
            ((high - low) / 15.0).log2().ceil().exp2()
        } else {
            1.0
        };
        let zero = (-low / scale).round();
        let number = |w: &bf16| (w.to_f64() / scale + zero).round().clamp(0.0, 15.0) as u8;
        numbers.extend(part.iter().map(number));
        scales.push(scale as f32);
        zeros.push(zero as u8);
    }
    let parts = scales.len() / weight.rows();
    let weight = Int4 {
        numbers: Rows::of(&numbers, layout.k()),
        scales: Rows::of(&scales, parts),
        zeros: Rows::of(&zeros, parts),
    };
    pack_int4(cpu, layout, &weight, out);
}

pub(super) fn cpus() -> Vec<Cpu> {
    let levels = Level::available().into_iter();
    levels
        .map(|level| Cpu::at_level(level, 2, 0).unwrap())
        .collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn few() -> ProptestConfig {
    ProptestConfig::with_cases(if cfg!(debug_assertions) { 8 } else { 60 })
}

proptest! {
    #![proptest_config(few())]

    #[test]
    fn what_quantisation_keeps_exactly_is_exact(case in case()) {
        let operands = Operands::exact(&case);
        for mut cpu in cpus() {
            let found = operands.run(&case, &mut cpu, true);
            for (found, (exact, error)) in found.iter().zip(operands.reference(&case, false)) {
                // bf16 outputs round at 2^-8.
                let bound = error + if case.gated { exact.abs() * 0.004 } else { 0.0 } + 1e-30;
                let error = (f64::from(*found) - exact).abs();
                prop_assert!(error <= bound, "{} {exact} {found} {bound}", cpu.level);
            }
        }
    }

    #[test]
    fn normal_operands_are_within_the_error_of_their_scales(case in case()) {
        let operands = Operands::normal(&case);
        for mut cpu in cpus() {
            let found = operands.run(&case, &mut cpu, false);
            for (found, (exact, error)) in found.iter().zip(operands.reference(&case, true)) {
                let bound = error * 1.003 + exact.abs() * 0.004 + 1e-30;
                let error = (f64::from(*found) - exact).abs();
                prop_assert!(error <= bound, "{} {exact} {found} {bound}", cpu.level);
            }
        }
    }

    #[test]
    fn int4_with_zeros_is_its_numbers(case in case(), span in 0..3, seed in any::<u64>()) {
        let group = 32_usize << span;
        let case = Case { format: Format::Int4 { group, zeros: true }, gated: false, ..case };
        let mut rng = StdRng::seed_from_u64(seed);
        let operands = Operands::exact(&case);
        let layout = case.layout();
        let group_k = layout.group_k();
        let parts = group_k.div_ceil(group) * case.k_groups;
        let extremes = [0, 0, 15, 15, 8, 1, 14, rng.random_range(0..16)];
        let mut whole = |count: usize| -> Vec<u8> {
            (0..count).map(|_| extremes[rng.random_range(0..8)]).collect()
        };
        let (numbers, zeros) = (whole(case.n * case.k), whole(case.n * parts));
        let scales: Vec<f32> = (0..case.n * parts)
            .map(|_| half::f16::from_f32(rng.random_range(-0.1..0.9)).to_f32())
            .collect();
        let weight = Int4 {
            numbers: Rows::of(&numbers, case.k),
            scales: Rows::of(&scales, parts),
            zeros: Rows::of(&zeros, parts),
        };
        let mut bytes = Aligned::new(layout.bytes());
        pack_int4(&Cpu::new(2, 0).unwrap(), &layout, &weight, bytes.bytes());
        let packed = Packed::new(layout, bytes.bytes()).unwrap();
        for mut cpu in cpus() {
            let x = Rows::of(&operands.x, case.k);
            let found = run(&case, &mut cpu, &packed, x, &operands.bias, true);
            for (index, found) in found.iter().enumerate() {
                let (row, channel) = (index / case.n, index % case.n);
                let bias = if case.bias { operands.bias[channel].to_f64() } else { 0.0 };
                let (mut exact, mut size) = (bias, bias.abs());
                for input in 0..case.k {
                    let part = input / group_k * (parts / case.k_groups) + input % group_k / group;
                    let [number, zero] = [
                        numbers[channel * case.k + input],
                        zeros[channel * parts + part],
                    ]
                    .map(f64::from);
                    let scale = f64::from(scales[channel * parts + part]);
                    let product = (number - zero) * scale * x.row(row)[input].to_f64();
                    exact += product;
                    size += product.abs();
                }
                let error = (f64::from(*found) - exact).abs();
                prop_assert!(error <= size * 3e-6 + 1e-30, "{} {exact} {found}", cpu.level);
            }
        }
    }

    #[test]
    fn integer_formats_give_the_same_bits_at_every_level(case in case()) {
        let operands = Operands::normal(&case);
        prop_assume!(case.format != Format::Bf16);
        let mut outputs = cpus().into_iter().map(|mut cpu| {
            bits(&operands.run(&case, &mut cpu, false))
        });
        let portable = outputs.next().unwrap();
        for output in outputs {
            prop_assert_eq!(&portable, &output);
        }
    }

    #[test]
    fn a_row_has_the_same_bits_alone_batched_and_on_any_number_of_threads(case in case()) {
        let operands = Operands::normal(&case);
        for level in Level::available() {
            let mut cpu = Cpu::at_level(level, 3, 0).unwrap();
            let together = operands.run(&case, &mut cpu, true);
            let mut cpu = Cpu::at_level(level, 1, 0).unwrap();
            let mut bytes = operands.packed(&case, &cpu);
            let packed = Packed::new(case.layout(), bytes.bytes()).unwrap();
            let columns = case.layout().columns();
            for row in 0..case.rows {
                let x = Rows::of(&operands.x[row * case.k..][..case.k], case.k);
                let alone = run(&case, &mut cpu, &packed, x, &operands.bias, true);
                let batched = &together[row * columns..][..columns];
                prop_assert_eq!(bits(&alone), bits(batched), "{} row {}", level, row);
            }
        }
    }
}

pub(super) fn plain(format: Format, rows: usize, n: usize, k: usize, k_groups: usize) -> Case {
    Case {
        format,
        rows,
        n,
        k,
        k_groups,
        gated: false,
        bias: false,
        seed: 7,
    }
}

pub(super) const FORMATS: [Format; 4] = [
    Format::Bf16,
    Format::Int8,
    Format::Int4 {
        group: 32,
        zeros: false,
    },
    Format::Int4 {
        group: 32,
        zeros: true,
    },
];

#[test]
fn slices_along_k_add_up_in_the_tree_to_the_whole() {
    for mut cpu in cpus() {
        let case = plain(Format::Int8, 5, 70, 256, 8);
        let operands = Operands::exact(&case);
        let mut bytes = operands.packed(&case, &cpu);
        let packed = Packed::new(case.layout(), bytes.bytes()).unwrap();
        let x = Rows::of(&operands.x, 256);
        let whole = run(&case, &mut cpu, &packed, x, &[], true);
        let mut halves = [0, 4].map(|first| {
            let slice = packed.groups(first, first + 4).unwrap();
            // SAFETY: columns `first * 32 ..` of rows of 256.
            let x = unsafe { Rows::from_raw(operands.x[first * 32..].as_ptr(), 5, 128, 256) };
            run(&case, &mut cpu, &slice, x, &[], true).into_iter()
        });
        for whole in whole {
            let sum: f32 = halves.iter_mut().map(|half| half.next().unwrap()).sum();
            assert_eq!(sum, whole);
        }
        assert!(packed.groups(0, 3).is_err() && packed.groups(4, 9).is_err());
    }
}

#[test]
fn slices_along_n_are_columns_of_the_whole() {
    for (mut cpu, format) in cpus().into_iter().zip(FORMATS.into_iter().cycle()) {
        let case = plain(format, 3, 100, 96, 1);
        let operands = Operands::normal(&case);
        let mut bytes = operands.packed(&case, &cpu);
        let packed = Packed::new(case.layout(), bytes.bytes()).unwrap();
        let x = Rows::of(&operands.x, 96);
        let whole = run(&case, &mut cpu, &packed, x, &[], true);
        let slice = packed.columns(32, 100).unwrap();
        let part = run(&case, &mut cpu, &slice, x, &[], true);
        for (part, whole) in part.chunks(68).zip(whole.chunks(100)) {
            assert_eq!(part, &whole[32..]);
        }
        assert!(packed.columns(16, 100).is_err() && packed.columns(0, 48).is_err());
    }
}
