//! A model's step, recorded once as a list of operations and run as often as needed.
//!
//! ```text
//! embed -> angles -> [ norm -> linear -> attention -> linear -> add -> norm -> ... ] -> norm -> logits
//!                                              '-> pick, in the last layer
//! ```
//!
//! One call runs all of them, for any number of tokens and logit rows. Weights, tables and caches
//! belong to whoever records the plan, and outlive it.

mod buffers;
mod fuse;
mod op;
mod run;

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::attention::{Batch, BatchError, Span};
use crate::cpu::Cpu;
use crate::linear::Shortlist;
use crate::moe::{Used, Workspace};
use crate::ranks::{RankLost, Ranks};
use crate::rows::RowsMut;
use crate::sampling::Draw;

pub use buffers::{Element, Extent, View};
pub use op::{
    Attention, AttentionViews, Division, Experts, ExpertsViews, Kind, Linear, Norm, Op, Table,
};

use buffers::Buffers;

/// Why a plan cannot be recorded or run.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error("operation {op} uses {what}")]
    Op { op: usize, what: String },
    #[error("the plan is not finished")]
    NotFinished,
    #[error("the plan is finished")]
    Finished,
    #[error("{0}")]
    Batch(#[from] BatchError),
    #[error("token id {id}, where the vocabulary has {rows}")]
    Token { id: i64, rows: usize },
    #[error("logits of row {row}, where the step has {rows}")]
    LogitRow { row: i64, rows: usize },
    #[error("spans of {spans} rows, where the step has {rows} tokens")]
    Rows { spans: usize, rows: usize },
    #[error("{draws} draws for {rows} logit rows, by {ranks} ranks")]
    Draws {
        draws: usize,
        rows: usize,
        ranks: usize,
    },
    #[error("draws that need more than the {} largest logits", Shortlist::MOST)]
    Needed,
    #[error("{0}")]
    Rank(#[from] RankLost),
}

/// What one step computes.
pub struct Step<'a> {
    pub token_ids: &'a [i64],
    /// Of each token in its sequence.
    pub positions: &'a [i64],
    /// Rows whose logits are asked for.
    pub logit_rows: &'a [i64],
    pub spans: &'a [Span],
    pub tables: &'a [i32],
}

/// What a step is asked of its logit rows.
pub enum Wanted<'a> {
    /// Their logits [logit rows, vocabulary].
    Logits(RowsMut<'a, f32>),
    /// The largest logit of each and the lowest id that has it, as `linear::greedy` finds them:
    /// logits are not written then.
    Greedy(&'a mut [(f32, u32)]),
    /// A token of each as the `Draw` says that belongs to it, where that needs no more logits than
    /// a `linear::Shortlist` has: they are not written then. Not among ranks.
    Tokens(&'a [Draw], &'a mut [Option<u32>]),
}

/// Operations, the buffers between them, and how long each kind took in the last step.
#[derive(Default)]
pub struct Plan {
    ops: Vec<Op>,
    buffers: Buffers,
    finished: bool,
    /// Shapes that every step's batch is checked against: tokens of a block and blocks.
    blocks: Option<(usize, usize)>,
    vocabulary: usize,
    experts: Workspace,
    /// Who else computes each step, if anybody does.
    ranks: Option<Arc<Mutex<Ranks>>>,
    times: [Duration; Kind::ALL.len()],
}

impl Plan {
    /// A plan of one of several ranks, which all run the same steps in the same order.
    #[must_use]
    pub fn among(ranks: Arc<Mutex<Ranks>>) -> Self {
        Self {
            ranks: Some(ranks),
            ..Self::default()
        }
    }

    /// A buffer of rows of `cols` numbers, not yet used.
    pub fn buffer(&mut self, cols: usize, element: Element, extent: Extent) -> usize {
        self.buffers.add(cols, element, extent)
    }

    /// Append an operation.
    ///
    /// # Errors
    /// If it uses what is not in a buffer, or shapes that do not fit together; once finished.
    ///
    /// # Safety
    /// What it points to holds what it says, stays where it is as long as the plan lives, and the
    /// KV cache is nobody else's while `run` runs.
    pub unsafe fn push(&mut self, op: Op) -> Result<(), PlanError> {
        if self.finished {
            return Err(PlanError::Finished);
        }
        let index = self.ops.len();
        self.note(&op, index)?;
        match &op {
            Op::Attention(attention, _) => {
                let held = (attention.kv.block_tokens(), attention.blocks);
                if *self.blocks.get_or_insert(held) != held {
                    let what = format!("a cache of {held:?}, another had {:?}", self.blocks);
                    return Err(PlanError::Op { op: index, what });
                }
            }
            Op::Embed { table, .. } => self.vocabulary = table.rows,
            _ => {}
        }
        self.ops.push(op);
        Ok(())
    }

    /// Join the operations that one kernel does together, and place the buffers that are left.
    ///
    /// # Errors
    /// If what was joined does not fit together.
    pub fn finish(&mut self) -> Result<(), PlanError> {
        if self.finished {
            return Ok(());
        }
        let ops = fuse::fuse(self.ops.clone(), &self.buffers);
        self.buffers.forget();
        for (index, op) in ops.iter().enumerate() {
            self.note(op, index)?;
        }
        self.ops = ops;
        self.buffers.place();
        self.finished = true;
        Ok(())
    }

    /// See that an operation fits, and note what it uses.
    fn note(&mut self, op: &Op, index: usize) -> Result<(), PlanError> {
        let ranks = self.ranks.as_ref().map_or(1, |ranks| ranks.lock().count());
        op.check(&mut self.buffers, index, ranks)
            .map_err(|what| PlanError::Op { op: index, what })
    }

    #[must_use]
    pub fn ops(&self) -> &[Op] {
        &self.ops
    }

    /// How long each kind of operation took in the last step, all of that kind together.
    pub fn times(&self) -> impl Iterator<Item = (Kind, Duration)> + '_ {
        Kind::ALL.into_iter().zip(self.times)
    }

    /// How evenly all steps' tokens chose their experts.
    #[must_use]
    pub fn experts_used(&self) -> &Used {
        self.experts.used()
    }

    /// Compute a step and what is wanted of its logit rows.
    ///
    /// # Errors
    /// If the step contradicts itself; nothing has been written, and no rank waited for, then. If
    /// another rank has ended.
    pub fn run(&mut self, cpu: &mut Cpu, step: &Step, wanted: Wanted) -> Result<(), PlanError> {
        let (block_tokens, blocks) = self.blocks.unwrap_or((16, 0));
        let batch = Batch::new(step.spans, step.tables, block_tokens, blocks)?;
        self.check(step)?;
        if let Wanted::Tokens(draws, tokens) = &wanted {
            self.check_draws(step, draws, tokens)?;
        }
        self.buffers
            .open(step.token_ids.len(), step.logit_rows.len());
        self.times = [Duration::ZERO; Kind::ALL.len()];
        let mut ranks = self.ranks.as_ref().map(|ranks| ranks.lock());
        let mut wanted = Some(wanted);
        let mut began = Instant::now();
        for op in &self.ops {
            // SAFETY: `push` was promised what it points to; `check` has seen ids and rows.
            unsafe {
                op.run(
                    cpu,
                    ranks.as_deref_mut(),
                    &self.buffers,
                    &mut self.experts,
                    step,
                    &batch,
                    &mut wanted,
                )
            }?;
            let ended = Instant::now();
            let exchanged = ranks.as_mut().map(|ranks| ranks.take_time());
            let exchanged = exchanged.unwrap_or_default();
            self.times[op.kind() as usize] += (ended - began).saturating_sub(exchanged);
            self.times[Kind::Exchange as usize] += exchanged;
            began = ended;
        }
        Ok(())
    }

    fn check_draws(
        &self,
        step: &Step,
        draws: &[Draw],
        tokens: &[Option<u32>],
    ) -> Result<(), PlanError> {
        let (draws_given, rows) = (draws.len(), step.logit_rows.len());
        let ranks = self.ranks.as_ref().map_or(1, |ranks| ranks.lock().count());
        if (draws_given, tokens.len(), ranks) != (rows, rows, 1) {
            return Err(PlanError::Draws {
                draws: draws_given,
                rows,
                ranks,
            });
        }
        if draws.iter().any(|draw| draw.logits_needed().is_none()) {
            return Err(PlanError::Needed);
        }
        Ok(())
    }

    fn check(&self, step: &Step) -> Result<(), PlanError> {
        if !self.finished {
            return Err(PlanError::NotFinished);
        }
        let tokens = step.token_ids.len();
        let spans = step.spans.iter().map(|span| span.count).sum();
        let positions = step.positions.len();
        if spans != tokens || positions != tokens {
            return Err(PlanError::Rows {
                spans: if spans == tokens { positions } else { spans },
                rows: tokens,
            });
        }
        let inside = |value: i64, end: usize| usize::try_from(value).is_ok_and(|at| at < end);
        let rows = self.vocabulary;
        if let Some(&id) = step.token_ids.iter().find(|&&id| !inside(id, rows)) {
            return Err(PlanError::Token { id, rows });
        }
        let rows = tokens;
        if let Some(&row) = step.logit_rows.iter().find(|&&row| !inside(row, rows)) {
            return Err(PlanError::LogitRow { row, rows });
        }
        Ok(())
    }
}
