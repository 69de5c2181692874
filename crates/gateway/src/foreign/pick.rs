//! Which upstream gets a request: the one with the fewest unanswered requests for its weight, in turns where several have
//! as few; a session's own, unless that has far more.
//!
//! How quick a server elsewhere is, and what it has cached, is not told; unanswered requests are what both come to.

use std::cmp::Reverse;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parking_lot::Mutex;
use scalellm_routing::session_rank;

/// A session moves when its own upstream has more than so many times the least loaded one's, and a few.
const TOO_MUCH: u64 = 2;
const A_FEW: u64 = 4;

/// Why an upstream was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// There was no other.
    Only,
    /// It had the fewest unanswered requests for its weight.
    Load,
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
    pub const ALL: [Reason; 7] = [
        Reason::Only,
        Reason::Load,
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
}

impl Candidate {
    /// Whether it has `times` as many requests as `other` for its weight, and `more`, or fewer.
    fn has_at_most(&self, times: u64, more: u64, other: &Candidate) -> bool {
        let (own, others) = (u64::from(self.weight), u64::from(other.weight));
        let other_load = times * other.in_flight as u64 + more * others;
        self.in_flight as u64 * others <= other_load * own
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
    /// One of `candidates`; `None` if there is none.
    pub fn pick(&self, candidates: &[Candidate], session: Option<u64>) -> Option<(usize, Reason)> {
        if let [only] = candidates {
            return Some((only.index, Reason::Only));
        }
        let least = candidates
            .iter()
            .find(|one| candidates.iter().all(|other| one.has_at_most(1, 0, other)))?;
        let mut reason = Reason::Load;
        if let Some(session) = session {
            let rank = |one: &&Candidate| session_rank(session, one.id);
            let own = candidates.iter().max_by_key(rank)?;
            if own.has_at_most(TOO_MUCH, A_FEW, least) {
                return Some((own.index, Reason::Session));
            }
            reason = Reason::Moved;
        }
        let as_few: Vec<_> = candidates
            .iter()
            .filter(|one| one.has_at_most(1, 0, least))
            .map(|one| (one.index, i64::from(one.weight)))
            .collect();
        let next = next_turn(&mut self.due.lock(), &as_few)?;
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
mod tests {
    use super::*;

    fn candidates(of: &[(u32, usize)]) -> Vec<Candidate> {
        of.iter()
            .enumerate()
            .map(|(index, (weight, in_flight))| Candidate {
                index,
                id: index as u64,
                weight: *weight,
                in_flight: *in_flight,
            })
            .collect()
    }

    #[test]
    fn turns_are_shared_by_weight() {
        let mut due = Vec::new();
        let weights = [(0, 5), (2, 1)];
        let turns: Vec<usize> = (0..12)
            .filter_map(|_| next_turn(&mut due, &weights))
            .collect();
        assert_eq!(turns, [0, 0, 0, 2, 0, 0, 0, 0, 0, 2, 0, 0]);
        assert_eq!(next_turn(&mut due, &[]), None);
    }

    #[test]
    fn the_one_with_the_fewest_unanswered_for_its_weight_is_next() {
        for (of, next) in [
            (&[(1, 3), (1, 2), (1, 5)][..], 1),
            (&[(3, 5), (1, 2)], 0),
            (&[(3, 7), (1, 2)], 1),
            (&[(1, 0), (100, 1)], 0),
        ] {
            let picked = Picker::default().pick(&candidates(of), None);
            assert_eq!(picked, Some((next, Reason::Load)), "{of:?}");
        }
        assert_eq!(Picker::default().pick(&[], Some(1)), None);
        let only = Picker::default().pick(&candidates(&[(1, 900)]), Some(1));
        assert_eq!(only, Some((0, Reason::Only)));
    }

    #[test]
    fn a_session_stays_until_its_upstream_has_far_more_to_do() {
        let picker = Picker::default();
        let idle = candidates(&[(1, 0); 4]);
        for session in 0..100 {
            let (own, reason) = picker.pick(&idle, Some(session)).unwrap();
            assert_eq!(reason, Reason::Session);
            let mut busy = idle.clone();
            busy[own].in_flight = 4;
            let stays = picker.pick(&busy, Some(session));
            assert_eq!(stays, Some((own, Reason::Session)));
            busy[own].in_flight = 5;
            let (other, reason) = picker.pick(&busy, Some(session)).unwrap();
            assert_eq!(reason, Reason::Moved);
            assert_ne!(other, own);
        }
        let used: std::collections::BTreeSet<_> = (0..100)
            .filter_map(|session| picker.pick(&idle, Some(session)))
            .map(|(index, _)| index)
            .collect();
        assert_eq!(used.len(), 4);
    }
}
