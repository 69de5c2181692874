//! Which upstream gets a request: the one with the fewest unanswered requests for its weight, in turns where several have
//! as few; a session's own, or one that was sent the prompt's beginning, unless that has far more.
//!
//! How quick a server elsewhere is is not told; unanswered requests are what that comes to. Nor is what it has cached,
//! but it was sent what it has.

use std::cmp::{Ordering, Reverse};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parking_lot::Mutex;
use scalellm_routing::session_rank;

/// A session moves when its own upstream has more than so many times the least loaded one's, and a few. So does a prompt
/// that its upstream was sent wholly before; one that it was sent a part of moves so much sooner.
const TOO_MUCH: f64 = 2.0;
const A_FEW: f64 = 4.0;
/// Of a count for a weight, times that weight.
const ROUNDING: f64 = 1e-9;

/// Why an upstream was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// There was no other.
    Only,
    /// It had the fewest unanswered requests for its weight.
    Load,
    /// It was sent the longest beginning of the prompt.
    Prefix,
    /// None was sent any of the prompt.
    Cold,
    /// Another was sent more of the prompt, and has too much to do.
    Spread,
    /// It is the session's own.
    Session,
    /// The session's own has too much to do.
    Moved,
    /// None but fallbacks can take it.
    Fallback,
    /// Another has failed this request.
    Retry,
    /// Another has it too, and is late.
    Hedge,
}

impl Reason {
    pub const ALL: [Reason; 10] = [
        Reason::Only,
        Reason::Load,
        Reason::Prefix,
        Reason::Cold,
        Reason::Spread,
        Reason::Session,
        Reason::Moved,
        Reason::Fallback,
        Reason::Retry,
        Reason::Hedge,
    ];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Reason::Only => "only",
            Reason::Load => "load",
            Reason::Prefix => "prefix",
            Reason::Cold => "cold",
            Reason::Spread => "spread",
            Reason::Session => "session",
            Reason::Moved => "moved",
            Reason::Fallback => "fallback",
            Reason::Retry => "retry",
            Reason::Hedge => "hedge",
        }
    }
}

/// An upstream that can take a request.
#[derive(Debug, Clone, Copy)]
pub struct Candidate {
    pub index: usize,
    /// The same in every gateway.
    pub id: u64,
    pub weight: u32,
    pub in_flight: usize,
    /// Share of the prompt that it was sent before.
    pub sent: f64,
}

impl Candidate {
    fn load(&self) -> f64 {
        self.in_flight as f64 / f64::from(self.weight)
    }

    /// Whether it may be asked in the place of `least`, which has least to do, where that saves a share of a request's
    /// work. With nothing to save it has to have as little to do.
    fn is_worth(&self, saved: f64, least: &Candidate) -> bool {
        let times = 1.0 + (TOO_MUCH - 1.0) * saved;
        let most = times * least.load() * f64::from(self.weight) + A_FEW * saved;
        self.in_flight as f64 <= most + ROUNDING * most
    }
}

/// One model's choices.
#[derive(Default)]
pub struct Picker {
    /// Of smooth weighted round robin: how much each upstream's turn is due.
    due: Mutex<Vec<i64>>,
    counts: [AtomicU64; Reason::ALL.len()],
}

impl Picker {
    /// One of `candidates`; `None` if there is none. `by_prefix`: whether it was looked what they were sent.
    pub fn pick(
        &self,
        candidates: &[Candidate],
        session: Option<u64>,
        by_prefix: bool,
    ) -> Option<(usize, Reason)> {
        if let [only] = candidates {
            return Some((only.index, Reason::Only));
        }
        let least = candidates.iter().min_by(by_load)?;
        if let Some(session) = session {
            let rank = |one: &&Candidate| session_rank(session, one.id);
            let own = candidates.iter().max_by_key(rank)?;
            if own.is_worth(1.0, least) {
                return Some((own.index, Reason::Session));
            }
        }
        let worth: Vec<_> = candidates
            .iter()
            .filter(|one| one.is_worth(one.sent - least.sent, least))
            .collect();
        let best = *worth.iter().max_by(|a, b| {
            let by_sent = a.sent.total_cmp(&b.sent);
            by_sent.then_with(|| b.load().total_cmp(&a.load()))
        })?;
        let as_good: Vec<_> = worth
            .iter()
            .filter(|one| one.sent >= best.sent && one.load() <= best.load())
            .map(|one| (one.index, i64::from(one.weight)))
            .collect();
        let next = next_turn(&mut self.due.lock(), &as_good)?;
        let most = candidates.iter().map(|one| one.sent).fold(0.0, f64::max);
        let reason = match session {
            Some(_) => Reason::Moved,
            None if !by_prefix => Reason::Load,
            None if most <= 0.0 => Reason::Cold,
            None if best.sent >= most => Reason::Prefix,
            None => Reason::Spread,
        };
        Some((next, reason))
    }

    pub fn chosen(&self, reason: Reason) {
        self.counts[reason as usize].fetch_add(1, Relaxed);
    }

    /// Choices so far, by reason.
    pub fn counts(&self) -> impl Iterator<Item = (Reason, u64)> {
        let counts = Reason::ALL.into_iter().zip(&self.counts);
        counts.map(|(reason, count)| (reason, count.load(Relaxed)))
    }
}

/// Who has less to do, or has as much and was sent more, is less.
fn by_load(a: &&Candidate, b: &&Candidate) -> Ordering {
    let by_load = a.load().total_cmp(&b.load());
    by_load.then_with(|| b.sent.total_cmp(&a.sent))
}

/// Smooth weighted round robin: everybody's turn comes nearer by its weight, and whose is nearest pays for all.
fn next_turn(due: &mut Vec<i64>, weights: &[(usize, i64)]) -> Option<usize> {
    for (index, weight) in weights {
        if due.len() <= *index {
            due.resize(index + 1, 0);
        }
        due[*index] += weight;
    }
    let (next, _) = weights
        .iter()
        .max_by_key(|(index, _)| (due[*index], Reverse(*index)))?;
    due[*next] -= weights.iter().map(|(_, weight)| weight).sum::<i64>();
    Some(*next)
}

#[cfg(test)]
mod tests;
