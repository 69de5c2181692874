//! The operations of a plan.

use crate::attention::{self, Batch, Cache, HeadNorms, KvLayout, Scoring};
use crate::bf16;
use crate::cpu::Cpu;
use crate::linear::{self, Layout, Output, Packed};
use crate::moe::{self, Expert, Workspace};
use crate::rows::Rows;
use crate::{activation, embedding, norm, rotary};

use super::buffers::{Buffers, Element, Extent, View};
use super::{Step, Wanted};

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
}

impl Kind {
    pub const ALL: [Self; 7] = [
        Self::Embedding,
        Self::Norm,
        Self::Linear,
        Self::Attention,
        Self::Experts,
        Self::Add,
        Self::Output,
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
        weight: *const bf16,
        eps: f32,
        out: View,
    },
    Add {
        a: View,
        b: View,
        out: View,
    },
    /// `gated` layouts put out silu(gate) * up.
    Linear {
        x: View,
        linear: Linear,
        out: View,
    },
    /// `qkv` is overwritten.
    Attention(Attention, AttentionViews),
    /// A sparse layer behind its router: each token by its `top` best experts.
    Experts(Experts, ExpertsViews),
    /// The output layer, into what the step was given for it. It has no bias.
    Logits {
        x: View,
        linear: Linear,
    },
}

/// The experts of one layer, (gate and up, down) each, all of one shape.
#[derive(Clone, Debug)]
pub struct Experts {
    pub experts: Vec<(Linear, Linear)>,
    pub top: usize,
    /// Whether a token's weights are made to add up to one.
    pub normalise: bool,
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
            Self::Linear { .. } => Kind::Linear,
            Self::Attention(..) => Kind::Attention,
            Self::Experts(..) => Kind::Experts,
            Self::Logits { .. } => Kind::Output,
        }
    }

    /// Note what is used, and see that the shapes fit.
    pub(super) fn check(&self, buffers: &mut Buffers, index: usize) -> Result<(), String> {
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
            Self::Linear { x, linear, out } => {
                bf(*x)? == bf(*out)? && linear.fits(x.cols, out.cols)
            }
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
                extents == [Extent::Token; 3]
                    && views.out.cols == hidden
                    && views.logits.cols == layer.experts.len()
                    && (1..=layer.experts.len()).contains(&layer.top)
                    && layer.experts.iter().all(fits)
            }
            Self::Logits { x, linear } => {
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

    /// # Safety
    /// `Plan::push` was promised what this points to; `check` has accepted it for these buffers,
    /// which are open; ids and logit rows of `step` exist.
    pub(super) unsafe fn run(
        &self,
        cpu: &mut Cpu,
        buffers: &Buffers,
        workspace: &mut Workspace,
        step: &Step,
        batch: &Batch,
        wanted: &mut Option<Wanted>,
    ) {
        // SAFETY: (of each block below) views were checked, and an operation's output is never one
        // of its inputs, since the buffers of both are in use at that operation.
        match self {
            Self::Embed { table, out } => {
                let held =
                    unsafe { Rows::from_raw(table.start, table.rows, table.cols, table.stride) };
                let out = unsafe { buffers.write(*out) };
                // Ids were checked with the step: there is no other error.
                let _ = embedding::gather(cpu, held, step.token_ids, out);
            }
            Self::Pick { x, out } => {
                let (x, out) = unsafe { (buffers.read(*x), buffers.write(*out)) };
                // Rows were checked with the step: there is no other error.
                let _ = embedding::gather(cpu, x, step.logit_rows, out);
            }
            Self::Angles {
                frequencies,
                factor,
                out,
            } => {
                let out = unsafe { buffers.write_f32(*out) };
                rotary::angles(cpu, step.positions, frequencies, *factor, out);
            }
            Self::RmsNorm {
                x,
                weight,
                eps,
                out,
            } => {
                let weight = unsafe { std::slice::from_raw_parts(*weight, x.cols) };
                let (x, out) = unsafe { (buffers.read(*x), buffers.write(*out)) };
                norm::rms_norm(cpu, x, weight, *eps, out);
            }
            Self::Add { a, b, out } => {
                let (a, b) = unsafe { (buffers.read(*a), buffers.read(*b)) };
                activation::add(cpu, a, b, unsafe { buffers.write(*out) });
            }
            Self::Linear { x, linear, out } => {
                let (x, out) = unsafe { (buffers.read(*x), buffers.write(*out)) };
                let out = if linear.layout.gated() {
                    Output::SiluMul(out)
                } else {
                    Output::Bf16(out)
                };
                unsafe { linear.run(cpu, x, out) };
            }
            Self::Logits { x, linear } => {
                let (x, weight) = unsafe { (buffers.read(*x), linear.packed()) };
                match wanted.take() {
                    Some(Wanted::Logits(out)) => {
                        linear::linear(cpu, x, &weight, None, Output::F32(out));
                    }
                    Some(Wanted::Greedy(out)) => linear::greedy(cpu, x, &weight, out),
                    None => {}
                }
            }
            Self::Attention(attention, views) => unsafe {
                attention.run(cpu, buffers, batch, views);
            },
            Self::Experts(layer, views) => unsafe {
                layer.run(cpu, buffers, workspace, views);
            },
        }
    }
}

impl Linear {
    fn fits(&self, inputs: usize, columns: usize) -> bool {
        self.layout.k() == inputs
            && self.layout.columns() == columns
            && self.weight.addr().is_multiple_of(64)
    }

    /// # Safety
    /// The weight is there for `'a`.
    unsafe fn packed<'a>(&self) -> Packed<'a> {
        // SAFETY: by the caller's promise.
        let bytes = unsafe { std::slice::from_raw_parts(self.weight, self.layout.bytes()) };
        match Packed::new(self.layout, bytes) {
            Ok(weight) => weight,
            Err(error) => unreachable!("checked when recorded: {error}"),
        }
    }

    /// # Safety
    /// The weight and bias are there.
    unsafe fn run(&self, cpu: &mut Cpu, x: Rows<bf16>, out: Output) {
        // SAFETY: by the caller's promise.
        let weight = unsafe { self.packed() };
        let n = self.layout.n();
        // SAFETY: by the caller's promise.
        let bias = self
            .bias
            .map(|bias| unsafe { std::slice::from_raw_parts(bias, n) });
        linear::linear(cpu, x, &weight, bias, out);
    }
}

impl Attention {
    /// # Safety
    /// As for `Op::run`.
    unsafe fn run(&self, cpu: &mut Cpu, buffers: &Buffers, batch: &Batch, views: &AttentionViews) {
        let d = self.kv.head_dim();
        // SAFETY: by the caller's promise; the cache is this step's alone.
        unsafe {
            let mut cache = Cache::from_raw(self.kv, self.cache, self.blocks);
            let norms = self.norms.map(|(query, key, eps)| HeadNorms {
                query: std::slice::from_raw_parts(query, d),
                key: std::slice::from_raw_parts(key, d),
                eps,
            });
            let angles = buffers.read_f32(views.angles);
            let qkv = buffers.write(views.qkv);
            attention::store(cpu, qkv, norms, angles, &mut cache, batch);
            let query = View {
                cols: self.heads * d,
                ..views.qkv
            };
            let (query, out) = (buffers.read(query), buffers.write(views.out));
            let scoring = Scoring {
                scale: self.scale,
                window: self.window,
                softcap: None,
            };
            attention::attend(cpu, query, &cache, batch, scoring, out);
        }
    }
}

impl Experts {
    /// # Safety
    /// As for `Op::run`.
    unsafe fn run(
        &self,
        cpu: &mut Cpu,
        buffers: &Buffers,
        workspace: &mut Workspace,
        views: &ExpertsViews,
    ) {
        // SAFETY: by the caller's promise.
        let experts: Vec<_> = self
            .experts
            .iter()
            .map(|(gate_up, down)| unsafe {
                Expert {
                    gate_up: gate_up.packed(),
                    down: down.packed(),
                }
            })
            .collect();
        // SAFETY: as above.
        let (x, logits, out) = unsafe {
            let out = buffers.write(views.out);
            (buffers.read(views.x), buffers.read(views.logits), out)
        };
        moe::mix(
            cpu,
            workspace,
            x,
            logits,
            &experts,
            self.top,
            self.normalise,
            out,
        );
    }
}
