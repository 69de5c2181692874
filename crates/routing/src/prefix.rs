//! Prefix: the replica that is predicted to be done first, given what its cache holds of the prompt.
//!
//! A cached prefix is worth the time that it saves, and nothing more: a replica that has it loses against one
//! that has not as soon as its queue and its streams cost more than computing the prefix anew. A hot prefix is
//! so computed again elsewhere, and from then on cached in both places.

use crate::policy::Reason;
use crate::router::View;

pub(crate) fn choose(view: &View<'_>) -> Option<(usize, Reason)> {
    let longest = view.cached.iter().copied().max().unwrap_or(0);
    let at = view.soonest_done(|_| true)?;
    let reason = match view.cached[at] {
        _ if longest == 0 => Reason::Cold,
        cached if cached == longest => Reason::Prefix,
        _ => Reason::Spread,
    };
    Some((at, reason))
}
