//! From a tile's sums to the output: channel scales, bias, activation, residual, rounding.
//!
//! One source for all levels: see `vectorise`.

use half::bf16;

use super::layout::{CHANNELS, F32_SCALES, Format, Packed};
use super::tile::Sums;
use crate::bfloat::widen;
use crate::rows::{Rows, RowsMut};

/// What is added to a product.
#[derive(Clone, Copy, Default)]
pub enum Residual<'a> {
    #[default]
    None,
    /// `[rows, columns]`
    Rows(Rows<'a, bf16>),
    /// What the output holds: out += product. Only with `Output::Bf16`.
    InPlace,
}

/// What is done to a product before it is stored.
#[derive(Clone, Copy, Default)]
pub struct Epilogue<'a> {
    /// `[n]`, in the order of the weight's rows.
    pub bias: Option<&'a [bf16]>,
    /// Not with `Output::SiluMul`.
    pub residual: Residual<'a>,
}

/// Where a product goes, `[rows, columns]`.
pub enum Output<'a> {
    Bf16(RowsMut<'a, bf16>),
    F32(RowsMut<'a, f32>),
    /// silu(gate) * up, for gated weights only.
    SiluMul(RowsMut<'a, bf16>),
}

impl Output<'_> {
    fn shape(&self) -> (usize, usize) {
        match self {
            Self::Bf16(out) | Self::SiluMul(out) => (out.rows(), out.cols()),
            Self::F32(out) => (out.rows(), out.cols()),
        }
    }
}

/// The epilogue of one product, its sizes checked.
pub(super) struct Finish<'a> {
    weight: &'a Packed<'a>,
    epilogue: Epilogue<'a>,
    out: Output<'a>,
}

impl<'a> Finish<'a> {
    /// # Panics
    /// If a size does not fit, or the combination has no meaning.
    pub(super) fn new(
        weight: &'a Packed<'a>,
        rows: usize,
        epilogue: Epilogue<'a>,
        out: Output<'a>,
    ) -> Self {
        let layout = weight.layout();
        let shape = (rows, layout.columns());
        assert_eq!(out.shape(), shape, "shape of the output");
        let gated = matches!(out, Output::SiluMul(_));
        assert_eq!(layout.gated(), gated, "a gated weight, for silu(gate) * up");
        if let Some(bias) = epilogue.bias {
            assert_eq!(bias.len(), layout.n(), "size of the bias");
        }
        match epilogue.residual {
            Residual::None => {}
            Residual::Rows(residual) => {
                assert!(!gated, "a residual beside silu(gate) * up");
                let found = (residual.rows(), residual.cols());
                assert_eq!(found, shape, "shape of the residual");
            }
            Residual::InPlace => {
                assert!(matches!(out, Output::Bf16(_)), "bf16 to add in place");
            }
        }
        Self {
            weight,
            epilogue,
            out,
        }
    }

    /// What rows `first ..` with a panel's channels are multiplied with and get added.
    #[inline(always)]
    fn channels(&self, panel: usize) -> ([f32; CHANNELS], [f32; CHANNELS]) {
        let layout = self.weight.layout();
        let mut scales = [1.0; CHANNELS];
        if layout.format() == Format::Int8 {
            let bytes = &self.weight.block(0, panel)[..F32_SCALES];
            for (to, from) in scales.iter_mut().zip(bytes.as_chunks().0) {
                *to = f32::from_ne_bytes(*from);
            }
        }
        let mut biases = [0.0; CHANNELS];
        if let Some(bias) = self.epilogue.bias {
            let width = layout.panel_columns();
            let parts = bias.chunks(layout.columns()).zip(biases.chunks_mut(width));
            for (bias, to) in parts {
                for (to, &bias) in to.iter_mut().zip(&bias[panel * width..]) {
                    *to = widen(bias);
                }
            }
        }
        (scales, biases)
    }

    /// Store rows `first .. first + rows` of a panel.
    ///
    /// # Safety
    /// Nobody else stores the same panel and rows at the same time.
    #[inline(always)]
    pub(super) unsafe fn store(&self, panel: usize, first: usize, rows: usize, sums: &Sums) {
        let layout = self.weight.layout();
        let width = layout.panel_columns();
        let column = panel * width;
        let columns = width.min(layout.columns() - column);
        let (scales, biases) = self.channels(panel);
        for (index, sums) in sums.0[..rows].iter().enumerate() {
            let row = first + index;
            let mut values = [0.0; CHANNELS];
            for (lane, value) in values.iter_mut().enumerate() {
                *value = sums[lane] * scales[lane] + biases[lane];
            }
            let residual = match self.epilogue.residual {
                Residual::Rows(residual) => Some(&residual.row(row)[column..][..columns]),
                Residual::None | Residual::InPlace => None,
            };
            match &self.out {
                Output::Bf16(out) => {
                    // SAFETY: the caller answers for this row and panel.
                    let out = unsafe { out.part(row, column, columns) };
                    let in_place = matches!(self.epilogue.residual, Residual::InPlace);
                    if let Ok(out) = <&mut [bf16; CHANNELS]>::try_from(&mut *out) {
                        if in_place {
                            add(&mut values, out);
                        } else if let Some(Ok(residual)) = residual.map(TryFrom::try_from) {
                            add(&mut values, residual);
                        }
                        *out = narrow(&values);
                    } else {
                        let residual = if in_place { Some(&*out) } else { residual };
                        add(&mut values, &padded(residual.unwrap_or_default()));
                        out.copy_from_slice(&narrow(&values)[..columns]);
                    }
                }
                Output::F32(out) => {
                    add(&mut values, &padded(residual.unwrap_or_default()));
                    // SAFETY: as above.
                    let out = unsafe { out.part(row, column, columns) };
                    out.copy_from_slice(&values[..columns]);
                }
                Output::SiluMul(out) => {
                    // SAFETY: as above.
                    let out = unsafe { out.part(row, column, columns) };
                    if let Ok(out) = <&mut [bf16; CHANNELS / 2]>::try_from(&mut *out) {
                        *out = silu_mul(&values);
                    } else {
                        out.copy_from_slice(&silu_mul(&values)[..columns]);
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn add(values: &mut [f32; CHANNELS], residual: &[bf16; CHANNELS]) {
    for (lane, value) in values.iter_mut().enumerate() {
        *value += widen(residual[lane]);
    }
}

/// A residual of as many columns as are not padding.
fn padded(residual: &[bf16]) -> [bf16; CHANNELS] {
    let mut whole = [bf16::ZERO; CHANNELS];
    whole[..residual.len()].copy_from_slice(residual);
    whole
}

#[inline(always)]
fn narrow<const N: usize>(values: &[f32; N]) -> [bf16; N] {
    let mut narrow = [bf16::ZERO; N];
    for (lane, to) in narrow.iter_mut().enumerate() {
        *to = to_bf16(values[lane]);
    }
    narrow
}

/// The first half of a panel's channels are the gate, the second the up projection.
#[inline(always)]
fn silu_mul(values: &[f32; CHANNELS]) -> [bf16; CHANNELS / 2] {
    let mut products = [0.0; CHANNELS / 2];
    for (lane, product) in products.iter_mut().enumerate() {
        *product = silu(values[lane]) * values[lane + CHANNELS / 2];
    }
    narrow(&products)
}

/// To the nearest bf16, ties to even. A NaN comes from operands of 16 significant bits or from
/// `f32::NAN`, so its low half is zero and it stays one.
#[inline(always)]
fn to_bf16(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    bf16::from_bits((rounded >> 16) as u16)
}

/// x / (1 + e^-x).
#[inline(always)]
pub(super) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// e^x for x cut to -87 .. 88, within 2 ulp: Cody and Waite's reduction to |r| <= ln(2) / 2, and
/// the Taylor polynomial of degree 7, whose remainder is below 6e-9 there.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // 1.5 * 2^23: adding it rounds to an integer, found in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    let mut p: f32 = 1.0 / 5040.0;
    for c in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        p = p.mul_add(r, c);
    }
    let power = (shifted.to_bits() << 23).wrapping_add(127 << 23);
    p * f32::from_bits(power)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponential_is_within_two_ulp() {
        for index in -87_000..=88_000 {
            let x = index as f32 / 1000.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs();
            assert!(error <= 2.4e-7 * exact, "{x}: {error}");
        }
    }

    #[test]
    fn silu_keeps_what_is_not_finite_so() {
        assert_eq!(silu(0.0), 0.0);
        assert_eq!(silu(f32::INFINITY), f32::INFINITY);
        assert!(!silu(f32::NEG_INFINITY).is_finite());
        assert!(silu(f32::NAN).is_nan());
        assert_eq!(silu(200.0), 200.0);
        assert!(silu(-200.0).abs() < 1e-30);
    }

    #[test]
    fn rounding_to_bf16_is_as_in_half() {
        for nan in [f32::NAN, -f32::NAN, bf16::from_bits(0x7f81).to_f32()] {
            assert!(to_bf16(nan).is_nan());
        }
        for bits in (0..=u32::MAX).step_by(9973) {
            let value = f32::from_bits(bits);
            if value.is_nan() {
                continue;
            }
            assert_eq!(
                to_bf16(value).to_bits(),
                bf16::from_f32(value).to_bits(),
                "{bits:08x}"
            );
        }
    }
}
