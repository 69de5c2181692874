//! How a packed weight lies in memory.
//!
//! ```text
//! bytes = group 0: block of panel 0, block of panel 1, ...   | group 1: ... | ...
//!
//! panel        32 output channels; with `gated`, 16 of the gate and their 16 of the up projection
//! group        k / k_groups inputs, zero-padded to whole steps
//!
//! block, bf16  [steps of 2 inputs][32 channels][2] bf16
//! block, int8  [32] f32 scales, [steps of 4 inputs][32 channels][4] u8, weight + 128
//! block, int4  per scale group: [32] bf16 scales,
//!              [steps of 8 inputs][32 channels][4] u8, weight + 8: low half inputs 0-3, high 4-7
//!   with zeros [32] f32 scales, whose lowest four bits are the channel's zero, in place of those;
//!              numbers of 0 to 15 in place of weight + 8: (number - zero) * scale is the weight
//! ```
//!
//! Blocks are multiples of 64 bytes. Whole panels (with one group) or whole groups (with all
//! panels) of a packed weight are one run of bytes, and a packed weight themselves: a
//! tensor-parallel slice is a view.

/// Changes whenever the same weight would be packed into other bytes.
pub const VERSION: u32 = 1;

/// Output channels of a panel.
pub(super) const CHANNELS: usize = 32;
/// Most groups that a layout can have.
const MAX_GROUPS: usize = 8;
/// The largest n, and the largest k: 127 * 127 * `MAX_SIZE` still fits an i32.
const MAX_SIZE: usize = 1 << 17;
const MAX_CHANNELS: usize = 1 << 24;

/// Bytes of a panel's f32 or bf16 scales.
pub(super) const F32_SCALES: usize = CHANNELS * 4;
pub(super) const BF16_SCALES: usize = CHANNELS * 2;

/// What of a scale is its zero. Scales of f16 and bf16 do not use these bits of an f32.
pub(super) const ZERO_BITS: u32 = 0xf;

/// How weights are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// As they are; activations too.
    Bf16,
    /// Symmetric with one scale for each output channel; activations int8 per token and group.
    Int8,
    /// A scale for every `group` (32, 64 or 128) weights of a channel along k, and a zero if there
    /// are `zeros`, else symmetric; activations as for `Int8`.
    Int4 { group: usize, zeros: bool },
}

/// Bytes of a panel's scales in each scale group of int4.
#[inline(always)]
pub(super) const fn int4_scales(zeros: bool) -> usize {
    if zeros { F32_SCALES } else { BF16_SCALES }
}

/// Why a layout or a packed weight is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinearError {
    #[error("a weight of {n} x {k} is empty or too large")]
    Size { n: usize, k: usize },
    #[error("{groups} groups along k={k}: must be 1, 2, 4 or 8 and divide k")]
    Groups { groups: usize, k: usize },
    #[error("int4 scale groups of {0} weights: must be 32, 64 or 128")]
    ScaleGroup(usize),
    #[error("gated weights need an even number of channels, not {0}")]
    Gated(usize),
    #[error("packed weights of {found} bytes where the layout takes {expected}")]
    Bytes { expected: usize, found: usize },
    #[error("packed weights must be aligned to 64 bytes")]
    Alignment,
    #[error("{what} {first}..{end} of {count} are not a view of this packed weight")]
    Slice {
        what: &'static str,
        first: usize,
        end: usize,
        count: usize,
    },
}

/// Shape and format of a packed weight; equal layouts have equal bytes for equal weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    format: Format,
    n: usize,
    k: usize,
    k_groups: usize,
    gated: bool,
    // All that follow from these, as kernels ask often.
    panels: usize,
    group_k: usize,
    block_k: usize,
    block_bytes: usize,
}

impl Layout {
    /// A weight of `n` output channels and `k` inputs. `k_groups` is 8 before row-parallel layers
    /// (fewer in their tensor-parallel slices), else 1. `gated` weights are [gate; up] of n / 2
    /// channels each, whose output is silu(gate) * up.
    ///
    /// # Errors
    /// If a size is not supported.
    pub fn new(
        format: Format,
        n: usize,
        k: usize,
        k_groups: usize,
        gated: bool,
    ) -> Result<Self, LinearError> {
        if n == 0 || k == 0 || n > MAX_CHANNELS || k > MAX_SIZE {
            return Err(LinearError::Size { n, k });
        }
        if !matches!(k_groups, 1 | 2 | 4 | MAX_GROUPS) || !k.is_multiple_of(k_groups) {
            return Err(LinearError::Groups {
                groups: k_groups,
                k,
            });
        }
        if let Format::Int4 { group, .. } = format
            && !matches!(group, 32 | 64 | 128)
        {
            return Err(LinearError::ScaleGroup(group));
        }
        if gated && !n.is_multiple_of(2) {
            return Err(LinearError::Gated(n));
        }
        let group_k = k / k_groups;
        let block_k = group_k.next_multiple_of(match format {
            Format::Bf16 => 2,
            Format::Int8 => 4,
            Format::Int4 { group, .. } => group,
        });
        Ok(Self {
            format,
            n,
            k,
            k_groups,
            gated,
            // Half the columns in panels half as wide.
            panels: n.div_ceil(CHANNELS),
            group_k,
            block_k,
            block_bytes: match format {
                Format::Bf16 => block_k * CHANNELS * 2,
                Format::Int8 => F32_SCALES + block_k * CHANNELS,
                Format::Int4 { group, zeros } => {
                    block_k / group * (int4_scales(zeros) + group * CHANNELS / 2)
                }
            },
        })
    }

    #[must_use]
    pub fn format(&self) -> Format {
        self.format
    }

    /// Output channels of the weight; a gated product has half as many columns.
    #[must_use]
    pub fn n(&self) -> usize {
        self.n
    }

    #[must_use]
    pub fn k(&self) -> usize {
        self.k
    }

    #[must_use]
    pub fn k_groups(&self) -> usize {
        self.k_groups
    }

    #[must_use]
    pub fn gated(&self) -> bool {
        self.gated
    }

    /// Columns of the product.
    #[must_use]
    pub fn columns(&self) -> usize {
        if self.gated { self.n / 2 } else { self.n }
    }

    /// Size of the packed weight.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.k_groups * self.panels() * self.block_bytes()
    }

    #[inline]
    pub(super) fn panels(&self) -> usize {
        self.panels
    }

    /// Columns of the product that a panel computes.
    #[inline]
    pub(super) fn panel_columns(&self) -> usize {
        if self.gated { CHANNELS / 2 } else { CHANNELS }
    }

    /// The row of the weight that a panel's lane holds, if that lane is not padding.
    #[inline]
    pub(super) fn channel(&self, panel: usize, lane: usize) -> Option<usize> {
        let width = self.panel_columns();
        let column = panel * width + lane % width;
        (column < self.columns()).then(|| column + lane / width * self.columns())
    }

    /// The panel and lane that hold a row of the weight: the inverse of `channel`.
    pub(super) fn lane_of(&self, row: usize) -> (usize, usize) {
        let width = self.panel_columns();
        let (half, column) = (row / self.columns(), row % self.columns());
        (column / width, half * width + column % width)
    }

    /// Scale groups of a channel of int4, in all of k.
    #[must_use]
    pub fn scale_groups(&self) -> usize {
        self.k_groups * self.offsets()
    }

    /// Inputs of a group, without padding.
    #[inline]
    pub(super) fn group_k(&self) -> usize {
        self.group_k
    }

    /// Inputs of a group, with padding.
    #[inline]
    pub(super) fn block_k(&self) -> usize {
        self.block_k
    }

    #[inline]
    pub(super) fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// Sums of activations that undo the offset of unsigned weights, for each group.
    #[inline]
    pub(super) fn offsets(&self) -> usize {
        match self.format {
            Format::Bf16 => 0,
            Format::Int8 => 1,
            Format::Int4 { group, .. } => self.block_k() / group,
        }
    }
}

/// A packed weight in somebody else's memory.
#[derive(Clone, Copy)]
pub struct Packed<'a> {
    layout: Layout,
    bytes: &'a [u8],
}

impl<'a> Packed<'a> {
    /// # Errors
    /// If the bytes are not as many as the layout takes, or not aligned to 64.
    pub fn new(layout: Layout, bytes: &'a [u8]) -> Result<Self, LinearError> {
        if bytes.len() != layout.bytes() {
            return Err(LinearError::Bytes {
                expected: layout.bytes(),
                found: bytes.len(),
            });
        }
        if !bytes.as_ptr().addr().is_multiple_of(64) {
            return Err(LinearError::Alignment);
        }
        Ok(Self { layout, bytes })
    }

    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The weight of some groups along k, for a row-parallel slice.
    ///
    /// # Errors
    /// If there are no such groups, or their number is no power of two.
    pub fn groups(&self, first: usize, end: usize) -> Result<Self, LinearError> {
        let layout = &self.layout;
        let count = layout.k_groups;
        if first >= end || end > count {
            return Err(LinearError::Slice {
                what: "groups",
                first,
                end,
                count,
            });
        }
        let group_bytes = layout.panels() * layout.block_bytes();
        let k = (end - first) * layout.group_k();
        Ok(Self {
            layout: Layout::new(layout.format, layout.n, k, end - first, layout.gated)?,
            bytes: &self.bytes[first * group_bytes..end * group_bytes],
        })
    }

    /// The weight of some columns of the product, for a column-parallel slice.
    ///
    /// # Errors
    /// If there are no such columns, they do not begin at a whole panel, or there are groups.
    pub fn columns(&self, first: usize, end: usize) -> Result<Self, LinearError> {
        let layout = &self.layout;
        let (count, width) = (layout.columns(), layout.panel_columns());
        let whole = first.is_multiple_of(width) && (end.is_multiple_of(width) || end == count);
        if first >= end || end > count || !whole || layout.k_groups > 1 {
            return Err(LinearError::Slice {
                what: "columns",
                first,
                end,
                count,
            });
        }
        let n = (end - first) * if layout.gated { 2 } else { 1 };
        let panel_bytes = layout.block_bytes();
        let bytes = first / width * panel_bytes..end.div_ceil(width) * panel_bytes;
        Ok(Self {
            layout: Layout::new(layout.format, n, layout.k, 1, layout.gated)?,
            bytes: &self.bytes[bytes],
        })
    }

    /// The block of a panel in a group.
    #[inline]
    pub(super) fn block(&self, group: usize, panel: usize) -> &'a [u8] {
        let size = self.layout.block_bytes();
        &self.bytes[(group * self.layout.panels() + panel) * size..][..size]
    }
}
