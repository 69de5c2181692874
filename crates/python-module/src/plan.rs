//! `_core.CpuPlan`: a model's step, recorded once; `scalellm.executor.recording` makes them.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use scalellm_cpu_kernels::bf16;
use scalellm_cpu_kernels::plan::{
    Attention, AttentionViews, Division, Element, Experts, ExpertsViews, Extent, Linear, Norm, Op,
    Plan, PlanError, Step, Table, View, Wanted,
};
use scalellm_cpu_kernels::rows::RowsMut;

use crate::kernels::{RowsAt, SliceAt, kv_layout, refused, shared, slice, spans};
use crate::matrices::layout;
use crate::ranks::{PyRanks, lost};
use crate::sampling::draws_at;

/// Add the class of this file to `module`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<CpuPlan>()
}

/// A step: int64 ids and positions, int64 logit rows, int64 spans [n, 4], int32 tables.
type StepAt = (SliceAt, usize, SliceAt, SliceAt, SliceAt);
/// Buffer, first column, columns.
type ViewAt = (usize, usize, usize);

fn view((buffer, first, cols): ViewAt) -> View {
    View {
        buffer,
        first,
        cols,
    }
}

fn matrix(code: &[usize], weight: SliceAt, bias: usize) -> PyResult<Linear> {
    let layout = layout(code)?;
    if weight.1 != layout.bytes() {
        return Err(refused(format!("{} bytes for {layout:?}", weight.1)));
    }
    Ok(Linear {
        layout,
        weight: weight.0 as *const u8,
        bias: (bias != 0).then_some(bias as *const bf16),
    })
}

/// A recorded step; `scalellm.executor.recording` makes them.
#[pyclass(module = "scalellm._core")]
struct CpuPlan {
    plan: Plan,
}

impl CpuPlan {
    fn push(&mut self, op: Op) -> PyResult<()> {
        // SAFETY: the recorder keeps what the ops point to for as long as the plan.
        unsafe { self.plan.push(op) }.map_err(refused)
    }

    fn compute(&mut self, py: Python<'_>, step: StepAt, wanted: Wanted) -> PyResult<()> {
        let (token_ids, positions, logit_rows, span_rows, tables) = step;
        let plan = &mut self.plan;
        let cpu = shared(None, 0)?;
        // SAFETY: the caller's arrays have these sizes.
        let spans = unsafe { spans(span_rows)? };
        py.detach(|| {
            // SAFETY: as above.
            let step = unsafe {
                Step {
                    token_ids: slice(token_ids),
                    positions: slice((positions, token_ids.1)),
                    logit_rows: slice(logit_rows),
                    spans: &spans,
                    tables: slice::<i32>(tables),
                }
            };
            plan.run(&mut cpu.lock(), &step, wanted)
        })
        .map_err(|error| match error {
            PlanError::Rank(error) => lost(error),
            error => refused(error),
        })
    }
}

#[pymethods]
impl CpuPlan {
    /// `ranks`: with whom its steps are computed.
    #[new]
    #[pyo3(signature = (ranks=None))]
    fn new(ranks: Option<&PyRanks>) -> Self {
        let plan = ranks.map(|ranks| Plan::among(Arc::clone(&ranks.ranks)));
        Self {
            plan: plan.unwrap_or_default(),
        }
    }

    fn __len__(&self) -> usize {
        self.plan.ops().len()
    }

    /// A buffer of rows of `cols` numbers, bf16 or f32, one a token or one a logit row.
    fn buffer(&mut self, cols: usize, f32: bool, outputs: bool) -> usize {
        let element = if f32 { Element::F32 } else { Element::Bf16 };
        let extent = if outputs {
            Extent::Output
        } else {
            Extent::Token
        };
        self.plan.buffer(cols, element, extent)
    }

    fn embed(&mut self, table: RowsAt, out: ViewAt) -> PyResult<()> {
        let (start, rows, stride) = table;
        let table = Table {
            start: start as *const bf16,
            rows,
            cols: out.2,
            stride,
        };
        self.push(Op::Embed {
            table,
            out: view(out),
        })
    }

    fn pick(&mut self, x: ViewAt, out: ViewAt) -> PyResult<()> {
        self.push(Op::Pick {
            x: view(x),
            out: view(out),
        })
    }

    fn angles(&mut self, frequencies: Vec<f32>, factor: f32, out: ViewAt) -> PyResult<()> {
        self.push(Op::Angles {
            frequencies,
            factor,
            out: view(out),
        })
    }

    fn rms_norm(&mut self, x: ViewAt, weight: usize, eps: f32, out: ViewAt) -> PyResult<()> {
        self.push(Op::RmsNorm {
            x: view(x),
            norm: Norm {
                weight: weight as *const bf16,
                eps,
            },
            out: view(out),
        })
    }

    fn add(&mut self, a: ViewAt, b: ViewAt, out: ViewAt) -> PyResult<()> {
        self.push(Op::Add {
            a: view(a),
            b: view(b),
            out: view(out),
        })
    }

    fn linear(
        &mut self,
        x: ViewAt,
        code: Vec<usize>,
        weight: SliceAt,
        bias: usize,
        out: ViewAt,
    ) -> PyResult<()> {
        let linear = matrix(&code, weight, bias)?;
        self.push(Op::Linear {
            x: view(x),
            norm: None,
            linear,
            residual: None,
            out: view(out),
        })
    }

    /// As `linear`, of which each rank has some of the groups along k.
    fn reduced(
        &mut self,
        x: ViewAt,
        code: Vec<usize>,
        weight: SliceAt,
        bias: usize,
        out: ViewAt,
    ) -> PyResult<()> {
        let linear = matrix(&code, weight, bias)?;
        self.push(Op::Reduced {
            x: view(x),
            linear,
            residual: None,
            out: view(out),
        })
    }

    /// `first`: the id of the weight's first row, where other ranks have the other ids.
    fn logits(&mut self, x: ViewAt, code: Vec<usize>, weight: SliceAt, first: u32) -> PyResult<()> {
        let linear = matrix(&code, weight, 0)?;
        self.push(Op::Logits {
            x: view(x),
            linear,
            first,
        })
    }

    #[expect(clippy::too_many_arguments, reason = "one torch operator's arguments")]
    fn attention(
        &mut self,
        qkv: ViewAt,
        heads: usize,
        norms: (usize, usize),
        eps: f32,
        angles: ViewAt,
        cache: SliceAt,
        kv: Vec<usize>,
        scale: f32,
        window: usize,
        out: ViewAt,
    ) -> PyResult<()> {
        let kv = kv_layout(&kv)?;
        let attention = Attention {
            heads,
            kv,
            cache: cache.0 as *mut u8,
            blocks: cache.1 / kv.bytes_per_block(),
            norms: (norms.0 != 0).then_some((norms.0 as *const bf16, norms.1 as *const bf16, eps)),
            scale,
            window: (window > 0).then_some(window),
        };
        let views = AttentionViews {
            qkv: view(qkv),
            angles: view(angles),
            out: view(out),
        };
        self.push(Op::Attention(attention, views))
    }

    /// `experts`: (layout, weight) of gate and up, then of down, of each. `division`: 0 none, 1 of
    /// each expert, 2 of the experts, of which these are this rank's.
    #[expect(clippy::too_many_arguments, reason = "one torch operator's arguments")]
    fn experts(
        &mut self,
        x: ViewAt,
        logits: ViewAt,
        experts: Vec<(Vec<usize>, SliceAt, Vec<usize>, SliceAt)>,
        top: usize,
        normalise: bool,
        division: u8,
        out: ViewAt,
    ) -> PyResult<()> {
        let division = match division {
            0 => Division::Nothing,
            1 => Division::Inner,
            2 => Division::Experts,
            _ => return Err(refused(format!("division {division}"))),
        };
        let experts = experts
            .into_iter()
            .map(|(gate_up, gate_up_at, down, down_at)| {
                Ok((matrix(&gate_up, gate_up_at, 0)?, matrix(&down, down_at, 0)?))
            })
            .collect::<PyResult<Vec<_>>>()?;
        let layer = Experts {
            experts,
            top,
            normalise,
            division,
        };
        let views = ExpertsViews {
            x: view(x),
            logits: view(logits),
            out: view(out),
        };
        self.push(Op::Experts(layer, views))
    }

    fn finish(&mut self) -> PyResult<()> {
        self.plan.finish().map_err(refused)
    }

    /// Run a step and write its f32 logits [logit rows, `vocab_size`]: this rank's columns of them.
    fn logits_of(
        &mut self,
        py: Python<'_>,
        step: StepAt,
        vocab_size: usize,
        logits: usize,
    ) -> PyResult<()> {
        let columns = self.plan.ops().iter().find_map(|op| match op {
            Op::Logits { linear, first, .. } => Some((*first as usize, linear.layout.n())),
            _ => None,
        });
        let (first, n) = columns.unwrap_or_default();
        if first + n > vocab_size {
            return Err(refused(format!(
                "logits {first} .. {} of {vocab_size}",
                first + n
            )));
        }
        let rows = step.2.1;
        let start = (logits as *mut f32).wrapping_add(first);
        // SAFETY: the caller's tensor has these sizes, and its columns are nobody else's meanwhile.
        let logits = unsafe { RowsMut::from_raw(start, rows, n, vocab_size) };
        self.compute(py, step, Wanted::Logits(logits))
    }

    /// Run a step: the lowest id of each logit row's largest logit, None where that is not finite.
    fn greedy_ids(&mut self, py: Python<'_>, step: StepAt) -> PyResult<Vec<Option<u32>>> {
        let mut best = vec![(f32::NEG_INFINITY, 0); step.2.1];
        self.compute(py, step, Wanted::Greedy(&mut best))?;
        let id = |(logit, id): (f32, u32)| logit.is_finite().then_some(id);
        Ok(best.into_iter().map(id).collect())
    }

    /// Run a step: a token for each logit row as as many rows of DRAW at `draws` say, None where its
    /// logits are not finite. Refused where a draw needs more than the largest logits.
    fn draw_ids(
        &mut self,
        py: Python<'_>,
        step: StepAt,
        draws: usize,
    ) -> PyResult<Vec<Option<u32>>> {
        let rows = step.2.1;
        // SAFETY: the caller's array has this size.
        let draws = unsafe { draws_at((draws, rows)) };
        let mut tokens = vec![None; rows];
        self.compute(py, step, Wanted::Tokens(&draws, &mut tokens))?;
        Ok(tokens)
    }

    /// (layers, read, busiest, choices) of the proto's `ExpertUse`, since the plan was made.
    fn expert_use(&self) -> (u64, u64, u64, Vec<u64>) {
        let used = self.plan.experts_used();
        (used.layers, used.read, used.busiest, used.choices.clone())
    }

    /// Milliseconds that each kind of operation took in the last step.
    fn times_ms<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let times = PyDict::new(py);
        for (kind, time) in self.plan.times() {
            times.set_item(kind.name(), time.as_secs_f64() * 1e3)?;
        }
        Ok(times)
    }
}
