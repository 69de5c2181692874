//! Computes the operations of a plan: from views and pointers to the kernels' calls.

use crate::attention::{self, Batch, Cache, HeadNorms, Scoring};
use crate::bf16;
use crate::cpu::Cpu;
use crate::linear::{self, Input, Output, Packed};
use crate::moe::{self, Among, Expert, Workspace};
use crate::ranks::{RankLost, Ranks};
use crate::rows::Rows;
use crate::{activation, embedding, norm, rotary, sampling};

use super::buffers::{Buffers, View};
use super::op::{Attention, AttentionViews, Division, Experts, ExpertsViews, Linear, Norm, Op};
use super::{Step, Wanted};

impl Op {
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
            Self::RmsNorm { x, norm, out } => {
                let norm = unsafe { norm.of(x.cols) };
                let (x, out) = unsafe { (buffers.read(*x), buffers.write(*out)) };
                norm::rms_norm(cpu, x, norm, out);
            }
            Self::Add { a, b, out } => {
                let (a, b) = unsafe { (buffers.read(*a), buffers.read(*b)) };
                activation::add(cpu, a, b, unsafe { buffers.write(*out) });
            }
            Self::Linear {
                x,
                norm,
                linear,
                residual,
                out,
            } => {
                let norm = norm.map(|norm| unsafe { norm.of(x.cols) });
                let rows = unsafe { buffers.read(*x) };
                let (weight, bias) = unsafe { (linear.packed(), linear.bias()) };
                let out = unsafe { linear.output(buffers, *out, *residual) };
                linear::linear(cpu, Input { rows, norm }, &weight, bias, out);
            }
            Self::Reduced {
                x,
                linear,
                residual,
                out,
            } => {
                let (weight, bias) = unsafe { (linear.packed(), linear.bias()) };
                let out = unsafe { linear.output(buffers, *out, *residual) };
                let x = unsafe { buffers.read(*x) };
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
    /// The bias, if any, is there for `'a`.
    unsafe fn bias<'a>(&self) -> Option<&'a [bf16]> {
        let n = self.layout.n();
        // SAFETY: by the caller's promise.
        self.bias
            .map(|bias| unsafe { std::slice::from_raw_parts(bias, n) })
    }

    /// # Safety
    /// As for `Buffers::write`; the residual, if any, is only read.
    unsafe fn output<'a>(
        &self,
        buffers: &Buffers,
        out: View,
        residual: Option<View>,
    ) -> Output<'a> {
        // SAFETY: by the caller's promise.
        let out = unsafe { buffers.write(out) };
        match residual {
            // SAFETY: as above.
            Some(residual) => Output::Residual(out, unsafe { buffers.read(residual) }),
            None if self.layout.gated() => Output::SiluMul(out),
            None => Output::Bf16(out),
        }
    }
}

impl Norm {
    /// # Safety
    /// The weight is there for `'a`.
    unsafe fn of<'a>(&self, cols: usize) -> norm::RmsNorm<'a> {
        norm::RmsNorm {
            // SAFETY: by the caller's promise.
            weight: unsafe { std::slice::from_raw_parts(self.weight, cols) },
            eps: self.eps,
        }
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
