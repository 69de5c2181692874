//! From a tile's sums to the output: channel scales, bias, activation, residual, rounding.
//!
//! One source for all levels: see `vectorise`.

use half::bf16;

use super::layout::{CHANNELS, F32_SCALES, Format, Packed};
use crate::activation::silu;
use crate::bfloat::{round, rounded, widen};
use crate::rows::{Rows, RowsMut};

/// Where a product goes, `[rows, columns]`.
pub enum Output<'a> {
    Bf16(RowsMut<'a, bf16>),
    /// What `Bf16` would get, added to these rows and rounded again, as `activation::add` does.
    Residual(RowsMut<'a, bf16>, Rows<'a, bf16>),
    F32(RowsMut<'a, f32>),
    /// silu(gate) * up, for gated weights only.
    SiluMul(RowsMut<'a, bf16>),
}

impl Output<'_> {
    pub(super) fn shape(&self) -> (usize, usize) {
        match self {
            Self::Bf16(out) | Self::Residual(out, _) | Self::SiluMul(out) => {
                (out.rows(), out.cols())
            }
            Self::F32(out) => (out.rows(), out.cols()),
        }
    }
}

/// The epilogue of one product, its sizes checked.
pub(super) struct Finish<'a> {
    weight: &'a Packed<'a>,
    bias: Option<&'a [bf16]>,
    out: Output<'a>,
}

impl<'a> Finish<'a> {
    /// # Panics
    /// If a size does not fit, or the combination has no meaning.
    pub(super) fn new(
        weight: &'a Packed<'a>,
        rows: usize,
        bias: Option<&'a [bf16]>,
        out: Output<'a>,
    ) -> Self {
        let layout = weight.layout();
        let shape = (rows, layout.columns());
        assert_eq!(out.shape(), shape, "shape of the output");
        if let Output::Residual(_, residual) = &out {
            let residual = (residual.rows(), residual.cols());
            assert_eq!(residual, shape, "shape of the residual");
        }
        let gated = matches!(out, Output::SiluMul(_));
        assert_eq!(layout.gated(), gated, "a gated weight, for silu(gate) * up");
        if let Some(bias) = bias {
            assert_eq!(bias.len(), layout.n(), "size of the bias");
        }
        Self { weight, bias, out }
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
        if let Some(bias) = self.bias {
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

    /// Store `sums` as the rows from `first` on of a panel.
    ///
    /// # Safety
    /// Nobody else stores the same panel and rows at the same time.
    #[inline(always)]
    pub(super) unsafe fn store(&self, panel: usize, first: usize, sums: &[[f32; CHANNELS]]) {
        let layout = self.weight.layout();
        let width = layout.panel_columns();
        let column = panel * width;
        let columns = width.min(layout.columns() - column);
        let (scales, biases) = self.channels(panel);
        for (index, sums) in sums.iter().enumerate() {
            let row = first + index;
            let mut values = [0.0; CHANNELS];
            for (lane, value) in values.iter_mut().enumerate() {
                *value = sums[lane] * scales[lane] + biases[lane];
            }
            match &self.out {
                Output::Bf16(out) => {
                    // SAFETY: the caller answers for this row and panel.
                    let out = unsafe { out.part(row, column, columns) };
                    if let Ok(out) = <&mut [bf16; CHANNELS]>::try_from(&mut *out) {
                        *out = narrow(&values);
                    } else {
                        out.copy_from_slice(&narrow(&values)[..columns]);
                    }
                }
                Output::Residual(out, residual) => {
                    // SAFETY: as above.
                    let out = unsafe { out.part(row, column, columns) };
                    let residual = &residual.row(row)[column..][..columns];
                    if let (Ok(out), Ok(residual)) = (
                        <&mut [bf16; CHANNELS]>::try_from(&mut *out),
                        <&[bf16; CHANNELS]>::try_from(residual),
                    ) {
                        *out = added(&values, residual);
                    } else {
                        let mut padded = [bf16::ZERO; CHANNELS];
                        padded[..columns].copy_from_slice(residual);
                        out.copy_from_slice(&added(&values, &padded)[..columns]);
                    }
                }
                Output::F32(out) => {
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
fn narrow<const N: usize>(values: &[f32; N]) -> [bf16; N] {
    let mut narrow = [bf16::ZERO; N];
    for (lane, to) in narrow.iter_mut().enumerate() {
        *to = round(values[lane]);
    }
    narrow
}

/// A product and its residual.
#[inline(always)]
fn added(values: &[f32; CHANNELS], residual: &[bf16; CHANNELS]) -> [bf16; CHANNELS] {
    let mut sums = *values;
    for (sum, &residual) in sums.iter_mut().zip(residual) {
        *sum = rounded(*sum) + widen(residual);
    }
    narrow(&sums)
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
