//! Prefix: the replica that is predicted to be done first, given what its cache holds of the prompt.
//!
//! A cached prefix is worth the time that it saves, and nothing more: a replica that has it loses against one
//! that has not as soon as its queue and its streams cost more than computing the prefix anew. A hot prefix is
//! so computed again elsewhere, and from then on cached in both places.

use crate::policy::Reason;
use crate::router::View;

/// Another replica has to be this much sooner: predictions are no better, and a second copy takes room in a cache.
const LEAVE_FACTOR: f64 = 1.1;

pub(crate) fn choose(view: &View<'_>) -> Option<(usize, Reason)> {
    let longest = view.cached.iter().copied().max().unwrap_or(0);
    let soonest = view.soonest_done(|_| true)?;
    let has_longest = view.soonest_done(|at| view.cached[at] == longest)?;
    let total_ms = |at: usize| view.predictions[at].total_ms;
    let at = if total_ms(has_longest) <= LEAVE_FACTOR * total_ms(soonest) {
        has_longest
    } else {
        soonest
    };
    let reason = match view.cached[at] {
        _ if longest == 0 => Reason::Cold,
        cached if cached == longest => Reason::Prefix,
        _ => Reason::Spread,
    };
    Some((at, reason))
}
