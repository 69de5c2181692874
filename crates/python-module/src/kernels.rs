//! `_core.cpu_*`: the kernels of crates/cpu-kernels, on memory that torch owns.
//!
//! Memory comes as integers: an address, or (address, rows, stride) and the like. Python answers for
//! what it points to; sizes are checked here before any pointer is followed.

use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use scalellm_cpu_kernels::attention::{
    self, Batch, Cache, HeadNorms, KvLayout, KvType, Scoring, Span,
};
use scalellm_cpu_kernels::bf16;
use scalellm_cpu_kernels::cpu::Cpu;
use scalellm_cpu_kernels::level::Level;
use scalellm_cpu_kernels::linear::Packed;
use scalellm_cpu_kernels::moe::{self, Among, Expert, Workspace};
use scalellm_cpu_kernels::norm::RmsNorm;
use scalellm_cpu_kernels::rows::{Rows, RowsMut};
use scalellm_cpu_kernels::{norm, rotary};

use crate::matrices::layout;
use crate::ranks::{lost, ranks_at};

/// Add the classes and functions of this file to `module`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(cpu_level, module)?)?;
    module.add_function(wrap_pyfunction!(cpu_start, module)?)?;
    module.add_function(wrap_pyfunction!(cpu_kv_block_bytes, module)?)?;
    module.add_function(wrap_pyfunction!(cpu_attention, module)?)?;
    module.add_function(wrap_pyfunction!(cpu_experts, module)?)?;
    module.add_function(wrap_pyfunction!(cpu_rms_norm, module)?)?;
    module.add_function(wrap_pyfunction!(cpu_rotary_angles, module)?)
}

/// Address, rows, elements from one row to the next.
pub type RowsAt = (usize, usize, usize);
/// Address and number of elements.
pub type SliceAt = (usize, usize);

pub fn refused(error: impl ToString) -> PyErr {
    PyValueError::new_err(error.to_string())
}

// ------------------------------------------------------------------ the team

/// The process's one set of threads; like torch's own, it belongs to nobody in particular.
static CPU: OnceLock<Mutex<Arc<Mutex<Cpu>>>> = OnceLock::new();

fn all_cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

pub fn shared(threads: Option<usize>, nice: i32) -> PyResult<Arc<Mutex<Cpu>>> {
    if let (Some(cpu), None) = (CPU.get(), threads) {
        return Ok(Arc::clone(&cpu.lock()));
    }
    let threads = threads.unwrap_or_else(all_cores);
    let made = Cpu::new(threads, nice).map_err(|error| PyOSError::new_err(error.to_string()))?;
    let made = Arc::new(Mutex::new(made));
    let held = CPU.get_or_init(|| Mutex::new(Arc::clone(&made)));
    *held.lock() = Arc::clone(&made);
    Ok(made)
}

/// Run `work` on the team, without the GIL.
pub fn on_cpu<T: Send>(py: Python<'_>, work: impl FnOnce(&mut Cpu) -> T + Send) -> PyResult<T> {
    let cpu = shared(None, 0)?;
    Ok(py.detach(|| work(&mut cpu.lock())))
}

/// The best instructions of this processor that kernels use: "portable", "avx2" or "avx512".
#[pyfunction]
fn cpu_level() -> String {
    Level::detect().to_string()
}

/// Start the threads that kernels run on, the caller's included; a former set ends.
#[pyfunction]
fn cpu_start(threads: usize, nice: i32) -> PyResult<()> {
    shared(Some(threads), nice).map(drop)
}

// ------------------------------------------------------------------ attention

pub fn kv_layout(code: &[usize]) -> PyResult<KvLayout> {
    let &[dtype, block_tokens, kv_heads, head_dim] = code else {
        return Err(refused("a KV layout is four numbers"));
    };
    let dtype = match dtype {
        0 => KvType::Bf16,
        1 => KvType::Int8,
        _ => return Err(refused(format!("KV type {dtype}"))),
    };
    KvLayout::new(block_tokens, kv_heads, head_dim, dtype).map_err(refused)
}

/// Bytes of one block of one layer.
#[pyfunction]
fn cpu_kv_block_bytes(code: Vec<usize>) -> PyResult<usize> {
    Ok(kv_layout(&code)?.bytes_per_block())
}

/// # Safety
/// `at` has that many rows of four numbers.
pub unsafe fn spans(at: SliceAt) -> PyResult<Vec<Span>> {
    // SAFETY: by the caller's promise.
    let rows = unsafe { slice::<[i64; 4]>(at) };
    let number = |value: i64| usize::try_from(value).map_err(|_| refused(format!("span {value}")));
    rows.iter()
        .map(|&[first_row, start, count, table_first]| {
            Ok(Span {
                first_row: number(first_row)?,
                start: number(start)?,
                count: number(count)?,
                table_first: number(table_first)?,
            })
        })
        .collect()
}

/// # Safety
/// `at` has that many elements; with none its address means nothing.
pub unsafe fn slice<'a, T>((start, count): SliceAt) -> &'a [T] {
    if count == 0 {
        return &[];
    }
    // SAFETY: by the caller's promise.
    unsafe { std::slice::from_raw_parts(start as *const T, count) }
}

fn heads_fit(cols: usize, heads: usize, kv: KvLayout, angles: usize) -> PyResult<()> {
    let (d, kv_heads) = (kv.head_dim(), kv.kv_heads());
    let fits = heads.is_multiple_of(kv_heads) && heads > 0 && cols >= (heads + 2 * kv_heads) * d;
    if fits && angles <= d && angles.is_multiple_of(2) {
        return Ok(());
    }
    Err(refused(format!(
        "{heads} heads of {kv:?} in rows of {cols}, {angles} angles"
    )))
}

/// Norm, rotary, store, attend: the eager form of a plan's attention. A `window` of 0 is none.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "one torch operator's arguments")]
fn cpu_attention(
    py: Python<'_>,
    qkv: RowsAt,
    heads: usize,
    norms: (usize, usize),
    eps: f32,
    angles: SliceAt,
    cache: SliceAt,
    kv: Vec<usize>,
    span_rows: SliceAt,
    tables: SliceAt,
    scale: f32,
    window: usize,
    out: usize,
) -> PyResult<()> {
    let kv = kv_layout(&kv)?;
    let d = kv.head_dim();
    heads_fit(qkv.2, heads, kv, angles.1)?;
    // SAFETY: the caller's tensors have these sizes.
    let (spans, tables) = unsafe { (spans(span_rows)?, slice::<i32>(tables)) };
    let blocks = cache.1 / kv.bytes_per_block();
    let batch = Batch::new(&spans, tables, kv.block_tokens(), blocks).map_err(refused)?;
    if spans
        .last()
        .is_some_and(|span| span.first_row + span.count > qkv.1)
    {
        return Err(refused("spans beyond the rows"));
    }
    on_cpu(py, |cpu| {
        // SAFETY: the caller's tensors have these sizes, and nobody else uses them meanwhile.
        unsafe {
            let norms = (norms.0 != 0).then(|| HeadNorms {
                query: slice((norms.0, d)),
                key: slice((norms.1, d)),
                eps,
            });
            let mut cache = Cache::from_raw(kv, cache.0 as *mut u8, blocks);
            let cols = (heads + 2 * kv.kv_heads()) * d;
            let rows = RowsMut::from_raw(qkv.0 as *mut bf16, qkv.1, cols, qkv.2);
            let angles = Rows::from_raw(angles.0 as *const f32, qkv.1, angles.1, angles.1);
            attention::store(cpu, rows, norms, angles, &mut cache, &batch);
            let query = Rows::from_raw(qkv.0 as *const bf16, qkv.1, heads * d, qkv.2);
            let out = RowsMut::from_raw(out as *mut bf16, qkv.1, heads * d, heads * d);
            let window = (window > 0).then_some(window);
            let scoring = Scoring {
                scale,
                window,
                softcap: None,
            };
            attention::attend(cpu, query, &cache, &batch, scoring, out);
        }
    })
}

// ------------------------------------------------------------------ rows

/// `weight` is (address, width); `out` is contiguous.
#[pyfunction]
fn cpu_rms_norm(py: Python<'_>, x: RowsAt, weight: SliceAt, eps: f32, out: usize) -> PyResult<()> {
    let width = weight.1;
    if x.2 < width && x.1 > 1 {
        return Err(refused(format!("rows of {} for a width of {width}", x.2)));
    }
    on_cpu(py, |cpu| {
        // SAFETY: the caller's tensors have these sizes.
        unsafe {
            let x = Rows::from_raw(x.0 as *const bf16, x.1, width, x.2.max(width));
            let out = RowsMut::from_raw(out as *mut bf16, x.rows(), width, width);
            let weight = slice(weight);
            norm::rms_norm(cpu, x, RmsNorm { weight, eps }, out);
        }
    })
}

/// cos, then sin, of `positions` times each frequency, times `factor`; `out` is contiguous.
#[pyfunction]
fn cpu_rotary_angles(
    py: Python<'_>,
    positions: SliceAt,
    frequencies: Vec<f32>,
    factor: f32,
    out: usize,
) -> PyResult<()> {
    on_cpu(py, |cpu| {
        let width = 2 * frequencies.len();
        // SAFETY: the caller's tensors have these sizes.
        let (positions, out) = unsafe {
            let out = RowsMut::from_raw(out as *mut f32, positions.1, width, width);
            (slice::<i64>(positions), out)
        };
        rotary::angles(cpu, positions, &frequencies, factor, out);
    })
}

/// Gate and up, then down, of one expert: address and bytes of each packed weight.
type ExpertAt = (SliceAt, SliceAt);

/// A sparse layer behind its router; `codes` are the layouts of gate and up, and of down. `x` and
/// `logits` are contiguous. `among`: the ranks that divide it, 0 for none, and whether they divide the
/// experts, of which `experts` are this rank's, or each expert.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "one torch operator's arguments")]
fn cpu_experts(
    py: Python<'_>,
    x: SliceAt,
    logits: usize,
    experts: Vec<ExpertAt>,
    codes: (Vec<usize>, Vec<usize>),
    top: usize,
    normalise: bool,
    among: (usize, bool),
    out: usize,
) -> PyResult<()> {
    let (gate_up, down) = (layout(&codes.0)?, layout(&codes.1)?);
    let (tokens, hidden) = (x.1, gate_up.k());
    let fits = gate_up.gated() && gate_up.columns() == down.k() && down.columns() == hidden;
    if !fits || top == 0 || experts.is_empty() {
        return Err(refused(format!(
            "{top} of {} experts of {gate_up:?}, {down:?}",
            experts.len()
        )));
    }
    on_cpu(py, |cpu| {
        // SAFETY: the caller's tensors have these sizes.
        unsafe {
            let weights = |(a, b): &ExpertAt| {
                Ok(Expert {
                    gate_up: Packed::new(gate_up, slice(*a)).map_err(refused)?,
                    down: Packed::new(down, slice(*b)).map_err(refused)?,
                })
            };
            let experts = experts.iter().map(weights).collect::<PyResult<Vec<_>>>()?;
            let x = Rows::from_raw(x.0 as *const bf16, tokens, hidden, hidden);
            let mut ranks = (among.0 != 0).then(|| ranks_at(among.0).lock());
            let count = ranks.as_ref().map_or(1, |ranks| ranks.count());
            let choices = experts.len() * if among.1 { count } else { 1 };
            if top > choices {
                return Err(refused(format!("{top} of {choices} experts")));
            }
            let among = match ranks.as_deref_mut() {
                None => Among::Nobody,
                Some(ranks) if among.1 => Among::Experts(ranks),
                Some(ranks) => Among::Inner(ranks),
            };
            let logits = Rows::from_raw(logits as *const bf16, tokens, choices, choices);
            let out = RowsMut::from_raw(out as *mut bf16, tokens, hidden, hidden);
            let mut workspace = Workspace::default();
            moe::mix(
                cpu,
                &mut workspace,
                x,
                logits,
                &experts,
                among,
                top,
                normalise,
                out,
            )
            .map_err(lost)
        }
    })?
}
