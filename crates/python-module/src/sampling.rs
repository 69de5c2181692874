//! `_core.cpu_draw` and `_core.cpu_logprobs`: the next token of every row of a batch.

use pyo3::prelude::*;
use scalellm_cpu_kernels::rows::Rows;
use scalellm_cpu_kernels::sampling::{self, Draw, TokenLogprobs, row_key};

use crate::kernels::{RowsAt, SliceAt, on_cpu, refused, slice};

/// Add the functions of this file to `module`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(cpu_draw, module)?)?;
    module.add_function(wrap_pyfunction!(cpu_logprobs, module)?)
}

/// How a row's token is chosen: `scalellm.kernels.sampling.DRAW`.
#[derive(Clone, Copy)]
#[repr(C)]
struct DrawRow {
    temperature: f64,
    top_p: f64,
    min_p: f64,
    top_k: u64,
    seed: u64,
    choice: u64,
    /// Tokens that came before.
    index: u64,
}

/// # Safety
/// There are such rows of `vocab` numbers.
unsafe fn scores<'a>(at: RowsAt, vocab: usize) -> PyResult<Rows<'a, f32>> {
    let (start, rows, stride) = at;
    if vocab == 0 || u32::try_from(vocab).is_err() || (rows > 1 && stride < vocab) {
        return Err(refused(format!("{vocab} scores every {stride}")));
    }
    // SAFETY: by the caller's promise.
    Ok(unsafe { Rows::from_raw(start as *const f32, rows, vocab, stride.max(vocab)) })
}

/// Draw an id for every row of f32 scores [rows, vocab] as as many `DrawRow`s at `draws` say; None
/// where the largest score is not finite.
#[pyfunction]
fn cpu_draw(
    py: Python<'_>,
    scores_at: RowsAt,
    vocab: usize,
    draws: usize,
) -> PyResult<Vec<Option<u32>>> {
    // SAFETY: the caller's arrays have these sizes.
    let (scores, draws) = unsafe { (scores(scores_at, vocab)?, draws_at((draws, scores_at.1))) };
    on_cpu(py, |cpu| {
        let mut tokens = vec![None; draws.len()];
        sampling::draw(cpu, scores, &draws, &mut tokens);
        tokens
    })
}

/// # Safety
/// There are as many rows of `scalellm.kernels.sampling.DRAW`.
pub unsafe fn draws_at(at: SliceAt) -> Vec<Draw> {
    // SAFETY: by the caller's promise.
    let rows = unsafe { slice::<DrawRow>(at) };
    rows.iter().map(draw_of).collect()
}

fn draw_of(row: &DrawRow) -> Draw {
    Draw {
        temperature: row.temperature,
        top_k: usize::try_from(row.top_k).unwrap_or(usize::MAX),
        top_p: row.top_p,
        min_p: row.min_p,
        key: row_key(row.seed, row.choice, row.index),
    }
}

/// Token id, logprob, rank, ids and logprobs of the most likely tokens.
type TokenLogprobsGiven = (u32, f32, u32, Vec<u32>, Vec<f32>);

/// Log-probabilities of `tokens[row]` under each row of f32 logits [rows, vocab], with the
/// `alternatives[row]` most likely ids.
#[pyfunction]
fn cpu_logprobs(
    py: Python<'_>,
    logits: RowsAt,
    vocab: usize,
    tokens: Vec<u32>,
    alternatives: Vec<usize>,
) -> PyResult<Vec<TokenLogprobsGiven>> {
    let rows = logits.1;
    if tokens.len() != rows || alternatives.len() != rows {
        return Err(refused(format!(
            "{rows} rows, {} tokens, {} alternatives",
            tokens.len(),
            alternatives.len()
        )));
    }
    if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab) {
        return Err(refused(format!("token {token} of a vocabulary of {vocab}")));
    }
    // SAFETY: the caller's tensor has these sizes.
    let logits = unsafe { scores(logits, vocab)? };
    let found = on_cpu(py, |cpu| {
        let mut found = vec![TokenLogprobs::default(); rows];
        sampling::logprobs(cpu, logits, &tokens, &alternatives, &mut found);
        found
    })?;
    let given = |(token, found): (u32, TokenLogprobs)| {
        (token, found.logprob, found.rank, found.ids, found.logprobs)
    };
    Ok(tokens.into_iter().zip(found).map(given).collect())
}
