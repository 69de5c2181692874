//! The operations of a plan.

use crate::attention::KvLayout;
use crate::bf16;
use crate::linear::Layout;

use super::buffers::{Buffers, Element, Extent, View};

/// What operations are counted under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Embedding,
    Norm,
    Linear,
    Attention,
    Experts,
    Add,
    Output,
    /// Waiting for other ranks and adding their parts up, whichever operation it was for.
    Exchange,
}

impl Kind {
    pub const ALL: [Self; 8] = [
        Self::Embedding,
        Self::Norm,
        Self::Linear,
        Self::Attention,
        Self::Experts,
        Self::Add,
        Self::Output,
        Self::Exchange,
    ];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Norm => "norm",
            Self::Linear => "linear",
            Self::Attention => "attention",
            Self::Experts => "experts",
            Self::Add => "add",
            Self::Output => "output",
            Self::Exchange => "exchange",
        }
    }
}

/// A table of bf16 rows.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    pub start: *const bf16,
    pub rows: usize,
    pub cols: usize,
    pub stride: usize,
}

/// A norm, whose weight has as many numbers as rows.
#[derive(Clone, Copy, Debug)]
pub struct Norm {
    pub weight: *const bf16,
    pub eps: f32,
}

/// A packed weight, and perhaps a bias of `layout.n()` numbers.
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    pub layout: Layout,
    pub weight: *const u8,
    pub bias: Option<*const bf16>,
}

/// One layer's attention, from the projected row to what the output projection takes.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    pub heads: usize,
    pub kv: KvLayout,
    pub cache: *mut u8,
    pub blocks: usize,
    /// Weights [head_dim] of the query's and the key's norm, and its epsilon.
    pub norms: Option<(*const bf16, *const bf16, f32)>,
    pub scale: f32,
    pub window: Option<usize>,
}

/// One operation; `out` is written, all else is read.
#[derive(Clone, Debug)]
pub enum Op {
    /// Rows of a table by token id.
    Embed {
        table: Table,
        out: View,
    },
    /// Rows whose logits are asked for.
    Pick {
        x: View,
        out: View,
    },
    /// cos, then sin, of the positions' angles: f32.
    Angles {
        frequencies: Vec<f32>,
        factor: f32,
        out: View,
    },
    RmsNorm {
        x: View,
        norm: Norm,
        out: View,
    },
    Add {
        a: View,
        b: View,
        out: View,
    },
    /// Of rows, or of their norms; `gated` layouts put out silu(gate) * up, others may add a
    /// residual.
    Linear {
        x: View,
        norm: Option<Norm>,
        linear: Linear,
        residual: Option<View>,
        out: View,
    },
    /// A linear of which each rank has some groups along k.
    Reduced {
        x: View,
        linear: Linear,
        residual: Option<View>,
        out: View,
    },
    /// `qkv` is overwritten.
    Attention(Attention, AttentionViews),
    /// A sparse layer behind its router: each token by its `top` best experts.
    Experts(Experts, ExpertsViews),
    /// The output layer, into what the step was given for it. It has no bias. `first`: the id of
    /// its weight's first row, where other ranks have the other ids.
    Logits {
        x: View,
        linear: Linear,
        first: u32,
    },
}

/// How ranks divide experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Division {
    /// There is one rank.
    Nothing,
    /// Each expert.
    Inner,
    /// The experts.
    Experts,
}

/// The experts of one layer, (gate and up, down) each, all of one shape.
#[derive(Clone, Debug)]
pub struct Experts {
    /// All, or this rank's.
    pub experts: Vec<(Linear, Linear)>,
    pub top: usize,
    /// Whether a token's weights are made to add up to one.
    pub normalise: bool,
    pub division: Division,
}

/// What experts read and write.
#[derive(Clone, Copy, Debug)]
pub struct ExpertsViews {
    pub x: View,
    /// What the router says: one number an expert.
    pub logits: View,
    pub out: View,
}

/// What an attention reads and writes.
#[derive(Clone, Copy, Debug)]
pub struct AttentionViews {
    pub qkv: View,
    pub angles: View,
    pub out: View,
}

// SAFETY: the pointers are to memory that whoever records the plan keeps, and only `run`, which
// takes the plan exclusively, follows them.
unsafe impl Send for Op {}
// SAFETY: as above: through a shared reference they are only looked at.
unsafe impl Sync for Op {}

impl Op {
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Embed { .. } | Self::Pick { .. } | Self::Angles { .. } => Kind::Embedding,
            Self::RmsNorm { .. } => Kind::Norm,
            Self::Add { .. } => Kind::Add,
            Self::Linear { .. } | Self::Reduced { .. } => Kind::Linear,
            Self::Attention(..) => Kind::Attention,
            Self::Experts(..) => Kind::Experts,
            Self::Logits { .. } => Kind::Output,
        }
    }

    /// Note what is used, and see that the shapes fit.
    ///
    /// `ranks`: of the replica, 1 where nothing is divided.
    pub(super) fn check(
        &self,
        buffers: &mut Buffers,
        index: usize,
        ranks: usize,
    ) -> Result<(), String> {
        let mut bf = |view: View| buffers.used(view, Element::Bf16, index);
        let ok = match self {
            Self::Embed { table, out } => {
                bf(*out)? == Extent::Token && out.cols == table.cols && table.stride >= table.cols
            }
            Self::Pick { x, out } => {
                let (from, to) = (bf(*x)?, bf(*out)?);
                (from, to) == (Extent::Token, Extent::Output) && x.cols == out.cols
            }
            Self::Angles {
                frequencies, out, ..
            } => {
                let extent = buffers.used(*out, Element::F32, index)?;
                extent == Extent::Token && out.cols == 2 * frequencies.len()
            }
            Self::RmsNorm { x, out, .. } => bf(*x)? == bf(*out)? && x.cols == out.cols,
            Self::Add { a, b, out } => {
                let extent = bf(*out)?;
                bf(*a)? == extent && bf(*b)? == extent && a.cols == out.cols && b.cols == out.cols
            }
            Self::Linear {
                x,
                linear,
                residual,
                out,
                ..
            } => {
                linear.fits_views(bf, *x, *residual, *out)?
                    && !(linear.layout.gated() && residual.is_some())
            }
            Self::Reduced {
                x,
                linear,
                residual,
                out,
            } => linear.fits_views(bf, *x, *residual, *out)? && !linear.layout.gated() && ranks > 1,
            Self::Attention(attention, views) => {
                let extents = (bf(views.qkv)?, bf(views.out)?);
                let turned = views.angles.cols;
                let angles = buffers.used(views.angles, Element::F32, index)?;
                let (d, kv_heads) = (attention.kv.head_dim(), attention.kv.kv_heads());
                extents == (Extent::Token, Extent::Token)
                    && angles == Extent::Token
                    && turned <= d
                    && turned.is_multiple_of(2)
                    && attention.heads.is_multiple_of(kv_heads)
                    && views.qkv.cols == (attention.heads + 2 * kv_heads) * d
                    && views.out.cols == attention.heads * d
            }
            Self::Experts(layer, views) => {
                let extents = [bf(views.x)?, bf(views.logits)?, bf(views.out)?];
                let hidden = views.x.cols;
                let fits = |(gate_up, down): &(Linear, Linear)| {
                    gate_up.fits(hidden, down.layout.k())
                        && down.fits(gate_up.layout.columns(), hidden)
                        && gate_up.layout.gated()
                        && !down.layout.gated()
                        && gate_up.layout.columns() == layer.experts[0].0.layout.columns()
                };
                let all = match layer.division {
                    Division::Nothing | Division::Inner => layer.experts.len(),
                    Division::Experts => layer.experts.len() * ranks,
                };
                extents == [extents[0]; 3]
                    && (layer.division == Division::Nothing || ranks > 1)
                    && views.out.cols == hidden
                    && views.logits.cols == all
                    && !layer.experts.is_empty()
                    && (1..=all).contains(&layer.top)
                    && layer.experts.iter().all(fits)
            }
            Self::Logits { x, linear, .. } => {
                bf(*x)? == Extent::Output
                    && linear.fits(x.cols, linear.layout.n())
                    && !linear.layout.gated()
                    && linear.bias.is_none()
            }
        };
        if ok {
            Ok(())
        } else {
            Err(format!("shapes that do not fit: {self:?}"))
        }
    }
}

impl Linear {
    /// Whether rows of the three views, noted by `used`, are inputs, residual and outputs.
    fn fits_views(
        &self,
        mut used: impl FnMut(View) -> Result<Extent, String>,
        x: View,
        residual: Option<View>,
        out: View,
    ) -> Result<bool, String> {
        let extent = used(out)?;
        // What is added is like what it is added to.
        let added = residual.unwrap_or(out);
        Ok(used(x)? == extent
            && used(added)? == extent
            && added.cols == out.cols
            && self.fits(x.cols, out.cols))
    }

    fn fits(&self, inputs: usize, columns: usize) -> bool {
        self.layout.k() == inputs
            && self.layout.columns() == columns
            && self.weight.addr().is_multiple_of(64)
    }
}
