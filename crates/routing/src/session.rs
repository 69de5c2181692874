//! Session: every request of a session to the same replica, unless that has too much to do.
//!
//! Replicas are ranked for each session by rendezvous hashing (Thaler, Ravishankar 1998), so that every gateway
//! finds the same one, and a replica that comes or goes moves only its own sessions. The first in that order
//! whose time is within a bound of the mean takes the request (after consistent hashing with bounded loads,
//! Mirrokni, Thorup, Zadimoghaddam 2016).

use crate::hash::mix;
use crate::policy::Reason;
use crate::prefix;
use crate::router::View;

/// A replica may be predicted to take this many times the mean until its first token, and so much more, which nobody
/// feels.
const BOUND: f64 = 1.25;
const SLACK_MS: f64 = 50.0;

/// The higher, the sooner a session goes to the replica of this id.
#[must_use]
pub fn session_rank(session: u64, id: u64) -> u64 {
    mix(session ^ mix(id))
}

/// Requests that name no session go where [`crate::Policy::Prefix`] sends them.
pub(crate) fn choose(view: &View<'_>) -> Option<(usize, Reason)> {
    let Some(session) = view.request.session else {
        return prefix::choose(view);
    };
    let count = view.candidates.len();
    let mean = view
        .predictions
        .iter()
        .map(|p| p.first_token_ms)
        .sum::<f64>()
        / count as f64;
    let mut ranked: Vec<usize> = (0..count).collect();
    ranked.sort_by_key(|at| std::cmp::Reverse(session_rank(session, view.candidates[*at].id)));
    let rank = ranked
        .iter()
        .position(|at| view.predictions[*at].first_token_ms <= BOUND * mean + SLACK_MS)
        .unwrap_or(0);
    let reason = if rank == 0 {
        Reason::Session
    } else {
        Reason::Moved
    };
    Some((ranked[rank], reason))
}
