//! The operations of a plan.

use crate::attention::{self, Batch, Cache, HeadNorms, KvLayout, Scoring};
use crate::bf16;
use crate::cpu::Cpu;
use crate::linear::{self, Layout, Output, Packed};
use crate::moe::{self, Among, Expert, Workspace};
use crate::ranks::{RankLost, Ranks};
use crate::rows::Rows;
use crate::{activation, embedding, norm, rotary, sampling};

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
    /// A linear of which each rank has some groups along k.
    Reduced {
        x: View,
        linear: Linear,
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
            Self::Linear { x, linear, out } => {
                bf(*x)? == bf(*out)? && linear.fits(x.cols, out.cols)
            }
            Self::Reduced { x, linear, out } => {
                bf(*x)? == bf(*out)?
                    && linear.fits(x.cols, out.cols)
                    && !linear.layout.gated()
                    && ranks > 1
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

    /// # Safety
    /// `Plan::push` was promised what this points to; `check` has accepted it for these buffers,
    /// which are open; ids and logit rows of `step` exist.
    #[expect(
        clippy::too_many_arguments,
        reason = "all that a step's operations share"
    )]
    pub(super) unsafe fn run(
        &self,
        cpu: &mut Cpu,
        ranks: Option<&mut Ranks>,
        buffers: &Buffers,
        workspace: &mut Workspace,
        step: &Step,
        batch: &Batch,
        wanted: &mut Option<Wanted>,
    ) -> Result<(), RankLost> {
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
            Self::Reduced { x, linear, out } => {
                let (x, out) = unsafe { (buffers.read(*x), buffers.write(*out)) };
                let (weight, bias) = unsafe { (linear.packed(), linear.bias()) };
                if let Some(ranks) = ranks {
                    linear::reduced(cpu, ranks, x, &weight, bias, out)?;
                }
            }
            Self::Logits { x, linear, first } => {
                let (x, weight) = unsafe { (buffers.read(*x), linear.packed()) };
                match (wanted.take(), ranks) {
                    (Some(Wanted::Logits(out)), ranks) => {
                        linear::linear(cpu, x, &weight, None, Output::F32(out));
                        // Other ranks write their columns of the same rows.
                        ranks.map_or(Ok(()), Ranks::meet)?;
                    }
                    (Some(Wanted::Greedy(out)), None) => linear::greedy(cpu, x, &weight, out),
                    (Some(Wanted::Greedy(out)), Some(ranks)) => {
                        linear::greedy_among(cpu, ranks, x, &weight, *first, out)?;
                    }
                    (Some(Wanted::Tokens(draws, tokens)), _) => {
                        sampling::draw_likely(cpu, x, &weight, draws, tokens);
                    }
                    (None, _) => {}
                }
            }
            Self::Attention(attention, views) => unsafe {
                attention.run(cpu, buffers, batch, views);
            },
            Self::Experts(layer, views) => unsafe {
                layer.run(cpu, ranks, buffers, workspace, views)?;
            },
        }
        Ok(())
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
        let (weight, bias) = unsafe { (self.packed(), self.bias()) };
        linear::linear(cpu, x, &weight, bias, out);
    }

    /// # Safety
    /// The bias, if any, is there for `'a`.
    unsafe fn bias<'a>(&self) -> Option<&'a [bf16]> {
        let n = self.layout.n();
        // SAFETY: by the caller's promise.
        self.bias
            .map(|bias| unsafe { std::slice::from_raw_parts(bias, n) })
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
        ranks: Option<&mut Ranks>,
        buffers: &Buffers,
        workspace: &mut Workspace,
        views: &ExpertsViews,
    ) -> Result<(), RankLost> {
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
        let among = match (self.division, ranks) {
            (Division::Inner, Some(ranks)) => Among::Inner(ranks),
            (Division::Experts, Some(ranks)) => Among::Experts(ranks),
            _ => Among::Nobody,
        };
        moe::mix(
            cpu,
            workspace,
            x,
            logits,
            &experts,
            among,
            self.top,
            self.normalise,
            out,
        )
    }
}
