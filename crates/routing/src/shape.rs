//! Shape: short, interactive work to wide tensor-parallel replicas while they are the quicker.
//!
//! A step of a wide replica is short, but its devices, as narrow replicas, would each carry only a part of its
//! requests. With `w` and `n` for the step's cost on wide and narrow ones and `k` for how many narrow replicas
//! have as many devices, wide wins below the number of requests at which both steps take the same time:
//!
//! ```text
//!   w.fixed + w.each * requests = n.fixed + n.each * requests / k
//! ```

use crate::candidate::{Candidate, StepCost};
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
    let candidate = &view.candidates[wide];
    let requests = candidate.requests() + 1.0;
    let few = requests <= crossover(view, wide, narrow);
    if few && !view.request.batch && is_short(view, wide) {
        Some((wide, Reason::Wide))
    } else {
        Some((narrow, Reason::Narrow))
    }
}

/// Requests on the wide replica from which its devices do better as narrow ones; infinite if they never do.
fn crossover(view: &View<'_>, wide: usize, narrow: usize) -> f64 {
    let ratio =
        f64::from(width(&view.candidates[wide])) / f64::from(width(&view.candidates[narrow]));
    let each = |cost: &StepCost| cost.token_ms + cost.request_ms;
    let (w, n) = (view.costs.of(wide), view.costs.of(narrow));
    let gained = n.fixed_ms - w.fixed_ms;
    let lost = each(w) - each(n) / ratio;
    if lost > 0.0 {
        (gained / lost).max(0.0)
    } else {
        f64::INFINITY
    }
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
