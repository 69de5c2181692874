//! Shape: short, interactive work to wide tensor-parallel replicas while they are the quicker.
//!
//! A step of a wide replica is short, but its devices, as narrow replicas, would each carry only a part of its
//! requests. With `w` and `n` for the step's cost on wide and narrow ones and `k` for how many narrow replicas
//! have as many devices, wide wins while its step is the shorter one:
//!
//! ```text
//!   w.fixed + w.each * requests <= n.fixed + n.each * max(1, requests / k)
//! ```
//!
//! Where the wide one, or every narrow one, was not measured for minutes, nothing can be compared: a lonely request
//! tries the wide replica, and those that come beside it the narrow ones, so that both are measured.

use crate::candidate::Candidate;
use crate::policy::Reason;
use crate::router::View;

/// Work is short while its prompt takes a wide replica no longer than this many steps of its running streams.
const SHORT_STEPS: f64 = 16.0;

pub(crate) fn choose(view: &View<'_>) -> Option<(usize, Reason)> {
    let widths = || view.candidates.iter().map(width);
    let widest = widths().max()?;
    if widths().all(|width| width == widest) {
        return Some((view.soonest_done(|_| true)?, Reason::Load));
    }
    let is_wide = |at: usize| width(&view.candidates[at]) == widest;
    let wide = view.soonest_done(is_wide)?;
    let narrow = view.soonest_done(|at| !is_wide(at))?;
    let requests = view.candidates[wide].requests() + 1.0;
    let measured = view.soonest_done(|at| !is_wide(at) && view.costs.own(at).is_some());
    let few = match (view.costs.own(wide), measured) {
        (Some(_), Some(narrow)) => is_wide_quicker(view, wide, narrow, requests),
        _ => requests <= 1.0,
    };
    if few && !view.request.batch && is_short(view, wide) {
        Some((wide, Reason::Wide))
    } else {
        Some((narrow, Reason::Narrow))
    }
}

/// Whether a wide replica's step of so many requests is shorter than that of its devices as narrow ones.
fn is_wide_quicker(view: &View<'_>, wide: usize, narrow: usize, requests: f64) -> bool {
    let ratio =
        f64::from(width(&view.candidates[wide])) / f64::from(width(&view.candidates[narrow]));
    let step_ms = |at: usize, requests: f64| {
        let cost = view.costs.own(at);
        cost.map_or(f64::INFINITY, |cost| cost.decode_ms(requests, 0.0))
    };
    step_ms(wide, requests) <= step_ms(narrow, (requests / ratio).max(1.0))
}

fn is_short(view: &View<'_>, at: usize) -> bool {
    let candidate = &view.candidates[at];
    let cost = view.costs.of(at);
    let cached = view.cached[at] as f64;
    let prefill_ms = cost.prefill_ms(view.request.prompt_tokens as f64 - cached, cached);
    let step_ms = cost.decode_ms(candidate.requests() + 1.0, candidate.context_tokens as f64);
    prefill_ms <= SHORT_STEPS * step_ms
}

fn width(candidate: &Candidate) -> u32 {
    candidate.tensor_parallel_size.max(1)
}
